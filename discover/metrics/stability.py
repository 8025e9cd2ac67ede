"""Stability, and S.U.N.: structures that are stable, unique and novel, as rates with Wilson intervals.

A structure is stable at or below the hull of known materials and metastable within 0.1 eV/atom above it, after
relaxation. Energies here are CHGNet's, so figures are named CHGNet-S.U.N.; its error on new compounds is about 0.06
eV/atom, so every figure comes with the hull shifted by that much either way. All structures that were taken count in
the denominator: those without a structure, without an energy, or with an element that the hull lacks count as unstable.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from discover.metrics.intervals import wilson_interval

STABLE = 0.0  # eV/atom
METASTABLE = 0.1  # eV/atom
HULL_SHIFTS = (-0.06, 0.0, 0.06)  # eV/atom added to the hull: a lower hull makes fewer structures stable

Mask = NDArray[np.bool_]


class Rate(NamedTuple):
    """A number of hits among n with its 95 % Wilson interval."""

    hits: int
    n: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Outcomes:
    """What is known of n structures taken one after another, none left out."""

    e_above_hull: NDArray[np.float64]  # (n,) eV/atom after relaxation, NaN where unknown
    unique: Mask  # (n,)
    novel: Mask  # (n,)

    def __post_init__(self) -> None:
        """Check that all are of the same structures.

        Raises:
            ValueError: If their lengths differ.
        """
        if not len(self.e_above_hull) == len(self.unique) == len(self.novel):
            raise ValueError(
                f"energies, unique and novel must be of the same structures, got {len(self.e_above_hull)}, "
                f"{len(self.unique)} and {len(self.novel)}"
            )


def rate(hits: Mask) -> Rate:
    """Return the share of hits with its interval; NaN of nothing."""
    n_hits, n = int(hits.sum()), len(hits)
    if n == 0:
        return Rate(0, 0, math.nan, math.nan, math.nan)
    return Rate(n_hits, n, n_hits / n, *wilson_interval(n_hits, n))


def stable_rate(outcomes: Outcomes, *, hull_shift: float = 0.0) -> Rate:
    """Return the share at or below the hull (E_hull <= 0), as CrystalFlow and SymmBFN count stable structures."""
    return rate(within(outcomes.e_above_hull, STABLE, hull_shift))


def metastable_rate(outcomes: Outcomes, *, hull_shift: float = 0.0) -> Rate:
    """Return the share within 0.1 eV/atom above the hull, stable ones included; MatterGen's "stable"."""
    return rate(within(outcomes.e_above_hull, METASTABLE, hull_shift))


def sun_rate(outcomes: Outcomes, *, hull_shift: float = 0.0) -> Rate:
    """Return the share that is stable (E_hull <= 0), unique and novel, as CrystalFlow and SymmBFN count S.U.N."""
    stable = within(outcomes.e_above_hull, STABLE, hull_shift)
    return rate(stable & outcomes.unique & outcomes.novel)


def metastable_sun_rate(outcomes: Outcomes, *, hull_shift: float = 0.0) -> Rate:
    """Return the share within 0.1 eV/atom, unique and novel: MatterGen's S.U.N. (doi:10.1038/s41586-025-08628-5)."""
    metastable = within(outcomes.e_above_hull, METASTABLE, hull_shift)
    return rate(metastable & outcomes.unique & outcomes.novel)


def cost_per_structure(seconds: float, hits: Rate) -> float:
    """Return the seconds spent per hit, inf without one: SymmBFN's S.U.N. cost where the seconds are of generation."""
    return seconds / hits.hits if hits.hits else math.inf


def within(e_above_hull: NDArray[np.float64], threshold: float, hull_shift: float = 0.0) -> Mask:
    """Return which energies above a hull raised by `hull_shift` are within `threshold`, (n,) bool; unknown is False."""
    return e_above_hull - hull_shift <= threshold
