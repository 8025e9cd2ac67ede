import math
from dataclasses import replace

import pandas as pd
import pytest
from pymatgen.core import Composition, Lattice, Structure

from discover.errors import DataError
from discover.nearest import Likeness, Nearest, Reference, find_nearest
from discover.structure.base import cif_text


def rock_salt(cation: str, anion: str, a: float) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def caesium_chloride(cation: str, anion: str, a: float) -> Structure:
    return Structure.from_spacegroup("Pm-3m", Lattice.cubic(a), [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def rutile(metal: str, a: float, c: float, u: float) -> Structure:
    return Structure.from_spacegroup("P4_2/mnm", Lattice.tetragonal(a, c), [metal, "O"], [[0, 0, 0], [u, u, 0]])


KNOWN = {
    "known-1": rock_salt("Na", "Cl", 5.64),
    "known-2": caesium_chloride("Cs", "Cl", 4.12),
    "known-3": rutile("Sn", 4.737, 3.186, 0.3056),
    "known-4": rock_salt("Mg", "O", 4.21),
    "known-5": rutile("Ge", 4.395, 2.860, 0.3059),
}


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "material_id": list(KNOWN),
            "formula": [structure.composition.reduced_formula for structure in KNOWN.values()],
            "cif": [cif_text(structure) for structure in KNOWN.values()],
        }
    )


def nearest(structure: Structure, reference: Reference) -> Nearest:
    return find_nearest([structure], reference, n_workers=0)[0]


def test_the_same_material_is_found_by_its_formula_in_any_cell_and_scale(table) -> None:
    found = nearest(rock_salt("Na", "Cl", 5.8).get_primitive_structure(), Reference.from_table(table))
    assert (found.likeness, found.name, found.same_prototype) == (Likeness.SAME_MATERIAL, "known-1", True)
    assert found.rms == pytest.approx(0.0, abs=1e-6)


def test_the_distance_of_a_displaced_structure_has_no_unit(table) -> None:
    structure = rock_salt("Na", "Cl", 5.64).get_primitive_structure()
    structure.translate_sites([0], [0.282, 0, 0], frac_coords=False)
    found = nearest(structure, Reference.from_table(table))
    # One of two atoms moved by 0.282 Å: half of it each once the mean is removed, over (V/N)^(1/3) = a / 2.
    assert found.rms == pytest.approx(0.05, rel=1e-3)
    assert found.same_prototype is False


def test_another_structure_of_a_known_formula_is_said_to_be_one(table) -> None:
    found = nearest(caesium_chloride("Na", "Cl", 3.4), Reference.from_table(table.drop(index=1)))
    assert (found.likeness, found.name, found.n_same_formula) == (Likeness.SAME_FORMULA, "known-1", 1)
    assert math.isnan(found.rms)
    assert found.same_prototype is False


def test_a_structure_type_is_found_with_other_elements_and_the_closest_elements_win(table) -> None:
    found = nearest(rutile("Ti", 4.594, 2.959, 0.305), Reference.from_table(table))
    assert (found.likeness, found.same_prototype, found.n_compared) == (Likeness.SAME_TYPE, True, 2)
    assert found.formula in {"SnO2", "GeO2"}
    assert 0 <= found.rms < 0.05
    salt = nearest(rock_salt("K", "Cl", 6.29), Reference.from_table(table))
    assert salt.formula == "NaCl"  # shares an element, MgO does not
    assert nearest(caesium_chloride("Na", "Cl", 3.4), Reference.from_table(table)).formula == "CsCl"


def test_nothing_is_near_where_the_stoichiometry_is_new(table) -> None:
    structure = Structure.from_spacegroup(
        "Pm-3m", Lattice.cubic(3.895), ["Ca", "Ti", "O"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
    )
    found = nearest(structure, Reference.from_table(table))
    assert (found.likeness, found.name, found.n_compared) == (Likeness.NONE, "", 0)


def test_without_ids_the_formula_names_the_material(table) -> None:
    found = nearest(rock_salt("Na", "Cl", 5.64), Reference.from_table(table.drop(columns="material_id")))
    assert (found.material_id, found.name) == ("", "NaCl")


def test_only_what_is_compared_is_parsed(table, caplog) -> None:
    table.loc[[1, 2, 3, 4], "cif"] = "no CIF at all"
    reference = Reference.from_table(table)
    assert nearest(rock_salt("Na", "Cl", 5.64), reference).name == "known-1"
    broken = nearest(rutile("Ti", 4.594, 2.959, 0.305), reference)
    assert broken.likeness is Likeness.NONE
    assert "2 comparisons failed" in broken.reason
    assert not caplog.records


def test_a_table_without_formulas_is_indexed_by_its_cifs_and_broken_ones_are_reported(table, caplog) -> None:
    table = table.drop(columns="formula")
    table.loc[3, "cif"] = "no CIF at all"
    reference = Reference.from_table(table)
    assert reference.same_formula(Composition("Ge2O4")) == [4]
    assert "left out 1 of 5" in caplog.text
    assert nearest(rutile("Ge", 4.395, 2.860, 0.3059), reference).likeness is Likeness.SAME_MATERIAL


def test_formulas_with_placeholders_are_left_out(table, caplog) -> None:
    table.loc[3, "formula"] = "MO2"
    reference = Reference.from_table(table)
    assert "left out 1 of 5 materials, first row 3" in caplog.text
    assert nearest(rutile("Zr", 4.8, 3.2, 0.306), reference).likeness is Likeness.SAME_TYPE


def test_a_folder_of_cif_files_and_a_csv_give_the_same_answer(table, tmp_path) -> None:
    for name, structure in KNOWN.items():
        (tmp_path / f"{name}.cif").write_text(cif_text(structure))
    table.to_csv(tmp_path / "known.csv", index=False)
    structures = [rock_salt("Na", "Cl", 5.7), rutile("Ti", 4.594, 2.959, 0.305)]
    folder, csv = (Reference.load(path) for path in (tmp_path, tmp_path / "known.csv"))
    assert len(folder) == len(csv) == 5
    assert find_nearest(structures, folder, n_workers=0) == find_nearest(structures, csv, n_workers=0)


def test_a_space_group_column_leaves_out_other_groups_and_a_cap_is_said(table) -> None:
    table["spacegroup.number"] = [225, 221, 136, None, 136]
    reference = Reference.from_table(table)
    assert reference.same_type(Composition("KCl"), 225) == [0, 3]  # the group of the fourth is unknown
    found = find_nearest([rutile("Ti", 4.594, 2.959, 0.305)], reference, n_workers=0, most=1)[0]
    assert found.n_compared == 1
    assert "the first 1 of 2" in found.reason


def test_comparisons_run_in_workers_too(table) -> None:
    structures = [rock_salt("Na", "Cl", 5.7), rutile("Ti", 4.594, 2.959, 0.305)]
    reference = Reference.from_table(table)
    there, here = (find_nearest(structures, reference, n_workers=n) for n in (1, 0))
    for one, other in zip(there, here, strict=True):  # rounding depends on the libraries' threads
        assert replace(one, rms=0.0) == replace(other, rms=0.0)
        assert one.rms == pytest.approx(other.rms, abs=1e-9)


@pytest.mark.parametrize("columns", [["material_id", "formula"], []])
def test_a_reference_without_structures_is_refused(table, columns) -> None:
    with pytest.raises(DataError, match="no column cif"):
        Reference.from_table(table[columns])


def test_a_missing_reference_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="no reference at"):
        Reference.load(tmp_path / "nothing.csv")
    with pytest.raises(DataError, match=r"no \.cif file"):
        Reference.load(tmp_path)
