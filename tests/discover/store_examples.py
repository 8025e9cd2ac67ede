"""Candidates and labels for the tests of the store."""

import math
from dataclasses import replace
from typing import Any

from discover.oracle.base import Label, LabelStatus
from discover.store import Candidate, Store
from tests.discover.textbook import rock_salt, rutile

ROCK_SALT, RUTILE = rock_salt(), rutile()  # once: building them from a space group takes longer than storing them
LABEL = Label(
    status=LabelStatus.CONVERGED,
    structure=RUTILE,
    energy_per_atom=-8.1234567890123456,
    formation_energy_per_atom=-3.3,
    band_gap=1.8,
    properties={"bulk_modulus": 210.5, "unknown": math.nan},
    space_group_before=136,
    space_group_after=136,
    n_steps=12,
    seconds=3.25,
)
FAILED = Label(status=LabelStatus.FAILED, reason="killed after 300 s", seconds=300.0)


def candidate(number: int, round_number: int = 1, **changes: Any) -> Candidate:
    """Return rock salt as a candidate such as "r01-0007", with other values where they are given."""
    example = Candidate(
        candidate_id=f"r{round_number:02d}-{number:04d}",
        round=round_number,
        source="sampler",
        crystal={
            "space_group": 225,
            "elements": [11, 17],
            "letters": [0, 1],
            "counts": [1, 1],
            "lattice": [5.64, 5.64, 5.64, 90.0, 90.0, 90.0],
        },
        key=f"225:11a1,17b1:{number}",
        formula="NaCl",
        chemical_system="Cl-Na",
        space_group=225,
        n_atoms=2,
        prototype="rock salt",
        log_reward=-0.1 - number,
        acquisition=0.5,
        predictions={"band_gap": (5.0, 0.25), "e_above_hull": (0.01, math.nan)},
        structure=ROCK_SALT,
    )
    return replace(example, **changes)


def add_label(
    store: Store, candidate_id: str, label: Label = LABEL, *, run: str = "run", oracle: str = "chgnet"
) -> bool:
    """Add a label with a hull and settings."""
    return store.add_label(
        run, candidate_id, oracle, label, e_above_hull=0.02, hull="MP 2020", settings={"fmax": 0.05, "steps": 200}
    )
