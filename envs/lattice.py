"""Lattices in free coordinates, with the exact interval of each coordinate under every restriction.

Coordinates, in the order in which they are chosen (those that the lattice system fixes are skipped):
the angles alpha, beta, gamma in degrees; v = log(volume / sum of elemental volumes); s1 = log(b/a);
s2 = log(c/a). Bounds on lengths are linear in (v, s1, s2) once the angles are known, so eliminating
the later coordinates (Fourier-Motzkin) gives the interval in which an earlier one can be completed.

The reference measure of every density is the product of uniform measures over ``Box`` ranges;
``log_jacobian`` converts to Crystal-GFN's uniform measure in lengths and angles.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from envs.conventions import LATTICE_SYSTEMS
from envs.errors import RestrictionError

ALPHA, BETA, GAMMA, VOLUME, RATIO_B, RATIO_C = range(6)
N_COORDINATES = 6
_FREE = {
    "triclinic": (ALPHA, BETA, GAMMA, VOLUME, RATIO_B, RATIO_C),
    "monoclinic": (BETA, VOLUME, RATIO_B, RATIO_C),
    "orthorhombic": (VOLUME, RATIO_B, RATIO_C),
    "cubic": (VOLUME,),
}
#: (8, 7) coordinate chosen at each step of each lattice system, -1 after the last.
STEPS = torch.tensor(
    [
        [*(free := _FREE.get(name, (VOLUME, RATIO_C))), *([-1] * (N_COORDINATES + 1 - len(free)))]
        for name in LATTICE_SYSTEMS
    ]
)
N_FREE = (STEPS >= 0).sum(dim=1)
IS_FREE = torch.stack([torch.eq(STEPS, coordinate).any(dim=1) for coordinate in range(N_COORDINATES)], dim=1)
_HEXAGONAL = torch.tensor([name in ("trigonal", "rhombohedral", "hexagonal") for name in LATTICE_SYSTEMS])
#: (8, 3) angles in degrees that hold where they are not free.
FIXED_ANGLES = torch.where(
    _HEXAGONAL[:, None], torch.tensor([90.0, 90.0, 120.0]), torch.tensor([90.0, 90.0, 90.0])
).double()
#: Range of v that the unit interval stands for. The box of physical volumes lies well inside; hard bounds on lengths
#: can ask for more, and the unit coordinate then leaves [0, 1].
VOLUME_RANGE = (math.log(1e-2), math.log(1e3))
#: log(b/a) and log(c/a) hold all but a few of 25,922 Materials Project crystals below 0.08 eV/atom.
_RATIOS = {
    "triclinic": ((-0.05, 1.05), (-0.05, 2.0)),
    "monoclinic": ((-2.15, 1.35), (-1.8, 1.5)),
    "orthorhombic": ((-1.85, 2.45), (-1.85, 2.45)),
    "tetragonal": ((0.0, 0.0), (-1.25, 2.45)),
    "trigonal": ((0.0, 0.0), (-1.25, 2.65)),
    "rhombohedral": ((0.0, 0.0), (-1.25, 3.45)),
    "hexagonal": ((0.0, 0.0), (-1.25, 2.65)),
    "cubic": ((0.0, 0.0), (0.0, 0.0)),
}
#: A cell closes with room to spare if every angle keeps this distance (degrees) from the sum of the others.
ANGLE_MARGIN = 5.0
_TINY = 1e-6  # stands in for a lower bound of 0, of which there is no logarithm
_SIGNS = torch.tensor(
    [[-1.0], [1.0], [1.0], [1.0]], dtype=torch.float64
)  # α + β + γ has an upper bound, the rest lower
#: Width in v that is left where a user's bound on lengths or volume excludes the whole physical box.
YIELD_WIDTH = 0.1


@dataclass(frozen=True)
class Box:
    """Bounds of the lattice stage: what an environment offers, narrowed by what a user restricts."""

    monoclinic_angle: tuple[float, float] = (90.0, 135.0)
    triclinic_angle: tuple[float, float] = (60.0, 120.0)
    volume_factor: tuple[float, float] = (0.6, 1.9)  # soft: volume / sum of elemental volumes
    length: tuple[float, float] = (1.0, 100.0)  # Å, hard
    angle: tuple[float, float] = (0.0, 180.0)  # degrees, hard, for all three angles
    volume_per_atom: tuple[float, float] | None = None  # Å³, hard

    def ranges(self) -> Tensor:
        """Return (8, 6, 2) range of each coordinate that the unit interval stands for, before hard bounds.

        Every call returns the same tensor, which must not be changed.
        """
        return _ranges(self)

    def system_mask(self) -> Tensor:
        """Return (8,) bool: lattice systems with a cell whose angles obey the hard bounds."""
        low, high = self.angle
        fixed = ~IS_FREE[:, :VOLUME]
        legal = (~fixed | ((low <= FIXED_ANGLES) & (high >= FIXED_ANGLES))).all(dim=1)
        beta_low, beta_high = _overlap(self.angle, self.monoclinic_angle)
        legal[LATTICE_SYSTEMS.index("monoclinic")] &= beta_low <= beta_high
        low, high = _overlap(self.angle, self.triclinic_angle)
        low = max(low, ANGLE_MARGIN)
        legal[LATTICE_SYSTEMS.index("triclinic")] &= low <= min(high, 360.0 - ANGLE_MARGIN - 2 * low)
        return legal

    def check(self, n_atoms: tuple[int, int], systems: Tensor) -> None:
        """Raise RestrictionError if the bounds contradict each other.

        Args:
            n_atoms: Smallest and largest number of atoms in the conventional cell.
            systems: (k,) int64 lattice systems that may occur.
        """
        for name in ("length", "angle", "volume_per_atom", "volume_factor"):
            bounds = getattr(self, name)
            if bounds is not None and not (0.0 <= bounds[0] <= bounds[1] and bounds[1] > 0.0):
                raise RestrictionError(f"restrict.{name} must be [low, high] with 0 <= low <= high, got {list(bounds)}")
        fits = self.system_mask()[systems]
        if not fits.any():
            names = ", ".join(LATTICE_SYSTEMS[i] for i in systems.unique().tolist())
            raise RestrictionError(
                f"restrict.angle={list(self.angle)} leaves no cell in the allowed lattice systems ({names}); "
                "90 degrees fits most"
            )
        if self.volume_per_atom is None:
            return
        low, high = self.volume_per_atom
        flattest = min(self._smallest_shape_factor(system) for system in systems[fits].unique().tolist())
        # Cells of equal lengths exist in every system, so volumes per cell reach from one cube to the other.
        if n_atoms[1] * low > flattest * self.length[1] ** 3 or self.length[0] ** 3 > n_atoms[0] * high:
            raise RestrictionError(
                f"restrict.length={list(self.length)} Å and restrict.volume_per_atom={list(self.volume_per_atom)} Å³ "
                f"exclude each other for some conventional cells of {n_atoms[0]} to {n_atoms[1]} atoms; widen one, or "
                "narrow restrict.n_atoms or restrict.crystal_systems"
            )

    def _smallest_shape_factor(self, system: int) -> float:
        """Return the smallest volume / abc of a lattice system under these bounds."""
        name = LATTICE_SYSTEMS[system]
        if name not in ("triclinic", "monoclinic"):
            return float(log_shape_factor(FIXED_ANGLES[system : system + 1]).exp())
        low, high = _overlap(self.angle, getattr(self, f"{name}_angle"))
        if name == "monoclinic":
            return min(math.sin(math.radians(low)), math.sin(math.radians(high)))
        # The logarithm is a sum of log sines, concave in the angles, so its minimum is at a corner of the polytope
        # that bounds and margins leave. Corners are where three of its planes meet.
        angle_sums = torch.tensor([[1.0, 1, 1], [-1, 1, 1], [1, -1, 1], [1, 1, -1]], dtype=torch.float64)
        normals = torch.cat(
            [torch.eye(3, dtype=torch.float64), -torch.eye(3, dtype=torch.float64), angle_sums * _SIGNS]
        )
        floor = max(low, ANGLE_MARGIN)
        limits = torch.tensor([floor] * 3 + [-high] * 3 + [ANGLE_MARGIN - 360.0] + [ANGLE_MARGIN] * 3).double()
        triples = torch.combinations(torch.arange(len(normals)), 3)
        triples = triples[torch.linalg.det(normals[triples]).abs() > 1e-9]
        corners = torch.linalg.solve(normals[triples], limits[triples])
        inside = (corners @ normals.T >= limits - 1e-9).all(dim=1)
        return float(log_shape_factor(corners[inside]).min().exp())


@cache
def _ranges(box: Box) -> Tensor:
    out = torch.zeros(len(LATTICE_SYSTEMS), N_COORDINATES, 2, dtype=torch.float64)
    out[:, :VOLUME] = FIXED_ANGLES[:, :, None]
    out[LATTICE_SYSTEMS.index("monoclinic"), BETA] = torch.tensor(box.monoclinic_angle, dtype=torch.float64)
    out[LATTICE_SYSTEMS.index("triclinic"), :VOLUME] = torch.tensor(box.triclinic_angle, dtype=torch.float64)
    out[:, VOLUME] = torch.tensor(VOLUME_RANGE, dtype=torch.float64)
    for index, name in enumerate(LATTICE_SYSTEMS):
        out[index, RATIO_B:] = torch.tensor(_RATIOS[name], dtype=torch.float64)
    return out


def _overlap(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    return max(first[0], second[0]), min(first[1], second[1])


def log_shape_factor(angles: Tensor) -> Tensor:
    """Return (n,) log(volume / abc) of cells with ``angles`` (n, 3) in degrees."""
    cosines = torch.cos(torch.deg2rad(angles))
    return 0.5 * torch.log(1.0 + 2.0 * cosines.prod(dim=-1) - cosines.square().sum(dim=-1))


def intervals(
    coordinate: Tensor, system: Tensor, values: Tensor, log_reference: Tensor, n_atoms: Tensor, box: Box
) -> Tensor:
    """Return where each row's next coordinate may lie so that the cell can be completed.

    Args:
        coordinate: (n,) int64 coordinate to choose.
        system: (n,) int64 lattice system 0-7.
        values: (n, 6) coordinates chosen so far (fixed ones at their value, later ones ignored).
        log_reference: (n,) log of the sum of elemental volumes of the conventional cell, Å³.
        n_atoms: (n,) atoms in the conventional cell.
        box: Bounds.

    Returns:
        (n, 2) low and high in the coordinate's own unit, low < high.
    """
    ranges = box.ranges()[system]
    own = ranges.gather(1, coordinate[:, None, None].expand(-1, 1, 2))[:, 0]
    low, high = own[:, 0].clone(), own[:, 1].clone()
    is_angle = coordinate < VOLUME
    if bool(is_angle.any()):
        low[is_angle], high[is_angle] = _angle_interval(
            coordinate[is_angle],
            system[is_angle],
            values[is_angle],
            low[is_angle].clamp(min=box.angle[0]),
            high[is_angle].clamp(max=box.angle[1]),
        )
    rest = ~is_angle
    if bool(rest.any()):
        low[rest], high[rest] = _length_interval(
            coordinate[rest], values[rest], ranges[rest], log_reference[rest], n_atoms[rest], box
        )
    middle, half = (low + high) / 2, ((high - low) / 2).clamp(min=1e-9)
    return torch.stack([middle - half, middle + half], dim=-1)


def _angle_interval(
    coordinate: Tensor, system: Tensor, values: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the interval of an angle; a triclinic cell closes if |α - β| < γ < min(α + β, 360 - α - β)."""
    triclinic = system == LATTICE_SYSTEMS.index("triclinic")
    margin = ANGLE_MARGIN
    floor = torch.where(triclinic, low.clamp(min=margin), low)
    alpha, beta = values[:, ALPHA], values[:, BETA]
    at_alpha = (floor, torch.minimum(high, 360.0 - margin - 2 * floor))
    at_beta = (
        torch.maximum(floor, alpha - high + margin),
        torch.minimum(torch.minimum(high, alpha + high - margin), 360.0 - margin - floor - alpha),
    )
    at_gamma = (
        torch.maximum(floor, (alpha - beta).abs() + margin),
        torch.minimum(high, torch.minimum(alpha + beta, 360.0 - alpha - beta) - margin),
    )
    options = torch.stack([torch.stack(pair, dim=-1) for pair in (at_alpha, at_beta, at_gamma)], dim=1)
    chosen = options[torch.arange(len(coordinate)), coordinate]
    return torch.where(triclinic, chosen[:, 0], floor), torch.where(triclinic, chosen[:, 1], high)


def _length_interval(
    coordinate: Tensor, values: Tensor, ranges: Tensor, log_reference: Tensor, n_atoms: Tensor, box: Box
) -> tuple[Tensor, Tensor]:
    """Return the interval of v, s1 or s2 under the bounds on lengths and volume."""
    short, long = math.log(max(box.length[0], _TINY)), math.log(box.length[1])
    low, high = torch.empty_like(log_reference), torch.empty_like(log_reference)
    rows = (coordinate == VOLUME).nonzero().flatten()
    shape = log_shape_factor(values[:, :VOLUME])
    offset = shape[rows] - log_reference[rows]
    low[rows], high[rows] = _volume_interval(
        3 * short + offset, 3 * long + offset, log_reference[rows], n_atoms[rows], box
    )
    total = log_reference + values[:, VOLUME] - shape  # log a + log b + log c
    rows = (coordinate == RATIO_B).nonzero().flatten()
    low[rows], high[rows] = _first_ratio_interval(total[rows], ranges[rows], short, long)
    rows = (coordinate == RATIO_C).nonzero().flatten()
    low[rows], high[rows] = _second_ratio_interval(total[rows], values[rows, RATIO_B], ranges[rows], short, long)
    return low, high


def _first_ratio_interval(total: Tensor, ranges: Tensor, short: float, long: float) -> tuple[Tensor, Tensor]:
    """Return the interval of s1: every lower bound that s2 will have must stay under each of its upper bounds."""
    (b_low, b_high), (c_low, c_high) = ranges[:, RATIO_B].unbind(-1), ranges[:, RATIO_C].unbind(-1)
    low = [
        b_low,
        torch.full_like(total, short - long),
        total - 3 * long,
        total - 3 * long - c_high,
        3 * short - total,
        (c_low - total + 3 * short) / 2,
        2 * c_low - 3 * long + total,
    ]
    high = [
        b_high,
        torch.full_like(total, long - short),
        3 * long - total,
        (c_high + 3 * long - total) / 2,
        total - 3 * short,
        2 * c_high - 3 * short + total,
        total - 3 * short - c_low,
    ]
    return torch.stack(low).amax(dim=0), torch.stack(high).amin(dim=0)


def _second_ratio_interval(
    total: Tensor, s1: Tensor, ranges: Tensor, short: float, long: float
) -> tuple[Tensor, Tensor]:
    """Return the interval of s2."""
    c_low, c_high = ranges[:, RATIO_C].unbind(-1)
    low = [c_low, total - s1 - 3 * long, total + 2 * s1 - 3 * long, (3 * short - total + s1) / 2]
    high = [c_high, total - s1 - 3 * short, total + 2 * s1 - 3 * short, (3 * long - total + s1) / 2]
    return torch.stack(low).amax(dim=0), torch.stack(high).amin(dim=0)


def _volume_interval(
    low: Tensor, high: Tensor, log_reference: Tensor, n_atoms: Tensor, box: Box
) -> tuple[Tensor, Tensor]:
    """Return the interval of v: hard bounds hold, the box of physical volumes yields to them."""
    if box.volume_per_atom is not None:
        offset = n_atoms.double().log() - log_reference
        low = torch.maximum(low, math.log(max(box.volume_per_atom[0], _TINY)) + offset)
        high = torch.minimum(high, math.log(box.volume_per_atom[1]) + offset)
    soft_low, soft_high = (math.log(max(factor, _TINY)) for factor in box.volume_factor)
    too_big, too_small = low > soft_high, high < soft_low
    inside_low = torch.where(too_small, torch.maximum(low, high - YIELD_WIDTH), low.clamp(min=soft_low))
    inside_high = torch.where(too_big, torch.minimum(high, low + YIELD_WIDTH), high.clamp(max=soft_high))
    return torch.where(too_big, low, inside_low), torch.where(too_small, high, inside_high)


def lattice_parameters(values: Tensor, log_reference: Tensor) -> Tensor:
    """Return (n, 6) a, b, c in Å and angles in degrees from complete coordinates (n, 6)."""
    total = log_reference + values[:, VOLUME] - log_shape_factor(values[:, :VOLUME])
    log_a = (total - values[:, RATIO_B] - values[:, RATIO_C]) / 3
    log_lengths = torch.stack([log_a, log_a + values[:, RATIO_B], log_a + values[:, RATIO_C]], dim=-1)
    return torch.cat([log_lengths.exp(), values[:, :VOLUME]], dim=-1)


def coordinates(parameters: Tensor, log_reference: Tensor) -> Tensor:
    """Return (n, 6) coordinates of conventional cells, the inverse of ``lattice_parameters``."""
    lengths, angles = parameters[:, :3].log(), parameters[:, 3:]
    volume = lengths.sum(dim=-1) + log_shape_factor(angles) - log_reference
    ratios = lengths[:, 1:] - lengths[:, :1]
    return torch.cat([angles, volume[:, None], ratios], dim=-1)


def log_jacobian(parameters: Tensor, system: Tensor, box: Box) -> Tensor:
    """Return (n,) log |d(free lengths and angles) / d(unit coordinates)|, in Å and degrees.

    Adding it to a log reward makes the target uniform in the free lengths and angles, as in Crystal-GFN.
    The product of the free lengths over three is the derivative with respect to (v, s1, s2).
    """
    log_lengths = parameters[:, :3].log()
    free_length = torch.stack(
        [torch.ones_like(system, dtype=torch.bool), IS_FREE[system, RATIO_B], IS_FREE[system, RATIO_C]], 1
    )
    widths = (box.ranges()[system] @ torch.tensor([-1.0, 1.0], dtype=torch.float64)).clamp(min=1e-300).log()
    return (log_lengths * free_length).sum(dim=-1) - math.log(3.0) + (widths * IS_FREE[system]).sum(dim=-1)


def lattice_matrix(parameters: Tensor) -> Tensor:
    """Return (n, 3, 3) lattice vectors as rows in Å of (n, 6) a, b, c in Å and angles in degrees.

    a lies along x, b in the xy plane.
    """
    a, b, c = parameters[:, :3].unbind(dim=-1)
    cos_alpha, cos_beta, cos_gamma = torch.cos(torch.deg2rad(parameters[:, 3:])).unbind(dim=-1)
    sin_gamma = torch.sin(torch.deg2rad(parameters[:, 5]))
    c_y = (cos_alpha - cos_beta * cos_gamma) / sin_gamma
    height = (1.0 - cos_beta**2 - c_y**2).clamp(min=0.0).sqrt()
    zero = torch.zeros_like(a)
    rows = [a, zero, zero, b * cos_gamma, b * sin_gamma, zero, c * cos_beta, c * c_y, c * height]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))
