"""Made-up crystals of three structure types, as prepared data, for tests of trainings."""

import numpy as np
import torch

from discover.data import PreparedData
from envs.assignment import BUILDING_RANK
from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY

CATIONS, ANIONS = torch.tensor([3, 11, 12, 19, 20, 37, 38, 55, 56, 57]), torch.tensor([7, 8, 9, 16, 17, 34, 35, 53])
#: Space group, letters and atoms per conventional cell of rock salt, fluorite and perovskite, cations first.
TYPES = ((225, (0, 1), 8), (225, (0, 2), 12), (221, (0, 1, 2), 5))


def of_known_types(n: int, seed: int = 0) -> CrystalBatch:
    """Return n crystals whose structure type follows from their formula alone."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(n):
        space_group, letters, n_atoms = TYPES[index % 3]
        cations = CATIONS[torch.randperm(len(CATIONS), generator=generator)[: len(letters) - 1]]
        cations = cations[BUILDING_RANK[cations].argsort()]  # which cation goes where follows from the formula
        anion = ANIONS[torch.randint(len(ANIONS), (1,), generator=generator)]
        letter = torch.tensor([letters])
        counts = SYMMETRY.primitive_multiplicity[space_group - 1, letter]
        edge = (22.0 * n_atoms) ** (1 / 3)  # Å
        lengths = torch.tensor([[edge, edge, edge, 90.0, 90.0, 90.0]], dtype=torch.float64)
        rows.append(
            CrystalBatch(torch.tensor([space_group]), torch.cat([cations, anion])[None], letter, counts, lengths)
        )
    return CrystalBatch.cat(rows)


def prepared(crystals: CrystalBatch, e_above_hull: torch.Tensor) -> PreparedData:
    n = len(crystals)
    unknown = torch.full((n,), torch.nan, dtype=torch.float64)
    return PreparedData(
        crystals=crystals,
        positions=torch.zeros(*crystals.elements.shape, 3, dtype=torch.float64),
        labels={"formation_energy_per_atom": unknown, "band_gap": unknown, "e_above_hull": e_above_hull},
        ids=np.array([f"x-{i}" for i in range(n)]),
        formulas=np.array(crystals.formulas()),
        label_source=np.full(n, ""),
        geometry=np.full(n, ""),
        failures=(),
    )
