"""Known prototypes as proposals: crystals of the same anonymous composition with their elements exchanged.

A template says where the atoms of each kind sit (space group, letters, free parameters), what shape the cell has
relative to the sum of elemental volumes, and which elements were seen in each kind's place. Templates are either the
rows of a data set or an aggregate of one (`discover.train_templates`); both are searched in the same way.
"""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from pymatgen.core import Composition, Element
from torch import Tensor

from discover.data import PreparedData
from discover.errors import CheckpointError, DataError
from discover.proposals import SOURCES, Proposals
from discover.run_folder import write_atomic
from discover.structure.fingerprint import N_BINS, fingerprints, pairwise_distances
from discover.structure.orbits import parameters_of_data
from envs.crystal import CrystalBatch
from envs.reference_volume import log_reference_volume
from envs.symmetry import SYMMETRY
from proxies.elements import PROPERTIES, element_properties

STABLE = 0.08  # eV/atom above the hull, the criterion of MP-20
SHIPPED = Path(__file__).parent / "pretrained" / "templates.npz"
MAX_ASSIGNMENTS = 720  # of elements to kinds with equal counts
#: What makes two elements alike: property and weight of its z-score. The sum of absolute differences is a distance.
_LIKENESS = {"electronegativity": 1.25, "atomic_radius": 1.2, "group": 0.75, "row": 0.7}
#: Distance of fingerprints below which two proposals count as one; StructureMatcher calls 97 % of such pairs equal.
SAME_STRUCTURE = 0.1
_PREVALENCE = 0.2  # weight of the log of the number of materials behind a template beside the likeness of elements
_OVERSHOOT = 4  # candidates looked at for each one kept


@dataclass(frozen=True)
class Templates:
    """Prototypes with the elements seen on them; kinds of atom are ordered by increasing count."""

    space_group: Tensor  # (t,) int64
    letters: Tensor  # (t, max_orbits) int64, -1 = padding
    kinds: Tensor  # (t, max_orbits) int64 kind of each orbit, -1 = padding
    parameters: Tensor  # (t, max_orbits, 3) float64 free Wyckoff parameters
    cells: Tensor  # (t, 6) float64 a, b, c over the cube root of the conventional cell's elemental volumes; degrees
    cell_spread: Tensor  # (t, 6) float64 standard deviations of log(a, b, c) and of the angles, 0 for single crystals
    kind_counts: Tensor  # (t, max_kinds) int64 atoms of each kind per primitive cell, ascending, 0 = padding
    kind_elements: Tensor  # (t, max_kinds, max_seen) int64 elements seen in a kind's place, 0 = padding
    kind_shares: Tensor  # (t, max_kinds, max_seen) float64 their shares, adding up to 1 over each kind
    n_materials: Tensor  # (t,) int64 crystals behind a template
    e_above_hull: Tensor  # (t,) float64 eV/atom, NaN where not known
    formulas: NDArray[np.str_]  # (t,) reduced formula of the crystal, "" for aggregates

    def __len__(self) -> int:
        """Return the number of templates."""
        return len(self.space_group)

    @cached_property
    def groups(self) -> dict[tuple[int, ...], Tensor]:
        """Rows of the templates of each anonymous composition, such as (1, 1, 3)."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, counts in enumerate(self.kind_counts.tolist()):
            rows.setdefault(tuple(n for n in counts if n), []).append(row)
        return {key: torch.tensor(members) for key, members in rows.items()}

    @cached_property
    def _known_fingerprints(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def fingerprints(self, counts: tuple[int, ...]) -> Tensor:
        """Return the fingerprints of the templates of one anonymous composition, in the order of `groups`."""
        if counts not in self._known_fingerprints:
            rows = self.groups[counts]
            elements = torch.arange(1, len(counts) + 1).expand(len(rows), -1)
            crystals, parameters = self.realise(rows, elements)
            found = fingerprints(crystals, parameters, self.kinds[rows], len(counts))
            self._known_fingerprints[counts] = found
        return self._known_fingerprints[counts]

    def realise(self, rows: Tensor, elements: Tensor) -> tuple[CrystalBatch, Tensor]:
        """Return crystals with the templates' symmetry and shape, and their free parameters.

        Args:
            rows: (m,) int64 templates.
            elements: (m, k) int64 atomic number of each kind.
        """
        kinds, letters, groups = self.kinds[rows], self.letters[rows], self.space_group[rows] - 1
        used = kinds >= 0
        atoms = torch.where(used, elements.gather(1, kinds.clamp(min=0, max=elements.shape[1] - 1)), 0)
        counts = torch.where(used, SYMMETRY.primitive_multiplicity[groups[:, None], letters.clamp(min=0)], 0)
        crystals = CrystalBatch(self.space_group[rows], atoms, letters, counts, self.cells[rows])
        per_cell = crystals.composition * crystals.centring[:, None]
        edge = torch.exp(log_reference_volume(per_cell, torch.arange(per_cell.shape[1])) / 3.0)
        cells = self.cells[rows].clone()
        cells[:, :3] *= edge[:, None]
        return CrystalBatch(crystals.space_group, atoms, letters, counts, cells), self.parameters[rows]

    def select(self, rows: Tensor) -> Self:
        """Return the templates at `rows` (indices or a bool mask)."""
        index = rows.numpy()
        return type(self)(
            **{
                field.name: getattr(self, field.name)[index if field.name == "formulas" else rows]
                for field in fields(self)
            }
        )


@dataclass(frozen=True)
class Query:
    """A composition with its elements ordered as kinds are: by count, then by atomic number."""

    elements: Tensor  # (k,) int64
    counts: tuple[int, ...]  # atoms per primitive cell, ascending
    formula: str  # reduced

    @classmethod
    def of(cls, composition: dict[str, int]) -> Self:
        """Return the query of a composition.

        Raises:
            DataError: If an element is unknown or a count is not a positive whole number.
        """
        for symbol, count in composition.items():
            if not Element.is_valid_symbol(symbol) or count < 1 or count != int(count):
                raise DataError(
                    f"composition {composition}: {symbol!r}: {count} is not an element with a whole number of atoms "
                    "in the primitive cell"
                )
        order = sorted((int(count), Element(symbol).Z) for symbol, count in composition.items())
        counts = tuple(count for count, _ in order)
        return cls(torch.tensor([z for _, z in order]), counts, str(Composition(composition).reduced_formula))

    def composition(self) -> dict[str, int]:
        """Return the atoms of each element in the primitive cell."""
        return {Element.from_Z(z).symbol: count for z, count in zip(self.elements.tolist(), self.counts, strict=True)}


@dataclass(frozen=True)
class Candidates:
    """Templates with an assignment of a query's elements, best first."""

    rows: Tensor  # (m,) int64 template
    order: Tensor  # (m, k) int64 index of the query's element on each kind
    affinity: (
        Tensor  # (m,) float64 mean over atoms of the log-likeness to the elements seen, and a bonus; see `_affinity`
    )
    fingerprints: Tensor  # (m, k, k, n_bins) float32, kinds in the order of the query's elements

    def select(self, rows: Tensor) -> Self:
        """Return the candidates at `rows`."""
        return type(self)(self.rows[rows], self.order[rows], self.affinity[rows], self.fingerprints[rows])


def nearest(templates: Templates, query: Query, n: int, *, other_formulas: bool = False) -> Candidates:
    """Return the `n` templates and assignments whose elements are most like the query's.

    Args:
        templates: Where to look.
        query: What to look for.
        n: Candidates wanted; fewer come where there are fewer.
        other_formulas: Leave out templates of the query's own reduced formula.
    """
    k = len(query.counts)
    rows = templates.groups.get(query.counts, torch.zeros(0, dtype=torch.int64))
    place = torch.arange(len(rows))
    if other_formulas and len(rows):
        place = place[torch.from_numpy(templates.formulas[rows.numpy()] != query.formula)]
    if not len(place):
        no_order, no_fingerprint = torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k, k, N_BINS)
        return Candidates(place, no_order, torch.zeros(0).double(), no_fingerprint)
    orders = assignments(query.counts)
    affinity = _affinity(templates, rows[place], query, orders).flatten()
    best = affinity.argsort(descending=True, stable=True)[:n]
    place, order = place[best // len(orders)], orders[best % len(orders)]
    on_kind = order.argsort(dim=1)  # kind on which each of the query's elements sits
    found = templates.fingerprints(query.counts)[place[:, None, None], on_kind[:, :, None], on_kind[:, None, :]]
    return Candidates(rows[place], order, affinity[best], found)


def search(templates: Templates, query: Query, n: int, *, other_formulas: bool = False) -> Candidates:
    """Return the `n` templates and assignments whose elements are most like the query's, without near repeats.

    The arguments are those of `nearest`.
    """
    found = nearest(templates, query, n * _OVERSHOOT, other_formulas=other_formulas)
    return found.select(_without_repeats(found.fingerprints)[:n])


def retrieve(
    templates: Templates, compositions: Sequence[dict[str, int]], n: int, *, other_formulas: bool = False
) -> Proposals:
    """Return up to `n` proposals for each composition, most alike elements first; the score is that likeness.

    Args:
        templates: Where to look.
        compositions: Atoms of each element in the primitive cell.
        n: Proposals for each composition.
        other_formulas: Leave out templates of the composition's own reduced formula.

    Raises:
        DataError: If a composition is not one.
    """
    parts = []
    for index, composition in enumerate(compositions):
        query = Query.of(composition)
        parts.append(as_proposals(templates, query, search(templates, query, n, other_formulas=other_formulas), index))
    return Proposals.cat(parts)


def as_proposals(templates: Templates, query: Query, candidates: Candidates, index: int) -> Proposals:
    """Return candidates as proposals for the composition number `index`."""
    crystals, parameters = templates.realise(candidates.rows, query.elements[candidates.order])
    m = len(candidates.rows)
    return Proposals(
        crystals,
        parameters,
        torch.full((m,), index),
        candidates.affinity,
        torch.full((m,), SOURCES.index("template")),
    )


def templates_of_data(data: PreparedData, *, stable: float = STABLE) -> Templates:
    """Return the rows of a data set as templates.

    Args:
        data: Prepared rows.
        stable: Rows this far (eV/atom) above the hull or further are left out; those without a label stay only where
            no row has one.

    Raises:
        DataError: If no row is left.
    """
    above = data.labels["e_above_hull"]
    keep = torch.ones(len(data), dtype=torch.bool) if bool(above.isnan().all()) else above < stable
    if not bool(keep.any()):
        raise DataError(f"no row has e_above_hull < {stable} eV/atom, so there is no template")
    crystals, parameters = data.crystals.select(keep), parameters_of_data(data)[keep]
    kinds, kind_counts, kind_elements = kinds_of(crystals)
    return Templates(
        space_group=crystals.space_group,
        letters=crystals.letters,
        kinds=kinds,
        parameters=parameters,
        cells=relative_cells(crystals),
        cell_spread=torch.zeros(len(crystals), 6, dtype=torch.float64),
        kind_counts=kind_counts,
        kind_elements=kind_elements[..., None],
        kind_shares=(kind_elements[..., None] > 0).double(),
        n_materials=torch.ones(len(crystals), dtype=torch.int64),
        e_above_hull=above[keep],
        formulas=data.formulas[keep.numpy()],
    )


#: How each array of an aggregate is stored.
_STORED: dict[str, type[np.generic]] = {
    "space_group": np.uint8,
    "letters": np.int8,
    "kinds": np.int8,
    "parameters": np.float32,
    "cells": np.float32,
    "cell_spread": np.float16,
    "kind_counts": np.uint8,
    "kind_elements": np.uint8,
    "kind_shares": np.float16,
    "n_materials": np.uint16,
}


def save_templates(templates: Templates, path: Path) -> int:
    """Write an aggregate as npz and return its size in bytes.

    Formulas and energies of single crystals are not written.

    Raises:
        RunFolderError: If the file cannot be written.
    """
    buffer = io.BytesIO()
    arrays = {name: getattr(templates, name).numpy().astype(kind) for name, kind in _STORED.items()}
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
    return len(buffer.getvalue())


def load_templates(path: Path = SHIPPED) -> Templates:
    """Return the aggregate that ships, or another one.

    Raises:
        CheckpointError: If the file is missing or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: torch.from_numpy(stored[name]) for name in _STORED}
    except Exception as error:  # numpy raises many kinds for a broken archive
        raise CheckpointError(
            f"{path} holds no templates ({error}); restore it, or build it with python -m discover.train_templates"
        ) from error
    real = ("parameters", "cells", "cell_spread", "kind_shares")
    n = len(arrays["space_group"])
    return Templates(
        **{name: array.double() if name in real else array.long() for name, array in arrays.items()},
        e_above_hull=torch.full((n,), torch.nan, dtype=torch.float64),
        formulas=np.full(n, ""),
    )


def kinds_of(crystals: CrystalBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kind of each orbit (n, max_orbits), and count and element of each kind, both (n, max_kinds).

    Kinds are a crystal's elements ordered by count, then by atomic number.
    """
    composition = crystals.composition
    present = composition > 0
    n_kinds = int(present.sum(dim=1).max())
    rank = torch.where(present, composition * 1000 + torch.arange(composition.shape[1]), 2**40)
    elements = rank.argsort(dim=1)[:, :n_kinds]
    counts = composition.gather(1, elements)
    kind_of_element = torch.zeros_like(composition).scatter_(1, elements, torch.arange(n_kinds).expand_as(elements))
    kinds = torch.where(crystals.counts > 0, kind_of_element.gather(1, crystals.elements), -1)
    return kinds, counts, torch.where(counts > 0, elements, 0)


def relative_cells(crystals: CrystalBatch) -> Tensor:
    """Return (n, 6) conventional cells with lengths over the cube root of the sum of elemental volumes."""
    per_cell = crystals.composition * crystals.centring[:, None]
    edge = torch.exp(log_reference_volume(per_cell, torch.arange(per_cell.shape[1])) / 3.0)
    cells = crystals.lattice_parameters.clone()
    cells[:, :3] /= edge[:, None]
    return cells


@cache
def element_distances() -> Tensor:
    """Return (119, 119) float64 distance between elements in electronegativity, radius, group and row."""
    table = element_properties().astype(np.float64)
    weighted = np.stack([table[:, PROPERTIES.index(name)] * weight for name, weight in _LIKENESS.items()], axis=1)
    return torch.from_numpy(np.abs(weighted[:, None] - weighted[None]).sum(axis=-1))


@cache
def assignments(counts: tuple[int, ...]) -> Tensor:
    """Return (p, k) int64 orders of elements on kinds that keep the counts, at most `MAX_ASSIGNMENTS`."""
    blocks = [[i for i, count in enumerate(counts) if count == value] for value in sorted(set(counts))]
    orders = itertools.product(*(itertools.permutations(block) for block in blocks))
    rows = [list(itertools.chain.from_iterable(order)) for order in itertools.islice(orders, MAX_ASSIGNMENTS)]
    return torch.tensor(rows)


def _affinity(templates: Templates, rows: Tensor, query: Query, orders: Tensor) -> Tensor:
    """Return (t, p) mean over atoms of log Σ share · exp(-distance) between a kind's elements and the one it gets.

    Templates of many materials get a bonus.
    """
    k = len(query.counts)
    likeness = torch.exp(-element_distances()[:, query.elements])  # (119, k)
    likeness[0] = 0.0
    seen = likeness[templates.kind_elements[rows, :k]]  # (t, k, max_seen, k)
    log_likeness = (seen * templates.kind_shares[rows, :k, :, None]).sum(dim=2).log()  # (t, kind, element)
    weights = torch.tensor(query.counts, dtype=torch.float64) / sum(query.counts)
    bonus = _PREVALENCE * templates.n_materials[rows].double().log()
    return (log_likeness[:, torch.arange(k), orders] * weights).sum(dim=-1) + bonus[:, None]


def _without_repeats(found: Tensor) -> Tensor:
    """Return the indices of fingerprints that are no nearer than `SAME_STRUCTURE` to an earlier kept one."""
    near = (pairwise_distances(found, found) < SAME_STRUCTURE).numpy()
    kept: list[int] = []
    free = np.ones(len(found), dtype=bool)
    for index in range(len(found)):
        if free[index]:
            kept.append(index)
            free &= ~near[index]
    return torch.tensor(kept, dtype=torch.int64)
