"""Prototypes: what is left of a crystal when it is forgotten which elements it is made of.

Two crystals share a prototype if they have the same space group and the same orbits on Wyckoff letters, grouped by
element, up to the relabelling of letters that a shift of origin or a swap of axes brings (`envs.equivalence`). The
anonymised composition follows from that.
"""

import torch
from torch import Tensor

from envs.conventions import MAX_LETTERS
from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY

_CHUNK = 2048  # crystals at once, bounds the memory of (crystals, alternatives, orbits)
_LETTER_HASH = torch.randint(-(2**62), 2**62, (MAX_LETTERS,), generator=torch.Generator().manual_seed(11))
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # of splitmix64, as signed integers


def prototype_keys(crystals: CrystalBatch) -> Tensor:
    """Return (n,) int64 hashes that are equal for crystals of one prototype, and for others once in 2^64 pairs.

    Args:
        crystals: Crystals with letters.
    """
    if not len(crystals):
        return torch.zeros(0, dtype=torch.int64)
    return torch.cat([_keys(crystals.select(rows)) for rows in torch.arange(len(crystals)).split(_CHUNK)])


def _keys(crystals: CrystalBatch) -> Tensor:
    group = crystals.space_group - 1
    n_alternatives = SYMMETRY.n_alternatives[group]
    width = int(n_alternatives.max())
    used = crystals.counts > 0
    letters = crystals.letters.clamp(min=0)[:, None].expand(-1, width, -1)
    mapped = SYMMETRY.alternative_letters[group, :width].gather(2, letters)  # (n, width, orbits)
    of_orbit = torch.where(used[:, None], _LETTER_HASH[mapped.clamp(min=0)], 0)
    same = crystals.elements[:, :, None] == crystals.elements[:, None, :]
    first = same.to(torch.int8).argmax(dim=-1)[:, None].expand(-1, width, -1)  # first orbit of the same element
    of_element = torch.zeros_like(of_orbit).scatter_add_(2, first, of_orbit)
    signature = torch.where(of_element != 0, _mix(of_element), 0).sum(dim=-1)  # a sum forgets the order of elements
    exists = torch.arange(width) < n_alternatives[:, None]
    smallest = torch.where(exists, signature, torch.iinfo(torch.int64).max).min(dim=1).values
    return _mix(smallest + crystals.space_group)


def _mix(value: Tensor) -> Tensor:
    """Return a one-to-one scrambling of 64-bit integers, so that sums of it do not collide by structure."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        value = (value ^ (value >> shift)) * multiplier
    return value ^ (value >> 31)
