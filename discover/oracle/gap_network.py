"""What CHGNet sees of a crystal, and the small network that reads a band gap from it.

CHGNet is a potential, trained on energies, forces, stresses and magnetic moments, never on gaps. Its features of the
atoms (after each of three interaction blocks, and those that its energy is read from) describe their surroundings, so
that a head of a tenth of a million weights on them learns what a network from scratch needs many more crystals for.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pymatgen.core import Structure
from torch import Tensor, nn

from discover.oracle.relax import VOLUME_RANGE, chgnet_model, primitive_cell
from proxies.elements import element_properties
from proxies.networks import Block, NetworkConfig

N_FEATURES = 256  # of an atom: four times the 64 of CHGNet
N_OUTPUTS = 3  # gap of a non-metal in eV, log of its scale, logit of "metal"
_CLIP = 10.0  # standard deviations; atoms far from anything trained on stay within what the network can read
_LOG_VOLUME = 3.0  # about the mean of log(Å³/atom)
_SMALLEST_SHARE = 0.01
_MAX_CHGNET_ELEMENT = 94
_MIN_LOG_SCALE, _MAX_LOG_SCALE = -6.0, 2.0


class BandGapError(ValueError):
    """A structure whose gap cannot be predicted, a model that cannot be read, or data that cannot train one."""


@dataclass(frozen=True)
class Atoms:
    """The atoms of one crystal as CHGNet sees them."""

    numbers: NDArray[np.int64]  # (n_atoms,)
    features: NDArray[np.float32]  # (n_atoms, N_FEATURES)
    weights: NDArray[np.float32]  # (n_atoms,) share in the crystal; sums to 1
    log_volume: float  # log of Å³/atom


@dataclass(frozen=True)
class AtomBatch:
    """Atoms of n crystals, padded to k a crystal with number 0 and weight 0."""

    numbers: Tensor  # (n, k) int64
    features: Tensor  # (n, k, N_FEATURES) float32
    weights: Tensor  # (n, k) float32
    log_volume: Tensor  # (n,) float32


def describe(structure: Structure) -> Atoms:
    """Return the atoms of the primitive cell as CHGNet sees them.

    Raises:
        BandGapError: If CHGNet cannot see the structure: an atom without neighbours within 6 Å, partial occupancies,
            numbers that are not finite, an element beyond plutonium, a cell that has collapsed or flown apart.
    """
    if len(structure) == 0:
        raise BandGapError("a structure without atoms has no band gap")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # spglib and CHGNet comment on odd cells; we raise
            cell = primitive_cell(structure)
            numbers = np.array([site.specie.Z for site in cell], dtype=np.int64)
            volume = cell.volume / len(cell)
            _check(int(numbers.max()), volume)
            features = _features(chgnet_model(), cell)
    except BandGapError:
        raise
    except Exception as error:  # spglib, pymatgen and CHGNet raise many kinds
        raise BandGapError(str(error) or type(error).__name__) from error
    if not np.isfinite(features).all():
        raise BandGapError("CHGNet gave no finite features; are atoms on top of each other?")
    weights = np.full(len(cell), 1.0 / len(cell), dtype=np.float32)
    return Atoms(numbers, features, weights, float(np.log(volume)))


def collate(atoms: Sequence[Atoms]) -> AtomBatch:
    """Return one padded batch."""
    width = max(len(item.numbers) for item in atoms)
    numbers = torch.zeros(len(atoms), width, dtype=torch.int64)
    features = torch.zeros(len(atoms), width, N_FEATURES)
    weights = torch.zeros(len(atoms), width)
    for k, item in enumerate(atoms):
        n = len(item.numbers)
        numbers[k, :n] = torch.from_numpy(item.numbers)
        features[k, :n] = torch.from_numpy(item.features)
        weights[k, :n] = torch.from_numpy(item.weights)
    return AtomBatch(numbers, features, weights, torch.tensor([item.log_volume for item in atoms]))


def _check(largest_number: int, volume_per_atom: float) -> None:
    """Refuse what CHGNet answers without having seen the like.

    Raises:
        BandGapError: Saying what is wrong.
    """
    low, high = VOLUME_RANGE
    if not low <= volume_per_atom <= high:
        raise BandGapError(f"{volume_per_atom:.3g} Å³ per atom, outside {low:g} to {high:g}")
    if largest_number > _MAX_CHGNET_ELEMENT:
        raise BandGapError(f"CHGNet knows the elements up to plutonium, not number {largest_number}")


def clamp_log_scale(log_scale: Tensor) -> Tensor:
    """Return the log scales that are used: between 2.5 meV and 7.4 eV."""
    return log_scale.clamp(_MIN_LOG_SCALE, _MAX_LOG_SCALE)


@torch.no_grad()
def _features(model: Any, structure: Structure) -> NDArray[np.float32]:
    """Return (n_atoms, N_FEATURES): outputs of the first three atom convolutions and of the norm before the readout."""
    seen: list[Tensor] = []
    layers = [*model.atom_conv_layers[:-1], model.readout_norm]
    hooks = [layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output)) for layer in layers]
    try:
        model([model.graph_converter(structure)], task="e")
    finally:
        for hook in hooks:
            hook.remove()
    return np.asarray(torch.cat(seen, dim=1).numpy(), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class GapNetworkConfig:
    """Size of one member."""

    width: int = 96
    n_blocks: int = 2
    head_width: int = 192
    dropout: float = 0.05
    feature_dropout: float = 0.1

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            BandGapError: If a size makes no network.
        """
        if min(self.width, self.n_blocks, self.head_width) < 1:
            raise BandGapError("width, n_blocks and head_width must be at least 1")
        if not (0.0 <= self.dropout < 1.0 and 0.0 <= self.feature_dropout < 1.0):
            raise BandGapError("dropout and feature_dropout must lie in [0, 1)")


class GapNetwork(nn.Module):
    """A transformer over atoms: CHGNet's features, the element, and statistics of the whole crystal.

    Gaps belong to the extremes of the electronic levels, so atoms are pooled by mean, largest and smallest. An atom
    counts by its weight, so equal atoms may be given once, and a supercell equals its primitive cell.
    """

    properties: Tensor
    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: GapNetworkConfig) -> None:
        """Build the layers; inputs are taken as standardised until `feature_mean` and `feature_scale` are set."""
        super().__init__()
        properties = torch.from_numpy(element_properties())
        width, hidden, n_properties = config.width, config.head_width, properties.shape[1]
        self.config = config
        self.register_buffer("properties", properties.clone())
        self.register_buffer("feature_mean", torch.zeros(N_FEATURES))
        self.register_buffer("feature_scale", torch.ones(N_FEATURES))
        self.element_embedding = nn.Embedding(len(properties), width)
        self.element_facts = nn.Linear(n_properties, width)
        self.feature_mix = nn.Linear(N_FEATURES, width)
        self.share_mix = nn.Linear(2, width)
        self.feature_dropout = nn.Dropout(config.feature_dropout)
        self.crystal_mix = nn.Sequential(
            nn.Linear(4 * n_properties + 2 * N_FEATURES + 1, hidden),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, width),
        )
        block = NetworkConfig(width=width, dropout=config.dropout)
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.n_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(
            nn.Linear(4 * width, hidden),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, N_OUTPUTS),
        )
        nn.init.normal_(self.element_embedding.weight, std=0.3)

    def forward(self, batch: AtomBatch) -> Tensor:
        """Return (n, N_OUTPUTS) raw outputs."""
        weights = batch.weights[..., None]
        absent = weights == 0
        standardised = ((batch.features - self.feature_mean) / self.feature_scale).clamp(-_CLIP, _CLIP)
        features = self.feature_dropout(standardised)
        facts = self.properties[batch.numbers]
        crystal = self.crystal_mix(
            torch.cat(
                [
                    *_mean_and_spread(facts, weights),
                    facts.masked_fill(absent, -torch.inf).amax(dim=1),
                    facts.masked_fill(absent, torch.inf).amin(dim=1),
                    *_mean_and_spread(features, weights),
                    (batch.log_volume - _LOG_VOLUME)[:, None],
                ],
                dim=-1,
            )
        )
        log_weights = batch.weights.log()
        tokens = self.element_embedding(batch.numbers) + self.element_facts(facts) + self.feature_mix(features)
        shares = _element_shares(batch)
        tokens = tokens + self.share_mix(torch.stack([shares, shares.clamp_min(_SMALLEST_SHARE).log()], dim=-1))
        tokens = tokens + crystal[:, None]
        for block in self.blocks:
            tokens = block(tokens, log_weights)
        tokens = self.norm(tokens)
        pooled = [
            (tokens * weights).sum(dim=1),
            tokens.masked_fill(absent, -torch.inf).amax(dim=1),
            tokens.masked_fill(absent, torch.inf).amin(dim=1),
            crystal,
        ]
        outputs: Tensor = self.head(torch.cat(pooled, dim=-1))
        return outputs


def _element_shares(batch: AtomBatch) -> Tensor:
    """Return (n, k) share of each atom's element in its crystal."""
    same = batch.numbers[:, :, None] == batch.numbers[:, None, :]
    return (same * batch.weights[:, None, :]).sum(dim=-1)


def _mean_and_spread(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n, d) weighted mean and standard deviation of (n, k, d) values over the atoms."""
    mean = (values * weights).sum(dim=1)
    variance = ((values - mean[:, None]) ** 2 * weights).sum(dim=1)
    return mean, variance.clamp_min(1e-6).sqrt()
