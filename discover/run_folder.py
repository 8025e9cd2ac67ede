"""The folder of a run: everything it writes, complete under its final name or not there at all.

A file is written under a temporary name in the same folder, flushed to disk and renamed over the final one, so that a
crash, a kill or a full disk leaves the previous version. Only the log is appended to; a line cut short by a kill is
dropped when it is read. Weights are safetensors and state is JSON: nothing is unpickled.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from discover.errors import CheckpointError, ConfigError, RunFolderError, describe_os_error
from discover.options import dump_yaml, load_yaml

ConfigT = TypeVar("ConfigT")

CONFIG = "config.yaml"
VERSIONS = "versions.json"
LOG = "log.jsonl"
_LOCK = ".lock"
CHECKPOINT = "checkpoint"
FORMAT = "crystal-discover checkpoint"
FORMAT_VERSION = 1
_PACKAGES = ("crystal-discover", "torch", "numpy", "scipy", "pymatgen", "SMACT", "pyxtal", "spglib", "scikit-learn")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that its final name never holds anything but the whole content.

    Raises:
        RunFolderError: If the folder cannot be written or the disk is full; nothing is left behind.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunFolderError(f"cannot write {path}: {describe_os_error(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class RunFolder:
    """Paths and writers of one run.

    Args:
        path: The folder; use `create_run_folder` or `open_run_folder` to get one that is checked.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        """Return the path of a file in the folder."""
        return self.path / name

    @property
    def structures(self) -> Path:
        """Folder of the CIF files, made on first use."""
        return self._subfolder("structures")

    @property
    def relaxed(self) -> Path:
        """Folder of the CIF files of relaxed structures, made on first use."""
        return self._subfolder("relaxed")

    @property
    def plots(self) -> Path:
        """Folder of the PNG files, made on first use."""
        return self._subfolder("plots")

    def write(self, name: str, content: bytes | str) -> Path:
        """Write a file of the folder, complete or not at all, and return its path."""
        write_atomic(self.path / name, content)
        return self.path / name

    def write_structure(self, candidate_id: str, cif: str) -> Path:
        """Write the CIF of a candidate and return its path."""
        write_atomic(self.structures / f"{candidate_id}.cif", cif)
        return self.structures / f"{candidate_id}.cif"

    def write_relaxed(self, candidate_id: str, cif: str) -> Path:
        """Write the CIF of a relaxed candidate and return its path."""
        write_atomic(self.relaxed / f"{candidate_id}.cif", cif)
        return self.relaxed / f"{candidate_id}.cif"

    def write_plot(self, name: str, png: bytes) -> Path:
        """Write a plot and return its path."""
        write_atomic(self.plots / name, png)
        return self.plots / name

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a mapping as indented JSON."""
        return self.write(name, json.dumps(content, indent=2, default=_plain) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Return what `write_json` wrote.

        Raises:
            RunFolderError: If the file is missing or holds something else.
        """
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RunFolderError(f"{self.path / name} cannot be read: {error}; name the folder of a run") from error
        if not isinstance(content, dict):
            raise RunFolderError(f"{self.path / name} was changed by hand; name the folder of a run")
        return content

    def log(self, event: str, **values: Any) -> None:
        """Append one event with its time and values to the log.

        Raises:
            RunFolderError: If it cannot be written.
        """
        record = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds"), "event": event, **values}
        try:
            with (self.path / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, default=_plain) + "\n")
        except OSError as error:
            raise RunFolderError(f"cannot write {self.path / LOG}: {describe_os_error(error)}") from error

    def read_log(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the logged events, those named `event` only if it is given; a line cut short by a kill is left out."""
        path = self.path / LOG
        if not path.exists():
            return []
        return [record for record in _json_lines(path) if event is None or record.get("event") == event]

    def config(self, cls: type[ConfigT]) -> ConfigT:
        """Return the configuration of the run: what it was started with, and the rounds that it was given since.

        Raises:
            RunFolderError: If it is missing or not a configuration of this version.
        """
        try:
            return load_yaml(cls, self.path / CONFIG)
        except (OSError, ConfigError) as error:
            reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
            raise RunFolderError(f"{self.path / CONFIG} is not the configuration of a run: {reason}") from error

    def write_config(self, config: Any) -> None:
        """Write the configuration of the run, complete or not at all."""
        self.write(CONFIG, dump_yaml(config))

    def save_checkpoint(self, kind: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of this run; see `save_checkpoint`."""
        save_checkpoint(self.path / CHECKPOINT, kind, tensors, state)

    def load_checkpoint(self, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read the checkpoint of this run; see `load_checkpoint`."""
        return load_checkpoint(self.path / CHECKPOINT, kind)

    @property
    def has_checkpoint(self) -> bool:
        """Whether a checkpoint was written."""
        return (self.path / f"{CHECKPOINT}.json").exists()

    def mend(self) -> None:
        """Remove what a killed run left behind: temporary files, and a last log line without its end.

        For whoever goes on with a run and has its folder `locked`: of one that is alive it would spoil files.
        """
        for temporary in self.path.rglob(".*.tmp"):
            temporary.unlink()
        log = self.path / LOG
        if log.exists() and log.stat().st_size and not log.read_bytes().endswith(b"\n"):
            with log.open("ab") as file:
                file.write(b"\n")

    def _subfolder(self, name: str) -> Path:
        folder = self.path / name
        make_folder(folder)
        return folder


def create_run_folder(config: Any, *, name: str, output: str | None, argv: list[str] | None = None) -> RunFolder:
    """Create the folder of a new run with its configuration and versions.

    Args:
        config: The dataclass of the run, written as resolved.
        name: What the run is for, part of the default folder's name.
        output: The folder; None takes ``runs/<time>-<name>``.
        argv: Command line, for the record.

    Raises:
        RunFolderError: If the folder holds a run already or cannot be written.
    """
    path = Path(output) if output is not None else new_folder(name)
    check_new_folder(path)
    folder = RunFolder(path)
    folder.write_json(VERSIONS, {"seed": getattr(config, "seed", None), "command": argv, **describe_machine()})
    folder.write_config(config)  # last: a folder with a configuration is a run
    return folder


def check_new_folder(path: Path) -> None:
    """Make a folder for what is to come, if it is not there.

    Raises:
        RunFolderError: If it holds a run already or cannot be written.
    """
    if (path / CONFIG).exists():
        raise RunFolderError(
            f"{path} holds a run already; choose another output=DIR (one of discover.run goes on with resume={path})"
        )
    make_folder(path)


def open_run_folder(path: str | Path) -> RunFolder:
    """Return the folder of an existing run.

    Raises:
        RunFolderError: If there is none at that path.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise RunFolderError(f"{folder} is no folder; name one that discover.run wrote")
    if not (folder / CONFIG).exists():
        raise RunFolderError(f"{folder} holds no run ({CONFIG} is missing); name a folder that discover.run wrote")
    return RunFolder(folder)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing in a folder, which is made; the lock ends with the process, however it ends.

    Raises:
        RunFolderError: If another process has it, or the folder cannot be written.
    """
    make_folder(folder)
    with contextlib.ExitStack() as opened:
        try:
            connection = sqlite3.connect(folder / _LOCK, timeout=0.0, isolation_level=None)
            opened.enter_context(contextlib.closing(connection))
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            raise RunFolderError(
                f"cannot lock {folder} ({error}): another process is working there, or it cannot be written; "
                "wait for it to end, or choose another output=DIR"
            ) from error
        yield


def new_folder(name: str) -> Path:
    """Make and return ``runs/<time>-<name>``, with a number behind it if that second is taken.

    Raises:
        RunFolderError: If it cannot be made.
    """
    stem = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')}"
    make_folder(stem.parent)
    path, number = stem, 2
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            path, number = stem.with_name(f"{stem.name}-{number}"), number + 1
        except OSError as error:
            raise RunFolderError(f"cannot create {path}: {describe_os_error(error)}") from error
        else:
            return path


def describe_machine() -> dict[str, Any]:
    """Return versions, git revision and platform, for the record."""
    packages: dict[str, str] = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    return {
        "id": uuid.uuid4().hex,
        "python": platform.python_version(),
        "packages": packages,
        "git_revision": git_revision(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # as torchrun says
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def git_revision() -> str | None:
    """Return the commit of the source tree, with "+changes" if files differ from it; None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        _git(here, "ls-files", "--error-unmatch", Path(__file__).name)  # fails for an installed copy in some other tree
        revision = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changes" if changed else "")


def save_checkpoint(stem: Path, kind: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write ``<stem>.safetensors`` and ``<stem>.json``, the second naming the first by its hash.

    The weights go to a file of their own, named by content, before the JSON that points to them is renamed into place;
    so a kill between the two leaves the previous pair intact.

    Args:
        stem: Path without suffix.
        kind: What the checkpoint is of, such as "sampler"; checked when it is loaded.
        tensors: Weights and other tensors by name.
        state: Anything JSON can hold, such as the configuration that rebuilds the model.
    """
    data = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    weights = stem.with_name(f"{stem.name}-{digest[:16]}.safetensors")
    write_atomic(weights, data)
    header = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "weights": weights.name,
        "sha256": digest,
        "state": state,
    }
    write_atomic(stem.with_name(f"{stem.name}.json"), json.dumps(header, indent=1, default=_plain) + "\n")
    for old in stem.parent.glob(f"{stem.name}-*.safetensors"):
        if old != weights:
            with contextlib.suppress(OSError):
                old.unlink()


def load_checkpoint(stem: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and state of a checkpoint, checked to be whole and of the right kind.

    Raises:
        CheckpointError: If it is missing, truncated, foreign or of another kind; the message says which.
    """
    path = stem.with_name(f"{stem.name}.json")
    header = _read_header(path)
    if header["kind"] != kind:
        raise CheckpointError(f"{path} is a checkpoint of a {header['kind']}, not of a {kind}; name the right folder")
    weights = path.with_name(Path(header["weights"]).name)
    try:
        data = weights.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} needs {weights.name} beside it: {describe_os_error(error)}") from error
    if hashlib.sha256(data).hexdigest() != header["sha256"]:
        raise CheckpointError(
            f"{weights} is truncated or was changed: it does not match {path.name}; copy it again or train anew"
        )
    try:
        return load_tensors(data), header["state"]
    except SafetensorError as error:
        raise CheckpointError(f"{weights} holds no tensors ({error}); train anew") from error


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; the run was stopped before its first one") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or no checkpoint ({error}); train anew") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this project; name a folder that discover.run wrote")
    if header.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {header.get('format_version')}, this release reads {FORMAT_VERSION}; "
            "use the release that wrote it, or train anew"
        )
    if missing := {"kind", "weights", "sha256", "state"} - header.keys():
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; it was changed by hand, train anew")
    return header


def make_folder(folder: Path) -> None:
    """Make a folder, if it is not there.

    Raises:
        RunFolderError: If it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot create {folder}: {describe_os_error(error)}") from error


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(  # noqa: S603 - fixed words
        ["git", "-C", str(folder), *words],  # noqa: S607 - the user's git
        capture_output=True,
        text=True,
        check=True,
        timeout=5,
    )
    return done.stdout.strip()


def _plain(value: Any) -> Any:
    """Return tensors, NumPy values and paths as what JSON can hold."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"cannot write {type(value).__name__} as JSON")
