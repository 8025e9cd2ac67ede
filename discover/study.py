"""An Optuna study in one SQLite file: resumed by opening it again, and every trial counts, the failed ones too.

Trials are proposed by a tree-structured Parzen estimator (Bergstra et al. 2011) whose seed depends on how many trials
are finished, so that a killed study, continued, proposes what it would have proposed. The first trial is the
defaults, so that every study says what tuning gained over them.
"""

import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from discover.errors import RunFolderError
from discover.run_folder import locked

FILE = "study.db"
_NAME = "crystal-discover"
_SETTINGS, _REASON, _SECONDS, _FACTS = "settings", "reason", "seconds", "facts"
_INTERRUPTED = "interrupted: the process ended before the trial did"
_PRUNER_STARTUP = 5  # finished trials before one is stopped for being below the median
_STORAGE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)
_DIGITS = 4  # significant digits of a proposed number, so that what is tried is what is printed

Space = Mapping[str, BaseDistribution]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a trial found: its objective, and figures that are kept beside it."""

    objective: float
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialRecord:
    """A trial that is over."""

    number: int
    state: Literal["complete", "pruned", "failed"]
    objective: float | None  # of a pruned trial the last figure before it was stopped
    settings: Settings
    facts: dict[str, float]
    seconds: float | None
    reason: str  # why it failed, else ""

    @property
    def counts(self) -> bool:
        """Whether it is one of the trials asked for; one that was interrupted from outside is done again."""
        return self.reason != _INTERRUPTED


Objective = Callable[[optuna.Trial, Settings], Outcome]


class Study:
    """A study that is open; `open_study` returns one.

    Args:
        study: What Optuna keeps.
        space: What is searched, by setting.
        defaults: The first trial, one value per setting of `space`.
        seed: Of the proposals.
    """

    def __init__(self, study: optuna.Study, space: Space, defaults: Settings, seed: int) -> None:
        self._study, self._space, self._defaults, self._seed = study, space, defaults, seed

    @property
    def records(self) -> list[TrialRecord]:
        """Every trial that is over, in order."""
        return [_record(trial) for trial in self._study.trials if trial.state.is_finished()]

    @property
    def n_finished(self) -> int:
        """Number of trials that are over and count: complete, pruned or failed, but not interrupted."""
        return sum(record.counts for record in self.records)

    @property
    def best(self) -> TrialRecord | None:
        """The complete trial with the best objective, the earliest of equals; None without one."""
        complete = [record for record in self.records if record.state == "complete"]
        sign = -1.0 if self._study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
        return min(complete, key=lambda record: sign * (record.objective or 0.0), default=None)

    def run(
        self,
        evaluate: Objective,
        *,
        n_trials: int,
        minutes: float | None = None,
        on_trial: Callable[[TrialRecord], None],
    ) -> None:
        """Run trials until `n_trials` count, over all resumptions; a trial that raises is recorded as failed.

        Args:
            evaluate: Takes Optuna's trial (for intermediate reports) and the settings to try.
            n_trials: Trials in the study at the end.
            minutes: After the first, no trial starts later than this after the call.
            on_trial: Called after each trial with its record.
        """
        started = time.monotonic()
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)  # left behind by a killed process
        while (index := self.n_finished) < n_trials:
            on_trial(self._run_one(evaluate, index))
            if minutes is not None and time.monotonic() - started > 60.0 * minutes:
                break

    def _run_one(self, evaluate: Objective, index: int) -> TrialRecord:
        if index == 0 and not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self._study.enqueue_trial(self._defaults)
        self._study.sampler = optuna.samplers.TPESampler(seed=100_003 * self._seed + index)
        trial = self._study.ask(dict(self._space))
        started = time.perf_counter()
        state, objective = TrialState.COMPLETE, None
        try:
            outcome = evaluate(trial, rounded(self._space, trial.params))
            if not math.isfinite(outcome.objective):
                raise ValueError(f"the objective is {outcome.objective}")  # noqa: TRY301 - recorded as the others are
            objective = outcome.objective
            trial.set_user_attr(_FACTS, outcome.facts)
        except optuna.TrialPruned:
            state = TrialState.PRUNED
        except _STORAGE_ERRORS:
            raise  # the study's own file cannot be written, so there is nowhere to record it
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in a trial is its result
            state = TrialState.FAIL
            trial.set_user_attr(_REASON, f"{type(error).__name__}: {error}")
        trial.set_user_attr(_SECONDS, round(time.perf_counter() - started, 2))
        return _record(self._study.tell(trial, objective, state))


@contextmanager
def open_study(
    folder: Path,
    space: Space,
    defaults: Settings,
    *,
    direction: Literal["maximize", "minimize"],
    settings: Mapping[str, Any],
    seed: int = 0,
) -> Iterator[Study]:
    """Give the study of a folder, new or continued, to the ``with`` block; no other process may have it open.

    Args:
        folder: Holds the study's file.
        space: What is searched, by setting.
        defaults: The first trial.
        direction: Of the objective.
        settings: Everything that makes trials comparable; once there are trials, a study continues under equal ones
            only.
        seed: Of the proposals.

    Raises:
        RunFolderError: If the file is no study, one with other settings, in use, or cannot be read or written.
    """
    path = folder / FILE
    check_study_file(path)
    with locked(folder):
        try:
            study = _open(path, direction)
            _check_settings(study, settings, folder)
            yield Study(study, space, defaults, seed)
        except _STORAGE_ERRORS as error:
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise RunFolderError(
                f"cannot use {path}: {reason}. Free some space or allow writing there, then give the same command again"
            ) from error


def check_study_file(path: Path) -> None:
    """Check that a path is free or holds a study of this project; nothing is changed.

    Raises:
        RunFolderError: If it is anything else.
    """
    if not path.exists():
        return
    remedy = "move it away or choose another output=DIR"
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=rw", uri=True)) as connection:
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            whole = connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok"
            ours = not tables or (
                "studies" in tables
                and {row[0] for row in connection.execute("SELECT study_name FROM studies")} <= {_NAME}
            )
    except sqlite3.Error as error:
        raise RunFolderError(f"{path} is not the file of a tuning study ({error}); {remedy}") from error
    if not whole:
        raise RunFolderError(f"{path} is damaged; {remedy}")
    if not ours:
        raise RunFolderError(f"{path} is a database of something else; {remedy}")


def rounded(space: Space, params: Mapping[str, Any]) -> Settings:
    """Return proposed settings with `_DIGITS` significant digits, in the order of the space."""
    return {
        key: float(f"{params[key]:.{_DIGITS}g}") if isinstance(space[key], FloatDistribution) else params[key]
        for key in space
        if key in params
    }


def _open(path: Path, direction: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    except RuntimeError as error:  # Optuna's word for the tables of another release
        raise RunFolderError(
            f"{path} was written by another release of Optuna ({error}); use that one or choose another output=DIR"
        ) from error
    return optuna.create_study(
        storage=storage,
        study_name=_NAME,
        load_if_exists=True,
        direction=direction,  # type: ignore[arg-type]
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_PRUNER_STARTUP),
    )


def _check_settings(study: optuna.Study, settings: Mapping[str, Any], folder: Path) -> None:
    given = json.loads(json.dumps(settings))
    if not study.get_trials(deepcopy=False):
        study.set_user_attr(_SETTINGS, given)
        return
    stored = study.user_attrs[_SETTINGS]
    for key in [*stored, *given]:
        if stored.get(key) != given.get(key):
            raise RunFolderError(
                f"{folder} holds a study with {_assignment(key, stored)}, not {_assignment(key, given)}; "
                "give the same settings to continue it, or another output=DIR"
            )


def _assignment(key: str, settings: Mapping[str, Any]) -> str:
    return f"{key}={settings[key]}" if key in settings else f"{key} left out"


def _record(trial: FrozenTrial) -> TrialRecord:
    state: Literal["complete", "pruned", "failed"] = "failed"
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
        state = "complete" if trial.state == TrialState.COMPLETE else "pruned"
    return TrialRecord(
        number=trial.number,
        state=state,
        objective=None if state == "failed" else trial.value,
        settings=rounded(trial.distributions, trial.params),
        facts=trial.user_attrs.get(_FACTS, {}),
        seconds=trial.user_attrs.get(_SECONDS),
        reason=trial.user_attrs.get(_REASON, _INTERRUPTED) if state == "failed" else "",
    )
