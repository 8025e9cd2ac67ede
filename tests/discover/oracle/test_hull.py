import math

import numpy as np
import pandas as pd
import pytest
from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
from pymatgen.core import Composition, Element

from discover.oracle.hull import Hull, HullError, elemental_energies, formation_energy_per_atom

ENERGIES = {"Li2O": -2.0, "Fe2O3": -1.7, "LiFeO2": -1.9, "Fe3O4": -1.65, "FeO": -1.2, "LiO": -1.0, "Fe": 0.0}


def test_hull_energies_are_those_of_pymatgens_phase_diagram() -> None:
    entries = [PDEntry(Composition(f), e * Composition(f).num_atoms) for f, e in ENERGIES.items()]
    entries += [PDEntry(Composition(symbol), 0.0) for symbol in ("Li", "Fe", "O")]
    diagram = PhaseDiagram(entries, [Element(symbol) for symbol in ("Fe", "Li", "O")])
    hull = Hull(ENERGIES)
    for formula in ("Li2O", "LiFeO2", "Li5FeO4", "LiFe2O4", "FeO", "Li3Fe", "Fe7O9"):
        composition = Composition(formula)
        assert hull.energy(composition) == pytest.approx(diagram.get_hull_energy_per_atom(composition), abs=1e-9)


def test_decompositions_are_those_of_pymatgens_phase_diagram() -> None:
    entries = [PDEntry(Composition(f), e * Composition(f).num_atoms) for f, e in ENERGIES.items()]
    entries += [PDEntry(Composition(symbol), 0.0) for symbol in ("Li", "Fe", "O")]
    diagram = PhaseDiagram(entries, [Element(symbol) for symbol in ("Fe", "Li", "O")])
    hull = Hull(ENERGIES)
    for formula in ("Li2O", "Li5FeO4", "LiFe2O4", "Li3Fe", "Fe7O9"):
        expected = {
            e.composition.reduced_formula: n for e, n in diagram.get_decomposition(Composition(formula)).items()
        }
        found = hull.decomposition(Composition(formula))
        assert found == pytest.approx(expected, abs=1e-6)
        assert sum(found.values()) == pytest.approx(1.0)
        assert list(found.values()) == sorted(found.values(), reverse=True)
    assert hull.decomposition(Composition("Li2O")) == {"Li2O": pytest.approx(1.0)}
    assert hull.decomposition(Composition("NaFeO2")) == {}


def test_members_of_the_hull_are_at_zero_and_others_relative_to_it() -> None:
    hull = Hull(ENERGIES)
    found = hull.e_above_hull([Composition("Li2O"), Composition("Li4O2"), Composition("Li2O")], [-2.0, -1.9, -2.3])
    assert found == pytest.approx([0.0, 0.1, -0.3])


def test_an_unknown_element_or_energy_is_unknown_not_unstable_by_number() -> None:
    hull = Hull(ENERGIES)
    found = hull.e_above_hull([Composition("NaFeO2"), Composition("Li2O")], [-2.0, math.nan])
    assert np.isnan(found).all()
    assert hull.lacks(Composition("NaFeO2")) == ("Na",)


def test_the_lowest_energy_of_a_formula_counts() -> None:
    assert Hull({"TiO2": -3.0, "Ti2O4": -3.2}).energy(Composition("TiO2")) == pytest.approx(-3.2)
    assert Hull({"TiO2": -3.0, "Ti2O4": -3.2}).formulas == {"TiO2"}


def test_a_file_is_read_and_its_mistakes_are_named(tmp_path, capsys) -> None:
    file = tmp_path / "entries.csv.gz"
    with pytest.raises(HullError, match="no hull file"):
        Hull.load(tmp_path)
    pd.DataFrame({"formula": ["NaCl", "NaN"], "e_form": [-2.0, 0.1]}).to_csv(file, index=False)
    assert Hull.load(tmp_path).formulas == {"NaCl", "NaN"}  # "NaN" is sodium nitride
    pd.DataFrame({"formula": ["NaCl", "KCl"], "e_form": [-2.0, None]}).to_csv(file, index=False)
    assert Hull.load(tmp_path).formulas == {"NaCl"}
    assert "1 of 2 rows have no formation energy" in capsys.readouterr().err
    for wrong in ("NaCl-alpha", "Xx2O", None):
        pd.DataFrame({"formula": ["KCl", wrong], "e_form": [-2.0, -1.0]}).to_csv(file, index=False)
        with pytest.raises(HullError, match=rf"entries.csv.gz: '{wrong or ''}' is no chemical formula"):
            Hull.load(file)
    pd.DataFrame({"formula": ["NaCl"], "energy": [-2.0]}).to_csv(file, index=False)
    with pytest.raises(HullError, match="no column e_form"):
        Hull.load(file)
    pd.DataFrame({"formula": ["NaCl"], "e_form": ["low"]}).to_csv(file, index=False)
    with pytest.raises(HullError, match=r"row 0 \(NaCl\)"):
        Hull.load(file)


def test_formation_energy_subtracts_the_elements() -> None:
    references = elemental_energies()
    assert len(references) == 89
    assert "Na" in references
    expected = -4.0 - (references["Na"] + references["Cl"]) / 2
    assert formation_energy_per_atom(Composition("Na2Cl2"), -4.0) == pytest.approx(expected)
    assert math.isnan(formation_energy_per_atom(Composition("PoLr"), -4.0))


def test_a_digest_knows_phases_and_energies_and_no_order() -> None:
    hull = Hull({"NaCl": -2.0, "KCl": -2.2})
    assert Hull({"KCl": -2.2, "Na2Cl2": -2.0}).digest == hull.digest
    assert Hull({"NaCl": -2.0, "KCl": -2.21}).digest != hull.digest
