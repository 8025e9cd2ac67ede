"""The network of the learned proxies: a small transformer over the orbits of a crystal, without coordinates.

Tokens are orbits (method of Wren, Goodall et al. 2022, arXiv:2106.11132, with attention as in Wrenformer); letters
that a normaliser makes equivalent are averaged by augmentation in training. One network predicts formation energy,
energy above hull and band gap, each with the scale of its own error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from proxies.features import N_POSITIONS, N_SLOTS, Features, n_crystal_features, position_table

N_OUTPUTS = 7  # mean and log scale of formation energy, energy above hull, gap of non-metals; logit of "metal"


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Size of one member."""

    width: int = 80
    n_blocks: int = 2
    n_query: int = 16
    expansion: int = 2
    position_rank: int = 24
    head_width: int = 128
    dropout: float = 0.0


class Block(nn.Module):
    """Attention between the orbits of a crystal, then a two-layer perceptron on each; both residual.

    One head and no biases: with four orbits a crystal, copies cost more than arithmetic.
    """

    def __init__(self, config: NetworkConfig) -> None:
        """Build the layers."""
        super().__init__()
        width, hidden = config.width, config.width * config.expansion
        self.n_query = config.n_query
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 2 * config.n_query + width, bias=False)
        self.mix = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, log_fractions: Tensor) -> Tensor:
        """Return (n, k, width) tokens; attention weighs an orbit by its share of atoms (-inf = padding)."""
        mixed = self.query_key_value(self.norm_attention(tokens))
        query, key, value = mixed.split((self.n_query, self.n_query, tokens.shape[-1]), dim=-1)
        logits = query @ key.transpose(-1, -2) * self.n_query**-0.5 + log_fractions[:, None, :]
        tokens = tokens + self.dropout(self.mix(logits.softmax(dim=-1) @ value))
        hidden = functional.silu(self.up(self.norm_mlp(tokens)))
        return torch.add(tokens, self.dropout(self.down(hidden)))


class OrbitNetwork(nn.Module):
    """One member of the ensemble."""

    properties: Tensor
    log_volumes: Tensor
    position_facts: Tensor
    crystal_mean: Tensor
    crystal_scale: Tensor

    def __init__(self, config: NetworkConfig, properties: Tensor, log_volumes: Tensor) -> None:
        """Build the layers.

        Args:
            config: Size.
            properties: (119, n_properties) float32 z-scored elemental properties.
            log_volumes: (119,) float32 log of the elemental volumes in Å³/atom.
        """
        super().__init__()
        width, n_crystal = config.width, n_crystal_features(properties.shape[1])
        self.config = config
        self.register_buffer("properties", properties.clone())
        self.register_buffer("log_volumes", log_volumes.clone())
        self.register_buffer("position_facts", position_table(), persistent=False)
        self.register_buffer("crystal_mean", torch.zeros(n_crystal))
        self.register_buffer("crystal_scale", torch.ones(n_crystal))
        self.element_embedding = nn.Embedding(119, width)
        self.element_facts = nn.Linear(properties.shape[1], width)
        self.position_embedding = nn.Embedding(N_POSITIONS, config.position_rank)
        self.position_mix = nn.Linear(config.position_rank + self.position_facts.shape[1], width)
        self.fraction_mix = nn.Linear(2, width)
        self.crystal_mix = nn.Sequential(
            nn.Linear(n_crystal + config.position_rank, config.head_width),
            nn.SiLU(),
            nn.Linear(config.head_width, width),
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(
            nn.Linear(3 * width, config.head_width),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.head_width, config.head_width),
            nn.SiLU(),
            nn.Linear(config.head_width, N_OUTPUTS),
        )
        nn.init.normal_(self.element_embedding.weight, std=0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.1)

    def element_table(self) -> Tensor:
        """Return (119, width) the token part that an element contributes."""
        return torch.add(self.element_embedding.weight, self.element_facts(self.properties))

    def position_table(self, positions: Tensor | None = None) -> Tensor:
        """Return (k, width) the token part that each of (k,) Wyckoff positions contributes, all by default."""
        learned, facts = self.position_embedding.weight, self.position_facts
        if positions is not None:
            learned, facts = self.position_embedding(positions), facts[positions]
        table: Tensor = self.position_mix(torch.cat([learned, facts], dim=-1))
        return table

    def forward(self, features: Features) -> Tensor:
        """Return (n, N_OUTPUTS) raw outputs."""
        return self.outputs(features, self.element_table(), self.position_table())

    def outputs(self, features: Features, element_table: Tensor, position_table: Tensor) -> Tensor:
        """Return (n, N_OUTPUTS) raw outputs, from tables that inference computes once."""
        group = self.position_embedding(features.space_group * N_SLOTS)
        crystal = self.crystal_mix(
            torch.cat([(features.crystal - self.crystal_mean) / self.crystal_scale, group], dim=-1)
        )
        weights = features.fractions[..., None]
        log_fractions = features.fractions.log()
        tokens = functional.embedding(features.elements, element_table)
        tokens = tokens + functional.embedding(features.positions, position_table)
        tokens = tokens + self.fraction_mix(torch.cat([weights, log_fractions.clamp(min=-5.0)[..., None]], dim=-1))
        tokens = tokens + crystal[:, None]
        for block in self.blocks:
            tokens = block(tokens, log_fractions)
        tokens = self.norm(tokens)
        mean = (tokens * weights).sum(dim=1)
        largest = tokens.masked_fill(weights == 0, -torch.inf).amax(dim=1)
        outputs: Tensor = self.head(torch.cat([mean, largest, crystal], dim=-1))
        return outputs
