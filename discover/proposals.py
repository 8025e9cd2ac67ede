"""Ways to realise a composition: what sources of proposals hand to ranking and to the structure generator."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from envs.crystal import CrystalBatch

SOURCES = ("prior", "template")


@dataclass(frozen=True)
class Proposals:
    """Proposals for several compositions, rows of one batch; within a composition sorted best first."""

    crystals: CrystalBatch  # (m,) with letters and a lattice
    parameters: Tensor  # (m, max_orbits, 3) float64; a row of NaN leaves the coordinates to the structure generator
    query: Tensor  # (m,) int64 index of the composition
    score: Tensor  # (m,) float64 the source's own score, higher is better
    source: Tensor  # (m,) int64 index into ``SOURCES``

    def __len__(self) -> int:
        """Return the number of proposals."""
        return len(self.crystals)

    @property
    def has_coordinates(self) -> Tensor:
        """(m,) bool: rows whose source gives the free parameters."""
        return ~self.parameters.isnan().any(dim=(1, 2))

    def select(self, rows: Tensor) -> Self:
        """Return the proposals at `rows` (indices or a bool mask), in that order."""
        return type(self)(
            self.crystals.select(rows), self.parameters[rows], self.query[rows], self.score[rows], self.source[rows]
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Return the proposals of several sources as one, each composition's in the order of the parts."""
        crystals = CrystalBatch.cat([part.crystals for part in parts])
        width = crystals.letters.shape[1]
        padded = []
        for part in parts:
            missing = width - part.parameters.shape[1]
            parameters = torch.nn.functional.pad(part.parameters, (0, 0, 0, missing))
            parameters[~part.has_coordinates] = torch.nan
            padded.append(parameters)
        query = torch.cat([part.query for part in parts])
        joined = cls(
            crystals,
            torch.cat(padded),
            query,
            torch.cat([part.score for part in parts]),
            torch.cat([part.source for part in parts]),
        )
        return joined.select(query.argsort(stable=True))
