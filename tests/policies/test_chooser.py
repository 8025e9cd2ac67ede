"""Tests of drawing with a policy: what it adds up while it draws is what its records say afterwards."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from envs.crystal_env import CrystalEnv
from envs.restrictions import SPACES, Restrictions, restrict
from policies.policy import CrystalPolicy, Exploration, PolicyChooser, PolicyConfig
from policies.rollout import rollout

N = 200


@pytest.fixture(scope="module", params=["crystal_gfn", "mp20"])
def env(request: pytest.FixtureRequest) -> CrystalEnv:
    return CrystalEnv(restrict(SPACES[request.param](), Restrictions()))


@pytest.fixture(params=[0, 2], ids=["plain", "with charges"])
def policy(env: CrystalEnv, request: pytest.FixtureRequest) -> CrystalPolicy:
    torch.manual_seed(0)
    charges = torch.randint(-3, 5, (request.param, env.n_elements)).tolist()
    policy = CrystalPolicy(replace(PolicyConfig.for_env(env, width=32), assignments=charges))
    with torch.no_grad():  # far from uniform, so that a wrong action or row shows
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy.double()


@pytest.mark.parametrize("exploration", [Exploration(), Exploration(epsilon=0.3, temperature=1.5)])
def test_kept_log_probabilities_and_their_gradients_equal_those_of_the_records(
    env: CrystalEnv, policy: CrystalPolicy, exploration: Exploration
) -> None:
    chooser = PolicyChooser(policy, torch.Generator().manual_seed(1), exploration, keep_log_prob=True)
    walks = rollout(env, N, chooser)
    kept, again = chooser.log_prob(N), policy.log_prob(walks.records, N)
    assert bool(walks.legal.all())
    assert_close(kept, again, rtol=1e-9, atol=1e-9)
    assert float(kept.detach().std()) > 1.0
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    names = [name for name, _ in policy.named_parameters()]
    first, second = (
        torch.autograd.grad((part * weights).sum(), list(policy.parameters()), allow_unused=True)
        for part in (kept, again)
    )
    for name, one, other in zip(names, first, second, strict=True):
        empty = [part is None or not part.any() for part in (one, other)]
        assert empty[0] == empty[1], name
        if not empty[0]:
            assert_close(one, other, rtol=1e-7, atol=1e-7, msg=name)


def test_drawing_without_keeping_gives_the_same_walks(env: CrystalEnv, policy: CrystalPolicy) -> None:
    first, second = (
        rollout(env, N, PolicyChooser(policy, torch.Generator().manual_seed(1), keep_log_prob=keep), record=keep)
        for keep in (True, False)
    )
    assert_close(first.states.orbit_element, second.states.orbit_element)
    assert_close(first.states.values, second.states.values, rtol=0.0, atol=0.0)
    assert not second.records
