"""A run that has finished is given more rounds, and learns from results of DFT that were added to it."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from discover import add_results, campaign, run
from discover.campaign import Campaign, open_store
from discover.campaign_records import DFT, IMPLIED_HULL, crystals_of, with_dft
from discover.config import RunConfig
from discover.errors import ConfigError
from discover.oracle.base import Label, LabelStatus
from discover.progress import LABELS, ROUNDS
from discover.run_folder import open_run_folder
from proxies import PropertyEnsemble

TINY = [
    "reward=stability",
    "train.n_steps=2",
    "train.batch_size=32",
    "n_candidates=30",
    "n_structures=1",
    "oracle.name=callable",
    "oracle.model=counting_oracle:energy",
    "engine.workers=0",
    "restrict.elements=[Na,Mg,Al,O,S,Cl]",
    "restrict.n_elements=[2,3]",
]
#: Every call leaves a line, so that a test can count them.
ORACLE = """
from pathlib import Path

def energy(structure):
    with Path("calls").open("a") as file:
        file.write("one\\n")
    return -1.0 - 0.1 * len(structure.composition) - 0.001 * structure.density
"""
DEEP = -4.5  # eV/atom, far from what the oracle says


@pytest.fixture(scope="module", autouse=True)
def little_rehearsal() -> Iterator[None]:
    """Have proxies rehearse few crystals: what they forget matters to no test here, and drawing takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(campaign, "_REHEARSED", 64)
        yield


@pytest.fixture(scope="module")
def two_rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of two rounds and five checks; tests take copies."""
    return _finished(tmp_path_factory.mktemp("two"), "rounds=2", "oracle.budget=5", "learn.sampler_steps=2")


def _finished(place: Path, *words: str) -> Path:
    (place / "counting_oracle.py").write_text(ORACLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run.main([*TINY, *words, f"output={place / 'run'}"])
    return place / "run"


@pytest.fixture
def copy(two_rounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of a copy, beside an oracle whose calls are counted from here."""
    (tmp_path / "counting_oracle.py").write_text(ORACLE)
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(two_rounds, tmp_path / "run")


def n_calls(folder: Path) -> int:
    calls = folder.parent / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / LABELS, keep_default_na=False, na_values=[""])


def add(folder: Path, label: Label, *, n: int = 99) -> list[str]:
    """Add a DFT label to each of the first `n` candidates, as `discover.add_results` does; return their ids."""
    store, name, _ = open_store(open_run_folder(folder))
    with store:
        found = [item.candidate_id for item in store.candidates(name) if item.structure is not None][:n]
        for candidate in found:
            store.add_label(name, candidate, DFT, label, e_above_hull=math.nan, hull="", settings={})
    return found


def stored(folder: Path) -> list[str]:
    """Return what every label of the run's own oracle says, as text."""
    store, name, _ = open_store(open_run_folder(folder))
    with store:
        labels = store.labels(name, "callable")
        return [f"{item.candidate.candidate_id} {item.label} {item.e_above_hull}" for item in labels]


def energies(folder: Path, proxies: Path) -> torch.Tensor:
    """Return what proxies say of the formation energies of the first two rounds' candidates, in eV/atom."""
    store, name, _ = open_store(open_run_folder(folder))
    with store:
        known = [item for item in store.candidates(name) if item.round < 3 and item.structure is not None]
        crystals = crystals_of([item.crystal for item in known])
    return PropertyEnsemble.load(proxies).predict_all(crystals)["formation_energy_per_atom"].mean


def test_more_rounds_follow_and_what_was_done_stays(copy: Path) -> None:
    before, labels_before = stored(copy), table(copy)
    run.main([f"resume={copy}", "rounds=4", "oracle.budget=8"])
    assert stored(copy)[: len(before)] == before
    after = table(copy)
    checked = after[after["status"] != "failed"]
    assert checked["round"].value_counts().sort_index().tolist() == [2, 3, 1, 2]  # 8 over 4 would be 2 each
    unchanged = ["candidate_id", "formation_energy", "e_above_hull", "log_reward", "oracle"]
    pd.testing.assert_frame_equal(after[unchanged].head(len(before)), labels_before[unchanged])
    assert after["candidate_id"].is_unique
    assert n_calls(copy) == 3  # nothing is bought twice
    assert pd.read_csv(copy / ROUNDS)["round"].tolist() == [1, 2, 3, 4]
    folder = open_run_folder(copy)
    config = folder.config(RunConfig)
    assert (config.rounds, config.budget, config.extends) == (4, 8, (2, 5))
    (event,) = folder.read_log("extended")
    assert (event["rounds"], event["budget"]) == ([2, 4], [5, 8])
    run.main([f"resume={copy}", "rounds=4", "oracle.budget=8"])  # the same again has nothing to do
    assert len(folder.read_log("extended")) == 1
    assert n_calls(copy) == 3


def test_the_added_rounds_learn_from_results_of_dft(copy: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(copy, tmp_path / "plain")
    add(copy, Label(status=LabelStatus.GIVEN, formation_energy_per_atom=DEEP))
    before = stored(copy)
    for folder in (plain, copy):
        run.main([f"resume={folder}", "rounds=3", "oracle.budget=6"])
    third = Path("rounds") / "03" / "proxies"
    assert (energies(copy, copy / third) < energies(plain, plain / third) - 0.2).all()
    assert (energies(copy, copy / "proxies") < energies(plain, plain / "proxies") - 0.2).all()
    second = Path("rounds") / "02" / "proxies"  # taught before the results came
    assert energies(copy, copy / second).equal(energies(plain, plain / second))
    assert stored(copy)[: len(before)] == before
    checked = table(copy).query("status != 'failed'")
    assert checked["oracle"].tolist() == [DFT] * 5 + ["callable"]
    assert (table(plain)["oracle"] == "callable").all()


def test_tables_finalists_and_proxies_follow_results_without_more_rounds(copy: Path) -> None:
    before = energies(copy, copy / "proxies")
    plain = table(copy)
    (first,) = add(copy, Label(status=LabelStatus.GIVEN, formation_energy_per_atom=DEEP), n=1)
    run.main([f"resume={copy}"])
    row = table(copy).set_index("candidate_id").loc[first]
    assert row["formation_energy"] == DEEP
    old = plain.set_index("candidate_id").loc[first]
    assert row["e_above_hull"] - old["e_above_hull"] == pytest.approx(DEEP - old["formation_energy"], abs=1e-4)
    assert row["hit"]
    assert pd.read_csv(copy / "finalists.csv").set_index("name").loc[first, "formation_energy"] == DEEP
    assert f"1 of {len(plain)} have numbers of results that were added" in (copy / "summary.md").read_text()
    assert not energies(copy, copy / "proxies").equal(before)


def test_a_success_of_dft_where_the_oracle_failed_has_an_energy_above_the_implied_hull(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = Label(status=LabelStatus.GIVEN, formation_energy_per_atom=DEEP)
    monkeypatch.setattr(add_results, "read_results", lambda _, proposed, **__: dict.fromkeys(proposed, deep))
    own = table(copy).query("status != 'failed'").set_index("candidate_id")
    add_results.main([f"run={copy}", f"data={tmp_path}"])
    store, name, _ = open_store(open_run_folder(copy))
    with store:
        added = store.labels(name, DFT)
    assert {item.hull for item in added} == {IMPLIED_HULL}
    for item in added:
        mine = own.loc[item.candidate.candidate_id]
        assert item.e_above_hull - mine["e_above_hull"] == pytest.approx(DEEP - mine["formation_energy"], abs=1e-4)
    failed = [replace(item, label=Label(status=LabelStatus.FAILED), e_above_hull=math.nan) for item in added]
    assert [item.e_above_hull for item in with_dft(failed, added)] == [item.e_above_hull for item in added]


def test_failed_calculations_change_nothing(copy: Path) -> None:
    names = [LABELS, ROUNDS, "finalists.csv", "summary.md"]
    before, weights = [(copy / name).read_text() for name in names], energies(copy, copy / "proxies")
    add(copy, Label(status=LabelStatus.FAILED, reason="the electronic steps did not converge"))
    run.main([f"resume={copy}"])
    assert [(copy / name).read_text() for name in names] == before
    assert energies(copy, copy / "proxies").equal(weights)


def test_an_extension_that_was_killed_goes_on_to_the_same_store(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = shutil.copytree(copy, tmp_path / "killed")
    more = ["rounds=3", "oracle.budget=7"]
    for folder in (copy, killed):
        add(folder, Label(status=LabelStatus.GIVEN, formation_energy_per_atom=DEEP))
    run.main([f"resume={copy}", *more])

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for owner, name, words in (
        (run, "build_parts", more),  # once the settings are written
        (run, "sample_distinct", more),  # once the round is taught
        (Campaign, "_write_relaxed", []),
        (Campaign, "finish", []),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises(KeyboardInterrupt):
                run.main([f"resume={killed}", *words])
    run.main([f"resume={killed}"])
    pd.testing.assert_frame_equal(table(killed).drop(columns="seconds"), table(copy).drop(columns="seconds"))
    assert energies(killed, killed / "proxies").equal(energies(copy, copy / "proxies"))


def test_a_run_of_one_round_goes_on_with_ids_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _finished(tmp_path, "oracle.budget=1")
    assert not (folder / "proxies").exists()
    monkeypatch.chdir(tmp_path)
    add(folder, Label(status=LabelStatus.GIVEN, formation_energy_per_atom=DEEP))
    run.main([f"resume={folder}", "rounds=2", "oracle.budget=3"])
    first, *rest = table(folder)["candidate_id"]
    assert first.startswith("c")
    assert [name[:5] for name in rest] == ["r02-c"] * 2
    assert (folder / "rounds" / "02" / "proxies" / "ensemble.json").exists()
    assert (folder / "proxies" / "ensemble.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rounds=1"], "has rounds=2 and oracle.budget=5; resume= can raise them, not lower them"),
        (["rounds=3", "oracle.budget=4"], "not lower them"),
        (["oracle.budget=9"], "for rounds to come: raise rounds as well"),
        (["rounds=3"], r"less than one structure for each of rounds=3: 5 belong to the first 2"),
        (["rounds=3", "oracle.budget=9", "seed=1"], "may be raised; drop seed"),
        (["rounds=3", "oracle.budget=9", "oracle.fmax=0.2"], "may be raised; drop oracle"),
        (["extends=[1,2]"], "drop extends"),
    ],
)
def test_what_cannot_be_added_is_refused_and_changes_nothing(two_rounds: Path, words: list[str], message: str) -> None:
    before = {path: path.read_bytes() for path in two_rounds.rglob("*") if path.suffix in (".yaml", ".jsonl", ".json")}
    with pytest.raises(ConfigError, match=message):
        run.main([f"resume={two_rounds}", *words])
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_that_is_under_way_finishes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "train_sampler", stop)
    with pytest.raises(KeyboardInterrupt):
        _finished(tmp_path, "oracle.budget=1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="has come to round 1 of 1; finish it with resume="):
        run.main([f"resume={tmp_path / 'run'}", "rounds=2", "oracle.budget=3"])


def test_a_new_run_extends_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="extends is written by resume="):
        run.main([*TINY, "rounds=2", "extends=[1,2]", f"output={tmp_path / 'run'}"])
