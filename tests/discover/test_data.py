"""Preparing structures: textbook crystals come back with their known letters, and bad input is named."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pymatgen.io.cif import CifWriter
from torch.testing import assert_close

from discover.data import batch_orbits, load_prepared, orbits_of_structure, prepare, prepare_table
from discover.errors import DataError
from envs.symmetry import SYMMETRY
from tests.discover.textbook import corundum, diamond, perovskite, rock_salt, rutile, spinel, wurtzite

# letters up to the origin choices that a normaliser makes equivalent
KNOWN = [
    (rock_salt, 225, {("Na:4a Cl:4b"), ("Cl:4a Na:4b")}),
    (rutile, 136, {"Ti:2a O:4f", "Ti:2b O:4f"}),
    (perovskite, 221, {"Sr:1a Ti:1b O:3c", "Ti:1a Sr:1b O:3d"}),
    (diamond, 227, {"Si:8a", "Si:8b"}),
    (wurtzite, 186, {"Zn:2b O:2b", "O:2b Zn:2b"}),
    (corundum, 167, {"Al:12c O:18e"}),
    (spinel, 227, {"Mg:8a Al:16d O:32e", "Mg:8b Al:16c O:32e"}),
]


@pytest.mark.parametrize(("build", "space_group", "wyckoff"), KNOWN, ids=lambda value: getattr(value, "__name__", ""))
def test_textbook_crystals_have_their_known_letters(build, space_group, wyckoff) -> None:
    structure = build()
    for cell in (structure, structure.get_primitive_structure()):
        crystals, positions = batch_orbits([orbits_of_structure(cell)])
        assert crystals.space_group.tolist() == [space_group]
        assert crystals.wyckoff_strings()[0] in wyckoff
        assert crystals.formulas() == [structure.composition.reduced_formula]
        assert crystals.volume_per_atom.item() == pytest.approx(structure.volume / len(structure), rel=1e-4)
        assert positions.shape == (*crystals.elements.shape, 3)
        expected = SYMMETRY.primitive_multiplicity[space_group - 1][crystals.letters[0]]
        assert torch.equal(crystals.counts[0], expected)


def test_hexagonal_axes_and_origin_choice_2_are_those_of_pyxtal() -> None:
    crystals, _ = batch_orbits([orbits_of_structure(corundum()), orbits_of_structure(spinel())])
    assert_close(
        crystals.lattice_parameters[0], torch.tensor([4.76, 4.76, 12.99, 90, 90, 120]).double(), rtol=1e-4, atol=1e-6
    )
    # with origin choice 2 the oxygen of spinel is at (x, x, x) with x near 0.26, or 0.24 at the other origin
    _, positions = batch_orbits([orbits_of_structure(spinel())])
    oxygen = positions[0, 2].numpy() * 4 % 1.0
    assert np.allclose(np.abs(oxygen - np.round(oxygen)), 0.0496, atol=2e-3)


def test_distorted_cells_are_symmetrised_within_the_tolerance() -> None:
    structure = rock_salt()
    structure.apply_strain([0.001, -0.001, 0.0])
    structure.perturb(0.01)
    crystals, _ = batch_orbits([orbits_of_structure(structure)])
    assert crystals.space_group.tolist() == [225]
    a, b, c, *angles = crystals.lattice_parameters[0].tolist()
    assert a == b == c
    assert angles == [90.0, 90.0, 90.0]


@pytest.fixture
def table() -> pd.DataFrame:
    """Seven crystals, sodium nitride among them, whose formula reads as a missing value."""
    structures = [build() for build, _, _ in KNOWN]
    return pd.DataFrame(
        {
            "material_id": [f"x-{i}" for i in range(len(structures))],
            "pretty_formula": ["NaN", *(s.composition.reduced_formula for s in structures[1:])],
            "formation_energy_per_atom": [-2.0, -3.4, None, 0.0, -1.8, -3.4, -3.3],
            "band_gap": [5.0, 1.8, 1.8, 0.6, 0.7, 5.8, 5.1],
            "label_source": ["mp20"] * 6 + [None],
            "cif": [str(CifWriter(s)) for s in structures],
        }
    )


def test_csv_round_trips_through_cache_and_file(table: pd.DataFrame, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CRYSTAL_DISCOVER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "data.csv.gz"
    table.to_csv(path, index=False)
    first = prepare(path, progress=False)
    assert len(list((tmp_path / "cache" / "prepared").glob("*.npz"))) == 1
    for again in (prepare(path, progress=False), prepare(next((tmp_path / "cache" / "prepared").glob("*.npz")))):
        assert again.crystals.wyckoff_strings() == first.crystals.wyckoff_strings()
        assert torch.equal(again.crystals.lattice_parameters, first.crystals.lattice_parameters)
        assert torch.equal(again.positions, first.positions)
        assert again.ids.tolist() == [f"x-{i}" for i in range(7)]
        assert again.label_source.tolist() == ["mp20"] * 6 + [""]
        assert_close(again.labels["formation_energy_per_atom"][[0, 1]], torch.tensor([-2.0, -3.4]).double())
        assert again.labels["formation_energy_per_atom"][2].isnan()
        assert again.labels["e_above_hull"].isnan().all()
    assert first.formulas[0] == "NaCl"


def test_two_processes_find_what_one_finds(table: pd.DataFrame, monkeypatch) -> None:
    monkeypatch.setattr("discover.data._MIN_ROWS_FOR_POOL", 1)
    monkeypatch.setattr("discover.data._CHUNK", 3)
    two = prepare_table(table, n_workers=2, progress=False)
    assert (
        two.crystals.wyckoff_strings() == prepare_table(table, n_workers=1, progress=False).crystals.wyckoff_strings()
    )


def test_bad_rows_are_skipped_counted_and_listed(table: pd.DataFrame, caplog) -> None:
    table["band_gap"] = table["band_gap"].astype(object)
    table.loc[1, "cif"] = "this is no CIF"
    table.loc[2, "material_id"] = "x-0"
    table.loc[3, "cif"] = None
    table.loc[4, "band_gap"] = "wide"
    table.loc[5, "formation_energy_per_atom"] = np.inf
    with caplog.at_level(logging.WARNING):
        data = prepare_table(table, progress=False, name="mine.csv")
    assert data.ids.tolist() == ["x-0", "x-6"]
    reasons = {failure.row: failure.reason for failure in data.failures}
    assert sorted(reasons) == [1, 2, 3, 4, 5]
    assert "unparsable CIF" in reasons[1]
    assert "duplicate material_id x-0" in reasons[2]
    assert "cif is empty" in reasons[3]
    assert "band_gap is not a finite number: 'wide'" in reasons[4]
    assert "formation_energy_per_atom is not a finite number" in reasons[5]
    assert "mine.csv: skipped 5 of 7 rows" in caplog.text
    assert "row 2 (x-0): duplicate" in caplog.text


def test_bad_rows_are_listed_from_the_cache_too(table: pd.DataFrame, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("CRYSTAL_DISCOVER_CACHE", str(tmp_path / "cache"))
    table.loc[1, "cif"] = "this is no CIF"
    table.to_csv(tmp_path / "mine.csv", index=False)
    for _ in range(2):
        caplog.clear()
        prepare(tmp_path / "mine.csv", progress=False)
        assert "mine.csv: skipped 1 of 7 rows" in caplog.text


@pytest.mark.parametrize("column", ["material_id", "cif"])
def test_missing_columns_are_named(table: pd.DataFrame, column: str) -> None:
    with pytest.raises(DataError, match=rf"lacks the column\(s\) {column}"):
        prepare_table(table.drop(columns=column), progress=False)


def test_files_that_cannot_be_used_say_why(table: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file"):
        prepare(tmp_path / "absent.csv")
    table["cif"] = "nonsense"
    with pytest.raises(DataError, match="no usable row"):
        prepare_table(table, progress=False)
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        prepare(empty, use_cache=False)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(DataError, match="not a prepared data file"):
        load_prepared(broken)


def test_a_cache_that_cannot_be_written_costs_no_result(
    table: pd.DataFrame, tmp_path: Path, monkeypatch, caplog
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("CRYSTAL_DISCOVER_CACHE", str(blocked))
    path = tmp_path / "data.csv"
    table.to_csv(path, index=False)
    assert len(prepare(path, progress=False)) == 7
    assert "CRYSTAL_DISCOVER_CACHE" in caplog.text
