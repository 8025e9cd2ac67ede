"""Tasks in worker processes that may hang, crash or run out of memory without harm to the others.

A task over its time limit is killed with its process, and a process that dies takes only its own task with it; a new
process takes the next one. Both come back as a `TaskFailure` with the reason. `ProcessPoolExecutor` breaks instead.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as TaskTimeoutError
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool
from tqdm import tqdm

_BROKEN = "BrokenProcessPool"  # how the pool says so, of every task
Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkersError(ValueError):
    """No worker process could start."""


@dataclass(frozen=True)
class TaskFailure:
    """A task without a result, and why.

    Args:
        reason: What happened.
        may_pass: Whether it happened to the worker, which another time may come to its end.
    """

    reason: str
    may_pass: bool = False


def map_in_workers(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    n_workers: int = 2,
    time_limit: float | None = None,
    initializer: Callable[[], Any] | None = None,
    description: str = "tasks",
    unit: str = "task",
    progress: bool = True,
) -> list[Result | TaskFailure]:
    """Return `function` of every task, in order, or the reason why there is none.

    Workers are spawned, not forked, because threads of torch do not survive a fork.

    Args:
        function: A function of a module; it and its tasks must pickle.
        tasks: Its arguments.
        n_workers: Processes; 0 runs in this process, without a time limit, which saves starting one.
        time_limit: Wall seconds per task after which its process is killed; None waits.
        initializer: Called once in each process before its first task, off the clock.
        description: Name on the progress bar.
        unit: What a task is called there.
        progress: Show the bar on stderr if that is a terminal.

    Raises:
        ValueError: If `n_workers` is negative.
        WorkersError: If no worker could start, so that no task was tried.
    """
    if n_workers < 0:
        raise ValueError(f"n_workers must be at least 0, got {n_workers}")
    bar = tqdm(total=len(tasks), desc=description, unit=f" {unit}", disable=None if progress else True)
    with bar:
        if n_workers == 0 or not tasks:
            if initializer is not None and tasks:
                initializer()
            return [_here(function, task, bar) for task in tasks]
        pool = ProcessPool(
            max_workers=min(n_workers, len(tasks)),
            context=get_context("spawn"),
            initializer=initializer or _nothing,
        )
        try:
            futures = [pool.schedule(function, args=(task,), timeout=time_limit) for task in tasks]
            for future in futures:
                future.add_done_callback(lambda _: bar.update())
            results = [_outcome(future.result, time_limit) for future in futures]
            pool.close()
        except BaseException:
            pool.stop()
            raise
        finally:
            pool.join()
    if all(isinstance(result, TaskFailure) and result.reason.startswith(_BROKEN) for result in results):
        raise WorkersError("no worker process could start; what it said is above, and n_workers=0 works without them")
    return results


def _here(function: Callable[[Task], Result], task: Task, bar: Any) -> Result | TaskFailure:
    outcome = _outcome(lambda: function(task), None)
    bar.update()
    return outcome


def _outcome(result: Callable[[], Result], time_limit: float | None) -> Result | TaskFailure:
    """Return the result, or what went wrong; an exception of one task is no reason to lose the others."""
    try:
        return result()
    except TaskTimeoutError:
        reason = f"killed after {time_limit:g} s" if time_limit is not None else "timed out"
        return TaskFailure(reason, may_pass=True)
    except ProcessExpired as error:
        return TaskFailure(f"the worker process died with exit code {error.exitcode}", may_pass=True)
    except Exception as error:  # noqa: BLE001 - libraries raise many kinds
        first_line = (str(error).splitlines() or [""])[0]
        return TaskFailure(f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__)


def _nothing() -> None:
    """Stand in for a missing initializer."""
