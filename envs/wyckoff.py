"""Which Wyckoff letters can still follow while the atoms of one element are placed.

Letters come in fixed order: positions without free coordinates at most once and increasing, positions
with free coordinates any number of times and non-decreasing. For every (group, used fixed letters,
next letter, atoms left) a table holds the set of residual capacities that can be reached, as bits; a
letter is legal if and only if one of them is among those from which the crystal can be completed.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from envs.capacity import DEAD, CapacityTable
from envs.conventions import MAX_LETTERS, N_SPACE_GROUPS
from envs.symmetry import SYMMETRY


@dataclass(frozen=True)
class LetterTable:
    """Reachable residuals of every partial placement, all groups in one flat array."""

    reachable: Tensor  # flat int64 bit sets over residual indices
    offset: Tensor  # (230,) int64 start of each group in ``reachable``
    n_letters: Tensor  # (230,) int64
    fixed_bit: Tensor  # (230, 27) int64 bit of each fixed letter in ``used``, 0 for free letters
    multiplicity: Tensor  # (230, 27) int64, 0 = not usable
    stride: Tensor  # (230, 27) int64 residual index lost by using the letter
    full_residual: Tensor  # (230,) int64
    max_count: int

    def residual(self, group: Tensor, used: Tensor) -> Tensor:
        """Return (n,) residual index of space group index ``group`` with fixed letters ``used`` (bits)."""
        is_used = (used[:, None] & self.fixed_bit[group]).ne(0)
        return self.full_residual[group] - (self.stride[group] * is_used).sum(dim=-1)

    def letter_mask(self, group: Tensor, used: Tensor, first_letter: Tensor, n_left: Tensor, good: Tensor) -> Tensor:
        """Return (n, 27) bool: letters on which the next orbit may sit.

        Args:
            group: (n,) int64 space group - 1.
            used: (n,) int64 bits of the fixed letters in use.
            first_letter: (n,) int64 smallest letter that keeps the order.
            n_left: (n,) int64 atoms of the element still to place, > 0.
            good: (n,) int64 bits of the residuals from which the crystal can be completed.
        """
        letter = torch.arange(MAX_LETTERS, device=group.device)
        multiplicity, bit = self.multiplicity.index_select(0, group), self.fixed_bit.index_select(0, group)
        left = n_left[:, None] - multiplicity
        fits = (multiplicity > 0) & (left >= 0) & (letter >= first_letter[:, None]) & (used[:, None] & bit).eq(0)
        after_used = used[:, None] | bit
        after_first = letter + bit.ne(0)
        index = (after_used * (self.n_letters[group] + 1)[:, None] + after_first) * (self.max_count + 1) + left
        index = torch.where(fits, self.offset[group][:, None] + index, 0)
        return fits & (self.reachable[index] & good[:, None]).ne(0)


def build_letter_table(capacity: CapacityTable) -> LetterTable:
    """Tabulate the placements that the capacity automaton counts."""
    multiplicity = capacity.multiplicity.numpy()
    n_free = SYMMETRY.n_free_coords.numpy()
    n_letters = SYMMETRY.n_letters.numpy()
    max_count = capacity.next_state.shape[1] - 1
    fixed_bit = np.zeros((N_SPACE_GROUPS, MAX_LETTERS), dtype=np.int64)
    blocks: list[np.ndarray] = []
    for g in range(N_SPACE_GROUPS):
        fixed = np.flatnonzero((n_free[g] == 0) & (multiplicity[g] > 0))
        fixed_bit[g, fixed] = 1 << np.arange(len(fixed))
        stride = capacity.fixed_stride[g].numpy()
        blocks.append(
            _reachable_residuals(
                multiplicity[g, : n_letters[g]],
                fixed_bit[g, : n_letters[g]],
                stride[: n_letters[g]],
                int(capacity.full_residual[g]),
                max_count,
            ).reshape(-1)
        )
    offset = np.cumsum([0] + [len(block) for block in blocks[:-1]])
    return LetterTable(
        reachable=torch.from_numpy(np.concatenate(blocks)),
        offset=torch.from_numpy(offset),
        n_letters=SYMMETRY.n_letters,
        fixed_bit=torch.from_numpy(fixed_bit),
        multiplicity=capacity.multiplicity,
        stride=capacity.fixed_stride,
        full_residual=capacity.full_residual,
        max_count=max_count,
    )


def _reachable_residuals(
    multiplicity: np.ndarray, fixed_bit: np.ndarray, stride: np.ndarray, full: int, max_count: int
) -> np.ndarray:
    """Return (2^n_fixed, n_letters + 1, max_count + 1) int64 bits, by recursion from the last letter back."""
    n_letters = len(multiplicity)
    used = np.arange(1 << int((fixed_bit > 0).sum()))
    residual = full - sum(((used & bit) > 0) * step for bit, step in zip(fixed_bit, stride, strict=True))
    table = np.zeros((len(used), n_letters + 1, max_count + 1), dtype=np.int64)
    table[:, n_letters, 0] = 1 << residual
    for i in range(n_letters - 1, -1, -1):
        m, bit = int(multiplicity[i]), int(fixed_bit[i])
        table[:, i] = table[:, i + 1]
        if m == 0:
            continue
        if bit:
            free_rows = used[(used & bit) == 0]
            table[free_rows, i, m:] |= table[free_rows | bit, i + 1, : max_count + 1 - m]
        else:
            for n in range(m, max_count + 1):
                table[:, i, n] |= table[:, i, n - m]
    return table


def residuals_good(table_alive: Tensor, states: Tensor) -> Tensor:
    """Return (n,) int64 bits of residuals that exist (``states`` != DEAD) and are alive, (n, max_residuals) each."""
    member = (table_alive & (states != DEAD)).long()
    return (member << torch.arange(states.shape[1], device=states.device)).sum(dim=-1)
