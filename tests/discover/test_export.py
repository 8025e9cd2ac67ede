"""What a run found goes to other programs, and their results come back as labels."""

import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from discover import add_results, export, run
from discover.campaign import open_store
from discover.config import RunConfig
from discover.dft_results import DftError
from discover.errors import ConfigError, RunFolderError
from discover.oracle.base import Label, LabelStatus
from discover.run_folder import locked, open_run_folder

ORACLE = """
from discover.oracle.base import Label, LabelStatus

def relaxed(structure):
    return Label(status=LabelStatus.CONVERGED, formation_energy_per_atom=-2.0, structure=structure)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    (folder / "relaxing_oracle.py").write_text(ORACLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        words = ["train.n_steps=2", "train.batch_size=32", "n_candidates=20", "n_structures=0", "oracle.budget=2"]
        oracle = ["oracle.name=callable", "oracle.model=relaxing_oracle:relaxed", "engine.workers=0"]
        run.main(["reward=stability", "restrict.elements=[Na,Mg,O,Cl]", *words, *oracle, f"output={folder / 'run'}"])
    return folder / "run"


def test_the_best_become_inputs_and_everything_becomes_a_table(finished: Path, capsys) -> None:
    for to, file in (("vasp", "INCAR"), ("espresso", "pw.in")):
        export.main([f"run={finished}", f"to={to}", "n=1"])
        (found,) = (finished / f"export-{to}").glob(f"*/{file}")
        assert found.read_text()
    export.main([f"run={finished}", "to=parquet"])
    assert len(pd.read_parquet(finished / "export-parquet.parquet")) == 2
    assert "1 of 1 structures" in capsys.readouterr().out


def test_a_run_without_its_store_is_not_begun_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(finished.parent))
    folder = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("store.sqlite*"))
    for more in ([], ["rounds=2", "oracle.budget=4"]):
        with pytest.raises(RunFolderError, match="are in another store"):
            run.main([f"resume={folder}", *more])
    (folder / "labels.csv").unlink()  # as after a kill in the first round
    for again in (run.main, export.main):
        with pytest.raises(RunFolderError, match="are in another store"):
            again([f"resume={folder}" if again is run.main else f"run={folder}"])
        assert not (folder / "store.sqlite").exists()


def test_a_run_that_did_not_log_its_store_is_read(finished: Path, tmp_path: Path) -> None:
    """Earlier versions did not, and such a run may have been killed in its first round."""
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "labels.csv").unlink()
    (folder / "log.jsonl").unlink()
    shared = tmp_path / "shared.sqlite"
    for place in (None, shared):
        if place is not None:
            (folder / "store.sqlite").rename(place)
            config = open_run_folder(folder).config(RunConfig)
            open_run_folder(folder).write_config(replace(config, store=str(place)))
        store, name, _ = open_store(open_run_folder(folder))
        with store:
            assert store.runs() == [name]


def test_two_processes_do_not_go_on_with_one_run(finished: Path) -> None:
    with (
        locked(finished),
        pytest.raises(RunFolderError, match="another process is working there"),
    ):
        run.main([f"resume={finished}"])


def test_what_has_only_a_number_is_exported_as_it_was_proposed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    best = export.best_labelled(*open_store(open_run_folder(finished)))
    numbers = [replace(item, label=replace(item.label, structure=None)) for item in best]
    monkeypatch.setattr(export, "best_labelled", lambda *_: numbers)
    export.main([f"run={finished}", "to=poscar", "n=1", f"output={tmp_path / 'inputs'}"])
    assert "1 of 1 structures" in capsys.readouterr().out
    assert len(list((tmp_path / "inputs").iterdir())) == 1


def test_results_from_outside_become_labels_once_they_are_there(
    finished: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = pd.read_csv(finished / "labels.csv")["candidate_id"].iloc[0]
    words = [f"run={finished}", f"data={tmp_path}"]

    def oracles() -> list[str]:
        store, name, _ = open_store(open_run_folder(finished))
        with store:
            return store.oracles(name)

    (tmp_path / checked).mkdir()
    (tmp_path / checked / "vasprun.xml").write_text("<modeling>")  # still running
    add_results.main(words)
    assert '"without a result": 1' in capsys.readouterr().out
    assert oracles() == ["callable"]
    found = Label(status=LabelStatus.CONVERGED, formation_energy_per_atom=-2.0)
    unfinished = replace(found, status=LabelStatus.STEP_LIMIT)
    with monkeypatch.context() as patched:
        patched.setattr(add_results, "read_results", lambda *_, **__: {checked: unfinished})
        add_results.main(words)
    assert oracles() == ["callable"]  # it may be continued
    with monkeypatch.context() as patched:
        patched.setattr(add_results, "read_results", lambda *_, **__: {checked: found})
        for expected in ('"converged": 1', '"known already": 1'):
            add_results.main(words)
            assert expected in capsys.readouterr().out
    assert oracles() == ["callable", "dft"]
    (tmp_path / "zzz").mkdir()
    (tmp_path / "zzz" / "vasprun.xml").write_text("")
    with pytest.raises(DftError, match="not proposed, first zzz"):
        add_results.main([f"run={finished}", f"data={tmp_path}"])


def test_energies_of_elements_reach_the_results_of_quantum_espresso(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    monkeypatch.setattr(add_results, "read_results", lambda *_, references: given.append(references) or {})
    words = [f"run={finished}", f"data={tmp_path}"]
    add_results.main([*words, "references={Na: -1292.4, Cl: -460}"])
    add_results.main(words)
    assert given == [{"Na": -1292.4, "Cl": -460.0}, None]
    for wrong in ("[Na,Cl]", "{Nx: -1.0}", "{Na: much}", "{Na: .nan}", "{Na: true}"):
        with pytest.raises(ConfigError, match="references takes energies in eV/atom such as"):
            add_results.main([*words, f"references={wrong}"])


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs run=DIR"):
        export.main([])
    with pytest.raises(ConfigError, match="writes all that the store holds; drop n"):
        export.main(["run=x", "to=parquet", "n=50"])
    words = ["reward=density", "train.n_steps=1", "train.batch_size=8", "n_candidates=4", "n_structures=0"]
    run.main([*words, "oracle.name=none", f"output={tmp_path / 'run'}"])
    with pytest.raises(RunFolderError, match=r"checked no structure"):
        export.main([f"run={tmp_path / 'run'}"])
