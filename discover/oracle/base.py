"""What an oracle is, and the label it gives to a structure.

Energy above hull is no part of a label: it depends on the hull file, so the main process computes it when a label is
recorded (`discover.oracle.hull.Hull.e_above_hull`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from pymatgen.core import Structure

#: The numbers of a label that have a column of their own, in eV.
NUMBERS = ("energy_per_atom", "formation_energy_per_atom", "initial_formation_energy_per_atom", "band_gap")


class LabelStatus(StrEnum):
    """How labelling a structure ended; all but `FAILED` have at least one number."""

    CONVERGED = "converged"
    STEP_LIMIT = "step_limit"  # the energy is that of the last step, an upper bound
    TIME_LIMIT = "time_limit"  # likewise
    SINGLE_POINT = "single_point"  # of the structure as proposed
    GIVEN = "given"  # a user's own number, taken as it is
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Label:
    """What became of one structure. Numbers that nobody computed are NaN.

    Args:
        status: How it ended.
        reason: Why it failed or was cut short; "" otherwise.
        structure: After relaxation.
        energy_per_atom: Total energy in eV/atom, on the oracle's own scale.
        formation_energy_per_atom: eV/atom, on the Materials Project's MP2020 scale.
        initial_formation_energy_per_atom: The same of the structure as proposed.
        band_gap: eV, on the PBE scale.
        properties: Whatever else a user's oracle returns.
        space_group_before: As proposed, by spglib with symprec 0.01 Å.
        space_group_after: After relaxation, by spglib with symprec 0.1 Å.
        n_steps: Steps of the optimiser.
        seconds: CPU seconds.
    """

    status: LabelStatus
    reason: str = ""
    structure: Structure | None = None
    energy_per_atom: float = math.nan
    formation_energy_per_atom: float = math.nan
    initial_formation_energy_per_atom: float = math.nan
    band_gap: float = math.nan
    properties: Mapping[str, float] = field(default_factory=dict)
    space_group_before: int | None = None
    space_group_after: int | None = None
    n_steps: int = 0
    seconds: float = 0.0


class Oracle(Protocol):
    """Labels structures. Implementations are frozen dataclasses that pickle: they travel to workers with settings."""

    @property
    def name(self) -> str:
        """Name that labels are stored under, such as "chgnet"."""

    def describe(self) -> Mapping[str, Any]:
        """Return settings and model versions for JSON; they are stored beside the labels."""

    def start(self) -> None:
        """Load models. Called once in each worker process before its first structure; calling it again is free."""

    def label(self, structure: Structure) -> Label:
        """Label one structure. May raise anything: the caller turns that into a `FAILED` label with the reason."""
