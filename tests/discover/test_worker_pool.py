import os
import time

import pytest

from discover.worker_pool import TaskFailure, WorkersError, map_in_workers


def behave(task: str) -> str:
    if task == "hang":
        time.sleep(60)
    if task == "die":
        os._exit(7)
    if task == "raise":
        raise ValueError("no such crystal\nsecond line")
    return task.upper()


def test_a_task_that_hangs_dies_or_raises_costs_only_itself() -> None:
    tasks = ["a", "hang", "die", "raise", "b"]
    found = map_in_workers(behave, tasks, n_workers=2, time_limit=3.0, progress=False)
    assert [found[0], found[4]] == ["A", "B"]
    assert found[1] == TaskFailure("killed after 3 s", may_pass=True)
    assert found[2] == TaskFailure("the worker process died with exit code 7", may_pass=True)
    assert found[3] == TaskFailure("ValueError: no such crystal")


def test_without_workers_tasks_run_here() -> None:
    pids = map_in_workers(_process_id, [0, 0], n_workers=0, progress=False)
    assert pids == [os.getpid()] * 2
    assert map_in_workers(behave, ["raise"], n_workers=0, progress=False)[0].reason == "ValueError: no such crystal"
    assert map_in_workers(behave, [], n_workers=2, progress=False) == []


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="n_workers"):
        map_in_workers(behave, ["a"], n_workers=-1)


def _process_id(_: int) -> int:
    return os.getpid()


def no_start() -> None:
    raise RuntimeError("not here")


def test_workers_that_cannot_start_are_an_error_and_no_result() -> None:
    with pytest.raises(WorkersError, match="n_workers=0"):
        map_in_workers(abs, [-1, -2], n_workers=2, initializer=no_start, progress=False)
