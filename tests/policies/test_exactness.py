"""On spaces that can be listed, probabilities sum to one and trained policies reach R / Z."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from envs import lattice
from envs.conventions import LATTICE_SYSTEMS
from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv, Stage
from envs.enumerate import enumerate_crystals
from envs.lattice import ANGLE_MARGIN, Box
from envs.restrictions import Space, crystal_gfn_space, mp20_space
from envs.symmetry import SYMMETRY
from policies.losses import log_partition_variance_loss
from policies.policy import CrystalPolicy, Exploration, PolicyChooser, PolicyConfig
from policies.rollout import rollout, walk
from tests.policies.exact import CUBIC, ExactTarget, TabularPolicy

SMALL = replace(mp20_space(), max_count=5, n_atoms=(1, 5), n_elements=(1, 3))
TIES = ("H", "Ru", "Pt", "C", "Se")  # electronegativities tie within (H, Ru, Pt) and within (C, Se)

SPACES: dict[str, Space] = {
    "cubic": CUBIC,
    "several systems": replace(SMALL, elements=("Li", "Fe", "O"), space_groups=(14, 62, 123, 166, 194, 225)),
    "ties": replace(SMALL, elements=TIES, space_groups=(47, 216), n_atoms=(1, 3), max_count=3),
    "without letters": replace(SMALL, elements=TIES, wyckoff=False, space_groups=(1, 47, 225)),
    "no charge rule": replace(
        SMALL, elements=("Li", "Fe", "O"), chemistry="any", space_groups=(139, 225), n_atoms=(1, 4)
    ),
    "mixed valence, required": replace(
        SMALL, elements=("Li", "Fe", "O"), mixed_valence=True, required=("Fe",), space_groups=(2, 123), n_atoms=(1, 7),
        max_count=4, wyckoff=False,
    ),
    "conventional cell": replace(crystal_gfn_space(), n_atoms=(1, 12), n_elements=(1, 2), space_groups=(12, 139, 225)),
}  # fmt: skip


def network(env: CrystalEnv, seed: int = 0, *, spread: float = 0.0, width: int = 32, depth: int = 2) -> CrystalPolicy:
    """Return a float64 policy; ``spread`` takes its heads far away from uniform."""
    torch.manual_seed(seed)
    policy = CrystalPolicy(PolicyConfig.for_env(env, width=width, depth=depth)).double()
    if spread:
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(spread * torch.randn(parameter.shape, dtype=parameter.dtype))
    return policy


@pytest.mark.parametrize("name", SPACES)
def test_probabilities_of_all_leaves_sum_to_one(name: str) -> None:
    env = CrystalEnv(SPACES[name])
    leaves = enumerate_crystals(env)
    trajectories = walk(env, leaves)
    assert bool(trajectories.legal.all())
    records = {stage: record for stage, record in trajectories.records.items() if stage != Stage.LATTICE}
    with torch.no_grad():
        log_p = network(env, spread=0.2).log_prob(records, len(leaves))
    assert len(leaves) > 50
    assert bool(log_p.isfinite().all())
    assert float(log_p.max() - log_p.min()) > 5.0  # far from uniform
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-6)


def test_drawn_leaves_have_their_exact_frequencies() -> None:
    target = ExactTarget.build(CUBIC)
    policy, n = network(target.env, spread=0.05), 20_000
    with torch.no_grad():
        p = policy.log_prob(target.records, len(target.leaves)).exp()
        drawn = rollout(target.env, n, PolicyChooser(policy, torch.Generator().manual_seed(1)), record=False)
    found = torch.bincount(target.leaf_of(target.env.crystals(drawn.states)), minlength=len(p))
    frequent = p > 5.0 / n
    deviation = (found - n * p)[frequent] / (n * p * (1 - p))[frequent].sqrt()
    assert float(deviation.abs().max()) < 5.0
    assert float(deviation.square().mean()) == pytest.approx(1.0, abs=5 * math.sqrt(2 / int(frequent.sum())))


def train_on_leaves(target: ExactTarget, policy: CrystalPolicy, *, n_steps: int) -> float:
    """Minimise the log-partition variance over all leaves at once and return log Z without the lattice."""
    n, log_pb = len(target.leaves), target.log_pb(target.leaves)
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    log_Z = torch.zeros(1)
    for _ in range(n_steps):
        loss, log_Z = log_partition_variance_loss(policy.log_prob(target.records, n), log_pb, target.log_rewards)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return float(log_Z)


@pytest.mark.parametrize(
    "space",
    [
        # Of two elements, for fewer states.
        replace(CUBIC, n_elements=(2, 2), n_atoms=(1, 6), max_count=6),
        replace(CUBIC, wyckoff=False, elements=("Li", "Ti", "H", "O"), n_atoms=(1, 6), max_count=6),
    ],
    ids=["letters", "without letters"],
)
def test_a_tabular_policy_reaches_the_target_and_its_partition_function(space: Space) -> None:
    target = ExactTarget.build(space)
    policy = TabularPolicy(PolicyConfig.for_env(target.env, width=8), target.records)
    assert target.total_variation(policy) > 0.3
    log_Z = train_on_leaves(target, policy, n_steps=150)
    assert target.total_variation(policy) < 0.005
    assert log_Z == pytest.approx(target.log_Z_without_lattice, abs=0.005)


def test_images_of_a_crystal_share_one_reward() -> None:
    target = ExactTarget.build(replace(CUBIC, n_elements=(2, 2)))
    policy = TabularPolicy(PolicyConfig.for_env(target.env, width=8), target.records)
    train_on_leaves(target, policy, n_steps=150)
    with torch.no_grad():
        p = policy.log_prob(target.records, len(target.leaves)).exp()
    crystals = target.crystal.unique()
    assert len(crystals) < len(target.leaves) / 2
    per_crystal = torch.zeros(len(p), dtype=torch.float64).index_add(0, target.crystal, p)[crystals]
    wanted = target.log_rewards[crystals].softmax(dim=0)  # one R per crystal, however many letter assignments it has
    assert 0.5 * float((per_crystal - wanted).abs().sum()) < 0.005


@pytest.mark.slow
def test_the_network_policy_approaches_the_target_on_its_own_samples() -> None:
    target = ExactTarget.build(CUBIC, smooth=True)
    policy = network(target.env, width=128, depth=3).float()
    n, n_steps, generator = 256, 250, torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps, eta_min=2e-4)
    estimates = []
    for _ in range(n_steps):
        with torch.no_grad():
            drawn = rollout(target.env, n, PolicyChooser(policy, generator, Exploration(epsilon=0.05)))
        crystals = target.env.crystals(drawn.states)
        loss, log_Z = log_partition_variance_loss(
            policy.log_prob(drawn.records, n), target.log_pb(crystals), target.log_reward(crystals)
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimiser.step()
        schedule.step()
        estimates.append(float(log_Z))
    assert target.total_variation(policy) < 0.06
    assert sum(estimates[-20:]) / 20 == pytest.approx(target.log_Z, abs=0.02)


# --- lattices -------------------------------------------------------------------------------------


def one_leaf(space_group: int, box: Box) -> CrystalEnv:
    """Return an environment of Li2O cells on general letters that differ by their lattice only."""
    space = replace(
        mp20_space(),
        elements=("Li", "O"),
        counts=(("Li", (2,)), ("O", (1,))),
        max_count=2,
        n_atoms=(3, 3),
        n_elements=(2, 2),
        wyckoff=False,
        space_groups=(space_group,),
        box=box,
    )
    return CrystalEnv(space)


def with_unit_lattices(env: CrystalEnv, unit: Tensor) -> CrystalBatch:
    """Return the only leaf of ``env`` with lattices at unit coordinates (n, n_free)."""
    leaf = enumerate_crystals(env)
    assert len(leaf) == 1
    system = SYMMETRY.lattice_system[leaf.space_group - 1]
    free = [c for c in lattice.STEPS[int(system)].tolist() if c >= 0]
    ranges = env.ranges[system][0]
    values = ranges[:, 0].expand(len(unit), -1).clone()
    values[:, free] = ranges[free, 0] + unit * (ranges[free, 1] - ranges[free, 0])
    log_reference = leaf.volume.log() - lattice.coordinates(leaf.lattice_parameters, torch.zeros(1))[:, lattice.VOLUME]
    log_reference = log_reference + walk(env, leaf).states.log_reference - log_reference
    leaves = leaf.select([0] * len(unit))
    return replace(leaves, lattice_parameters=lattice.lattice_parameters(values, log_reference.expand(len(unit))))


def lattice_density(env: CrystalEnv, policy: CrystalPolicy, crystals: CrystalBatch) -> Tensor:
    """Return (n,) density of each lattice in unit coordinates; zero where the environment has none."""
    trajectories = walk(env, crystals)
    records = {Stage.LATTICE: trajectories.records[Stage.LATTICE]}
    with torch.no_grad():
        density = policy.log_prob(records, len(crystals)).exp()
    return torch.where(trajectories.legal, density, 0.0)


BOUNDED = replace(mp20_space().box, length=(3.0, 6.0), volume_factor=(0.3, 3.0))


def test_the_density_of_one_coordinate_integrates_to_one_and_matches_the_samples() -> None:
    env = one_leaf(225, BOUNDED)
    policy = network(env, seed=3, spread=0.3)
    low, high = walk(env, enumerate_crystals(env)).records[Stage.LATTICE].interval[0].tolist()
    nodes = low + (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * (high - low)
    density = lattice_density(env, policy, with_unit_lattices(env, nodes[:, None]))
    assert float(density.mean()) * (high - low) == pytest.approx(1.0, abs=1e-3)
    n = 4000
    with torch.no_grad():
        drawn = rollout(env, n, PolicyChooser(policy, torch.Generator().manual_seed(0)))
    unit = drawn.records[Stage.LATTICE].unit.sort().values
    below = torch.searchsorted(nodes, unit).clamp(max=len(nodes) - 1)
    cdf = (density.cumsum(dim=0) / density.sum())[below]
    statistic = float((cdf - (torch.arange(n) + 0.5) / n).abs().max())
    assert statistic < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, one in a thousand


@pytest.mark.parametrize("space_group", [139, 191])
def test_the_density_of_two_coordinates_integrates_to_one(space_group: int) -> None:
    env = one_leaf(space_group, BOUNDED)
    policy, m = network(env, seed=4, spread=0.2), 100
    axis = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    low, high = walk(env, enumerate_crystals(env)).records[Stage.LATTICE].interval[0].tolist()
    volume = low + axis * (high - low)
    # Bounds on lengths make the interval of c/a depend on the volume; walks record it before they use it.
    record = walk(env, with_unit_lattices(env, torch.stack([volume, axis], dim=1))).records[Stage.LATTICE]
    ratio_low, ratio_high = record.interval[record.action == lattice.RATIO_C].unbind(dim=1)
    widths = ratio_high - ratio_low
    assert float(widths.max() / widths.min()) > 3.0
    ratio = ratio_low[:, None] + axis * widths[:, None]
    grid = torch.stack([volume[:, None].expand(m, m), ratio], dim=-1).flatten(0, 1)
    density = lattice_density(env, policy, with_unit_lattices(env, grid)).view(m, m)
    assert bool((density > 0).all())
    assert_close(
        (density.mean(dim=1) * widths).mean() * (high - low), torch.ones((), dtype=torch.float64), rtol=0, atol=2e-3
    )


#: Volume of the allowed region in free lengths (Å) and angles (degrees) with lengths from 4 to 8 Å.
REGIONS = {225: 4.0, 139: 4.0**2, 166: 4.0**2, 191: 4.0**2, 47: 4.0**3, 12: 4.0**3 * 45.0, 1: None}


def triclinic_volume(box: Box) -> float:
    """Return the volume of angles that close a cell, in cubic degrees, by counting a fine grid."""
    low, high = box.triclinic_angle
    axis = low + (high - low) * (torch.arange(120, dtype=torch.float64) + 0.5) / 120
    alpha, beta, gamma = torch.cartesian_prod(axis, axis, axis).unbind(dim=1)
    room = torch.minimum(gamma - (alpha - beta).abs(), torch.minimum(alpha + beta, 360 - alpha - beta) - gamma)
    return float((room > ANGLE_MARGIN).double().mean()) * (high - low) ** 3


@pytest.mark.parametrize("space_group", REGIONS)
def test_jacobian_intervals_and_densities_together_measure_lengths_and_angles(space_group: int) -> None:
    # E[J / p] over samples of any policy is the volume of the region, and J / p weights make lengths uniform.
    box = replace(mp20_space().box, length=(4.0, 8.0), volume_factor=(1e-3, 1e3))
    env = one_leaf(space_group, box)
    policy, n = network(env, seed=5), 20_000
    with torch.no_grad():
        drawn = rollout(env, n, PolicyChooser(policy, torch.Generator().manual_seed(2)))
        log_p = policy.log_prob({Stage.LATTICE: drawn.records[Stage.LATTICE]}, n)
    crystals = env.crystals(drawn.states)
    system = SYMMETRY.lattice_system[crystals.space_group - 1]
    weight = (lattice.log_jacobian(crystals.lattice_parameters, system, box) - log_p).exp()
    lengths = crystals.lattice_parameters[:, :3]
    volume = REGIONS[space_group] or 4.0**3 * triclinic_volume(box)
    # Triclinic and monoclinic axes are bounded by their ratios as well: count what the cube of lengths loses.
    cube = 4.0 + 4.0 * torch.rand(200_000, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ratios = (cube[:, 1:] / cube[:, :1]).log()
    bounds = box.ranges()[system[0], lattice.RATIO_B :]
    inside = ((ratios >= bounds[:, 0]) & (ratios <= bounds[:, 1])).all(dim=1)
    name = LATTICE_SYSTEMS[int(system[0])]
    volume *= float(inside.double().mean()) if name == "triclinic" else 1.0
    error = float(weight.std()) / math.sqrt(n)
    assert error < 0.1 * volume
    assert float(weight.mean()) == pytest.approx(volume, abs=5 * error + 0.01 * volume)
    if name != "triclinic":
        for column in (0, 2):
            share = (weight[:, None] * (lengths[:, column, None] < torch.tensor([5.0, 6.0, 7.0]))).sum(0) / weight.sum()
            effective = float(weight.sum() ** 2 / weight.square().sum())
            expected = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
            # Five standard deviations of a weighted share at its widest.
            assert_close(share, expected, rtol=0, atol=5 * 0.5 / math.sqrt(effective))


@cache
def trained_on_lengths() -> Tensor:
    """Return edges (4000,) in Å of cubic cells from a policy trained on the measure of lengths and angles."""
    box = replace(mp20_space().box, length=(3.0, 6.0), volume_factor=(1e-3, 1e3))
    env = one_leaf(225, box)
    policy, generator, n_steps = network(env), torch.Generator().manual_seed(0), 200
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    nothing = torch.zeros(256, dtype=torch.float64)
    for _ in range(n_steps):
        with torch.no_grad():
            drawn = rollout(env, 256, PolicyChooser(policy, generator, Exploration(epsilon=0.2)))
        crystals = env.crystals(drawn.states)
        system = SYMMETRY.lattice_system[crystals.space_group - 1]
        log_measure = lattice.log_jacobian(crystals.lattice_parameters, system, box)
        loss, _ = log_partition_variance_loss(policy.log_prob(drawn.records, 256), nothing, log_measure)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        sampled = rollout(env, 4000, PolicyChooser(policy, generator), record=False)
    return env.crystals(sampled.states).lattice_parameters[:, 0]


def test_training_on_the_measure_of_lengths_makes_lengths_uniform() -> None:
    edges = trained_on_lengths().sort().values
    cdf = (edges - 3.0) / 3.0
    statistic = float((cdf - (torch.arange(len(edges)) + 0.5) / len(edges)).abs().max())
    assert statistic < 0.03  # 0.031 is one in a thousand for exact samples; in volume the same cells are at 0.19
