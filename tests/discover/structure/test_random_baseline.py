import time

import numpy as np
import pytest
import torch
from ase.data import covalent_radii
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from discover.structure.base import StructureError, cif_text
from discover.structure.random_baseline import RandomCoordinates, random_letters, wyckoff_operations
from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY
from tests.discover.crystals import CRYSTALS, crystal_batch

NAMES = sorted(CRYSTALS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def structures() -> list[Structure | None]:
    return RandomCoordinates().generate(crystal_batch(NAMES), seeded())


def test_textbook_crystals_get_structures_of_their_composition(structures: list[Structure | None]) -> None:
    crystals = crystal_batch(NAMES)
    assert sum(structure is not None for structure in structures) >= len(NAMES) - 1
    sizes = (crystals.n_atoms * crystals.centring).tolist()
    for structure, formula, size in zip(structures, crystals.formulas(), sizes, strict=True):
        if structure is not None:
            assert structure.composition.reduced_formula == formula
            assert len(structure) == size


def test_the_cell_is_the_one_that_was_asked_for(structures: list[Structure | None]) -> None:
    for structure, name in zip(structures, NAMES, strict=True):
        if structure is not None:
            assert structure.lattice.parameters == pytest.approx(CRYSTALS[name][2])


@pytest.mark.filterwarnings("ignore:Issues encountered while parsing CIF")  # thirds are rounded to ideal values
def test_spglib_finds_the_space_group_in_the_structure_and_in_its_cif(structures: list[Structure | None]) -> None:
    for structure, name in zip(structures, NAMES, strict=True):
        if structure is None:
            continue
        read = Structure.from_str(cif_text(structure), fmt="cif")
        assert len(read) == len(structure)
        for candidate in (structure, read):
            assert SpacegroupAnalyzer(candidate, symprec=1e-3).get_space_group_number() == CRYSTALS[name][0]


def test_no_two_atoms_are_too_close(structures: list[Structure | None]) -> None:
    for structure in structures:
        if structure is None:
            continue
        numbers = [site.specie.Z for site in structure]
        for i, j in zip(*np.triu_indices(len(structure), 1), strict=True):
            bond = covalent_radii[numbers[i]] + covalent_radii[numbers[j]]
            assert structure.get_distance(i, j) >= 0.6 * bond - 1e-6


def test_a_structure_depends_on_the_seed_only() -> None:
    crystals = crystal_batch(["SiO2", "TiO2"])
    first, again = (RandomCoordinates().generate(crystals, seeded(3))[0] for _ in range(2))
    other = RandomCoordinates().generate(crystals, seeded(4))[0]
    assert first is not None
    assert again is not None
    assert other is not None
    assert first == again
    assert first != other


def test_a_cell_that_is_too_small_fails_instead_of_crowding() -> None:
    crystals = crystal_batch(["TiO2", "NaCl"])
    tiny = CrystalBatch(
        crystals.space_group,
        crystals.elements,
        crystals.letters,
        crystals.counts,
        crystals.lattice_parameters * torch.tensor([0.4, 0.4, 0.4, 1, 1, 1], dtype=torch.float64),
    )
    assert RandomCoordinates().generate(tiny, seeded()) == [None, None]


def test_crystals_without_letters_get_some_that_fit() -> None:
    crystals = crystal_batch(["TiO2", "SrTiO3", "Al2O3"]).without_letters()
    for structure, formula in zip(RandomCoordinates().generate(crystals, seeded()), crystals.formulas(), strict=True):
        assert structure is not None
        assert structure.composition.reduced_formula == formula


def test_counts_that_contradict_the_letters_are_refused() -> None:
    good = crystal_batch(["NaCl"])
    wrong = CrystalBatch(good.space_group, good.elements, good.letters, good.counts + 1, good.lattice_parameters)
    with pytest.raises(StructureError, match="holds 1 atoms"):
        RandomCoordinates().generate(wrong, seeded())


def test_a_time_limit_ends_the_search() -> None:
    start = time.monotonic()
    never = RandomCoordinates(n_tries=10**9, good_enough=10.0, time_limit=0.2)
    assert never.generate(crystal_batch(["ZrO2"]), seeded()) == [None]
    assert time.monotonic() - start < 5


@settings(max_examples=50)
@given(
    space_group=st.integers(1, 230),
    picks=st.lists(st.integers(0, 26), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_letters_hold_the_atoms_and_use_fixed_positions_once(
    space_group: int, picks: list[int], seed: int
) -> None:
    group = space_group - 1
    n_letters = int(SYMMETRY.n_letters[group])
    sizes = SYMMETRY.primitive_multiplicity[group]
    fixed = SYMMETRY.n_free_coords[group] == 0
    letters = [pick % n_letters for pick in picks]
    letters = [x for i, x in enumerate(letters) if not fixed[x] or x not in letters[:i]]
    amounts = [(10 + i, int(sizes[x])) for i, x in enumerate(letters)]
    orbits = random_letters(space_group, amounts, np.random.default_rng(seed))
    for z, count in amounts:
        assert sum(int(sizes[letter]) for other, letter in orbits if other == z) == count
    used = [letter for _, letter in orbits if fixed[letter]]
    assert len(used) == len(set(used))


def test_atoms_that_no_letters_hold_are_refused() -> None:
    with pytest.raises(StructureError, match="no positions"):
        random_letters(225, [(11, 5)], np.random.default_rng(0))


@pytest.mark.parametrize("space_group", [1, 15, 47, 70, 166, 194, 227])
def test_operations_are_as_many_as_the_multiplicity(space_group: int) -> None:
    operations = wyckoff_operations(space_group)
    group = space_group - 1
    assert len(operations) == int(SYMMETRY.n_letters[group])
    assert [len(ops) for ops in operations] == SYMMETRY.multiplicity[group, : len(operations)].tolist()
