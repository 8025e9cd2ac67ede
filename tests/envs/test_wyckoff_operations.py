"""Coordinates of Wyckoff positions agree with PyXtal, and parameters are found again from any atom."""

import pytest
import torch
from pyxtal.symmetry import Group

from envs.conventions import LATTICE_SYSTEMS, LETTERS, N_SPACE_GROUPS
from envs.crystal import CrystalBatch
from envs.equivalence import image
from envs.lattice import lattice_matrix
from envs.symmetry import SYMMETRY
from envs.wyckoff_operations import (
    all_positions,
    free_mask,
    load_operations,
    operation_rows,
    parameters_of,
    representative,
    same_orbit_rows,
    transform_parameters,
)

CELLS = {
    "triclinic": [4.0, 5.0, 7.0, 80.0, 95.0, 105.0],
    "monoclinic": [4.0, 5.0, 7.0, 90.0, 103.0, 90.0],
    "orthorhombic": [4.0, 5.0, 7.0, 90.0, 90.0, 90.0],
    "tetragonal": [4.0, 4.0, 7.0, 90.0, 90.0, 90.0],
    "rhombohedral": [4.0, 4.0, 7.0, 90.0, 90.0, 120.0],
    "hexagonal": [4.0, 4.0, 7.0, 90.0, 90.0, 120.0],
    "cubic": [4.0, 4.0, 4.0, 90.0, 90.0, 90.0],
}


def every_position() -> tuple[torch.Tensor, torch.Tensor]:
    """Return space group (n,) and letter (n, 1) of all 1,731 positions."""
    groups, letters = (SYMMETRY.multiplicity > 0).nonzero().unbind(dim=1)
    return groups + 1, letters[:, None]


def random_parameters(space_group: torch.Tensor, letters: torch.Tensor, seed: int = 0) -> torch.Tensor:
    drawn = torch.rand(*letters.shape, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * free_mask(space_group, letters)


def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    away = x - y
    return (away - away.round()).abs().amax(dim=-1)


def same_atoms(x: torch.Tensor, y: torch.Tensor) -> bool:
    table = distance(x[:, None], y[None]) < 1e-6
    return len(x) == len(y) and bool((table.sum(dim=0) == 1).all() and (table.sum(dim=1) == 1).all())


def test_all_positions_are_there_with_the_right_number_of_free_parameters() -> None:
    groups, letters = every_position()
    assert len(groups) == 1731
    assert len(load_operations().rotation) == 14433
    n_free = SYMMETRY.n_free_coords[groups - 1, letters[:, 0]]
    assert (free_mask(groups, letters)[:, 0].sum(dim=-1) == n_free).all()


@pytest.mark.parametrize("number", [1, 15, 62, 88, 146, 167, 194, 227, 230])
def test_operations_are_those_of_pyxtal(number: int) -> None:
    u = torch.tensor([0.137, 0.291, 0.411], dtype=torch.float64)
    for position in Group(number).Wyckoff_positions:
        letter = torch.tensor([[LETTERS.index(position.letter)]])
        group = torch.tensor([number])
        _, ours = all_positions(group, letter, (u * free_mask(group, letter)[0, 0])[None, None])
        theirs = torch.tensor([op.operate(u.numpy()).tolist() for op in position.ops], dtype=torch.float64)
        assert distance(ours, theirs).max() < 1e-9


def test_parameters_are_found_again_from_any_atom_of_all_1731_positions() -> None:
    groups, letters = every_position()
    u = random_parameters(groups, letters)
    orbit, atoms = all_positions(groups, letters, u)
    found, error = parameters_of(groups[orbit], letters[orbit], atoms[:, None])
    assert error.max() < 1e-9
    # Any atom gives parameters of the same orbit: its own first atom is among the atoms we started from.
    first = representative(groups[orbit], letters[orbit], found)[:, 0]
    owner, everything = all_positions(groups, letters, u)
    nearest = torch.full((len(orbit),), torch.inf, dtype=torch.float64)
    for index in range(0, len(orbit), 97):
        nearest[index] = distance(first[index], everything[owner == orbit[index]]).min()
    assert nearest[::97].max() < 1e-9


def test_primitive_atoms_and_centring_translations_make_the_conventional_cell() -> None:
    operations = load_operations()
    groups, letters = every_position()
    u = random_parameters(groups, letters)
    owner, atoms = all_positions(groups, letters, u)
    primitive_owner, primitive = all_positions(groups, letters, u, primitive=True)
    for index in range(len(groups)):
        basis = operations.primitive[groups[index] - 1]
        whole = (primitive[primitive_owner == index] @ torch.linalg.inv(basis))[:, None]
        others = (atoms[owner == index] @ torch.linalg.inv(basis))[None]
        # Modulo the primitive lattice each atom of the conventional cell is exactly one of the primitive cell's.
        assert ((distance(whole, others) < 1e-6).sum(dim=0) == 1).all()


def test_equivalent_parameters_give_the_same_atoms() -> None:
    groups, letters = every_position()
    u = random_parameters(groups, letters)
    orbit, row = same_orbit_rows(groups, letters)
    table = load_operations().same_orbit[row].double()
    other = ((table[..., :3] @ u[orbit, 0, :, None])[..., 0] + table[..., 3] / 24) % 1.0
    for index in range(0, len(orbit), 53):
        owner = orbit[index : index + 1]
        _, expected = all_positions(groups[owner], letters[owner], u[owner])
        _, found = all_positions(groups[owner], letters[owner], other[None, index : index + 1])
        assert same_atoms(expected, found)


def test_identity_is_first_among_equivalent_parameters() -> None:
    operations = load_operations()
    groups, letters = every_position()
    first = operations.same_orbit[operations.same_orbit_first[groups - 1, letters[:, 0]]]
    free = free_mask(groups, letters)[:, 0]
    assert (first[..., :3] == torch.diag_embed(free.long())).all()
    assert (first[..., 3] == 0).all()


@pytest.mark.parametrize("number", [2, 14, 19, 47, 62, 88, 141, 166, 186, 198, 216, 227])
def test_images_under_the_normaliser_have_the_same_distances(number: int) -> None:
    group, n = number - 1, int(SYMMETRY.n_alternatives[number - 1])
    n_letters = int(SYMMETRY.n_letters[group])
    letters = torch.arange(n_letters)[None].expand(n, -1)
    space_group, alternative = torch.full((n,), number), torch.arange(n)
    counts = SYMMETRY.primitive_multiplicity[group, :n_letters].expand(n, -1)
    cell = torch.tensor(CELLS[LATTICE_SYSTEMS[SYMMETRY.lattice_system[group]]]).double().expand(n, -1)
    crystals = CrystalBatch(space_group, torch.ones_like(counts), letters, counts, cell)
    moved = image(crystals, alternative)
    u = random_parameters(space_group[:1], letters[:1]).expand(n, -1, -1)
    new = transform_parameters(space_group, letters, u, alternative)
    for row in range(n):
        before = pair_distances(number, letters[row], u[row], cell[row])
        after = pair_distances(number, moved.letters[row], new[row], moved.lattice_parameters[row])
        torch.testing.assert_close(before, after)


def pair_distances(number: int, letters: torch.Tensor, u: torch.Tensor, cell: torch.Tensor) -> torch.Tensor:
    """Return the sorted distances from the first atoms of all orbits to the nearest images of all atoms."""
    group = torch.tensor([number])
    _, x = all_positions(group, letters[None], u[None])
    away = x[:, None] - representative(group, letters[None], u[None])
    shifts = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3)
    images = (away - away.round())[..., None, :] + shifts
    return (images @ lattice_matrix(cell[None])[0]).norm(dim=-1).amin(dim=-1).flatten().sort().values


def test_polar_axes_are_known() -> None:
    polar = load_operations().polar
    assert polar.shape == (N_SPACE_GROUPS, 3)
    expected = {1: [1, 1, 1], 2: [0, 0, 0], 4: [0, 1, 0], 8: [1, 0, 1], 33: [0, 0, 1], 62: [0, 0, 0], 160: [0, 0, 1]}
    for number, axes in expected.items():
        assert polar[number - 1].tolist() == [bool(axis) for axis in axes]


def test_a_fixed_position_ignores_parameters() -> None:
    group, letter = torch.tensor([225]), torch.tensor([[0]])
    assert (representative(group, letter, torch.full((1, 1, 3), 0.3, dtype=torch.float64)) == 0.0).all()
    assert len(operation_rows(group, letter, primitive=True)[0]) == 1
