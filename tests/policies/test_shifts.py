"""A policy sees letters from one origin: crystals that differ by its shift look alike."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv, Stage
from envs.enumerate import enumerate_crystals
from envs.restrictions import Restrictions, mp20_space, restrict
from envs.symmetry import SYMMETRY
from policies.policy import CrystalPolicy, PolicyChooser, PolicyConfig
from policies.rollout import rollout, walk
from policies.trajectories import Trajectories
from tests.policies.exact import CUBIC


@pytest.fixture(scope="module")
def env() -> CrystalEnv:
    return CrystalEnv(replace(restrict(mp20_space(), Restrictions()), chemistry="any"))


@pytest.fixture(scope="module")
def policy(env: CrystalEnv) -> CrystalPolicy:
    torch.manual_seed(1)
    policy = CrystalPolicy(PolicyConfig.for_env(env, width=16, depth=2)).double()
    with torch.no_grad():
        for head in (
            policy.letter_head,
            policy.element_head,
            policy.letter_bias,
            policy.position_key,
            policy.lattice_head,
        ):
            nn.init.normal_(head.weight)
    return policy


def shifted(crystals: CrystalBatch, shift: Tensor) -> CrystalBatch:
    letters = SYMMETRY.shift_letters[crystals.space_group - 1, shift].long().gather(1, crystals.letters.clamp(min=0))
    return replace(crystals, letters=torch.where(crystals.letters >= 0, letters, -1))


@pytest.fixture(scope="module")
def crystals(env: CrystalEnv, policy: CrystalPolicy) -> CrystalBatch:
    """Crystals with one orbit for each of two or more elements: these are written in one order from every origin."""
    with torch.no_grad():
        drawn = env.crystals(rollout(env, 4000, PolicyChooser(policy, torch.Generator().manual_seed(0))).states)
    placed = drawn.counts > 0
    elements = [len({e for e in row if e}) for row in drawn.elements.tolist()]
    single = (placed.sum(dim=1) == torch.tensor(elements)) & (placed.sum(dim=1) > 1)
    return drawn.select(single.nonzero().flatten())


def test_shifts_of_a_group_compose_to_shifts_and_leave_every_kind_of_position_its_kind() -> None:
    for g, table in enumerate(SYMMETRY.shift_letters.tolist()):
        rows = {tuple(row) for row in table}
        assert tuple(range(27)) == tuple(table[0])
        assert {tuple(a[letter] for letter in b) for a in rows for b in rows} == rows
        for kind in (SYMMETRY.multiplicity[g].tolist(), SYMMETRY.n_free_coords[g].tolist()):
            assert all([kind[letter] for letter in row] == kind for row in rows)


def test_shifts_are_the_alternatives_with_their_axes_in_place() -> None:
    identity = torch.arange(3)
    for g in range(230):
        rows = range(int(SYMMETRY.n_alternatives[g]))
        stays = {
            tuple(SYMMETRY.alternative_letters[g, row].tolist())
            for row in rows
            if torch.equal(SYMMETRY.alternative_axes[g, row], identity)
        }
        assert {tuple(row) for row in SYMMETRY.shift_letters[g].tolist()} == stays


def letter_scores(policy: CrystalPolicy, walks: Trajectories) -> Tensor:
    """Return log p of the chosen letters were all 27 legal: what is legal depends on the order of letters as well."""
    record = walks.records[Stage.WYCKOFF]
    seen, everything = record.observation, torch.ones(len(record.action), 27, dtype=torch.bool)
    with torch.no_grad():
        return policy.letter(policy.encode(seen), seen.group, seen.shifts, everything).log_prob(record.action)


def test_a_crystal_looks_alike_from_every_origin_and_its_letters_score_the_same(
    env: CrystalEnv, policy: CrystalPolicy, crystals: CrystalBatch
) -> None:
    walks = walk(env, crystals)
    moved = torch.zeros(len(crystals), dtype=torch.bool)
    for shift in range(1, SYMMETRY.shift_letters.shape[1]):
        other = shifted(crystals, torch.full((len(crystals),), shift))
        moved |= (other.letters != crystals.letters).any(dim=1)
        others = walk(env, other)
        assert bool(others.legal.all())
        for stage, record in walks.records.items():
            assert torch.equal(others.records[stage].observation.dense, record.observation.dense)
        assert_close(letter_scores(policy, others), letter_scores(policy, walks))
    assert int(moved.sum()) > 30  # the letters do change


def test_the_two_ways_to_write_a_spinel_look_alike(env: CrystalEnv) -> None:
    """Al on 16d and Mg on 8a, or Al on 16c and Mg on 8b: both are seen as 16c and 8b. With 16d and 8b they differ."""
    letters = {"8a": 0, "8b": 1, "16c": 2, "16d": 3, "32e": 4}

    def seen(magnesium: str, aluminium: str) -> tuple[Tensor, Tensor]:
        spinel = CrystalBatch(
            space_group=torch.tensor([227]),
            elements=torch.tensor([[12, 13, 8]]),
            letters=torch.tensor([[letters[magnesium], letters[aluminium], letters["32e"]]]),
            counts=torch.tensor([[2, 4, 8]]),
            lattice_parameters=torch.tensor([[8.08, 8.08, 8.08, 90.0, 90.0, 90.0]], dtype=torch.float64),
        )
        walks = walk(env, spinel)
        assert bool(walks.legal.all())
        return walks.states.features, walks.records[Stage.WYCKOFF].observation.dense

    normal, by_another_origin, other = seen("8a", "16d"), seen("8b", "16c"), seen("8b", "16d")
    for state, same, different in zip(normal, by_another_origin, other, strict=True):
        assert torch.equal(state, same)
        assert not torch.equal(state, different)


def test_while_letters_are_chosen_no_two_states_look_alike() -> None:
    """Letters of an element come in their own order, which depends on the origin: the policy has to know it."""
    env = CrystalEnv(CUBIC)
    walks = walk(env, enumerate_crystals(env))
    record, states = walks.records[Stage.WYCKOFF], walks.states
    seen = record.observation
    parts = (seen.group, seen.element, seen.origin)
    visible = torch.cat([torch.stack(parts, dim=1).double(), seen.dense.double()], dim=1)
    n_orbits = [0] * walks.n
    identity = []
    for row, group, element in zip(record.walk.tolist(), seen.group.tolist(), seen.element.tolist(), strict=True):
        orbits = zip(states.orbit_element[row].tolist(), states.orbit_letter[row].tolist(), strict=True)
        written = tuple(orbits)[: n_orbits[row]]
        identity.append((group, written, element, int(states.counts[row, element])))
        n_orbits[row] += 1
    assert len(torch.unique(visible, dim=0)) == len(set(identity))
    blind = torch.cat([visible[:, :2], visible[:, 3:]], dim=1)
    assert len(torch.unique(blind, dim=0)) < len(set(identity))  # without the origin they would
