"""Crystals with parameters and pymatgen structures are the same thing."""

import itertools

import pytest
import torch
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from discover.data import batch_orbits, orbits_of_structure
from discover.structure.orbits import to_structures
from envs.wyckoff_operations import parameters_of
from tests.discover.structure.examples import ALL, textbook


@pytest.mark.parametrize("primitive", [False, True])
def test_structures_have_the_space_group_and_the_atoms(primitive: bool) -> None:
    crystals, parameters = textbook()
    for row, structure in enumerate(to_structures(crystals, parameters, primitive=primitive)):
        assert SpacegroupAnalyzer(structure, symprec=0.01).get_space_group_number() == ALL[row][0]
        per_cell = 1 if primitive else int(crystals.centring[row])
        assert len(structure) == int(crystals.n_atoms[row]) * per_cell
        assert structure.composition.reduced_formula == crystals.formulas()[row]


def test_primitive_and_conventional_cells_hold_the_same_crystal() -> None:
    crystals, parameters = textbook()
    both = zip(to_structures(crystals, parameters), to_structures(crystals, parameters, primitive=True), strict=True)
    matcher = StructureMatcher(ltol=0.01, stol=0.01, angle_tol=0.5)
    assert all(matcher.fit(*pair) for pair in both)


def test_a_structure_gives_back_its_crystal_and_parameters() -> None:
    crystals, parameters = textbook()
    structures = to_structures(crystals, parameters)
    again, positions = batch_orbits(orbits_of_structure(structure) for structure in structures)
    found, error = parameters_of(again.space_group, again.letters, positions)
    assert error.max() < 1e-3
    matcher = StructureMatcher(ltol=0.01, stol=0.01, angle_tol=0.5)
    assert all(matcher.fit(*pair) for pair in zip(structures, to_structures(again, found), strict=True))
    assert torch.equal(again.space_group, crystals.space_group)


def test_elements_of_equal_electronegativity_stay_together() -> None:
    structure = Structure.from_spacegroup(
        "Pm-3m", Lattice.cubic(5.5), ["K", "Rb", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
    )
    for orders in itertools.permutations(range(3)):
        sites = [site for place in orders for site in structure if site.specie.symbol == ("K", "Rb", "Cl")[place]]
        crystals, parameters = batch_orbits([orbits_of_structure(Structure.from_sites(sites))])
        (built,) = to_structures(crystals, parameters)
        assert [symbol for symbol, _ in itertools.groupby(site.specie.symbol for site in built)] == ["K", "Rb", "Cl"]
