"""Coordinates of Wyckoff positions: from free parameters to atoms, and back.

The atoms of an orbit are ``x = A u + b (mod 1)``, one affine operation each, with u the free parameters (x, y, z of the
International Tables). Every A is integer, so u lives on a flat torus: whole numbers added to it change nothing. u is
stored in three columns; those that are not free hold zero.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from envs.conventions import GRID, MAX_LETTERS, N_SPACE_GROUPS, TABLES
from envs.symmetry import SYMMETRY

_THIRD = 1.0 / 3.0
#: Edges of the primitive cell of each lattice letter; R is obverse on hexagonal axes.
_PRIMITIVE = {
    name: torch.tensor(rows, dtype=torch.float64)
    for name, rows in {
        "P": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        "A": [[1, 0, 0], [0, 0.5, -0.5], [0, 0.5, 0.5]],
        "C": [[0.5, 0.5, 0], [-0.5, 0.5, 0], [0, 0, 1]],
        "I": [[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.5, 0.5, -0.5]],
        "F": [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]],
        "R": [[2 * _THIRD, _THIRD, _THIRD], [-_THIRD, _THIRD, _THIRD], [-_THIRD, -2 * _THIRD, _THIRD]],
    }.items()
}


@dataclass(frozen=True)
class Operations:
    """All operations of the 1,731 Wyckoff positions in PyXtal's setting, one position after another."""

    rotation: Tensor  # (14433, 3, 3) int64
    translation: Tensor  # (14433, 3) float64
    left_inverse: Tensor  # (14433, 3, 3) int64, takes A u back to u
    first: Tensor  # (230, 27) int64 row of the first operation, which defines the parameters
    is_free: Tensor  # (230, 27, 3) bool: parameters that are free
    same_orbit: Tensor  # (14433, 3, 4) int64: other parameters of the same atoms, shifts in 24ths; see ``n_same_orbit``
    same_orbit_first: Tensor  # (230, 27) int64 row of the first of them, the identity
    n_same_orbit: Tensor  # (230, 27) int64
    alternative_map: Tensor  # (230, max_alternatives, 27, 3, 4) int8: parameters under ``SYMMETRY``'s alternatives
    polar: Tensor  # (230, 3) bool: axes along which the origin is free
    primitive: Tensor  # (230, 3, 3) float64: rows are the primitive cell's edges in fractional coordinates


@cache
def load_operations() -> Operations:
    """Return the tables of all positions (read once per process)."""
    with np.load(TABLES / "operations.npz", allow_pickle=False) as table:
        arrays = {key: torch.from_numpy(table[key].astype(np.int64)) for key in table.files if key != "pyxtal_version"}
    rotation, shift, inverse = arrays["rotation"], arrays["translation"], arrays["left_inverse"]
    sizes = SYMMETRY.multiplicity.flatten()
    first = (sizes.cumsum(0) - sizes).reshape(N_SPACE_GROUPS, MAX_LETTERS)
    position = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    start = first.flatten()[position]
    # An operation whose image lies on the subspace of the first one gives other parameters of the same orbit.
    linear, offset = inverse[start] @ rotation, _apply(inverse[start], shift - shift[start])
    away = _apply(rotation[start], offset) - (shift - shift[start])
    same = (rotation[start] @ linear == rotation).all(dim=(1, 2)) & (away % GRID == 0).all(dim=1)
    n_same = torch.zeros_like(sizes).index_add_(0, position, same.long())
    group = torch.arange(N_SPACE_GROUPS)
    general = SYMMETRY.n_letters - 1
    moves_axis = (rotation != torch.eye(3, dtype=torch.int64)).any(dim=1).long()  # (14433, 3) columns
    group_of = position // MAX_LETTERS
    is_general = position % MAX_LETTERS == general[group_of]
    moved = torch.zeros(N_SPACE_GROUPS, 3, dtype=torch.int64)
    moved.index_add_(0, group_of[is_general], moves_axis[is_general])
    maps = torch.zeros(N_SPACE_GROUPS, SYMMETRY.max_alternatives, MAX_LETTERS, 3, 4, dtype=torch.int8)
    exists = torch.arange(SYMMETRY.max_alternatives) < SYMMETRY.n_alternatives[group][:, None]
    maps[exists] = arrays["alternative_map"].to(torch.int8)
    return Operations(
        rotation=rotation,
        translation=shift.double() / GRID,
        left_inverse=inverse,
        first=first,
        is_free=((rotation != 0).any(dim=1)[first.clamp(max=len(rotation) - 1)])
        & (SYMMETRY.multiplicity > 0)[..., None],
        same_orbit=torch.cat([linear, offset[..., None] % GRID], dim=2)[same],
        same_orbit_first=(n_same.cumsum(0) - n_same).reshape(first.shape),
        n_same_orbit=n_same.reshape(first.shape),
        alternative_map=maps,
        polar=moved == 0,
        primitive=torch.stack([_PRIMITIVE[_centring_name(g, rotation, shift, first)] for g in range(N_SPACE_GROUPS)]),
    )


def _centring_name(group: int, rotation: Tensor, shift: Tensor, first: Tensor) -> str:
    """Return the lattice letter of a group from the pure translations among its operations."""
    general = int(SYMMETRY.n_letters[group]) - 1
    start = int(first[group, general])
    rows = slice(start, start + int(SYMMETRY.multiplicity[group, general]))
    pure = (rotation[rows] == torch.eye(3, dtype=torch.int64)).all(dim=(1, 2))
    translations = {tuple(t) for t in shift[rows][pure].tolist()}
    names = {1: "P", 3: "R", 4: "F"}
    if len(translations) in names:
        return names[len(translations)]
    return {(12, 12, 12): "I", (0, 12, 12): "A", (12, 12, 0): "C"}[max(translations)]


def free_mask(space_group: Tensor, letters: Tensor) -> Tensor:
    """Return (n, max_orbits, 3) bool: parameters of each orbit that are free; False in padding.

    Args:
        space_group: (n,) int64, 1-230.
        letters: (n, max_orbits) int64, -1 = padding.
    """
    return load_operations().is_free[space_group[:, None] - 1, letters.clamp(min=0)] & (letters >= 0)[..., None]


def is_rigid(space_group: Tensor, letters: Tensor) -> Tensor:
    """Return (n,) bool: crystals whose letters leave no parameter free, arguments as of `free_mask`."""
    return ~free_mask(space_group, letters).any(dim=2).any(dim=1)


def representative(space_group: Tensor, letters: Tensor, parameters: Tensor) -> Tensor:
    """Return (n, max_orbits, 3) fractional coordinates in [0, 1) of the first atom of each orbit, conventional cell.

    Args:
        space_group: (n,) int64, 1-230.
        letters: (n, max_orbits) int64, -1 = padding, whose coordinates mean nothing.
        parameters: (n, max_orbits, 3) float.
    """
    operations = load_operations()
    row = operations.first[space_group[:, None] - 1, letters.clamp(min=0)]
    rotation = operations.rotation[row].to(parameters.dtype)
    return (_apply(rotation, parameters) + operations.translation[row].to(parameters.dtype)) % 1.0


def all_positions(
    space_group: Tensor, letters: Tensor, parameters: Tensor, *, primitive: bool = False
) -> tuple[Tensor, Tensor]:
    """Return every atom of the conventional cells, or one of each set that centring translations relate.

    Args:
        space_group: (n,) int64, 1-230.
        letters: (n, max_orbits) int64, -1 = padding.
        parameters: (n, max_orbits, 3) float.
        primitive: Leave out the copies that centring makes.

    Returns:
        (n_atoms,) int64 index of the orbit in ``letters.flatten()``, orbits in order, and (n_atoms, 3) fractional
        coordinates in [0, 1).
    """
    operations = load_operations()
    orbit, row = operation_rows(space_group, letters, primitive=primitive)
    u = parameters.reshape(-1, 3)[orbit]
    x = _apply(operations.rotation[row].to(u.dtype), u) + operations.translation[row].to(u.dtype)
    return orbit, x % 1.0


def operation_rows(space_group: Tensor, letters: Tensor, *, primitive: bool = False) -> tuple[Tensor, Tensor]:
    """Return, for every atom, its orbit in ``letters.flatten()`` and the row of the operation that makes it.

    The first operations of every position, as many as the orbit has atoms in a primitive cell, differ by more than a
    centring translation (a test checks all 1,731).
    """
    group, letter = space_group[:, None] - 1, letters.clamp(min=0)
    multiplicity = SYMMETRY.primitive_multiplicity if primitive else SYMMETRY.multiplicity
    sizes = (multiplicity[group, letter] * (letters >= 0)).flatten()
    return _ragged(load_operations().first[group, letter].flatten(), sizes)


def same_orbit_rows(space_group: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for every equivalent parameter set, its orbit in ``letters.flatten()`` and its row in ``same_orbit``."""
    operations = load_operations()
    group, letter = space_group[:, None] - 1, letters.clamp(min=0)
    sizes = (operations.n_same_orbit[group, letter] * (letters >= 0)).flatten()
    return _ragged(operations.same_orbit_first[group, letter].flatten(), sizes)


def parameters_of(space_group: Tensor, letters: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parameters of each orbit from the position of any one of its atoms.

    Of the equivalent parameter sets it is the one of the operation that fits best, the first in the table among equals.

    Args:
        space_group: (n,) int64, 1-230.
        letters: (n, max_orbits) int64, -1 = padding.
        positions: (n, max_orbits, 3) float64 fractional coordinates, conventional cell.

    Returns:
        (n, max_orbits, 3) parameters in [0, 1), zero where not free, and (n, max_orbits) the largest difference of a
        fractional coordinate from the position that they describe.
    """
    operations = load_operations()
    orbit, row = operation_rows(space_group, letters)
    away = positions.reshape(-1, 3)[orbit] - operations.translation[row]
    u = _apply(operations.left_inverse[row].double(), away)
    rest = _apply(operations.rotation[row].double(), u) - away
    error = (rest - rest.round()).abs().amax(dim=-1)
    n_orbits = letters.numel()
    best_error = torch.full((n_orbits,), torch.inf, dtype=torch.float64).scatter_reduce(0, orbit, error, "amin")
    order = torch.arange(len(orbit))
    fits = error <= best_error[orbit] + 1e-6
    chosen = torch.full((n_orbits,), len(orbit)).scatter_reduce(0, orbit[fits], order[fits], "amin")
    placed = (letters >= 0).flatten()
    parameters = torch.zeros(n_orbits, 3, dtype=torch.float64)
    parameters[placed] = u[chosen[placed]] % 1.0
    parameters[parameters >= 1.0] = 0.0  # a tiny negative number rounds up to one
    best_error[~placed] = 0.0
    return parameters.reshape(*letters.shape, 3), best_error.reshape(letters.shape)


def transform_parameters(space_group: Tensor, letters: Tensor, parameters: Tensor, alternative: Tensor) -> Tensor:
    """Return the parameters of each crystal in the setting that ``envs.equivalence.image`` relabels it to.

    Args:
        space_group: (n,) int64, 1-230.
        letters: (n, max_orbits) int64 before relabelling, -1 = padding.
        parameters: (n, max_orbits, 3) float before relabelling.
        alternative: (n,) int64 row of the group's alternatives.
    """
    group = space_group[:, None] - 1
    table = load_operations().alternative_map[group, alternative[:, None], letters.clamp(min=0)].to(parameters.dtype)
    return (_apply(table[..., :3], parameters) + table[..., 3] / GRID) % 1.0


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _ragged(first: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the owner of each element of ranges ``first[i] .. first[i] + sizes[i] - 1`` and the elements."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    within = torch.arange(len(owner)) - (sizes.cumsum(0) - sizes)[owner]
    return owner, first[owner] + within
