"""Templates: elements are exchanged, cells are scaled, the most alike comes first, and nothing is proposed twice."""

import math

import numpy as np
import pytest
import torch
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from discover.data import PreparedData, batch_orbits, orbits_of_structure
from discover.errors import DataError
from discover.structure.orbits import to_structures
from discover.templates import Query, Templates, kinds_of, retrieve, search, templates_of_data
from envs.reference_volume import log_reference_volume
from tests.discover.textbook import corundum, diamond, perovskite, rock_salt, rutile, spinel, wurtzite


def prepared(structures: list[Structure], above: list[float]) -> PreparedData:
    crystals, positions = batch_orbits(orbits_of_structure(structure) for structure in structures)
    n = len(crystals)
    nothing = torch.full((n,), math.nan, dtype=torch.float64)
    return PreparedData(
        crystals=crystals,
        positions=positions,
        labels={
            "formation_energy_per_atom": nothing,
            "band_gap": nothing,
            "e_above_hull": torch.tensor(above, dtype=torch.float64),
        },
        ids=np.array([str(i) for i in range(n)]),
        formulas=np.array(crystals.formulas()),
        label_source=np.array([""] * n),
        geometry=np.array([""] * n),
        failures=(),
    )


def caesium_chloride() -> Structure:
    return Structure.from_spacegroup("Pm-3m", Lattice.cubic(4.12), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


TEXTBOOK = (rock_salt, rutile, perovskite, diamond, wurtzite, corundum, spinel, caesium_chloride)


@pytest.fixture(scope="module")
def templates() -> Templates:
    return templates_of_data(prepared([build() for build in TEXTBOOK], [0.0] * len(TEXTBOOK)))


def test_a_crystal_is_found_again_from_its_composition(templates: Templates) -> None:
    for build in TEXTBOOK:
        structure = build().get_primitive_structure()
        composition = {element.symbol: int(count) for element, count in structure.composition.items()}
        proposals = retrieve(templates, [composition], 1)
        (found,) = to_structures(proposals.crystals, proposals.parameters, primitive=True)
        assert StructureMatcher().fit(found, structure), structure.composition
        assert proposals.score[0] == pytest.approx(0.0)  # the same elements


def test_the_most_alike_elements_come_first(templates: Templates) -> None:
    proposals = retrieve(templates, [{"K": 1, "Br": 1}, {"Cs": 1, "Br": 1}], 2)
    assert proposals.query.tolist() == [0, 0, 1, 1]
    assert proposals.crystals.space_group.tolist() == [225, 221, 221, 225]
    assert (proposals.score[::2] > proposals.score[1::2]).all()
    for crystal, wanted in zip(proposals.crystals.formulas(), ["KBr", "KBr", "CsBr", "CsBr"], strict=True):
        assert crystal == wanted


def test_elements_take_the_place_of_those_they_resemble(templates: Templates) -> None:
    """In perovskite barium takes strontium's place, zirconium titanium's; the other assignment comes later."""
    proposals = retrieve(templates, [{"Ba": 1, "Zr": 1, "O": 3}], 5)
    assert proposals.crystals.wyckoff_strings() == ["Ba:1a Zr:1b O:3c", "Zr:1a Ba:1b O:3c"]


def test_cells_are_scaled_by_elemental_volumes(templates: Templates) -> None:
    proposals = retrieve(templates, [{"Mg": 1, "O": 1}], 1)
    old, new = (
        float(log_reference_volume(torch.tensor([[4, 4]]), torch.tensor(elements)).exp())
        for elements in ([11, 17], [12, 8])
    )
    assert float(proposals.crystals.volume) == pytest.approx(5.64**3 * new / old)


def test_templates_of_the_same_formula_can_be_left_out(templates: Templates) -> None:
    query = Query.of({"Na": 1, "Cl": 1})
    assert len(search(templates, query, 5).rows) == 2
    kept = search(templates, query, 5, other_formulas=True)
    assert templates.formulas[kept.rows.numpy()].tolist() == ["CsCl"]


def test_near_repeats_are_left_out() -> None:
    stretched = rock_salt()
    stretched.scale_lattice(stretched.volume * 1.2)
    repeated = templates_of_data(prepared([rock_salt(), stretched, caesium_chloride()], [0.0] * 3))
    assert len(search(repeated, Query.of({"K": 1, "Br": 1}), 5).rows) == 2


def test_a_composition_without_a_template_gives_nothing(templates: Templates) -> None:
    proposals = retrieve(templates, [{"Ti": 7, "O": 11}, {"Mg": 1, "O": 1}], 3)
    assert set(proposals.query.tolist()) == {1}


def test_only_stable_rows_are_templates_unless_nothing_is_known() -> None:
    structures = [rock_salt(), wurtzite(), rutile()]
    some = templates_of_data(prepared(structures, [0.0, 0.5, math.nan]))
    assert some.formulas.tolist() == ["NaCl"]
    assert len(templates_of_data(prepared(structures, [math.nan] * 3))) == 3
    with pytest.raises(DataError, match=r"no row has e_above_hull < 0\.08"):
        templates_of_data(prepared(structures, [0.5] * 3))


def test_selected_templates_are_searched_alone(templates: Templates) -> None:
    chosen = templates.select(templates.space_group == 221)
    assert len(chosen) == 2
    assert retrieve(chosen, [{"K": 1, "Br": 1}], 5).crystals.space_group.tolist() == [221]


def test_kinds_are_ordered_by_count_then_atomic_number() -> None:
    crystals, _ = batch_orbits([orbits_of_structure(spinel())])
    kinds, counts, elements = kinds_of(crystals)
    assert counts.tolist() == [[2, 4, 8]]
    assert elements.tolist() == [[12, 13, 8]]
    assert elements[0][kinds[0]].tolist() == crystals.elements[0].tolist()


@pytest.mark.parametrize("composition", [{"Xx": 1}, {"Na": 0, "Cl": 1}, {"Na": 1.5, "Cl": 1}])
def test_what_is_no_composition_is_refused(composition: dict[str, int]) -> None:
    with pytest.raises(DataError, match="not an element with a whole number of atoms"):
        Query.of(composition)
