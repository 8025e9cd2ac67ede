"""Changes of crystals that training proxies should not mind, and changes whose energy is known."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from envs.crystal import CrystalBatch
from envs.symmetry import SYMMETRY
from proxies.equation_of_state import EquationOfState


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How often each change is made; shares of the crystals of a batch."""

    without_letters: float = 0.08
    small_volume: float = 0.2  # share of volumes changed by N(0, small_width²) of their logarithm
    small_width: float = 0.015
    medium_volume: float = 0.08  # share changed by N(0, medium_width²)
    medium_width: float = 0.2
    far_volume: float = 0.05  # share changed by U(far_range)
    far_range: tuple[float, float] = (-1.2, 1.8)
    extreme: float = 0.15  # share of the far volumes that are drawn twice as far out
    far_shape: float = 0.025  # share of cells whose c axis is stretched at equal volume
    shape_range: float = 0.8  # log of the change of the ratio of axes


def random_alternative(crystals: CrystalBatch, generator: torch.Generator) -> CrystalBatch:
    """Return each crystal with one of the letter assignments that its normaliser makes equivalent, at random."""
    group = crystals.space_group - 1
    uniform = torch.rand(len(crystals), generator=generator, dtype=torch.float64)
    row = (uniform * SYMMETRY.n_alternatives[group]).long()
    letter_map, axes = SYMMETRY.alternative_letters[group, row], SYMMETRY.alternative_axes[group, row]
    letters = torch.where(crystals.letters >= 0, letter_map.gather(1, crystals.letters.clamp(min=0)), crystals.letters)
    lattice = torch.cat(
        [crystals.lattice_parameters[:, :3].gather(1, axes), crystals.lattice_parameters[:, 3:].gather(1, axes)], dim=1
    )
    return CrystalBatch(crystals.space_group, crystals.elements, letters, crystals.counts, lattice)


def drop_letters(crystals: CrystalBatch, rows: Tensor) -> CrystalBatch:
    """Return the crystals with the letters of `rows` ((n,) bool) left out and the orbits of an element merged."""
    merged, width = crystals.without_letters(), crystals.elements.shape[1]

    def choose(new: Tensor, old: Tensor, padding: int) -> Tensor:
        padded = functional.pad(new, (0, width - new.shape[1]), value=padding)
        return torch.where(rows[:, None], padded, old)

    return CrystalBatch(
        crystals.space_group,
        choose(merged.elements, crystals.elements, 0),
        choose(merged.letters, crystals.letters, -1),
        choose(merged.counts, crystals.counts, 0),
        crystals.lattice_parameters,
    )


def draw_strain(
    relaxed: Tensor, stretchable: Tensor, config: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return (n,) change of log volume and (n,) change of log(c/a) at equal volume, both float64.

    Args:
        relaxed: (n,) bool, crystals near their equilibrium volume; others keep their cell.
        stretchable: (n,) bool, crystals whose c axis is not tied to a.
        config: Shares and ranges.
        generator: Source of randomness.
    """
    n = len(relaxed)
    kind, uniform = (torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(2))
    normal = torch.randn(n, generator=generator, dtype=torch.float64)
    further = torch.rand(n, generator=generator) < config.extreme
    low, high = config.far_range
    far = (low + (high - low) * uniform) * torch.where(further, 2.0, 1.0)
    shares = torch.tensor([config.small_volume, config.medium_volume, config.far_volume]).cumsum(0)
    options = torch.stack([normal * config.small_width, normal * config.medium_width, far, torch.zeros_like(far)])
    volume = options.gather(0, torch.searchsorted(shares.double(), kind, right=True)[None])[0]
    shape = torch.where((kind > 1.0 - config.far_shape) & stretchable, (2.0 * uniform - 1.0) * config.shape_range, 0.0)
    return torch.where(relaxed, volume, 0.0), torch.where(relaxed, shape, 0.0)


def strain(
    crystals: CrystalBatch, log_volume: Tensor, log_stretch: Tensor, equation: EquationOfState
) -> tuple[CrystalBatch, Tensor]:
    """Return the strained crystals and the energy this costs in eV/atom, (n,).

    Args:
        crystals: Relaxed crystals.
        log_volume: (n,) change of log V.
        log_stretch: (n,) change of log(c/a) at equal volume, along the third axis.
        equation: What strain costs.
    """
    per_axis = torch.stack([-log_stretch / 3.0, -log_stretch / 3.0, log_stretch * 2.0 / 3.0], dim=-1)
    lengths = crystals.lattice_parameters[:, :3] * torch.exp(per_axis + log_volume[:, None] / 3.0)
    lattice = torch.cat([lengths, crystals.lattice_parameters[:, 3:]], dim=-1)
    energy = equation.rise(crystals, log_volume) + equation.shape_rise(crystals, log_stretch)
    strained = CrystalBatch(crystals.space_group, crystals.elements, crystals.letters, crystals.counts, lattice)
    return strained, energy
