"""Crystals as the tensors that the flow network reads: orbits, free parameters, lattice coordinates.

Nothing here needs more than torch and numpy, so prepared data train on any machine.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from envs import lattice
from envs.symmetry import SYMMETRY
from envs.wyckoff_operations import free_mask, load_operations, operation_rows


@dataclass(frozen=True)
class OrbitBatch:
    """Crystals with the parameters of their orbits, padded to the widest."""

    space_group: Tensor  # (n,) int64, 1-230
    elements: Tensor  # (n, max_orbits) int64 atomic number, 0 = padding
    letters: Tensor  # (n, max_orbits) int64, -1 = padding
    parameters: Tensor  # (n, max_orbits, 3) float32 free Wyckoff parameters, 0 where not free
    cell: Tensor  # (n, 6) float32 a, b, c in Å, angles in degrees, conventional
    log_reference: Tensor  # (n,) float32 log of the sum of elemental volumes of the conventional cell in Å³

    def __len__(self) -> int:
        """Return the number of crystals."""
        return len(self.space_group)

    def select(self, rows: Tensor) -> Self:
        """Return the crystals at `rows`, cut to the columns that they use."""
        width = max(1, int((self.letters[rows] >= 0).sum(dim=1).max())) if len(rows) else 1
        return type(self)(
            self.space_group[rows],
            self.elements[rows, :width],
            self.letters[rows, :width],
            self.parameters[rows, :width],
            self.cell[rows],
            self.log_reference[rows],
        )

    @property
    def lattice_system(self) -> Tensor:
        """(n,) int64, 0-7."""
        return SYMMETRY.lattice_system[self.space_group - 1]

    def save(self, path: Path) -> None:
        """Write all tensors as a compressed npz."""
        np.savez_compressed(
            path, allow_pickle=False, **{field.name: getattr(self, field.name).numpy() for field in fields(self)}
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{field.name: torch.from_numpy(stored[field.name]) for field in fields(cls)})


@dataclass(frozen=True)
class Frame:
    """What stays the same while a batch of crystals flows."""

    space_group: Tensor  # (n,) int64
    lattice_system: Tensor  # (n,) int64
    elements: Tensor  # (n, w) int64
    multiplicity: Tensor  # (n, w) int64 atoms per primitive cell
    site_symmetry: Tensor  # (n, w) int64
    first_operation: Tensor  # (n, w, 3, 4) rotation and translation that make the first atom
    is_free: Tensor  # (n, w, 3) bool
    is_orbit: Tensor  # (n, w) bool, False in padding
    atom_orbit: Tensor  # (n, m) int64 column of the orbit of each atom of the primitive cell
    atom_operation: Tensor  # (n, m, 3, 4)
    is_atom: Tensor  # (n, m) bool
    is_first: Tensor  # (n, m) bool: the first atom of its orbit
    primitive: Tensor  # (n, 3, 3) edges of the primitive cell, fractional

    def to(self, device: torch.device | str) -> Self:
        """Return the frame on `device`."""
        return type(self)(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def make_frame(space_group: Tensor, elements: Tensor, letters: Tensor) -> Frame:
    """Return the frame of a batch.

    Args:
        space_group: (n,) int64, 1-230.
        elements: (n, w) int64, 0 = padding.
        letters: (n, w) int64, -1 = padding.
    """
    operations = load_operations()
    n, width = letters.shape
    group, is_orbit = space_group - 1, letters >= 0
    letter = letters.clamp(min=0)
    table = torch.cat([operations.rotation.float(), operations.translation.float()[..., None]], dim=2)
    first_row = operations.first[group[:, None], letter]
    orbit, row = operation_rows(space_group, letters, primitive=True)
    crystal = orbit // width
    per_crystal = torch.bincount(crystal, minlength=n)
    place = torch.arange(len(orbit)) - (per_crystal.cumsum(0) - per_crystal)[crystal]
    m = int(per_crystal.max()) if n else 0
    atom_orbit, is_atom, is_first = (torch.zeros(n, m, dtype=kind) for kind in (torch.int64, torch.bool, torch.bool))
    atom_operation = torch.zeros(n, m, 3, 4)
    atom_orbit[crystal, place] = orbit % width
    is_atom[crystal, place] = True
    is_first[crystal, place] = row == first_row.flatten()[orbit]
    atom_operation[crystal, place] = table[row]
    return Frame(
        space_group=space_group,
        lattice_system=SYMMETRY.lattice_system[group],
        elements=elements,
        multiplicity=SYMMETRY.primitive_multiplicity[group[:, None], letter] * is_orbit,
        site_symmetry=SYMMETRY.site_symmetry[group[:, None], letter],
        first_operation=table[first_row],
        is_free=free_mask(space_group, letters),
        is_orbit=is_orbit,
        atom_orbit=atom_orbit,
        atom_operation=atom_operation,
        is_atom=is_atom,
        is_first=is_first,
        primitive=operations.primitive[group].float(),
    )


@dataclass(frozen=True)
class LatticeScale:
    """Mean and standard deviation of the free lattice coordinates of each lattice system, to make them comparable."""

    mean: Tensor  # (8, 6) float32
    std: Tensor  # (8, 6) float32

    @classmethod
    def fit(cls, batch: OrbitBatch) -> Self:
        """Return the statistics of a data set; systems that it lacks get those of all crystals."""
        values = lattice.coordinates(batch.cell.double(), batch.log_reference.double())
        mean, std = values.mean(dim=0).repeat(8, 1), values.std(dim=0).clamp(min=1e-3).repeat(8, 1)
        for system in batch.lattice_system.unique().tolist():
            rows = values[batch.lattice_system == system]
            if len(rows) > 1:
                mean[system], std[system] = rows.mean(dim=0), rows.std(dim=0).clamp(min=1e-3)
        return cls(mean.float(), std.float())

    def normalise(self, cell: Tensor, log_reference: Tensor, system: Tensor) -> Tensor:
        """Return (n, 6) normalised coordinates of cells, 0 where the lattice system fixes them."""
        values = lattice.coordinates(cell.double(), log_reference.double()).float()
        return (values - self.mean[system]) / self.std[system] * lattice.IS_FREE[system]

    def cell(self, normalised: Tensor, log_reference: Tensor, system: Tensor) -> Tensor:
        """Return (n, 6) float32 a, b, c in Å and angles in degrees of normalised coordinates."""
        free = lattice.IS_FREE.to(system.device)[system]
        values = normalised * self.std.to(system.device)[system] + self.mean.to(system.device)[system]
        fixed = torch.nn.functional.pad(lattice.FIXED_ANGLES, (0, 3)).float().to(system.device)[system]
        values = torch.where(free, values, fixed)
        # Angles of a noisy start may not close a cell; those of a learned end do.
        angles = values[:, :3].clamp(50.0, 130.0)
        bound = torch.minimum(angles[:, 0] + angles[:, 1], 360.0 - angles[:, 0] - angles[:, 1]) - 5.0
        low = (angles[:, 0] - angles[:, 1]).abs() + 5.0
        gamma = torch.maximum(torch.minimum(angles[:, 2], bound), low)
        gamma = torch.where(free[:, 2], gamma, angles[:, 2])
        closed = torch.cat([angles[:, :2], gamma[:, None], values[:, 3:]], dim=1)
        return lattice.lattice_parameters(closed, log_reference)
