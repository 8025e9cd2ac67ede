"""List every crystal of a small environment by following its masks, for exact probabilities.

The lattice is the only continuous choice, so a leaf is (space group, composition, letters). Its
probability under a policy is the product of the discrete choices on its one walk; densities over
lattices integrate to one and drop out.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from envs.crystal import CrystalBatch
from envs.crystal_env import SYMMETRY_STAGES, CrystalEnv, Stage, States
from envs.errors import SpaceSizeError

MAX_LEAVES = 200_000


def enumerate_crystals(env: CrystalEnv, *, max_leaves: int = MAX_LEAVES) -> CrystalBatch:
    """Return every leaf of ``env`` exactly once, each with the lattice in the middle of its intervals.

    Walking them back (``policies.rollout.walk``) gives the decisions whose probabilities multiply to the leaf's.

    Raises:
        SpaceSizeError: If there are more than ``max_leaves`` leaves; the message says how to narrow the space.
    """
    open_states, leaves, n_leaves = env.initial(1), [], 0
    while (stage := open_states.busiest_stage()) is not None:
        waits = open_states.stage == stage
        children = _children(env, _select(open_states, waits.nonzero().flatten()), stage)
        is_leaf = children.stage == int(Stage.LATTICE)
        leaves.append(_select(children, is_leaf.nonzero().flatten()))
        n_leaves += int(is_leaf.sum())
        rest = _select(open_states, (~waits).nonzero().flatten())
        open_states = _join([rest, _select(children, (~is_leaf).nonzero().flatten())])
        if n_leaves + open_states.n > max_leaves:  # every open state has at least one leaf
            raise SpaceSizeError(
                f"the space has more than {max_leaves:,} crystals without lattice; allow fewer elements, atoms or "
                "space groups to enumerate it"
            )
    return env.crystals(_with_middle_lattice(env, _join(leaves)))


def _children(env: CrystalEnv, states: States, stage: Stage) -> States:
    """Return every state that one legal action leads to from ``states``, all of which stand at ``stage``."""
    rows = torch.arange(states.n)
    if stage in SYMMETRY_STAGES:
        parent, action = env.symmetry_mask(states, rows, stage).nonzero().unbind(dim=1)
        children = _select(states, parent)
        env.step_symmetry(children, torch.arange(children.n), stage, action)
    elif stage == Stage.WYCKOFF:
        parent, letter = env.letter_mask(states, rows).nonzero().unbind(dim=1)
        children = _select(states, parent)
        env.step_wyckoff(children, torch.arange(children.n), letter)
    else:
        parent, element = env.element_mask(states, rows).nonzero().unbind(dim=1)
        mask, charges = env.count_mask(states, parent, element)
        pair, count = mask.nonzero().unbind(dim=1)
        children = _select(states, parent[pair])
        env.step_composition(children, torch.arange(children.n), element[pair], count, charges[pair])
    return children


def _with_middle_lattice(env: CrystalEnv, states: States) -> States:
    while len(rows := (states.stage == int(Stage.LATTICE)).nonzero().flatten()):
        _, interval = env.lattice_interval(states, rows)
        env.step_lattice(states, rows, interval.mean(dim=1))
    return states


def _select(states: States, rows: Tensor) -> States:
    """Return copies of ``rows``, which may repeat."""
    return States(**{f.name: getattr(states, f.name)[rows] for f in fields(States)})


def _join(parts: Sequence[States]) -> States:
    return States(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(States)})
