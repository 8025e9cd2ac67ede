"""The path that a user walks: run, kill, resume, sample under restrictions, evaluate."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from pymatgen.core import Structure

from discover import evaluate, run, sample, train_sampler
from discover.candidates import Column
from discover.config import RunConfig
from discover.errors import CheckpointError, TrainingError
from discover.oracle.hull import HullError
from discover.run_folder import open_run_folder
from discover.validity import check_crystals
from envs.crystal import CrystalBatch

TINY = [
    "train.n_steps=4",
    "train.batch_size=32",
    "n_candidates=30",
    "n_structures=3",
    "oracle.name=none",
    "restrict.elements=[Na,Mg,Al,O,S,Cl]",
    "restrict.n_elements=[2,3]",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "bandgap"
    run.main(["reward=bandgap", "target=1.34", f"output={folder}", *TINY])
    return folder


# pymatgen rounds thirds and sixths written with eight digits, and says so.
@pytest.mark.filterwarnings("ignore:Issues encountered while parsing CIF")
def test_a_run_leaves_ranked_candidates_structures_and_a_report(finished: Path) -> None:
    table = pd.read_csv(finished / "candidates.csv", keep_default_na=False)
    assert list(table.columns) == [str(column) for column in Column]
    assert len(table) == 30
    assert table["log_reward"].is_monotonic_decreasing
    assert len(table.drop_duplicates(["formula", "space_group", "wyckoff"])) == 30
    files = sorted((finished / "structures").glob("*.cif"))
    assert len(files) == 3
    for file in files:
        row = table.set_index("candidate_id").loc[file.stem]
        structure = Structure.from_file(file)
        assert structure.composition.reduced_formula == row["formula"]
        assert structure.volume / len(structure) == pytest.approx(row["volume_per_atom"], rel=1e-3)
    assert "1.34" in (finished / "summary.md").read_text()


def test_the_same_seed_gives_the_same_candidates(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    run.main(["reward=bandgap", "target=1.34", f"output={again}", *TINY])
    pd.testing.assert_frame_equal(pd.read_csv(finished / "candidates.csv"), pd.read_csv(again / "candidates.csv"))


def test_a_training_cut_in_two_ends_as_an_uncut_one(finished: Path, tmp_path: Path, monkeypatch) -> None:
    cut = tmp_path / "cut"
    seen = []

    def stop_after_two(self: object, step: object) -> None:
        original(self, step)
        seen.append(step)
        if len(seen) == 2:
            raise KeyboardInterrupt

    original = run._Progress.__call__
    monkeypatch.setattr(run._Progress, "__call__", stop_after_two)
    with pytest.raises(KeyboardInterrupt, match="resume="):
        run.main(["reward=bandgap", "target=1.34", f"output={cut}", *TINY])
    assert not (cut / "candidates.csv").exists()
    monkeypatch.setattr(run._Progress, "__call__", original)
    run.main([f"resume={cut}"])
    pd.testing.assert_frame_equal(pd.read_csv(finished / "candidates.csv"), pd.read_csv(cut / "candidates.csv"))
    assert [event["step"] for event in open_run_folder(cut).read_log("train")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_killed_run_continues_from_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    words = ["reward=density", f"output={folder}", *TINY, "train.n_steps=60"]
    often = f"from discover import run; run._CHECKPOINT_SECONDS = 0.1; run.main({words!r})"
    process = subprocess.Popen([sys.executable, "-c", often], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.json").exists():
        assert time.monotonic() < deadline, "no checkpoint within two minutes"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    reached = len(open_run_folder(folder).read_log("train"))
    assert reached < 60
    run.main([f"resume={folder}"])
    steps = [event["step"] for event in open_run_folder(folder).read_log("train")]
    assert steps[-1] == 60
    assert steps[reached] > 1  # not from the start again
    assert len(pd.read_csv(folder / "candidates.csv")) == 30


def test_a_truncated_checkpoint_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(finished), str(folder)], check=True)  # noqa: S607
    weights = next(folder.glob("checkpoint-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        run.main([f"resume={folder}"])


@pytest.mark.parametrize("correct", ["none", "sir", "finetune"])
def test_restricted_samples_obey(finished: Path, tmp_path: Path, correct: str, capsys, monkeypatch) -> None:
    out = tmp_path / correct
    words = ["restrict.elements=[Mg,O]", "restrict.crystal_systems=[cubic]", "restrict.n_atoms=[2,8]", "n=40"]
    monkeypatch.setattr(sample, "_FINETUNE", replace(sample._FINETUNE, n_steps=2, batch_size=16))
    sample.main([f"run={finished}", f"output={out}", f"correct={correct}", "n_structures=2", *words])
    assert len(list((out / "structures").glob("*.cif"))) == 2
    table = pd.read_csv(out / "candidates.csv", keep_default_na=False)
    assert len(table) == 40
    assert (table["space_group"] >= 195).all()
    assert table["n_atoms"].between(2, 8).all()
    assert all(set(formula) <= set("MgO0123456789()") for formula in table["formula"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < figures["effective_sample_share"] <= 1


def test_evaluation_prints_its_figures_as_json(finished: Path, capsys) -> None:
    evaluate.main(["task=sampler", f"run={finished}", "n=60"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["trained"]["valid"] == 1.0
    assert figures["untrained"]["valid"] == 1.0
    assert figures["n"] == 60


def test_the_configuration_of_a_run_is_read_back(finished: Path) -> None:
    config = open_run_folder(finished).config(RunConfig)
    assert config.target == 1.34
    assert config.restrict.n_elements == (2, 3)


def test_a_training_that_diverges_says_so_and_leaves_no_broken_weights(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(train_sampler.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.nan))
    with pytest.raises(TrainingError, match=r"diverged at step 1.*Start again with a lower train\.lr than"):
        run.main(["reward=bandgap", "target=1.34", f"output={tmp_path / 'run'}", *TINY])
    assert not (tmp_path / "run" / "checkpoint.json").exists()


def test_independent_checks_find_what_is_wrong() -> None:
    def batch(
        group: int, elements: list[int], letters: list[int], counts: list[int], cell: list[float]
    ) -> CrystalBatch:
        return CrystalBatch(
            torch.tensor([group]),
            torch.tensor([elements]),
            torch.tensor([letters]),
            torch.tensor([counts]),
            torch.tensor([cell], dtype=torch.float64),
        )

    cubic = [5.6, 5.6, 5.6, 90.0, 90.0, 90.0]
    salt = check_crystals(batch(225, [11, 17], [0, 1], [1, 1], cubic), ionic=True)
    assert salt.all.all()
    assert not check_crystals(batch(225, [11, 17], [0, 0], [1, 1], cubic), ionic=True).wyckoff.any()
    assert not check_crystals(
        batch(225, [11, 17], [0, 1], [1, 1], [5.6, 5.7, 5.6, 90, 90, 90]), ionic=True
    ).lattice.any()
    assert not check_crystals(batch(225, [11, 12], [0, 1], [1, 1], cubic), ionic=True).smact.any()
    # SMACT gives up on Fe7O8, which says nothing about its charges.
    wuestite = batch(1, [26] * 7 + [8] * 8, [0] * 15, [1] * 15, [5.0, 6.0, 7.0, 80.0, 85.0, 95.0])
    checked = check_crystals(wuestite, ionic=True, mixed_valence=True)
    assert (checked.smact_decided.tolist(), checked.smact.tolist(), checked.all.tolist()) == ([False], [False], [True])


def test_a_dry_run_says_what_would_run_leaves_nothing_and_refuses_what_the_run_would(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    words = ["reward=bandgap", "target=1.34", f"output={folder}", "dry_run=true", *TINY]
    run.main(words)
    assert "space groups        230" in capsys.readouterr().out
    assert not folder.exists()
    rounds = [word for word in words if not word.startswith("oracle.")]
    with pytest.raises(HullError, match="no hull file at"):
        run.main([*rounds, f"oracle.hull={tmp_path / 'missing.csv'}"])
