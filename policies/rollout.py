"""Walk a batch of crystals through an environment, with a policy or along prescribed actions.

Walks stand at different stages at the same time; every turn of the loop moves all walks that stand at
the stage where most of them wait, so that few, large batches of table look-ups do the work.
"""

from __future__ import annotations

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

    def discrete(self, stage: Stage, hidden: Tensor, states: States, rows: Tensor, mask: Tensor) -> Tensor:
        """Return (n,) int64 legal actions; at the composition stage the element."""

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
        step = _advance(env, states, rows, stage, chooser, legal)
        if record:
            kept.setdefault(stage, []).append(step)
    return Trajectories(states, {stage: concatenate(steps) for stage, steps in kept.items()}, legal)


def walk(env: CrystalEnv, crystals: CrystalBatch) -> Trajectories:
    """Return the walks that build ``crystals``; ``legal`` is False where the environment cannot build one."""
    plan = env.plan(crystals)
    return rollout(env, len(crystals), _PlanChooser(plan))


def _advance(
    env: CrystalEnv, states: States, rows: Tensor, stage: Stage, chooser: Chooser, legal: Tensor
) -> StepRecord:
    observation, source = _observe(env, states, rows, stage)
    hidden = chooser.encode(observation)
    if len(observation) < len(rows):
        hidden = hidden[source]
    nothing = torch.zeros(len(rows), 0)
    mask, count_mask, interval = nothing.bool(), nothing.bool(), nothing.double()
    count, unit = torch.zeros_like(rows), torch.zeros(len(rows), dtype=torch.float64)
    if stage == Stage.LATTICE:
        action, interval = env.lattice_interval(states, rows)
        unit = chooser.unit(hidden, rows, action, interval)
        keep = (unit >= interval[:, 0]) & (unit <= interval[:, 1])
        env.step_lattice(states, rows[keep], unit[keep])
    elif stage == Stage.COMPOSITION:
        mask = env.element_mask(states, rows)
        action = chooser.discrete(stage, hidden, states, rows, mask)
        count_mask, charges = env.count_mask(states, rows, action)
        count = chooser.count(hidden, action, states, rows, count_mask)
        keep = _is_legal(mask, action) & _is_legal(count_mask, count)
        env.step_composition(states, rows[keep], action[keep], count[keep], charges[keep])
    elif stage == Stage.WYCKOFF:
        mask = env.letter_mask(states, rows)
        action = chooser.discrete(stage, hidden, states, rows, mask)
        keep = _is_legal(mask, action)
        env.step_wyckoff(states, rows[keep], action[keep])
    else:
        mask = env.symmetry_mask(states, rows, stage)
        action = chooser.discrete(stage, hidden, states, rows, mask)
        keep = _is_legal(mask, action)
        env.step_symmetry(states, rows[keep], stage, action[keep])
    if not keep.all():
        given_up = rows[~keep]
        legal[given_up] = False
        states.stage[given_up] = int(Stage.TERMINAL)
    return StepRecord(
        stage=stage,
        walk=rows,
        observation=observation,
        source=source,
        mask=mask,
        action=action,
        count_mask=count_mask,
        count=count,
        interval=interval,
        unit=unit,
    )


def _observe(env: CrystalEnv, states: States, rows: Tensor, stage: Stage) -> tuple[Observation, Tensor]:
    """Return the distinct observations of ``rows`` and which one each row sees.

    Up to the space group a state is (lattice system, point symmetry), so a batch of any size holds
    1, 8 or 26 distinct ones and the network sees each of them once.
    """
    if stage not in SYMMETRY_STAGES:
        return env.observe(states, rows, stage), torch.arange(len(rows))
    code = states.system[rows] * 8 + states.point[rows]
    distinct, source = torch.unique(code, return_inverse=True)
    first = torch.full((len(distinct),), len(rows)).scatter_reduce_(0, source, torch.arange(len(rows)), "amin")
    return env.observe(states, rows[first], stage), source


def _is_legal(mask: Tensor, action: Tensor) -> Tensor:
    """Return (n,) bool; actions outside the mask's width are illegal."""
    inside = action < mask.shape[1]
    return mask.gather(1, torch.where(inside, action, 0)[:, None])[:, 0] & inside


class _PlanChooser:
    """Follows a plan; it has nothing to encode."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def encode(self, observation: Observation) -> Tensor:
        return observation.system

    def discrete(self, stage: Stage, hidden: Tensor, states: States, rows: Tensor, mask: Tensor) -> Tensor:
        del hidden
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
