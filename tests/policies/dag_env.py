"""A small environment whose orders of building meet again, with everything about it known exactly."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from policies.distributions import MaskedCategorical
from policies.state_graphs import Policy


@dataclass(frozen=True)
class CompositionEnv:
    """Adds one atom at a time to a formula unit.

    A state row is (count of each element, done). Action ``e < k`` adds an atom of ``elements[e]``; action ``k`` exits.
    Orders of adding meet again in one state, so P_B is not trivial, unless ``ordered`` asks for ascending elements:
    then the graph is a tree.
    """

    elements: tuple[int, ...]  # atomic numbers, ascending
    max_atoms: int
    ordered: bool = False

    @property
    def n_actions(self) -> int:
        return len(self.elements) + 1

    @property
    def exit_action(self) -> int:
        return len(self.elements)

    def initial(self, n: int) -> Tensor:
        return torch.zeros(n, len(self.elements) + 1, dtype=torch.int64)

    def is_terminal(self, states: Tensor) -> Tensor:
        return states[:, -1] == 1

    def is_initial(self, states: Tensor) -> Tensor:
        return (states == 0).all(dim=-1)

    def forward_mask(self, states: Tensor) -> Tensor:
        counts = states[:, :-1]
        n_atoms = counts.sum(dim=-1, keepdim=True)
        add = (n_atoms < self.max_atoms).expand(-1, len(self.elements))
        if self.ordered:
            add = add & ~_has_any_after(counts)
        return torch.cat([add, n_atoms > 0], dim=-1) & (states[:, -1:] == 0)

    def backward_mask(self, states: Tensor) -> Tensor:
        counts, done = states[:, :-1], states[:, -1:] == 1
        remove = (counts > 0) & ~done
        if self.ordered:
            remove &= ~_has_any_after(counts)
        return torch.cat([remove, done], dim=-1)

    def step(self, states: Tensor, actions: Tensor) -> Tensor:
        return states + torch.nn.functional.one_hot(actions, self.n_actions)

    def backstep(self, states: Tensor, actions: Tensor) -> Tensor:
        return states - torch.nn.functional.one_hot(actions, self.n_actions)

    # What a test may know: every state, its number, and exact probabilities.

    def index(self, states: Tensor) -> Tensor:
        """Return (n,) the number of each state, ended or not, below ``2 * (max_atoms + 1) ** k``."""
        base = torch.tensor([(self.max_atoms + 1) ** e for e in range(len(self.elements))] + [0])
        return (states * base).sum(dim=-1) * 2 + states[:, -1]

    @property
    def n_indices(self) -> int:
        return 2 * (self.max_atoms + 1) ** len(self.elements)

    def unfinished_states(self) -> Tensor:
        """Return every state before the exit, the fewest atoms first."""
        counts = torch.tensor(list(product(range(self.max_atoms + 1), repeat=len(self.elements))))
        n_atoms = counts.sum(dim=-1)
        order = n_atoms.argsort(stable=True)
        counts = counts[order][n_atoms[order] <= self.max_atoms]
        return torch.cat([counts, torch.zeros(len(counts), 1, dtype=torch.int64)], dim=-1)

    def terminal_states(self) -> Tensor:
        """Return every terminal state: each unfinished one but the empty, ended."""
        ended = self.unfinished_states()[1:].clone()
        ended[:, -1] = 1
        return ended

    @torch.no_grad()
    def exact_log_prob(self, forward: Policy) -> Tensor:
        """Return (n_terminals,) float64 log p_T of ``terminal_states`` by summing over all trajectories.

        The probability of visiting a state is the sum over its parents of theirs times P_F; atoms are added one at a
        time, so it is complete once all states of fewer atoms have been handled.
        """
        states = self.unfinished_states()
        log_pf = MaskedCategorical(forward(states).double(), self.forward_mask(states)).logits
        n_atoms = states.sum(dim=-1)
        visited = torch.zeros(self.n_indices, dtype=torch.float64)
        visited[self.index(states[:1])] = 1.0
        for size in range(self.max_atoms):
            here = states[n_atoms == size]
            for action in range(len(self.elements)):
                there = self.index(self.step(here, torch.full((len(here),), action)))
                flow = visited[self.index(here)] * log_pf[n_atoms == size, action].exp()
                visited.index_add_(0, there, flow)
        return (visited[self.index(states)].log() + log_pf[:, self.exit_action])[1:]


def _has_any_after(counts: Tensor) -> Tensor:
    """Return (n, k) bool, True where a later element is present."""
    present = (counts > 0).long()
    return (present.flip(-1).cumsum(-1).flip(-1) - present) > 0
