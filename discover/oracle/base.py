"""What an oracle is, and the label it gives to a structure.

Energy above hull is no part of a label: it depends on the hull file, so the main process computes it when a label is
recorded (`discover.oracle.hull.Hull.e_above_hull`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from pymatgen.core import Structure

#: The numbers of a label that have a column of their own, in eV.
NUMBERS = ("energy_per_atom", "formation_energy_per_atom", "initial_formation_energy_per_atom", "band_gap")


#: Property of a label that has a band gap from `discover.oracle.band_gap`: how likely there is none.
P_METAL = "p_metal"


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


def sound(label: Any) -> Label:
    """Return a label that can be stored and learnt from: with plain numbers, or failed with a reason and without any.

    Failed are numbers that are infinite or all unknown, structures that are disordered or hold NaN, and whatever is no
    label at all.
    """
    if not isinstance(label, Label):
        return Label(status=LabelStatus.FAILED, reason=f"the oracle returned {type(label).__name__}, expected Label")
    if label.status not in list(LabelStatus):
        reason = f"the oracle returned status {label.status!r}, expected one of {', '.join(LabelStatus)}"
        return Label(status=LabelStatus.FAILED, reason=reason)
    label = replace(
        label,
        status=LabelStatus(label.status),
        space_group_before=_whole(label.space_group_before),
        space_group_after=_whole(label.space_group_after),
        n_steps=_whole(label.n_steps) or 0,
    )
    seconds = float(label.seconds) if math.isfinite(label.seconds) else 0.0
    numbers = {name: float(getattr(label, name)) for name in NUMBERS}
    properties = {str(name): float(value) for name, value in label.properties.items()}
    infinite = [name for name, value in (numbers | properties).items() if math.isinf(value)]
    reason = str(label.reason or "")
    if label.status is LabelStatus.FAILED:
        pass
    elif infinite:
        reason = f"the oracle returned an infinite {infinite[0]}"
    elif all(math.isnan(value) for value in (numbers | properties).values()):
        reason = "the oracle returned no number (NaN)"
    elif label.structure is not None and not _is_definite(label.structure):
        reason = "the oracle returned a structure that is disordered or holds NaN"
    else:
        kept: dict[str, Any] = {**numbers, "properties": properties, "reason": reason, "seconds": seconds}
        return replace(label, **kept)
    structure = label.structure if label.structure is not None and _is_definite(label.structure) else None
    return Label(
        status=LabelStatus.FAILED,
        reason=reason or "no reason was given",
        structure=structure,
        space_group_before=label.space_group_before,
        space_group_after=label.space_group_after,
        n_steps=label.n_steps,
        seconds=seconds,
    )


def _whole(value: float | None) -> int | None:
    return None if value is None or math.isnan(value) else int(value)


def _is_definite(structure: Structure) -> bool:
    finite = np.isfinite(structure.lattice.matrix).all() and np.isfinite(structure.frac_coords).all()
    return bool(structure.is_ordered and finite)


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
