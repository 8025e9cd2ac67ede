"""What a proxy is: a property of finished crystals, with the uncertainty of the prediction."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from envs.crystal import CrystalBatch


class ProxyError(ValueError):
    """A proxy that cannot be built, trained or loaded."""


@dataclass(frozen=True)
class Prediction:
    """Mean and total predictive standard deviation in the proxy's unit, in the order of the crystals."""

    mean: Tensor  # (n,) float64
    std: Tensor  # (n,) float64, calibrated; 0 where the property is exact
    p_metal: Tensor | None = None  # (n,) float64 probability that the band gap is zero; only band gaps have it


@runtime_checkable
class Proxy(Protocol):
    """Predicts one property of finished crystals."""

    @property
    def name(self) -> str:
        """Name of the property, such as "band_gap"."""

    @property
    def unit(self) -> str:
        """Unit of mean and standard deviation, such as "eV"."""

    def predict(self, crystals: CrystalBatch) -> Prediction:
        """Predict every crystal of the batch, in order, without changing it."""
