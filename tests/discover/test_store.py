"""The store gives back what it was given, on SQLite and on a real PostgreSQL server alike."""

import json
import math
import sqlite3
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

import discover.store
from discover.errors import is_ours
from discover.oracle.base import LabelStatus
from discover.store import Seen, Store, StoreError
from discover.store_database import is_store, open_engine, parse_url
from discover.store_records import from_json, read_structure, structure_text, to_json
from discover.store_schema import METADATA, STEPS, schema_version, upgrade
from tests.discover.postgres_server import PASSWORD, PASSWORD_IN_URL, postgres_server
from tests.discover.store_examples import FAILED, LABEL, add_label, candidate


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    with postgres_server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path: Path) -> str:
    """Return the URL of a store that is not there yet."""
    if request.param == "sqlite":
        return str(tmp_path / "store.db")
    return own_schema(request.getfixturevalue("server"), tmp_path.name)


def own_schema(server: str, name: str) -> str:
    """Return the URL of an empty schema of the server's database."""
    engine = sa.create_engine(server)
    with engine.begin() as connection:
        connection.execute(sa.text(f'CREATE SCHEMA "{name}"'))
    engine.dispose()
    return f'{server}?options=-csearch_path%3D"{name}"'


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with Store.open(url) as opened:
        opened.start_run("run", {"rounds": 3})
        yield opened


def plain(record: Any) -> Any:
    """Return a record as nested plain values in which NaN equals NaN and structures show every digit."""
    if isinstance(record, Structure):
        return [record.lattice.matrix.tolist(), [site.specie.Z for site in record], record.frac_coords.tolist()]
    if isinstance(record, dict):
        return {key: plain(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [plain(value) for value in record]
    return "NaN" if isinstance(record, float) and math.isnan(record) else record


def fields(record: Any) -> Any:
    return plain({name: getattr(record, name) for name in record.__dataclass_fields__})


# --- rounds and candidates ---


def test_a_candidate_comes_back_as_it_was_added(store: Store) -> None:
    lattice = Lattice([[0.1, 1 / 3, 4.0], [5.0, 0.0, 1e-17], [0.0, 6.1, 0.2]])  # left-handed and not standard
    odd = Structure(lattice, ["Na", "Cl"], [[-0.1, 1.5, 1 / 3], [0.5, 2**-40, 0.7]])
    given_to_it = [
        candidate(0),
        candidate(1, structure=None, log_reward=math.nan, predictions={}),
        candidate(2, structure=odd, acquisition=-1.7976931348623157e308, source="substitution"),
    ]
    store.add_round("run", 1, given_to_it, {"note": "first", "hit_rate": math.nan})
    assert [fields(item) for item in store.candidates("run")] == [fields(item) for item in given_to_it]
    assert store.round_info("run", 1) == {"note": "first", "hit_rate": None}


def test_candidates_come_in_the_order_they_were_added(store: Store) -> None:
    store.add_round("run", 2, [candidate(3, 2), candidate(1, 2)], {})
    store.add_round("run", 1, [candidate(9), candidate(0), candidate(5)], {})
    assert store.rounds("run") == [1, 2]
    assert [item.candidate_id for item in store.candidates("run", 1)] == ["r01-0009", "r01-0000", "r01-0005"]
    assert [item.candidate_id for item in store.candidates("run")][3:] == ["r02-0003", "r02-0001"]
    assert store.candidates("run", 7) == []


def test_a_round_is_added_once(store: Store) -> None:
    store.add_round("run", 1, [candidate(0)], {"first": True})
    with pytest.raises(StoreError, match="round 1 of run run is in the store already"):
        store.add_round("run", 1, [candidate(1)], {})
    assert [item.candidate_id for item in store.candidates("run")] == ["r01-0000"]
    assert store.round_info("run", 1) == {"first": True}


@pytest.mark.parametrize("number", [0, 1])
def test_a_round_with_a_taken_id_leaves_nothing(store: Store, number: int) -> None:
    store.add_round("run", 1, [candidate(0)], {})
    taken = candidate(number, 2, candidate_id=f"r01-000{number}")
    with pytest.raises(StoreError, match="ids are unique"):
        store.add_round("run", 2, [candidate(5, 2), taken, taken], {})
    assert store.rounds("run") == [1]
    assert len(store.candidates("run")) == 1


def test_an_empty_round_is_a_round(store: Store) -> None:
    store.add_round("run", 1, [], {})
    assert store.rounds("run") == [1]


def test_a_candidate_of_another_round_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="r02-0000 says round 2 but is added to round 1"):
        store.add_round("run", 1, [candidate(0, 2)], {})


def test_numpy_values_are_taken_as_numbers(store: Store) -> None:
    item = candidate(
        0,
        space_group=np.int64(225),
        n_atoms=np.int32(2),
        log_reward=np.float32(0.5),
        predictions={"band_gap": (np.float64(1.5), np.float32(0.5))},
        crystal={"elements": np.array([11, 17]), "lattice": np.array([5.5, np.nan])},
    )
    store.add_round("run", 1, [item], {"folder": Path("runs"), "n": np.int64(3), "ok": np.bool_(True)})
    (back,) = store.candidates("run")
    assert (back.space_group, back.n_atoms, back.log_reward) == (225, 2, 0.5)
    assert back.predictions == {"band_gap": (1.5, 0.5)}
    assert back.crystal == {"elements": [11, 17], "lattice": [5.5, None]}
    assert store.round_info("run", 1) == {"folder": "runs", "n": 3, "ok": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_reward": -math.inf}, "log_reward of r01-0000 is -inf; the store takes finite numbers"),
        ({"predictions": {"band_gap": (1.0, math.inf)}}, "predictions of r01-0000.band_gap is inf"),
        ({"crystal": {"lattice": {1.0, 2.0}}}, "crystal of r01-0000.lattice holds a set"),
        ({"structure": Structure(Lattice.cubic(4), ["Na"], [[math.nan, 0, 0]])}, "structure of r01-0000 holds NaN"),
        ({"structure": Structure(Lattice.cubic(4), [{"Na": 0.5}], [[0, 0, 0]])}, "r01-0000 is disordered"),
    ],
)
def test_what_cannot_be_stored_is_refused(store: Store, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        store.add_round("run", 1, [candidate(0, **changes)], {})
    assert store.rounds("run") == []


# --- runs ---


def test_a_run_that_is_there_stays_as_it_is(store: Store) -> None:
    store.start_run("run", {"rounds": 99})
    assert store.run_config("run") == {"rounds": 3}
    store.start_run("another", {})
    assert store.runs() == ["run", "another"]


def test_runs_of_one_store_are_apart(store: Store) -> None:
    store.start_run("another", {})
    for run in ("run", "another"):
        store.add_round(run, 1, [candidate(0)], {"run": run})
    assert add_label(store, "r01-0000")
    assert store.formulas_elsewhere("run") == {candidate(0).formula}
    store.start_run("third", {})
    assert store.formulas_elsewhere("third") == {candidate(0).formula}
    assert store.unlabelled("another", 1, "chgnet") == store.candidates("another")
    assert store.labels("another", "chgnet") == []
    assert store.add_rows("run", [candidate(0)]) == store.add_rows("another", [candidate(0)]) == 1


def test_an_unknown_run_is_named_with_the_known_ones(store: Store) -> None:
    with pytest.raises(StoreError, match="has no run ruin; its runs: run"):
        store.candidates("ruin")
    with pytest.raises(StoreError, match="run run has no round 4; it has \\[\\]"):
        store.round_info("run", 4)


# --- labels ---


def test_a_label_comes_back_as_it_was_added(store: Store) -> None:
    store.add_round("run", 1, [candidate(0), candidate(1)], {})
    assert add_label(store, "r01-0000")
    assert add_label(store, "r01-0001", FAILED)
    first, second = store.labels("run", "chgnet")
    assert fields(first.label) == fields(LABEL)
    assert fields(second.label) == fields(FAILED)
    assert isinstance(first.label.status, LabelStatus)
    assert fields(first.candidate) == fields(candidate(0))
    assert (first.e_above_hull, first.hull) == (0.02, "MP 2020")
    assert store.n_labels("run", "chgnet") == 2
    assert store.settings("run", "chgnet") == [{"fmax": 0.05, "steps": 200}]


def test_a_second_label_of_one_oracle_changes_nothing(store: Store) -> None:
    store.add_round("run", 1, [candidate(0)], {})
    assert add_label(store, "r01-0000")
    assert not add_label(store, "r01-0000", FAILED)
    assert fields(store.labels("run", "chgnet")[0].label) == fields(LABEL)
    assert add_label(store, "r01-0000", FAILED, oracle="matgl")
    assert store.oracles("run") == ["chgnet", "matgl"]


def test_labels_come_by_round_and_place_not_by_time(store: Store) -> None:
    store.add_round("run", 1, [candidate(i) for i in (4, 2, 3)], {})
    store.add_round("run", 2, [candidate(0, 2)], {})
    for name in ("r02-0000", "r01-0003", "r01-0004", "r01-0002"):
        assert add_label(store, name)
    names = [item.candidate.candidate_id for item in store.labels("run", "chgnet")]
    assert names == ["r01-0004", "r01-0002", "r01-0003", "r02-0000"]
    assert [item.candidate.round for item in store.labels("run", "chgnet", before_round=2)] == [1, 1, 1]


def test_unlabelled_are_those_without_a_label_of_that_oracle(store: Store) -> None:
    store.add_round("run", 1, [candidate(i) for i in range(3)], {})
    store.add_round("run", 2, [candidate(0, 2)], {})
    add_label(store, "r01-0001", FAILED)
    add_label(store, "r01-0002", oracle="matgl")
    assert [item.candidate_id for item in store.unlabelled("run", 1, "chgnet")] == ["r01-0000", "r01-0002"]
    assert [item.candidate_id for item in store.unlabelled("run", 1, "matgl")] == ["r01-0000", "r01-0001"]


def test_a_label_needs_its_candidate(store: Store) -> None:
    store.add_round("run", 1, [candidate(0)], {})
    with pytest.raises(StoreError, match="run run has no candidate r01-0009"):
        add_label(store, "r01-0009")


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_numbers_of_a_label_are_refused(store: Store, value: float) -> None:
    store.add_round("run", 1, [candidate(0)], {})
    for label in (replace(LABEL, energy_per_atom=value), replace(LABEL, properties={"energy_per_atom": value})):
        with pytest.raises(StoreError, match=r"energy_per_atom is -?inf"):
            add_label(store, "r01-0000", label)
    with pytest.raises(StoreError, match="e_above_hull is"):
        store.add_label("run", "r01-0000", "chgnet", LABEL, e_above_hull=value, hull="MP", settings={})
    assert store.n_labels("run", "chgnet") == 0


def test_an_unknown_distance_to_the_hull_stays_unknown(store: Store) -> None:
    store.add_round("run", 1, [candidate(0)], {})
    store.add_label("run", "r01-0000", "chgnet", LABEL, e_above_hull=math.nan, hull="none", settings={})
    assert math.isnan(store.labels("run", "chgnet")[0].e_above_hull)


def test_a_reason_of_any_characters_does_not_lose_the_label(store: Store) -> None:
    store.add_round("run", 1, [candidate(0)], {})
    assert add_label(store, "r01-0000", replace(FAILED, reason="bad\0byte \ud800 Å\nnext"))
    assert store.labels("run", "chgnet")[0].label.reason == "bad?byte ? Å\nnext"


# --- crystals that were seen ---


def test_rows_that_were_seen_are_counted_and_found(store: Store) -> None:
    rows = [candidate(i, formula="NaCl" if i % 3 else "TiO2") for i in range(7)]
    assert store.add_rows("run", iter(rows)) == 7
    assert store.add_rows("run", [candidate(1, 2), candidate(8, 2, log_reward=math.nan)]) == 2
    assert store.n_seen("run") == 9
    assert store.n_seen("run", "TiO2") == 3
    assert store.seen_formulas("run") == {"NaCl": 6, "TiO2": 3}
    assert store.best_seen("run", 2) == [
        Seen(rows[0].key, 1, "TiO2", 225, -0.1),
        Seen(rows[1].key, 1, "NaCl", 225, -1.1),
    ]
    assert len(store.best_seen("run", 99)) == 8
    assert [item.round for item in store.find_seen("run", rows[1].key)] == [1, 2]
    assert math.isnan(store.find_seen("run", candidate(8).key)[0].log_reward)
    assert store.candidates("run") == []


def test_rows_added_again_are_not_doubled(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover.store, "ROWS_PER_TRANSACTION", 4)
    rows = [candidate(i) for i in range(10)]
    assert store.add_rows("run", [*rows[:3], *rows[:3]]) == 3
    assert store.add_rows("run", rows) == 7
    assert store.add_rows("run", []) == 0
    assert store.n_seen("run") == 10


def test_rows_before_an_error_are_kept_by_whole_transactions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discover.store, "ROWS_PER_TRANSACTION", 4)
    with pytest.raises(StoreError, match="log_reward of r01-0006 is inf"):
        store.add_rows("run", (candidate(i, log_reward=math.inf if i == 6 else 0.0) for i in range(10)))
    assert store.n_seen("run") == 4


# --- opening ---


def test_a_store_keeps_everything_when_it_is_closed(url: str) -> None:
    with Store.open(url) as store:
        store.start_run("run", {})
        store.add_round("run", 1, [candidate(0)], {})
        add_label(store, "r01-0000")
        store.close()
    with Store.open(url) as again:
        assert again.rounds("run") == [1]
        assert fields(again.labels("run", "chgnet")[0].label) == fields(LABEL)


def test_nothing_but_adding_and_reading_happens(store: Store) -> None:
    words = set()
    sa.event.listen(
        store._engine, "before_cursor_execute", lambda _c, _u, statement, *_: words.add(statement.split()[0].upper())
    )
    store.start_run("run", {})
    store.add_round("run", 1, [candidate(0)], {})
    add_label(store, "r01-0000")
    add_label(store, "r01-0000")
    store.add_rows("run", [candidate(0)])
    store.labels("run", "chgnet")
    assert words - {"BEGIN"} == {"INSERT", "SELECT"}


FIRST_STORE = """
CREATE TABLE store_schema (version INTEGER NOT NULL PRIMARY KEY, recorded TEXT NOT NULL);
CREATE TABLE runs (run_id INTEGER NOT NULL PRIMARY KEY, run TEXT NOT NULL UNIQUE, config TEXT NOT NULL,
    recorded TEXT NOT NULL);
CREATE TABLE rounds (run_id INTEGER NOT NULL REFERENCES runs (run_id), round INTEGER NOT NULL, info TEXT NOT NULL,
    recorded TEXT NOT NULL, PRIMARY KEY (run_id, round));
CREATE TABLE candidates (run_id INTEGER NOT NULL, candidate_id TEXT NOT NULL, round INTEGER NOT NULL,
    position INTEGER NOT NULL, source TEXT NOT NULL, crystal TEXT NOT NULL, key TEXT NOT NULL, formula TEXT NOT NULL,
    chemical_system TEXT NOT NULL, space_group INTEGER NOT NULL, n_atoms INTEGER NOT NULL, prototype TEXT NOT NULL,
    log_reward DOUBLE PRECISION, acquisition DOUBLE PRECISION, predictions TEXT NOT NULL, structure TEXT,
    PRIMARY KEY (run_id, candidate_id), UNIQUE (run_id, round, position),
    FOREIGN KEY (run_id, round) REFERENCES rounds (run_id, round));
CREATE TABLE labels (run_id INTEGER NOT NULL, candidate_id TEXT NOT NULL, oracle TEXT NOT NULL, status TEXT NOT NULL,
    reason TEXT NOT NULL, structure TEXT, energy_per_atom DOUBLE PRECISION, formation_energy_per_atom DOUBLE PRECISION,
    initial_formation_energy_per_atom DOUBLE PRECISION, band_gap DOUBLE PRECISION, e_above_hull DOUBLE PRECISION,
    hull TEXT NOT NULL, properties TEXT NOT NULL, space_group_before INTEGER, space_group_after INTEGER,
    n_steps INTEGER NOT NULL, seconds DOUBLE PRECISION, settings TEXT NOT NULL, recorded TEXT NOT NULL,
    PRIMARY KEY (run_id, candidate_id, oracle),
    FOREIGN KEY (run_id, candidate_id) REFERENCES candidates (run_id, candidate_id));
INSERT INTO store_schema VALUES (1, '2026-11-01T00:00:00+00:00');
INSERT INTO runs VALUES (1, 'old', '{"rounds":5}', '2026-11-01T00:00:00+00:00');
INSERT INTO rounds VALUES (1, 1, '{}', '2026-11-01T00:00:00+00:00');
INSERT INTO candidates VALUES (1, 'r01-0000', 1, 0, 'sampler', '{"space_group":225}', 'k', 'NaCl', 'Cl-Na', 225, 2,
    'rock salt', -0.5, NULL, '{"band_gap":[5.0,null]}', NULL);
INSERT INTO labels VALUES (1, 'r01-0000', 'chgnet', 'failed', 'killed after 300 s', NULL, NULL, NULL, NULL, NULL, NULL,
    'MP', '{}', 225, NULL, 0, 300.0, '{}', '2026-11-01T00:00:00+00:00');
"""


def make_first_store(url: str) -> None:
    """Write, by hand, a store of the first schema, which had no table of crystals that were seen."""
    engine = sa.create_engine(url if "://" in url else f"sqlite:///{url}")
    with engine.begin() as connection:
        for statement in FIRST_STORE.split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)
    engine.dispose()


def tables_of(store: Store) -> dict[str, Any]:
    """Return columns, keys and indexes of every table."""
    inspector = sa.inspect(store._engine)
    return {
        name: {
            "columns": [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(name)],
            "primary": inspector.get_pk_constraint(name)["constrained_columns"],
            "unique": sorted(found["column_names"] for found in inspector.get_unique_constraints(name)),
            "indexes": sorted(
                (index["name"], *index["column_names"]) for index in inspector.get_indexes(name) if not index["unique"]
            ),
            "foreign": sorted(
                (tuple(key["constrained_columns"]), key["referred_table"]) for key in inspector.get_foreign_keys(name)
            ),
        }
        for name in inspector.get_table_names()
    }


def test_an_older_store_is_brought_up_to_date_with_what_it_holds(url: str) -> None:
    make_first_store(url)
    with Store.open(url) as store:
        assert store.runs() == ["old"]
        (item,) = store.labels("old", "chgnet")
        assert (item.label.status, item.label.reason) == (LabelStatus.FAILED, "killed after 300 s")
        assert plain(item.candidate.predictions) == {"band_gap": [5.0, "NaN"]}
        assert store.add_rows("old", [candidate(0)]) == 1
        store.start_run("new", {})
    with Store.open(url) as again:
        assert again.n_seen("old") == 1


def test_the_steps_end_with_the_tables_that_queries_expect(store: Store, request, tmp_path: Path) -> None:
    with store._reading() as connection:
        assert schema_version(connection) == len(STEPS)
    if store._engine.dialect.name == "sqlite":
        engine = sa.create_engine(f"sqlite:///{tmp_path / 'expected.db'}")
    else:
        engine = sa.create_engine(own_schema(request.getfixturevalue("server"), f"{tmp_path.name}-expected"))
    METADATA.create_all(engine)
    with Store(engine, "expected") as expected:
        assert tables_of(store) == tables_of(expected)


def test_a_step_that_fails_leaves_the_store_as_it_was(url: str) -> None:
    make_first_store(url)
    broken = (STEPS[0], ("CREATE TABLE half (a INTEGER)", "CREATE TABLE half (a INTEGER)"))
    engine = open_engine(parse_url(url), "it")
    store = Store(engine, "it")
    with pytest.raises(StoreError, match="half"), store._writing() as connection:
        upgrade(connection, "it", broken)
    with store._reading() as connection:
        assert schema_version(connection) == 1
        assert "half" not in sa.inspect(connection).get_table_names()
    store.close()


def test_a_store_of_a_newer_release_is_refused(url: str) -> None:
    with Store.open(url) as store, store._writing() as connection:
        connection.exec_driver_sql("INSERT INTO store_schema VALUES (99, '2030-01-01')")
    with pytest.raises(StoreError, match=rf"newer release \(schema 99, this one reads up to {len(STEPS)}\); update"):
        Store.open(url)


def test_a_database_of_something_else_is_refused(url: str) -> None:
    engine = sa.create_engine(url if "://" in url else f"sqlite:///{url}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE customers (id INTEGER)")
    engine.dispose()
    with pytest.raises(StoreError, match="holds tables of something else; name a new file"):
        Store.open(url)


def test_files_that_cannot_be_a_store_say_so(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, but it is longer than the header of one" * 20)
    with pytest.raises(StoreError, match=r"text\.db: the file is no store; name a new file"):
        Store.open(tmp_path / "text.db")
    with pytest.raises(StoreError, match=r"is a folder; name a file in it, such as .*store\.db"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="cannot be opened; check that its folder exists"):
        Store.open(tmp_path / "absent" / "store.db")
    with pytest.raises(StoreError, match="needs a name"):
        Store.open("")


def test_a_damaged_store_says_so(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    Store.open(path).close()
    content = bytearray(path.read_bytes())
    content[100:4096] = bytes(3996)  # the page that lists the tables
    path.write_bytes(content)
    with pytest.raises(StoreError, match="the file is damaged; restore a copy"):
        Store.open(path)


def test_a_path_and_its_url_are_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store.open(Path("a store?#%.db")) as store:
        store.start_run("run", {})
    assert (tmp_path / "a store?#%.db").is_file()
    assert is_store(tmp_path / "a store?#%.db")
    with Store.open(":memory:") as store:
        store.start_run("run", {})
    with Store.open("sqlite:///:memory:") as store:
        assert store.runs() == ["run"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "postgresql+psycopg://keeper:hunter2@127.0.0.1:1/campaign",
            "database campaign at 127.0.0.1:1: the server cannot",
        ),
        ("postgresql://keeper:hunter2@127.0.0.1:1/campaign", "database campaign at 127.0.0.1:1"),
        ("postgresql+psycopg://keeper@127.0.0.1:1/campaign?password=hunter2", "at 127.0.0.1:1"),
        ("postgresql+psycopg://keeper:hunter2@no-such-host.invalid/campaign", "at no-such-host.invalid: the server"),
        ("postgresql+psycopg://keeper:x@hunter2@127.0.0.1:1/campaign", "more than one @; in a password write @ as %40"),
        ("postgresql+psycopg://keeper:hunter2@127.0.0.1:port/campaign", "URL cannot be read"),
        ("mysql://keeper:hunter2@127.0.0.1/campaign", "a store is SQLite or postgresql"),
        ("sqlite:///store.db?key=hunter2", "a SQLite store is a file"),
        ("://hunter2", "URL cannot be read"),
    ],
)
def test_a_url_that_leads_nowhere_is_explained_without_its_password(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        Store.open(url)
    assert is_ours(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value)).replace(f'"{url}"', "")


def test_a_server_that_refuses_is_explained_without_the_password(server: str) -> None:
    with pytest.raises(StoreError, match=r"at 127\.0\.0\.1:\d+: .*(refuses the user|authentication)") as caught:
        Store.open(server.replace(PASSWORD_IN_URL, "hunter2"))
    assert "hunter2" not in str(caught.value)
    with pytest.raises(StoreError, match=r"database nowhere at .*(no such database|does not exist)") as caught:
        Store.open(server.replace("/postgres", "/nowhere"))
    assert PASSWORD not in str(caught.value)


# --- text of numbers ---

numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(lattice=st.lists(numbers, min_size=9, max_size=9), coords=st.lists(numbers, min_size=3, max_size=3))
def test_every_digit_of_a_structure_survives(lattice: list[float], coords: list[float]) -> None:
    structure = Structure(Lattice(lattice), ["Og"], [coords])
    assert plain(read_structure(structure_text(structure, "it"))) == plain(structure)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values)
def test_every_json_value_survives_as_plain_ascii(value: Any) -> None:
    text = to_json(value, "it")
    assert from_json(text) == value
    assert text.isascii()
    assert "\0" not in text


def test_sqlite_shows_plain_numbers_and_json_to_other_programs(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store.db") as store:
        store.start_run("run", {})
        store.add_round("run", 1, [candidate(0)], {})
        add_label(store, "r01-0000")
    connection = sqlite3.connect(tmp_path / "store.db")
    (row,) = connection.execute("SELECT energy_per_atom, initial_formation_energy_per_atom, structure FROM labels")
    connection.close()
    assert row[:2] == (LABEL.energy_per_atom, None)
    assert json.loads(row[2])["atomic_numbers"] == [site.specie.Z for site in LABEL.structure]
