"""A store survives kills, full disks and many writers: processes are real, and killed with SIGKILL."""

import multiprocessing
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import discover.store
import discover.store_database
from discover.store import Store, StoreError
from tests.discover.postgres_server import postgres_server
from tests.discover.store_examples import FAILED, LABEL, add_label, candidate

N_KILLS = 6
PER_ROUND = 20
PER_CALL = 400

# Children fork from a server that holds the imports: they start in milliseconds, and no thread of torch is forked.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["discover.store", "tests.discover.store_examples"])


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path: Path) -> str:
    """Return the URL of a store that several processes may open."""
    if request.param == "sqlite":
        return str(tmp_path / "store.db")
    server = request.getfixturevalue("server")
    name = f"case_{random.getrandbits(40)}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return server.replace("/postgres", f"/{name}")


def start(function: Callable[..., None], *arguments: Any) -> tuple[multiprocessing.Process, Connection]:
    """Start a process and return it with the pipe on which it tells."""
    receiving, telling = processes.Pipe(duplex=False)
    process = processes.Process(target=function, args=(*arguments, telling), daemon=True)
    process.start()
    telling.close()
    return process, receiving


def told(pipe: Connection) -> list[Any]:
    """Return everything that a process told until it ended."""
    messages = []
    while True:
        try:
            messages.append(pipe.recv())
        except EOFError:
            return messages


def whole(path: str) -> None:
    """Check that SQLite finds no fault in a store."""
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()


# --- kills ---


def write_until_killed(url: str, first_round: int, telling: Connection) -> None:
    """Add rounds, labels and rows without end, and tell of each after it was stored."""
    with Store.open(url) as store:
        number = first_round
        while True:
            store.add_round("run", number, [candidate(i, number) for i in range(PER_ROUND)], {"n": PER_ROUND})
            telling.send(("round", number))
            for i in range(PER_ROUND):
                assert add_label(store, f"r{number:02d}-{i:04d}", LABEL if i % 3 else FAILED)
                telling.send(("label", f"r{number:02d}-{i:04d}"))
            store.add_rows("run", (candidate(i, number) for i in range(PER_CALL)))
            telling.send(("rows", number))
            number += 1


def test_a_killed_writer_leaves_whole_transactions_and_everything_it_was_told(url: str) -> None:
    generator = random.Random(0)
    with Store.open(url) as store:
        store.start_run("run", {})
    promised: list[tuple[str, Any]] = []
    for _ in range(N_KILLS):
        with Store.open(url) as store:
            first_round = max(store.rounds("run"), default=0) + 1
        process, pipe = start(write_until_killed, url, first_round)
        promised.append(pipe.recv())
        time.sleep(generator.uniform(0.0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        promised += told(pipe)
        if "://" not in url:
            whole(url)
        check(url, promised)


def check(url: str, promised: list[tuple[str, Any]]) -> None:
    """Check that the store holds whole rounds, labels and calls of `add_rows`, and those that were promised."""
    with Store.open(url) as store:
        rounds = store.rounds("run")
        assert {number for kind, number in promised if kind == "round"} <= set(rounds)
        assert len(store.candidates("run")) == PER_ROUND * len(rounds)
        assert store.round_info("run", rounds[-1]) == {"n": PER_ROUND}
        labels = {item.candidate.candidate_id for item in store.labels("run", "chgnet")}
        assert {name for kind, name in promised if kind == "label"} <= labels
        left = [item.candidate_id for number in rounds for item in store.unlabelled("run", number, "chgnet")]
        assert labels.isdisjoint(left)
        assert len(labels) + len(left) == PER_ROUND * len(rounds)
        assert store.n_seen("run") % PER_CALL == 0
        assert store.n_seen("run") >= PER_CALL * sum(kind == "rows" for kind, _ in promised)
        assert not any(add_label(store, name) for name in sorted(labels)[-PER_ROUND:])  # none is bought twice


def insert_until_killed(url: str, telling: Connection) -> None:
    """Add rows in transactions that take long, and tell of the first."""
    discover.store.ROWS_PER_TRANSACTION = 5_000
    with Store.open(url) as store:
        telling.send("open")
        store.add_rows("run", (candidate(i) for i in range(10**9)))


def test_a_kill_within_a_bulk_insert_leaves_whole_transactions(tmp_path: Path) -> None:
    generator = random.Random(1)
    n_seen = []
    for attempt in range(4):
        path = tmp_path / f"{attempt}.db"
        with Store.open(path) as store:
            store.start_run("run", {})
        process, pipe = start(insert_until_killed, str(path))
        assert pipe.recv() == "open"
        time.sleep(generator.uniform(0.1, 0.6))
        process.kill()
        process.join()
        whole(str(path))
        with Store.open(path) as store:
            n_seen.append(store.n_seen("run"))
            # What a resumed run adds again is completed, not doubled.
            assert n_seen[-1] + store.add_rows("run", (candidate(i) for i in range(n_seen[-1] + 7))) == n_seen[-1] + 7
    assert all(n % 5_000 == 0 for n in n_seen)


# --- many writers ---


def open_and_write(url: str, worker: int, telling: Connection) -> None:
    """Open a store that others open at the same time, add a round, and try to buy every label of every round."""
    try:
        with Store.open(url) as store:
            store.start_run("run", {"worker": worker})
            store.add_round("run", worker, [candidate(i, worker) for i in range(PER_ROUND)], {})
            for i in range(PER_ROUND):
                store.add_rows("run", [candidate(i, worker)])
                for number in store.rounds("run"):
                    if add_label(store, f"r{number:02d}-{i:04d}"):
                        telling.send(f"r{number:02d}-{i:04d}")
    except StoreError as error:
        telling.send(error)


def test_many_processes_may_open_and_write_one_store(url: str) -> None:
    running = [start(open_and_write, url, worker) for worker in range(1, 5)]
    bought = [message for _, pipe in running for message in told(pipe)]
    for process, _ in running:
        process.join()
        assert process.exitcode == 0
    assert [message for message in bought if not isinstance(message, str)] == []
    assert len(bought) == len(set(bought))  # no label was bought twice
    with Store.open(url) as store:
        assert store.runs() == ["run"]
        assert store.rounds("run") == [1, 2, 3, 4]
        assert len(store.candidates("run")) == 4 * PER_ROUND
        assert {item.candidate.candidate_id for item in store.labels("run", "chgnet")} == set(bought)
        assert store.n_seen("run") == 4 * PER_ROUND
    if "://" not in url:
        whole(url)


def test_a_writer_that_waits_too_long_says_who_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.db"
    monkeypatch.setattr(discover.store_database, "_BUSY_SECONDS", 0.05)
    with Store.open(path) as store:
        store.start_run("run", {})
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another process kept the store"):
            store.add_round("run", 1, [], {})
        assert store.runs() == ["run"]  # readers need not wait
        other.execute("ROLLBACK")
        other.close()
        store.add_round("run", 1, [], {})


# --- full disks ---


def test_a_full_disk_loses_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with Store.open(path) as store:
        store.start_run("run", {})
        store.add_round("run", 1, [candidate(i) for i in range(200)], {})
        with store._engine.connect() as connection:
            n_pages = connection.scalar(sa.text("PRAGMA page_count"))
            connection.exec_driver_sql(f"PRAGMA max_page_count={n_pages + 5}")  # holds for this pooled connection
        stored = []
        with pytest.raises(StoreError, match=r"the disk is full; free some space, then continue with resume=DIR"):
            stored.extend(i for i in range(200) if add_label(store, f"r01-{i:04d}"))
        assert store.n_labels("run", "chgnet") == len(stored) > 0
        with pytest.raises(StoreError, match="the disk is full"):
            store.add_rows("run", (candidate(i) for i in range(10_000)))
        with pytest.raises(StoreError, match="the disk is full"):
            store.add_round("run", 2, [candidate(i, 2) for i in range(200)], {})
        assert store.rounds("run") == [1]
        assert store.n_seen("run") == 0
        whole(str(path))
        with store._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count=100000")
        assert [i for i in range(200) if add_label(store, f"r01-{i:04d}")] == list(range(len(stored), 200))


def write_into_a_small_quota(path: str, limit: int, telling: Connection) -> None:
    """Add labels until files may not grow, as with a quota, and tell the names of those that were stored."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with Store.open(path) as store:
        try:
            for i in range(200):
                if add_label(store, f"r01-{i:04d}"):
                    telling.send(f"r01-{i:04d}")
        except StoreError as error:
            telling.send(error)


def test_a_file_that_may_not_grow_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with Store.open(path) as store:
        store.start_run("run", {})
        store.add_round("run", 1, [candidate(i) for i in range(200)], {})
    process, pipe = start(write_into_a_small_quota, str(path), path.stat().st_size + 60_000)
    *names, error = told(pipe)
    process.join()
    assert isinstance(error, StoreError)
    assert "quota is reached; check it, then continue with resume=DIR" in str(error)
    whole(str(path))
    with Store.open(path) as store:
        assert [item.candidate.candidate_id for item in store.labels("run", "chgnet")] == names
        assert add_label(store, f"r01-{len(names):04d}")
