"""Formulas: what can be meant is understood, what cannot is refused with the remedy."""

import pytest
from pymatgen.core import Composition

from discover.compositions import CompositionError, parse_formula, ranges, read_query
from discover.formula_units import MAX_ATOMS


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("TiO2", {"Ti": 1, "O": 2}),
        ("Ti4O8", {"Ti": 4, "O": 8}),
        ("TiO₂", {"Ti": 1, "O": 2}),
        ("Ca3(PO4)2", {"Ca": 3, "P": 2, "O": 8}),
        ("K4[Fe(CN)6]", {"K": 4, "Fe": 1, "C": 6, "N": 6}),
        ("CuSO4·5H2O", {"Cu": 1, "S": 1, "O": 9, "H": 10}),
        ("CaSO4*2H2O", {"Ca": 1, "S": 1, "O": 6, "H": 4}),
        ("NaN", {"Na": 1, "N": 1}),
        ("He", {"He": 1}),
    ],
)
def test_formulas_are_read(text: str, counts: dict[str, int]) -> None:
    assert parse_formula(text) == counts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read composition=''; write element symbols"),
        ("tio2", "did you mean TiO2"),
        ("2TiO2", "cannot read composition='2TiO2'"),
        ("Al2O3)", "cannot read"),
        ("Fe3+", "leave charges"),
        ("TiO2-x", "leave charges, ranges and variables out"),
        ("Xx2O", "Xx is no element"),
        ("X2O", "X is no element"),
        ("TIO2", r"T is an isotope of hydrogen; write H \(or Ti\?\)"),
        ("D2O", "D is an isotope"),
        ("Ti0O2", "holds no Ti"),
        ("Li0.5CoO2", r"no whole numbers \(Li 0.5, Co 1, O 2\).*Write composition=Li\(CoO2\)2"),
        ("CuSO4.5H2O", "a hydrate takes a raised dot"),
        ("Si600", "hold up to 512"),
    ],
)
def test_what_is_no_formula_is_refused_with_a_hint(text: str, message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        read_query(text)


def test_the_proposed_whole_formula_is_read_back() -> None:
    with pytest.raises(CompositionError) as caught:
        parse_formula("Li0.5CoO2")
    proposed = str(caught.value).partition("Write composition=")[2].partition(";")[0]
    assert Composition(parse_formula(proposed)).reduced_formula == Composition("LiCo2O4").reduced_formula


def test_a_reduced_formula_tries_every_cell_of_up_to_20_atoms() -> None:
    query = read_query("TiO2")
    assert list(query.shares) == [1, 2, 3, 4, 5, 6]
    assert sum(query.shares.values()) == pytest.approx(1.0)
    assert max(query.shares, key=query.shares.__getitem__) == 2  # rutile's
    assert query.cell(2) == {"Ti": 2, "O": 4}


def test_any_other_formula_is_the_cell_itself() -> None:
    query = read_query("Ti4O8")
    assert (query.formula, query.shares, query.cell(4)) == ("TiO2", {4: 1.0}, {"Ti": 4, "O": 8})
    assert read_query("TiO2", n_formula_units=4) == query
    with pytest.raises(CompositionError, match="already says 4 formula units of TiO2"):
        read_query("Ti4O8", n_formula_units=2)


def test_peroxides_and_molecules_keep_their_formula() -> None:
    assert read_query("Na2O2").cell(1) == {"Na": 2, "O": 2}
    assert list(read_query("Na2O2").shares) == [1, 2, 3, 4, 5]
    assert read_query("NaO").cell(1) == {"Na": 1, "O": 1}
    assert read_query("Cl2").cell(2) == {"Cl": 4}


@pytest.mark.parametrize(("text", "formula", "units"), [("N5", "N", 5), ("O3", "O", 3), ("Na5O5", "NaO", 5)])
def test_nothing_is_lost_of_what_is_no_multiple_of_a_molecule(text: str, formula: str, units: int) -> None:
    query = read_query(text)
    assert (query.formula, query.shares) == (formula, {units: 1.0})
    assert query.cell(units) == dict(parse_formula(text))


def test_cells_larger_than_the_training_data_are_allowed_and_known() -> None:
    assert read_query("CuSO4·5H2O").largest > MAX_ATOMS
    assert read_query("TiO2", n_formula_units=7).largest > MAX_ATOMS


@pytest.mark.parametrize("text", ["Ti3O2", "Fe", "Fe3O4"])
def test_what_cannot_be_neutral_is_refused_where_ionic_is_asked(text: str) -> None:
    with pytest.raises(CompositionError, match=r"not charge-balanced.*chemistry=any"):
        read_query(text, chemistry="ionic")
    assert read_query(text, chemistry="any").shares


def test_a_space_group_leaves_the_cells_it_can_hold() -> None:
    rutile = read_query("TiO2", space_group=136)
    assert list(rutile.shares) == [2, 4, 6]  # its smallest positions hold two atoms
    assert sum(rutile.shares.values()) == pytest.approx(1.0)


def test_an_impossible_space_group_lists_the_possible_ones() -> None:
    with pytest.raises(CompositionError, match=r"space group 136 has no Wyckoff positions for TiO2 with 1 ") as caught:
        read_query("TiO2", n_formula_units=1, space_group=136)
    listed = str(caught.value).partition("Possible are ")[2]
    numbers = [span.split("-") for span in listed.split(", ")]
    groups = {g for span in numbers for g in range(int(span[0]), int(span[-1]) + 1)}
    assert {1, 2, 225} <= groups  # fluorite
    assert 136 not in groups
    for group in groups:
        assert read_query("TiO2", n_formula_units=1, space_group=group).shares == {1: 1.0}


def test_ranges_are_short() -> None:
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"
