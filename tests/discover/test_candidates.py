from pathlib import Path

import pandas as pd
import pytest
import torch

from discover.candidates import MEANING, Column, candidate_table, crystal_keys, read_candidates, write_candidates
from discover.config import RunConfig
from discover.gap_scale import INTERCEPT, SLOPE
from discover.run_folder import create_run_folder
from envs.crystal import CrystalBatch
from proxies.base import Prediction
from tests.discover.crystals import crystal_batch, predictions

NAMES = ["TiO2", "NaCl", "GaAs", "NaCl shifted", "Al2O3"]
REQUIRED = [
    "candidate_id",
    "formula",
    "space_group",
    "wyckoff",
    "a",
    "b",
    "c",
    "alpha",
    "beta",
    "gamma",
    "n_atoms",
    "volume_per_atom",
    "density",
    "formation_energy_per_atom",
    "formation_energy_per_atom_std",
    "band_gap",
    "band_gap_std",
    "e_above_hull",
    "e_above_hull_std",
    "log_reward",
    "log_prob",
    "novel",
]


def table(names: list[str], log_reward: list[float], *, distinct: bool = True) -> tuple[pd.DataFrame, CrystalBatch]:
    n = len(names)
    rewards = torch.tensor(log_reward, dtype=torch.float64)
    return candidate_table(
        crystal_batch(names),
        predictions(n, density=rewards + 10),
        rewards,
        torch.arange(n, dtype=torch.float64),
        distinct=distinct,
    )


def test_columns_are_those_that_users_rely_on() -> None:
    frame, _ = table(NAMES, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert list(frame.columns)[: len(REQUIRED)] == REQUIRED
    assert set(MEANING) == set(Column)


def test_rows_are_best_first_and_keep_their_values_together() -> None:
    frame, crystals = table(NAMES, [-3.0, -1.0, -2.0, -9.0, -4.0], distinct=False)
    assert frame["formula"].tolist() == ["NaCl", "GaAs", "TiO2", "Al2O3", "NaCl"]
    assert frame["log_reward"].tolist() == [-1.0, -2.0, -3.0, -4.0, -9.0]
    assert frame["density"].tolist() == [9.0, 8.0, 7.0, 6.0, 1.0]
    assert frame["log_prob"].tolist() == [1.0, 2.0, 0.0, 4.0, 3.0]
    assert crystals.formulas() == frame["formula"].tolist()


def test_one_row_of_each_arrangement_is_kept_the_best() -> None:
    frame, _ = table(NAMES, [-3.0, -5.0, -2.0, -1.0, -4.0])
    salt = frame[frame["formula"] == "NaCl"]
    assert len(salt) == 1  # Na on a and Cl on b is the same crystal as Na on b and Cl on a, shifted by half a cell
    assert salt["a"].tolist() == [5.60]


def test_crystals_without_letters_are_told_apart_by_composition_and_group() -> None:
    crystals = crystal_batch(["ZrO2", "ZrO2", "TiO2"]).without_letters()
    keys = crystal_keys(crystals)
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]
    frame, _ = candidate_table(crystals, predictions(3), torch.zeros(3), torch.zeros(3))
    assert frame["wyckoff"].tolist() == ["", ""]


def test_the_same_atoms_on_other_letters_are_another_candidate() -> None:
    first = crystal_batch(["GaAs"])
    moved = CrystalBatch(
        first.space_group, first.elements, torch.tensor([[0, 1]]), first.counts, first.lattice_parameters
    )  # rock salt, not zincblende
    assert crystal_keys(first) != crystal_keys(moved)


def test_a_row_describes_its_crystal() -> None:
    frame, _ = table(["NaCl"], [0.0])
    row = frame.iloc[0]
    assert (row["candidate_id"], row["space_group"], row["wyckoff"]) == ("c0001", 225, "Na:4a Cl:4b")
    assert (row["n_atoms"], row["a"], row["gamma"]) == (2, 5.64, 90.0)
    assert row["volume_per_atom"] == pytest.approx(5.64**3 / 8)
    assert row["oxidation_states"] == "Na1+ Cl1-"
    assert -0.2 < row["oxidation_score"] <= 0
    assert row["p_metastable"] == pytest.approx(0.8413, abs=1e-3)  # 0.1 eV/atom is one standard deviation away
    assert row["band_gap_experiment"] == pytest.approx(SLOPE * 1.0 / 0.99 + INTERCEPT)
    assert not row["novel"]


def test_the_gap_of_a_likely_metal_is_zero_on_both_scales() -> None:
    gap = Prediction(torch.tensor([0.4]).double(), torch.tensor([0.6]).double(), torch.tensor([0.7]).double())
    crystals = crystal_batch(["NaCl"])
    frame, _ = candidate_table(crystals, predictions(1) | {"band_gap": gap}, torch.zeros(1), torch.zeros(1))
    assert frame[["band_gap", "band_gap_experiment"]].to_numpy().tolist() == [[0.0, 0.0]]


def test_what_has_no_oxidation_states_has_an_empty_score() -> None:
    frame, _ = table(["Fe"], [0.0])
    assert frame["oxidation_states"].tolist() == [""]
    assert frame["oxidation_score"].isna().all()


def test_both_files_hold_the_table(tmp_path: Path) -> None:
    folder = create_run_folder(RunConfig(target=1), name="x", output=str(tmp_path))
    frame, _ = table(NAMES, [0.1, 0.2, 0.3, 0.4, 0.5])
    write_candidates(folder, frame)
    pd.testing.assert_frame_equal(read_candidates(folder), frame)
    from_csv = pd.read_csv(folder / "candidates.csv", keep_default_na=False, na_values={"oxidation_score": [""]})
    assert list(from_csv.columns) == list(frame.columns)
    assert from_csv["formula"].tolist() == frame["formula"].tolist()
    assert from_csv["novel"].dtype == bool


def test_a_wider_batch_gives_a_crystal_the_same_key() -> None:
    salt = crystal_batch(["NaCl"])
    mixed = crystal_batch(["NaCl", "SrTiO3"])
    assert mixed.elements.shape[1] > salt.elements.shape[1]
    assert crystal_keys(salt)[0] == crystal_keys(mixed)[0]
