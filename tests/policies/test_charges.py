"""A policy with assignments of oxidation states knows what charges add up to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from envs.crystal_env import CrystalEnv, Stage
from policies.policy import CrystalPolicy, PolicyChooser, PolicyConfig
from policies.pretrained import load_policy, prior_space, save_policy
from policies.rollout import rollout

SCALE = 20


@pytest.fixture(scope="module")
def env() -> CrystalEnv:
    return CrystalEnv(prior_space("any"))


@pytest.fixture
def policy(env: CrystalEnv) -> CrystalPolicy:
    torch.manual_seed(0)
    policy = CrystalPolicy(replace(PolicyConfig.for_env(env, width=16, depth=2), n_assignments=2))
    charges = torch.randint(-3, 6, (2, env.n_elements), generator=torch.Generator().manual_seed(3))
    policy.set_assignments(charges, SCALE)
    return policy


def test_total_charges_are_those_of_the_atoms_chosen_so_far(env: CrystalEnv, policy: CrystalPolicy) -> None:
    walks = rollout(env, 50, PolicyChooser(policy, torch.Generator().manual_seed(1)))
    expected = walks.states.counts @ policy.charges.long().t()
    assert torch.equal(policy.total_charges(walks.states.features), expected)
    assert expected.abs().max() > 20


def test_a_count_can_be_chosen_by_the_charge_that_it_leaves(env: CrystalEnv, policy: CrystalPolicy) -> None:
    """Two Al are +6: with neutral compositions favoured, three O follow."""
    symbols = [element.symbol for element in env.elements]
    aluminium, oxygen = symbols.index("Al"), symbols.index("O")
    charges = torch.zeros(2, env.n_elements)
    charges[1, aluminium], charges[1, oxygen] = 3, -2
    policy.set_assignments(charges, SCALE)
    with torch.no_grad():
        policy.balance.bias.view(2, -1)[1, policy.balance.bias.numel() // 4] = 30.0  # the middle: no charge
    features = torch.zeros(1, env.n_features)
    features[0, aluminium] = 2 / SCALE
    mask = torch.ones(1, env.max_count + 1, dtype=torch.bool)
    with torch.no_grad():
        count = policy.count(torch.zeros(1, 16), torch.tensor([oxygen]), features, mask)
    assert int(count.probs.argmax()) == 3
    assert float(count.probs.max()) > 0.99


def test_charges_reach_every_other_choice(env: CrystalEnv, policy: CrystalPolicy) -> None:
    walks = rollout(env, 50, PolicyChooser(policy, torch.Generator().manual_seed(1)))
    before = policy.log_prob(walks.records, walks.n)
    with torch.no_grad():
        policy.charge.weight.normal_()
    changed = (policy.log_prob(walks.records, walks.n) - before).abs() > 1e-3
    assert changed.double().mean() > 0.9
    assert Stage.COMPOSITION in walks.records


def test_assignments_are_saved_with_the_weights(policy: CrystalPolicy, tmp_path: Path) -> None:
    save_policy(tmp_path / "policy", policy)
    again = load_policy(tmp_path / "policy")
    assert again.config == policy.config
    assert torch.equal(again.charges, policy.charges)
    assert float(again.atoms_per_feature) == SCALE
