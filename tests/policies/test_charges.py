"""A policy with assignments of oxidation states knows what charges add up to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from envs.crystal_env import CrystalEnv, Observation
from policies.policy import CrystalPolicy, PolicyChooser, PolicyConfig
from policies.pretrained import load_policy, prior_space, save_policy
from policies.rollout import rollout

MOST = 20  # atoms, which an observation shows as 1


@pytest.fixture(scope="module")
def env() -> CrystalEnv:
    return CrystalEnv(prior_space("any"))


def policy_of(env: CrystalEnv, charges: list[list[int]]) -> CrystalPolicy:
    torch.manual_seed(0)
    return CrystalPolicy(replace(PolicyConfig.for_env(env, width=16, depth=2), assignments=charges))


@pytest.fixture(scope="module")
def policy(env: CrystalEnv) -> CrystalPolicy:
    return policy_of(
        env, torch.randint(-3, 6, (2, env.n_elements), generator=torch.Generator().manual_seed(3)).tolist()
    )


@pytest.fixture(scope="module")
def alumina(env: CrystalEnv) -> CrystalPolicy:
    """Its first assignment gives nothing a charge, its second Al3+ and O2-."""
    charges = [[0] * env.n_elements, [{"Al": 3, "O": -2}.get(element.symbol, 0) for element in env.elements]]
    return policy_of(env, charges)


def position(env: CrystalEnv, symbol: str) -> int:
    return [element.symbol for element in env.elements].index(symbol)


def features_of(env: CrystalEnv, **atoms: int) -> Tensor:
    features = torch.zeros(1, env.n_features)
    for symbol, count in atoms.items():
        features[0, position(env, symbol)] = count / MOST
    return features


def test_total_charges_are_those_of_the_atoms_chosen_so_far(env: CrystalEnv, policy: CrystalPolicy) -> None:
    walks = rollout(env, 50, PolicyChooser(policy, torch.Generator().manual_seed(1)))
    expected = walks.states.counts @ torch.tensor(policy.config.assignments).t()
    assert torch.equal(policy.total_charges(walks.states.features), expected)
    assert expected.abs().max() > 20


@torch.no_grad()
def test_a_count_can_be_chosen_by_the_charge_that_it_leaves(env: CrystalEnv, alumina: CrystalPolicy) -> None:
    """Two Al are +6: with neutral compositions favoured, three O follow."""
    scores = alumina.balance.bias.view(2, -1)
    scores[1, scores.shape[1] // 2] = 30.0  # the middle: no charge
    mask = torch.ones(1, env.max_count + 1, dtype=torch.bool)
    oxygen = torch.tensor([position(env, "O")])
    count = alumina.count(torch.zeros(1, 16), oxygen, features_of(env, Al=2), mask)
    assert int(count.probs.argmax()) == 3
    assert float(count.probs.max()) > 0.99
    scores.zero_()


@torch.no_grad()
def test_the_trunk_sees_the_total_and_nothing_else_of_charges(env: CrystalEnv, alumina: CrystalPolicy) -> None:
    """One row of the table changes what is encoded of a state whose total charge is that row's, and of no other."""

    def encoded(features: Tensor) -> Tensor:
        one = torch.ones(1, dtype=torch.int64)
        return alumina.encode(Observation(one, -one, one, one, one, one, one, features))

    states = [features_of(env, Al=2), features_of(env, Al=2, O=2), features_of(env, Al=4, O=5), features_of(env, Na=2)]
    before = [encoded(features) for features in states]
    rows = alumina.charge.weight.view(2, -1, 16)
    rows[1, 16 + 2] = 1.0  # the second assignment, a total of +2
    changed = [not torch.equal(encoded(features), old) for features, old in zip(states, before, strict=True)]
    assert changed == [False, True, True, False]
    rows.zero_()


def test_assignments_are_saved_with_the_weights(policy: CrystalPolicy, tmp_path: Path) -> None:
    save_policy(tmp_path / "policy", policy)
    again = load_policy(tmp_path / "policy")
    assert again.config == policy.config
    assert torch.equal(again.charges, policy.charges)
