"""A child process that labels one structure after another, and can be killed without harm to anything else.

Time and memory limits are enforced from outside: a structure that takes too long, takes too much memory or takes its
process down costs only itself. The local engine owns one such child per worker, and a Parsl worker owns one too.

Memory is limited twice. On Linux the child's private writable memory (RLIMIT_DATA) is capped, so that an allocation
beyond the cap fails at once. The address space (RLIMIT_AS) is no measure: torch and CUDA reserve far more than they
use. In addition the parent looks at the resident memory ten times a second, and kills.

The child leads a process group of its own. The group is killed with it, so that programs that an oracle started do not
stay behind, and it ends by itself when the parent dies.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from pymatgen.core import Structure

from discover.oracle.base import Label, LabelStatus, Oracle, sound

START_LIMIT = 600.0  # s; models load in seconds, but from a cluster's cold file system in minutes
_POLL = 0.1  # s between two looks at the child's memory
_GIB = 2**30
_START_TRIES = 3  # processes; one may be killed from outside while it loads
_READY = "ready"
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class EngineError(ValueError):
    """An engine that cannot be opened, or an oracle that cannot start; no fault of a structure."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one structure may cost.

    Args:
        seconds: Wall seconds after which the worker is killed. An oracle with a softer limit of its own should have
            the lower one, so that it can still hand over what it has.
        memory_gb: Of the worker process, in GiB; None: no limit.
        retries: How often a structure is tried again whose worker was lost. An oracle's own exception is final.
    """

    seconds: float = 300.0
    memory_gb: float | None = 6.0
    retries: int = 1

    def __post_init__(self) -> None:
        """Check the limits.

        Raises:
            EngineError: Naming the limit.
        """
        if not self.seconds > 0:
            raise EngineError(f"limits.seconds must be > 0, got {self.seconds}")
        if self.memory_gb is not None and not self.memory_gb > 0:
            raise EngineError(f"limits.memory_gb must be > 0, or null for no limit, got {self.memory_gb}")
        if self.retries < 0:
            raise EngineError(f"limits.retries must be at least 0, got {self.retries}")


@dataclass(frozen=True)
class Lost:
    """A structure without a label because its worker went away, and why; it may be tried again."""

    reason: str


@dataclass(frozen=True)
class NotStarted:
    """An oracle that could not load its models, and why."""

    reason: str


def failed(reason: str, *, seconds: float = 0.0) -> Label:
    """Return the label of a structure that could not be labelled."""
    return Label(status=LabelStatus.FAILED, reason=reason, seconds=seconds)


def label_here(oracle: Oracle, structure: Structure) -> Label:
    """Return the oracle's label, or a failed one if it raises or returns something else than a label with a number."""
    start = time.process_time()
    try:
        label = sound(oracle.label(structure))
    except Exception as error:  # noqa: BLE001 - an oracle may raise anything
        return failed(describe(error), seconds=time.process_time() - start)
    return label if label.seconds else replace(label, seconds=time.process_time() - start)


def describe(error: BaseException) -> str:
    """Return kind and first line of an exception."""
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


class GuardedWorker:
    """Labels structures in a child process, which starts when first needed and again after it was killed.

    Use it from one thread at a time, and `close` it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._oracle: bytes | None = None  # what the child has started
        self._memory_gb: float | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the child, None without one."""
        return None if self._process is None else self._process.pid

    def label(
        self,
        oracle: Oracle,
        structure: Structure,
        limits: Limits,
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Label | Lost | NotStarted:
        """Return the label, a failed one if a limit was passed, or what went wrong with the worker.

        Args:
            oracle: Must pickle, and be importable in the child.
            structure: What to label.
            limits: Enforced on the child; the time to load models does not count.
            cancelled: Asked ten times a second; the child is killed once it is true.
        """
        refused = self.start(oracle, limits.memory_gb, cancelled=cancelled)
        if refused is not None:
            return refused
        try:
            question = pickle.dumps(structure)
        except Exception as error:  # noqa: BLE001 - a structure may carry anything
            return failed(describe(error))
        answer = self._ask(question, limits.seconds, limits.memory_gb, cancelled)
        if isinstance(answer, _Killed):
            return answer.lost or failed(answer.reason, seconds=answer.seconds)
        if isinstance(answer, Label) and _is_out_of_memory(answer):
            self.close()  # what is left of its memory is in pieces
            return failed(_out_of_memory(limits.memory_gb), seconds=answer.seconds)
        return answer

    def start(
        self, oracle: Oracle, memory_gb: float | None, *, cancelled: Callable[[], bool] = lambda: False
    ) -> Lost | NotStarted | None:
        """Have a child with this oracle and memory limit ready; None if it is."""
        try:
            pickled = pickle.dumps(_Start(oracle))
        except Exception as error:  # noqa: BLE001 - an oracle may hold anything
            return NotStarted(f"it cannot be sent to a worker ({describe(error)})")
        running = self._process is not None and self._process.poll() is None
        if running and pickled == self._oracle and memory_gb == self._memory_gb:
            return None
        for _ in range(_START_TRIES):
            self.close()
            self._spawn(memory_gb)
            answer = self._ask(pickled, START_LIMIT, memory_gb, cancelled)
            if answer == _READY:
                self._oracle = pickled
                return None
            self.close()
            if not isinstance(answer, _Killed):
                return answer
            if cancelled():
                return answer.lost
            if answer.lost is None:
                break  # a limit, which the next process would pass too
        return NotStarted(f"{answer.reason} while loading")

    def close(self) -> None:
        """Kill the child, if there is one, and all that it started."""
        process, connection = self._process, self._connection
        self._process = self._connection = self._oracle = None
        if process is None or connection is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()
        connection.close()

    def _spawn(self, memory_gb: float | None) -> None:
        ours, theirs = Pipe()
        paths = [path or os.getcwd() for path in sys.path]  # noqa: PTH109 - sys.path holds text
        command = [
            sys.executable,
            "-c",
            f"from discover.guarded_worker import serve; serve({theirs.fileno()}, {memory_gb!r})",
        ]
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and text
            command,
            stdin=subprocess.PIPE,  # its end tells the child that this process is gone
            stdout=2,  # what an oracle prints stays out of this command's output
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self._connection, self._memory_gb = ours, memory_gb

    def _ask(self, question: bytes, seconds: float, memory_gb: float | None, cancelled: Callable[[], bool]) -> Any:
        """Return the child's answer, or why it was killed."""
        process, connection = self._process, self._connection
        if process is None or connection is None:
            raise RuntimeError("the worker has no process")  # a mistake in this module
        start = time.monotonic()
        try:
            connection.send_bytes(question)
            while not connection.poll(min(_POLL, max(0.0, start + seconds - time.monotonic()))):
                spent = time.monotonic() - start
                if cancelled():
                    self.close()
                    return _Killed("cancelled", Lost("cancelled"), spent)
                if memory_gb is not None and resident_bytes(process.pid) > memory_gb * _GIB:
                    self.close()
                    return _Killed(_out_of_memory(memory_gb), None, spent)
                if spent >= seconds:
                    self.close()
                    return _Killed(f"killed after {seconds:g} s", None, spent)
            return pickle.loads(connection.recv_bytes())  # noqa: S301 - from our child, through our own pipe
        except (EOFError, OSError):  # the child closed its end: it is dying or dead
            exit_code = _exit_code(process)
            self.close()
            lost = Lost(f"the worker process died with exit code {exit_code}")
            return _Killed(lost.reason, lost, time.monotonic() - start)
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True)
class _Start:
    """The message before any structure."""

    oracle: Oracle


@dataclass(frozen=True)
class _Killed:
    """An answer that never came."""

    reason: str
    lost: Lost | None  # None: the structure's own fault
    seconds: float


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process, 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        return 0


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return None


def _out_of_memory(memory_gb: float | None) -> str:
    return "out of memory" if memory_gb is None else f"out of memory (limit {memory_gb:g} GB)"


def _is_out_of_memory(label: Label) -> bool:
    """Return whether an oracle gave up because an allocation failed; torch says so in a RuntimeError."""
    kinds = ("MemoryError", "_ArrayMemoryError", "OutOfMemoryError")
    return label.status is LabelStatus.FAILED and (
        label.reason.startswith(kinds) or "can't allocate memory" in label.reason or "std::bad_alloc" in label.reason
    )


def serve(descriptor: int, memory_gb: float | None) -> None:
    """Answer questions that come through a pipe until it closes; the main function of the child.

    Args:
        descriptor: File descriptor of our end of the pipe.
        memory_gb: Limit of private writable memory in GiB, None: no limit.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if memory_gb is not None:
        _limit_memory(int(memory_gb * _GIB))
    oracle: Oracle | None = None
    with Connection(descriptor) as connection:
        while True:
            try:
                question = connection.recv_bytes()
            except (EOFError, OSError):
                return
            answer: Any
            try:
                message = pickle.loads(question)  # noqa: S301 - from our parent, through our own pipe
                if isinstance(message, _Start):
                    message.oracle.start()
                    oracle, answer = message.oracle, _READY
                else:
                    answer = NotStarted("no oracle was sent") if oracle is None else label_here(oracle, message)
            except Exception as error:  # noqa: BLE001 - loading models may raise anything
                answer = NotStarted(describe(error))
            connection.send_bytes(pickle.dumps(answer))


def _end_with_parent() -> None:
    """End this process and all that it started once the parent is gone, however it went."""
    while sys.stdin.buffer.read(1):
        pass
    os.killpg(0, signal.SIGKILL)


def _limit_memory(n_bytes: int) -> None:
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = n_bytes if hard == resource.RLIM_INFINITY else min(n_bytes, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS refuses; the parent watches all the same
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
