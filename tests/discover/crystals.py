"""Textbook crystals and proxies with known answers, for the tests of this folder."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pymatgen.core import Element
from torch import Tensor

from envs.crystal import LETTERS, CrystalBatch
from envs.symmetry import SYMMETRY
from proxies.base import Prediction

#: space group, ((element, letter), ...), (a, b, c, alpha, beta, gamma)
CRYSTALS: dict[str, tuple[int, tuple[tuple[str, str], ...], tuple[float, ...]]] = {
    "NaCl": (225, (("Na", "a"), ("Cl", "b")), (5.64, 5.64, 5.64, 90, 90, 90)),
    "NaCl shifted": (225, (("Na", "b"), ("Cl", "a")), (5.60, 5.60, 5.60, 90, 90, 90)),
    "SrTiO3": (221, (("Sr", "a"), ("Ti", "b"), ("O", "c")), (3.905, 3.905, 3.905, 90, 90, 90)),
    "TiO2": (136, (("Ti", "a"), ("O", "f")), (4.594, 4.594, 2.959, 90, 90, 90)),
    "GaAs": (216, (("Ga", "a"), ("As", "c")), (5.65, 5.65, 5.65, 90, 90, 90)),
    "Al2O3": (167, (("Al", "c"), ("O", "e")), (4.759, 4.759, 12.993, 90, 90, 120)),
    "Fe": (229, (("Fe", "a"),), (2.866, 2.866, 2.866, 90, 90, 90)),
    "SiO2": (152, (("Si", "a"), ("O", "c")), (4.914, 4.914, 5.405, 90, 90, 120)),
    "ZrO2": (14, (("Zr", "e"), ("O", "e"), ("O", "e")), (5.15, 5.21, 5.32, 90, 99.2, 90)),
}


def crystal_batch(names: Sequence[str]) -> CrystalBatch:
    """Return the named crystals as one batch."""
    width = max(len(CRYSTALS[name][1]) for name in names)
    elements = torch.zeros(len(names), width, dtype=torch.int64)
    letters = torch.full((len(names), width), -1, dtype=torch.int64)
    counts = torch.zeros(len(names), width, dtype=torch.int64)
    for row, name in enumerate(names):
        space_group, orbits, _ = CRYSTALS[name]
        for column, (symbol, letter) in enumerate(orbits):
            index = LETTERS.index(letter)
            elements[row, column] = Element(symbol).Z
            letters[row, column] = index
            counts[row, column] = SYMMETRY.primitive_multiplicity[space_group - 1, index]
    return CrystalBatch(
        torch.tensor([CRYSTALS[name][0] for name in names]),
        elements,
        letters,
        counts,
        torch.tensor([CRYSTALS[name][2] for name in names], dtype=torch.float64),
    )


def predictions(n: int, **changes: Tensor) -> dict[str, Prediction]:
    """Return predictions of every property for `n` crystals; ``band_gap=...`` and so on change a mean."""
    zero = torch.zeros(n, dtype=torch.float64)
    means = {"density": zero + 5, "formation_energy_per_atom": zero - 1, "band_gap": zero + 1, "e_above_hull": zero}
    means.update(changes)
    p_metal = {"band_gap": zero + 0.01}
    return {name: Prediction(mean, zero + 0.1, p_metal.get(name)) for name, mean in means.items()}


@dataclass(frozen=True)
class KnownProxy:
    """A proxy whose answers are given: one mean and one standard deviation for all crystals."""

    name: str
    mean: float
    std: float
    p_metal: float | None = None
    unit: str = "eV"

    def predict(self, crystals: CrystalBatch) -> Prediction:
        """Return the known answer for every crystal."""
        full = torch.full((len(crystals),), 1.0, dtype=torch.float64)
        return Prediction(full * self.mean, full * self.std, None if self.p_metal is None else full * self.p_metal)
