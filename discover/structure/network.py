"""The velocity network: a transformer over orbits whose attention sees periodic distances.

One token an orbit and one for the cell. Sums of radial functions over all periodic images bias the attention and enter
its values (a periodic-distance bias, as in Crystalite, arXiv:2604.02270); the velocity of the free parameters has a
direct part and one that is a sum of pair forces pulled back to the Wyckoff position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from discover.structure.geometry import N_RADIAL, act, pair_features
from discover.structure.orbit_batch import Frame
from envs.conventions import LATTICE_SYSTEMS, N_SPACE_GROUPS
from envs.lattice import N_COORDINATES, lattice_matrix
from envs.symmetry import SYMMETRY

_PARAMETER_WAVES, _POSITION_WAVES, _CLOCK_WAVES = 3, 3, 8


@dataclass(frozen=True)
class FlowConfig:
    """Sizes of the network."""

    width: int = 128
    n_layers: int = 4
    n_heads: int = 8
    pair_width: int = 32
    expansion: int = 2
    pair_force: bool = True
    n_descriptors: int = 24
    dropout: float = 0.0  # of what each layer adds, while training


class OrbitFormer(nn.Module):
    """Velocity of free Wyckoff parameters and of normalised lattice coordinates."""

    descriptors: Tensor

    def __init__(self, config: FlowConfig, descriptors: Tensor | None = None) -> None:
        """Set up the network.

        Args:
            config: Sizes.
            descriptors: (119, n_descriptors) properties of the elements; they are saved with the weights.
        """
        super().__init__()
        self.config = config
        width = config.width
        table = torch.zeros(119, config.n_descriptors) if descriptors is None else descriptors
        self.register_buffer("descriptors", table)
        self.element = nn.Embedding(119, width)
        self.site = nn.Embedding(len(SYMMETRY.site_symmetry_names), width)
        self.group = nn.Embedding(N_SPACE_GROUPS + 1, width)
        self.system = nn.Embedding(len(LATTICE_SYSTEMS), width)
        for embedding in (self.element, self.site, self.group, self.system):
            nn.init.normal_(embedding.weight, std=0.3)
        n_static = config.n_descriptors + 1 + 3 + 12
        n_moving = 2 * 3 * _PARAMETER_WAVES + 2 * 3 * _POSITION_WAVES
        self.static = nn.Linear(n_static, width)
        self.moving = nn.Linear(n_moving, width)
        self.cell = nn.Linear(2 * N_COORDINATES, width)
        self.clock = nn.Sequential(nn.Linear(4 * _CLOCK_WAVES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.pair = nn.Sequential(
            nn.Linear(N_RADIAL, config.pair_width),
            nn.SiLU(),
            nn.Linear(config.pair_width, config.pair_width),
            nn.SiLU(),
        )
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.parameter_head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 3))
        self.cell_head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, N_COORDINATES))
        self.force_receiver = nn.Linear(width, config.pair_width)
        self.force_sender = nn.Linear(width, config.pair_width)
        self.force_head = nn.Linear(config.pair_width, N_RADIAL)
        for head in (self.parameter_head, self.cell_head, self.force_head):
            for value in list(head.parameters())[-2:]:  # weight and bias of the last layer: start at rest
                nn.init.zeros_(value)

    def forward(
        self, frame: Frame, parameters: Tensor, lattice: Tensor, cell: Tensor, clocks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the velocities at one instant.

        Args:
            frame: The batch.
            parameters: (n, w, 3) free parameters now.
            lattice: (n, 6) normalised lattice coordinates now.
            cell: (n, 6) the same as lengths in Å and angles in degrees.
            clocks: (n, 2) times in [0, 1] of the parameters and of the lattice.

        Returns:
            (n, w, 3) velocity of the parameters, zero where not free, and (n, 6) of the lattice coordinates.
        """
        radial, forces = pair_features(frame, parameters, lattice_matrix(cell))
        pair = self.pair(torch.log1p(radial))
        hidden = self._embed(frame, parameters, lattice, cell)
        state = self.clock(_waves(clocks, _CLOCK_WAVES, periodic=False))
        is_token = functional.pad(frame.is_orbit, (1, 0), value=True)
        for layer in self.layers:
            hidden = layer(hidden, pair, state, is_token)
        hidden = self.norm(hidden)
        orbits = hidden[:, 1:]
        velocity = self.parameter_head(orbits)
        if self.config.pair_force:
            mixed = self.force_receiver(orbits)[:, :, None] + self.force_sender(orbits)[:, None] + pair
            velocity = velocity + torch.einsum("nijk,nijkd->nid", self.force_head(functional.silu(mixed)), forces)
        return velocity * frame.is_free, self.cell_head(hidden[:, 0])

    def _embed(self, frame: Frame, parameters: Tensor, lattice: Tensor, cell: Tensor) -> Tensor:
        operation = frame.first_operation
        position = act(operation, parameters)
        static = [
            self.descriptors[frame.elements],
            frame.multiplicity[..., None].float().clamp(min=1).log(),
            frame.is_free.float(),
            operation.flatten(2),
        ]
        free_waves = _waves(parameters, _PARAMETER_WAVES) * frame.is_free.repeat(1, 1, 2 * _PARAMETER_WAVES)
        moving = torch.cat([free_waves, _waves(position, _POSITION_WAVES)], dim=-1)
        orbits = self.element(frame.elements) + self.site(frame.site_symmetry)
        orbits = orbits + self.static(torch.cat(static, dim=-1)) + self.moving(moving)
        group = self.group(frame.space_group)
        share = frame.multiplicity.float() / frame.multiplicity.sum(dim=1, keepdim=True).clamp(min=1)
        composition = torch.einsum("nw,nwd->nd", share, self.element(frame.elements))
        sizes = torch.cat([cell[:, :3].log(), cell[:, 3:] / 90.0], dim=1)
        whole = self.cell(torch.cat([lattice, sizes], dim=1)) + composition + self.system(frame.lattice_system) + group
        return torch.cat([whole[:, None], orbits + group[:, None]], dim=1)


class _Layer(nn.Module):
    """Attention with a pair bias, then a perceptron, both modulated by the clocks."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        width, self.n_heads = config.width, config.n_heads
        self.drop = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.bias = nn.Linear(config.pair_width, config.n_heads, bias=False)
        self.pair_value = nn.Linear(config.pair_width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, config.expansion * width)
        self.down = nn.Linear(config.expansion * width, width)

    def forward(self, hidden: Tensor, pair: Tensor, state: Tensor, is_token: Tensor) -> Tensor:
        """Return the next hidden state (n, 1 + w, width); the first token is the cell."""
        scale_a, shift_a, gate_a, scale_b, shift_b, gate_b = self.modulation(state)[:, None].chunk(6, dim=-1)
        x = self.norm(hidden) * (1.0 + scale_a) + shift_a
        hidden = hidden + (1.0 + gate_a) * self.drop(self._attend(x, pair, is_token))
        x = self.norm(hidden) * (1.0 + scale_b) + shift_b
        return hidden + (1.0 + gate_b) * self.drop(self.down(functional.silu(self.up(x))))

    def _attend(self, x: Tensor, pair: Tensor, is_token: Tensor) -> Tensor:
        n, tokens, width = x.shape
        heads = self.n_heads
        q, k, v = self.qkv(x).reshape(n, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(2, 3) * (width // heads) ** -0.5
        scores = scores + functional.pad(self.bias(pair).permute(0, 3, 1, 2), (1, 0, 1, 0))
        weights = scores.masked_fill(~is_token[:, None, None], -torch.inf).softmax(dim=-1)
        values = self.pair_value(pair).reshape(n, tokens - 1, tokens - 1, heads, width // heads)
        seen = torch.einsum("nhij,nijhc->nhic", weights[:, :, 1:, 1:], values)
        mixed = weights @ v + functional.pad(seen, (0, 0, 1, 0))
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, width))


def _waves(x: Tensor, n_waves: int, *, periodic: bool = True) -> Tensor:
    """Return sines and cosines of the last dimension at whole (or, not periodic, half) multiples of one turn."""
    turns = torch.arange(1, n_waves + 1, device=x.device) * (2.0 * torch.pi if periodic else torch.pi)
    angles = (x[..., None, :] * turns[:, None]).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
