"""What the networks read of a crystal: orbit tokens and one vector of composition, cell and symmetry."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY

N_SLOTS = 28  # Wyckoff slots per space group: 0 = letter not chosen, 1 + letter index otherwise
N_POSITIONS = 231 * N_SLOTS
N_LATTICE_SYSTEMS, N_POINT_SYMMETRIES = 8, 5
MAX_ATOMS_SEEN = 20  # larger cells read as this many atoms; networks are trained on primitive cells up to 20
N_CELL_FEATURES = 15
_NEAR, _FAR = 0.5, 4.0  # clips of log(volume / reference): the range of real crystals, and all that training shows


@dataclass(frozen=True)
class Features:
    """Inputs of the networks for n crystals, sorted by nothing, padded to the widest."""

    elements: Tensor  # (n, width) int64 atomic number, 0 = padding
    positions: Tensor  # (n, width) int64 space group · N_SLOTS + slot
    fractions: Tensor  # (n, width) float32 share of the atoms, sums to 1, 0 = padding
    space_group: Tensor  # (n,) int64
    crystal: Tensor  # (n, n_features) float32 composition statistics and cell


def n_crystal_features(n_properties: int) -> int:
    """Return the length of the crystal vector for a table of `n_properties` elemental properties."""
    return 4 * n_properties + N_CELL_FEATURES


@cache
def position_table() -> Tensor:
    """Return (N_POSITIONS, n) float32 symmetry facts of each (space group, slot).

    Site symmetry, free coordinates, multiplicity, lattice system and point symmetry.
    """
    n_sites = len(SYMMETRY.site_symmetry_names)
    table = torch.zeros(231, N_SLOTS, n_sites + 5 + 2 + N_LATTICE_SYSTEMS + N_POINT_SYMMETRIES)
    group = torch.arange(230)
    known = SYMMETRY.multiplicity > 0  # (230, 27)
    site = torch.nn.functional.one_hot(SYMMETRY.site_symmetry, n_sites).float() * known[..., None]
    free = torch.nn.functional.one_hot(SYMMETRY.n_free_coords.clamp(min=0), 4).float() * known[..., None]
    table[1:, 1:, :n_sites] = site
    table[1:, 1:, n_sites : n_sites + 4] = free
    table[:, 0, n_sites + 4] = 1.0
    table[1:, 1:, n_sites + 5] = SYMMETRY.multiplicity.clamp(min=1).float().log() / 3.0
    table[1:, 1:, n_sites + 6] = SYMMETRY.primitive_multiplicity.clamp(min=1).float().log() / 3.0
    start = n_sites + 7
    table[group + 1, :, start + SYMMETRY.lattice_system] = 1.0
    table[group + 1, :, start + N_LATTICE_SYSTEMS + SYMMETRY.point_symmetry] = 1.0
    return table.reshape(N_POSITIONS, -1)


def featurise(crystals: CrystalBatch, properties: Tensor, log_volumes: Tensor) -> Features:
    """Return the network inputs of each crystal.

    Args:
        crystals: n crystals, with or without letters.
        properties: (119, n_properties) float32 z-scored elemental properties.
        log_volumes: (119,) float32 log of the elemental volumes in Å³/atom.
    """
    counts = crystals.counts.float()
    n_atoms = counts.sum(dim=-1)
    fractions = counts / n_atoms[:, None]
    slots = crystals.space_group[:, None] * N_SLOTS + crystals.letters + 1
    statistics = composition_statistics(properties[crystals.elements], fractions)
    reference = (fractions * log_volumes.exp()[crystals.elements]).sum(dim=-1)
    cell = _cell_features(crystals, n_atoms, reference)
    return Features(
        elements=crystals.elements,
        positions=slots,
        fractions=fractions,
        space_group=crystals.space_group,
        crystal=torch.cat([statistics, cell], dim=-1),
    )


def composition_statistics(values: Tensor, fractions: Tensor) -> Tensor:
    """Return (n, 4 n_properties) mean, mean deviation, largest and smallest of (n, width, n_properties) values."""
    present = (fractions > 0)[..., None]
    weights = fractions[..., None]
    mean = (weights * values).sum(dim=1)
    deviation = (weights * (values - mean[:, None]).abs()).sum(dim=1)
    largest = values.masked_fill(~present, -torch.inf).amax(dim=1)
    smallest = values.masked_fill(~present, torch.inf).amin(dim=1)
    return torch.cat([mean, deviation, largest, smallest], dim=-1)


def _cell_features(crystals: CrystalBatch, n_atoms: Tensor, reference: Tensor) -> Tensor:
    """Return (n, N_CELL_FEATURES) float32 size and shape of the cell; `reference` is in Å³/atom."""
    volume = crystals.volume
    per_atom = (volume / (n_atoms * crystals.centring)).float()
    excess = (per_atom / reference).log()
    lengths = crystals.lattice_parameters[:, :3]
    shape = (lengths / volume[:, None] ** (1.0 / 3.0)).log().float()
    atomic = (lengths.float() / per_atom[:, None] ** (1.0 / 3.0)).log() - 1.0
    cosines = torch.cos(crystals.lattice_parameters[:, 3:] * (math.pi / 180.0)).float()
    present = crystals.counts > 0
    n_orbits = present.sum(dim=-1).float()
    lettered = ((crystals.letters >= 0) & present).any(dim=-1)
    return torch.cat(
        [
            excess.clamp(-_NEAR, _NEAR)[:, None] * 6.0,
            excess.clamp(-_FAR, _FAR)[:, None],
            (per_atom.log()[:, None] - 3.0).clamp(-_FAR, _FAR),
            shape.clamp(-2.5, 2.5),
            atomic.clamp(-3.0, 3.0),
            cosines,
            n_atoms.clamp(max=MAX_ATOMS_SEEN).log()[:, None] - 2.0,
            torch.where(lettered, n_orbits.clamp(max=MAX_ATOMS_SEEN).log() - 1.5, 0.0)[:, None],
            lettered.float()[:, None],
        ],
        dim=-1,
    )
