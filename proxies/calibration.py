"""Turn raw standard deviations into ones whose intervals cover what they say.

Split conformal prediction (Vovk et al. 2005) in the Gaussian vocabulary that rewards need: on held-out rows the raw
standard deviation is multiplied by the factor that makes the 68.3 % and 95.4 % intervals come out right, once for each
range of the raw standard deviation, since small and large ones are wrong by different factors.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from proxies.base import ProxyError

ONE_SIGMA, TWO_SIGMA = 0.6827, 0.9545
_MIN_ROWS = 50
_ROWS_PER_BIN = 100
_RIDGE = 1e-2
_SHORTEST_STEP = 1e-6


@dataclass(frozen=True)
class StdCalibration:
    """Factor on the standard deviation as a piecewise linear function of its logarithm."""

    log_std: tuple[float, ...]  # knots, ascending
    log_factor: tuple[float, ...]

    @classmethod
    def fit(cls, error: Tensor, std: Tensor, n_bins: int = 8) -> Self:
        """Return the calibration of (n,) held-out errors and their raw standard deviations.

        Raises:
            ProxyError: If there are fewer than 50 rows.
        """
        n = len(error)
        if n < _MIN_ROWS:
            raise ProxyError(f"calibration needs at least {_MIN_ROWS} held-out rows, got {n}")
        n_bins = max(1, min(n_bins, n // _ROWS_PER_BIN))
        order = std.argsort()
        knots, factors = [], []
        for rows in order.tensor_split(n_bins):
            ratio = (error[rows].abs() / std[rows]).double()
            one, two = ratio.quantile(ONE_SIGMA), ratio.quantile(TWO_SIGMA) / 2.0
            knots.append(float(std[rows].log().median()))
            factors.append(float((one.clamp_min(1e-6).log() + two.clamp_min(1e-6).log()) / 2.0))
        return cls(tuple(knots), tuple(factors))

    def __call__(self, std: Tensor) -> Tensor:
        """Return (n,) calibrated standard deviations; beyond the outer knots their factor is kept."""
        knots = torch.tensor(self.log_std, dtype=std.dtype, device=std.device)
        factors = torch.tensor(self.log_factor, dtype=std.dtype, device=std.device)
        if len(knots) == 1:
            return std * factors.exp()
        log_std = std.log().clamp(knots[0], knots[-1])
        right = torch.searchsorted(knots, log_std).clamp(1, len(knots) - 1)
        share = (log_std - knots[right - 1]) / (knots[right] - knots[right - 1])
        return std * (factors[right - 1] + share * (factors[right] - factors[right - 1])).exp()

    def to_json(self) -> dict[str, list[float]]:
        """Return the calibration as JSON content."""
        return {"log_std": list(self.log_std), "log_factor": list(self.log_factor)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Return the calibration that `to_json` wrote."""
        return cls(tuple(map(float, content["log_std"])), tuple(map(float, content["log_factor"])))


@dataclass(frozen=True)
class LogitCalibration:
    """Platt scaling of a logit: scale · logit + shift."""

    scale: float
    shift: float

    @classmethod
    def fit(cls, logit: Tensor, label: Tensor, n_steps: int = 50) -> Self:
        """Return the maximum-likelihood scale and shift for (n,) raw logits and bool labels (damped Newton)."""
        design = torch.stack([logit.double(), torch.ones_like(logit, dtype=torch.float64)], dim=-1)
        start = torch.tensor([1.0, 0.0], dtype=torch.float64)
        sign = 1.0 - 2.0 * label.double()

        def loss(weights: Tensor) -> Tensor:
            return functional.softplus(sign * (design @ weights)).sum() + 0.5 * _RIDGE * ((weights - start) ** 2).sum()

        weights = start
        for _ in range(n_steps):
            probability = (design @ weights).sigmoid()
            gradient = design.T @ (probability - label.double()) + _RIDGE * (weights - start)
            curvature = (probability * (1.0 - probability))[:, None]
            hessian = design.T @ (design * curvature) + _RIDGE * torch.eye(2, dtype=torch.float64)
            direction = torch.linalg.solve(hessian, gradient)
            length = 1.0  # halved until the loss falls: plain steps diverge where logits are far too large
            while length > _SHORTEST_STEP and loss(weights - length * direction) > loss(weights):
                length /= 2.0
            weights = weights - length * direction if length > _SHORTEST_STEP else weights
        return cls(float(weights[0]), float(weights[1]))

    def __call__(self, logit: Tensor) -> Tensor:
        """Return (n,) calibrated probabilities."""
        probability: Tensor = torch.sigmoid(self.scale * logit + self.shift)
        return probability

    def to_json(self) -> dict[str, float]:
        """Return the calibration as JSON content."""
        return {"scale": self.scale, "shift": self.shift}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Return the calibration that `to_json` wrote."""
        return cls(float(content["scale"]), float(content["shift"]))


def interval_coverage(error: Tensor, std: Tensor) -> tuple[float, float]:
    """Return the shares of errors within one and within two standard deviations."""
    ratio = error.abs() / std
    return float((ratio <= 1.0).double().mean()), float((ratio <= 2.0).double().mean())


def spearman(first: Tensor, second: Tensor) -> float:
    """Return the rank correlation of two (n,) tensors; ties share their mean rank."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Return (n,) float64 ranks, ties averaged."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2.0).double()[inverse]
