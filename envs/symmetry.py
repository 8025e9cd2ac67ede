"""Facts of the 230 space groups: lattice systems, Wyckoff positions, normaliser alternatives.

One shipped table (``envs/tables/symmetry.npz``), exported from PyXtal by ``envs.export_tables``.
Settings are PyXtal's: R groups on hexagonal axes, origin choice 2 where there are two.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from envs.conventions import MAX_LETTERS, N_SPACE_GROUPS, TABLES


@dataclass(frozen=True)
class Symmetry:
    """Tables over g = space_group - 1 and letter index i (0 = "a"), padded to 27 letters."""

    n_letters: Tensor  # (230,) int64
    multiplicity: Tensor  # (230, 27) int64, per conventional cell, 0 = padding
    centring: Tensor  # (230,) int64, conventional over primitive volume: 1, 2, 3 or 4
    n_free_coords: Tensor  # (230, 27) int64, free coordinates 0-3, -1 = padding
    site_symmetry: Tensor  # (230, 27) int64 into ``site_symmetry_names``, 0 = padding
    site_symmetry_names: tuple[str, ...]
    lattice_system: Tensor  # (230,) int64, 0-7
    point_symmetry: Tensor  # (230,) int64, 0-4
    n_alternatives: Tensor  # (230,) int64, distinct rows of the two tables below
    alternative_letters: Tensor  # (230, max_alternatives, 27) int64, letter i becomes this letter; row 0 = identity
    alternative_axes: Tensor  # (230, max_alternatives, 3) int64, old axis that becomes each new axis

    @property
    def primitive_multiplicity(self) -> Tensor:
        """Return (230, 27) int64 atoms that one orbit adds to the primitive cell, 0 = padding."""
        return self.multiplicity // self.centring[:, None]

    @cached_property
    def shift_letters(self) -> Tensor:
        """Return (230, n, 27) int8: the ``alternative_letters`` that leave the cell as it is, then identities.

        They are shifts of the origin; in 20 groups some are inversions or exchange equal axes. They form a group.
        """
        stays = (self.alternative_axes == torch.arange(3)).all(dim=2)
        stays &= torch.arange(self.max_alternatives) < self.n_alternatives[:, None]
        order = stays.int().argsort(dim=1, descending=True, stable=True)[:, : int(stays.sum(dim=1).max())]
        letters = self.alternative_letters.gather(1, order[:, :, None].expand(-1, -1, MAX_LETTERS))
        return torch.where(stays.gather(1, order)[:, :, None], letters, torch.arange(MAX_LETTERS)).to(torch.int8)

    @property
    def max_alternatives(self) -> int:
        """Return the largest number of alternatives of any space group."""
        return int(self.alternative_letters.shape[1])

    def least_letters(self, group: Tensor, shifts: Tensor) -> Tensor:
        """Return (n, 27) int64 least image of every letter of ``group`` (n,) under some of its ``shift_letters``.

        Args:
            group: Space group - 1.
            shifts: (n,) int64 bits of the rows that are allowed, at least one.
        """
        letters = self.shift_letters[group]
        allowed = (shifts[:, None] >> torch.arange(letters.shape[1])) & 1 > 0
        return torch.where(allowed[:, :, None], letters, MAX_LETTERS).amin(dim=1).long()


@cache
def load_symmetry() -> Symmetry:
    """Return the tables of all 230 space groups (read once per process)."""
    with np.load(TABLES / "symmetry.npz", allow_pickle=False) as table:
        arrays = {key: table[key] for key in table.files}
    rows = arrays.pop("alternatives").astype(np.int64)
    n_alternatives = np.bincount(rows[:, 0], minlength=N_SPACE_GROUPS)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(n_alternatives) - n_alternatives, n_alternatives)
    # Padding repeats the identity, so that a gather over all rows never leaves the group.
    letters = np.tile(np.arange(MAX_LETTERS), (N_SPACE_GROUPS, n_alternatives.max(), 1))
    axes = np.tile(np.arange(3), (N_SPACE_GROUPS, n_alternatives.max(), 1))
    letters[rows[:, 0], within] = rows[:, 1 : 1 + MAX_LETTERS]
    axes[rows[:, 0], within] = rows[:, 1 + MAX_LETTERS :]
    integer = {
        key: torch.from_numpy(arrays[key].astype(np.int64))
        for key in ("n_letters", "multiplicity", "centring", "n_free_coords", "site_symmetry")
    }
    return Symmetry(
        **integer,
        site_symmetry_names=tuple(arrays["site_symmetry_names"].tolist()),
        lattice_system=torch.from_numpy(arrays["lattice_system"].astype(np.int64)),
        point_symmetry=torch.from_numpy(arrays["point_symmetry"].astype(np.int64)),
        n_alternatives=torch.from_numpy(n_alternatives),
        alternative_letters=torch.from_numpy(letters),
        alternative_axes=torch.from_numpy(axes),
    )


SYMMETRY = load_symmetry()
