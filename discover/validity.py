"""Independent checks of sampled crystals, by SMACT, PyXtal and plain metric rules: none shares code with the masks."""

import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from pymatgen.core import Composition, Element
from pyxtal.symmetry import Group
from smact.screening import smact_validity

from envs.crystal import CrystalBatch

_GAVE_UP = "too many combinations"  # in the warning of SMACT, which then calls the composition invalid
_TOLERANCE = 1e-4  # Å and degrees; sampled cells obey their lattice system to rounding
#: Crystal systems as the last space group of each, in the order of the International Tables.
_LAST_OF_SYSTEM = (2, 15, 74, 142, 167, 194, 230)


@dataclass(frozen=True)
class Validity:
    """Which crystals pass each check; all (n,) bool."""

    smact: NDArray[np.bool_]  # False too where SMACT gave up
    smact_decided: NDArray[np.bool_]  # with mixed valence it gives up on many atoms
    wyckoff: NDArray[np.bool_]
    lattice: NDArray[np.bool_]

    @property
    def all(self) -> NDArray[np.bool_]:
        """Return which crystals pass every check that was made."""
        return (self.smact | ~self.smact_decided) & self.wyckoff & self.lattice


def check_crystals(crystals: CrystalBatch, *, ionic: bool, mixed_valence: bool = False) -> Validity:
    """Check charge neutrality and Pauling order, Wyckoff compatibility, and the lattice system.

    Args:
        crystals: The crystals.
        ionic: Apply ``smact_validity(composition, include_alloys=False)``; without it every composition passes.
        mixed_valence: Let SMACT assign several states to an element.
    """
    formulas = crystals.formulas()
    valid = {f: _is_ionic(f, mixed_valence) if ionic else True for f in set(formulas)}
    return Validity(
        smact=np.array([bool(valid[f]) for f in formulas], dtype=bool),
        smact_decided=np.array([valid[f] is not None for f in formulas], dtype=bool),
        wyckoff=_wyckoff_compatible(crystals),
        lattice=_fits_lattice_system(crystals),
    )


def _is_ionic(formula: str, mixed_valence: bool) -> bool | None:
    """Return SMACT's verdict on a formula, None where it gave up."""
    composition = Composition(formula)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        valid = bool(smact_validity(composition, include_alloys=False, mixed_valence=mixed_valence))
    gave_up = any(_GAVE_UP in str(warning.message) for warning in caught)
    return None if gave_up and not valid else len(composition) > 1 and valid


@cache
def _group(number: int) -> Group:
    return Group(number)


def _wyckoff_compatible(crystals: CrystalBatch) -> NDArray[np.bool_]:
    """Return whether PyXtal can place the counts, and whether given letters fit them and repeat legally."""
    out = np.zeros(len(crystals), dtype=bool)
    rows = zip(
        crystals.space_group.tolist(),
        crystals.elements.tolist(),
        crystals.letters.tolist(),
        crystals.counts.tolist(),
        strict=True,
    )
    for index, (number, elements, letters, counts) in enumerate(rows):
        group = _group(number)
        centring = {"P": 1, "A": 2, "B": 2, "C": 2, "I": 2, "R": 3, "F": 4}[group.symbol[0]]
        totals: dict[int, int] = {}
        used: list[str] = []
        fits = True
        for element, letter, count in zip(elements, letters, counts, strict=True):
            if count == 0:
                continue
            totals[element] = totals.get(element, 0) + count * centring
            if letter >= 0:
                position = group[len(group) - 1 - letter]
                fits &= position.multiplicity == count * centring
                if position.get_dof() == 0:
                    used.append(position.letter)
        out[index] = fits and len(used) == len(set(used)) and group.check_compatible(list(totals.values()))[0]
    return out


def _fits_lattice_system(crystals: CrystalBatch) -> NDArray[np.bool_]:
    a, b, c, alpha, beta, gamma = crystals.lattice_parameters.T
    system = torch.bucketize(crystals.space_group, torch.tensor(_LAST_OF_SYSTEM))

    def same(x: torch.Tensor, y: torch.Tensor | float) -> torch.Tensor:
        return (x - y).abs() < _TOLERANCE

    right = same(alpha, 90.0) & same(gamma, 90.0)
    orthogonal = right & same(beta, 90.0)
    hexagonal = same(a, b) & same(alpha, 90.0) & same(beta, 90.0) & same(gamma, 120.0)
    fits = torch.stack(
        [
            torch.ones_like(right),
            right,
            orthogonal,
            orthogonal & same(a, b),
            hexagonal,
            hexagonal,
            orthogonal & same(a, b) & same(b, c),
        ]
    ).gather(0, system[None])[0]
    closes = torch.isfinite(crystals.volume) & (crystals.volume > 0)
    return (fits & closes).numpy()


def element_symbols(crystals: CrystalBatch) -> set[str]:
    """Return the elements that occur."""
    present = crystals.composition.sum(dim=0).nonzero().flatten().tolist()
    return {Element.from_Z(z).symbol for z in present}
