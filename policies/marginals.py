"""The baseline that a prior must beat: every decision drawn from its overall frequency, whatever came before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from envs.crystal_env import Stage
from envs.lattice import N_COORDINATES
from policies.distributions import MaskedCategorical

if TYPE_CHECKING:
    from torch import Tensor

    from policies.trajectories import StepRecord

_BINS = 100
_SMOOTHING = 0.5  # pseudo-counts of every action and bin


@dataclass(frozen=True)
class IndependentMarginals:
    """Frequencies of actions at each stage, renormalised over what is legal; histograms of lattice coordinates."""

    actions: dict[Stage, Tensor]  # (n_actions,) log frequencies
    counts: Tensor  # (max_count + 1,) log frequencies
    density: Tensor  # (8, 6, bins) probability of each bin

    @classmethod
    def fit(cls, records: dict[Stage, StepRecord]) -> IndependentMarginals:
        """Count the decisions of given walks."""
        actions: dict[Stage, Tensor] = {
            stage: _log_frequencies(record.action, record.mask.shape[1])
            for stage, record in records.items()
            if stage != Stage.LATTICE
        }
        composition, last = records[Stage.COMPOSITION], records[Stage.LATTICE]
        density = torch.full((8, N_COORDINATES, _BINS), _SMOOTHING, dtype=torch.float64)
        ones = torch.ones(len(last.walk), dtype=torch.float64)
        density.index_put_((last.observation.system[last.source], last.action, _bin(last.unit)), ones, accumulate=True)
        return cls(
            actions,
            _log_frequencies(composition.count, composition.count_mask.shape[1]),
            density / density.sum(dim=-1, keepdim=True),
        )

    def log_prob(self, records: dict[Stage, StepRecord], n: int) -> Tensor:
        """Return (n,) log-probability of walks 0..n-1."""
        total = torch.zeros(n, dtype=torch.float64)
        for stage, record in records.items():
            if stage == Stage.LATTICE:
                log_p = self._log_density(record)
            else:
                logits = self.actions[stage].expand(len(record.walk), -1)
                log_p = MaskedCategorical(logits, record.mask).log_prob(record.action)
            if stage == Stage.COMPOSITION:
                counts = self.counts.expand(len(record.walk), -1)
                log_p = log_p + MaskedCategorical(counts, record.count_mask).log_prob(record.count)
            total = total.index_add(0, record.walk, log_p)
        return total

    def _log_density(self, record: StepRecord) -> Tensor:
        """Return (m,) log density of the histogram, restricted to each row's interval."""
        mass = self.density[record.observation.system[record.source], record.action]
        edges = torch.arange(_BINS + 1, dtype=torch.float64) / _BINS
        low, high = record.interval[:, :1], record.interval[:, 1:]
        overlap = (torch.minimum(edges[1:], high) - torch.maximum(edges[:-1], low)).clamp(min=0.0) * _BINS
        inside = (mass * overlap).sum(dim=-1)
        return (mass.gather(1, _bin(record.unit)[:, None])[:, 0] * _BINS / inside).log()


def _log_frequencies(action: Tensor, n_actions: int) -> Tensor:
    counts = torch.bincount(action, minlength=n_actions).double() + _SMOOTHING
    return (counts / counts.sum()).log()


def _bin(unit: Tensor) -> Tensor:
    return (unit * _BINS).long().clamp(0, _BINS - 1)
