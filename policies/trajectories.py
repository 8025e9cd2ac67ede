"""What a batch of walks met and chose, kept by stage so that log-probabilities are one network pass."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from envs.crystal_env import Observation, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from envs.crystal_env import States


@dataclass(frozen=True)
class StepRecord:
    """Decisions of one stage. Rows that see the same state share one observation (``source``)."""

    stage: Stage
    walk: Tensor  # (m,) int64 index of the walk
    observation: Observation  # u distinct states
    source: Tensor  # (m,) int64 row of ``observation``
    mask: Tensor  # (m, n_actions) bool; (m, 0) at the lattice stage
    action: Tensor  # (m,) int64; the coordinate at the lattice stage
    count_mask: Tensor  # (m, max_count + 1) bool at the composition stage, else (m, 0)
    count: Tensor  # (m,) int64 at the composition stage, else zeros
    interval: Tensor  # (m, 2) float64 at the lattice stage, else (m, 0)
    unit: Tensor  # (m,) float64 at the lattice stage, else zeros


@dataclass(frozen=True)
class Trajectories:
    """Finished walks: their states, and every decision on the way."""

    states: States
    records: dict[Stage, StepRecord]
    legal: Tensor  # (n,) bool, False where a prescribed action was illegal and the walk was given up

    @property
    def n(self) -> int:
        """Return the number of walks."""
        return self.states.n

    @property
    def n_decisions(self) -> int:
        """Return the number of states from which a choice was made, over all walks."""
        return sum(len(record.walk) for record in self.records.values())

    @property
    def n_observations(self) -> int:
        """Return the number of distinct states that a network has to see."""
        return sum(len(record.observation) for record in self.records.values())


def concatenate(records: Sequence[StepRecord], offsets: Sequence[int] | None = None) -> StepRecord:
    """Join records of one stage; ``offsets`` are added to their walk indices."""
    offsets = offsets or [0] * len(records)
    starts = torch.tensor([0, *[len(record.observation) for record in records[:-1]]]).cumsum(dim=0).tolist()
    joined = {
        f.name: torch.cat([getattr(record, f.name) for record in records])
        for f in fields(StepRecord)
        if f.name not in ("stage", "observation", "walk", "source")
    }
    return StepRecord(
        stage=records[0].stage,
        observation=join_observations([record.observation for record in records]),
        walk=torch.cat([record.walk + offset for record, offset in zip(records, offsets, strict=True)]),
        source=torch.cat([record.source + start for record, start in zip(records, starts, strict=True)]),
        **joined,
    )


def join_observations(observations: Sequence[Observation]) -> Observation:
    """Stack observations; their stages may differ."""
    return Observation(
        **{f.name: torch.cat([getattr(part, f.name) for part in observations]) for f in fields(Observation)}
    )


def merge(batches: Sequence[Trajectories]) -> tuple[dict[Stage, StepRecord], int]:
    """Return the records of several batches as those of one, walks numbered through, and the number of walks."""
    offsets = [0]
    for batch in batches:
        offsets.append(offsets[-1] + batch.n)
    merged = {}
    for stage in Stage:
        found = [
            (batch.records[stage], offset)
            for batch, offset in zip(batches, offsets, strict=False)
            if stage in batch.records
        ]
        if found:
            merged[stage] = concatenate([record for record, _ in found], [offset for _, offset in found])
    return merged, offsets[-1]
