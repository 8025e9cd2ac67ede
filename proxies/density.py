"""Mass density: exact, because composition and cell determine it."""

from dataclasses import dataclass
from functools import cache

import torch
from pymatgen.core import Element
from torch import Tensor

from envs.crystal import MAX_ATOMIC_NUMBER, CrystalBatch
from proxies.base import Prediction

GRAMS_PER_CM3 = 1.66053906892  # one dalton per Å³ in g/cm³ (CODATA 2022)


@cache
def atomic_masses() -> Tensor:
    """Return (119,) float64 standard atomic weights in dalton; row 0 (padding) is 0."""
    masses = [float(Element.from_Z(number).atomic_mass) for number in range(1, MAX_ATOMIC_NUMBER + 1)]
    return torch.tensor([0.0, *masses], dtype=torch.float64)


@dataclass(frozen=True)
class DensityProxy:
    """Mass over volume of the primitive cell; its standard deviation is 0."""

    name: str = "density"
    unit: str = "g/cm^3"

    def predict(self, crystals: CrystalBatch) -> Prediction:
        """Return the density of every crystal."""
        mass = (atomic_masses().to(crystals.elements.device)[crystals.elements] * crystals.counts).sum(dim=-1)
        mean = GRAMS_PER_CM3 * mass * crystals.centring / crystals.volume
        return Prediction(mean=mean, std=torch.zeros_like(mean))
