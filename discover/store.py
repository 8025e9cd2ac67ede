"""The store of a campaign: every candidate and every label, in one SQLite file or a PostgreSQL database.

Rows are only ever added. Each round is one transaction and so is each label, flushed to the disk before the call
returns, so that a kill at any instant leaves whole rounds and whole labels. NaN is stored as NULL and comes back as
NaN; infinities are refused. Structures are JSON text with every digit of their numbers. `docs/store.md` has the tables.
"""

import contextlib
import json
import math
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pymatgen.core import Lattice, Structure
from sqlalchemy import URL, Connection, Engine, Row, Table, and_, create_engine, event, func, make_url, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from discover.oracle.base import Label, LabelStatus
from discover.store_schema import (
    CANDIDATES,
    LABELS,
    ROUNDS,
    RUNS,
    SEEN,
    STEPS,
    StoreError,
    lock,
    now,
    schema_version,
    upgrade,
)

ROWS_PER_TRANSACTION = 50_000  # of `add_rows`: other writers wait about a second for each
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


# --- records -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One crystal that a round chose.

    Args:
        candidate_id: Unique in its run, such as "r01-0007".
        round: The round that chose it.
        source: Where it came from, such as "sampler" or "substitution".
        crystal: What JSON can hold of it: space_group, elements [Z..], letters [..], counts [..], lattice
            [a, b, c, alpha, beta, gamma] in Å and degrees.
        key: Canonical text of the crystal without its lattice: equal for crystals that count as the same.
        formula: Reduced.
        chemical_system: Such as "O-Ti".
        space_group: International number, 1 to 230.
        n_atoms: In the primitive cell.
        prototype: Name of its kind of structure.
        log_reward: Natural log of the reward when it was chosen.
        acquisition: The score it was chosen by.
        predictions: Mean and standard deviation of each property when it was chosen, in the property's unit.
        structure: As built; None where no coordinates were found.
    """

    candidate_id: str
    round: int
    source: str
    crystal: Mapping[str, Any]
    key: str
    formula: str
    chemical_system: str
    space_group: int
    n_atoms: int
    prototype: str
    log_reward: float
    acquisition: float
    predictions: Mapping[str, tuple[float, float]]
    structure: Structure | None


@dataclass(frozen=True)
class Labelled:
    """A candidate with one label; `e_above_hull` in eV/atom, NaN if unknown, against the hull named `hull`."""

    candidate: Candidate
    label: Label
    e_above_hull: float
    hull: str


@dataclass(frozen=True)
class Seen:
    """A crystal that was proposed, whether or not it was chosen; `log_reward` is NaN if it has none."""

    key: str
    round: int
    formula: str
    space_group: int
    log_reward: float


# --- the store -----------------------------------------------------------------------------------


class Store:
    """Candidates and labels of any number of runs. Use `Store.open`; a `with` block closes it.

    Several processes and threads may use one store at a time, each process with a `Store` of its own. Every method
    raises `StoreError`, with the remedy, if the database fails.

    Args:
        engine: Of a database whose schema is current.
        where: What messages call the store; never holds the password.
    """

    def __init__(self, engine: Engine, where: str) -> None:
        self._engine = engine
        self._where = where
        self._run_ids: dict[str, int] = {}  # rows are never changed, so what was read once stays true

    @classmethod
    def open(cls, url: str | Path) -> Self:
        """Return the store at a path or URL, created if it is not there, its schema brought up to date.

        Args:
            url: A path, for SQLite, or ``postgresql+psycopg://user:password@host/database``.

        Raises:
            StoreError: If it cannot be reached, was written by a newer release, or holds something else.
        """
        address = _parse_url(url)
        where = _describe(address)
        store = cls(_create_engine(address, where), where)
        try:
            with store._reading() as connection:  # who only reads need not wait for writers, nor be allowed to write
                is_current = schema_version(connection) == len(STEPS)
            if not is_current:
                with store._writing() as connection:
                    upgrade(connection, where)
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Close all connections; calling it again does nothing."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # --- runs and rounds ---

    def start_run(self, run: str, config: Mapping[str, Any]) -> None:
        """Add a run; if the store has one of that name, it stays as it is, with its first configuration."""
        values = {"run": run, "config": _to_json(config, "config"), "recorded": now()}
        with self._writing() as connection:
            lock(connection)
            run_id = connection.scalar(select(func.coalesce(func.max(RUNS.c.run_id), 0) + 1))
            connection.execute(self._insert_new(RUNS).values(run_id=run_id, **values))

    def runs(self) -> list[str]:
        """Return the names of all runs, in the order they were started."""
        with self._reading() as connection:
            return list(connection.scalars(select(RUNS.c.run).order_by(RUNS.c.run_id)))

    def run_config(self, run: str) -> dict[str, Any]:
        """Return the configuration that a run was started with, NaN as None.

        Raises:
            StoreError: If there is no such run.
        """
        with self._reading() as connection:
            run_id = self._run_id(connection, run)
            return _from_json(connection.scalar(select(RUNS.c.config).where(RUNS.c.run_id == run_id)))

    def add_round(self, run: str, number: int, candidates: Sequence[Candidate], info: Mapping[str, Any]) -> None:
        """Add a round with all its candidates, or nothing.

        Args:
            run: A run that was started.
            number: Of the round.
            candidates: In the order in which they will be returned; may be empty.
            info: Anything JSON can hold; NaN comes back as None.

        Raises:
            StoreError: If the round is there already, a candidate's id is taken, or a number is infinite.
        """
        wrong = next((item for item in candidates if item.round != number), None)
        if wrong is not None:
            raise StoreError(f"{wrong.candidate_id} says round {wrong.round} but is added to round {number}")
        rows = [{"position": position, **_candidate_row(item)} for position, item in enumerate(candidates)]
        values = {"round": number, "info": _to_json(info, "info"), "recorded": now()}
        with self._writing() as connection:
            run_id = self._run_id(connection, run)
            if not connection.execute(self._insert_new(ROUNDS).values(run_id=run_id, **values)).rowcount:
                raise StoreError(f"round {number} of run {run} is in the store already; a round is added once")
            try:
                if rows:
                    connection.execute(CANDIDATES.insert(), [{"run_id": run_id, **row} for row in rows])
            except IntegrityError:
                raise StoreError(
                    f"round {number} of run {run} was not added: two candidates have one id, or an earlier round has "
                    "a candidate of that id; ids are unique in a run"
                ) from None

    def rounds(self, run: str) -> list[int]:
        """Return the numbers of the run's rounds, ascending."""
        with self._reading() as connection:
            query = select(ROUNDS.c.round).where(ROUNDS.c.run_id == self._run_id(connection, run))
            return list(connection.scalars(query.order_by(ROUNDS.c.round)))

    def round_info(self, run: str, number: int) -> dict[str, Any]:
        """Return what was stored with a round, NaN as None.

        Raises:
            StoreError: If there is no such round.
        """
        with self._reading() as connection:
            run_id = self._run_id(connection, run)
            info = connection.scalar(select(ROUNDS.c.info).where(ROUNDS.c.run_id == run_id, ROUNDS.c.round == number))
        if info is None:
            raise StoreError(f"run {run} has no round {number}; it has {self.rounds(run)}")
        return _from_json(info)

    # --- candidates and labels ---

    def candidates(self, run: str, number: int | None = None) -> list[Candidate]:
        """Return the candidates of a round, or of all rounds, in the order in which they were added."""
        with self._reading() as connection:
            query = select(CANDIDATES).where(CANDIDATES.c.run_id == self._run_id(connection, run))
            if number is not None:
                query = query.where(CANDIDATES.c.round == number)
            rows = connection.execute(query.order_by(CANDIDATES.c.round, CANDIDATES.c.position)).all()
        return [_candidate(row) for row in rows]

    def unlabelled(self, run: str, number: int, oracle: str) -> list[Candidate]:
        """Return the candidates of a round that have no label of that oracle, in the order they were added."""
        with self._reading() as connection:
            query = (
                select(CANDIDATES)
                .outerjoin(LABELS, and_(_LABEL_OF_CANDIDATE, LABELS.c.oracle == oracle))
                .where(CANDIDATES.c.run_id == self._run_id(connection, run), CANDIDATES.c.round == number)
                .where(LABELS.c.oracle.is_(None))
                .order_by(CANDIDATES.c.position)
            )
            rows = connection.execute(query).all()
        return [_candidate(row) for row in rows]

    def add_label(
        self,
        run: str,
        candidate_id: str,
        oracle: str,
        label: Label,
        *,
        e_above_hull: float,
        hull: str,
        settings: Mapping[str, Any],
    ) -> bool:
        """Add a label and return True; return False, and change nothing, if the candidate has one of that oracle.

        On return the label is on the disk. Of several callers at once with one candidate, one gets True.

        Args:
            run: A run that was started.
            candidate_id: Of a candidate of that run.
            oracle: Name of what made the label.
            label: The label; its structure must be ordered. Characters of the reason that no database takes become "?".
            e_above_hull: eV/atom; NaN if unknown.
            hull: Name of the hull it refers to.
            settings: What the oracle says of itself, as JSON.

        Raises:
            StoreError: If there is no such candidate, or a number is infinite.
        """
        row = _label_row(label)
        row["e_above_hull"] = _number(e_above_hull, "e_above_hull")
        row |= {"hull": hull, "settings": _to_json(settings, "settings", sort_keys=True), "recorded": now()}
        with self._writing() as connection:
            keys = {"run_id": self._run_id(connection, run), "candidate_id": candidate_id, "oracle": oracle}
            try:
                return connection.execute(self._insert_new(LABELS).values(**keys, **row)).rowcount == 1
            except IntegrityError:
                raise StoreError(f"run {run} has no candidate {candidate_id}; labels belong to candidates") from None

    def labels(self, run: str, oracle: str, *, before_round: int | None = None) -> list[Labelled]:
        """Return the labels of an oracle with their candidates, by round and place in it, whenever they arrived.

        Args:
            run: A run that was started.
            oracle: Name of what made the labels.
            before_round: Leave out this round and later ones.
        """
        with self._reading() as connection:
            query = (
                select(CANDIDATES, *_LABEL_COLUMNS)
                .join(LABELS, _LABEL_OF_CANDIDATE)
                .where(CANDIDATES.c.run_id == self._run_id(connection, run), LABELS.c.oracle == oracle)
            )
            if before_round is not None:
                query = query.where(CANDIDATES.c.round < before_round)
            rows = connection.execute(query.order_by(CANDIDATES.c.round, CANDIDATES.c.position)).all()
        return [Labelled(_candidate(row), _label(row), _nan(row.e_above_hull), row.hull) for row in rows]

    def n_labels(self, run: str, oracle: str) -> int:
        """Return how many labels an oracle has given, failed ones included."""
        with self._reading() as connection:
            run_id = self._run_id(connection, run)
            query = select(func.count()).where(LABELS.c.run_id == run_id, LABELS.c.oracle == oracle)
            return int(connection.scalar(query) or 0)

    def oracles(self, run: str) -> list[str]:
        """Return the names of the oracles that have given labels, sorted."""
        with self._reading() as connection:
            query = select(LABELS.c.oracle).where(LABELS.c.run_id == self._run_id(connection, run)).distinct()
            return sorted(connection.scalars(query))

    def settings(self, run: str, oracle: str) -> list[dict[str, Any]]:
        """Return the settings under which an oracle has labelled: one entry unless they were changed on the way."""
        with self._reading() as connection:
            run_id = self._run_id(connection, run)
            query = select(LABELS.c.settings).where(LABELS.c.run_id == run_id, LABELS.c.oracle == oracle)
            texts = connection.scalars(query.group_by(LABELS.c.settings).order_by(func.min(LABELS.c.recorded))).all()
        return [_from_json(found) for found in texts]

    # --- crystals that were proposed ---

    def add_rows(self, run: str, rows: Iterable[Candidate]) -> int:
        """Add crystals that were seen but not chosen, and return how many were new.

        A key is kept once a round, its first row, so that a resumed run may add its rows again. Rows go in
        transactions of `ROWS_PER_TRANSACTION`: after a kill, or an error raised by `rows`, whole ones are there.
        """
        n_new = 0
        remaining = iter(rows)
        while chunk := list(islice(remaining, ROWS_PER_TRANSACTION)):
            with self._writing() as connection:
                run_id = self._run_id(connection, run)
                values = [{"run_id": run_id, **_seen_row(row)} for row in chunk]
                n_new += connection.execute(self._insert_new(SEEN), values).rowcount
        return n_new

    def n_seen(self, run: str, formula: str | None = None) -> int:
        """Return how many crystals were seen, or how many of one formula."""
        with self._reading() as connection:
            query = select(func.count()).where(SEEN.c.run_id == self._run_id(connection, run))
            return int(connection.scalar(query if formula is None else query.where(SEEN.c.formula == formula)) or 0)

    def seen_formulas(self, run: str) -> dict[str, int]:
        """Return how many crystals of each formula were seen, most frequent first."""
        with self._reading() as connection:
            query = select(SEEN.c.formula, func.count()).where(SEEN.c.run_id == self._run_id(connection, run))
            counts = connection.execute(query.group_by(SEEN.c.formula)).all()
        return dict(sorted(((formula, n) for formula, n in counts), key=lambda item: (-item[1], item[0])))

    def find_seen(self, run: str, key: str) -> list[Seen]:
        """Return what was seen under a key, by round."""
        with self._reading() as connection:
            query = select(SEEN).where(SEEN.c.run_id == self._run_id(connection, run), SEEN.c.key == key)
            return [_seen(row) for row in connection.execute(query.order_by(SEEN.c.round))]

    def best_seen(self, run: str, n: int) -> list[Seen]:
        """Return the `n` crystals with the greatest log reward; those without one are left out."""
        with self._reading() as connection:
            query = select(SEEN).where(SEEN.c.run_id == self._run_id(connection, run), SEEN.c.log_reward.is_not(None))
            best = query.order_by(SEEN.c.log_reward.desc(), SEEN.c.key, SEEN.c.round).limit(n)
            return [_seen(row) for row in connection.execute(best)]

    # --- connections ---

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        with _explained(self._where, self._engine.url), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        """Give a connection in a transaction that is committed at the end, or rolled back after an error."""
        with _explained(self._where, self._engine.url), self._engine.connect() as connection:
            # Without the second option SQLAlchemy does not keep the count of an INSERT.
            connection.execution_options(writes=True, preserve_rowcount=True)
            with connection.begin():
                yield connection

    def _insert_new(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """Return an INSERT that skips rows whose unique columns are taken."""
        if self._engine.dialect.name == "postgresql":
            return postgresql.insert(table).on_conflict_do_nothing()
        return sqlite.insert(table).on_conflict_do_nothing()

    def _run_id(self, connection: Connection, run: str) -> int:
        if run not in self._run_ids:
            found = connection.scalar(select(RUNS.c.run_id).where(RUNS.c.run == run))
            if found is None:
                known = ", ".join(connection.scalars(select(RUNS.c.run).order_by(RUNS.c.run_id))) or "none"
                raise StoreError(f"{self._where} has no run {run}; its runs: {known}")
            self._run_ids[run] = found
        return self._run_ids[run]


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


# --- addresses, connections, errors --------------------------------------------------------------


def _parse_url(url: str | Path) -> URL:
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


def _describe(address: URL) -> str:
    if address.drivername == "sqlite":
        return str(address.database)
    host = address.host or address.query.get("host") or "the local socket"
    port = f":{address.port}" if address.port else ""
    return f"PostgreSQL database {address.database or address.username} at {host}{port}"


def _create_engine(address: URL, where: str) -> Engine:
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
def _explained(where: str, address: URL) -> Iterator[None]:
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


# --- rows ----------------------------------------------------------------------------------------

_LABEL_OF_CANDIDATE = and_(LABELS.c.run_id == CANDIDATES.c.run_id, LABELS.c.candidate_id == CANDIDATES.c.candidate_id)
_LABEL_COLUMNS = [
    LABELS.c.structure.label("relaxed"),
    *(column for column in LABELS.c if column.name not in {"run_id", "candidate_id", "structure"}),
]
_LABEL_NUMBERS = (
    "energy_per_atom",
    "formation_energy_per_atom",
    "initial_formation_energy_per_atom",
    "band_gap",
    "seconds",
)


def _candidate_row(candidate: Candidate) -> dict[str, Any]:
    name = candidate.candidate_id
    return {
        "candidate_id": name,
        "round": int(candidate.round),
        "source": str(candidate.source),
        "crystal": _to_json(candidate.crystal, f"crystal of {name}"),
        "key": candidate.key,
        "formula": candidate.formula,
        "chemical_system": candidate.chemical_system,
        "space_group": int(candidate.space_group),
        "n_atoms": int(candidate.n_atoms),
        "prototype": candidate.prototype,
        "log_reward": _number(candidate.log_reward, f"log_reward of {name}"),
        "acquisition": _number(candidate.acquisition, f"acquisition of {name}"),
        "predictions": _to_json(candidate.predictions, f"predictions of {name}"),
        "structure": _structure_text(candidate.structure, name),
    }


def _candidate(row: Row[Any]) -> Candidate:
    predictions = _from_json(row.predictions)
    return Candidate(
        candidate_id=row.candidate_id,
        round=row.round,
        source=row.source,
        crystal=_from_json(row.crystal),
        key=row.key,
        formula=row.formula,
        chemical_system=row.chemical_system,
        space_group=row.space_group,
        n_atoms=row.n_atoms,
        prototype=row.prototype,
        log_reward=_nan(row.log_reward),
        acquisition=_nan(row.acquisition),
        predictions={name: (_nan(mean), _nan(std)) for name, (mean, std) in predictions.items()},
        structure=_structure(row.structure),
    )


def _label_row(label: Label) -> dict[str, Any]:
    properties = {str(name): _number(value, f"property {name}") for name, value in label.properties.items()}
    return {
        "status": str(label.status),
        "reason": _plain_text(label.reason),
        "structure": _structure_text(label.structure, "the label"),
        **{name: _number(getattr(label, name), name) for name in _LABEL_NUMBERS},
        "properties": _to_json(properties, "properties"),
        "space_group_before": _whole(label.space_group_before),
        "space_group_after": _whole(label.space_group_after),
        "n_steps": int(label.n_steps),
    }


def _label(row: Row[Any]) -> Label:
    return Label(
        status=LabelStatus(row.status),
        reason=row.reason,
        structure=_structure(row.relaxed),
        **{name: _nan(getattr(row, name)) for name in _LABEL_NUMBERS},
        properties={name: _nan(value) for name, value in _from_json(row.properties).items()},
        space_group_before=row.space_group_before,
        space_group_after=row.space_group_after,
        n_steps=row.n_steps,
    )


def _seen_row(candidate: Candidate) -> dict[str, Any]:
    return {
        "key": candidate.key,
        "round": int(candidate.round),
        "formula": candidate.formula,
        "space_group": int(candidate.space_group),
        "log_reward": _number(candidate.log_reward, f"log_reward of {candidate.candidate_id}"),
    }


def _seen(row: Row[Any]) -> Seen:
    return Seen(row.key, row.round, row.formula, row.space_group, _nan(row.log_reward))


def _number(value: float, name: str) -> float | None:
    """Return a float for a column: None for NaN."""
    number = float(value)
    if math.isinf(number):
        raise StoreError(f"{name} is {number}; the store takes finite numbers, and NaN for what is unknown")
    return None if math.isnan(number) else number


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _whole(value: int | None) -> int | None:
    return None if value is None else int(value)


def _plain_text(value: str) -> str:
    """Return text that every database takes: PostgreSQL refuses the null character, and both refuse half characters."""
    return value.replace("\0", "?").encode("utf-8", "replace").decode("utf-8")


def _to_json(value: Any, name: str, *, sort_keys: bool = False) -> str:
    # Kept within ASCII, so that no character of it can offend a database.
    return json.dumps(_plain(value, name), separators=(",", ":"), allow_nan=False, sort_keys=sort_keys)


def _from_json(text: str | None) -> Any:
    return json.loads(text or "{}")


def _plain(value: Any, name: str) -> Any:
    """Return what JSON can hold: NumPy values and tensors as numbers and lists, NaN as None, paths as text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return _number(value, name)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), name)
    raise StoreError(f"{name} holds a {type(value).__name__}; the store takes what JSON can hold")


def _structure_text(structure: Structure | None, name: str) -> str | None:
    if structure is None:
        return None
    if not structure.is_ordered:
        raise StoreError(f"the structure of {name} is disordered; every site must hold one element with occupancy 1")
    content = {
        "lattice": structure.lattice.matrix,
        "atomic_numbers": [site.specie.Z for site in structure],
        "frac_coords": structure.frac_coords,
    }
    if any(math.isnan(number) for key in ("lattice", "frac_coords") for number in content[key].flatten().tolist()):
        raise StoreError(f"the structure of {name} holds NaN; give no structure where there is none")
    return _to_json(content, f"structure of {name}")


def _structure(text: str | None) -> Structure | None:
    if text is None:
        return None
    content = json.loads(text)
    return Structure(Lattice(content["lattice"]), content["atomic_numbers"], content["frac_coords"])
