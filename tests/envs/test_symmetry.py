"""The shipped table of the 230 groups against PyXtal, spglib and Crystal-GFN's counts."""

import pytest
import spglib
import torch
from pyxtal.symmetry import Group

from envs.conventions import LATTICE_SYSTEMS, LETTERS, POINT_SYMMETRIES, point_symmetry_of_class
from envs.crystal import _CENTRING
from envs.symmetry import SYMMETRY


@pytest.mark.parametrize("space_group", [1, 2, 5, 12, 14, 19, 47, 62, 99, 139, 146, 166, 194, 216, 225, 227, 230])
def test_positions_are_those_of_pyxtal(space_group: int) -> None:
    group, g = Group(space_group), space_group - 1
    positions = sorted(group.Wyckoff_positions, key=lambda position: LETTERS.index(position.letter))
    n = len(positions)
    assert int(SYMMETRY.n_letters[g]) == n
    assert SYMMETRY.multiplicity[g, :n].tolist() == [position.multiplicity for position in positions]
    assert SYMMETRY.n_free_coords[g, :n].tolist() == [position.get_dof() for position in positions]
    assert bool((SYMMETRY.multiplicity[g, n:] == 0).all())
    assert bool((SYMMETRY.n_free_coords[g, n:] == -1).all())
    for i in (0, n - 1):
        positions[i].get_site_symmetry()
        assert SYMMETRY.site_symmetry_names[int(SYMMETRY.site_symmetry[g, i])] == positions[i].site_symm


def test_there_are_1731_positions() -> None:
    assert int(SYMMETRY.n_letters.sum()) == 1731
    exists = SYMMETRY.multiplicity > 0
    assert int(exists.sum()) == 1731
    assert torch.bincount(SYMMETRY.n_free_coords[exists]).tolist() == [616, 718, 167, 230]


def test_centring_is_the_number_of_translations_in_spglib() -> None:
    halls = {spglib.get_spacegroup_type(hall).number: hall for hall in range(530, 0, -1)}  # the first setting of each
    for number, hall in halls.items():
        operations = spglib.get_symmetry_from_database(hall)
        n_translations = sum((rotation == torch.eye(3).numpy()).all() for rotation in operations["rotations"])
        assert int(SYMMETRY.centring[number - 1]) == n_translations


def test_centring_is_that_of_the_crystal_record() -> None:
    assert SYMMETRY.centring.tolist() == _CENTRING[1:].tolist()


def test_general_positions_have_every_operation_of_the_group() -> None:
    last = (SYMMETRY.n_letters - 1)[:, None]
    assert bool((SYMMETRY.n_free_coords.gather(1, last) == 3).all())
    order = SYMMETRY.primitive_multiplicity.gather(1, last)[:, 0]
    orders_of_classes = [int(order[g - 1]) for g in (1, 2, 16, 47, 123, 166, 191, 225)]
    assert orders_of_classes == [1, 2, 4, 8, 16, 12, 24, 48]


def test_lattice_systems_have_their_numbers_of_groups() -> None:
    numbers = dict(zip(LATTICE_SYSTEMS, torch.bincount(SYMMETRY.lattice_system).tolist(), strict=True))
    assert numbers == {
        "triclinic": 2,
        "monoclinic": 13,
        "orthorhombic": 59,
        "tetragonal": 68,
        "trigonal": 18,
        "rhombohedral": 7,
        "hexagonal": 27,
        "cubic": 36,
    }


def test_point_symmetries_are_properties_of_the_32_classes() -> None:
    classes = {spglib.get_spacegroup_type(hall).pointgroup_international for hall in range(1, 531)}
    assert len(classes) == 32
    numbers = [0] * len(POINT_SYMMETRIES)
    for name in classes:
        numbers[point_symmetry_of_class(name)] += 1
    # Crystal-GFN, arXiv:2310.04925: 11 centrosymmetric, 5 of no other kind, 6 enantiomorphic, 5 polar, 5 both.
    assert numbers == [11, 5, 6, 5, 5]


def test_point_symmetries_follow_from_the_operations() -> None:
    halls = {spglib.get_spacegroup_type(hall).number: hall for hall in range(530, 0, -1)}
    for number, hall in halls.items():
        rotations = torch.as_tensor(spglib.get_symmetry_from_database(hall)["rotations"]).double()
        inverts = bool((rotations == -torch.eye(3)).flatten(1).all(dim=1).any())
        is_chiral = bool((torch.linalg.det(rotations) > 0).all())
        is_polar = int(torch.linalg.matrix_rank(rotations.mean(dim=0))) > 0  # a direction that every operation keeps
        names = {
            (True, False, False): "centrosymmetric",
            (False, False, False): "non-centrosymmetric",
            (False, True, False): "enantiomorphic",
            (False, False, True): "polar",
            (False, True, True): "enantiomorphic-polar",
        }
        assert POINT_SYMMETRIES[int(SYMMETRY.point_symmetry[number - 1])] == names[inverts, is_chiral, is_polar]


def test_25_groups_are_non_centrosymmetric_and_nothing_else() -> None:
    assert int((SYMMETRY.point_symmetry == POINT_SYMMETRIES.index("non-centrosymmetric")).sum()) == 25
