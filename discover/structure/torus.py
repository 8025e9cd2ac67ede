"""The flat torus of free Wyckoff parameters: differences, and the pairing of noise with equivalent data.

One crystal has many parameter sets: every orbit lists several (``same_orbit`` of ``envs.wyckoff_operations``), orbits
of the same element on the same letter may trade places, some operations of the normaliser keep all letters, and along
polar axes the origin is free. Of all these, training pairs the noise with the nearest one, which makes paths short
and straight (equivariant optimal transport: Klein et al. 2023, arXiv:2306.15030; Song et al. 2023, arXiv:2312.07168).
"""

import torch
from torch import Tensor

from envs.conventions import GRID
from envs.symmetry import SYMMETRY
from envs.wyckoff_operations import free_mask, load_operations, same_orbit_rows, transform_parameters

_MOST_EXCHANGES = 24  # more pairs of orbits than a cell of twenty atoms ever needs
_SHIFT_ROUNDS = 2


def wrap(difference: Tensor) -> Tensor:
    """Return differences of torus coordinates as their shortest images, in [-1/2, 1/2)."""
    return (difference + 0.5) % 1.0 - 0.5


def nearest_equivalent(space_group: Tensor, elements: Tensor, letters: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """Return parameters of the same crystals as ``target`` that lie near ``start``.

    The choice among operations of the normaliser, and the parameter set of every orbit, are optimal given the rest;
    orbits trade places in pairs as long as that helps; shifts along polar axes alternate with these choices.

    Args:
        space_group: (n,) int64, 1-230.
        elements: (n, max_orbits) int64, 0 = padding.
        letters: (n, max_orbits) int64, -1 = padding.
        target: (n, max_orbits, 3) parameters of the crystal.
        start: (n, max_orbits, 3) parameters to be near to.

    Returns:
        (n, max_orbits, 3) parameters, zero where not free.
    """
    free = free_mask(space_group, letters)
    weight = SYMMETRY.primitive_multiplicity[space_group[:, None] - 1, letters.clamp(min=0)] * (letters >= 0)
    target = _nearest_image(space_group, elements, letters, target, start, weight)
    for _ in range(_SHIFT_ROUNDS):
        cost, choice = _orbit_costs(space_group, elements, letters, target, start)
        order = _exchange(cost * weight[:, :, None])
        target = choice.gather(2, order[:, :, None, None].expand(-1, -1, -1, 3))[:, :, 0] * free
        target = _shift_origin(space_group, target, start, weight, free)
    return target


def _orbit_costs(
    space_group: Tensor, elements: Tensor, letters: Tensor, target: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the squared distance from start orbit i to target orbit j, and j's parameters that reach it.

    Returns:
        (n, w, w) squared distances, infinite between orbits that cannot trade places, and (n, w, w, 3) parameters.
    """
    n, width = letters.shape
    operations = load_operations()
    same = (elements[:, :, None] == elements[:, None]) & (letters[:, :, None] == letters[:, None])
    same &= (letters >= 0)[:, :, None]
    crystal, i, j = same.nonzero().unbind(dim=1)
    owner, row = same_orbit_rows(space_group[crystal], letters[crystal, j][:, None])
    table = operations.same_orbit[row].to(target.dtype)
    image = (table[..., :3] * target[crystal[owner], j[owner], None]).sum(dim=-1) + table[..., 3] / GRID
    free = free_mask(space_group, letters)[crystal, i]
    away = wrap(image - start[crystal[owner], i[owner]]) * free[owner]
    squared = away.square().sum(dim=-1)
    best = torch.full((len(crystal),), torch.inf, dtype=target.dtype).scatter_reduce(0, owner, squared, "amin")
    is_best = squared == best[owner]
    which = torch.zeros(len(crystal), dtype=torch.int64)
    which[owner[is_best]] = is_best.nonzero().flatten()
    cost = torch.full((n, width, width), torch.inf, dtype=target.dtype)
    cost[crystal, i, j] = best
    choice = torch.zeros(n, width, width, 3, dtype=target.dtype)
    choice[crystal, i, j] = image[which] % 1.0
    return cost, choice


def _exchange(cost: Tensor) -> Tensor:
    """Return (n, w) int64: the target orbit for each start orbit, by exchanging pairs while that lowers the cost.

    Args:
        cost: (n, w, w), finite on the diagonal of occupied columns; padding has no finite entry.
    """
    n, width, _ = cost.shape
    order = torch.arange(width).expand(n, -1).clone()
    if not bool((cost.isfinite().sum(dim=(1, 2)) > cost.diagonal(dim1=1, dim2=2).isfinite().sum(dim=1)).any()):
        return order
    cost = cost.clamp(max=1e6)
    for _ in range(_MOST_EXCHANGES):
        current = cost.gather(2, order[:, None].expand(-1, width, -1))  # start i with the target of start j
        now = current.diagonal(dim1=1, dim2=2)
        gain = now[:, :, None] + now[:, None] - current - current.transpose(1, 2)
        best, place = gain.flatten(1).max(dim=1)
        rows = (best > 1e-9).nonzero().flatten()
        if not len(rows):
            break
        i, j = place[rows] // width, place[rows] % width
        order[rows, i], order[rows, j] = order[rows, j], order[rows, i]
    return order


def _nearest_image(
    space_group: Tensor, elements: Tensor, letters: Tensor, target: Tensor, start: Tensor, weight: Tensor
) -> Tensor:
    """Return each crystal's parameters under the letter-keeping operation of the normaliser nearest to ``start``."""
    group = space_group - 1
    width = int(SYMMETRY.n_alternatives[group].max())
    kept = SYMMETRY.alternative_letters[group, :width].gather(2, letters.clamp(min=0)[:, None].expand(-1, width, -1))
    keeps = ((kept == letters[:, None]) | (letters < 0)[:, None]).all(dim=2)
    keeps &= (SYMMETRY.alternative_axes[group, :width] == torch.arange(3)).all(dim=2)
    keeps &= torch.arange(width) < SYMMETRY.n_alternatives[group][:, None]
    crystal, alternative = keeps.nonzero().unbind(dim=1)
    repeats = torch.bincount(crystal, minlength=len(letters))
    several = (repeats > 1)[crystal]
    crystal, alternative = crystal[several], alternative[several]
    if not len(crystal):
        return target
    image = transform_parameters(space_group[crystal], letters[crystal], target[crystal], alternative)
    cost, _ = _orbit_costs(space_group[crystal], elements[crystal], letters[crystal], image, start[crystal])
    # Each orbit with its nearest partner: a lower bound that needs no assignment.
    nearest = cost.amin(dim=2).clamp(max=1e6)
    total = (nearest * weight[crystal]).sum(dim=1)
    best = torch.full((len(letters),), torch.inf, dtype=total.dtype).scatter_reduce(0, crystal, total, "amin")
    chosen = (total == best[crystal]).nonzero().flatten()
    out = target.clone()
    out[crystal[chosen]] = image[chosen]
    return out


def _shift_origin(space_group: Tensor, target: Tensor, start: Tensor, weight: Tensor, free: Tensor) -> Tensor:
    """Return ``target`` moved along the polar axes to where it is nearest to ``start`` on average."""
    polar = load_operations().polar[space_group - 1]
    away = wrap(target - start) * free
    angle = 2.0 * torch.pi * away
    shares = (weight[:, :, None] * free).to(target.dtype)
    mean = torch.atan2((shares * angle.sin()).sum(dim=1), (shares * angle.cos()).sum(dim=1)) / (2.0 * torch.pi)
    return (target - (mean * polar)[:, None] * free) % 1.0 * free
