"""Periodic distances between orbits: the geometry that the flow network sees.

For the first atom of an orbit and every atom of the primitive cell of another, all periodic images within a cut-off
are expanded in radial functions. Summed over images this says how far the orbits are; weighted by directions and pulled
back to the free parameters it is a basis of pair forces, which site symmetry keeps in the Wyckoff position.
"""

import torch
from torch import Tensor

from discover.structure.orbit_batch import Frame

CUTOFF = 6.0  # Å
N_RADIAL = 16
_SWEEPS = 4
_SHIFTS = torch.cartesian_prod(*[torch.arange(-1.0, 2.0)] * 3)  # (27, 3)
_HOME = 13
_PAIRS = ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1))
_CLOSEST = 0.05  # Å, below which a direction means nothing


def reduce_basis(basis: Tensor, matrix: Tensor) -> Tensor:
    """Return the edges of the same lattice with short, nearly orthogonal vectors.

    Args:
        basis: (n, 3, 3) edges in fractional coordinates.
        matrix: (n, 3, 3) lattice vectors as rows in Å.

    Returns:
        (n, 3, 3) edges in fractional coordinates; whole-number combinations of ``basis``, reduced pair by pair.
    """
    rows = list(basis.unbind(dim=1))
    for _ in range(_SWEEPS):
        for i, j in _PAIRS:
            v_i, v_j = (rows[i][:, None] @ matrix)[:, 0], (rows[j][:, None] @ matrix)[:, 0]
            steps = ((v_i * v_j).sum(dim=1) / v_i.square().sum(dim=1).clamp(min=1e-6)).round()
            rows[j] = rows[j] - steps[:, None] * rows[i]
    return torch.stack(rows, dim=1)


def atom_positions(frame: Frame, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Return first atoms of the orbits (n, w, 3) and atoms of the primitive cells (n, m, 3), fractional."""
    owner = parameters.gather(1, frame.atom_orbit[:, :, None].expand(-1, -1, 3))
    first = act(frame.first_operation, parameters)
    return first, act(frame.atom_operation, owner)


def pull_back(frame: Frame, matrix: Tensor) -> Tensor:
    """Return (n, w, 3, 3): takes a Cartesian displacement in Å of a first atom to the change of its parameters.

    It is the least-squares inverse (J^T J)^-1 J^T of J = dx/du; rows of parameters that are not free are zero.
    """
    jacobian = matrix.transpose(1, 2)[:, None] @ frame.first_operation[..., :3]
    fixed = torch.diag_embed((~frame.is_free).to(matrix.dtype))
    gram = jacobian.transpose(2, 3) @ jacobian + fixed
    return torch.linalg.inv(gram) @ jacobian.transpose(2, 3) * frame.is_free[..., None]


def neighbours(
    frame: Frame, parameters: Tensor, matrix: Tensor, cutoff: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return every atom image within a cut-off of the first atom of every orbit.

    Images are looked for in the 27 cells around the nearest one of a reduced cell, which misses none within the
    shortest edge, and few within the cut-off.

    Args:
        frame: The batch.
        parameters: (n, w, 3) free parameters.
        matrix: (n, 3, 3) lattice vectors as rows in Å.
        cutoff: Å.

    Returns:
        (e,) crystal, orbit and atom of each neighbour, and (e, 3) the Cartesian vector to it in Å.
    """
    width = frame.elements.shape[1]
    first, atoms = atom_positions(frame, parameters)
    basis = reduce_basis(frame.primitive, matrix)
    inverse = torch.linalg.inv(basis)
    away = (atoms[:, None] - first[:, :, None]) @ inverse[:, None]  # (n, w, m, 3) in reduced cells
    edges = basis @ matrix
    cartesian = (away - away.round()) @ edges[:, None]
    shifts = _SHIFTS.to(edges.device) @ edges  # (n, 27, 3)
    # |x + s|² without the (n, w, m, 27, 3) table: x² + 2 x.s + s²
    squared = (
        cartesian.square().sum(dim=-1, keepdim=True)
        + 2.0 * cartesian @ shifts.transpose(1, 2)[:, None]
        + shifts.square().sum(dim=-1)[:, None, None]
    )
    valid = frame.is_orbit[:, :, None] & frame.is_atom[:, None]
    squared = squared.masked_fill(~valid[..., None], torch.inf)
    column = torch.arange(width, device=edges.device)
    itself = frame.is_first[:, None] & (frame.atom_orbit[:, None] == column[None, :, None])
    squared[..., _HOME].masked_fill_(itself, torch.inf)
    crystal, i, atom, image = (squared < cutoff**2).nonzero().unbind(dim=1)
    return crystal, i, atom, cartesian[crystal, i, atom] + shifts[crystal, image]


@torch.no_grad()
def pair_features(frame: Frame, parameters: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return radial and force features of every pair of orbits.

    Args:
        frame: The batch.
        parameters: (n, w, 3) free parameters.
        matrix: (n, 3, 3) lattice vectors as rows in Å.

    Returns:
        (n, w, w, N_RADIAL) sums of radial functions over atoms and images of orbit j around the first atom of orbit i,
        and (n, w, w, N_RADIAL, 3) the same weighted by the direction from j to i, as changes of i's parameters.
    """
    n, width = frame.elements.shape
    crystal, i, atom, vector = neighbours(frame, parameters, matrix, CUTOFF)
    length = vector.norm(dim=-1).clamp(min=_CLOSEST)
    radial = radial_basis(length)
    pair = (crystal * width + i) * width + frame.atom_orbit[crystal, atom]
    scalars = radial.new_zeros(n * width * width, N_RADIAL).index_add_(0, pair, radial)
    directed = radial[:, :, None] * (-vector / length[:, None])[:, None]
    forces = radial.new_zeros(n * width * width, N_RADIAL * 3).index_add_(0, pair, directed.flatten(1))
    forces = forces.reshape(n, width, width * N_RADIAL, 3) @ pull_back(frame, matrix).transpose(2, 3)
    shape = (n, width, width, N_RADIAL)
    return scalars.reshape(shape), forces.reshape(*shape, 3)


@torch.no_grad()
def contacts(frame: Frame, parameters: Tensor, matrix: Tensor, radii: Tensor, wanted: float) -> tuple[Tensor, Tensor]:
    """Return how close atoms come, and the step that takes overlapping ones apart.

    Args:
        frame: The batch.
        parameters: (n, w, 3) free parameters.
        matrix: (n, 3, 3) lattice vectors as rows in Å.
        radii: (119,) radius of each element in Å.
        wanted: Shortest distance asked for, as a multiple of the sum of radii.

    Returns:
        (n,) shortest distance over the sum of radii (infinite where no atom is near), and (n, w, 3) the change of the
        parameters that makes up half of what is missing to every distance that is too short.
    """
    n, width = frame.elements.shape
    reach = 2.0 * float(radii[frame.elements].max()) * max(wanted, 1.0)
    crystal, i, atom, vector = neighbours(frame, parameters, matrix, reach)
    length = vector.norm(dim=-1)
    other = frame.elements[crystal, frame.atom_orbit[crystal, atom]]
    contact = radii[frame.elements[crystal, i]] + radii[other]
    ratio = length.new_full((n,), torch.inf).scatter_reduce(0, crystal, length / contact, "amin")
    missing = 0.5 * (wanted * contact - length).clamp(min=0.0)
    push = -vector / length.clamp(min=_CLOSEST)[:, None] * missing[:, None]
    force = push.new_zeros(n * width, 3).index_add_(0, crystal * width + i, push).reshape(n, width, 3)
    return ratio, (pull_back(frame, matrix) @ force[..., None])[..., 0]


def radial_basis(length: Tensor) -> Tensor:
    """Return (n, N_RADIAL) Gaussians on (n,) distances in Å that fade out at the cut-off."""
    centres = torch.linspace(0.4, CUTOFF - 0.4, N_RADIAL, device=length.device)
    spacing = float(centres[1] - centres[0])
    fade = 0.5 * (torch.cos(torch.pi * length / CUTOFF) + 1.0)
    return torch.exp(-0.5 * ((length[:, None] - centres) / spacing).square()) * fade[:, None]


def act(operation: Tensor, parameters: Tensor) -> Tensor:
    """Return A u + b of operations (..., 3, 4) and parameters (..., 3); a sum is faster here than small products."""
    return (operation[..., :3] * parameters[..., None, :]).sum(dim=-1) + operation[..., 3]
