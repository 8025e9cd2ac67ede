"""Crystals from textbooks, and random ones, for tests of proxies."""

import torch

from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY

# name: space group, (element, letter, atoms per primitive cell), a, b, c in Å, gamma in degrees
TEXTBOOK = {
    "NaCl": (225, ((11, 0, 1), (17, 1, 1)), (5.64, 5.64, 5.64), 90.0),
    "MgO": (225, ((12, 0, 1), (8, 1, 1)), (4.21, 4.21, 4.21), 90.0),
    "TiO2": (136, ((22, 0, 2), (8, 5, 4)), (4.594, 4.594, 2.959), 90.0),
    "GaAs": (216, ((31, 0, 1), (33, 2, 1)), (5.65, 5.65, 5.65), 90.0),
    "Si": (227, ((14, 0, 2),), (5.43, 5.43, 5.43), 90.0),
    "CaTiO3": (221, ((20, 0, 1), (22, 1, 1), (8, 2, 3)), (3.9, 3.9, 3.9), 90.0),
    "Cu": (225, ((29, 0, 1),), (3.61, 3.61, 3.61), 90.0),
    "Al": (225, ((13, 0, 1),), (4.05, 4.05, 4.05), 90.0),
    "Al2O3": (167, ((13, 2, 4), (8, 4, 6)), (4.76, 4.76, 12.99), 120.0),
    "ZnS": (216, ((30, 0, 1), (16, 2, 1)), (5.41, 5.41, 5.41), 90.0),
    "Ni3Al": (221, ((13, 0, 1), (28, 2, 3)), (3.57, 3.57, 3.57), 90.0),
}


def textbook(*names: str, volume_ratio: float = 1.0) -> CrystalBatch:
    """Return the named crystals with their volumes multiplied by `volume_ratio`."""
    rows = []
    for name in names:
        space_group, orbits, lengths, gamma = TEXTBOOK[name]
        elements, letters, counts = zip(*orbits, strict=True)
        scaled = [length * volume_ratio ** (1.0 / 3.0) for length in lengths]
        rows.append(
            CrystalBatch(
                torch.tensor([space_group]),
                torch.tensor([elements]),
                torch.tensor([letters]),
                torch.tensor([counts]),
                torch.tensor([[*scaled, 90.0, 90.0, gamma]], dtype=torch.float64),
            )
        )
    return CrystalBatch.cat(rows)


def random_crystals(n: int, seed: int = 0, max_orbits: int = 5) -> CrystalBatch:
    """Return crystals of random groups, letters, elements and cells; they obey the lattice system only by luck."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    group = integers(230, n)
    letters = (torch.rand(n, max_orbits, generator=generator) * SYMMETRY.n_letters[group][:, None]).long()
    counts = SYMMETRY.primitive_multiplicity[group[:, None], letters]
    elements = 1 + integers(94, n, max_orbits)
    kept = torch.arange(max_orbits) < 1 + integers(max_orbits, n)[:, None]
    volume = (15.0 * (counts * kept).sum(1) * SYMMETRY.centring[group]).double()
    shape = torch.exp(0.2 * torch.randn(n, 3, generator=generator, dtype=torch.float64))
    lengths = shape * (volume / shape.prod(1))[:, None] ** (1 / 3)
    return CrystalBatch(
        group + 1,
        elements * kept,
        torch.where(kept, letters, -1),
        counts * kept,
        torch.cat([lengths, torch.full((n, 3), 90.0, dtype=torch.float64)], dim=1),
    )
