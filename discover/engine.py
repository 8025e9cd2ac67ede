"""Where labels are computed: killable workers on this machine, or Parsl's on a cluster.

Both go through `concurrent.futures.Executor`: threads here that each own a killable child process, or
`parsl.concurrent.ParslPoolExecutor`, whose workers own one likewise (`discover.guarded_worker`). A structure that
hangs, crashes, raises or takes too much memory gets a failed label with the reason and costs nothing else. A worker
that is lost takes its structure along, which is tried again elsewhere.
"""

import atexit
import importlib.util
import math
import os
import runpy
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import LifoQueue, SimpleQueue
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from pymatgen.core import Structure

from discover.guarded_worker import (
    EngineError,
    GuardedWorker,
    Limits,
    Lost,
    NotStarted,
    describe,
    failed,
    label_here,
)
from discover.oracle.base import Label, Oracle

__all__ = ["Engine", "EngineError", "Limits", "Task", "default_workers", "open_engine"]

Labels = Generator[tuple[str, Label]]  # may be closed early
MEMORY_PER_WORKER = 2 * 2**30  # bytes; CHGNet takes 0.5 GiB, a callable oracle may take more
_WORKER_LOST = ("ManagerLost", "WorkerLost")  # Parsl's exceptions
_NO_PARSL = "engine.name=parsl needs Parsl: pip install 'crystal-discover[parsl]'"


@dataclass(frozen=True)
class Task:
    """A structure to label, under the name that its label comes back with."""

    name: str
    structure: Structure


class Engine(Protocol):
    """Labels structures somewhere; a context manager, whose end releases the workers."""

    @property
    def n_workers(self) -> int:
        """How many structures are labelled at a time; 0: one, in this process."""

    def label(self, oracle: Oracle, tasks: Sequence[Task], limits: Limits) -> Labels:
        """Yield name and label of each task as it is finished, in any order.

        Whatever becomes of a task is its label. What is not yet finished when the iterator is closed is given up.

        Raises:
            EngineError: If the oracle cannot start, or no worker can be had. Labels yielded before are good.
        """

    def __enter__(self) -> Self:
        """Return the engine itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the workers, without waiting for what they do."""


def open_engine(name: Literal["local", "parsl"], *, n_workers: int | None, config_file: Path | None) -> Engine:
    """Return an engine, ready for its `with`.

    Args:
        name: "local" or "parsl".
        n_workers: Of the local engine; None: `default_workers`; 0: in this process, without limits. Parsl's workers
            are a matter of its config, so None.
        config_file: Of Parsl: a Python file that defines `config`. It is executed, so it must be trusted.

    Raises:
        EngineError: If the settings do not belong together, the file defines no config, or Parsl is not installed.
    """
    if name == "local":
        if config_file is not None:
            raise EngineError(f"engine.name=local takes no config file; use engine.name=parsl for {config_file}")
        return LocalEngine(default_workers() if n_workers is None else n_workers)
    if name == "parsl":
        if config_file is None:
            raise EngineError("engine.name=parsl needs engine.config=FILE, a Python file that defines `config`")
        if n_workers is not None:
            raise EngineError("engine.name=parsl takes its number of workers from the config file; leave n_workers out")
        return ParslEngine(config_file)
    raise EngineError(f"unknown engine {name!r}; there are local and parsl")


def default_workers() -> int:
    """Return how many workers this machine's free cores and memory allow, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    memory = _available_memory()
    return max(1, cores if memory is None else min(cores, memory // MEMORY_PER_WORKER))


def _available_memory() -> int | None:
    """Return free memory in bytes, within the limit of a control group (a container, a batch job); None if unknown."""
    free: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        free += [] if limit == "max" else [int(limit)]
    except (OSError, ValueError):
        pass  # no Linux, or no limit that can be read
    return min(free, default=None)


class LocalEngine:
    """Killable child processes on this machine, each owned by one thread.

    Args:
        n_workers: Children; 0 labels in this process, where neither time nor memory is limited.

    Raises:
        EngineError: If `n_workers` is negative.
    """

    def __init__(self, n_workers: int) -> None:
        if n_workers < 0:
            raise EngineError(f"n_workers must be at least 0, got {n_workers}")
        self.n_workers = n_workers
        self._threads = ThreadPoolExecutor(max(1, n_workers), thread_name_prefix="label")
        self._all = [GuardedWorker() for _ in range(n_workers)]
        self._idle: LifoQueue[GuardedWorker] = LifoQueue()
        for worker in self._all:
            self._idle.put(worker)
        self._closed = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._all:
            worker.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the children that there are now."""
        return [worker.pid for worker in self._all if worker.pid is not None]

    def label(self, oracle: Oracle, tasks: Sequence[Task], limits: Limits) -> Labels:
        """Yield name and label of each task as it is finished (`Engine.label`)."""
        if self.n_workers == 0:
            yield from _label_in_this_process(oracle, tasks)
            return
        given_up = threading.Event()

        def submit(task: Task) -> Future[Label | Lost | NotStarted]:
            return self._threads.submit(self._label_one, oracle, task.structure, limits, given_up)

        try:
            yield from _as_labelled(submit, oracle.name, tasks, limits.retries)
        finally:
            given_up.set()

    def _label_one(
        self, oracle: Oracle, structure: Structure, limits: Limits, given_up: threading.Event
    ) -> Label | Lost | NotStarted:
        if given_up.is_set():
            return Lost("cancelled")
        worker = self._idle.get_nowait()  # there are as many as threads
        try:
            return worker.label(oracle, structure, limits, cancelled=lambda: given_up.is_set() or self._closed.is_set())
        finally:
            self._idle.put(worker)


def check_parsl(config_file: Path) -> None:
    """Fail where Parsl cannot start, without executing the config file.

    Raises:
        EngineError: If Parsl is not installed, or there is no such file.
    """
    if importlib.util.find_spec("parsl") is None:
        raise EngineError(_NO_PARSL)
    if not config_file.is_file():
        raise EngineError(f"no Parsl config file at {config_file}")


class ParslEngine:
    """Parsl's workers, wherever the user's config file starts them.

    Args:
        config_file: A Python file that defines `config`, a `parsl.config.Config`.

    Raises:
        EngineError: If Parsl is not installed or does not start, or the file defines no config.
    """

    def __init__(self, config_file: Path) -> None:
        check_parsl(config_file)
        try:
            from parsl.concurrent import ParslPoolExecutor  # noqa: PLC0415 - an optional extra
            from parsl.config import Config  # noqa: PLC0415
            from parsl.dataflow.dflow import DataFlowKernel  # noqa: PLC0415
        except ImportError as error:  # another version, or a part of it is missing
            raise EngineError(f"{_NO_PARSL} ({error})") from None
        config = runpy.run_path(str(config_file)).get("config")
        if not isinstance(config, Config):
            raise EngineError(f"{config_file} must define `config`, a parsl.config.Config; docs/engines has examples")
        self.n_workers = _parsl_workers(config)
        programs = str(Path(sys.executable).parent)  # Parsl looks for its own there, also if that is not activated
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
        try:
            self._kernel = DataFlowKernel(config)
        except Exception as error:
            raise EngineError(f"Parsl cannot start with {config_file}: {describe(error)}") from error
        self._executor: Executor = ParslPoolExecutor(dfk=self._kernel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=False)
        self._kernel.cleanup()

    def label(self, oracle: Oracle, tasks: Sequence[Task], limits: Limits) -> Labels:
        """Yield name and label of each task as it is finished (`Engine.label`)."""

        def submit(task: Task) -> Future[Label | Lost | NotStarted]:
            return self._executor.submit(label_on_worker, oracle, task.structure, limits)

        yield from _as_labelled(submit, oracle.name, tasks, limits.retries)


def label_on_worker(oracle: Oracle, structure: Structure, limits: Limits) -> Label | Lost | NotStarted:
    """Label one structure in this worker's killable child, which stays for the next one."""
    return _child_of_this_worker().label(oracle, structure, limits)


@cache
def _child_of_this_worker() -> GuardedWorker:
    worker = GuardedWorker()
    atexit.register(worker.close)
    return worker


def _parsl_workers(config: Any) -> int:
    """Return how many workers a config allows at most, as far as it says so; at least one."""
    total = 0
    for executor in config.executors:
        per_node = getattr(executor, "max_workers_per_node", 1)
        provider = getattr(executor, "provider", None)
        nodes = 1 if provider is None else provider.max_blocks * provider.nodes_per_block
        total += int(per_node if math.isfinite(per_node) else os.cpu_count() or 1) * int(nodes)
    return max(1, total)


def _label_in_this_process(oracle: Oracle, tasks: Sequence[Task]) -> Labels:
    if tasks:
        try:
            oracle.start()
        except Exception as error:
            raise _cannot_start(oracle.name, describe(error)) from error
    for task in tasks:
        yield task.name, label_here(oracle, task.structure)


def _as_labelled(
    submit: Callable[[Task], Future[Label | Lost | NotStarted]], oracle: str, tasks: Sequence[Task], retries: int
) -> Labels:
    """Yield labels as they come; submit the task of a lost worker again, up to `retries` times.

    Raises:
        EngineError: If the oracle cannot start, or the executor takes no more work.
    """
    done: SimpleQueue[Future[Label | Lost | NotStarted]] = SimpleQueue()
    pending: dict[Future[Label | Lost | NotStarted], tuple[Task, int]] = {}

    def start(task: Task, left: int) -> None:
        future = submit(task)
        pending[future] = task, left
        future.add_done_callback(done.put)  # `concurrent.futures.wait` looks at every future each time

    try:
        for task in tasks:
            start(task, retries)
        while pending:
            future = done.get()
            task, left = pending.pop(future)
            outcome = _outcome(future)
            if isinstance(outcome, Label):
                yield task.name, outcome
            elif left > 0:
                start(task, left - 1)
            elif isinstance(outcome, NotStarted):
                raise _cannot_start(oracle, outcome.reason)
            else:
                yield task.name, failed(outcome.reason)
    finally:
        for future in pending:
            future.cancel()


def _outcome(future: Future[Label | Lost | NotStarted]) -> Label | Lost | NotStarted:
    """Return what a task came to. Our own code on a worker does not raise, so an exception is the executor's."""
    error = future.exception()
    if error is None:
        return future.result()
    kind = type(error).__name__
    return Lost(f"the worker was lost ({kind})") if kind in _WORKER_LOST else NotStarted(describe(error))


def _cannot_start(oracle: str, reason: str) -> EngineError:
    return EngineError(
        f"the oracle {oracle!r} cannot start: {reason}. Workers need the environment of this process: the same "
        "packages, and models where the settings say."
    )
