"""Errors that reach the user, and the guard that turns them into one message and an exit code.

Every error of this project is a class of its own that derives from `ValueError`, carries one message, and says the
remedy. Anything else is a bug and keeps its traceback.
"""

import errno
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from policies import errors as policy_errors

OUR_PACKAGES = frozenset({"discover", "envs", "policies", "proxies"})
EXIT_USER_ERROR = 2
EXIT_PAUSED = 3  # somebody else has to do something first
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class ConfigError(ValueError):
    """A setting that is unknown, out of range or in conflict with another one."""


class RewardError(ValueError):
    """A reward that cannot be built, or that returned something other than one finite number per crystal."""


class TrainingError(ValueError):
    """A training that has come to numbers that are none."""


class RunFolderError(ValueError):
    """A run folder that cannot be created, written, read or resumed."""


class CheckpointError(policy_errors.CheckpointError):
    """A checkpoint that is missing, truncated, foreign, or made for something else."""


class DataError(ValueError):
    """Data that cannot be used: a file, or a structure in it, which then has to be skipped."""


class RunPaused(ValueError):  # noqa: N818 - nothing went wrong: somebody else has to do something first
    """A run that waits for results from outside; the message says where and how it goes on."""


class FetchError(ValueError):
    """A public data set that could not be downloaded or is not what was expected."""


def is_ours(error: BaseException) -> bool:
    """Return whether `error` is one of this project's own errors: a `ValueError` class defined in our packages."""
    return isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in OUR_PACKAGES


def describe_os_error(error: OSError) -> str:
    """Return one sentence with the remedy for a failure of the file system."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full{where}. Free some space, then continue with resume=DIR or choose another output=DIR."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"No permission to write or read there{where}. Choose another folder with output=DIR."
    if error.errno == errno.ENOENT:
        return f"No such file or folder{where}. Check the path."
    return f"{error.strerror or error}{where}"


def main_guard(command: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command, print errors of the user's making as one message without a traceback, and exit.

    Args:
        command: Takes the command line arguments after the program's name.
        argv: Those arguments; `sys.argv[1:]` by default.

    Raises:
        SystemExit: Always. 0 after success, 2 after an error with a remedy, 3 where results from outside are awaited,
            130 after Ctrl-C.
    """
    try:
        command(sys.argv[1:] if argv is None else argv)
    except RunPaused as pause:
        print(pause, file=sys.stderr)
        sys.exit(EXIT_PAUSED)
    except KeyboardInterrupt as interrupt:
        hint = str(interrupt) or "What was written so far is complete; resume=DIR continues a run."
        print(f"\nInterrupted. {hint}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except OSError as error:
        print(f"error: {describe_os_error(error)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except ValueError as error:
        if not is_ours(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    sys.exit(0)
