"""The network behind the composition-conditioned prior: a set of elements in, space groups and letters out.

A transformer reads the elements of a composition. One head scores space groups. Letters are written orbit by orbit:
a step sees the element that is being placed, the composition, the group, the sum of what is placed and the number of
atoms left; its query is compared with one key per Wyckoff position. Keys share weights through site symmetry,
multiplicity and free coordinates, and so do groups through their lattice and centring.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from envs.assignment import Compositions
from envs.conventions import LATTICE_SYSTEMS, MAX_LETTERS, N_SPACE_GROUPS, POINT_SYMMETRIES
from envs.crystal import MAX_ATOMIC_NUMBER
from envs.lattice import FIXED_ANGLES, IS_FREE, N_COORDINATES
from envs.symmetry import SYMMETRY

MAX_EMBEDDED = 24  # larger counts share one embedding, the logarithm beside it tells them apart
_TABULATED = 64  # counts up to here have packing features of their own
_PACKING_SCALE = 4.0  # brings packing features to the order of one
_PACKING_WIDTH = 16
STABLE, UNSTABLE, UNKNOWN = range(3)  # what is said of a crystal's stability


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the network."""

    n_element_features: int = 63  # of discover.train_composition_prior
    width: int = 160
    n_layers: int = 3
    n_heads: int = 8
    step_width: int = 256
    step_depth: int = 2
    key_width: int = 64
    dropout: float = 0.1
    element_dropout: float = 0.15  # chance that an element is known by its properties only, as unseen ones are


@dataclass(frozen=True)
class Encoded:
    """What the network has read of compositions."""

    elements: Tensor  # (n, k, width)
    summary: Tensor  # (n, width)
    packing: Tensor  # (n, 230, 3) what it takes each space group to hold them

    def select(self, rows: Tensor) -> "Encoded":
        """Return the encodings at ``rows``."""
        return Encoded(self.elements[rows], self.summary[rows], self.packing[rows])


def _group_features() -> Tensor:
    """Return (230, f) float32 lattice system, centring and point symmetry of each group, one-hot."""
    parts = (
        F.one_hot(SYMMETRY.lattice_system, len(LATTICE_SYSTEMS)),
        F.one_hot(SYMMETRY.centring, 5),
        F.one_hot(SYMMETRY.point_symmetry, len(POINT_SYMMETRIES)),
    )
    return torch.cat(parts, dim=1).float()


def _letter_features() -> Tensor:
    """Return (230, 27, f) float32 multiplicities and free coordinates of each position, and the letter's place."""
    primitive = SYMMETRY.primitive_multiplicity.clamp(min=1)
    place = torch.arange(MAX_LETTERS) / SYMMETRY.n_letters[:, None]
    return torch.cat(
        [
            primitive.float().log2()[..., None],
            SYMMETRY.multiplicity.clamp(min=1).float().log2()[..., None],
            F.one_hot(SYMMETRY.n_free_coords.clamp(min=0), 4).float(),
            place[..., None].float(),
        ],
        dim=2,
    )


def _packing_features() -> Tensor:
    """Return (230, 65, 3) float32: what it takes a group to hold so many atoms of one element by themselves.

    The fewest orbits, the fewest free coordinates, and the log of the number of ways; 0 where the group cannot.
    """
    size = _TABULATED + 1
    table = np.zeros((N_SPACE_GROUPS, size, 3))
    multiplicity, n_free = SYMMETRY.primitive_multiplicity.numpy(), SYMMETRY.n_free_coords.numpy()
    for g in range(N_SPACE_GROUPS):
        orbits, free, ways = np.full(size, np.inf), np.full(size, np.inf), np.zeros(size)
        orbits[0], free[0], ways[0] = 0.0, 0.0, 1.0
        for m, dof in zip(multiplicity[g], n_free[g], strict=True):
            if not 0 < m < size:
                continue
            counts = range(size - 1, m - 1, -1) if dof == 0 else range(m, size)  # downwards: the position is used once
            for count in counts:
                orbits[count] = min(orbits[count], orbits[count - m] + 1)
                free[count] = min(free[count], free[count - m] + dof)
                ways[count] += ways[count - m]
        held = ways > 0
        table[g, held] = np.stack([orbits[held], free[held], np.log(ways[held])], axis=1)
    return torch.from_numpy(table / _PACKING_SCALE).float()


class _Residual(nn.Module):
    """One residual block: layer norm, two linear maps, dropout."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (..., width)."""
        return hidden + self.layers(hidden)


class CompositionNetwork(nn.Module):
    """Scores space groups and letters given a composition; masks are the caller's business.

    Four tables are saved with the weights: ``element_features``, ``seen`` (119,), True for the elements that the
    network was trained on, and the mean and spread (8, 6) of the lattice coordinates of each lattice system.

    Args:
        config: Sizes.
        element_features: (119, n_element_features) float32 properties of the elements; None leaves them to the weights.
    """

    element_features: Tensor
    seen: Tensor
    lattice_mean: Tensor
    lattice_spread: Tensor
    group_features: Tensor
    letter_features: Tensor
    site_symmetry: Tensor
    packing: Tensor
    multiplicity: Tensor

    def __init__(self, config: NetworkConfig, element_features: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.width
        if element_features is None:
            element_features = torch.zeros(MAX_ATOMIC_NUMBER + 1, config.n_element_features)
        self.register_buffer("element_features", element_features.float())
        self.register_buffer("seen", torch.zeros(MAX_ATOMIC_NUMBER + 1, dtype=torch.bool))
        self.register_buffer("lattice_mean", torch.cat([FIXED_ANGLES, torch.zeros_like(FIXED_ANGLES)], dim=1).float())
        self.register_buffer("lattice_spread", IS_FREE.float())
        self.register_buffer("group_features", _group_features(), persistent=False)
        self.register_buffer("letter_features", _letter_features(), persistent=False)
        self.register_buffer("site_symmetry", SYMMETRY.site_symmetry, persistent=False)

        self.element = nn.Embedding(MAX_ATOMIC_NUMBER + 1, width)
        self.properties = nn.Sequential(nn.Linear(config.n_element_features, width), nn.GELU(), nn.Linear(width, width))
        self.count = nn.Embedding(MAX_EMBEDDED + 1, width)
        self.amount = nn.Linear(2, width)
        self.n_atoms = nn.Embedding(MAX_EMBEDDED + 1, width)
        self.n_units = nn.Embedding(MAX_EMBEDDED + 1, width)
        self.stability = nn.Embedding(3, width)
        layer = nn.TransformerEncoderLayer(
            width, config.n_heads, 4 * width, config.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, config.n_layers, nn.LayerNorm(width), enable_nested_tensor=False)

        self.group = nn.Embedding(N_SPACE_GROUPS, width)
        self.group_shared = nn.Linear(self.group_features.shape[1], width)
        self.group_query = nn.Sequential(_Residual(width, config.dropout), nn.LayerNorm(width), nn.Linear(width, width))
        self.register_buffer("packing", _packing_features(), persistent=False)
        self.register_buffer("multiplicity", SYMMETRY.primitive_multiplicity, persistent=False)
        self.packing_value = nn.Sequential(nn.Linear(self.packing.shape[2], _PACKING_WIDTH), nn.GELU())
        self.packing_query = nn.Linear(width, _PACKING_WIDTH)
        self.group_bias = nn.Parameter(torch.zeros(N_SPACE_GROUPS))

        self.site = nn.Embedding(len(SYMMETRY.site_symmetry_names), width)
        self.position = nn.Embedding(N_SPACE_GROUPS * MAX_LETTERS, width)
        self.position_shared = nn.Linear(self.letter_features.shape[2], width)
        self.placed = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width))
        self.left = nn.Embedding(MAX_EMBEDDED + 1, width)
        self.step_in = nn.Linear(6 * width, config.step_width)
        self.step = nn.Sequential(
            *(_Residual(config.step_width, config.dropout) for _ in range(config.step_depth)),
            nn.LayerNorm(config.step_width),
            nn.Linear(config.step_width, config.key_width),
        )
        self.key = nn.Linear(width, config.key_width)
        self.left_after = nn.Linear(config.key_width, MAX_EMBEDDED + 1, bias=False)
        self.position_bias = nn.Embedding(N_SPACE_GROUPS * MAX_LETTERS, 1)
        self.lattice = nn.Sequential(
            nn.Linear(3 * width, config.step_width),
            _Residual(config.step_width, config.dropout),
            nn.LayerNorm(config.step_width),
            nn.Linear(config.step_width, N_COORDINATES),
        )
        self._start_small()

    def _start_small(self) -> None:
        """Let embeddings begin small beside what is shared, and scores near zero."""
        for name in ("element", "group", "site", "position", "count", "n_atoms", "n_units", "stability", "left"):
            nn.init.normal_(getattr(self, name).weight, std=0.1)
        nn.init.zeros_(self.position_bias.weight)

    def encode(self, compositions: Compositions, stability: Tensor) -> Encoded:
        """Read compositions.

        Args:
            compositions: n of them, of up to k elements.
            stability: (n,) int64, one of ``STABLE``, ``UNSTABLE``, ``UNKNOWN``.
        """
        elements, counts = compositions.elements, compositions.counts
        n_atoms = counts.sum(dim=1)
        units = counts[:, 0]
        for column in counts.unbind(dim=1):
            units = torch.gcd(units, column)
        identity = self.element(elements) * self.seen[elements][..., None]
        if self.training:
            keep = torch.rand_like(identity[..., :1]) >= self.config.element_dropout
            identity = identity * keep
        fraction = counts / n_atoms[:, None]
        amount = torch.stack([fraction, counts.clamp(min=1).float().log()], dim=-1)
        tokens = identity + self.properties(self.element_features[elements]) + self.amount(amount)
        tokens = tokens + self.count(counts.clamp(max=MAX_EMBEDDED))
        whole = self.n_atoms(n_atoms.clamp(max=MAX_EMBEDDED)) + self.n_units(units.clamp(max=MAX_EMBEDDED))
        whole = whole + self.stability(stability)
        padding = F.pad(counts == 0, (1, 0))
        hidden = self.encoder(torch.cat([whole[:, None], tokens], dim=1), src_key_padding_mask=padding)
        packing = self.packing[:, counts.clamp(max=_TABULATED)].sum(dim=2).transpose(0, 1)
        return Encoded(hidden[:, 1:], hidden[:, 0], packing)

    def group_vectors(self) -> Tensor:
        """Return (230, width) what the network knows of each space group."""
        return self.group.weight + self.group_shared(self.group_features)

    def group_scores(self, encoded: Encoded) -> Tensor:
        """Return (n, 230) scores of space groups."""
        query = self.group_query(encoded.summary)
        scores = query @ self.group_vectors().T * self.config.width**-0.5 + self.group_bias
        packing = self.packing_value(encoded.packing) @ self.packing_query(encoded.summary)[..., None]
        return scores + packing[..., 0]

    def position_vectors(self) -> Tensor:
        """Return (230, 27, width) what the network knows of each Wyckoff position."""
        shared = self.site(self.site_symmetry) + self.position_shared(self.letter_features)
        return self.position.weight.view(N_SPACE_GROUPS, MAX_LETTERS, -1) + shared

    def place(self, element: Tensor, position: Tensor) -> Tensor:
        """Return (m, width) contribution of orbits to the sum of what is placed.

        Args:
            element: (m, width) encoded element of each orbit.
            position: (m, width) vector of its Wyckoff position.
        """
        return self.placed(torch.cat([element, position], dim=-1))

    def letter_queries(
        self, element: Tensor, summary: Tensor, group: Tensor, placed: Tensor, own: Tensor, n_left: Tensor
    ) -> Tensor:
        """Return (m, key_width) queries of the next letter.

        Args:
            element: (m, width) encoded element that is being placed.
            summary: (m, width) encoded composition.
            group: (m, width) vector of the space group.
            placed: (m, width) sum over the orbits placed so far.
            own: (m, width) the part of that sum that belongs to the same element.
            n_left: (m,) int64 atoms of the element still to place.
        """
        left = self.left(n_left.clamp(0, MAX_EMBEDDED))  # below 0 where more was placed than there is
        return self.step(self.step_in(torch.cat([element, summary, group, placed, own, left], dim=-1)))

    def letter_scores(self, queries: Tensor, keys: Tensor, group: Tensor, n_left: Tensor) -> Tensor:
        """Return (m, 27) scores of the letters of ``group`` (m,) index, with ``keys`` (230, 27, key_width).

        A letter is scored by its key and by the number of atoms that it leaves of ``n_left`` (m,).
        """
        bias = self.position_bias.weight.view(N_SPACE_GROUPS, MAX_LETTERS)
        scores = torch.einsum("mk,mlk->ml", queries, keys[group]) * self.config.key_width**-0.5
        leaves = (n_left[:, None] - self.multiplicity[group]).clamp(0, MAX_EMBEDDED)
        return scores + bias[group] + self.left_after(queries).gather(1, leaves)

    def lattice_coordinates(self, summary: Tensor, group: Tensor, placed: Tensor) -> Tensor:
        """Return (m, 6) standardised lattice coordinates from composition, group and everything placed."""
        return self.lattice(torch.cat([summary, group, placed], dim=-1))
