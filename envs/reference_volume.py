"""The sum of elemental volumes of a composition: where the volume of a real crystal is to be expected."""

import json
from functools import cache

import torch
from torch import Tensor

from envs.conventions import TABLES


@cache
def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """Return volumes in all-metal crystals, volumes in others (both (119,) Å³), and the metals (119,) bool."""
    data = json.loads((TABLES / "elemental_volumes.json").read_text())
    metal = torch.zeros(len(data["other"]), dtype=torch.bool)
    metal[data["metals"]] = True
    return (
        torch.tensor(data["all_metal"], dtype=torch.float64),
        torch.tensor(data["other"], dtype=torch.float64),
        metal,
    )


def log_reference_volume(counts: Tensor, atomic_numbers: Tensor) -> Tensor:
    """Return the log of the sum of elemental volumes (``envs.fit_volumes``) of each composition.

    Args:
        counts: (n, n_elements) atoms of each element in the cell.
        atomic_numbers: (n_elements,) int64.

    Returns:
        (n,) float64, log of Å³ per cell.
    """
    in_metal, otherwise, metal = (table[atomic_numbers] for table in _tables())
    counts = counts.double()
    all_metal = (counts * ~metal).sum(dim=-1) == 0
    return torch.where(all_metal, counts @ in_metal, counts @ otherwise).log()
