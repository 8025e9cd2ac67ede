"""The store of a campaign: every candidate and every label, in one SQLite file or a PostgreSQL database.

Rows are only ever added. Each round is one transaction and so is each label, flushed to the disk before the call
returns, so that a kill at any instant leaves whole rounds and whole labels. NaN is stored as NULL and comes back as
NaN; infinities are refused. Structures are JSON text with every digit of their numbers. `docs/store.md` has the tables.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine, Table, and_, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from discover.oracle.base import Label
from discover.store_database import describe, explained, open_engine, parse_url
from discover.store_records import (
    Candidate,
    Labelled,
    Seen,
    candidate_row,
    from_json,
    label_row,
    nan_if_null,
    null_if_nan,
    read_candidate,
    read_label,
    read_seen,
    seen_row,
    to_json,
)
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

__all__ = ["Candidate", "Labelled", "Seen", "Store", "StoreError"]

ROWS_PER_TRANSACTION = 50_000  # of `add_rows`: other writers wait about a second for each
_LABEL_OF_CANDIDATE = and_(LABELS.c.run_id == CANDIDATES.c.run_id, LABELS.c.candidate_id == CANDIDATES.c.candidate_id)
_LABEL_COLUMNS = [
    LABELS.c.structure.label("relaxed"),
    *(column for column in LABELS.c if column.name not in {"run_id", "candidate_id", "structure"}),
]


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
        address = parse_url(url)
        where = describe(address)
        store = cls(open_engine(address, where), where)
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
        values = {"run": run, "config": to_json(config, "config"), "recorded": now()}
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
            return from_json(connection.scalar(select(RUNS.c.config).where(RUNS.c.run_id == run_id)))

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
        rows = [{"position": position, **candidate_row(item)} for position, item in enumerate(candidates)]
        values = {"round": number, "info": to_json(info, "info"), "recorded": now()}
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
        return from_json(info)

    # --- candidates and labels ---

    def candidates(self, run: str, number: int | None = None) -> list[Candidate]:
        """Return the candidates of a round, or of all rounds, in the order in which they were added."""
        with self._reading() as connection:
            query = select(CANDIDATES).where(CANDIDATES.c.run_id == self._run_id(connection, run))
            if number is not None:
                query = query.where(CANDIDATES.c.round == number)
            rows = connection.execute(query.order_by(CANDIDATES.c.round, CANDIDATES.c.position)).all()
        return [read_candidate(row) for row in rows]

    def formulas_elsewhere(self, run: str) -> frozenset[str]:
        """Return the reduced formulas that other runs have chosen."""
        with self._reading() as connection:
            query = select(CANDIDATES.c.formula).where(CANDIDATES.c.run_id != self._run_id(connection, run))
            return frozenset(connection.scalars(query.distinct()))

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
        return [read_candidate(row) for row in rows]

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
        row = label_row(label)
        row["e_above_hull"] = null_if_nan(e_above_hull, "e_above_hull")
        row |= {"hull": hull, "settings": to_json(settings, "settings", sort_keys=True), "recorded": now()}
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
        return [
            Labelled(read_candidate(row), read_label(row), nan_if_null(row.e_above_hull), row.hull, row.oracle)
            for row in rows
        ]

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
        return [from_json(found) for found in texts]

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
                values = [{"run_id": run_id, **seen_row(row)} for row in chunk]
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
            return [read_seen(row) for row in connection.execute(query.order_by(SEEN.c.round))]

    def best_seen(self, run: str, n: int) -> list[Seen]:
        """Return the `n` crystals with the greatest log reward; those without one are left out."""
        with self._reading() as connection:
            query = select(SEEN).where(SEEN.c.run_id == self._run_id(connection, run), SEEN.c.log_reward.is_not(None))
            best = query.order_by(SEEN.c.log_reward.desc(), SEEN.c.key, SEEN.c.round).limit(n)
            return [read_seen(row) for row in connection.execute(best)]

    # --- connections ---

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Connection]:
        with explained(self._where, self._engine.url), self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        """Give a connection in a transaction that is committed at the end, or rolled back after an error."""
        with explained(self._where, self._engine.url), self._engine.connect() as connection:
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
