"""``python -m discover.tune what=sampler reward=bandgap target=1.34 output=DIR``: search settings of training.

Both objectives are figures that a user would want to be good, not the loss or the reward that is trained on; each is
stated in `OBJECTIVES`, printed with every study and explained in docs/tuning.md.
"""

import difflib
import hashlib
import json
import math
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import optuna
import pandas as pd
import torch
import yaml
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from tqdm import tqdm

from discover.build import Parts, build_parts, prior_samples, seeded, start_policy
from discover.candidates import Column, candidate_table
from discover.config import RunConfig, TrainConfig, TrainingConfig
from discover.data import LABELS, prepare
from discover.errors import ConfigError, DataError, main_guard
from discover.options import all_keys, dump_yaml, help_text, option, parse_args
from discover.progress import NEAR_TARGET
from discover.properties import Properties
from discover.reward import UserFactor, build_reward, import_function
from discover.run_folder import CONFIG, RunFolder, create_run_folder, open_run_folder, write_atomic
from discover.structure_files import data_files
from discover.study import FILE, Outcome, Settings, Space, Study, TrialRecord, check_study_file, open_study
from discover.train_proxy import ProxyTraining, split, train_member
from discover.train_sampler import Trainer, draw_crystals
from envs.crystal import CrystalBatch
from policies.policy import CrystalPolicy
from proxies import PropertyEnsemble, median_gap
from proxies.ensemble import Calibration

ConfigT = TypeVar("ConfigT", RunConfig, ProxyTraining)

USAGE = """python -m discover.tune what=sampler output=DIR reward=bandgap target=1.34 [n_trials=20] [queries=50000]
python -m discover.tune what=proxy output=DIR data=FILE.csv [n_trials=20] [epochs=6]

Further settings are those of discover.run (what=sampler) or of ProxyTraining in discover.train_proxy (what=proxy).
One that is given is kept fixed in every trial; the rest of these is searched:"""
TRIALS, BEST = "trials.csv", "best.yaml"
OBJECTIVES = {
    "sampler": "share of samples that are distinct hits: a formula not counted before, on target, "
    "P(E_hull < 0.1) >= 0.5, oxidation score >= -5 (maximised)",
    "proxy": "mean over the labels of MAE / MAE of a constant, on held-out formulas and chemical systems (minimised)",
}
LEAST_P_METASTABLE = 0.5
LEAST_OXIDATION_SCORE = -5.0  # for chemistry=ionic; alloys have no oxidation states
TOP_SHARE = 0.1  # of the reference sample that counts as on target where a reward has no target
DEFAULT_QUERIES, DEFAULT_SAMPLES, DEFAULT_EPOCHS = 50_000, 2000, 6

SAMPLER_SPACE: dict[str, BaseDistribution] = {
    "train.lr": FloatDistribution(2e-4, 1e-2, log=True),
    "train.batch_size": CategoricalDistribution([128, 256, 512, 1024, 2048]),
    "train.epsilon": FloatDistribution(0.0, 0.3),
    "train.replay_fraction": FloatDistribution(0.0, 0.4),
    "train.data_fraction": FloatDistribution(0.0, 0.4),
    "alpha": FloatDistribution(0.0, 1.5),
    "beta": FloatDistribution(0.5, 32.0, log=True),
    "tolerance": FloatDistribution(0.02, 0.5, log=True),
}
PROXY_SPACE: dict[str, BaseDistribution] = {
    "learning_rate": FloatDistribution(3e-4, 1e-2, log=True),
    "weight_decay": FloatDistribution(1e-4, 0.3, log=True),
    "batch_size": CategoricalDistribution([64, 128, 256, 512]),
    "network.width": CategoricalDistribution([48, 64, 80, 96, 128]),
    "network.n_blocks": CategoricalDistribution([1, 2, 3]),
    "network.dropout": FloatDistribution(0.0, 0.2),
}
_REFUSED = {
    "train": "name its settings one by one, such as train.lr=0.001",
    "network": "name its settings one by one, such as network.width=64",
    "train.n_steps": "queries says how long each trial trains",
    "train.minutes": "queries says how long each trial trains",
    "resume": "give the same command again to continue a study",
    "dry_run": "tuning has no dry run; n_trials=1 tries the defaults alone",
    "n_candidates": "samples says how many crystals are judged",
    "n_structures": "no structures are built",
    "structure": "no structures are built",
    "n_members": "each trial trains one member",
}
_POOL = 8192  # samples of the prior: data of the training, and the reference where a reward has no target
_REPORTS = (0.5, 0.75)  # shares of training at which a hopeless trial can be stopped; the reward warms up before
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """What `python -m discover.tune` itself can be told; the settings that trials share come on top."""

    what: Literal["sampler", "proxy"] = option("sampler", "what to tune")
    output: str = option("", "folder of the study; give the same one again to continue")
    n_trials: int = option(20, "trials in the study, over all resumptions; failed ones count, killed ones do not")
    minutes: float | None = option(None, "start no further trial after this; the one in progress is finished")
    seed: int = option(0, "random seed of the proposals and of every trial")
    queries: int | None = option(None, "what=sampler: crystals that the reward scores in each trial; null: 50000")
    samples: int | None = option(None, "what=sampler: crystals drawn after training to judge a trial; null: 2000")
    data: str | None = option(None, "what=proxy: CSV file with labels")
    epochs: int | None = option(None, "what=proxy: passes over the data in each trial; null: 6")
    rows: int | None = option(None, "what=proxy: train on this many rows, drawn once; null: all")

    def __post_init__(self) -> None:
        """Check the settings and fill in those left out.

        Raises:
            ConfigError: Naming the setting and the remedy.
        """
        if not self.output:
            raise ConfigError("tuning needs a folder to write to: output=DIR")
        for name in ("n_trials", "minutes", "queries", "samples", "epochs", "rows"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be > 0, got {value}")
        if self.seed < 0:
            raise ConfigError(f"seed must be >= 0, got {self.seed}")
        others = ("data", "epochs", "rows") if self.what == "sampler" else ("queries", "samples")
        for name in others:
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} does nothing with what={self.what}; drop it")
        if self.what == "proxy":
            if self.data is None:
                raise ConfigError("what=proxy needs data=FILE.csv with labels, see python -m discover.fetch")
            object.__setattr__(self, "epochs", self.epochs or DEFAULT_EPOCHS)
        else:
            object.__setattr__(self, "queries", self.queries or DEFAULT_QUERIES)
            object.__setattr__(self, "samples", self.samples or DEFAULT_SAMPLES)


def tune(config: TuneConfig, fixed: Sequence[str] = ()) -> dict[str, Any]:
    """Run or continue a study and return its figures; `trials.csv` and `best.yaml` are rewritten after each trial.

    Args:
        config: The study.
        fixed: ``key=value`` settings that all trials share, of `RunConfig` or `ProxyTraining`.

    Raises:
        ConfigError: If a setting makes no sense, or all trials failed.
        RunFolderError: If the folder holds something else, or a study with other settings.
    """
    words = dict(word.split("=", 1) for word in fixed)
    base = read_base(config, fixed)
    space = sampler_space(base, words) if isinstance(base, RunConfig) else _without(PROXY_SPACE, words)
    if not space:
        raise ConfigError("every setting is given, none is left to search; drop some")
    defaults = {key: default_of(base, key) for key in space}
    shared = {name: getattr(config, name) for name in ("what", "seed", "queries", "samples", "epochs", "rows")}
    shared |= {"hash of data": _fingerprint(config.data), **words, **_meant(base)}
    shared = {key: value for key, value in shared.items() if value is not None}
    folder = _open_folder(config, fixed)
    direction: Literal["maximize", "minimize"] = "maximize" if config.what == "sampler" else "minimize"
    with open_study(folder.path, space, defaults, direction=direction, settings=shared, seed=config.seed) as study:
        folder.write(CONFIG, dump_yaml(config))  # n_trials may have grown
        tuned = SamplerObjective(config, base) if isinstance(base, RunConfig) else ProxyObjective(config, base, folder)
        _run(study, tuned, config, folder, fixed)
        return _figures(study, config, fixed)


def _meant(base: RunConfig | ProxyTraining) -> dict[str, Any]:
    """Return what words leave to defaults that have changed between versions: trials of both do not compare."""
    if isinstance(base, RunConfig) and "stability" in (term.name for term in base.terms):
        return {"hull_limit": base.hull_limit_value(), "novelty_gate": base.novelty_gate}
    return {}


def read_base(config: TuneConfig, fixed: Sequence[str]) -> RunConfig | ProxyTraining:
    """Return the settings that trials start from.

    Raises:
        ConfigError: For a setting that is unknown or would do nothing.
        RewardError: If a user's function cannot be imported.
    """
    for key in (word.partition("=")[0] for word in fixed):
        if key in _REFUSED:
            raise ConfigError(f"{key} cannot be given to discover.tune: {_REFUSED[key]}")
    if config.what == "sampler":
        run = parse_args(RunConfig, [*fixed, f"seed={config.seed}"])
        for term in run.terms:
            if term.is_callable:
                import_function(term.name)  # fails now, not after everything else is built
        return run
    return parse_args(ProxyTraining, [*fixed, f"seed={config.seed}", f"epochs={config.epochs}", "n_members=1"])


def sampler_space(config: RunConfig, given: Mapping[str, str]) -> Space:
    """Return what is searched for a run: what applies to it and was not given."""
    targets = config.targets()
    unused = set()
    if not config.has_prior:
        unused |= {"alpha", "train.data_fraction"}
    if len({config.tolerance_of(target) for target in targets.values()}) != 1:  # none, or not one for all
        unused.add("tolerance")
    if len(config.beta_takers()) != 1:  # none, or two with defaults of their own
        unused.add("beta")
    return _without(SAMPLER_SPACE, given.keys() | unused)


def with_settings(config: ConfigT, settings: Mapping[str, Any]) -> ConfigT:
    """Return `config` with dotted settings changed, all at once, checked as always."""
    changes = {key: value for key, value in settings.items() if "." not in key}
    for name in {key.partition(".")[0] for key in settings.keys() - changes.keys()}:
        inner = {key.removeprefix(f"{name}."): settings[key] for key in settings if key.startswith(f"{name}.")}
        changes[name] = replace(getattr(config, name), **inner)
    return replace(config, **changes)


# --- sampler ---------------------------------------------------------------------------------------


class SamplerObjective:
    """Trains a sampler for a number of reward queries and returns the share of distinct hits in fresh samples.

    Trials share everything that is not searched: starting weights, the prior's samples, the random numbers of training
    and sampling. A second sample, on which no choice is made, says how lucky the first one was.

    Args:
        config: The study.
        base: The run.
    """

    def __init__(self, config: TuneConfig, base: RunConfig) -> None:
        self.base, self.queries, self.samples = base, config.queries or 0, config.samples or 0
        self.parts = build_parts(base)
        pool = min(_POOL, self.queries)
        self.data = prior_samples(base, self.parts, pool)
        reference = (
            self.data if self.data is not None else _draw(self.parts, self.parts.policy, pool, base.seed, "pool")
        )
        self.rule = HitRule(base, self.parts.properties, reference)

    def __call__(self, trial: optuna.Trial, settings: Settings) -> Outcome:
        """Run one trial."""
        config = with_settings(self.base, settings)
        config = replace(config, train=replace(config.train, n_steps=n_steps(config.train, self.queries, self.data)))
        policy = start_policy(config, self.parts.env, self.parts.prior)
        reward = build_reward(config, self.parts.properties)
        target = replace(self.parts.target, reward=reward, alpha=config.alpha_value)
        data = self.data if config.train.data_fraction > 0 else None
        trainer = Trainer(self.parts.env, policy, target, config.train, data=data, loss=config.loss, seed=config.seed)
        for step, share in enumerate((*_REPORTS, 1.0)):
            while trainer.progress() < share:
                trainer.train_step()
            if share < 1.0:
                trial.report(self.hit_share(trainer, "tune judge"), step)
                if trial.should_prune():
                    raise optuna.TrialPruned
        objective = self.hit_share(trainer, "tune judge")
        facts = {
            "objective_again": self.hit_share(trainer, "tune again"),
            "standard_error": math.sqrt(objective * (1.0 - objective) / self.samples),
            "queries": float(trainer.n_queries),
            "steps": float(trainer.step),
        }
        return Outcome(objective, facts)

    def hit_share(self, trainer: Trainer, purpose: str) -> float:
        """Return distinct hits per crystal drawn with the averaged weights; nothing drawn is left out."""
        with trainer.ema.swapped_in():
            crystals = _draw(self.parts, trainer.policy, self.samples, self.base.seed, purpose)
        return self.rule.n_distinct_hits(crystals) / len(crystals)


class HitRule:
    """Which crystals count as found; fixed for a study, so that no setting of a trial moves it.

    On target is: within `NEAR_TARGET` of a target or inside a window; for a reward without a target, as good as the
    best tenth of the reference, which is the untrained prior under the same restrictions. Rewards `stability` and
    `oxidation_score` are what the two further conditions ask.

    Args:
        config: The run.
        properties: Predicts every column of the table.
        reference: Crystals to compare with.
    """

    def __init__(self, config: RunConfig, properties: Properties, reference: CrystalBatch) -> None:
        self._properties = properties
        self._ionic = config.chemistry == "ionic"
        self._bounds: dict[Column, tuple[float, float]] = {}
        names = [term.name for term in config.terms if term.is_callable]
        self._factors = [UserFactor(name, import_function(name)) for name in names]
        table = self._table(reference)
        targets = config.targets()
        for name, target in targets.items():
            near = NEAR_TARGET[name]
            column = Column.DENSITY if name == "density" else Column.BAND_GAP
            if name == "bandgap" and config.gap_scale == "experiment":
                column = Column.BAND_GAP_EXPERIMENT
            self._bounds[column] = target if isinstance(target, tuple) else (target - near, target + near)
        open_ended = {term.name for term in config.terms} - targets.keys()
        if "formation_energy" in open_ended:
            self._bounds[Column.FORMATION_ENERGY] = (
                -math.inf,
                float(table[Column.FORMATION_ENERGY].quantile(TOP_SHARE)),
            )
        if "density" in open_ended:
            self._bounds[Column.DENSITY] = (float(table[Column.DENSITY].quantile(1.0 - TOP_SHARE)), math.inf)
        self._least = [float(factor.log_value(reference, {}).quantile(1.0 - TOP_SHARE)) for factor in self._factors]

    def n_distinct_hits(self, crystals: CrystalBatch) -> int:
        """Return the number of different reduced formulas among the hits."""
        return len({formula for formula, hit in zip(crystals.formulas(), self.hits(crystals), strict=True) if hit})

    def hits(self, crystals: CrystalBatch) -> NDArray[np.bool_]:
        """Return (n,) which crystals are hits."""
        table = self._table(crystals)
        hits: NDArray[np.bool_] = (table[Column.P_METASTABLE] >= LEAST_P_METASTABLE).to_numpy(copy=True)
        if self._ionic:
            hits &= (table[Column.OXIDATION_SCORE] >= LEAST_OXIDATION_SCORE).to_numpy()
        for column, (low, high) in self._bounds.items():
            hits &= table[column].between(low, high).to_numpy()
        for factor, least in zip(self._factors, self._least, strict=True):
            hits &= (factor.log_value(crystals, {}) >= least).numpy()
        return hits

    def _table(self, crystals: CrystalBatch) -> pd.DataFrame:
        equal = torch.zeros(len(crystals), dtype=torch.float64)  # in place of the reward, so that the order is kept
        return candidate_table(crystals, self._properties.predict(crystals), equal, equal, distinct=False)[0]


def n_steps(train: TrainingConfig, queries: int, data: CrystalBatch | None) -> int:
    """Return the gradient steps that make up `queries` new crystals; replayed ones and data are not scored again.

    Raises:
        ConfigError: If replay and data leave nothing of a batch to the policy.
    """
    n_data = round(train.data_fraction * train.batch_size) if data is not None else 0
    n_own = train.batch_size - n_data - round(train.replay_fraction * train.batch_size)
    if n_own < 1:
        raise ConfigError(
            f"train.replay_fraction={train.replay_fraction} and train.data_fraction={train.data_fraction} leave no new "
            f"crystals in a batch of {train.batch_size}; lower one of them"
        )
    return math.ceil(queries / n_own)


def _draw(parts: Parts, policy: CrystalPolicy, n: int, seed: int, purpose: str) -> CrystalBatch:
    return CrystalBatch.cat([batch for batch, _ in draw_crystals(parts.env, policy, n, seeded(seed, purpose))])


# --- proxy -----------------------------------------------------------------------------------------


class ProxyObjective:
    """Trains one member for a few epochs and returns its relative error on the held-out rows of the training itself.

    Args:
        config: The study.
        base: Settings of the training.
        folder: Receives the member of the trial in progress.
    """

    def __init__(self, config: TuneConfig, base: ProxyTraining, folder: RunFolder) -> None:
        if config.data is None:
            raise ConfigError("what=proxy needs data=FILE.csv with labels, see python -m discover.fetch")
        self.base, self.scratch = base, folder / "trial"
        prepared = prepare(config.data)
        data = split(prepared, base)
        if config.rows is not None and config.rows < len(data.train_rows):
            order = torch.randperm(len(data.train_rows), generator=seeded(base.seed, "tune rows"))
            data = replace(data, train_rows=data.train_rows[order[: config.rows]])
        self.data, self.crystals = data, data.crystals.select(data.held_out_rows)
        self.labels: dict[str, torch.Tensor] = {}
        self.constant_mae: dict[str, float] = {}
        for name in LABELS:
            labels, known = prepared.labels[name][data.held_out_rows], prepared.labels[name][data.train_rows]
            error = float((labels - known.nanmedian()).abs().nanmean())
            if math.isfinite(error) and error > 0:
                self.labels[name], self.constant_mae[name] = labels, error
        if not self.labels:
            raise DataError(f"{config.data} has no label that varies over the held-out rows; give a larger file")

    def __call__(self, trial: optuna.Trial, settings: Settings) -> Outcome:
        """Run one trial."""
        del trial  # the learning rate falls to the end of each training, so that halfway figures do not compare
        training = with_settings(self.base, settings)
        shutil.rmtree(self.scratch, ignore_errors=True)  # of a trial that was killed
        self.scratch.mkdir()
        try:
            network = train_member(self.data, training, 0, self.scratch, progress=False)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
        predictions = PropertyEnsemble([network], Calibration.none()).predict_all(self.crystals)
        facts: dict[str, float] = {}
        for name, labels in self.labels.items():
            prediction = predictions[name]
            value = median_gap(prediction) if name == "band_gap" else prediction.mean
            facts[f"{name}_mae"] = float((value - labels).abs().nanmean())
        ratios = [facts[f"{name}_mae"] / error for name, error in self.constant_mae.items()]
        facts["parameters"] = float(sum(parameter.numel() for parameter in network.parameters()))
        return Outcome(sum(ratios) / len(ratios), facts)


# --- folder, table, figures ------------------------------------------------------------------------


def _open_folder(config: TuneConfig, fixed: Sequence[str]) -> RunFolder:
    path = Path(config.output)
    check_study_file(path / FILE)
    if (path / CONFIG).exists():
        folder = open_run_folder(path)
        folder.config(TuneConfig)  # raises if the folder is that of another command
        return folder
    words = [*_words(config), *fixed]
    return create_run_folder(config, name=f"tune-{config.what}", output=config.output, argv=words)


def _run(
    study: Study,
    evaluate: SamplerObjective | ProxyObjective,
    config: TuneConfig,
    folder: RunFolder,
    fixed: Sequence[str],
) -> None:
    """Run the trials with a bar, and write what is known after each."""
    folder.mend()
    done = min(study.n_finished, config.n_trials)
    with tqdm(
        total=config.n_trials, initial=done, desc=f"tuning {config.what}", unit="trial", disable=None, file=sys.stderr
    ) as bar:

        def on_trial(record: TrialRecord) -> None:
            bar.update(1)
            folder.log(
                "trial", number=record.number, state=record.state, objective=record.objective, reason=record.reason
            )
            _write(study, config, folder, fixed)

        try:
            study.run(evaluate, n_trials=config.n_trials, minutes=config.minutes, on_trial=on_trial)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"Trials that ended are in {folder.path}; the same command continues it.") from None
    _write(study, config, folder, fixed)


def trial_table(records: Sequence[TrialRecord]) -> pd.DataFrame:
    """Return one row a trial: number, state, objective, figures, seconds, reason of a failure, settings."""
    facts = list(dict.fromkeys(name for record in records for name in record.facts))
    return pd.DataFrame(
        [
            {"trial": record.number, "state": record.state, "objective": record.objective}
            | {name: record.facts.get(name) for name in facts}
            | {"seconds": record.seconds, "reason": record.reason}
            | record.settings
            for record in records
        ]
    )


def _write(study: Study, config: TuneConfig, folder: RunFolder, fixed: Sequence[str]) -> None:
    write_atomic(folder / TRIALS, trial_table(study.records).to_csv(index=False))
    best = study.best
    if best is None:
        return
    content = {
        "objective": OBJECTIVES[config.what],
        "value": best.objective,
        "trial": best.number,
        "settings": best.settings,
        "fixed": list(fixed),
        **_how_to_use(config, fixed, best),
    }
    write_atomic(folder / BEST, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000))


def _how_to_use(config: TuneConfig, fixed: Sequence[str], best: TrialRecord) -> dict[str, str]:
    """Return the command, and for proxies the Python call, that trains with the settings found."""
    settings = best.settings
    if config.what == "sampler":
        words = [*fixed, *(f"{key}={value}" for key, value in settings.items())]
        words += [f"train.n_steps={best.facts['steps']:.0f}", f"seed={config.seed}"]  # what the trial was
        return {"command": shlex.join(["python", "-m", "discover.run", *words])}
    everything = {**dict(word.split("=", 1) for word in fixed), **settings}
    known = all_keys(TrainConfig)[0]
    names = {key: "lr" if key == "learning_rate" else key for key in everything}
    words = [f"{names[key]}={value}" for key, value in everything.items() if names[key] in known]
    call = f"parse_args(ProxyTraining, {[f'{key}={value}' for key, value in everything.items()]})"
    return {
        "command": shlex.join(
            ["python", "-m", "discover.train", "what=proxy", f"data={config.data}", "output=DIR", *words]
        ),
        "not_in_command": ", ".join(key for key in everything if names[key] not in known),
        "python": f"train_proxy({config.data!r}, 'DIR', settings={call})",
    }


def _figures(study: Study, config: TuneConfig, fixed: Sequence[str]) -> dict[str, Any]:
    records, best = study.records, study.best
    if best is None and records:
        raise ConfigError(
            f"none of {len(records)} trials was completed; the first one: {records[0].reason or records[0].state}. "
            f"All are listed in {Path(config.output) / TRIALS}"
        )
    defaults = next((record for record in records if record.counts), None)
    return {
        "what": config.what,
        "objective": OBJECTIVES[config.what],
        "n_trials": sum(record.counts for record in records),
        **{
            f"n_{state}": sum(record.counts and record.state == state for record in records)
            for state in ("complete", "pruned", "failed")
        },
        "n_interrupted": sum(not record.counts for record in records),
        "defaults": _summary(defaults),
        "best": _summary(best),
        "fixed": list(fixed),
    }


def _summary(record: TrialRecord | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {"trial": record.number, "objective": record.objective, **record.facts, "settings": record.settings}


def print_figures(figures: Mapping[str, Any], folder: Path) -> None:
    """Print the best trials and the one with the defaults, where the files are, and one line of JSON."""
    table = pd.read_csv(folder / TRIALS)
    table = table[table["state"] == "complete"].drop(columns=["state", "reason"])
    table = table.sort_values("objective", ascending=figures["what"] == "proxy", kind="stable")
    shown = table.head(_SHOWN)
    if figures["defaults"] is not None and figures["defaults"]["trial"] not in set(shown["trial"]):
        shown = pd.concat([shown, table[table["trial"] == figures["defaults"]["trial"]]])
    print(f"objective: {figures['objective']}")
    print(shown.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(
        f"{figures['n_trials']} trials: {figures['n_complete']} complete, {figures['n_pruned']} stopped early, "
        f"{figures['n_failed']} failed; the first one has the defaults"
    )
    if figures["what"] == "sampler" and figures["best"]["objective"] == 0:
        print("no trial found a hit: raise queries, or ask for less")
    print(f"all trials in {folder / TRIALS}, the best settings in {folder / BEST}")
    print(json.dumps(figures))


def split_words(words: Sequence[str]) -> tuple[TuneConfig, list[str]]:
    """Return the study that a command line describes, and its words that are settings of the training.

    Raises:
        ConfigError: For a word without "=", an unknown key, or a value that is refused.
    """
    own = set(all_keys(TuneConfig)[0])
    config = parse_args(TuneConfig, [word for word in words if word.partition("=")[0] in own or "=" not in word])
    base = all_keys(RunConfig if config.what == "sampler" else ProxyTraining)
    known = own.union(*base)
    fixed = [word for word in words if word.partition("=")[0] not in own]
    for key in (word.partition("=")[0] for word in fixed):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else "--help lists the settings."
            raise ConfigError(f"unknown setting {key} for what={config.what}. {hint}")
    return config, fixed


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        searched = [f"  what={what}: {', '.join(space)}" for what, space in _SPACES.items()]
        stated = [f"  what={what}: {text}" for what, text in OBJECTIVES.items()]
        print(help_text(TuneConfig, "\n".join([USAGE, *searched, "Objective:", *stated])))
        return
    config, fixed = split_words(words)
    print_figures(tune(config, fixed), Path(config.output))


_SPACES = {"sampler": SAMPLER_SPACE, "proxy": PROXY_SPACE}


def _without(space: Space, keys: Any) -> Space:
    return {key: distribution for key, distribution in space.items() if key not in keys}


def default_of(config: RunConfig | ProxyTraining, key: str) -> Any:
    """Return the value of a dotted setting; what a reward fills in by itself is filled in."""
    if isinstance(config, RunConfig):
        if key == "tolerance":
            return config.tolerance_of(next(iter(config.targets().values())))
        if key == "beta":
            return config.beta_of(config.beta_takers()[0])
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _fingerprint(path: str | None) -> str | None:
    """Return a hash of a data file, so that a study is not continued on other data."""
    if path is None:
        return None
    if not Path(path).exists():
        raise DataError(f"no data at {path}; give a CSV, a folder of CIF files or an extxyz file, with labels")
    digest = hashlib.sha256()
    for file in data_files(Path(path)):
        if Path(path).is_dir():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())  # the names are ids
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _words(config: TuneConfig) -> list[str]:
    values = {name: getattr(config, name) for name in all_keys(TuneConfig)[0]}
    return [f"{name}={value}" for name, value in values.items() if value is not None]


if __name__ == "__main__":
    main_guard(main)
