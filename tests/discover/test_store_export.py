"""Exports hold what the store holds, in forms that pandas, ASE and this project read."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure

from discover.errors import RunFolderError
from discover.oracle.base import Label, LabelStatus
from discover.store import Store, StoreError
from discover.store_export import export
from discover.structure_files import read_cif, read_table
from tests.discover.store_examples import FAILED, LABEL, ROCK_SALT, RUTILE, add_label, candidate

SINGLE_POINT = Label(status=LabelStatus.SINGLE_POINT, energy_per_atom=-3.3)
LEFT_HANDED = Structure(Lattice([[0, 4, 0], [3, 0, 0], [0.5, 0, 5]]), ["Na", "N"], [[0, 0, 0], [0.5, 0.25, 0.1]])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store.db") as opened:
        opened.start_run("42", {"rounds": 1})
        opened.start_run("run", {"rounds": 3})
        candidates = [
            candidate(0, formula="TiO2"),
            candidate(1),
            candidate(2, structure=None, log_reward=math.nan),
            candidate(3, formula="NaN", structure=LEFT_HANDED, predictions={}),
        ]
        opened.add_round("run", 1, candidates, {})
        add_label(opened, "r01-0000")
        add_label(opened, "r01-0000", SINGLE_POINT, oracle="matgl")
        add_label(opened, "r01-0001", replace(FAILED, reason="ValueError: 'no' \"atoms\"\nat all"))
        add_label(opened, "r01-0002", FAILED)
        yield opened


def test_parquet_has_a_row_for_each_candidate_with_all_its_labels(store: Store, tmp_path: Path) -> None:
    export(store, "run", tmp_path / "run.parquet")
    table = pd.read_parquet(tmp_path / "run.parquet").set_index("candidate_id")
    assert list(table.index) == ["r01-0000", "r01-0001", "r01-0002", "r01-0003"]
    assert table["formula"].tolist() == ["TiO2", "NaCl", "NaCl", "NaN"]
    assert table["chgnet_status"].tolist()[:3] == ["converged", "failed", "failed"]
    assert table["chgnet_status"].isna().tolist() == [False, False, False, True]
    assert table.loc["r01-0000", "chgnet_formation_energy_per_atom"] == LABEL.formation_energy_per_atom
    assert table.loc["r01-0000", "chgnet_property_bulk_modulus"] == 210.5
    assert table.loc["r01-0000", "matgl_energy_per_atom"] == -3.3
    assert table["predicted_band_gap_std"].tolist()[:3] == [0.25] * 3
    assert table.isna().loc["r01-0002", ["log_reward", "cif", "predicted_e_above_hull_std"]].all()
    assert json.loads(table.loc["r01-0000", "crystal"]) == candidate(0).crystal
    about = json.loads(pq.read_schema(tmp_path / "run.parquet").metadata[b"crystal_discover"])
    assert about["run"] == "run"
    assert about["config"] == {"rounds": 3}
    assert about["settings"]["chgnet"] == [{"fmax": 0.05, "steps": 200}]


def test_structures_of_the_table_are_the_structures_of_the_store(store: Store, tmp_path: Path) -> None:
    export(store, "run", tmp_path / "run.parquet")
    table = pd.read_parquet(tmp_path / "run.parquet").set_index("candidate_id")
    for name, column, structure in (
        ("r01-0000", "cif", ROCK_SALT),
        ("r01-0000", "chgnet_cif", RUTILE),
        ("r01-0003", "cif", LEFT_HANDED),
    ):
        matrix, coords, numbers = read_cif(table.loc[name, column])
        again = Structure(Lattice(matrix), numbers.tolist(), coords)
        assert again.composition == structure.composition
        assert np.allclose(again.distance_matrix, structure.distance_matrix, atol=1e-6)


def test_extxyz_has_a_frame_for_each_label_and_each_candidate_without_one(store: Store, tmp_path: Path) -> None:
    export(store, "run", tmp_path / "run.extxyz")
    frames = ase.io.read(tmp_path / "run.extxyz", index=":")
    assert [frame.info["material_id"] for frame in frames] == ["r01-0000", "r01-0000", "r01-0001", "r01-0003"]
    assert [frame.info.get("oracle") for frame in frames] == ["chgnet", "matgl", "chgnet", None]
    relaxed, single_point, failed, unlabelled = frames
    assert relaxed.get_chemical_formula() == "O4Ti2"
    assert relaxed.get_potential_energy() == pytest.approx(LABEL.energy_per_atom * 6)
    assert relaxed.info["e_above_hull"] == 0.02
    assert single_point.get_chemical_formula() == "Cl4Na4"
    assert single_point.get_potential_energy() == pytest.approx(-3.3 * 8)
    assert (failed.info["status"], failed.calc) == ("failed", None)
    assert failed.info["reason"] == "ValueError: 'no' \"atoms\" at all"
    assert np.allclose(unlabelled.cell.array, LEFT_HANDED.lattice.matrix)
    assert np.allclose(unlabelled.positions, LEFT_HANDED.cart_coords)
    table = read_table(tmp_path / "run.extxyz")  # as a user's own data
    assert table["material_id"].tolist()[3] == "r01-0003"


def test_ase_finds_rows_by_their_values(store: Store, tmp_path: Path) -> None:
    export(store, "run", tmp_path / "run.db")
    database = ase.db.connect(tmp_path / "run.db")
    assert [row.candidate_id for row in database.select(oracle="chgnet")] == ["r01-0000", "r01-0001"]
    (row,) = database.select("e_above_hull<0.1,status=converged")
    assert row.energy == pytest.approx(LABEL.energy_per_atom * 6)
    assert row.data["formula"] == "TiO2"
    assert row.data["property_bulk_modulus"] == 210.5
    (row,) = database.select(candidate_id="r01-0003")
    assert row.data["formula"] == "NaN"  # which ASE would not take as a value


def test_an_energy_without_its_structure_is_not_put_on_another_one(store: Store, tmp_path: Path) -> None:
    add_label(store, "r01-0003", replace(LABEL, structure=None, properties={"gap = HSE\n": 1.5}))
    export(store, "run", tmp_path / "run.extxyz")
    frame = ase.io.read(tmp_path / "run.extxyz", index=-1)
    assert frame.calc is None
    assert frame.info["property_gap_HSE_"] == 1.5
    assert frame.info["energy_per_atom"] == pytest.approx(LABEL.energy_per_atom)


@pytest.mark.parametrize("suffix", [".parquet", ".extxyz", ".db"])
def test_a_run_without_candidates_is_an_empty_export(store: Store, tmp_path: Path, suffix: str) -> None:
    export(store, "42", tmp_path / f"empty{suffix}")
    assert (tmp_path / f"empty{suffix}").exists()
    if suffix == ".parquet":
        assert len(pd.read_parquet(tmp_path / "empty.parquet")) == 0
    if suffix == ".db":
        assert ase.db.connect(tmp_path / "empty.db").count() == 0


def test_an_earlier_export_is_replaced_and_a_store_is_not(store: Store, tmp_path: Path) -> None:
    export(store, "42", tmp_path / "run.db")
    export(store, "run", tmp_path / "run.db")
    assert ase.db.connect(tmp_path / "run.db").count() == 4
    with pytest.raises(StoreError, match=r"store\.db is a store and is not replaced"):
        export(store, "run", tmp_path / "store.db")
    assert store.runs() == ["42", "run"]


def test_exports_that_cannot_be_made_say_why(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"must end in \.parquet, \.extxyz, \.db"):
        export(store, "run", tmp_path / "run.csv")
    with pytest.raises(StoreError, match="has no run ruin"):
        export(store, "ruin", tmp_path / "run.db")
    with pytest.raises(RunFolderError, match="No such file or folder"):
        export(store, "run", tmp_path / "absent" / "run.parquet")
