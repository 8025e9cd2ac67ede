"""A real PostgreSQL server on a temporary folder, for tests, which are skipped where there is none."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

USER = "keeper"
PASSWORD = "p@ss/word:1"  # noqa: S105 - of a server that lives as long as the tests
PASSWORD_IN_URL = "p%40ss%2Fword%3A1"  # noqa: S105


def find_binaries() -> Path | None:
    """Return the folder of initdb and postgres: the newest of Debian's, else that on the PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    folders += [Path(on_path).resolve().parent] if on_path else []
    return next((folder for folder in folders if (folder / "initdb").exists() and (folder / "postgres").exists()), None)


@contextmanager
def postgres_server() -> Iterator[str]:
    """Run a server and yield the URL of its database, ``postgresql+psycopg://user:password@127.0.0.1:port/postgres``.

    PostgreSQL refuses to run as root: then it runs as postgres or nobody.
    """
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server found; on Debian: apt-get install postgresql")
    identity = _unprivileged()
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        if identity:
            for path in (folder, folder / "password"):
                shutil.chown(path, identity["user"], identity["group"])
        data = folder / "data"
        words = [binaries / "initdb", "--no-sync", "--encoding=UTF8", "--no-locale", f"--username={USER}"]
        _run([*words, "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "-D", data], identity)
        port = _free_port()
        options = f"-c listen_addresses=127.0.0.1 -p {port} -c unix_socket_directories={folder} -c fsync=off"
        control = [binaries / "pg_ctl", "-D", data, "-w", "-t", "60"]
        _run([*control, "-o", options, "-l", folder / "log", "start"], identity)
        try:
            yield f"postgresql+psycopg://{USER}:{PASSWORD_IN_URL}@127.0.0.1:{port}/postgres"
        finally:
            _run([*control, "-m", "immediate", "stop"], identity)


def _run(words: list[Any], identity: dict[str, Any]) -> None:
    # No pipe: the server would inherit it, and reading would wait for its end.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(words, stdout=output, stderr=output, check=False, cwd="/", timeout=120, **identity)
        output.seek(0)
        assert done.returncode == 0, output.read().decode(errors="replace")


def _unprivileged() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    import pwd  # noqa: PLC0415 - absent on Windows, which has no root

    for user in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(user)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
