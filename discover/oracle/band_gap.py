"""PBE band gap of a structure: frozen CHGNet features, read by an ensemble of small networks.

The gap oracle of the loop. `GapModel.load()` returns the shipped model; how it was trained and how far it can be
trusted is said in `pretrained/BAND_GAP_CARD.md`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pymatgen.core import Structure
from torch import Tensor

from discover.oracle.gap_network import (
    Atoms,
    BandGapError,
    GapNetwork,
    GapNetworkConfig,
    clamp_log_scale,
    collate,
    describe,
)
from proxies.storage import StorageError, WeightFiles

PRETRAINED = Path(__file__).parent / "pretrained"
WEIGHTS, DESCRIPTION = "band_gap.safetensors", "band_gap.json"
FILES = WeightFiles(WEIGHTS, DESCRIPTION, "crystal-discover band gap model 1")
_BATCH = 64
_SHARED = ("properties", "feature_mean", "feature_scale")


@dataclass(frozen=True)
class GapPrediction:
    """Band gap of one structure."""

    gap: float  # eV, PBE; 0 for what is more likely a metal
    p_metal: float


class GapModel:
    """Networks that differ in seed, read as one prediction.

    Attributes:
        members: Networks of equal shape.
        facts: What the model card says: data, training, figures.
    """

    def __init__(self, members: Sequence[GapNetwork], facts: Mapping[str, Any] | None = None) -> None:
        if not members:
            raise BandGapError("a gap model needs at least one member")
        self.members = [member.eval().requires_grad_(requires_grad=False) for member in members]
        self.facts = dict(facts or {})

    def predict(self, structures: Sequence[Structure]) -> NDArray[np.float64]:
        """Return (n,) band gaps in eV, in order; NaN where CHGNet cannot see the structure (see `describe`)."""
        return self.predict_with_metal(structures)[0]

    def predict_with_metal(self, structures: Sequence[Structure]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (n,) band gaps in eV and (n,) probabilities of being a metal; NaN where CHGNet cannot see."""
        gaps, metal = np.full(len(structures), np.nan), np.full(len(structures), np.nan)
        for rows, atoms in _visible(structures):
            outputs = self.outputs(atoms)
            gaps[rows], metal[rows] = (values.numpy() for values in read(outputs))
        return gaps, metal

    def predict_one(self, structure: Structure) -> GapPrediction:
        """Return the band gap of one structure.

        Raises:
            BandGapError: If CHGNet cannot see it; the message says why.
        """
        gap, p_metal = read(self.outputs([describe(structure)]))
        return GapPrediction(float(gap[0]), float(p_metal[0]))

    @torch.no_grad()
    def outputs(self, atoms: Sequence[Atoms]) -> Tensor:
        """Return (n_members, n, 3) float64 raw outputs for crystals as `describe` gives them."""
        batch = collate(atoms)
        return torch.stack([member(batch) for member in self.members]).double()

    def save(self, folder: Path) -> None:
        """Write weights (half precision) and description into `folder`; each file appears complete or not at all."""
        tensors = {f"shared.{name}": getattr(self.members[0], name).clone() for name in _SHARED}
        for k, member in enumerate(self.members):
            for name, value in member.state_dict().items():
                if name not in _SHARED:
                    tensors[f"members.{k}.{name}"] = value.half().contiguous()
        description = {
            "n_members": len(self.members),
            "network": asdict(self.members[0].config),
            "facts": self.facts,
        }
        FILES.write(folder, tensors, description)

    @classmethod
    def load(cls, folder: Path | None = None) -> Self:
        """Read what `save` wrote; None reads the shipped model.

        Raises:
            BandGapError: If a file is missing, truncated or foreign.
        """
        folder = PRETRAINED if folder is None else Path(folder)
        try:
            tensors, description = FILES.read(folder)
        except StorageError as error:
            raise BandGapError(
                f"{folder} holds no readable gap model ({error}); retrain with "
                f"`python -m discover.train what=gap data=PATH` or reinstall the package"
            ) from error
        try:
            config = GapNetworkConfig(**description["network"])
            members = [_member(config, tensors, k) for k in range(description["n_members"])]
            return cls(members, description["facts"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise BandGapError(
                f"{folder}: weights and description do not fit together ({error}); retrain it"
            ) from error


def read(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n,) band gap in eV and (n,) probability of being a metal from (n_members, n, 3) raw outputs.

    A gap is a point mass at zero (metals) and a Laplace distribution above. The gap returned is the median of the
    whole, which has the smallest expected absolute error: zero for what is more likely a metal, and below the gap of
    the non-metal as far as a metal is likely. A member counts in the gap as far as it sees a non-metal.
    """
    p_metal = outputs[..., 2].sigmoid().mean(dim=0)
    share = (1.0 - outputs[..., 2].sigmoid()).clamp_min(1e-9)
    share = share / share.sum(dim=0)
    gap = (share * outputs[..., 0]).sum(dim=0)
    scale = (share * clamp_log_scale(outputs[..., 1]).exp()).sum(dim=0)
    below = ((0.5 - p_metal) / (1.0 - p_metal)).clamp(
        1e-9, 0.5
    )  # quantile of the non-metal's gap at the whole's median
    median = (gap + scale * (2.0 * below).log()).clamp_min(0.0)
    return median.where(p_metal < 0.5, torch.zeros_like(median)), p_metal


def _visible(structures: Sequence[Structure]) -> Iterator[tuple[list[int], list[Atoms]]]:
    """Yield rows and atoms of the structures that CHGNet sees, a batch at a time."""
    rows: list[int] = []
    atoms: list[Atoms] = []
    for row, structure in enumerate(structures):
        try:
            atoms.append(describe(structure))
        except BandGapError:
            continue
        rows.append(row)
        if len(rows) == _BATCH:
            yield rows, atoms
            rows, atoms = [], []
    if rows:
        yield rows, atoms


def _member(config: GapNetworkConfig, tensors: Mapping[str, Tensor], k: int) -> GapNetwork:
    """Return member `k` of stored weights."""
    member = GapNetwork(config)
    prefix = f"members.{k}."
    state = {name.removeprefix(prefix): value.float() for name, value in tensors.items() if name.startswith(prefix)}
    member.load_state_dict({**state, **{name: tensors[f"shared.{name}"] for name in _SHARED}})
    return member
