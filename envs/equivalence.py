"""Different letters, same crystal: images under the Euclidean normaliser of the space group.

Shifting the origin or permuting the axes of a conventional cell relabels Wyckoff positions without
changing the crystal. A crystal is reached through each of its distinct images, so the backward
probability of one of them is 1 / (number of images), and rewards belong to the crystal.
"""

import torch
from torch import Tensor

from envs import lattice
from envs.conventions import MAX_LETTERS
from envs.crystal import CrystalBatch
from envs.lattice import Box
from envs.symmetry import SYMMETRY

_CHUNK = 4096  # rows handled at once, bounds the memory of (rows, alternatives, orbits)
_HASH = torch.randint(-(2**62), 2**62, (119 * (MAX_LETTERS + 1) + 48,), generator=torch.Generator().manual_seed(7))


def image(crystals: CrystalBatch, alternative: Tensor) -> CrystalBatch:
    """Return each crystal relabelled by row ``alternative`` (n,) int64 of its group's table."""
    group = crystals.space_group - 1
    letter_map = SYMMETRY.alternative_letters[group, alternative]
    letters = torch.where(crystals.letters >= 0, letter_map.gather(1, crystals.letters.clamp(min=0)), -1)
    axes = SYMMETRY.alternative_axes[group, alternative]
    parameters = crystals.lattice_parameters.clone()
    # Axes permute in orthorhombic groups only, where all angles are 90 degrees.
    parameters[:, :3] = crystals.lattice_parameters[:, :3].gather(1, axes)
    return CrystalBatch(crystals.space_group, crystals.elements, letters, crystals.counts, parameters)


def random_image(crystals: CrystalBatch, box: Box, generator: torch.Generator) -> CrystalBatch:
    """Return each crystal as one of its images inside ``box``, uniformly over the listed alternatives."""
    inside = alternatives_inside(crystals, box)
    weight = torch.rand(inside.shape, generator=generator) * inside
    weight[:, 0] += 1e-9  # a crystal that is itself outside stays as it is
    return image(crystals, weight.argmax(dim=1))


def alternatives_inside(crystals: CrystalBatch, box: Box, width: int | None = None) -> Tensor:
    """Return (n, width) bool: alternatives that exist and keep the axis ratios inside ``box``; None = all columns."""
    group = crystals.space_group - 1
    width = SYMMETRY.max_alternatives if width is None else width
    exists = torch.arange(width) < SYMMETRY.n_alternatives[group][:, None]
    lengths = crystals.lattice_parameters[:, :3].log()[:, None].expand(-1, width, -1)
    permuted = lengths.gather(2, SYMMETRY.alternative_axes[group, :width])
    ratios = permuted[:, :, 1:] - permuted[:, :, :1]
    bounds = box.ranges()[SYMMETRY.lattice_system[group], lattice.RATIO_B :]
    edge = 1e-6
    fits = (ratios >= bounds[:, None, :, 0] - edge) & (ratios <= bounds[:, None, :, 1] + edge)
    return exists & fits.all(dim=-1)


def log_n_images(crystals: CrystalBatch, box: Box) -> Tensor:
    """Return (n,) float64 log of the number of distinct images of each crystal inside ``box``.

    Images that permute axes count as distinct from each other: lengths that coincide exactly have measure zero.
    """
    n_alternatives = SYMMETRY.n_alternatives[crystals.space_group - 1]
    out = torch.zeros(len(crystals), dtype=torch.float64)
    for width in n_alternatives[n_alternatives > 1].unique().tolist():
        for rows in (n_alternatives == width).nonzero().flatten().split(_CHUNK):
            out[rows] = _n_images(crystals.select(rows), box, width).double().log()
    return out


def _n_images(crystals: CrystalBatch, box: Box, width: int) -> Tensor:
    group = crystals.space_group - 1
    maps = SYMMETRY.alternative_letters[group, :width]
    letter = crystals.letters[:, None].expand(-1, width, -1)
    mapped = torch.where(letter >= 0, maps.gather(2, letter.clamp(min=0)), -1)
    # A sum of random 64-bit numbers, one per (element, letter), identifies the multiset of orbits.
    code = crystals.elements[:, None] * (MAX_LETTERS + 1) + mapped + 1
    signature = torch.where(crystals.counts[:, None] > 0, _HASH[code], 0).sum(dim=-1)
    axes = SYMMETRY.alternative_axes[group, :width] @ torch.tensor([9, 3, 1])
    signature += _HASH[119 * (MAX_LETTERS + 1) + axes]
    inside = alternatives_inside(crystals, box, width)
    # An image outside the box repeats the first one, so that it does not count.
    signature = torch.where(inside, signature, signature[:, :1]).sort(dim=1).values
    return 1 + (signature.diff(dim=1) != 0).sum(dim=1)
