"""The database behind a store: its address, its connections, and what its errors mean.

SQLite writes ahead in a log, flushed at every commit; PostgreSQL does so by itself. No message holds the password.
"""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from discover.store_schema import StoreError, schema_version

_BUSY_SECONDS = 60.0  # how long a writer waits for another one
_CONNECT_SECONDS = 10  # how long PostgreSQL may take to answer
_CACHE_KIB = 65_536  # SQLite's page cache: bulk inserts touch pages all over the index of keys
_DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgresql+psycopg": "postgresql+psycopg"}
_SAFE = "what was stored before is safe"

#: What a failure means and what helps, by SQLite's primary result code or by PostgreSQL's SQLSTATE.
_REMEDIES: dict[int | str, str] = {
    sqlite3.SQLITE_FULL: f"the disk is full; free some space, then continue with resume=DIR: {_SAFE}",
    sqlite3.SQLITE_IOERR: f"the disk failed or its quota is reached; check it, then continue with resume=DIR: {_SAFE}",
    sqlite3.SQLITE_BUSY: f"another process kept the store for {_BUSY_SECONDS:.0f} s; end it or wait: {_SAFE}",
    sqlite3.SQLITE_LOCKED: f"another process kept the store for {_BUSY_SECONDS:.0f} s; end it or wait: {_SAFE}",
    sqlite3.SQLITE_READONLY: "no permission to write there; change the permissions of the file and its folder",
    sqlite3.SQLITE_PERM: "no permission to read or write there; change the permissions of the file and its folder",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened; check that its folder exists and may be written",
    sqlite3.SQLITE_NOTADB: "the file is no store; name a new file, or one that discover.run wrote",
    sqlite3.SQLITE_CORRUPT: "the file is damaged; restore a copy, or save what can be read with sqlite3's .recover",
    "53100": f"the server's disk is full; free some space, then continue with resume=DIR: {_SAFE}",
    "42501": "the user lacks a permission; grant it CREATE on the schema, and INSERT and SELECT on its tables",
    "25006": "the server or the session is read-only; name a server that takes writes",
    "28P01": "the server refuses the user or the password; correct them in the URL",
    "28000": "the server refuses the user; correct it in the URL, or allow it in pg_hba.conf",
    "3D000": "there is no such database; create it with createdb, or correct the URL",
}


def parse_url(url: str | Path) -> URL:
    """Return the address of a store: a path means SQLite.

    Raises:
        StoreError: If it is neither SQLite's nor PostgreSQL's, or cannot be read.
    """
    if isinstance(url, Path) or "://" not in url:
        if not str(url):
            raise StoreError("the store needs a name: a path, or postgresql+psycopg://user:password@host/database")
        # Absolute, so that no name (":memory:") means anything but a file.
        return URL.create("sqlite", database=str(Path(url).absolute()))
    try:
        address = make_url(url)
    except (ArgumentError, ValueError):  # its text may hold the password
        raise StoreError(
            "the store's URL cannot be read; expected postgresql+psycopg://user:password@host:port/database"
        ) from None
    if address.drivername not in _DRIVERS:
        raise StoreError(f"a store is SQLite or postgresql+psycopg, got a URL of {address.drivername}")
    if address.drivername == "sqlite":
        if not address.database or address.query:
            raise StoreError("a SQLite store is a file: give its path, or sqlite:///path without settings behind it")
        return URL.create("sqlite", database=str(Path(address.database).absolute()))
    if "@" in (address.host or ""):
        raise StoreError("the store's URL has more than one @; in a password write @ as %40, : as %3A and / as %2F")
    return address.set(drivername=_DRIVERS[address.drivername])


def file_of(url: str | Path) -> Path | None:
    """Return the file of a store, None for one on a server; see `parse_url`."""
    address = parse_url(url)
    return Path(str(address.database)) if address.drivername == "sqlite" else None


def describe(address: URL) -> str:
    """Return what messages call a store: its path, or its database and host."""
    if address.drivername == "sqlite":
        return str(address.database)
    host = address.host or address.query.get("host") or "the local socket"
    port = f":{address.port}" if address.port else ""
    return f"PostgreSQL database {address.database or address.username} at {host}{port}"


def open_engine(address: URL, where: str) -> Engine:
    """Return the engine of a store; it connects when it is first used.

    On SQLite a connection in a transaction with the execution option `writes` holds the one place of a writer.

    Raises:
        StoreError: If the address is a folder, or PostgreSQL's driver is not installed.
    """
    is_sqlite = address.drivername == "sqlite"
    if is_sqlite and Path(str(address.database)).is_dir():
        raise StoreError(f"{where} is a folder; name a file in it, such as {Path(where) / 'store.db'}")
    timeout = {} if "connect_timeout" in address.query else {"connect_timeout": _CONNECT_SECONDS}
    # isolation_level=None: Python's sqlite3 leaves transactions to us.
    arguments = {"timeout": _BUSY_SECONDS, "isolation_level": None} if is_sqlite else timeout
    try:
        # A server may have been restarted between two labels: the ping gets a new connection then.
        engine = create_engine(address, hide_parameters=True, pool_pre_ping=not is_sqlite, connect_args=arguments)
    except ModuleNotFoundError:
        raise StoreError(f"{where} needs psycopg; install it with: pip install 'psycopg[binary]'") from None
    if is_sqlite:
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: DBAPIConnection, _: object) -> None:
    cursor = connection.cursor()
    _use_write_ahead_log(cursor)
    cursor.execute("PRAGMA synchronous=FULL")  # a commit is on the disk when it returns
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
    cursor.close()


def _use_write_ahead_log(cursor: Any) -> None:
    """Switch the journal mode, which SQLite refuses at once, without its timeout, while another process does so."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and then writes cannot wait for another writer: it would fail at once.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextlib.contextmanager
def explained(where: str, address: URL) -> Iterator[None]:
    """Turn errors of the database into a `StoreError` with the remedy; the password never appears."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        code = getattr(cause, "sqlite_errorcode", None)
        known = _REMEDIES.get(getattr(cause, "sqlstate", None) or "" if code is None else code & 0xFF)
        said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        for secret in (address.password, address.query.get("password")):
            said = said.replace(str(secret), "***") if secret else said
        if known is None and address.drivername != "sqlite" and getattr(cause, "sqlstate", None) is None:
            known = f"the server cannot be reached or went away; check that it runs and the URL is right: {_SAFE}"
        # Without its cause: the text of a driver's error may repeat what it was given.
        raise StoreError(f"{where}: {known} ({said})" if known else f"{where}: {said}") from None


def is_store(path: Path) -> bool:
    """Return whether a file is a SQLite database with a store of this project in it; it is not changed."""
    if not path.is_file():
        return False
    address = URL.create("sqlite", database=path.absolute().as_uri(), query={"mode": "ro", "uri": "true"})
    engine = create_engine(address)
    try:
        with engine.connect() as connection:
            return bool(schema_version(connection))
    except SQLAlchemyError:
        return False
    finally:
        engine.dispose()
