"""Trajectories through state graphs in which several orders of building meet in one state.

Crystals are built in a fixed order, so their state graph is a tree, P_B is 1 and ``policies.rollout`` does not need
this module. Any environment that offers the methods of ``GraphEnv`` is trained with the same losses through the
functions here, with a uniform or a learned backward policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from policies.distributions import MaskedCategorical

# Maps states (n, state_dim) to logits (n, n_actions) of steps forward from, or backward into, these states.
Policy = Callable[[Tensor], Tensor]


class GraphEnv(Protocol):
    """An environment whose action ``a`` leads forward from a state, and whose undoing is again named ``a``."""

    def initial(self, n: int) -> Tensor:
        """Return ``n`` copies of the initial state (n, state_dim)."""

    def is_terminal(self, states: Tensor) -> Tensor:
        """Return (n,) bool, True where construction has ended."""

    def is_initial(self, states: Tensor) -> Tensor:
        """Return (n,) bool, True at the initial state."""

    def forward_mask(self, states: Tensor) -> Tensor:
        """Return the legal actions (n, n_actions), at least one unless the state is terminal."""

    def backward_mask(self, states: Tensor) -> Tensor:
        """Return the actions (n, n_actions) that may have led here, at least one unless the state is initial."""

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return the states (n, state_dim) after legal ``actions`` (n,)."""

    def backstep(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return the states (n, state_dim) before ``actions`` (n,) that led to ``states``."""


@dataclass(frozen=True)
class GraphTrajectories:
    """Complete trajectories: terminal states (n, state_dim), log_pf and log_pb (n, max_steps), 0 where padded."""

    terminal_states: Tensor
    log_pf: Tensor
    log_pb: Tensor


def uniform_policy(n_actions: int, dtype: torch.dtype = torch.float32) -> Policy:
    """Return the policy that takes every legal action with equal probability, the usual P_B without parameters."""

    def logits(states: Tensor) -> Tensor:
        return torch.zeros(len(states), n_actions, dtype=dtype, device=states.device)

    return logits


def sample_trajectories(
    env: GraphEnv, forward: Policy, backward: Policy, n: int, generator: torch.Generator, *, epsilon: float = 0.0
) -> GraphTrajectories:
    """Draw ``n`` trajectories from the initial state with P_F, or with the mixture (1 - epsilon) P_F + epsilon uniform.

    ``log_pf`` is the log-probability under P_F itself, so that off-policy trajectories train it as they are.
    """
    states, log_pf, log_pb = env.initial(n), [], []
    rows = torch.arange(n, device=states.device)
    while len(rows):
        here = states[rows]
        choice = MaskedCategorical(forward(here), env.forward_mask(here))
        actions = (choice.mixed_with_uniform(epsilon) if epsilon else choice).sample_with(generator)
        there = env.step(here, actions)
        undo = MaskedCategorical(backward(there), env.backward_mask(there))
        log_pf.append(_padded(choice.log_prob(actions), rows, n))
        log_pb.append(_padded(undo.log_prob(actions), rows, n))
        states = states.index_copy(0, rows, there)
        rows = rows[~env.is_terminal(there)]
    return GraphTrajectories(states, torch.stack(log_pf, dim=-1), torch.stack(log_pb, dim=-1))


def trace_back(
    env: GraphEnv, forward: Policy, backward: Policy, terminal_states: Tensor, generator: torch.Generator
) -> GraphTrajectories:
    """Draw one trajectory to each of ``terminal_states`` (n, state_dim), from its end, with P_B: data, or replay."""
    n, states, log_pf, log_pb = len(terminal_states), terminal_states, [], []
    rows = (~env.is_initial(states)).nonzero().flatten()
    while len(rows):
        here = states[rows]
        undo = MaskedCategorical(backward(here), env.backward_mask(here))
        actions = undo.sample_with(generator)
        before = env.backstep(here, actions)
        choice = MaskedCategorical(forward(before), env.forward_mask(before))
        log_pf.append(_padded(choice.log_prob(actions), rows, n))
        log_pb.append(_padded(undo.log_prob(actions), rows, n))
        states = states.index_copy(0, rows, before)
        rows = rows[~env.is_initial(before)]
    return GraphTrajectories(terminal_states, torch.stack(log_pf, dim=-1), torch.stack(log_pb, dim=-1))


@torch.no_grad()
def estimate_log_prob(
    env: GraphEnv,
    forward: Policy,
    backward: Policy,
    terminal_states: Tensor,
    generator: torch.Generator,
    *,
    n_trajectories: int = 64,
) -> tuple[Tensor, Tensor]:
    """Estimate log p_T(x), the log-probability that the forward policy ends in each terminal state.

    p_T(x) = E[P_F(τ) / P_B(τ|x)] over trajectories τ drawn from P_B; the estimate of p_T, not of its logarithm, is
    unbiased. It has no spread where flows match.

    Args:
        env: The environment.
        forward: P_F.
        backward: P_B; the closer it is to the flow of P_F, the smaller the spread.
        terminal_states: (n, state_dim).
        generator: Source of randomness.
        n_trajectories: Drawn for each terminal, at least 2.

    Returns:
        (n,) estimated log p_T and (n,) its standard error, the relative standard error of p_T.
    """
    repeated = terminal_states.repeat_interleave(n_trajectories, dim=0)
    drawn = trace_back(env, forward, backward, repeated, generator)
    log_weights = (drawn.log_pf - drawn.log_pb).sum(dim=-1).view(-1, n_trajectories)
    log_prob = log_weights.logsumexp(dim=-1) - math.log(n_trajectories)
    relative = (log_weights - log_prob.unsqueeze(-1)).exp()
    return log_prob, relative.std(dim=-1) / math.sqrt(n_trajectories)


def _padded(values: Tensor, rows: Tensor, n: int) -> Tensor:
    """Return (n,) with ``values`` at ``rows`` and 0 elsewhere."""
    return values.new_zeros(n).index_copy(0, rows, values)
