"""A few textbook crystals with free Wyckoff parameters, as the flow reads them."""

import torch

from discover.structure.orbit_batch import OrbitBatch
from discover.structure.orbits import orbit_batch
from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY

# space group, [(atomic number, letter, parameters)], cell
RUTILE = (136, [(22, 0, (0, 0, 0)), (8, 5, (0.305, 0, 0))], (4.59, 4.59, 2.96, 90, 90, 90))
QUARTZ = (152, [(14, 0, (0.47, 0, 0)), (8, 2, (0.413, 0.267, 0.214))], (4.91, 4.91, 5.40, 90, 90, 120))
ROCK_SALT = (225, [(11, 0, (0, 0, 0)), (17, 1, (0, 0, 0))], (5.64, 5.64, 5.64, 90, 90, 90))
PYRITE = (205, [(26, 0, (0, 0, 0)), (16, 2, (0.385, 0, 0))], (5.42, 5.42, 5.42, 90, 90, 90))
BADDELEYITE = (
    14,
    [(40, 4, (0.276, 0.041, 0.208)), (8, 4, (0.07, 0.332, 0.345)), (8, 4, (0.449, 0.757, 0.48))],
    (5.15, 5.21, 5.32, 90, 99.2, 90),
)
WURTZITE = (186, [(30, 1, (0, 0, 0.0)), (16, 1, (0, 0, 0.375))], (3.82, 3.82, 6.26, 90, 90, 120))
ALL = (RUTILE, QUARTZ, ROCK_SALT, PYRITE, BADDELEYITE, WURTZITE)


def textbook(rows: tuple = ALL) -> tuple[CrystalBatch, torch.Tensor]:
    """Return crystals and their parameters (n, w, 3) float64."""
    n, width = len(rows), max(len(orbits) for _, orbits, _ in rows)
    elements, letters = torch.zeros(n, width, dtype=torch.int64), torch.full((n, width), -1)
    counts, parameters = torch.zeros(n, width, dtype=torch.int64), torch.zeros(n, width, 3, dtype=torch.float64)
    for row, (group, orbits, _) in enumerate(rows):
        for column, (z, letter, u) in enumerate(orbits):
            elements[row, column], letters[row, column] = z, letter
            counts[row, column] = SYMMETRY.primitive_multiplicity[group - 1, letter]
            parameters[row, column] = torch.tensor(u, dtype=torch.float64)
    groups = torch.tensor([group for group, _, _ in rows])
    cells = torch.tensor([cell for _, _, cell in rows], dtype=torch.float64)
    return CrystalBatch(groups, elements, letters, counts, cells), parameters


def textbook_batch(rows: tuple = ALL) -> OrbitBatch:
    """Return the same as the flow reads them."""
    return orbit_batch(*textbook(rows))
