"""Structures from CIF folders and extxyz files: good ones come back as they are, bad ones are named."""

import contextlib
import io
import logging
import re
import warnings
from pathlib import Path

import ase.io
import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.cif import CifWriter
from torch.testing import assert_close

from discover.data import batch_orbits, orbits_of_structure, prepare
from discover.errors import DataError
from discover.structure.base import cif_text
from discover.structure_files import (
    extxyz_text,
    matrix_from_parameters,
    plain_cif,
    read_cif,
    read_table,
    write_structures,
)
from tests.discover.textbook import corundum, diamond, rock_salt, rutile, wurtzite


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("CRYSTAL_DISCOVER_CACHE", str(tmp_path / "cache"))


def cif_with(cell: list[float], symbols: list[str], coords: list[list[float]]) -> str:
    return plain_cif(np.array(cell), np.array(coords), symbols)


def test_plain_and_general_reading_of_a_cif_agree() -> None:
    structure = corundum().get_primitive_structure()
    matrix, coords, numbers = read_cif(str(CifWriter(structure)))
    again = Structure(Lattice(matrix), numbers.tolist(), coords)
    assert again.composition == structure.composition
    assert again.volume == pytest.approx(structure.volume, rel=1e-4)
    symmetric = str(CifWriter(structure, symprec=0.01))  # with symmetry operations: pymatgen's parser reads it
    crystals, _ = batch_orbits(
        [orbits_of_structure(Structure(Lattice(m), n.tolist(), x)) for m, x, n in [read_cif(symmetric)]]
    )
    assert crystals.wyckoff_strings() == ["Al:12c O:18e"]


BARE = str(CifWriter(rock_salt().get_primitive_structure()))


def spelled(form: str) -> str:
    """Return rock salt with its operations, whose number is N and which are R, written in some form."""
    text = str(CifWriter(rock_salt(), symprec=0.01))
    if not form:
        return re.sub(r"loop_\s+_symmetry_equiv_pos_site_id.*?(?=loop_)", "", text, flags=re.DOTALL)
    if "N" not in form:
        text = text.replace(" _symmetry_equiv_pos_site_id\n", "")
    return re.sub(r"(\d+)  '(.*)'", lambda m: form.replace("N", m[1]).replace("R", m[2].replace(" ", "")), text)


@pytest.mark.parametrize("text", [spelled(form) for form in ("N 'R'", 'N "R"', "N R", "'R'", '"R"', "R", "")])
def test_symmetry_is_read_in_every_spelling(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Structure.from_str(text, fmt="cif")
    _, _, numbers = read_cif(text)
    assert sorted(numbers.tolist()) == sorted(site.specie.Z for site in expected)
    assert len(numbers) == 8


def test_overlapping_atoms_are_read_where_they_may_whoever_wrote_them() -> None:
    buffer = io.BytesIO()
    ase.io.write(buffer, ase.Atoms("NaCl", positions=np.zeros((2, 3)), cell=[4, 4, 4], pbc=True), format="cif")
    text = buffer.getvalue().decode()
    assert sorted(read_cif(text, overlaps=True)[2].tolist()) == [11, 17]
    with pytest.raises(DataError, match="atoms 0 and 1 overlap"):
        read_cif(text)


def test_symbols_in_capitals_are_not_cut() -> None:
    text = BARE.replace("Na  Na", "NA  Na").replace("Cl  Cl", "CL  Cl")
    assert text != BARE
    assert sorted(read_cif(text)[2].tolist()) == [11, 17]


def test_a_cif_that_was_cut_anywhere_is_read_or_refused() -> None:
    for end in range(0, len(BARE), 7):
        with contextlib.suppress(DataError):
            read_cif(BARE[:end])


def test_lattice_matrix_has_the_parameters_it_was_made_from() -> None:
    parameters = np.array([3.1, 4.2, 5.3, 78.0, 95.0, 103.0])
    assert np.allclose(Lattice(matrix_from_parameters(parameters)).parameters, parameters)


CUBE = [4.0, 4.0, 4.0, 90.0, 90.0, 90.0]
BAD = {
    "flat": (cif_with([4, 4, 0, 90, 90, 90], ["Na"], [[0, 0, 0]]), "no volume"),
    "folded": (cif_with([4, 4, 4, 90, 90, 180], ["Na"], [[0, 0, 0]]), "no volume|unparsable"),
    "nowhere": (cif_with(CUBE, ["Na", "Cl"], [[0, 0, 0], [float("nan"), 0.5, 0.5]]), "no finite numbers"),
    "crowded": (cif_with(CUBE, ["Na", "Cl"], [[0, 0, 0], [0.98, 0.02, 0]]), "atoms 0 and 1 overlap: 0.11 Å"),
    "alloy": (str(CifWriter(Structure(Lattice.cubic(3.6), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]]))), "disordered"),
    "vacancies": (str(CifWriter(Structure(Lattice.cubic(4.0), [{"Na": 0.9}], [[0, 0, 0]]))), "disordered"),
    "prose": ("this is no CIF", "unparsable CIF"),
    "unknown": (cif_with(CUBE, ["Xx"], [[0, 0, 0]]), "unparsable CIF"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_structure_that_cannot_be_used_says_why(name: str) -> None:
    text, reason = BAD[name]
    with pytest.raises(DataError, match=reason):
        read_cif(text)


def test_a_folder_of_cif_files_is_prepared_with_its_labels(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "mine"
    write_structures(folder, {"salt": rock_salt(), "rutile": rutile(), "zinc-oxide": wurtzite()}, "cif")
    for name, (text, _) in BAD.items():
        (folder / f"{name}.cif").write_text(text, encoding="utf-8")
    (folder / "labels.csv").write_text("material_id,band_gap\nrutile,1.8\nsalt,5.0\nabsent,1.0\n")
    with caplog.at_level(logging.WARNING):
        data = prepare(folder, progress=False)
    assert data.ids.tolist() == ["rutile", "salt", "zinc-oxide"]
    assert data.formulas.tolist() == ["TiO2", "NaCl", "ZnO"]
    assert data.crystals.space_group.tolist() == [136, 225, 186]
    assert data.labels["band_gap"][:2].tolist() == [1.8, 5.0]
    assert data.labels["band_gap"][2].isnan()
    assert sorted(failure.material_id for failure in data.failures) == sorted(BAD)
    assert f"skipped {len(BAD)} of {len(BAD) + 3} rows" in caplog.text
    assert "1 rows have no CIF file, first absent" in caplog.text


def test_ids_of_digits_are_text(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_structures(folder, {"001": rock_salt(), "1": rutile(), "1e0": wurtzite()}, "cif")
    (folder / "labels.csv").write_text("material_id,band_gap\n001,5.0\n1,1.8\n1e0,3.4\n")
    data = prepare(folder, progress=False, use_cache=False)
    assert data.ids.tolist() == ["001", "1", "1e0"]
    assert data.labels["band_gap"].tolist() == [5.0, 1.8, 3.4]
    pd.DataFrame({"material_id": data.ids, "cif": [cif_text(rock_salt())] * 3}).to_csv(tmp_path / "m.csv", index=False)
    assert read_table(tmp_path / "m.csv")["material_id"].tolist() == ["001", "1", "1e0"]


def test_a_changed_label_prepares_a_folder_anew(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_structures(folder, {"salt": rock_salt()}, "cif")
    assert prepare(folder, progress=False).labels["band_gap"].isnan().all()
    (folder / "labels.csv").write_text("material_id,band_gap\nsalt,5.0\n")
    assert prepare(folder, progress=False).labels["band_gap"].tolist() == [5.0]


def test_extxyz_comes_back_as_it_was_written(tmp_path: Path) -> None:
    structures = {"a": rock_salt(), "b": corundum().get_primitive_structure(), "c": diamond()}
    structures["a"].properties["band_gap"] = 5.0
    write_structures(tmp_path, structures, "extxyz")
    data = prepare(tmp_path / "structures.extxyz", progress=False)
    assert data.ids.tolist() == ["a", "b", "c"]
    crystals, _ = batch_orbits(orbits_of_structure(structure) for structure in structures.values())
    assert data.crystals.wyckoff_strings() == crystals.wyckoff_strings()
    assert_close(data.crystals.lattice_parameters, crystals.lattice_parameters, atol=1e-6, rtol=0)
    assert data.labels["band_gap"][0] == 5.0
    assert data.labels["band_gap"][1:].isnan().all()


def test_frames_that_cannot_be_used_are_skipped(tmp_path: Path) -> None:
    molecule = AseAtomsAdaptor.get_atoms(rutile(), msonable=False)
    molecule.set_cell(np.zeros((3, 3)))
    molecule.pbc = False
    left_handed = AseAtomsAdaptor.get_atoms(rutile(), msonable=False)
    left_handed.set_cell(left_handed.cell.array[[1, 0, 2]])
    left_handed.set_scaled_positions(left_handed.get_scaled_positions()[:, [1, 0, 2]])
    file = tmp_path / "frames.extxyz"
    ase.io.write(file, [molecule, left_handed], format="extxyz")
    data = prepare(file, progress=False)
    assert data.ids.tolist() == ["1"]
    assert data.crystals.space_group.tolist() == [136]
    assert [(failure.material_id, failure.reason) for failure in data.failures] == [
        ("0", "the cell has no volume (less than 0.1 Å^3)")
    ]


def test_sources_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.cif file in the folder"):
        prepare(tmp_path / "empty")
    broken = tmp_path / "broken.extxyz"
    broken.write_text("3\nLattice=nonsense\nNa 0 0\n")
    with pytest.raises(DataError, match="cannot be read as extxyz after 0 frames"):
        prepare(broken)
    write_structures(tmp_path / "mine", {"salt": rock_salt()}, "cif")
    labels = tmp_path / "mine" / "labels.csv"
    labels.write_text("name,band_gap\nsalt,5.0\n")
    with pytest.raises(DataError, match="lacks the column material_id"):
        prepare(tmp_path / "mine")
    labels.write_text("material_id,band_gap\nsalt,5.0\nsalt,6.0\n")
    with pytest.raises(DataError, match="names salt more than once"):
        prepare(tmp_path / "mine")


@pytest.mark.parametrize(("file_format", "file"), [("cif", "salt.cif"), ("poscar", "salt.vasp")])
def test_what_is_written_is_read_by_pymatgen(file_format, file: str, tmp_path: Path) -> None:
    write_structures(tmp_path, {"salt": rock_salt()}, file_format)
    text = (tmp_path / file).read_text()
    again = Structure.from_str(text, fmt=file_format)
    assert again.composition == rock_salt().composition
    assert again.volume == pytest.approx(rock_salt().volume, rel=1e-6)


def test_extxyz_keeps_names_and_properties() -> None:
    structure = rutile()
    structure.properties["formation_energy_per_atom"] = -3.4
    comment = extxyz_text({"tio2-01": structure}).splitlines()[1]
    assert "material_id=tio2-01" in comment
    assert "formation_energy_per_atom=-3.4" in comment
