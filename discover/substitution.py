"""Discovery by element substitution: known structures with one or two elements replaced by similar ones.

The baseline that generative models have to beat (Szymanski and Bartel 2025, Mater. Horiz., doi:10.1039/d5mh00010f,
compare with such baselines). No learning: a known structure is taken at random, one or two of its elements are each
replaced by one of their six most similar elements, the cell stays as it is, and the composition must be new and pass
SMACT with alloys allowed.
"""

from collections.abc import Collection, Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from pymatgen.core import Composition, Element, Structure

from discover.metrics.validity import compositional_validity
from proxies.elements import PROPERTIES, element_properties

N_SIMILAR = 6
SIMILARITY = ("electronegativity", "atomic_radius", "group", "row")
COMPOSITION_PROTOCOL = "smact4"
_MAX_TRIES = 200  # parents per structure wanted, before the parents are said to be exhausted


class SubstitutionError(ValueError):
    """Parents that do not yield the substituted structures that were asked for."""


def substitute(
    parents: Sequence[Structure], n: int, *, known: Collection[str], generator: torch.Generator
) -> list[Structure]:
    """Return `n` structures in which one or two elements of a random parent are replaced by similar ones.

    Number of elements, coordinates and cell of the parent are kept. Similar elements come from those that occur in the
    parents. One draw in two replaces two elements, where there are two.

    Args:
        parents: Known structures, such as training structures below 0.08 eV/atom above hull.
        n: Structures to return.
        known: Reduced formulas that do not count as new.
        generator: Source of randomness.

    Raises:
        SubstitutionError: If the parents do not yield that many.
    """
    if not parents:
        raise SubstitutionError("substitution needs parents: known structures, got none")
    elements = tuple(sorted({site.specie.Z for parent in parents for site in parent}))
    found: list[Structure] = []
    for _ in range(_MAX_TRIES * n):
        if len(found) == n:
            return found
        parent = parents[int(torch.randint(len(parents), (1,), generator=generator))]
        child = _replace_elements(parent, elements, generator)
        if child is not None and _is_new_and_valid(child.composition, known):
            found.append(child)
    if len(found) == n:
        return found
    raise SubstitutionError(
        f"{len(parents)} parents gave {len(found)} of the {n} new structures asked for; ask for fewer or give more"
    )


@cache
def similar_elements(elements: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Return the six most similar of `elements` to each of them, nearest first.

    Similarity is the Euclidean distance of electronegativity, atomic radius, group and row, each scaled to unit
    variance over the elements.

    Args:
        elements: Atomic numbers.
    """
    columns = [PROPERTIES.index(name) for name in SIMILARITY]
    table: NDArray[np.float32] = element_properties()[list(elements)][:, columns]
    distance = np.linalg.norm(table[:, None] - table[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argsort(axis=1, kind="stable")[:, : min(N_SIMILAR, len(elements) - 1)]
    return {z: tuple(elements[i] for i in row) for z, row in zip(elements, nearest.tolist(), strict=True)}


def _replace_elements(parent: Structure, elements: tuple[int, ...], generator: torch.Generator) -> Structure | None:
    """Return the parent with one or two elements replaced, None where two elements became one."""
    present = sorted({site.specie.Z for site in parent})
    n_replaced = 1 + int(torch.randint(2, (1,), generator=generator)) if len(present) > 1 else 1
    order = torch.randperm(len(present), generator=generator).tolist()
    mapping = {z: z for z in present}
    for place in order[:n_replaced]:
        choices = similar_elements(elements)[present[place]]
        if not choices:
            return None
        mapping[present[place]] = choices[int(torch.randint(len(choices), (1,), generator=generator))]
    if len(set(mapping.values())) < len(present):
        return None
    species = [Element.from_Z(mapping[site.specie.Z]) for site in parent]
    return Structure(parent.lattice, species, parent.frac_coords)


def _is_new_and_valid(composition: Composition, known: Collection[str]) -> bool:
    is_new = composition.reduced_formula not in known
    return is_new and bool(compositional_validity([composition], protocol=COMPOSITION_PROTOCOL)[0])
