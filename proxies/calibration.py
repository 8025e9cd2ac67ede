"""Turn raw standard deviations into ones whose intervals cover what they say.

Split conformal prediction (Vovk et al. 2005) in the Gaussian vocabulary that rewards need: on held-out rows the raw
standard deviation is multiplied by the factor that makes the 68.3 % and 95.4 % intervals come out right, once for each
range of the raw standard deviation, since small and large ones are wrong by different factors.
"""

import math
from dataclasses import asdict, dataclass
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
class FactorCurve:
    """A factor as a piecewise linear function of one variable; its logarithm is kept beyond the outer knots."""

    knots: tuple[float, ...]  # ascending
    log_factor: tuple[float, ...]

    @classmethod
    def fit(cls, variable: Tensor, ratio: Tensor, *, n_bins: int = 8, one_sigma_share: float = 0.5) -> Self:
        """Return the factors that make intervals right in each range of (n,) `variable`.

        Errors have heavier tails than a Gaussian, so one factor cannot make both intervals right.

        Args:
            variable: (n,) what the factor depends on.
            ratio: (n,) held-out errors over their standard deviations, absolute.
            n_bins: Ranges with a factor of their own, at most one per 100 rows.
            one_sigma_share: Weight of the factor that makes the 68.3 % interval right; the rest goes to the 95.4 % one.

        Raises:
            ProxyError: If there are fewer than 50 rows.
        """
        n = len(ratio)
        if n < _MIN_ROWS:
            raise ProxyError(f"calibration needs at least {_MIN_ROWS} held-out rows, got {n}")
        knots, factors = [], []
        for rows in variable.argsort().tensor_split(max(1, min(n_bins, n // _ROWS_PER_BIN))):
            part = ratio[rows].double()
            one, two = part.quantile(ONE_SIGMA).clamp_min(1e-6), part.quantile(TWO_SIGMA).clamp_min(1e-6) / 2.0
            knots.append(float(variable[rows].median()))
            factors.append(float(one_sigma_share * one.log() + (1.0 - one_sigma_share) * two.log()))
        return cls(tuple(knots), tuple(factors))

    def __call__(self, variable: Tensor) -> Tensor:
        """Return (n,) factors."""
        knots = torch.tensor(self.knots, dtype=variable.dtype, device=variable.device)
        factors = torch.tensor(self.log_factor, dtype=variable.dtype, device=variable.device)
        if len(knots) == 1:
            return factors.exp().expand(len(variable))
        inside = variable.clamp(knots[0], knots[-1])
        right = torch.searchsorted(knots, inside).clamp(1, len(knots) - 1)
        share = (inside - knots[right - 1]) / (knots[right] - knots[right - 1]).clamp_min(1e-9)
        return (factors[right - 1] + share * (factors[right] - factors[right - 1])).exp()


@dataclass(frozen=True)
class StdCalibration:
    """Factor on the standard deviation: one by its own size, and one by the predicted energy above the hull.

    The second is for energies: among crystals of equal raw standard deviation, those far above the hull err more.
    """

    by_std: FactorCurve  # of the log of the raw standard deviation
    by_hull: FactorCurve | None = None  # of the predicted energy above the hull in eV/atom

    @classmethod
    def none(cls) -> Self:
        """Return the calibration that changes nothing."""
        return cls(FactorCurve((0.0,), (0.0,)))

    @classmethod
    def fit(
        cls,
        error: Tensor,
        std: Tensor,
        e_above_hull: Tensor | None = None,
        *,
        n_bins: int = 8,
        one_sigma_share: float = 0.5,
    ) -> Self:
        """Return the calibration of (n,) held-out errors, their raw standard deviations and, for energies, the hull.

        Raises:
            ProxyError: If there are fewer than 50 rows.
        """
        ratio = error.abs() / std
        by_std = FactorCurve.fit(std.log(), ratio, n_bins=n_bins, one_sigma_share=one_sigma_share)
        if e_above_hull is None:
            return cls(by_std)
        ratio = ratio / by_std(std.log())
        return cls(by_std, FactorCurve.fit(e_above_hull, ratio, n_bins=n_bins, one_sigma_share=one_sigma_share))

    def __call__(self, std: Tensor, e_above_hull: Tensor) -> Tensor:
        """Return (n,) calibrated standard deviations from raw ones and the predicted energies above the hull."""
        calibrated = std * self.by_std(std.log())
        return calibrated if self.by_hull is None else calibrated * self.by_hull(e_above_hull)

    def scaled(self, factor: float) -> Self:
        """Return the calibration whose standard deviations are `factor` times as large."""
        shifted = tuple(value + math.log(factor) for value in self.by_std.log_factor)
        return type(self)(FactorCurve(self.by_std.knots, shifted), self.by_hull)

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as JSON content."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Return the calibration that `to_json` wrote."""
        curves = {
            name: None if curve is None else FactorCurve(tuple(curve["knots"]), tuple(curve["log_factor"]))
            for name, curve in content.items()
        }
        return cls(**curves)  # type: ignore[arg-type]


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
    ranks: Tensor = last - (counts - 1) / 2.0
    return ranks.double()[inverse]
