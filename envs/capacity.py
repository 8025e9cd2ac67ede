"""What the Wyckoff positions of a space group can still hold, as one small automaton for all groups.

A position without free coordinates holds one orbit, a position with free coordinates any number.
Placing n atoms of an element therefore leaves one of several residuals. Residuals that another one
dominates are dropped, sets of residuals become states (subset construction), and states with the
same future are merged across all space groups (Moore's partition refinement). The automaton answers
"can these element counts, in any order, be packed?" with one table look-up per element.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from envs.conventions import N_SPACE_GROUPS
from envs.symmetry import SYMMETRY

DEAD = -1
Residual = tuple[int, ...]


@dataclass(frozen=True)
class PositionClass:
    """What packing depends on: fixed positions by multiplicity, and the multiplicities of free ones."""

    fixed: tuple[tuple[int, int], ...]  # (multiplicity, number of fixed positions), ascending
    free: tuple[int, ...]

    @property
    def full(self) -> Residual:
        """Return the residual in which nothing is used."""
        return tuple(number for _, number in self.fixed)

    def residuals(self) -> list[Residual]:
        """Return every residual, in mixed-radix order."""
        return list(product(*(range(number + 1) for number in self.full)))


@dataclass(frozen=True)
class CapacityTable:
    """The automaton, and where each space group starts in it."""

    next_state: Tensor  # (n_states, max_count + 1) int64, DEAD where the count cannot be placed; column 0 is DEAD
    start: Tensor  # (230,) int64
    residual_state: Tensor  # (230, max_residuals) int64 state of each exact residual, DEAD padding
    fixed_stride: Tensor  # (230, 27) int64 residual index lost when this fixed letter is used, 0 for free ones
    full_residual: Tensor  # (230,) int64 residual index in which nothing is used
    multiplicity: Tensor  # (230, 27) int64 in the chosen cell, 0 = padding or larger than max_count

    @property
    def n_states(self) -> int:
        """Return the number of states."""
        return int(self.next_state.shape[0])


def position_class(multiplicity: np.ndarray, n_free: np.ndarray) -> PositionClass:
    """Return the class of one space group from its usable letters (arrays of equal length)."""
    fixed = multiplicity[n_free == 0]
    values, numbers = np.unique(fixed, return_counts=True)
    return PositionClass(
        fixed=tuple(zip(values.tolist(), numbers.tolist(), strict=True)),
        free=tuple(np.unique(multiplicity[n_free > 0]).tolist()),
    )


def free_sums(free: tuple[int, ...], max_count: int) -> np.ndarray:
    """Return (max_count + 1,) bool, True where n is a sum of free multiplicities (0 is)."""
    reachable = np.zeros(max_count + 1, dtype=bool)
    reachable[0] = True
    for n in range(1, max_count + 1):
        reachable[n] = any(m <= n and reachable[n - m] for m in free)
    return reachable


def successors(kind: PositionClass, max_count: int) -> dict[Residual, list[list[Residual]]]:
    """Return for every residual and count 0..max_count the residuals that placing the count can leave."""
    reachable = free_sums(kind.free, max_count)
    multiplicities = [m for m, _ in kind.fixed]
    table: dict[Residual, list[list[Residual]]] = {}
    for before in kind.residuals():
        rows: list[list[Residual]] = [[] for _ in range(max_count + 1)]
        for after in product(*(range(number + 1) for number in before)):
            placed = sum(m * (b - a) for m, b, a in zip(multiplicities, before, after, strict=True))
            for n in range(max(placed, 1), max_count + 1):
                if reachable[n - placed]:
                    rows[n].append(after)
        table[before] = rows
    return table


def undominated(residuals: set[Residual]) -> frozenset[Residual]:
    """Drop residuals that another one exceeds everywhere: what they can hold, the other can."""
    return frozenset(
        r
        for r in residuals
        if not any(r != other and all(x <= y for x, y in zip(r, other, strict=True)) for other in residuals)
    )


def explore(kind: PositionClass, max_count: int) -> tuple[dict[frozenset[Residual], int], list[list[int]]]:
    """Return the reachable sets of residuals with their numbers, and the transition rows (DEAD = -1)."""
    table = successors(kind, max_count)
    states: dict[frozenset[Residual], int] = {}
    queue = [frozenset([residual]) for residual in kind.residuals()]
    for state in queue:
        states.setdefault(state, len(states))
    rows: list[list[int]] = []
    for state in queue:  # grows while we walk through it
        row = [DEAD]
        for n in range(1, max_count + 1):
            after = undominated({r for before in state for r in table[before][n]})
            if not after:
                row.append(DEAD)
                continue
            if after not in states:
                states[after] = len(states)
                queue.append(after)
            row.append(states[after])
        rows.append(row)
    return states, rows


def merge_equivalent(rows: np.ndarray) -> np.ndarray:
    """Return (n_states,) int64 class of each state: states with the same future share one."""
    classes = np.zeros(len(rows), dtype=np.int64)
    n_classes = 1
    while True:
        signature = np.where(rows == DEAD, DEAD, classes[rows])
        _, refined = np.unique(np.column_stack([classes, signature]), axis=0, return_inverse=True)
        classes = refined.reshape(-1).astype(np.int64)
        if classes.max() + 1 == n_classes:
            return classes
        n_classes = int(classes.max()) + 1


def build_capacity_table(max_count: int, *, conventional: bool) -> CapacityTable:
    """Build the automaton of all 230 groups.

    Args:
        max_count: Largest number of atoms of one element in the chosen cell.
        conventional: Count atoms in the conventional cell instead of the primitive one.
    """
    symmetry = SYMMETRY
    multiplicity = (symmetry.multiplicity if conventional else symmetry.primitive_multiplicity).numpy().copy()
    n_free = symmetry.n_free_coords.numpy()
    multiplicity[multiplicity > max_count] = 0
    kinds: list[PositionClass] = []
    for g in range(N_SPACE_GROUPS):
        usable = multiplicity[g] > 0
        kinds.append(position_class(multiplicity[g][usable], n_free[g][usable]))
    all_rows: list[list[int]] = []
    states_of: dict[PositionClass, dict[Residual, int]] = {}
    for kind in dict.fromkeys(kinds):
        states, rows = explore(kind, max_count)
        offset = len(all_rows)
        all_rows += [[DEAD if s == DEAD else s + offset for s in row] for row in rows]
        states_of[kind] = {r: states[frozenset([r])] + offset for r in kind.residuals()}
    rows_array = np.array(all_rows, dtype=np.int64)
    classes = merge_equivalent(rows_array)
    representative = np.unique(classes, return_index=True)[1]
    merged = rows_array[representative]
    merged = np.where(merged == DEAD, DEAD, classes[merged])
    max_residuals = max(len(kind.residuals()) for kind in kinds)
    residual_state = np.full((N_SPACE_GROUPS, max_residuals), DEAD, dtype=np.int64)
    stride = np.zeros(multiplicity.shape, dtype=np.int64)
    full = np.zeros(N_SPACE_GROUPS, dtype=np.int64)
    for g, kind in enumerate(kinds):
        residuals = kind.residuals()
        residual_state[g, : len(residuals)] = [classes[states_of[kind][r]] for r in residuals]
        full[g] = len(residuals) - 1
        step = 1
        for (m, number), _ in zip(reversed(kind.fixed), reversed(kind.full), strict=True):
            stride[g][(multiplicity[g] == m) & (n_free[g] == 0)] = step
            step *= number + 1
    start = residual_state[np.arange(N_SPACE_GROUPS), full]
    return CapacityTable(
        next_state=torch.from_numpy(merged),
        start=torch.from_numpy(start),
        residual_state=torch.from_numpy(residual_state),
        fixed_stride=torch.from_numpy(stride),
        full_residual=torch.from_numpy(full),
        multiplicity=torch.from_numpy(multiplicity),
    )
