"""Walk a batch of crystals through an environment, with a policy or along prescribed actions.

Walks stand at different stages at the same time; every turn of the loop moves all walks that stand at
the stage where most of them wait, so that few, large batches of table look-ups do the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from envs.crystal_env import SYMMETRY_STAGES, Stage
from policies.trajectories import StepRecord, Trajectories, concatenate

if TYPE_CHECKING:
    from torch import Tensor

    from envs.crystal import CrystalBatch
    from envs.crystal_env import CrystalEnv, Observation, Plan, States

_EDGE = 1e-6  # unit coordinates that miss their interval by less are rounding


class Chooser(Protocol):
    """Picks actions; ``rows`` are the walks and ``hidden`` is whatever ``encode`` returned for them."""

    def encode(self, observation: Observation) -> Tensor:
        """Return (n, ...) what later calls need to know of the observed states."""

    def discrete(
        self, stage: Stage, hidden: Tensor, states: States, rows: Tensor, mask: Tensor, *, source: Tensor | None
    ) -> Tensor:
        """Return (n,) int64 legal actions of the walks ``rows``; at the composition stage the element.

        Where walks share states, ``hidden`` and ``mask`` have one row per distinct state and ``source`` (n,) int64 says
        which of them each walk is in; otherwise ``source`` is None.
        """

    def count(self, hidden: Tensor, element: Tensor, states: States, rows: Tensor, mask: Tensor) -> Tensor:
        """Return (n,) int64 legal counts of the chosen elements."""

    def unit(self, hidden: Tensor, rows: Tensor, coordinate: Tensor, interval: Tensor) -> Tensor:
        """Return (n,) float64 inside ``interval`` (n, 2)."""


def rollout(env: CrystalEnv, n: int, chooser: Chooser, *, record: bool = True) -> Trajectories:
    """Walk ``n`` crystals from nothing to the end.

    Args:
        env: The environment.
        n: Number of walks.
        chooser: Picks the actions. A walk whose action is illegal is given up and marked in ``legal``.
        record: Keep the decisions; without them only the states come back.
    """
    states = env.initial(n)
    legal = torch.ones(n, dtype=torch.bool)
    kept: dict[Stage, list[StepRecord]] = {}
    while (stage := states.busiest_stage()) is not None:
        rows = (states.stage == stage).nonzero().flatten()
        step = _advance(env, states, rows, stage, chooser, legal=legal)
        if record:
            kept.setdefault(stage, []).append(step.record())
    return Trajectories(states, {stage: concatenate(steps) for stage, steps in kept.items()}, legal)


def walk(env: CrystalEnv, crystals: CrystalBatch) -> Trajectories:
    """Return the walks that build ``crystals``; ``legal`` is False where the environment cannot build one."""
    plan = env.plan(crystals)
    return rollout(env, len(crystals), _PlanChooser(plan))


@dataclass
class _Step:
    """One turn: the decisions of the walks ``rows``, which all stand at ``stage``."""

    stage: Stage
    rows: Tensor
    observation: Observation  # of the distinct states
    source: Tensor | None  # which of them each row sees, None = its own
    mask: Tensor  # per distinct state
    action: Tensor
    count_mask: Tensor | None = None
    count: Tensor | None = None
    interval: Tensor | None = None
    unit: Tensor | None = None

    def record(self) -> StepRecord:
        """Return what a policy needs to give the decisions' probabilities again."""
        n = len(self.rows)
        no_mask, nothing = torch.zeros(n, 0, dtype=torch.bool), torch.zeros(n, 0, dtype=torch.float64)
        return StepRecord(
            stage=self.stage,
            walk=self.rows,
            observation=self.observation,
            source=torch.arange(n) if self.source is None else self.source,
            mask=self.mask if self.source is None else self.mask[self.source],
            action=self.action,
            count_mask=no_mask if self.count_mask is None else self.count_mask,
            count=torch.zeros_like(self.rows) if self.count is None else self.count,
            interval=nothing if self.interval is None else self.interval,
            unit=torch.zeros(n, dtype=torch.float64) if self.unit is None else self.unit,
        )


def _advance(env: CrystalEnv, states: States, rows: Tensor, stage: Stage, chooser: Chooser, *, legal: Tensor) -> _Step:
    distinct, source = _distinct(states, rows, stage)
    observation = env.observe(states, distinct, stage)
    hidden = chooser.encode(observation)
    if stage == Stage.LATTICE:
        action, interval = env.lattice_interval(states, rows)
        unit = chooser.unit(hidden, rows, action, interval)
        keep = (unit >= interval[:, 0]) & (unit <= interval[:, 1])
        env.step_lattice(states, *_only_legal(keep, states, legal, rows, unit))
        no_mask = torch.zeros(len(rows), 0, dtype=torch.bool)
        return _Step(stage, rows, observation, source, no_mask, action, interval=interval, unit=unit)
    if stage == Stage.COMPOSITION:
        mask = env.element_mask(states, distinct)
        action = chooser.discrete(stage, hidden, states, rows, mask, source=source)
        count_mask, charges = env.count_mask(states, rows, action)
        count = chooser.count(
            hidden if source is None else hidden.index_select(0, source), action, states, rows, count_mask
        )
        keep = _is_legal(mask, action, source) & _is_legal(count_mask, count)
        env.step_composition(states, *_only_legal(keep, states, legal, rows, action, count, charges))
        return _Step(stage, rows, observation, source, mask, action, count_mask, count)
    if stage == Stage.WYCKOFF:
        mask = env.letter_mask(states, rows)
        action = chooser.discrete(stage, hidden, states, rows, mask, source=source)
        env.step_wyckoff(states, *_only_legal(_is_legal(mask, action), states, legal, rows, action))
        return _Step(stage, rows, observation, source, mask, action)
    mask = env.symmetry_mask(states, distinct, stage)
    action = chooser.discrete(stage, hidden, states, rows, mask, source=source)
    rows_kept, action_kept = _only_legal(_is_legal(mask, action, source), states, legal, rows, action)
    env.step_symmetry(states, rows_kept, stage, action_kept)
    return _Step(stage, rows, observation, source, mask, action)


def _distinct(states: States, rows: Tensor, stage: Stage) -> tuple[Tensor, Tensor | None]:
    """Return one walk of each distinct state among ``rows``, and the index of the state that each row is in.

    Up to the space group a state is (lattice system, point symmetry), before the first element it is the space group,
    so that a batch of any size holds 1, 8, 29 and at most 230 of them, and network and masks see each once. Later
    states are taken as they come, with None for the index.
    """
    if stage in SYMMETRY_STAGES:
        code = states.system[rows] * 8 + states.point[rows]
    elif stage == Stage.COMPOSITION and bool((states.last[rows] < 0).all()):
        code = states.group[rows]
    else:
        return rows, None
    values, source = torch.unique(code, return_inverse=True)
    first = torch.empty_like(values)
    first[source] = torch.arange(len(rows))  # any of the rows in a state will do
    return rows[first], source


def _is_legal(mask: Tensor, action: Tensor, source: Tensor | None = None) -> Tensor:
    """Return (n,) bool; actions outside the mask's width are illegal."""
    row = torch.arange(len(mask)) if source is None else source
    inside = action < mask.shape[1]
    return mask[row, torch.where(inside, action, 0)] & inside


def _only_legal(keep: Tensor, states: States, legal: Tensor, rows: Tensor, *decisions: Tensor) -> tuple[Tensor, ...]:
    """Return ``rows`` and ``decisions`` where ``keep`` is True; walks whose action is illegal are given up."""
    if bool(keep.all()):
        return (rows, *decisions)
    given_up = rows[~keep]
    legal[given_up] = False
    states.stage[given_up] = int(Stage.TERMINAL)
    return tuple(part[keep] for part in (rows, *decisions))


class _PlanChooser:
    """Follows a plan; it has nothing to encode."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def encode(self, observation: Observation) -> Tensor:
        return observation.system

    def discrete(
        self, stage: Stage, hidden: Tensor, states: States, rows: Tensor, mask: Tensor, *, source: Tensor | None
    ) -> Tensor:
        del hidden, source
        plan = self.plan
        if stage == Stage.COMPOSITION:
            return plan.next_element(rows, states.last[rows])[0]
        if stage == Stage.WYCKOFF:
            return plan.letter[rows, states.n_orbits[rows].clamp(max=plan.letter.shape[1] - 1)].clamp(min=0)
        action = (plan.system, plan.point, plan.group)[stage][rows]
        return torch.where(plan.impossible[rows], mask.shape[1], action)

    def count(self, hidden: Tensor, element: Tensor, states: States, rows: Tensor, mask: Tensor) -> Tensor:
        del hidden, mask
        count = self.plan.next_element(rows, states.last[rows])[1]
        return torch.where(element < self.plan.totals.shape[1], count, 0)

    def unit(self, hidden: Tensor, rows: Tensor, coordinate: Tensor, interval: Tensor) -> Tensor:
        del hidden
        unit = self.plan.unit[rows, coordinate]
        inside = (unit > interval[:, 0] - _EDGE) & (unit < interval[:, 1] + _EDGE)
        return torch.where(inside, torch.maximum(torch.minimum(unit, interval[:, 1]), interval[:, 0]), unit)
