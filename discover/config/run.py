"""Everything ``python -m discover.run`` can be told, in groups."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from discover.config.checks import default_of, holds_password, require
from discover.config.reward import DEFAULT_BETA, RewardConfig, parse_reward
from discover.options import group, option
from envs.conventions import CRYSTAL_SYSTEMS
from envs.restrictions import SPACES, Restrictions, restrict

_LOOKS_PER_CHECK = 8
_SQLITE = "sqlite:///"  # a path follows


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
            require(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        require(self.batch_size >= 2, f"train.batch_size must be at least 2, got {self.batch_size}")
        for name in ("lr", "lr_log_Z"):
            require(getattr(self, name) > 0, f"train.{name} must be > 0, got {getattr(self, name)}")
        require(0 <= self.epsilon < 1, f"train.epsilon must be in [0, 1), got {self.epsilon}")
        require(self.temperature > 0, f"train.temperature must be > 0, got {self.temperature}")
        for name in ("replay_fraction", "data_fraction"):
            require(0 <= getattr(self, name) <= 1, f"train.{name} must be in [0, 1], got {getattr(self, name)}")
        require(
            self.replay_fraction + self.data_fraction <= 1,
            "train.replay_fraction + train.data_fraction must not exceed 1, "
            f"got {self.replay_fraction} + {self.data_fraction}",
        )
        require(self.minutes is None or self.minutes > 0, f"train.minutes must be > 0, got {self.minutes}")


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
        "CSV file of formulas and formation energies, or folder with entries.csv.gz; null: energies above hull are "
        "relative to the hull that the proxies imply, and later rounds learn energies and gaps but not stability",
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
        require(
            self.budget is None or self.budget >= 1,
            f"oracle.budget must be at least 1, got {self.budget}; oracle.name=none checks nothing",
        )
        needs_model = self.name in ("matgl", "callable")
        what = "a path" if self.name == "matgl" else "module:function"
        require(not needs_model or self.model is not None, f"oracle.name={self.name} needs oracle.model, {what}")
        require(needs_model or self.model is None, f"oracle.model does nothing with oracle.name={self.name}; drop it")
        for owner, names in (("matgl", ("predicts", "scale")), ("callable", ("quantity",))):
            idle = [f"oracle.{name}" for name in names if getattr(self, name) is not None and self.name != owner]
            require(not idle, f"{', '.join(idle)} applies to oracle.name={owner}, not to {self.name}; drop it")
        require(
            self.second is None or (self.hull is not None and self.name != "none"),
            "oracle.second gives energies above hull: it needs oracle.hull=FILE and an oracle",
        )
        require(self.fmax > 0, f"oracle.fmax must be > 0 eV/Å, got {self.fmax}")
        require(self.max_steps >= 0, f"oracle.max_steps must be >= 0, got {self.max_steps}")
        require(
            self.max_steps > 0 or self.rattle in (0.0, default_of(self, "rattle")),
            "oracle.rattle is followed by a relaxation, and oracle.max_steps=0 leaves none; drop one of them",
        )
        require(0 <= self.rattle <= 0.5, f"oracle.rattle must be in 0 to 0.5 Å, got {self.rattle}")
        relaxes = self.name in ("chgnet", "matgl") or self.second is not None
        idle = [*(() if relaxes else ("fmax", "max_steps")), *(("rattle",) if self.name != "chgnet" else ())]
        given = [f"oracle.{name}" for name in dict.fromkeys(idle) if getattr(self, name) != default_of(self, name)]
        require(not given, f"{', '.join(given)} would do nothing with oracle.name={self.name}; drop it")
        require(self.time_limit > 0, f"oracle.time_limit must be > 0 s, got {self.time_limit}")
        require(
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
        require(self.workers is None or self.workers >= 0, f"engine.workers must be >= 0, got {self.workers}")
        require(
            (self.name == "parsl") == (self.config is not None),
            "engine.name=parsl and engine.config=FILE.py belong together; give both or neither",
        )
        require(
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
    temperature: float | None = option(
        None,
        "candidates are drawn in proportion to exp(score / temperature), so that runs with other seeds check others; "
        "0: best first; null: 0.5 in runs of several rounds with a target, which many reach alike, else 0",
    )
    per_formula: int = option(2, "most structures of one formula over all rounds")
    per_system: int = option(5, "most structures of one set of elements in a round")
    per_prototype: int = option(4, "most structures of one prototype in a round")
    per_element: int | None = option(
        None,
        "most structures in a round that hold one element, those of restrict.required aside, so that a round reaches "
        "many chemistries; null: no limit. Where limits would leave budget this one is lifted first",
    )
    new: bool = option(
        True,
        "only compositions that the hull file, the training data and other runs of the store do not hold; off: known "
        "ones are found again",
    )
    explore: float | None = option(
        None,
        "share of each round, before the last, for the candidates that the proxies are least sure of; null: 0.1 where "
        "others are taken best first, 0 where they are drawn",
    )

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        require(
            self.name == "ucb" or self.kappa == default_of(self, "kappa"),
            f"acquire.kappa applies to acquire.name=ucb, not to {self.name}; drop it",
        )
        require(self.kappa >= 0, f"acquire.kappa must be >= 0, got {self.kappa}")
        require(
            self.temperature is None or 0 <= self.temperature < math.inf,
            f"acquire.temperature must be a number >= 0, got {self.temperature}",
        )
        require(
            self.name != "random" or not self.temperature,
            "acquire.name=random has no score to draw by; drop acquire.temperature",
        )
        require(
            self.name != "random" or not self.explore,
            "acquire.name=random takes all at random; drop acquire.explore",
        )
        for name in ("per_formula", "per_system", "per_prototype"):
            require(getattr(self, name) >= 1, f"acquire.{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.per_element is None or self.per_element >= 1,
            f"acquire.per_element must be at least 1, got {self.per_element}",
        )
        require(
            self.explore is None or 0 <= self.explore <= 1, f"acquire.explore must be in [0, 1], got {self.explore}"
        )


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
        require(
            self.per_check is None or self.per_check >= 1, f"screen.per_check must be at least 1, got {self.per_check}"
        )
        require(self.predicted >= 0, f"screen.predicted must be at least 0, got {self.predicted}")
        require(
            self.per_check != 1 or self.predicted == default_of(self, "predicted"),
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
    looks: bool | None = option(
        None,
        "learn from candidates that were looked at and not checked too; null: on where CHGNet makes looks and labels "
        "and oracle.hull is given",
    )
    sampler_steps: int = option(150, "gradient steps of the sampler in each later round")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        require(self.sampler_steps >= 1, f"learn.sampler_steps must be at least 1, got {self.sampler_steps}")


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
        None, "written by resume=: rounds and budget that the run had before it was given more", in_help=False
    )
    threads: int = option(1, "threads of torch; on two cores a second gains nothing, two processes under torchrun do")
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
            require(
                not self.alpha,
                f"alpha={self.alpha} needs the shipped prior, which describes env=mp20 with Wyckoff letters; "
                "drop alpha, or use env=mp20 with wyckoff=on",
            )
            object.__setattr__(self, "alpha", 0.0)
        super().__post_init__()
        require(
            self.has_prior or self.prior is None,
            "prior=DIR applies to env=mp20 with Wyckoff letters; drop it",
        )
        require(
            self.has_letters or self.structure != "flow",
            "structure=flow places atoms on Wyckoff letters, and this run chooses none; drop it, or use wyckoff=on",
        )
        if self.structure is None:
            object.__setattr__(self, "structure", "flow" if self.has_letters else "random")
        require(self.structure == "flow" or self.flow is None, "flow=DIR applies to structure=flow; drop one of them")
        require(self.n_candidates >= 1, f"n_candidates must be at least 1, got {self.n_candidates}")
        require(self.n_structures >= 0, f"n_structures must be >= 0, got {self.n_structures}")
        require(0 <= self.seed < 2**63, f"seed must be in 0 to 2^63 - 1, got {self.seed}")
        require(self.threads >= 1, f"threads must be at least 1, got {self.threads}")
        require(
            self.loss == "tb" or self.train.lr_log_Z == default_of(self.train, "lr_log_Z"),
            "train.lr_log_Z is for loss=tb; drop it, or use loss=tb",
        )
        require(
            self.has_prior or self.train.data_fraction in (0.0, default_of(self.train, "data_fraction")),
            "train.data_fraction takes samples of the prior, which describes env=mp20 with Wyckoff letters; drop it",
        )
        require(
            not (self.mixed_valence and self.chemistry == "any"),
            "mixed_valence=on does nothing with chemistry=any, which has no charge rule; drop one of them",
        )
        self._check_rounds()
        restrict(SPACES[self.env](), self.restrict.to_restrictions())  # RestrictionError before anything is built

    def _check_rounds(self) -> None:
        """Check what belongs to checking and learning."""
        require(self.rounds >= 1, f"rounds must be at least 1, got {self.rounds}")
        if self.oracle.name == "none":
            idle = [
                name
                for name in ("engine", "acquire", "screen", "learn")
                if getattr(self, name) != default_of(self, name)
            ]
            idle += [name for name in ("store", "reference") if getattr(self, name) is not None]
            idle += ["oracle"] if self.oracle != OracleConfig(name="none") else []
            idle += ["rounds"] if self.rounds > 1 else []
            require(not idle, f"oracle.name=none checks nothing; drop {', '.join(idle)}")
        by_hand = self.oracle.name == "external" and self.oracle.second is None and self.looks_per_check == 1
        require(
            not by_hand or self.engine == EngineConfig(),
            "engine runs the oracle, and oracle.name=external is filled in by hand; drop engine.*",
        )
        idle = [
            f"oracle.{name}"
            for name in ("time_limit", "memory_limit")
            if by_hand and getattr(self.oracle, name) != default_of(self.oracle, name)
        ]
        require(not idle, f"{', '.join(idle)} would do nothing with oracle.name=external; drop it")
        done, spent = self.extends or (0, 0)
        require(
            0 <= done < self.rounds,
            f"extends={self.extends} leaves no round of rounds={self.rounds}",
        )
        require(
            self.oracle.budget is None or self.oracle.budget - spent >= self.rounds - done,
            f"oracle.budget={self.oracle.budget} is less than one structure for each of rounds={self.rounds}"
            + (f": {spent} belong to the first {done}" if done else ""),
        )
        require(
            self.store is None or "://" not in self.store or not holds_password(self.store),
            "the store's URL holds a password, which the run folder would keep; leave it out and use PGPASSWORD or a "
            ".pgpass file",
        )
        require(
            self.acquire.name != "random" or (self.screen.per_check or 1) == 1,
            "screen.per_check ranks what acquire.name=random does not; drop one of them",
        )
        cells = self.restrict.to_restrictions().binds_cells
        require(
            self.screen.predicted == default_of(self.screen, "predicted")
            or (self.looks_per_check > 1 and self.has_prior and self.structure == "flow" and not cells),
            "screen.predicted needs a screen (screen.per_check=8), structure=flow and free cells; drop it",
        )
        require(
            self.rounds > 1 or self.acquire.explore is None,
            "acquire.explore applies before the last round; give rounds=2 or more, or drop it",
        )
        require(
            self.rounds > 1 or self.learn.data is None or self.learn.labels is not None,
            "learn.data is rehearsed while learning; give rounds=2 or more, or learn.labels, or drop it",
        )
        require(
            self.rounds > 1 or self.learn.sampler_steps == LearnConfig().sampler_steps,
            "learn.sampler_steps applies to later rounds; give rounds=2 or more, or drop it",
        )
        require(
            self.learn.looks is None or (self.rounds > 1 and self.looks_per_check > 1 and self._looks_teach),
            "learn.looks applies to later rounds with oracle.name=chgnet, oracle.hull and a screen "
            "(screen.per_check=8); drop it",
        )

    def _check_resume(self) -> None:
        """Refuse settings beside `resume` but those that may be raised: the run goes on with its own."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del given["resume"], given["rounds"]
        given["oracle"] = dataclasses.replace(self.oracle, budget=None)
        refuse_beside_resume(self.resume, [name for name, value in given.items() if value != default_of(self, name)])

    @staticmethod
    def upgraded(stored: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the settings of an earlier version as this one takes them: candidates are chosen as they were then.

        What nothing read, and is refused today, is left out.

        Args:
            stored: The tree of a `config.yaml`.
        """
        stored = {**stored, **_without_idle(stored)}
        acquire = stored.get("acquire", {})
        if "per_element" not in acquire:
            stored = {**stored, **_stability_as_it_was(stored)}
        if "temperature" in acquire:
            return stored
        checks = stored.get("oracle", {}).get("name") != "none"
        if checks and acquire.get("name") != "random":
            acquire = {**acquire, "temperature": 0.0}
        if stored.get("rounds", 1) == 1 or acquire.get("name") == "random":  # the default was written out
            acquire = {key: value for key, value in acquire.items() if key != "explore"}
        return {**stored, "acquire": acquire}

    @property
    def _asks_for_new(self) -> bool:
        return self.acquire.new

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
    def learns_from_looks(self) -> bool:
        """Whether proxies learn from looks, once the defaults are filled in."""
        return self._looks_teach if self.learn.looks is None else self.learn.looks

    @property
    def _looks_teach(self) -> bool:
        """Whether looks are on the scale of the labels, and above a hull that the proxies do not imply."""
        return self.oracle.name == "chgnet" and self.oracle.hull is not None

    @property
    def acquire_temperature(self) -> float:
        """The temperature at which candidates are drawn, once the defaults are filled in."""
        drawn = self.rounds > 1 and self.target is not None and self.acquire.name != "random"
        by_default = 0.5 if drawn else 0.0
        return by_default if self.acquire.temperature is None else self.acquire.temperature

    @property
    def explore_share(self) -> float:
        """The share of a round for exploration, once the defaults are filled in."""
        by_default = 0.1 if self.acquire_temperature == 0 else 0.0
        return by_default if self.acquire.explore is None else self.acquire.explore

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


def _stability_as_it_was(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reward of a run that was told reward=stability when that was P(E_hull < 0.1 eV/atom)."""
    terms = parse_reward(str(stored.get("reward", "bandgap")))
    if all(term.name != "stability" for term in terms):
        return {}
    limit = stored.get("hull_limit")
    same: dict[str, Any] = {"hull_limit": 0.1 if limit is None else limit, "novelty_gate": False}
    if sum(term.name in DEFAULT_BETA for term in terms) == 1:
        return {**same, "beta": 1.0}
    beta = float(stored.get("beta") or DEFAULT_BETA["stability"])  # another factor's too, so the weight has to change
    weights = [term.weight / beta if term.name == "stability" else term.weight for term in terms]
    return {**same, "reward": "*".join(f"{term.name}^{w:g}" for term, w in zip(terms, weights, strict=True))}


def _without_idle(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the groups of earlier settings without what had no effect."""
    train, oracle, engine = (dict(stored.get(name, {})) for name in ("train", "oracle", "engine"))
    if stored.get("loss") != "tb":
        train.pop("lr_log_Z", None)
    if stored.get("env") == "crystal_gfn" or stored.get("wyckoff") is False:
        train.pop("data_fraction", None)
    if oracle.get("max_steps") == 0:
        oracle.pop("rattle", None)
    looks = stored.get("screen", {}).get("per_check") or 1
    if oracle.get("name") == "external" and oracle.get("second") is None and looks == 1:
        engine = {}
    return {name: group for name, group in (("train", train), ("oracle", oracle), ("engine", engine)) if name in stored}


def refuse_beside_resume(resume: str | None, names: Iterable[str]) -> None:
    """Refuse settings that a run which goes on would not take.

    Args:
        resume: Its folder.
        names: Of the settings, or of their groups.

    Raises:
        ConfigError: If there are any beside those that may be raised.
    """
    idle = ", ".join(name for name in names if name not in ("resume", "rounds", "oracle.budget"))
    require(
        not idle,
        f"resume={resume} goes on with the run's own settings, of which only rounds and oracle.budget may be raised; "
        f"drop {idle}",
    )


def absolute(config: RunConfig) -> RunConfig:
    """Return the settings with paths that hold wherever the run is resumed from."""

    def full(path: str | None) -> str | None:
        if path is not None and "?" not in path:
            path = path.removeprefix(_SQLITE)
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
