"""Rewards: what the sampler is asked for, as log R of finished crystals.

Every reward integrates the uncertainty of the proxies in closed form, or charges for it; none is raised by it. A
factor that is a probability or a utility lies in (0, 1]. Every built-in factor is floored smoothly, log(r + 1e-8), the
level at which Crystal-GFN (arXiv:2310.04925) clips its rewards, so that log R is finite and still ordered down there.
"""

import importlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from discover.config import RewardConfig, RewardTerm, Target
from discover.errors import RewardError
from discover.gap_scale import to_experiment
from discover.novelty import is_known
from discover.oxidation import oxidation_score
from discover.properties import Properties
from envs.crystal import CrystalBatch
from proxies.base import Prediction

LOG_FLOOR = math.log(1e-8)
METASTABLE = 0.1  # eV/atom above the hull, the field's usual bound
_MIN_GAP_STD = 0.02  # eV; keeps the moments of non-metals finite where a crystal is surely a metal
_SURELY = 1e-6  # probabilities are kept this far from 0 and 1 before they divide

UserFunction = Callable[[CrystalBatch], Tensor]


class Factor(Protocol):
    """One factor of a reward."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the properties to predict first."""

    def log_value(self, crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> Tensor:
        """Return (n,) float64 log of the factor, finite."""


def log_expected_rbf(mean: Tensor, std: Tensor, target: float, tolerance: float) -> Tensor:
    """Return log E[exp(-(y - t)² / 2τ²)] for y ~ N(mean, std²).

    The closed form is τ / √(τ² + σ²) · exp(-(μ - t)² / 2(τ² + σ²)); with σ = 0 and τ = 0.25 eV it is the published
    exp(-8 (y - t)²). All in the property's unit; `mean` and `std` are (n,).
    """
    variance = std**2 + tolerance**2
    return math.log(tolerance) - 0.5 * variance.log() - (mean - target) ** 2 / (2 * variance)


def log_window_probability(mean: Tensor, std: Tensor, window: tuple[float, float], tolerance: float) -> Tensor:
    """Return log P(lo ≤ y ≤ hi) for y ~ N(mean, std² + τ²): a window whose edges are soft by the tolerance τ.

    Accurate far outside the window, where the difference of two normal distribution functions cancels: both are taken
    on the side where they are small. All in the property's unit; `mean` and `std` are (n,).
    """
    scale = (std**2 + tolerance**2).sqrt()
    low, high = (window[0] - mean) / scale, (window[1] - mean) / scale
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    log_high, log_low = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    log_probability: Tensor = log_high + torch.log1p(-torch.exp(log_low - log_high))
    return log_probability


def log_probability_below(mean: Tensor, std: Tensor, bound: float) -> Tensor:
    """Return log P(y < bound) for y ~ N(mean, std²), both (n,) in the property's unit."""
    log_probability: Tensor = torch.special.log_ndtr((bound - mean) / std.clamp_min(1e-9))
    return log_probability


def non_metal_moments(gap: Prediction) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and standard deviation in eV of the gap given that there is one, and log P(non-metal), all (n,).

    `gap.mean` and `gap.std` are those of the whole prediction, a point mass p at zero and the rest: mean = (1 - p) m
    and std² + mean² = (1 - p)(s² + m²), solved here for m and s.
    """
    mean, std = gap.mean.double(), gap.std.double()
    if gap.p_metal is None:
        return mean, std, torch.zeros_like(mean)
    p_non_metal = (1 - gap.p_metal.double()).clamp(_SURELY, 1.0)
    m = mean / p_non_metal
    variance = (std**2 + mean**2) / p_non_metal - m**2
    return m, variance.clamp_min(_MIN_GAP_STD**2).sqrt(), p_non_metal.log()


def floored(log_value: Tensor) -> Tensor:
    """Return log(r + 1e-8) of log r, finite also where r is 0."""
    return torch.logaddexp(log_value.double(), torch.tensor(LOG_FLOOR, dtype=torch.float64, device=log_value.device))


def _log_utility(mean: Tensor, std: Tensor, target: Target, tolerance: float) -> Tensor:
    if isinstance(target, tuple):
        return log_window_probability(mean, std, target, tolerance)
    return log_expected_rbf(mean, std, target, tolerance)


@dataclass(frozen=True)
class BandGapFactor:
    """How well the band gap meets a target, times the probability that there is a gap at all.

    A target of 0, or a window that starts there, is met by metals too. On the experimental scale the proxy's PBE gap
    goes through the line of `discover.gap_scale`, whose scatter is added to the uncertainty.
    """

    target: Target
    tolerance: float  # eV
    experiment: bool
    beta: float = 1.0  # exponent of the expected utility
    needs: tuple[str, ...] = ("band_gap",)

    def log_value(self, crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> Tensor:
        """Return (n,) log of the expected utility."""
        del crystals
        gap = predictions["band_gap"]
        mean, std, log_non_metal = non_metal_moments(gap)
        if self.experiment:
            mean, std = to_experiment(mean, std)
        log_value = log_non_metal + _log_utility(mean, std, self.target, self.tolerance)
        lowest = self.target[0] if isinstance(self.target, tuple) else self.target
        if lowest == 0 and gap.p_metal is not None:
            log_value = torch.logaddexp(log_value, gap.p_metal.double().clamp_min(_SURELY).log())
        return floored(self.beta * log_value)


@dataclass(frozen=True)
class DensityFactor:
    """Density raised to β, or how well it meets a target; the density of a crystal is exact."""

    beta: float
    target: Target | None
    tolerance: float  # g/cm^3
    needs: tuple[str, ...] = ("density",)

    def log_value(self, crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> Tensor:
        """Return (n,) β log density, or the log utility of the target."""
        del crystals
        density = predictions["density"]
        mean, std = density.mean.double(), density.std.double()
        if self.target is None:
            return floored(self.beta * mean.clamp_min(1e-12).log())
        return floored(_log_utility(mean, std, self.target, self.tolerance))


@dataclass(frozen=True)
class FormationEnergyFactor:
    """exp(-β (μ + κ σ)): low formation energies, charged for their uncertainty; κ = 0 is the published reward.

    The exact expectation of exp(-β E) would be *raised* by the uncertainty, by exp(β² σ² / 2), and is not used.
    """

    beta: float  # atom/eV
    kappa: float
    needs: tuple[str, ...] = ("formation_energy_per_atom",)

    def log_value(self, crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> Tensor:
        """Return (n,) log of the factor."""
        del crystals
        energy = predictions["formation_energy_per_atom"]
        return floored(-self.beta * (energy.mean.double() + self.kappa * energy.std.double()))


@dataclass(frozen=True)
class StabilityFactor:
    """P(energy above hull < limit)^β under the proxy's own uncertainty; the limit in eV/atom."""

    beta: float = 1.0
    limit: float = METASTABLE
    needs: tuple[str, ...] = ("e_above_hull",)

    def log_value(self, crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> Tensor:
        """Return (n,) log probability."""
        del crystals
        above = predictions["e_above_hull"]
        log_p = log_probability_below(above.mean.double(), above.std.double(), self.limit)
        return floored(self.beta * log_p)


@dataclass(frozen=True)
class OxidationFactor:
    """Product of the ICSD frequencies of the most usual charge-neutral oxidation states."""

    needs: tuple[str, ...] = ()

    def log_value(self, crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> Tensor:
        """Return (n,) sum of log frequencies."""
        del predictions
        return floored(oxidation_score(crystals.composition.cpu()).to(crystals.space_group.device))


@dataclass(frozen=True)
class NoveltyFactor:
    """1 for compositions that the training data do not hold, the floor for those that they do."""

    needs: tuple[str, ...] = ()

    def log_value(self, crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> Tensor:
        """Return (n,) log of the factor."""
        del predictions
        known = torch.from_numpy(is_known(crystals.formulas())).to(crystals.space_group.device)
        return floored(torch.where(known, -torch.inf, 0.0))


@dataclass(frozen=True)
class UserFactor:
    """The user's own function: takes a `CrystalBatch`, returns (n,) log rewards, finite, higher is better."""

    name: str
    function: UserFunction
    needs: tuple[str, ...] = ()

    def log_value(self, crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> Tensor:
        """Return what the function returns, checked.

        Raises:
            RewardError: If it fails, or returns anything but one finite number per crystal.
        """
        del predictions
        try:
            value = torch.as_tensor(self.function(crystals)).double()
        except Exception as error:
            raise RewardError(
                f"{self.name} failed on {len(crystals)} crystals: {type(error).__name__}: {error}"
            ) from error
        if value.shape != (len(crystals),):
            raise RewardError(f"{self.name} must return ({len(crystals)},) log rewards, got shape {tuple(value.shape)}")
        if not bool(value.isfinite().all()):
            row = int((~value.isfinite()).nonzero()[0])
            raise RewardError(
                f"{self.name} must return finite log rewards, got {float(value[row])} for row {row} "
                f"({crystals.select([row]).formulas()[0]}); return a low number such as -20 for what is not wanted"
            )
        return value.detach().to(crystals.space_group.device)


class Reward:
    """A weighted product of factors, Σ w_i log r_i.

    Args:
        factors: (factor, weight) pairs.
        properties: Predicts what the factors need.
    """

    def __init__(self, factors: list[tuple[Factor, float]], properties: Properties) -> None:
        self._factors = factors
        self._properties = properties
        self._needs = tuple(dict.fromkeys(name for factor, _ in factors for name in factor.needs))

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the properties that the factors need."""
        return self._needs

    def log_reward(self, crystals: CrystalBatch) -> Tensor:
        """Return (n,) float64 log reward of each crystal, finite."""
        return self.from_predictions(crystals, self._properties.predict(crystals, self._needs))

    def from_predictions(self, crystals: CrystalBatch, predictions: Mapping[str, Prediction]) -> Tensor:
        """Return (n,) log reward from predictions that are at hand already."""
        total = torch.zeros(len(crystals), dtype=torch.float64, device=crystals.space_group.device)
        for factor, weight in self._factors:
            total = total + weight * factor.log_value(crystals, predictions)
        return total

    def columns(self, crystals: CrystalBatch) -> dict[str, Tensor]:
        """Return the predicted properties the reward used, (n,) each, by name and with `_std`."""
        columns: dict[str, Tensor] = {}
        for name, prediction in self._properties.predict(crystals, self._needs).items():
            columns[name], columns[f"{name}_std"] = prediction.mean, prediction.std
        return columns


def build_reward(config: RewardConfig, properties: Properties) -> Reward:
    """Return the reward that a configuration asks for.

    Args:
        config: A `RewardConfig`; a `RunConfig` is one.
        properties: Predicts what the reward needs.

    Raises:
        RewardError: If a needed property has no proxy or a user's function cannot be imported.
    """
    # The power of P(stable) is taken after the floor, so that hopeless crystals still differ from unlikely ones.
    factors = [
        (_factor(term, config), term.weight * (config.beta_of("stability") if term.name == "stability" else 1.0))
        for term in config.terms
    ]
    if config.stability_gate:
        sharp = any(term.name == "bandgap" for term in config.terms)
        factors.append((StabilityFactor(config.beta_of("bandgap") if sharp else 1.0), 1.0))
    if config.novelty_gate:
        factors.append((NoveltyFactor(), 1.0))
    missing = {name for factor, _ in factors for name in factor.needs} - set(properties.names)
    if missing:
        raise RewardError(f"reward={config.reward} needs a proxy of {', '.join(sorted(missing))}")
    return Reward(factors, properties)


def _factor(term: RewardTerm, config: RewardConfig) -> Factor:
    target = config.targets().get(term.name)
    tolerance = config.tolerance_of(target) if target is not None else math.nan
    if term.is_callable:
        return UserFactor(term.name, import_function(term.name))
    if term.name == "bandgap":
        if target is None:
            raise RewardError("reward=bandgap needs a target in eV, such as target=1.34")
        experiment = config.gap_scale == "experiment"
        return BandGapFactor(target, tolerance, experiment=experiment, beta=config.beta_of("bandgap"))
    if term.name == "density":
        return DensityFactor(config.beta_of("density"), target, tolerance)
    if term.name == "formation_energy":
        return FormationEnergyFactor(config.beta_of("formation_energy"), config.kappa_value())
    if term.name == "stability":
        return StabilityFactor(limit=config.hull_limit_value())
    return NoveltyFactor() if term.name == "novelty" else OxidationFactor()


def import_function(path: str) -> UserFunction:
    """Return the function named by an import path ``module:function``; the working directory is searched too.

    Raises:
        RewardError: If the module or the function does not exist, or it cannot be called.
    """
    module_name, _, function_name = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise RewardError(
            f"cannot import {module_name!r} for reward={path}: {type(error).__name__}: {error}; "
            f"put {module_name}.py in {here} or on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardError(f"{module_name} has no function {function_name!r}; reward={path} names one")
    return function
