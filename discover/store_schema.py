"""Tables of the store, and the numbered steps that bring any earlier store up to them.

A new store runs every step from the first and an older one those it lacks, each in one transaction with its number, so
that both end with the same tables. A step is frozen text once it is released: later changes are later steps. The text
is what SQLite and PostgreSQL share; a test compares the outcome with the tables below.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import (
    DOUBLE_PRECISION,
    Column,
    Connection,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    func,
    insert,
    inspect,
    select,
    text,
)


class StoreError(ValueError):
    """A store that cannot be opened, read or written, or something it refuses to hold."""


METADATA = MetaData()

#: One row for each step that was taken; the greatest version is the store's.
SCHEMA = Table(
    "store_schema",
    METADATA,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("recorded", Text, nullable=False),  # ISO time in UTC, as everywhere
)
RUNS = Table(
    "runs",
    METADATA,
    Column("run_id", Integer, primary_key=True, autoincrement=False),
    Column("run", Text, nullable=False, unique=True),
    Column("config", Text, nullable=False),  # JSON
    Column("recorded", Text, nullable=False),
)
ROUNDS = Table(
    "rounds",
    METADATA,
    Column("run_id", Integer, ForeignKey("runs.run_id"), primary_key=True, autoincrement=False),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("info", Text, nullable=False),  # JSON
    Column("recorded", Text, nullable=False),
)
CANDIDATES = Table(
    "candidates",
    METADATA,
    Column("run_id", Integer, primary_key=True, autoincrement=False),
    Column("candidate_id", Text, primary_key=True),
    Column("round", Integer, nullable=False),
    Column("position", Integer, nullable=False),  # within its round, from 0
    Column("source", Text, nullable=False),
    Column("crystal", Text, nullable=False),  # JSON
    Column("key", Text, nullable=False),
    Column("formula", Text, nullable=False),
    Column("chemical_system", Text, nullable=False),
    Column("space_group", Integer, nullable=False),
    Column("n_atoms", Integer, nullable=False),
    Column("prototype", Text, nullable=False),
    Column("log_reward", DOUBLE_PRECISION),
    Column("acquisition", DOUBLE_PRECISION),
    Column("predictions", Text, nullable=False),  # JSON
    Column("structure", Text),  # JSON; NULL where no coordinates were found
    UniqueConstraint("run_id", "round", "position"),
    ForeignKeyConstraint(["run_id", "round"], ["rounds.run_id", "rounds.round"]),
)
LABELS = Table(
    "labels",
    METADATA,
    Column("run_id", Integer, primary_key=True, autoincrement=False),
    Column("candidate_id", Text, primary_key=True),
    Column("oracle", Text, primary_key=True),
    Column("status", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("structure", Text),  # JSON; after relaxation
    Column("energy_per_atom", DOUBLE_PRECISION),
    Column("formation_energy_per_atom", DOUBLE_PRECISION),
    Column("initial_formation_energy_per_atom", DOUBLE_PRECISION),
    Column("band_gap", DOUBLE_PRECISION),
    Column("e_above_hull", DOUBLE_PRECISION),
    Column("hull", Text, nullable=False),
    Column("properties", Text, nullable=False),  # JSON
    Column("space_group_before", Integer),
    Column("space_group_after", Integer),
    Column("n_steps", Integer, nullable=False),
    Column("seconds", DOUBLE_PRECISION),
    Column("settings", Text, nullable=False),  # JSON
    Column("recorded", Text, nullable=False),
    ForeignKeyConstraint(["run_id", "candidate_id"], ["candidates.run_id", "candidates.candidate_id"]),
)
SEEN = Table(
    "seen",
    METADATA,
    Column("run_id", Integer, ForeignKey("runs.run_id"), primary_key=True, autoincrement=False),
    Column("key", Text, primary_key=True),  # before the round: a key is looked up in all rounds
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("formula", Text, nullable=False),
    Column("space_group", Integer, nullable=False),
    Column("log_reward", DOUBLE_PRECISION),
)
Index("seen_formula", SEEN.c.run_id, SEEN.c.formula)
Index("seen_log_reward", SEEN.c.run_id, SEEN.c.log_reward)

#: Statements of each step; step n takes a store from version n - 1 to n.
STEPS: tuple[Sequence[str], ...] = (
    (
        """CREATE TABLE store_schema (
            version INTEGER NOT NULL PRIMARY KEY,
            recorded TEXT NOT NULL)""",
        """CREATE TABLE runs (
            run_id INTEGER NOT NULL PRIMARY KEY,
            run TEXT NOT NULL UNIQUE,
            config TEXT NOT NULL,
            recorded TEXT NOT NULL)""",
        """CREATE TABLE rounds (
            run_id INTEGER NOT NULL REFERENCES runs (run_id),
            round INTEGER NOT NULL,
            info TEXT NOT NULL,
            recorded TEXT NOT NULL,
            PRIMARY KEY (run_id, round))""",
        """CREATE TABLE candidates (
            run_id INTEGER NOT NULL,
            candidate_id TEXT NOT NULL,
            round INTEGER NOT NULL,
            position INTEGER NOT NULL,
            source TEXT NOT NULL,
            crystal TEXT NOT NULL,
            key TEXT NOT NULL,
            formula TEXT NOT NULL,
            chemical_system TEXT NOT NULL,
            space_group INTEGER NOT NULL,
            n_atoms INTEGER NOT NULL,
            prototype TEXT NOT NULL,
            log_reward DOUBLE PRECISION,
            acquisition DOUBLE PRECISION,
            predictions TEXT NOT NULL,
            structure TEXT,
            PRIMARY KEY (run_id, candidate_id),
            UNIQUE (run_id, round, position),
            FOREIGN KEY (run_id, round) REFERENCES rounds (run_id, round))""",
        """CREATE TABLE labels (
            run_id INTEGER NOT NULL,
            candidate_id TEXT NOT NULL,
            oracle TEXT NOT NULL,
            status TEXT NOT NULL,
            reason TEXT NOT NULL,
            structure TEXT,
            energy_per_atom DOUBLE PRECISION,
            formation_energy_per_atom DOUBLE PRECISION,
            initial_formation_energy_per_atom DOUBLE PRECISION,
            band_gap DOUBLE PRECISION,
            e_above_hull DOUBLE PRECISION,
            hull TEXT NOT NULL,
            properties TEXT NOT NULL,
            space_group_before INTEGER,
            space_group_after INTEGER,
            n_steps INTEGER NOT NULL,
            seconds DOUBLE PRECISION,
            settings TEXT NOT NULL,
            recorded TEXT NOT NULL,
            PRIMARY KEY (run_id, candidate_id, oracle),
            FOREIGN KEY (run_id, candidate_id) REFERENCES candidates (run_id, candidate_id))""",
    ),
    (
        """CREATE TABLE seen (
            run_id INTEGER NOT NULL REFERENCES runs (run_id),
            key TEXT NOT NULL,
            round INTEGER NOT NULL,
            formula TEXT NOT NULL,
            space_group INTEGER NOT NULL,
            log_reward DOUBLE PRECISION,
            PRIMARY KEY (run_id, key, round))""",
        "CREATE INDEX seen_formula ON seen (run_id, formula)",
        "CREATE INDEX seen_log_reward ON seen (run_id, log_reward)",
    ),
)

_LOCK = 0x63727973  # any number that nobody else's advisory locks are likely to have


def now() -> str:
    """Return the time in UTC as ISO text, which sorts."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def lock(connection: Connection) -> None:
    """Let other writers that call this wait until the end of the transaction.

    SQLite has one writer at a time anyway: its transactions begin with BEGIN IMMEDIATE.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))


def schema_version(connection: Connection) -> int | None:
    """Return the version of the store's schema, 0 for an empty database, None for a database of something else."""
    tables = inspect(connection).get_table_names()
    if SCHEMA.name in tables:
        return connection.scalar(select(func.max(SCHEMA.c.version)))
    return None if tables else 0


def upgrade(connection: Connection, where: str, steps: Sequence[Sequence[str]] = STEPS) -> None:
    """Bring a store to the newest schema within the connection's transaction.

    Args:
        connection: In a transaction that may write.
        where: What messages call the store.
        steps: All steps there are; the newest version is their number.

    Raises:
        StoreError: If the database holds something else, or a store of a newer release.
    """
    lock(connection)
    version = schema_version(connection)
    if version is None:
        raise StoreError(
            f"{where} holds tables of something else; name a new file, or an empty database or schema, for the store"
        )
    if version > len(steps):
        raise StoreError(
            f"{where} was written by a newer release (schema {version}, this one reads up to {len(steps)}); "
            "update crystal-discover, or name another store"
        )
    for number, statements in enumerate(steps[version:], start=version + 1):
        for statement in statements:
            connection.execute(text(statement))
        connection.execute(insert(SCHEMA).values(version=number, recorded=now()))
