"""Weights shared between like elements while training, and folded into ordinary ones afterwards."""

import pytest
import torch

from envs.crystal_env import CrystalEnv
from policies.element_sharing import ordinary_weights, share_by_properties
from policies.policy import CrystalPolicy, PolicyChooser, PolicyConfig
from policies.pretrained import prior_space
from policies.rollout import rollout


@pytest.fixture(scope="module")
def env() -> CrystalEnv:
    return CrystalEnv(prior_space("any"))


def policy_of(env: CrystalEnv) -> CrystalPolicy:
    torch.manual_seed(0)
    return CrystalPolicy(PolicyConfig.for_env(env, width=16, depth=2))


def test_sharing_changes_nothing_at_first_and_its_folded_weights_are_the_same_function(env: CrystalEnv) -> None:
    shared, as_it_was = policy_of(env), policy_of(env)
    properties = torch.randn(env.n_elements, 5, generator=torch.Generator().manual_seed(1))
    share_by_properties(shared, properties)
    walks = rollout(env, 64, PolicyChooser(as_it_was, torch.Generator().manual_seed(2)))
    with torch.no_grad():
        before = as_it_was.log_prob(walks.records, walks.n)
        torch.testing.assert_close(shared.log_prob(walks.records, walks.n), before)
        for module in (shared.dense, shared.element, shared.element_head, shared.count_element):
            torch.nn.init.normal_(module.parametrizations.weight[0].map)
        after = shared.log_prob(walks.records, walks.n)
        assert (after - before).abs().min() > 1e-3
        as_it_was.load_state_dict(ordinary_weights(shared))
        torch.testing.assert_close(as_it_was.log_prob(walks.records, walks.n), after)


def test_elements_of_equal_properties_learn_alike_in_every_table(env: CrystalEnv) -> None:
    policy = policy_of(env)
    n = env.n_elements
    share_by_properties(policy, torch.eye(2).repeat(n, 1)[:n])
    # how the policy finds an element in each table: the last one chosen is one row further down, after "none yet"
    tables = ((policy.dense, 0, True), (policy.element, 1, False), (policy.element_head, 0, False))
    for module, first, by_column in (*tables, (policy.count_element, 0, False)):
        with torch.no_grad():
            module.parametrizations.weight[0].map.normal_()
            change = module.weight - module.parametrizations.weight.original
        change = change.t() if by_column else change
        elements = change[first : first + n]
        torch.testing.assert_close(elements[2:], elements[:-2])
        assert not torch.allclose(elements[0], elements[1])
        others = torch.cat([change[:first], change[first + n :]])
        assert len(others)
        assert not others.any()
