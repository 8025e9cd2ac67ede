from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from discover import plots
from discover.candidates import candidate_table, read_candidates, write_candidates
from discover.config import RewardConfig, RunConfig
from discover.errors import RunFolderError
from discover.options import parse_args
from discover.report import (
    RESULT_EVENT,
    ROUND_HEADER,
    element_shares,
    main,
    wanted_property,
    write_reference,
    write_report,
)
from discover.run_folder import RunFolder, create_run_folder
from discover.structure.base import cif_text
from discover.structure.random_baseline import RandomCoordinates
from tests.discover.crystals import CRYSTALS, crystal_batch, predictions

NAMES = sorted(CRYSTALS)


def run_with_candidates(path: Path, *words: str) -> RunFolder:
    """Return a run folder as a finished run leaves it, made of textbook crystals."""
    folder = create_run_folder(parse_args(RunConfig, words), name="x", output=str(path))
    names = NAMES * 40
    n = len(names)
    gap = torch.linspace(0.5, 2.5, n, dtype=torch.float64)
    table, crystals = candidate_table(
        crystal_batch(names), predictions(n, band_gap=gap), -((gap - 1.34) ** 2), gap, distinct=False
    )
    write_candidates(folder, table)
    write_reference(folder, table.assign(band_gap=table["band_gap"] * 3))
    for step in range(0, 300, 3):
        folder.log("train", step=step, loss=100 / (1 + step), log_reward=-20 + step / 20)
    folder.log("result", seconds=12.5, structures_failed=3)
    structure = RandomCoordinates().generate(crystals.select([0]), torch.Generator().manual_seed(0))[0]
    assert structure is not None
    folder.write_structure("c0001", cif_text(structure))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return run_with_candidates(tmp_path / "run", "target=1.34", "restrict.n_atoms=[2,20]")


def test_the_report_says_what_was_asked_and_what_came(folder: RunFolder) -> None:
    text = write_report(folder)
    assert (folder / "summary.md").read_text(encoding="utf-8") == text
    assert "`bandgap`" in text
    assert "restrict.n_atoms=[2,20]" in text
    assert "such a crystal measures about 2.32 eV" in text
    assert "[c0001](structures/c0001.cif)" in text
    near = float((read_candidates(folder)["band_gap"] - 1.34).abs().le(0.25).mean())
    assert 0.2 < near < 0.3
    assert f"within 0.25 of the target | {100 * near:.1f} % |" in text
    assert "| seconds | 12.5 |" in text
    assert "does not yet make it novel" in text


def test_every_plot_the_report_shows_is_there(folder: RunFolder) -> None:
    text = write_report(folder)
    shown = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert [Path(name).stem for name in shown] == ["training", "target", "volume", "elements", "space_groups"]
    for name in shown:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_command_rebuilds_a_lost_report(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_report(folder)
    (folder / "summary.md").unlink()
    main([f"run={folder.path}"])
    assert (folder / "summary.md").read_text(encoding="utf-8") == first
    assert capsys.readouterr().out.strip().endswith("summary.md")


def test_energies_that_a_hull_with_holes_gives_are_named(tmp_path: Path) -> None:
    words = "1 of 3 lie more than 0.25 eV/atom below the hull, which probably lacks what competes with them: Yb3SN."
    labels = {"formula": ["NaCl", "Yb3SN", "KCl"], "e_above_hull": [0.02, -0.31, None], "hull": "h", "oracle": "chgnet"}
    for name, given in (("file", ["oracle.hull=h.csv"]), ("implied", [])):  # a hull that proxies imply has no holes
        folder = run_with_candidates(tmp_path / name, "target=1.34", *given)
        folder.write("labels.csv", pd.DataFrame(labels).to_csv(index=False))
        folder.write("rounds.csv", pd.DataFrame([dict.fromkeys(ROUND_HEADER, 1.0)]).to_csv(index=False))
        folder.write("finalists.md", "")
        write_report(folder)
        assert (words in (folder / "summary.md").read_text()) == bool(given)


def test_a_run_that_was_stopped_before_its_finalists_has_a_report(folder: RunFolder) -> None:
    folder.write("labels.csv", "formula,e_above_hull,hull,oracle\nNaCl,0.0,h,chgnet\n")
    folder.write("rounds.csv", pd.DataFrame([dict.fromkeys(ROUND_HEADER, 1.0)]).to_csv(index=False))
    write_report(folder)
    assert "Not written yet: the run was stopped before that" in (folder / "summary.md").read_text()


def test_what_rounds_have_spent_is_added_up(folder: RunFolder) -> None:
    for number, seconds in ((1, 5.0), (1, 1.0), (2, 2.5)):  # the first was killed after its event
        folder.log(RESULT_EVENT, round=number, proxy_queries=100, training_seconds=seconds, candidates=number)
    text = write_report(folder)
    assert "| proxy_queries | 200 |" in text
    assert "| training_seconds | 3.5 |" in text
    assert "| candidates | 2 |" in text


def test_a_run_without_candidates_says_how_to_get_them(tmp_path: Path) -> None:
    folder = create_run_folder(RunConfig(target=1), name="x", output=str(tmp_path))
    with pytest.raises(RunFolderError, match="resume="):
        write_report(folder)


@pytest.mark.parametrize("reward", ["formation_energy*stability", "oxidation_score", "math:sqrt"])
def test_every_reward_has_a_report(tmp_path: Path, reward: str) -> None:
    text = write_report(run_with_candidates(tmp_path / "run", f"reward={reward}"))
    assert "## The 20 best" in text
    assert "on the experimental scale" not in text.split("## Columns")[0]


def test_a_report_without_reference_and_log_shows_what_there_is(folder: RunFolder) -> None:
    (folder / "reference.parquet").unlink()
    (folder / "log.jsonl").unlink()
    text = write_report(folder)
    assert "untrained prior" not in text.split("## Plots")[0]
    assert "plots/training.png" not in text


def test_the_property_that_is_wanted_follows_the_reward() -> None:
    assert wanted_property(RewardConfig(target=1.3)).column == "band_gap"
    assert wanted_property(RewardConfig(target=1.3, gap_scale="experiment")).column == "band_gap_experiment"
    assert wanted_property(RewardConfig(reward="formation_energy")).column == "formation_energy_per_atom"
    assert wanted_property(RewardConfig(reward="math:sqrt")).column == "log_reward"


def test_the_share_on_target_is_inside_the_window(folder: RunFolder) -> None:
    table = read_candidates(folder)
    window = wanted_property(RewardConfig(target=(1.0, 1.5)))
    assert window.on_target(table) == pytest.approx(0.25, abs=0.01)


def test_elements_are_counted_once_a_formula() -> None:
    assert element_shares(["Fe2O3", "FeO", "NaCl", "Fe"]) == {"Fe": 75.0, "O": 50.0, "Na": 25.0, "Cl": 25.0}


def test_plots_take_degenerate_data() -> None:
    for values in (np.array([]), np.array([1.0]), np.full(5, np.nan), np.array([np.inf, 2.0])):
        assert plots.png(plots.distribution({"prior": values, "trained": values}, "x", target=(1.0, 2.0)))
    assert plots.png(plots.bars({}, "Elements"))
    assert plots.png(plots.training_curve([1], [0.1], [-3.0]))
