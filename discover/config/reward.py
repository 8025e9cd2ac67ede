"""Rewards, targets and how uncertainty counts, as a command names them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from discover.config.checks import as_list, require
from discover.errors import ConfigError
from discover.options import did_you_mean, option

Target = float | tuple[float, float]
REWARDS = ("density", "formation_energy", "bandgap", "stability", "oxidation_score", "novelty")
TARGET_UNITS = {"bandgap": "eV", "density": "g/cm^3"}
#: Prior exponent α: 1 makes samples the posterior under the prior, given the reward (docs/choices.md).
DEFAULT_ALPHA = 1.0
DEFAULT_BETA = {"formation_energy": 8.0, "density": 1.0, "bandgap": 4.0, "stability": 4.0}
DEFAULT_HULL_LIMIT = 0.02  # eV/atom; P(E_hull < 0.1) is near 1 for most of the prior and would hardly steer
DEFAULT_KAPPA = 1.0
DEFAULT_POINT_TOLERANCE = 0.25  # exp(-8 (y - t)^2), as published
DEFAULT_WINDOW_TOLERANCE = 0.05
_TERM = re.compile(r"^(?P<name>[A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?)(?:\^(?P<weight>[0-9.eE+-]+))?$")


@dataclass(frozen=True)
class RewardTerm:
    """One factor of a reward: a known name or ``module:function``, raised to `weight`."""

    name: str
    weight: float

    @property
    def is_callable(self) -> bool:
        """Whether this is the user's own function, named by its import path."""
        return ":" in self.name


def parse_reward(text: str) -> tuple[RewardTerm, ...]:
    """Return the factors of a reward such as ``bandgap``, ``bandgap*oxidation_score^0.5`` or ``my_module:function^2``.

    Raises:
        ConfigError: If the text is no product of rewards, names an unknown one, or a weight is not positive.
    """
    terms: list[RewardTerm] = []
    for part in text.replace(" ", "").split("*"):
        match = _TERM.match(part)
        if match is None:
            raise ConfigError(
                f"cannot read reward={text!r}; write it as bandgap, 'bandgap*density^0.5' or my_module:function"
            )
        name, weight_text = match["name"], match["weight"]
        try:
            weight = 1.0 if weight_text is None else float(weight_text)
        except ValueError:
            raise ConfigError(f"the exponent in {part!r} is no number; write it as 'bandgap*density^0.5'") from None
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"the exponent in {part!r} must be > 0")
        if ":" not in name and name not in REWARDS:
            raise ConfigError(
                f"unknown reward {name!r}.{did_you_mean(name, REWARDS)} Known: {', '.join(REWARDS)}; "
                "your own function goes by its import path, my_module:function."
            )
        terms.append(RewardTerm(name, weight))
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ConfigError(f"reward={text!r} names a reward twice; give it once with an exponent, such as density^2")
    return tuple(terms)


def convert_target(key: str, value: Any) -> Target | dict[str, Target] | None:
    """Return a target as a number, a window (lo, hi), or one of these per reward name.

    Raises:
        ConfigError: If it is none of these.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(name): _one_target(f"{key}.{name}", item) for name, item in value.items()}
    return _one_target(key, value)


def _one_target(key: str, value: Any) -> Target:
    numbers = value if isinstance(value, list | tuple) else [value]
    if len(numbers) not in (1, 2) or not all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers
    ):
        raise ConfigError(f"{key} takes a number or a window such as '{key}=[1.0,1.6]', got {value!r}")
    if isinstance(value, list | tuple):
        if len(value) != 2 or not value[0] < value[1]:
            raise ConfigError(f"{key} takes a window [lo,hi] with lo < hi, got {value!r}")
        return (float(value[0]), float(value[1]))
    return float(value)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What is wanted: the reward and everything that shapes it. `RunConfig` adds where and how."""

    reward: str = option(
        "bandgap", f"one of {', '.join(REWARDS)}; a product such as 'bandgap*density^0.5'; or my_module:function"
    )
    target: Target | dict[str, Target] | None = option(
        None,
        "wanted value or window, such as 1.34 or [1.0,1.6]; for several factors {bandgap: 1.34, density: 5}",
        convert=convert_target,
    )
    tolerance: float | None = option(
        None, "how sharply a target is meant, in its unit; null: 0.25 around a number, 0.05 at the edges of a window"
    )
    gap_scale: Literal["pbe", "experiment"] = option("pbe", "scale on which a band-gap target is meant")
    stability_gate: bool | None = option(
        None, "multiply the reward by P(energy above hull < 0.1 eV/atom); null: on for bandgap, off otherwise"
    )
    novelty_gate: bool | None = option(
        None,
        "leave compositions of the training data out of the reward; null: on for stability, unless known ones may be "
        "checked too (acquire.new=off), off otherwise",
    )
    hull_limit: float | None = option(
        None,
        "energy above hull in eV/atom that reward=stability asks to stay below, and hits have to; null: 0.02 is asked, "
        "0.1 (metastable) is a hit",
    )
    alpha: float | None = option(
        None, "exponent of the prior in the reward; 0 is the published setting; null: 1, or 0 where no prior applies"
    )
    beta: float | None = option(
        None,
        "inverse temperature: exp(-beta E) of formation_energy, E in eV/atom; density^beta; "
        "(expected utility x P(metastable))^beta of bandgap; P(below hull_limit)^beta of stability; null: 8, 1, 4, 4",
    )
    kappa: float | None = option(
        None,
        "standard deviations added to a predicted formation energy before it counts; 0: as published; null: 1",
    )

    def __post_init__(self) -> None:
        """Check the settings and fill in those that are left to the reward.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        self._check_target()
        names = {term.name for term in self.terms}
        require(self.alpha is None or self.alpha >= 0, f"alpha must be >= 0 (0 leaves the prior out), got {self.alpha}")
        require(self.beta is None or self.beta > 0, f"beta must be > 0, got {self.beta}")
        require(self.kappa is None or self.kappa >= 0, f"kappa must be >= 0, got {self.kappa}")
        require(self.tolerance is None or self.tolerance > 0, f"tolerance must be > 0, got {self.tolerance}")
        if self.beta is not None and not self.beta_takers():
            raise ConfigError(
                "beta applies to bandgap, formation_energy, stability and density without a target; drop it or use "
                "tolerance"
            )
        if self.kappa is not None and "formation_energy" not in names:
            raise ConfigError(f"kappa applies to reward=formation_energy, not to reward={self.reward}; drop it")
        if self.tolerance is not None and not self.targets():
            raise ConfigError("tolerance applies to a target; give one, such as target=1.34, or drop it")
        if self.hull_limit is not None and "stability" not in names:
            raise ConfigError(f"hull_limit applies to reward=stability, not to reward={self.reward}; drop it")
        if self.gap_scale == "experiment" and "bandgap" not in names:
            raise ConfigError(f"gap_scale=experiment applies to reward=bandgap, not to reward={self.reward}; drop it")
        self._set_gates(names)
        if self.alpha is None:
            object.__setattr__(self, "alpha", DEFAULT_ALPHA)

    def _set_gates(self, names: set[str]) -> None:
        if self.stability_gate is None:
            object.__setattr__(self, "stability_gate", "bandgap" in names and "stability" not in names)
        if self.stability_gate and "stability" in names:
            raise ConfigError("stability_gate=on and the reward stability are the same factor; drop one of them")
        if self.novelty_gate is None:
            gate = "stability" in names and "novelty" not in names and self._asks_for_new
            object.__setattr__(self, "novelty_gate", gate)
        if self.novelty_gate and "novelty" in names:
            raise ConfigError("novelty_gate=on and the reward novelty are the same factor; drop one of them")

    @property
    def _asks_for_new(self) -> bool:
        """Whether what is known already is of no use."""
        return True

    @property
    def terms(self) -> tuple[RewardTerm, ...]:
        """The factors of the reward."""
        return parse_reward(self.reward)

    def targets(self) -> dict[str, Target]:
        """Return the target of each reward that has one."""
        if self.target is None:
            return {}
        if isinstance(self.target, dict):
            return self.target
        return {self._target_takers()[0]: self.target}

    def beta_of(self, name: str) -> float:
        """Return the inverse temperature of `formation_energy`, `density`, `bandgap` or `stability`."""
        return DEFAULT_BETA[name] if self.beta is None else self.beta

    def beta_takers(self) -> list[str]:
        """Return the factors that beta sharpens; a density has it in place of a target, a band gap beside one."""
        taking = [term.name for term in self.terms if term.name in DEFAULT_BETA]
        return [name for name in taking if name != "density" or name not in self.targets()]

    def kappa_value(self) -> float:
        """Return how many standard deviations a predicted formation energy is raised."""
        return DEFAULT_KAPPA if self.kappa is None else self.kappa

    def hull_limit_value(self) -> float:
        """Return the energy above hull in eV/atom that reward=stability asks to stay below."""
        return DEFAULT_HULL_LIMIT if self.hull_limit is None else self.hull_limit

    def tolerance_of(self, target: Target) -> float:
        """Return the tolerance of a target in its own unit."""
        if self.tolerance is not None:
            return self.tolerance
        return DEFAULT_WINDOW_TOLERANCE if isinstance(target, tuple) else DEFAULT_POINT_TOLERANCE

    def _target_takers(self) -> list[str]:
        """Return the factors that take a target, the band gap first: a single target is meant for it."""
        names = {term.name for term in self.terms}
        return [name for name in TARGET_UNITS if name in names]

    def _check_target(self) -> None:
        takers = self._target_takers()
        if self.target is not None and not takers:
            raise ConfigError(f"reward={self.reward} takes no target; {' and '.join(TARGET_UNITS)} do. Drop it")
        if isinstance(self.target, dict):
            for name in self.target:
                require(
                    name in takers,
                    f"target names {name!r}, no factor of reward={self.reward} that takes one ({as_list(takers)})",
                )
        if "bandgap" in takers and "bandgap" not in self.targets():
            raise ConfigError("reward=bandgap needs a target in eV, such as target=1.34 or 'target=[1.0,1.6]'")
        for name, target in self.targets().items():
            low = target[0] if isinstance(target, tuple) else target
            require(low >= 0, f"the target of {name} must be >= 0 {TARGET_UNITS[name]}, got {target}")
