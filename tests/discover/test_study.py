import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from discover.errors import RunFolderError
from discover.study import FILE, Outcome, Study, TrialRecord, open_study

SPACE = {"x": FloatDistribution(-4.0, 4.0), "kind": CategoricalDistribution(["a", "b"])}
DEFAULTS = {"x": 0.0, "kind": "b"}


@contextmanager
def opened(folder: Path, **settings: Any) -> Iterator[Study]:
    with open_study(folder, SPACE, DEFAULTS, direction="minimize", settings=settings) as study:
        yield study


def parabola(trial: optuna.Trial, settings: dict[str, Any]) -> Outcome:
    del trial
    return Outcome((settings["x"] - 1.0) ** 2, {"distance": abs(settings["x"] - 1.0)})


def run(folder: Path, n_trials: int, evaluate: Any = parabola) -> list[TrialRecord]:
    with opened(folder) as study:
        study.run(evaluate, n_trials=n_trials, on_trial=lambda _: None)
        return study.records


def test_the_first_trial_is_the_defaults(tmp_path: Path) -> None:
    first = run(tmp_path, 2)[0]
    assert first.settings == DEFAULTS
    assert (first.state, first.objective, first.facts) == ("complete", 1.0, {"distance": 1.0})


@pytest.mark.parametrize(("direction", "best"), [("minimize", min), ("maximize", max)])
def test_the_best_trial_is_that_of_the_direction(tmp_path: Path, direction: Any, best: Any) -> None:
    with open_study(tmp_path, SPACE, DEFAULTS, direction=direction, settings={}) as study:
        study.run(parabola, n_trials=3, on_trial=lambda _: None)
        assert study.best is not None
        assert study.best.objective == best(record.objective for record in study.records)


def test_a_study_in_parts_proposes_what_one_in_one_go_does(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole").mkdir()
    for n_trials in (1, 4, 13):
        parts = run(tmp_path / "parts", n_trials)
    whole = run(tmp_path / "whole", 13)
    assert [record.settings for record in parts] == [record.settings for record in whole]
    assert len({record.settings["x"] for record in whole}) == 13


def test_a_study_that_has_its_trials_runs_no_more(tmp_path: Path) -> None:
    assert len(run(tmp_path, 3)) == 3
    assert len(run(tmp_path, 3)) == 3


def test_failing_trials_are_recorded_and_count(tmp_path: Path) -> None:
    def fails_above_zero(trial: optuna.Trial, settings: dict[str, Any]) -> Outcome:
        if trial.number in (1, 2):
            raise RuntimeError("out of luck")
        return Outcome(float("nan")) if trial.number == 3 else parabola(trial, settings)

    records = run(tmp_path, 5, fails_above_zero)
    assert [record.state for record in records] == ["complete", "failed", "failed", "failed", "complete"]
    assert records[1].reason == "RuntimeError: out of luck"
    assert "nan" in records[3].reason
    assert records[1].objective is None


def test_an_interrupted_trial_is_done_again(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def interrupted(trial: optuna.Trial, settings: dict[str, Any]) -> Outcome:
        seen.append(settings)
        if len(seen) in (1, 4):
            raise KeyboardInterrupt
        return parabola(trial, settings)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, 4, interrupted)
    records = run(tmp_path, 4, interrupted)
    lost = [record for record in records if not record.counts]
    assert [record.number for record in lost] == [0, 3]
    assert all("interrupted" in record.reason for record in lost)
    assert seen[0] == seen[1] == DEFAULTS
    assert seen[3] == seen[4]
    assert sum(record.state == "complete" for record in records) == 4


def test_a_trial_far_below_the_median_can_be_stopped(tmp_path: Path) -> None:
    def reports(trial: optuna.Trial, settings: dict[str, Any]) -> Outcome:
        trial.report(100.0 if trial.number == 6 else 1.0, 0)
        if trial.should_prune():
            raise optuna.TrialPruned
        return parabola(trial, settings)

    records = run(tmp_path, 7, reports)
    assert [record.state for record in records] == ["complete"] * 6 + ["pruned"]
    assert records[6].objective == 100.0


def test_only_the_first_trial_starts_after_the_time_is_up(tmp_path: Path) -> None:
    with opened(tmp_path) as study:
        study.run(parabola, n_trials=5, minutes=1e-9, on_trial=lambda _: None)
        assert study.n_finished == 1


def test_a_study_is_not_continued_under_other_settings(tmp_path: Path) -> None:
    with opened(tmp_path, queries=10) as study:
        study.run(parabola, n_trials=1, on_trial=lambda _: None)
    with pytest.raises(RunFolderError, match="queries=10, not queries=20"), opened(tmp_path, queries=20):
        pass


def test_a_study_is_open_once(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(RunFolderError, match="another process"), opened(tmp_path):
        pass


def test_a_text_file_is_no_study_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("trial,objective\n" * 50)
    with pytest.raises(RunFolderError, match="not the file of a tuning study"), opened(tmp_path):
        pass
    assert (tmp_path / FILE).read_text() == "trial,objective\n" * 50


def test_a_foreign_database_is_no_study_and_stays_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        connection.execute("CREATE TABLE orders (id INTEGER)")
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(RunFolderError, match="something else"), opened(tmp_path):
        pass
    assert (tmp_path / FILE).read_bytes() == before


def test_a_truncated_study_is_named(tmp_path: Path) -> None:
    run(tmp_path, 1)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunFolderError, match=r"damaged|not the file"), opened(tmp_path):
        pass
