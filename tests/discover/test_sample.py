"""Restricted sampling against exact enumeration: what masking alone gets wrong, resampling mends."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from discover.candidates import crystal_keys
from discover.sample import WeightedSample, draw_weighted, next_folder, resample
from discover.target import SamplingTarget
from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv
from envs.enumerate import enumerate_crystals
from envs.restrictions import Restrictions, mp20_space, restrict
from policies.policy import CrystalPolicy, PolicyConfig


class RewardOfComposition:
    """A reward that depends on composition and space group alone, so that its normaliser can be enumerated."""

    def log_reward(self, crystals: CrystalBatch) -> Tensor:
        return torch.sin(3.0 * crystals.composition.double() @ torch.arange(119.0).double().sqrt()) + (
            crystals.space_group % 3
        )


def restricted_env() -> CrystalEnv:
    space = replace(mp20_space(), wyckoff=False, n_atoms=(1, 6))
    asked = Restrictions(elements=["Li", "Fe", "O"], space_groups=[195, 221, 225], n_elements=[2, 3])
    return CrystalEnv(restrict(space, asked))


def shares_by_crystal(sample: WeightedSample, keys: dict[tuple[int, ...], int]) -> Tensor:
    rows = torch.tensor([keys[key] for key in crystal_keys(sample.crystals)])
    return torch.bincount(rows, minlength=len(keys)).double() / len(rows)


def test_resampling_gives_the_conditional_distribution_of_the_reward() -> None:
    env = restricted_env()
    target = SamplingTarget(RewardOfComposition(), None, 0.0, lengths_angles=False, box=env.space.box)
    torch.manual_seed(1)
    policy = CrystalPolicy(PolicyConfig.for_env(env, width=32, depth=2))
    with torch.no_grad():  # far from uniform, so that masking alone is visibly wrong
        policy.group_head.bias.normal_(std=1.0)
        policy.element_head.bias.normal_(std=1.0)
    leaves = enumerate_crystals(env)
    keys = {key: index for index, key in enumerate(crystal_keys(leaves))}
    exact = torch.softmax(target.reward.log_reward(leaves), dim=0)
    parts = SimpleNamespace(env=env, policy=policy, target=target)
    generator = torch.Generator().manual_seed(0)
    drawn = draw_weighted(parts, 40_000, generator, show=False)
    masked = 0.5 * float((shares_by_crystal(drawn, keys) - exact).abs().sum())
    corrected = resample(drawn, 20_000, generator)
    mended = 0.5 * float((shares_by_crystal(corrected, keys) - exact).abs().sum())
    # An exact sample of this size has a total variation of about sqrt(leaves / (2 π n_effective)).
    n_effective = drawn.effective_share * len(drawn.log_weight)
    noise = (len(keys) / (2 * torch.pi * n_effective)) ** 0.5
    assert masked > 0.2
    assert mended < 2.0 * noise < 0.1


def test_the_effective_share_is_one_for_equal_weights_and_small_for_one_heavy_row() -> None:
    crystals = enumerate_crystals(restricted_env()).select(range(10))
    flat = WeightedSample(crystals, torch.zeros(10), torch.zeros(10))
    heavy = WeightedSample(crystals, torch.zeros(10), torch.tensor([50.0] + [0.0] * 9))
    assert flat.effective_share == 1.0
    assert abs(heavy.effective_share - 0.1) < 1e-6


def test_samples_are_numbered_after_the_last_one(tmp_path: Path) -> None:
    assert next_folder(tmp_path).name == "001"
    for name in ("002", "mine"):
        (tmp_path / name).mkdir()
    assert next_folder(tmp_path).name == "003"
