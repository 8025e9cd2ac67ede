"""Periodic distances agree with pymatgen's, and forces stay inside Wyckoff positions."""

import numpy as np
import torch
from ase.data import covalent_radii

from discover.structure.geometry import N_RADIAL, contacts, neighbours, pair_features, pull_back, reduce_basis
from discover.structure.orbit_batch import Frame, OrbitBatch, make_frame
from discover.structure.orbits import to_structures
from envs.lattice import lattice_matrix
from envs.wyckoff_operations import load_operations, representative
from tests.discover.structure.examples import textbook, textbook_batch

RADII = torch.from_numpy(covalent_radii[:119]).float()


def frame_of(batch: OrbitBatch) -> Frame:
    return make_frame(batch.space_group, batch.elements, batch.letters)


def test_neighbours_are_those_that_pymatgen_finds() -> None:
    batch = textbook_batch()
    crystal, orbit, _, vector = neighbours(frame_of(batch), batch.parameters, lattice_matrix(batch.cell), 4.0)
    structures = to_structures(*textbook())
    for row, structure in enumerate(structures):
        first = representative(batch.space_group[row, None], batch.letters[row, None], batch.parameters[row, None])[0]
        for column in range(int((batch.letters[row] >= 0).sum())):
            site = structure.lattice.get_points_in_sphere(
                structure.frac_coords, structure.lattice.get_cartesian_coords(first[column].numpy()), 4.0
            )
            expected = np.sort([distance for _, distance, *_ in site])[1:]  # without the atom itself
            ours = vector[(crystal == row) & (orbit == column)].norm(dim=-1).sort().values.numpy()
            np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_contacts_are_shortest_distances_over_radii() -> None:
    batch = textbook_batch()
    ratio, step = contacts(frame_of(batch), batch.parameters, lattice_matrix(batch.cell), RADII, 0.75)
    for row, structure in enumerate(to_structures(*textbook())):
        radii = np.array([covalent_radii[site.specie.Z] for site in structure])
        table = structure.distance_matrix / (radii[:, None] + radii)
        np.fill_diagonal(table, np.inf)
        assert abs(float(ratio[row]) - table.min()) < 1e-3
    assert (step == 0).all()  # nothing overlaps in a real crystal


def test_overlapping_atoms_are_pushed_apart_within_their_positions() -> None:
    batch = textbook_batch()
    frame, matrix = frame_of(batch), lattice_matrix(batch.cell)
    crowded = batch.parameters.clone()
    crowded[0, 1, 0] = 0.05  # rutile's oxygen almost on the metal
    before, step = contacts(frame, crowded, matrix, RADII, 0.75)
    after, _ = contacts(frame, (crowded + step) % 1.0, matrix, RADII, 0.75)
    assert before[0] < 0.2 < after[0]
    assert (step[~frame.is_free] == 0).all()


def test_pulled_back_displacements_move_the_atom_as_asked() -> None:
    batch = textbook_batch()
    frame, matrix = frame_of(batch), lattice_matrix(batch.cell)
    inverse = pull_back(frame, matrix)
    wanted = torch.randn(*batch.letters.shape, 3, generator=torch.Generator().manual_seed(0))
    change = (inverse @ wanted[..., None])[..., 0]
    moved = (frame.first_operation[..., :3] @ change[..., None])[..., 0] @ matrix
    general = frame.is_free.all(dim=2)
    torch.testing.assert_close(moved[general], wanted[general], atol=1e-4, rtol=1e-4)
    assert (change[~frame.is_free] == 0).all()
    # On a special position the rest of the wish is orthogonal to what can move.
    rest = wanted - moved
    assert ((rest * moved).sum(dim=-1).abs() < 1e-4).all()


def test_features_do_not_depend_on_the_setting_of_the_noise() -> None:
    batch = textbook_batch()
    frame, matrix = frame_of(batch), lattice_matrix(batch.cell)
    radial, forces = pair_features(frame, batch.parameters, matrix)
    assert radial.shape == (*batch.letters.shape, batch.letters.shape[1], N_RADIAL)
    shifted = torch.where(frame.is_free, batch.parameters + 1.0, 0.0)
    again, forces_again = pair_features(frame, shifted, matrix)
    torch.testing.assert_close(radial, again, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(forces, forces_again, atol=1e-3, rtol=1e-3)


def test_reduced_edges_span_the_same_lattice_and_are_short() -> None:
    basis = load_operations().primitive[[138, 4, 145]].float()  # long body-centred, base-centred and R cells
    cell = torch.tensor([[3.0, 3.0, 21.0, 90, 90, 90], [12.0, 4.0, 6.0, 90, 130.0, 90], [3.0, 3.0, 25.0, 90, 90, 120]])
    matrix = lattice_matrix(cell)
    reduced = reduce_basis(basis, matrix)
    change = reduced @ torch.linalg.inv(basis)
    torch.testing.assert_close(change, change.round(), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.linalg.det(change).abs(), torch.ones(3), atol=1e-4, rtol=0)
    assert (reduced @ matrix).norm(dim=-1).amin(dim=1).max() < 6.0
