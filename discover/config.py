"""What each command can be told, as frozen dataclasses that check themselves before anything slow starts.

A setting that would do nothing in the run at hand (a target for a reward that has none, a band-gap scale without a band
gap) is an error, not a silent no-op.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from discover.errors import ConfigError
from discover.options import did_you_mean, group, option
from envs.conventions import CRYSTAL_SYSTEMS
from envs.restrictions import SPACES, Restrictions, restrict

Target = float | tuple[float, float]

REWARDS = ("density", "formation_energy", "bandgap", "stability", "oxidation_score", "novelty")
TARGET_UNITS = {"bandgap": "eV", "density": "g/cm^3"}
#: Prior exponent α: 1 makes samples the posterior under the prior, given the reward (docs/choices.md).
DEFAULT_ALPHA = 1.0
DEFAULT_BETA = {"formation_energy": 8.0, "density": 1.0, "bandgap": 4.0}
DEFAULT_KAPPA = 1.0
Pick = Literal["agreement", "chgnet"]
_LOOKS_PER_CHECK = 8
_PICK = (
    "which of the draws is best: that of lowest CHGNet energy as built, 15 ms each (chgnet), or the one that others "
    "agree with, without any potential (agreement)"
)
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
class RestrictConfig:
    """What a run may contain; everything left out is free. `envs.restrictions` says what each means and checks it."""

    elements: tuple[str, ...] | None = option(None, "only these elements, such as [Fe,O]")
    exclude: tuple[str, ...] | None = option(
        None, "never these elements; null: Tc, Pm, Po to Pa and Np onward, unless `elements` or `required` name them"
    )
    required: tuple[str, ...] | None = option(None, "each crystal contains all of these")
    n_elements: tuple[int, int] | None = option(None, "number of different elements, [lo,hi] or one number")
    max_atoms_per_element: int | None = option(None, "most atoms of one element in the cell that the env counts")
    n_atoms: tuple[int, int] | None = option(None, "atoms in the cell that the env counts, [lo,hi] or one number")
    crystal_systems: tuple[str, ...] | None = option(
        None, "only these of " + ", ".join(CRYSTAL_SYSTEMS) + " (trigonal includes rhombohedral)"
    )
    space_groups: tuple[int, ...] | None = option(None, "only these international numbers, 1 to 230")
    length: tuple[float, float] | None = option(None, "a, b and c of the conventional cell in Å, [lo,hi]")
    angle: tuple[float, float] | None = option(None, "alpha, beta, gamma of the conventional cell in degrees, [lo,hi]")
    volume_per_atom: tuple[float, float] | None = option(None, "volume per atom in Å^3, [lo,hi]")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is restricted."""
        return self == RestrictConfig()

    def to_restrictions(self) -> Restrictions:
        """Return the same restrictions as the environments take them."""
        return Restrictions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a policy is trained."""

    n_steps: int = option(400, "gradient steps")
    batch_size: int = option(1024, "trajectories per step, all sources together")
    lr: float = option(2e-3, "learning rate at the start (cosine decay to a hundredth)")
    lr_log_Z: float = option(0.1, "learning rate of log Z, for loss=tb")
    epsilon: float = option(0.05, "share of exploratory uniform choices at the start (decays to a fifth)")
    temperature: float = option(1.0, "temperature of the behaviour policy's choices, >= 1 explores")
    replay_fraction: float = option(0.25, "share of each batch from replay")
    data_fraction: float = option(
        0.25, "share of each batch from the data, or from the prior's samples where there are none"
    )
    width: int = option(256, "width of the trunk")
    depth: int = option(3, "layers of the trunk")
    minutes: float | None = option(None, "stop training after this many minutes or n_steps, whichever comes first")

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ConfigError: Naming the setting.
        """
        for name in ("n_steps", "width", "depth"):
            _require(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        _require(self.batch_size >= 2, f"train.batch_size must be at least 2, got {self.batch_size}")
        for name in ("lr", "lr_log_Z"):
            _require(getattr(self, name) > 0, f"train.{name} must be > 0, got {getattr(self, name)}")
        _require(0 <= self.epsilon < 1, f"train.epsilon must be in [0, 1), got {self.epsilon}")
        _require(self.temperature > 0, f"train.temperature must be > 0, got {self.temperature}")
        for name in ("replay_fraction", "data_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"train.{name} must be in [0, 1], got {getattr(self, name)}")
        _require(
            self.replay_fraction + self.data_fraction <= 1,
            "train.replay_fraction + train.data_fraction must not exceed 1, "
            f"got {self.replay_fraction} + {self.data_fraction}",
        )
        _require(self.minutes is None or self.minutes > 0, f"train.minutes must be > 0, got {self.minutes}")


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
    hull_limit: float | None = option(
        None, "energy above hull in eV/atom that reward=stability asks to stay below; null: 0.1, metastable"
    )
    alpha: float | None = option(
        None, "exponent of the prior in the reward; 0 is the published setting; null: 1, or 0 where no prior applies"
    )
    beta: float | None = option(
        None,
        "inverse temperature: exp(-beta E) of formation_energy, E in eV/atom; density^beta; "
        "(expected utility x P(metastable))^beta of bandgap; null: 8, 1, 4",
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
        _require(
            self.alpha is None or self.alpha >= 0, f"alpha must be >= 0 (0 leaves the prior out), got {self.alpha}"
        )
        _require(self.beta is None or self.beta > 0, f"beta must be > 0, got {self.beta}")
        _require(self.kappa is None or self.kappa >= 0, f"kappa must be >= 0, got {self.kappa}")
        _require(self.tolerance is None or self.tolerance > 0, f"tolerance must be > 0, got {self.tolerance}")
        takers = [n for n in DEFAULT_BETA if n in names and (n == "bandgap" or n not in self.targets())]
        if self.beta is not None and not takers:
            raise ConfigError(
                "beta applies to bandgap, to formation_energy and to density without a target; drop it or use tolerance"
            )
        if self.kappa is not None and "formation_energy" not in names:
            raise ConfigError(f"kappa applies to reward=formation_energy, not to reward={self.reward}; drop it")
        if self.tolerance is not None and not self.targets():
            raise ConfigError("tolerance applies to a target; give one, such as target=1.34, or drop it")
        if self.hull_limit is not None and "stability" not in names:
            raise ConfigError(f"hull_limit applies to reward=stability, not to reward={self.reward}; drop it")
        if self.gap_scale == "experiment" and "bandgap" not in names:
            raise ConfigError(f"gap_scale=experiment applies to reward=bandgap, not to reward={self.reward}; drop it")
        if self.stability_gate is None:
            object.__setattr__(self, "stability_gate", "bandgap" in names and "stability" not in names)
        if self.stability_gate and "stability" in names:
            raise ConfigError("stability_gate=on and the reward stability are the same factor; drop one of them")
        if self.alpha is None:
            object.__setattr__(self, "alpha", DEFAULT_ALPHA)

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
        """Return the inverse temperature of `formation_energy`, `density` or `bandgap`."""
        return DEFAULT_BETA[name] if self.beta is None else self.beta

    def kappa_value(self) -> float:
        """Return how many standard deviations a predicted formation energy is raised."""
        return DEFAULT_KAPPA if self.kappa is None else self.kappa

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
                _require(
                    name in takers,
                    f"target names {name!r}, no factor of reward={self.reward} that takes one ({_names(takers)})",
                )
        if "bandgap" in takers and "bandgap" not in self.targets():
            raise ConfigError("reward=bandgap needs a target in eV, such as target=1.34 or 'target=[1.0,1.6]'")
        for name, target in self.targets().items():
            low = target[0] if isinstance(target, tuple) else target
            _require(low >= 0, f"the target of {name} must be >= 0 {TARGET_UNITS[name]}, got {target}")


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """What checks the structures."""

    name: Literal["chgnet", "matgl", "callable", "external", "none"] = option(
        "chgnet",
        "chgnet (ships), matgl (a model of one's own), callable (your function), external (files that you fill in); "
        "none checks nothing",
    )
    budget: int | None = option(None, "structures to check over all rounds; null: 20 a round")
    hull: str | None = option(
        None,
        "CSV file of formulas and formation energies, or folder with it; null: energies above hull are relative to "
        "the hull that the proxies imply, and later rounds learn energies and gaps but not stability",
    )
    model: str | None = option(None, "path of the matgl model, or module:function for name=callable")
    predicts: str | None = option(
        None, "for name=matgl: what a property model predicts; null: formation_energy_per_atom; or band_gap"
    )
    scale: Literal["mp2020", "uncorrected"] | None = option(
        None, "for name=matgl: a potential's energies, with (mp2020, null) or without the MP2020 corrections"
    )
    quantity: str | None = option(
        None,
        "for name=callable: what a plain number is; null: formation_energy_per_atom; or energy_per_atom, band_gap, or "
        "a name of its own",
    )
    second: str | None = option(
        None, "matgl potential (MP2020 scale) that relaxes the finalists again, for a second energy above hull"
    )
    fmax: float = option(0.1, "relaxed when no force is above, eV/Å")
    max_steps: int = option(200, "most steps of a relaxation")
    rattle: float = option(
        0.02, "Å by which relaxed atoms are displaced before relaxing again without symmetry; 0 keeps the symmetry"
    )
    time_limit: float = option(300.0, "seconds after which a structure is given up")
    memory_limit: float | None = option(6.0, "GB of memory after which a structure is given up; null: no limit")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        _require(
            self.budget is None or self.budget >= 1,
            f"oracle.budget must be at least 1, got {self.budget}; oracle.name=none checks nothing",
        )
        needs_model = self.name in ("matgl", "callable")
        what = "a path" if self.name == "matgl" else "module:function"
        _require(not needs_model or self.model is not None, f"oracle.name={self.name} needs oracle.model, {what}")
        _require(needs_model or self.model is None, f"oracle.model does nothing with oracle.name={self.name}; drop it")
        for owner, names in (("matgl", ("predicts", "scale")), ("callable", ("quantity",))):
            idle = [f"oracle.{name}" for name in names if getattr(self, name) is not None and self.name != owner]
            _require(not idle, f"{', '.join(idle)} applies to oracle.name={owner}, not to {self.name}; drop it")
        _require(
            self.second is None or (self.hull is not None and self.name != "none"),
            "oracle.second gives energies above hull: it needs oracle.hull=FILE and an oracle",
        )
        _require(self.fmax > 0, f"oracle.fmax must be > 0 eV/Å, got {self.fmax}")
        _require(self.max_steps >= 0, f"oracle.max_steps must be >= 0, got {self.max_steps}")
        _require(0 <= self.rattle <= 0.5, f"oracle.rattle must be in 0 to 0.5 Å, got {self.rattle}")
        relaxes = self.name in ("chgnet", "matgl") or self.second is not None
        idle = [*(() if relaxes else ("fmax", "max_steps")), *(("rattle",) if self.name != "chgnet" else ())]
        idle += ["time_limit", "memory_limit"] if self.name == "external" else []
        given = [f"oracle.{name}" for name in dict.fromkeys(idle) if getattr(self, name) != _default(self, name)]
        _require(not given, f"{', '.join(given)} would do nothing with oracle.name={self.name}; drop it")
        _require(self.time_limit > 0, f"oracle.time_limit must be > 0 s, got {self.time_limit}")
        _require(
            self.memory_limit is None or self.memory_limit > 0,
            f"oracle.memory_limit must be > 0 GB, got {self.memory_limit}",
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Where structures are checked."""

    name: Literal["local", "parsl"] = option("local", "processes here, or Parsl (SLURM, PBS, Kubernetes, clouds)")
    workers: int | None = option(None, "local processes; null: as cores and memory allow, 0: in this process")
    config: str | None = option(None, "Python file that defines `config`, a parsl.Config, for name=parsl")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        _require(self.workers is None or self.workers >= 0, f"engine.workers must be >= 0, got {self.workers}")
        _require(
            (self.name == "parsl") == (self.config is not None),
            "engine.name=parsl and engine.config=FILE.py belong together; give both or neither",
        )
        _require(
            self.name == "local" or self.workers is None,
            "engine.workers applies to engine.name=local; with Parsl the config file says how many",
        )


@dataclass(frozen=True, kw_only=True)
class AcquireConfig:
    """Which candidates are checked."""

    name: Literal["expected", "ucb", "greedy", "random"] = option(
        "expected", "score: expected reward, upper confidence bound, reward of the likeliest values, or random"
    )
    kappa: float = option(1.0, "standard deviations for ucb")
    per_formula: int = option(2, "most structures of one formula over all rounds")
    per_system: int = option(5, "most structures of one set of elements in a round")
    per_prototype: int = option(4, "most structures of one prototype in a round")
    new: bool = option(
        True, "only compositions that neither the hull file nor the training data hold; off: known ones are found again"
    )
    explore: float = option(0.1, "share of each round for the candidates that the proxies are least sure of")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        _require(
            self.name == "ucb" or self.kappa == _default(self, "kappa"),
            f"acquire.kappa applies to acquire.name=ucb, not to {self.name}; drop it",
        )
        _require(self.kappa >= 0, f"acquire.kappa must be >= 0, got {self.kappa}")
        for name in ("per_formula", "per_system", "per_prototype"):
            _require(getattr(self, name) >= 1, f"acquire.{name} must be at least 1, got {getattr(self, name)}")
        _require(0 <= self.explore <= 1, f"acquire.explore must be in [0, 1], got {self.explore}")


@dataclass(frozen=True, kw_only=True)
class ScreenConfig:
    """How structures are found for the candidates, and which are worth the oracle's time."""

    per_check: int | None = option(
        None,
        "candidates built and looked at, by a single point of CHGNet, for each one that is checked; 1: none is looked "
        "at; null: 8 with oracle.name=chgnet, else 1",
    )
    predicted: int = option(
        4, "structures that discover.predict adds to the sampler's own before a look; 0: none, as with restricted cells"
    )

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        _require(
            self.per_check is None or self.per_check >= 1, f"screen.per_check must be at least 1, got {self.per_check}"
        )
        _require(self.predicted >= 0, f"screen.predicted must be at least 0, got {self.predicted}")
        _require(
            self.per_check != 1 or self.predicted == _default(self, "predicted"),
            "screen.predicted does nothing with screen.per_check=1; drop one of them",
        )


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """How later rounds learn from the labels of earlier ones."""

    data: str | None = option(
        None, "CSV file of labelled structures to rehearse while learning; null: what the proxies say of prior samples"
    )
    labels: str | None = option(
        None, "CSV file of your own labelled structures (cif, formation_energy_per_atom, ...) to learn from at first"
    )
    sampler_steps: int = option(150, "gradient steps of the sampler in each later round")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        _require(self.sampler_steps >= 1, f"learn.sampler_steps must be at least 1, got {self.sampler_steps}")


@dataclass(frozen=True, kw_only=True)
class RunConfig(RewardConfig):
    """Everything `python -m discover.run` can be told."""

    env: Literal["mp20", "crystal_gfn"] = option("mp20", "space of crystals, up to 20 atoms or as published")
    wyckoff: bool | None = option(
        None, "choose Wyckoff letters; null: as in the env's preset (mp20 on, crystal_gfn off)"
    )
    chemistry: Literal["ionic", "any"] = option("ionic", "charge-neutral and Pauling-ordered, or no charge rule")
    mixed_valence: bool = option(False, "let one element take two oxidation states (Fe3O4), for chemistry=ionic")
    loss: Literal["vargrad", "tb"] = option(
        "vargrad", "trajectory balance with the batch-optimal (vargrad) or a learned (tb) log Z"
    )
    measure: Literal["uniform", "lengths_angles"] = option(
        "uniform",
        "what the reward is a density of: the lattice stage's own coordinates, or lengths and angles as published",
    )
    restrict: RestrictConfig = group(RestrictConfig, "what the run may contain")
    train: TrainingConfig = group(TrainingConfig, "how the policy is trained")
    rounds: int = option(1, "rounds of sampling, checking and learning from the checks")
    oracle: OracleConfig = group(OracleConfig, "what checks the structures")
    engine: EngineConfig = group(EngineConfig, "where structures are checked")
    acquire: AcquireConfig = group(AcquireConfig, "which candidates are checked")
    screen: ScreenConfig = group(ScreenConfig, "what is looked at before it is checked")
    learn: LearnConfig = group(LearnConfig, "how later rounds learn")
    store: str | None = option(None, "SQLite file or postgresql:// URL of the labels; null: store.sqlite in the folder")
    reference: str | None = option(
        None, "CSV file, folder of CIF files or extxyz file of known materials that finalists are compared with"
    )
    n_candidates: int = option(2000, "crystals to sample after each training")
    n_structures: int = option(64, "of the best candidates of the last round, how many to build as CIF files")
    structure: Literal["flow", "random"] | None = option(
        None,
        "how coordinates are found: flow (learned) or random (the baseline); null: flow, or random where the env "
        "chooses no Wyckoff letters",
    )
    proxies: str | None = option(None, "folder of proxies from discover.train what=proxy or trees; null: as shipped")
    prior: str | None = option(None, "folder of a prior from discover.train what=prior; null: as shipped")
    flow: str | None = option(None, "folder of a flow from discover.train what=flow; null: as shipped")
    seed: int = option(0, "random seed; same seed, same machine, same result")
    output: str | None = option(None, "folder of the run; null: runs/<time>-<reward>")
    resume: str | None = option(
        None,
        "continue the run in this folder, with its own settings; one that has finished may be given more rounds and a "
        "larger oracle.budget",
    )
    extends: tuple[int, int] | None = option(
        None, "written by resume=: rounds and budget that the run had before it was given more"
    )
    threads: int = option(1, "threads of torch; one is fastest on few cores, where two cost 1.6 times the wall time")
    dry_run: bool = option(False, "only print what would run, after four training steps on the clock")

    def __post_init__(self) -> None:
        """Check everything, the reward's settings included.

        Raises:
            ConfigError: Naming the setting and the remedy.
            RestrictionError: Naming the restriction, or the two that clash.
        """
        if self.resume is not None:
            self._check_resume()
            return
        if not self.has_prior:
            _require(
                not self.alpha,
                f"alpha={self.alpha} needs the shipped prior, which describes env=mp20 with Wyckoff letters; "
                "drop alpha, or use env=mp20 with wyckoff=on",
            )
            object.__setattr__(self, "alpha", 0.0)
        super().__post_init__()
        _require(
            self.has_prior or self.prior is None,
            "prior=DIR applies to env=mp20 with Wyckoff letters; drop it",
        )
        _require(
            self.has_letters or self.structure != "flow",
            "structure=flow places atoms on Wyckoff letters, and this run chooses none; drop it, or use wyckoff=on",
        )
        if self.structure is None:
            object.__setattr__(self, "structure", "flow" if self.has_letters else "random")
        _require(self.structure == "flow" or self.flow is None, "flow=DIR applies to structure=flow; drop one of them")
        _require(self.n_candidates >= 1, f"n_candidates must be at least 1, got {self.n_candidates}")
        _require(self.n_structures >= 0, f"n_structures must be >= 0, got {self.n_structures}")
        _require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")
        _require(self.threads >= 1, f"threads must be at least 1, got {self.threads}")
        _require(
            not (self.mixed_valence and self.chemistry == "any"),
            "mixed_valence=on does nothing with chemistry=any, which has no charge rule; drop one of them",
        )
        self._check_rounds()
        restrict(SPACES[self.env](), self.restrict.to_restrictions())  # RestrictionError before anything is built

    def _check_rounds(self) -> None:
        """Check what belongs to checking and learning."""
        _require(self.rounds >= 1, f"rounds must be at least 1, got {self.rounds}")
        if self.oracle.name == "none":
            idle = [
                name for name in ("engine", "acquire", "screen", "learn") if getattr(self, name) != _default(self, name)
            ]
            idle += [name for name in ("store", "reference") if getattr(self, name) is not None]
            idle += ["oracle"] if self.oracle != OracleConfig(name="none") else []
            idle += ["rounds"] if self.rounds > 1 else []
            _require(not idle, f"oracle.name=none checks nothing; drop {', '.join(idle)}")
        done, spent = self.extends or (0, 0)
        _require(
            0 <= done < self.rounds,
            f"extends={self.extends} leaves no round of rounds={self.rounds}",
        )
        _require(
            self.oracle.budget is None or self.oracle.budget - spent >= self.rounds - done,
            f"oracle.budget={self.oracle.budget} is less than one structure for each of rounds={self.rounds}"
            + (f": {spent} belong to the first {done}" if done else ""),
        )
        _require(
            self.store is None or "://" not in self.store or "@" not in self.store or ":" not in _user_of(self.store),
            "the store's URL holds a password, which the run folder would keep; leave it out and use PGPASSWORD or a "
            ".pgpass file",
        )
        _require(
            self.acquire.name != "random" or (self.screen.per_check or 1) == 1,
            "screen.per_check ranks what acquire.name=random does not; drop one of them",
        )
        cells = self.restrict.to_restrictions().binds_cells
        _require(
            self.screen.predicted == _default(self.screen, "predicted")
            or (self.looks_per_check > 1 and self.has_prior and self.structure == "flow" and not cells),
            "screen.predicted needs a screen (screen.per_check=8), structure=flow and free cells; drop it",
        )
        _require(
            self.rounds > 1 or self.acquire.explore == AcquireConfig().explore,
            "acquire.explore applies before the last round; give rounds=2 or more, or drop it",
        )
        _require(
            self.rounds > 1 or self.learn.data is None or self.learn.labels is not None,
            "learn.data is rehearsed while learning; give rounds=2 or more, or learn.labels, or drop it",
        )
        _require(
            self.rounds > 1 or self.learn.sampler_steps == LearnConfig().sampler_steps,
            "learn.sampler_steps applies to later rounds; give rounds=2 or more, or drop it",
        )

    def _check_resume(self) -> None:
        """Refuse settings beside `resume` but those that may be raised: the run goes on with its own."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del given["resume"], given["rounds"]
        given["oracle"] = dataclasses.replace(self.oracle, budget=None)
        changed = [name for name, value in given.items() if value != _default(self, name)]
        if changed:
            raise ConfigError(
                f"resume={self.resume} goes on with the run's own settings, of which only rounds and oracle.budget may "
                f"be raised; drop {', '.join(changed)}"
            )

    @property
    def budget(self) -> int:
        """Structures to check over all rounds."""
        return 20 * self.rounds if self.oracle.budget is None else self.oracle.budget

    def round_budget(self, number: int) -> int:
        """Return how many structures round `number` checks; shares differ by one at most.

        Args:
            number: The round, from 1; of a run that was given more, one of those that were added.
        """
        done, spent = self.extends or (0, 0)
        budget, rounds, place = self.budget - spent, self.rounds - done, number - done
        return budget * place // rounds - budget * (place - 1) // rounds

    @property
    def looks_per_check(self) -> int:
        """Candidates that are looked at for each one that is checked, once the defaults are filled in."""
        by_default = _LOOKS_PER_CHECK if self.oracle.name == "chgnet" and self.acquire.name != "random" else 1
        return by_default if self.screen.per_check is None else self.screen.per_check

    @property
    def has_letters(self) -> bool:
        """Whether this run chooses Wyckoff letters."""
        return SPACES[self.env]().wyckoff if self.wyckoff is None else self.wyckoff

    @property
    def has_prior(self) -> bool:
        """Whether the shipped prior describes the crystals of this run."""
        return self.env == "mp20" and self.has_letters

    @property
    def alpha_value(self) -> float:
        """The exponent of the prior, once the defaults are filled in."""
        return 0.0 if self.alpha is None else self.alpha


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Everything `python -m discover.sample` can be told."""

    run: str = option("", "folder of a finished or interrupted run")
    n: int = option(1000, "crystals to return")
    correct: Literal["none", "sir", "finetune"] = option(
        "none",
        "make a restricted sample follow the reward again: resample (sir) or train on under the restriction (finetune)",
    )
    restrict: RestrictConfig = group(RestrictConfig, "restrictions on top of those of the run")
    n_structures: int = option(0, "of the best, how many to build as CIF files")
    seed: int = option(0, "random seed")
    output: str | None = option(None, "folder to write to; null: <run>/samples/001, 002, ...")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        _require(bool(self.run), "sampling needs a trained run: run=DIR, the folder that discover.run wrote")
        _require(self.n >= 1, f"n must be at least 1, got {self.n}")
        _require(self.n_structures >= 0, f"n_structures must be >= 0, got {self.n_structures}")
        _require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Everything `python -m discover.predict` can be told."""

    composition: str = option(
        "", "formula: TiO2 leaves the size of the cell open, Ti4O8 is the primitive cell's content"
    )
    n_formula_units: int | None = option(
        None, "formula units in the primitive cell; null: 1 to as many as 20 atoms make, by how usual each is"
    )
    space_group: int | None = option(None, "only this international number, 1 to 230")
    chemistry: Literal["any", "ionic"] = option(
        "any", "take every composition, or refuse what cannot be charge-neutral"
    )
    n: int = option(20, "structures to predict")
    source: Literal["both", "generator", "templates"] = option(
        "both",
        "where proposals come from: the composition-conditioned prior, known prototypes, or both ranked together",
    )
    templates: str | None = option(
        None,
        "data set (CSV, folder of CIF files, extxyz) whose rows are the prototypes; null: the aggregate that ships",
    )
    rank: Literal["model", "chgnet"] = option(
        "model", "by the learned ranking, or by CHGNet's energy per atom after a short relaxation"
    )
    relax_steps: int | None = option(
        None, "for rank=chgnet: most steps of the relaxation, 0 for the energies as built; null: 50"
    )
    structure: Literal["flow", "random"] = option(
        "flow", "how coordinates are found: flow (learned) or random (the baseline)"
    )
    draws: int = option(8, "coordinates that the flow draws for likely letters, the best is kept; 1 is faster")
    pick: Pick = option("chgnet", _PICK)
    flow: str | None = option(None, "folder of a flow from discover.train what=flow; null: as shipped")
    format: Literal["cif", "extxyz", "poscar"] = option(
        "cif", "one CIF or POSCAR file each, or one extxyz file with all"
    )
    proxies: str | None = option(None, "folder of proxies from discover.train what=proxy or trees; null: as shipped")
    seed: int = option(0, "random seed; same seed, same machine, same result")
    output: str | None = option(None, "folder to write to; null: runs/<time>-predict-<formula>")
    threads: int = option(1, "threads of torch")
    n_workers: int = option(2, "for rank=chgnet: processes that relax")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        _require(bool(self.composition), "prediction needs a composition, such as composition=TiO2")
        for name in ("n", "threads", "draws", "n_formula_units"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.space_group is None or 1 <= self.space_group <= 230,
            f"space_group is an international number, 1 to 230; got {self.space_group}",
        )
        _require(
            self.templates is None or self.source != "generator",
            "templates=FILE does nothing with source=generator; drop one of them",
        )
        _require(
            self.relax_steps is None or self.rank == "chgnet", "relax_steps applies to rank=chgnet; drop it or rank so"
        )
        _require(self.relax_steps is None or self.relax_steps >= 0, f"relax_steps must be >= 0, got {self.relax_steps}")
        _require(self.n_workers >= 0, f"n_workers must be >= 0, got {self.n_workers}")
        _require(self.structure == "flow" or self.flow is None, "flow=DIR applies to structure=flow; drop one of them")
        _require(
            (self.structure == "flow" and self.source != "templates") or self.draws == _default(self, "draws"),
            "draws is of structure=flow and of sources that need coordinates; drop it",
        )
        _require(
            (self.structure == "flow" and self.source != "templates") or self.pick == _default(self, "pick"),
            "pick is of structure=flow and of sources that need coordinates; drop it",
        )
        _require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Everything `python -m discover.generate` can be told."""

    n: int = option(1000, "crystals to draw; all of them count, those without a structure too")
    chemistry: Literal["any", "ionic"] = option("any", "no charge rule, or charge-neutral and Pauling-ordered")
    mixed_valence: bool = option(False, "let one element take two oxidation states (Fe3O4), for chemistry=ionic")
    restrict: RestrictConfig = group(RestrictConfig, "what the crystals may contain")
    letters: Literal["composition", "likeliest", "prior"] | None = option(
        None,
        "what writes space group and letters: the composition prior, with lattices from the flow, drawn (composition) "
        "or its most probable ones (likeliest), or the prior that draws the compositions, with its own lattices "
        "(prior); null: composition, or prior where lengths, angles or volumes are restricted or structure=random",
    )
    structure: Literal["flow", "random"] = option(
        "flow", "how coordinates are found: flow (learned) or random (the baseline)"
    )
    predicted: int = option(
        0,
        "structures that discover.predict adds to each crystal's own, unless letters=prior; the one of lowest CHGNet "
        "energy is kept",
    )
    draws: int = option(
        8, "coordinates that the flow draws for each crystal, the best is kept; 1 takes a quarter of the time"
    )
    pick: Pick = option("chgnet", _PICK)
    n_workers: int = option(2, "processes that compute energies, for pick=chgnet and predicted")
    flow: str | None = option(None, "folder of a flow from discover.train what=flow; null: as shipped")
    format: Literal["cif", "extxyz", "poscar"] = option(
        "cif", "one CIF or POSCAR file each, or one extxyz file with all"
    )
    proxies: str | None = option(None, "folder of proxies from discover.train what=proxy or trees; null: as shipped")
    prior: str | None = option(None, "folder of a prior from discover.train what=prior; null: as shipped")
    seed: int = option(0, "random seed; same seed, same machine, same result")
    output: str | None = option(None, "folder to write to; null: runs/<time>-generate")
    threads: int = option(1, "threads of torch")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
            RestrictionError: Naming the restriction, or the two that clash.
        """
        _require(self.n >= 1, f"n must be at least 1, got {self.n}")
        _require(self.structure == "flow" or self.flow is None, "flow=DIR applies to structure=flow; drop one of them")
        _require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")
        _require(self.threads >= 1, f"threads must be at least 1, got {self.threads}")
        _require(
            not (self.mixed_valence and self.chemistry == "any"),
            "mixed_valence=on does nothing with chemistry=any, which has no charge rule; drop one of them",
        )
        restrict(SPACES["mp20"](), self.restrict.to_restrictions())  # RestrictionError before anything is built
        lattice = [name for name in ("length", "angle", "volume_per_atom") if getattr(self.restrict, name) is not None]
        _require(self.predicted >= 0, f"predicted must be at least 0, got {self.predicted}")
        _require(self.draws >= 1, f"draws must be at least 1, got {self.draws}")
        _require(
            self.structure == "flow" or self.draws == _default(self, "draws"), "draws is of structure=flow; drop it"
        )
        _require(self.n_workers >= 0, f"n_workers must be at least 0, got {self.n_workers}")
        _require(self.structure == "flow" or self.pick == _default(self, "pick"), "pick is of structure=flow; drop it")
        _require(
            self.predicted > 0
            or (self.structure == "flow" and self.pick == "chgnet" and self.draws > 1)
            or self.n_workers == 2,
            "n_workers computes energies, for pick=chgnet with several draws or predicted=4 or so; drop it",
        )
        bound = [f"restrict.{name}" for name in lattice] + (["structure=random"] if self.structure == "random" else [])
        if self.letters is None:
            object.__setattr__(self, "letters", "prior" if bound else "composition")
        _require(
            self.letters == "prior" or not bound,
            f"letters={self.letters} leaves the lattice to the flow, but {' and '.join(bound)} needs that of the "
            "prior; use letters=prior",
        )
        _require(
            not self.predicted or self.letters != "prior",
            "predicted structures have letters and cells of their own, which letters=prior, restricted cells and "
            "structure=random rule out; drop predicted",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything `python -m discover.train` can be told."""

    what: Literal["prior", "composition_prior", "proxy", "trees", "flow", "gap"] = option(
        "prior",
        "what to train: the prior policy, the prior of letters given a composition, the property proxies, "
        "scikit-learn trees in their place, the flow that finds coordinates, or the band gap of relaxed structures",
    )
    data: str = option("", "CSV file in the field's form (material_id, cif, labels), folder of CIF files, extxyz")
    output: str = option("", "folder for the weights, the configuration and the model card")
    epochs: int | None = option(None, "passes over the data; null: the trainer's default")
    batch_size: int | None = option(None, "crystals per step; null: the trainer's default")
    lr: float | None = option(None, "learning rate; null: the trainer's default")
    minutes: float | None = option(
        None, "priors and flow: train for this many minutes; the learning rate falls to its end within them"
    )
    n_networks: int | None = option(
        None, "for what=composition_prior: members of the ensemble, which share the minutes; null: 3"
    )
    device: str | None = option(None, "for what=flow: cpu or cuda; null: cuda where there is one")
    start: str | None = option(
        None,
        "for what=flow, prior and proxy: folder of one to start from, to refine it or to fit it to other data (a prior "
        "then learns to reckon with charges too); null: none",
    )
    labels: str | None = option(
        None,
        "for what=proxy: data set of proposed crystals to learn from as well, labelled with what they relax to, such "
        "as benchmarks.prior_labels writes; null: none",
    )
    seed: int = option(0, "random seed")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        _require(bool(self.data), "training needs a data set: data=FILE.csv, see python -m discover.fetch")
        _require(
            self.what == "flow" or self.device is None,
            f"device applies to what=flow; what={self.what} trains on the CPU. Drop it",
        )
        _require(
            self.what in ("flow", "prior", "proxy") or self.start is None,
            f"start applies to what=flow, prior and proxy; what={self.what} starts from nothing. Drop it",
        )
        _require(
            self.what == "proxy" or self.labels is None,
            f"labels applies to what=proxy; what={self.what} learns from data alone. Drop it",
        )
        _require(
            self.what == "composition_prior" or self.n_networks is None,
            f"n_networks applies to what=composition_prior; what={self.what} has its own. Drop it",
        )
        _require(bool(self.output), "training needs a folder to write to: output=DIR")
        for name in ("epochs", "batch_size", "lr", "minutes", "n_networks"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be > 0, got {value}")
        _require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")


_EVALUATE_TAKES: dict[str, tuple[str, ...]] = {
    "sampler": ("run", "n"),
    "proxy": ("data", "train_data", "weights"),
    "prior": ("data", "train_data", "weights"),
    "gap": ("data", "weights", "output", "n_workers"),
    "csp": (
        *("data", "n", "k", "given", "source", "draws", "pick", "templates"),
        *("output", "n_workers"),
    ),
    "dng": (
        *("reference", "n", "train_data", "hull", "n_relax", "source", "letters", "draws", "pick", "predicted"),
        *("run", "structures", "output", "n_workers"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything `python -m discover.evaluate` can be told."""

    task: Literal["sampler", "proxy", "prior", "gap", "csp", "dng"] = option(
        "sampler",
        "what to evaluate: a trained sampler, the proxies, the likelihood of the prior, the band gap model of "
        "structures (gap), structure prediction (csp), or de novo generation (dng)",
    )
    run: str | None = option(None, "for task=sampler and task=dng: folder of the run")
    data: str | None = option(
        None, "for task=proxy, prior, gap and csp: CSV file with structures, and labels for the first three"
    )
    train_data: str | None = option(
        None,
        "CSV file that the weights were trained on: adds figures on chemical systems new to the proxies, "
        "the independent-marginals baseline to the prior, and novelty and the floor of each distance to dng",
    )
    weights: str | None = option(
        None, "for task=proxy, prior and gap: folder of trained weights; null: those that ship with the package"
    )
    n: int = option(
        10000, "for task=sampler and dng: crystals to sample; for task=csp: random rows of the data, at most all"
    )
    k: int = option(1, "for task=csp: predictions per material; figures at 1, 5, 20 and 100 up to k come from one run")
    given: Literal["composition", "wyckoff"] = option(
        "composition", "for task=csp: what is known of a material; wyckoff adds its space group and letters"
    )
    source: Literal["both", "generator", "templates", "ranked", "random", "prior", "substitution"] | None = option(
        None,
        "for task=csp: proposals as discover.predict makes them (both, the default), from the composition prior and "
        "the flow alone (generator), from plain retrieval alone (templates) or in its learned order (ranked), or "
        "the prior's letters with random coordinates (random); for task=dng: the prior (the default), the prior with "
        "random coordinates (random), or element substitution in training structures (substitution)",
    )
    letters: Literal["composition", "likeliest", "prior"] | None = option(
        None, "for task=dng and source=prior: what writes space group and letters, see discover.generate"
    )
    draws: int = option(8, "for task=csp and dng with a flow: draws of coordinates, see discover.generate")
    pick: Pick | None = option(None, f"for task=csp and dng with a flow: {_PICK}")
    predicted: int = option(
        0, "for task=dng with source=prior or run: structures added to each crystal's own, see discover.generate"
    )
    templates: str | None = option(
        None, "for task=csp: CSV file whose rows are retrieved; null: the aggregate that ships with the package"
    )
    reference: str | None = option(
        None, "for task=dng: CSV file, folder of CIF files or extxyz file to compare with, such as a validation split"
    )
    structures: str | None = option(
        None, "for task=dng: structures of any generator, in order: a folder of CIF files, an extxyz or a CSV file"
    )
    hull: str | None = option(
        None, "for task=dng: CSV file of formulas and formation energies, or folder with it: adds stability and S.U.N."
    )
    n_relax: int = option(500, "for task=dng with a hull: how many of the first structures to relax with CHGNet")
    output: str | None = option(
        None,
        "for task=csp and dng: folder for figures.json and a table with one row a material or relaxed structure; for "
        "task=gap: folder that keeps what CHGNet sees, so that the next model takes seconds",
    )
    n_workers: int = option(
        2, "for task=gap, csp and dng: processes that run CHGNet (csp: in this one), compare, fingerprint and relax"
    )
    seed: int = option(0, "random seed")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        strangers = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in ("task", "seed", *_EVALUATE_TAKES[self.task])
            and getattr(self, field.name) != field.default
        ]
        _require(not strangers, f"task={self.task} does not take {', '.join(strangers)}; drop them")
        if self.task == "sampler":
            _require(self.run is not None, "task=sampler needs run=DIR, the folder that discover.run wrote")
        elif self.task == "dng":
            self._check_dng()
        else:
            _require(self.data is not None, f"task={self.task} needs data=FILE.csv with structures and labels")
        if self.task == "csp":
            self._check_csp()
        _require(self.n >= 1, f"n must be at least 1, got {self.n}")
        _require(self.n_workers >= 0, f"n_workers must be at least 0, got {self.n_workers}")
        _require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")

    def _check_csp(self) -> None:
        """Check what only structure prediction takes."""
        if self.source is None:
            object.__setattr__(self, "source", "both")
        _require(
            self.source in ("both", "generator", "templates", "ranked", "random"),
            f"task=csp takes source=both, generator, templates, ranked or random, got {self.source}",
        )
        _require(self.k >= 1, f"k must be at least 1, got {self.k}")
        _require(
            self.given == "composition" or self.source == "generator",
            f"given=wyckoff leaves only coordinates and lattice to find: use source=generator, not {self.source}",
        )
        self._check_draws(("both", "generator"))
        _require(
            self.templates is None or self.source in ("both", "templates", "ranked"),
            f"templates=FILE belongs to source=both, templates and ranked, not to source={self.source}; drop it",
        )

    def _check_draws(self, sources: tuple[str, ...]) -> None:
        """Check what tells draws of the flow apart, which only some sources have, and fill in what commands do."""
        _require(self.draws >= 1, f"draws must be at least 1, got {self.draws}")
        for name in ("draws", "pick"):
            _require(
                self.source in sources or getattr(self, name) == _default(self, name),
                f"{name} applies to source={' and source='.join(sources)}; drop it",
            )
        if self.pick is None and self.source in sources:
            object.__setattr__(self, "pick", _default(GenerateConfig, "pick"))

    def _check_dng(self) -> None:
        """Check what only de novo generation takes."""
        _require(
            not (self.reference is None and self.hull is None),
            "task=dng needs reference=FILE.csv to compare with, such as a validation split; or hull=FOLDER, for "
            "stability alone; or both",
        )
        given = [name for name in ("run", "structures", "source") if getattr(self, name) is not None]
        _require(len(given) <= 1, f"{' and '.join(given)} each say where the structures come from; keep one of them")
        if not given:
            object.__setattr__(self, "source", "prior")
        _require(
            self.source in (None, "prior", "random", "substitution"),
            f"task=dng takes source=prior, random or substitution, got {self.source}",
        )
        _require(
            self.source != "substitution" or not (self.train_data is None or self.hull is None),
            "source=substitution needs train_data=FILE for its parents and hull=FOLDER for the known formulas",
        )
        _require(
            self.letters is None or self.source == "prior",
            "letters applies to source=prior; drop it",
        )
        self._check_draws(("prior",))
        _require(self.predicted >= 0, f"predicted must be at least 0, got {self.predicted}")
        _require(
            not self.predicted or self.run is not None or (self.source == "prior" and self.letters != "prior"),
            "predicted applies to run=DIR and to source=prior without letters=prior; drop it",
        )
        _require(self.n_relax >= 1, f"n_relax must be at least 1, got {self.n_relax}")
        _require(self.hull is not None or self.n_relax == 500, "n_relax needs hull=FOLDER; give it or drop n_relax")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Everything `python -m discover.report` can be told."""

    run: str = option("", "folder of the run whose report is rebuilt")

    def __post_init__(self) -> None:
        """Check that a run is named.

        Raises:
            ConfigError: If none is.
        """
        _require(bool(self.run), "the report needs run=DIR, the folder that discover.run wrote")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Everything `python -m discover.export` can be told."""

    run: str = option("", "folder of a run that checked structures")
    to: Literal["vasp", "espresso", "poscar", "parquet", "extxyz", "ase"] = option(
        "vasp", "inputs of VASP or Quantum ESPRESSO, or POSCAR files, of the best; or all that the run's store holds"
    )
    n: int = option(12, "how many of the best, for vasp, espresso and poscar")
    potentials: str | None = option(None, "for to=espresso: JSON file of the SSSP library; null: names such as Fe.upf")
    output: str | None = option(None, "folder or file to write; null: export-<to> in the run's folder")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        _require(bool(self.run), "an export needs run=DIR, the folder that discover.run wrote")
        _require(self.n >= 1, f"n must be at least 1, got {self.n}")
        _require(self.potentials is None or self.to == "espresso", "potentials applies to to=espresso; drop it")


@dataclass(frozen=True, kw_only=True)
class AddResultsConfig:
    """Everything `python -m discover.add_results` can be told."""

    run: str = option("", "folder of the run that proposed the structures")
    data: str = option("", "folder with one folder of results per structure, named by its id")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        _require(bool(self.run), "results belong to a run: run=DIR, the folder that discover.run wrote")
        _require(bool(self.data), "data=FOLDER has one folder of results per structure, named by its id")


def _user_of(url: str) -> str:
    """Return user, and password if there is one, of a URL."""
    return url.split("://", 1)[1].rpartition("@")[0]


def absolute(config: RunConfig) -> RunConfig:
    """Return the settings with paths that hold wherever the run is resumed from."""

    def full(path: str | None) -> str | None:
        return path if path is None or "://" in path else str(Path(path).resolve())

    def folder(name: str | None) -> str | None:
        """Return a model's folder in full; other names are those of a hub or of a function."""
        return full(name) if name is not None and Path(name).is_dir() else name

    return dataclasses.replace(
        config,
        store=full(config.store),
        reference=full(config.reference),
        proxies=full(config.proxies),
        prior=full(config.prior),
        flow=full(config.flow),
        oracle=dataclasses.replace(
            config.oracle,
            hull=full(config.oracle.hull),
            model=folder(config.oracle.model),
            second=folder(config.oracle.second),
        ),
        engine=dataclasses.replace(config.engine, config=full(config.engine.config)),
        learn=dataclasses.replace(config.learn, data=full(config.learn.data), labels=full(config.learn.labels)),
    )


def _default(config: Any, name: str) -> Any:
    """Return what a setting, or a group of settings, is when nobody gives it."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def settings(config: Any) -> dict[str, Any]:
    """Return a configuration as a nested dict of plain values."""
    return dataclasses.asdict(config)


def _names(names: Iterable[str]) -> str:
    return "[" + ",".join(names) + "]"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
