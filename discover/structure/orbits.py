"""Crystals with free Wyckoff parameters as pymatgen structures, and structures as such crystals.

The one documented setting is PyXtal's: R groups on hexagonal axes, origin choice 2 where there are two.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from pymatgen.core import Element, Lattice, Structure
from torch import Tensor

from discover.data import PreparedData
from discover.structure.orbit_batch import OrbitBatch
from envs.crystal import CrystalBatch
from envs.lattice import lattice_matrix
from envs.reference_volume import log_reference_volume
from envs.wyckoff_operations import all_positions, load_operations, parameters_of


def parameters_of_data(data: PreparedData) -> Tensor:
    """Return the free Wyckoff parameters of prepared crystals, (n, max_orbits, 3) float64 in [0, 1), 0 if not free."""
    return parameters_of(data.crystals.space_group, data.crystals.letters, data.positions)[0]


def orbit_batch(crystals: CrystalBatch, parameters: Tensor) -> OrbitBatch:
    """Return crystals as the flow network reads them.

    Args:
        crystals: Crystals with letters.
        parameters: (n, max_orbits, 3) free Wyckoff parameters.
    """
    amounts = crystals.composition * crystals.centring[:, None]
    return OrbitBatch(
        space_group=crystals.space_group,
        elements=crystals.elements,
        letters=crystals.letters,
        parameters=parameters.float(),
        cell=crystals.lattice_parameters.float(),
        log_reference=log_reference_volume(amounts, torch.arange(amounts.shape[1])).float(),
    )


def to_structures(crystals: CrystalBatch, parameters: Tensor, *, primitive: bool = False) -> list[Structure]:
    """Return the structure of each crystal.

    Args:
        crystals: The crystals, with letters.
        parameters: (n, max_orbits, 3) free Wyckoff parameters; columns that are not free count as zero.
        primitive: Return primitive cells instead of conventional ones.
    """
    if not len(crystals):
        return []
    orbit, coords = all_positions(crystals.space_group, crystals.letters, parameters.double(), primitive=primitive)
    width = crystals.letters.shape[1]
    numbers = crystals.elements.flatten()[orbit].numpy()
    per_crystal = torch.bincount(orbit // width, minlength=len(crystals))
    ends = per_crystal.cumsum(0).tolist()
    bases = load_operations().primitive[crystals.space_group - 1].numpy()
    fractional, matrices = coords.numpy(), lattice_matrix(crystals.lattice_parameters).numpy()
    structures = []
    for row, (end, n) in enumerate(zip(ends, per_crystal.tolist(), strict=True)):
        atoms = slice(end - n, end)
        matrix, x = matrices[row], fractional[atoms]
        if primitive:
            matrix, x = bases[row] @ matrix, x @ np.linalg.inv(bases[row])
        structures.append(_structure(matrix, numbers[atoms], x))
    return structures


def _structure(matrix: NDArray[np.float64], numbers: NDArray[np.int64], coords: NDArray[np.float64]) -> Structure:
    # By number too, since elements of equal electronegativity would mix and a POSCAR name them several times.
    electronegativity = np.array([Element.from_Z(int(z)).X for z in numbers])
    order = np.lexsort((numbers, electronegativity))
    species = [Element.from_Z(int(numbers[i])) for i in order]
    return Structure(Lattice(matrix), species, coords[order] % 1.0)
