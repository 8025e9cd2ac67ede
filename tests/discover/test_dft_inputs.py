import json
import math

import ase.io
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.vasp import Incar, Kpoints, Poscar

from discover.dft_inputs import (
    DftError,
    Pseudopotentials,
    espresso_input,
    k_points,
    vasp_inputs,
    write_espresso_inputs,
    write_vasp_inputs,
)

HEMATITE = Structure.from_spacegroup(
    "R-3c", Lattice.hexagonal(5.0355, 13.7471), ["Fe", "O"], [[0, 0, 0.35534], [0.3056, 0, 0.25]]
).get_primitive_structure()
NACL = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6402), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
POLONIUM = Structure(Lattice.cubic(3.35), ["Po"], [[0, 0, 0]])


def test_vasp_inputs_have_the_settings_of_the_materials_project(tmp_path) -> None:
    assert write_vasp_inputs(tmp_path, {"r01-0001": HEMATITE, "r01-0002": NACL}) == {}
    folder = tmp_path / "r01-0001"
    assert sorted(file.name for file in folder.iterdir()) == ["INCAR", "KPOINTS", "POSCAR", "POTCAR.spec"]
    incar = Incar.from_file(folder / "INCAR")
    # The settings that MP2020 corrections are made for: Jain et al. 2011, U of iron in oxides 5.3 eV.
    assert (incar["ENCUT"], incar["ISIF"], incar["ISPIN"], incar["LDAUU"]) == (520, 3, 2, [5.3, 0])
    assert incar["MAGMOM"] == [5.0] * 4 + [0.6] * 6
    assert (folder / "POTCAR.spec").read_text().split() == ["Fe_pv", "O"]
    assert Poscar.from_file(folder / "POSCAR").structure.matches(HEMATITE)
    plain = Incar.from_file(tmp_path / "r01-0002" / "INCAR")
    assert not plain.get("LDAU", False)


def test_a_structure_without_a_potential_is_named_and_the_others_are_written(tmp_path) -> None:
    failures = write_vasp_inputs(tmp_path, {"a": POLONIUM, "b": NACL})
    assert list(failures) == ["a"]
    assert "no VASP potential for Po" in failures["a"]
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "b" / "POSCAR").is_file()


def test_espresso_inputs_are_read_back_by_ase(tmp_path) -> None:
    write_espresso_inputs(tmp_path, {"r01-0001": HEMATITE})
    file = tmp_path / "r01-0001" / "pw.in"
    atoms = ase.io.read(file, format="espresso-in")
    assert atoms.get_chemical_formula() == "Fe4O6"
    assert atoms.get_volume() == pytest.approx(HEMATITE.volume)
    text = file.read_text()
    assert "calculation      = 'vc-relax'" in text
    assert "nspin            = 2" in text
    assert "starting_magnetization(1) = 0.5" in text
    assert "ecutwfc          = 90.0" in text
    assert "&FCP" not in text


def test_spin_is_on_for_magnetic_elements_only() -> None:
    assert "nspin" not in espresso_input(NACL)
    assert "nspin" in espresso_input(HEMATITE)


def test_k_points_are_as_dense_as_those_of_vasp() -> None:
    assert k_points(HEMATITE) == tuple(Kpoints.from_str(vasp_inputs(HEMATITE)["KPOINTS"]).kpts[0])
    # 64 points per Å^-3: along a cubic axis 4 per Å^-1 of 2π/a, rounded down.
    assert k_points(NACL) == (math.floor(4 * 2 * math.pi / 5.6402),) * 3 == (4, 4, 4)


def test_an_sssp_table_gives_names_and_the_larger_cutoffs(tmp_path) -> None:
    table = {
        "Fe": {"filename": "Fe.pbe-spn-kjpaw_psl.0.2.1.UPF", "cutoff_wfc": 90.0, "cutoff_rho": 1080.0},
        "O": {"filename": "O.pbe-n-kjpaw_psl.0.1.UPF", "cutoff_wfc": 50.0, "cutoff_rho": 400.0},
        "Na": {"filename": "na_pbe_v1.5.uspp.F.UPF", "cutoff_wfc": 40.0, "cutoff_rho": 320.0},
        "Cl": {"filename": "cl_pbe_v1.4.uspp.F.UPF", "cutoff_wfc": 40.0, "cutoff_rho": 320.0},
    }
    path = tmp_path / "SSSP.json"
    path.write_text(json.dumps(table))
    pseudopotentials = Pseudopotentials.load(path)
    assert pseudopotentials.cutoffs(HEMATITE) == (90.0, 1080.0)
    assert pseudopotentials.cutoffs(NACL) == (40.0, 320.0)
    text = espresso_input(NACL, pseudopotentials=pseudopotentials)
    assert "na_pbe_v1.5.uspp.F.UPF" in text
    assert "ecutrho          = 320.0" in text


@pytest.mark.parametrize("content", ["no JSON", "[1]", '{"Fe": {"filename": "Fe.upf"}}', '{"Fe": 3}'])
def test_a_broken_table_is_refused(tmp_path, content) -> None:
    path = tmp_path / "SSSP.json"
    path.write_text(content)
    with pytest.raises(DftError, match="no SSSP table"):
        Pseudopotentials.load(path)


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name) -> None:
    with pytest.raises(DftError, match="plain name"):
        write_espresso_inputs(tmp_path, {name: NACL})
