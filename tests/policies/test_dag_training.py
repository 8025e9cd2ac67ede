"""The core trains environments in which orders meet: exact on a space that can be enumerated."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from policies.ema import ExponentialMovingAverage
from policies.losses import log_partition_variance_loss, trajectory_balance_loss, trajectory_balance_residual
from policies.replay import ReplayBuffer
from policies.state_graphs import Policy, estimate_log_prob, sample_trajectories, trace_back, uniform_policy
from tests.policies.dag_env import CompositionEnv
from tests.strategies import generators, seeds

ENV = CompositionEnv(elements=(3, 8, 22), max_atoms=4)
TREE = CompositionEnv(elements=(3, 8, 22), max_atoms=4, ordered=True)


class TabularPolicy(nn.Module):
    """One free logit per state and action."""

    def __init__(self, env: CompositionEnv, *, spread: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = spread * torch.randn(env.n_indices, env.n_actions, generator=generator, dtype=torch.float64)
        self.env, self.table = env, nn.Parameter(table)

    def forward(self, states: Tensor) -> Tensor:
        return self.table[self.env.index(states)]


class NetworkPolicy(nn.Module):
    """Two hidden layers on the counts of atoms and on whether construction has ended."""

    def __init__(self, env: CompositionEnv, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        k, width = len(env.elements) + 1, 64
        layers = (nn.Linear(k, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, env.n_actions))
        self.layers = nn.Sequential(*layers)

    def forward(self, states: Tensor) -> Tensor:
        return self.layers(states.to(torch.float32))


def _log_reward(states: Tensor) -> Tensor:
    """Return (n,) float64 with two separate peaks, 8 nats above the lowest value."""
    counts = states[:, :-1].double()
    first, second = (((counts - torch.tensor(peak)) ** 2).sum(dim=-1) for peak in ((1.0, 2.0, 1.0), (3.0, 0.0, 0.0)))
    return torch.logaddexp(3.0 - first, 2.0 - 1.5 * second).clamp(min=-5.0)


def _log_partition(env: CompositionEnv) -> float:
    return _log_reward(env.terminal_states()).logsumexp(dim=0).item()


def _total_variation(env: CompositionEnv, forward: Policy) -> float:
    log_reward = _log_reward(env.terminal_states())
    target = log_reward.softmax(dim=0)
    return 0.5 * (env.exact_log_prob(forward).exp() - target).abs().sum().item()


def _train(
    env: CompositionEnv,
    forward: nn.Module,
    backward: Policy,
    *,
    variance: bool,
    n_steps: int,
    learning_rate: float,
    batch: int = 128,
) -> float:
    """Train on-policy with some exploration; return the last log Z."""
    generator = torch.Generator().manual_seed(0)
    log_Z = nn.Parameter(torch.zeros((), dtype=torch.float64))
    networks = [part for part in (forward, backward) if isinstance(part, nn.Module)]
    parameters = [parameter for network in networks for parameter in network.parameters()]
    optimiser = torch.optim.Adam(
        [{"params": parameters}, {"params": [log_Z], "lr": 0.1}], lr=learning_rate, betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    estimate = log_Z
    for _ in range(n_steps):
        drawn = sample_trajectories(env, forward, backward, batch, generator, epsilon=0.1)
        log_reward = _log_reward(drawn.terminal_states)
        if variance:
            loss, estimate = log_partition_variance_loss(drawn.log_pf, drawn.log_pb, log_reward)
        else:
            residual = trajectory_balance_residual(log_Z, drawn.log_pf, drawn.log_pb, log_reward)
            loss = trajectory_balance_loss(residual)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return estimate.item()


# What the environment must obey for the rest to mean anything.


@given(data=st.data(), max_atoms=st.integers(1, 8), ordered=st.booleans())
def test_every_walk_can_be_undone(data: st.DataObject, max_atoms: int, *, ordered: bool) -> None:
    env = CompositionEnv(elements=(3, 8, 22), max_atoms=max_atoms, ordered=ordered)
    states, walk = env.initial(1), []
    while not env.is_terminal(states).any():
        legal = env.forward_mask(states)[0].nonzero().flatten().tolist()
        assert legal  # no reachable state is a dead end
        action = torch.tensor([data.draw(st.sampled_from(legal))])
        walk.append((states, action))
        states = env.step(states, action)
        assert env.backward_mask(states)[0, action].item()  # P_B of a step taken is not zero
    assert not env.forward_mask(states).any()
    for parent, action in reversed(walk):
        states = env.backstep(states, action)
        assert_close(states, parent)
    assert env.is_initial(states).all()


@given(generator=generators(), seed=seeds, ordered=st.booleans())
def test_forward_and_backward_drawing_give_the_same_trajectories_their_probability(
    generator: torch.Generator, seed: int, *, ordered: bool
) -> None:
    env = TREE if ordered else ENV
    forward = TabularPolicy(env, spread=2.0, seed=seed)
    drawn = sample_trajectories(env, forward, uniform_policy(env.n_actions, torch.float64), 30, generator)
    traced = trace_back(env, forward, uniform_policy(env.n_actions, torch.float64), drawn.terminal_states, generator)
    assert env.is_terminal(drawn.terminal_states).all()
    n_steps = drawn.terminal_states.sum(dim=-1)  # one per atom and the exit
    padding = torch.arange(int(n_steps.max())) >= n_steps[:, None]
    for each in (drawn, traced):
        assert each.log_pf.isfinite().all()
        assert each.log_pb.isfinite().all()
        assert (each.log_pf[padding] == 0).all()
        assert (each.log_pb[padding] == 0).all()
        if ordered:  # a terminal of a tree has one trajectory
            number = torch.zeros(env.n_indices, dtype=torch.float64)
            number[env.index(env.terminal_states())] = env.exact_log_prob(forward)
            assert_close(each.log_pf.sum(dim=-1).detach(), number[env.index(drawn.terminal_states)])
            assert (each.log_pb == 0).all()


def test_exploration_reaches_what_the_policy_avoids_and_reports_the_policy_itself() -> None:
    forward, backward = TabularPolicy(TREE), uniform_policy(TREE.n_actions, torch.float64)
    with torch.no_grad():
        forward.table[:, 0] = 40.0  # never anything but the first element
    bold = sample_trajectories(TREE, forward, backward, 2000, torch.Generator().manual_seed(0), epsilon=0.5)
    shy = sample_trajectories(TREE, forward, backward, 2000, torch.Generator().manual_seed(0))
    assert (shy.terminal_states[:, 1:-1] == 0).all()
    others = (bold.terminal_states[:, 1:-1] > 0).any(dim=-1)
    assert others.any()
    assert (bold.log_pf[others].sum(dim=-1) < -39.0).all()


@pytest.mark.parametrize("env", [ENV, TREE], ids=["dag", "tree"])
def test_the_terminal_probabilities_of_any_policy_add_up_to_one(env: CompositionEnv) -> None:
    log_prob = env.exact_log_prob(TabularPolicy(env, spread=3.0))
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert len(log_prob) == math.comb(3 + 4, 3) - 1


def test_drawn_terminals_follow_the_enumerated_probabilities() -> None:
    forward, n = TabularPolicy(ENV, spread=1.0), 50_000
    drawn = sample_trajectories(ENV, forward, uniform_policy(ENV.n_actions), n, torch.Generator().manual_seed(0))
    counts = torch.bincount(ENV.index(drawn.terminal_states), minlength=ENV.n_indices)[ENV.index(ENV.terminal_states())]
    expected = n * ENV.exact_log_prob(forward).exp()
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert counts.sum() == n
    assert chi_square < 33 + 6 * math.sqrt(2 * 33)  # 33 degrees of freedom, six standard deviations


@pytest.mark.parametrize("learned", [False, True], ids=["uniform", "learned"])
def test_the_estimate_of_a_log_probability_agrees_with_enumeration(learned: bool) -> None:
    forward = TabularPolicy(ENV, spread=1.0)
    backward = TabularPolicy(ENV, spread=0.5, seed=1) if learned else uniform_policy(ENV.n_actions, torch.float64)
    generator, terminals = torch.Generator().manual_seed(0), ENV.terminal_states()
    estimate, error = estimate_log_prob(ENV, forward, backward, terminals, generator, n_trajectories=8000)
    deviation = (estimate.exp() / ENV.exact_log_prob(forward).exp() - 1).abs()
    assert error.max() < 0.05
    assert (deviation <= 5 * error + 1e-12).all()


# Training: log-reward 8 nats deep with two peaks; the untrained total variation is 0.49.


@pytest.mark.parametrize("variance", [False, True], ids=["learned_log_Z", "log_partition_variance"])
@pytest.mark.parametrize("learned", [False, True], ids=["uniform_backward", "learned_backward"])
def test_a_tabular_policy_reaches_the_reward_distribution(learned: bool, variance: bool) -> None:
    forward = TabularPolicy(ENV)
    backward = TabularPolicy(ENV) if learned else uniform_policy(ENV.n_actions, torch.float64)
    assert _total_variation(ENV, forward) > 0.4
    log_Z = _train(ENV, forward, backward, variance=variance, n_steps=400, learning_rate=0.1)
    assert _total_variation(ENV, forward) < 0.002
    assert log_Z == pytest.approx(_log_partition(ENV), abs=0.002)
    if isinstance(backward, TabularPolicy):
        assert backward.table.abs().max() > 0.1  # it did learn


def test_a_tabular_policy_on_a_tree_reaches_the_reward_distribution() -> None:
    forward = TabularPolicy(TREE)
    no_choice = uniform_policy(TREE.n_actions, torch.float64)
    log_Z = _train(TREE, forward, no_choice, variance=True, n_steps=300, learning_rate=0.1)
    assert _total_variation(TREE, forward) < 0.001
    assert log_Z == pytest.approx(_log_partition(TREE), abs=0.002)


@pytest.mark.parametrize("variance", [False, True], ids=["learned_log_Z", "log_partition_variance"])
@pytest.mark.parametrize("learned", [False, True], ids=["uniform_backward", "learned_backward"])
def test_a_network_policy_comes_close_to_the_reward_distribution(learned: bool, variance: bool) -> None:
    forward = NetworkPolicy(ENV)
    backward = NetworkPolicy(ENV, seed=1) if learned else uniform_policy(ENV.n_actions)
    log_Z = _train(ENV, forward, backward, variance=variance, n_steps=600, learning_rate=1e-2)
    assert _total_variation(ENV, forward) < 0.015
    assert log_Z == pytest.approx(_log_partition(ENV), abs=0.02)


def test_flows_match_after_training_so_the_estimate_has_no_spread() -> None:
    forward, backward = TabularPolicy(ENV), TabularPolicy(ENV)
    _train(ENV, forward, backward, variance=True, n_steps=400, learning_rate=0.1)
    terminals = ENV.terminal_states()
    estimate, error = estimate_log_prob(ENV, forward, backward, terminals, torch.Generator().manual_seed(0))
    likely = _log_reward(terminals).softmax(dim=0) > 1e-3
    assert error[likely].max() < 0.01
    assert_close(estimate[likely], (_log_reward(terminals) - _log_partition(ENV))[likely], rtol=0, atol=0.02)


def test_replayed_terminals_alone_train_the_policy_and_its_average() -> None:
    """Off-policy: every trajectory is traced back from a replayed terminal, none is drawn from the policy."""
    generator, terminals = torch.Generator().manual_seed(0), ENV.terminal_states()
    forward, backward = TabularPolicy(ENV), uniform_policy(ENV.n_actions, torch.float64)
    average, buffer = ExponentialMovingAverage(forward, decay=0.98), ReplayBuffer(capacity=100)
    log_reward = _log_reward(terminals)
    buffer.add(ENV.index(terminals), {"state": terminals}, log_reward, torch.ones_like(log_reward))
    n_steps = 400
    optimiser = torch.optim.Adam(forward.parameters(), lr=0.1, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    for _ in range(n_steps):
        replayed = buffer.sample(60, generator)
        drawn = trace_back(ENV, forward, backward, replayed.rows["state"], generator)
        loss, log_Z = log_partition_variance_loss(drawn.log_pf, drawn.log_pb, replayed.log_reward)
        residual = trajectory_balance_residual(log_Z, drawn.log_pf, drawn.log_pb, replayed.log_reward)
        buffer.add(replayed.keys, replayed.rows, replayed.log_reward, residual)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        average.update()
    with average.swapped_in():
        assert _total_variation(ENV, forward) < 0.005
