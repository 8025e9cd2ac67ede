"""Walks: every one ends in a valid crystal, and walking a crystal back gives the same decisions."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition
from pyxtal.symmetry import Group
from smact.screening import smact_validity
from torch.testing import assert_close

from envs.conventions import LATTICE_SYSTEMS
from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv, Stage
from envs.errors import RepresentationError, RestrictionError
from envs.lattice import VOLUME
from envs.restrictions import SPACES, Restrictions, mp20_space, restrict
from envs.symmetry import SYMMETRY
from policies.policy import CrystalPolicy, Exploration, PolicyChooser, PolicyConfig
from policies.rollout import rollout, walk
from policies.trajectories import Trajectories, merge
from tests.strategies import seeds

ELEMENTS = ("Li", "Na", "Mg", "Al", "Ti", "Fe", "Cu", "H", "C", "Si", "S", "Se", "Cl", "O", "F")


@cache
def environment(name: str) -> CrystalEnv:
    return CrystalEnv(restrict(SPACES[name](), Restrictions()))


def untrained(env: CrystalEnv, seed: int = 0) -> CrystalPolicy:
    torch.manual_seed(seed)
    return CrystalPolicy(PolicyConfig.for_env(env, width=32, depth=2)).double()


def draw(env: CrystalEnv, n: int, seed: int = 0, exploration: Exploration | None = None) -> Trajectories:
    with torch.no_grad():
        return rollout(env, n, PolicyChooser(untrained(env), torch.Generator().manual_seed(seed), exploration))


def assert_lattice_systems(crystals: CrystalBatch) -> None:
    lengths, angles = crystals.lattice_parameters[:, :3], crystals.lattice_parameters[:, 3:]
    system = SYMMETRY.lattice_system[crystals.space_group - 1]
    hexagonal = torch.tensor([name in ("trigonal", "rhombohedral", "hexagonal") for name in LATTICE_SYSTEMS])[system]
    cubic, tetragonal = system == LATTICE_SYSTEMS.index("cubic"), system == LATTICE_SYSTEMS.index("tetragonal")
    monoclinic, triclinic = system == LATTICE_SYSTEMS.index("monoclinic"), system == LATTICE_SYSTEMS.index("triclinic")
    assert_close(lengths[cubic | tetragonal | hexagonal, 0], lengths[cubic | tetragonal | hexagonal, 1])
    assert_close(lengths[cubic, 0], lengths[cubic, 2])
    right = ~(triclinic | monoclinic | hexagonal)
    assert bool((angles[right] == 90.0).all())
    assert bool((angles[hexagonal] == torch.tensor([90.0, 90.0, 120.0])).all())
    assert bool((angles[monoclinic][:, [0, 2]] == 90.0).all())
    assert bool(crystals.volume.isfinite().all())


def assert_compatible(crystals: CrystalBatch, groups: dict[int, Group]) -> None:
    """Assert that PyXtal can place every element's atoms on Wyckoff positions."""
    amounts = crystals.composition * crystals.centring[:, None]
    for number, row in zip(crystals.space_group.tolist(), amounts, strict=True):
        group = groups.setdefault(number, Group(number))
        compatible, _ = group.check_compatible(row[row > 0].tolist())
        assert compatible


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mp20", "crystal_gfn"])
def test_samples_of_the_untrained_policy_pass_independent_checks(name: str) -> None:
    trajectories = draw(environment(name), 2000)
    assert bool(trajectories.legal.all())
    crystals = environment(name).crystals(trajectories.states)
    for formula in set(crystals.formulas()):
        assert smact_validity(Composition(formula), use_pauling_test=True, include_alloys=False)
    assert_compatible(crystals, {})
    assert_lattice_systems(crystals)
    inside = (crystals.volume_per_atom > 2) & (crystals.volume_per_atom < 120)
    assert bool(inside.all())
    box = environment(name).space.box
    lengths = crystals.lattice_parameters[:, :3]
    assert bool(((lengths > box.length[0] * (1 - 1e-6)) & (lengths < box.length[1] * (1 + 1e-6))).all())


@pytest.mark.parametrize("name", ["mp20", "crystal_gfn"])
def test_walking_a_sampled_crystal_gives_its_decisions_and_probability(name: str) -> None:
    env = environment(name)
    policy, n = untrained(env), 300
    drawn = draw(env, n, exploration=Exploration(epsilon=0.3))
    crystals = env.crystals(drawn.states)
    again = walk(env, crystals)
    assert bool(again.legal.all())
    assert again.n_decisions == drawn.n_decisions
    with torch.no_grad():
        assert_close(policy.log_prob(again.records, n), policy.log_prob(drawn.records, n), rtol=1e-6, atol=1e-6)
    rebuilt = env.crystals(again.states)
    assert rebuilt.wyckoff_strings() == crystals.wyckoff_strings()
    assert rebuilt.formulas() == crystals.formulas()
    assert_close(rebuilt.lattice_parameters, crystals.lattice_parameters, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["mp20", "crystal_gfn"])
def test_a_policy_sees_the_same_features_under_a_restriction(name: str) -> None:
    env = environment(name)
    narrow = CrystalEnv(restrict(SPACES[name](), Restrictions(n_atoms=(2, 8), n_elements=(2, 3))))
    crystals = narrow.crystals(draw(narrow, 50).states)
    wide_records, narrow_records = walk(env, crystals).records, walk(narrow, crystals).records
    for stage, record in narrow_records.items():
        assert_close(record.observation.dense, wide_records[stage].observation.dense)


def test_the_order_of_orbits_does_not_matter_for_a_walk() -> None:
    env = environment("mp20")
    crystals = env.crystals(draw(env, 100).states)
    shuffled = replace(
        crystals,
        elements=crystals.elements.flip(1),
        letters=crystals.letters.flip(1),
        counts=crystals.counts.flip(1),
    )
    policy = untrained(env)
    with torch.no_grad():
        log_p, of_shuffled = (policy.log_prob(walk(env, batch).records, 100) for batch in (crystals, shuffled))
    assert_close(log_p, of_shuffled)


def test_the_same_seed_draws_the_same_crystals_with_and_without_records() -> None:
    env = environment("mp20")
    chooser = PolicyChooser(untrained(env), torch.Generator().manual_seed(3))
    with torch.no_grad():
        states = rollout(env, 50, chooser, record=False).states
    for name in ("group", "counts", "orbit_letter", "values"):
        assert_close(getattr(states, name), getattr(draw(env, 50, seed=3).states, name))


def test_log_probabilities_of_merged_batches_are_those_of_the_parts() -> None:
    env = environment("mp20")
    policy, parts = untrained(env), [draw(env, 20, seed=1), draw(env, 30, seed=2)]
    records, n = merge(parts)
    with torch.no_grad():
        separate = torch.cat([policy.log_prob(part.records, part.n) for part in parts])
        assert_close(policy.log_prob(records, n), separate)


def crystal(space_group: int, orbits: Sequence[tuple[int, int, int]], lattice: Sequence[float]) -> CrystalBatch:
    elements, letters, counts = (torch.tensor([column]) for column in zip(*orbits, strict=True))
    parameters = torch.tensor([lattice], dtype=torch.float64)
    return CrystalBatch(torch.tensor([space_group]), elements, letters, counts, parameters)


CUBE = [5.6, 5.6, 5.6, 90.0, 90.0, 90.0]
NA, CL, FE, TC = 11, 17, 26, 43
WALKS = [
    ("rock salt", crystal(225, [(NA, 0, 1), (CL, 1, 1)], CUBE), True),
    ("two elements on one fixed position", crystal(225, [(NA, 0, 1), (CL, 0, 1)], CUBE), False),
    ("one element twice on a fixed position", crystal(225, [(NA, 0, 1), (NA, 0, 1), (CL, 2, 2)], CUBE), False),
    ("a charge that does not vanish", crystal(225, [(NA, 0, 1), (CL, 2, 2)], CUBE), False),
    ("an alloy", crystal(221, [(NA, 0, 1), (FE, 1, 1)], CUBE), False),
    ("an excluded element", crystal(225, [(TC, 0, 1), (CL, 1, 1)], CUBE), False),
    ("counts that are not the letter's", crystal(225, [(NA, 0, 2), (CL, 1, 2)], CUBE), False),
    ("a cubic cell with an angle of its own", crystal(225, [(NA, 0, 1), (CL, 1, 1)], [*CUBE[:3], 88, 90, 90]), False),
    ("a cubic cell that is stretched", crystal(225, [(NA, 0, 1), (CL, 1, 1)], [5.5, 5.6, 5.7, 90, 90, 90]), False),
    ("rounding", crystal(225, [(NA, 0, 1), (CL, 1, 1)], [5.6001, 5.6, 5.6, 90.01, 90, 90]), True),
    ("a volume outside the box", crystal(225, [(NA, 0, 1), (CL, 1, 1)], [9.0, 9.0, 9.0, 90.0, 90.0, 90.0]), False),
]


@pytest.mark.parametrize(("name", "given_crystal", "is_legal"), WALKS, ids=[name for name, _, _ in WALKS])
def test_walks_of_crystals_outside_the_environment_are_marked(
    name: str, given_crystal: CrystalBatch, *, is_legal: bool
) -> None:
    env = environment("mp20")
    trajectories = walk(env, given_crystal)
    assert bool(trajectories.legal[0]) == is_legal, name
    if is_legal:
        assert env.crystals(trajectories.states).wyckoff_strings() == given_crystal.wyckoff_strings()


def test_extreme_scales_have_a_gradient() -> None:
    policy = untrained(environment("mp20"))
    hidden = torch.randn(4, policy.lattice_head.in_features, dtype=policy.lattice_head.weight.dtype, requires_grad=True)
    with torch.no_grad():
        policy.lattice_head.bias.fill_(1e4)
    unit = torch.tensor([[0.0, 1.0]]).expand(4, 2).double()
    density = policy.lattice(hidden, torch.full((4,), VOLUME), unit)
    density.log_prob(torch.full((4,), 0.5, dtype=hidden.dtype)).sum().backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())


def test_a_walk_with_letters_needs_letters() -> None:
    salt = crystal(225, [(NA, -1, 1), (CL, -1, 1)], CUBE)
    with pytest.raises(RepresentationError, match="without Wyckoff letters"):
        walk(environment("mp20"), salt)


@st.composite
def restrictions(draw: st.DrawFn) -> Restrictions:
    """Draw restrictions that may leave nothing."""

    def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
        return st.one_of(st.none(), strategy)

    low = draw(st.integers(1, 3))
    smallest = draw(st.integers(1, 8))
    return Restrictions(
        elements=draw(maybe(st.lists(st.sampled_from(ELEMENTS), min_size=3, max_size=8, unique=True))),
        required=draw(maybe(st.lists(st.sampled_from(("O", "Fe", "Se")), min_size=1, max_size=2, unique=True))),
        n_elements=draw(maybe(st.just((low, low + draw(st.integers(0, 2)))))),
        n_atoms=draw(maybe(st.just((smallest, smallest + draw(st.integers(0, 12)))))),
        max_atoms_per_element=draw(maybe(st.integers(1, 10))),
        crystal_systems=draw(maybe(st.lists(st.sampled_from(LATTICE_SYSTEMS), min_size=1, max_size=3))),
        length=draw(maybe(st.sampled_from([(2.0, 7.0), (4.0, 8.0), (10.0, 20.0)]))),
        angle=draw(maybe(st.sampled_from([(60.0, 120.0), (75.0, 135.0), (90.0, 90.0)]))),
        volume_per_atom=draw(maybe(st.sampled_from([(5.0, 60.0), (15.0, 25.0)]))),
    )


def assert_obeys(crystals: CrystalBatch, env: CrystalEnv, wanted: Restrictions) -> None:
    in_cell = crystals.composition * (crystals.centring[:, None] if env.space.conventional else 1)
    n_elements, n_atoms = (in_cell > 0).sum(dim=1), in_cell.sum(dim=1)
    for value, bounds in ((n_elements, wanted.n_elements), (n_atoms, wanted.n_atoms)):
        if bounds is not None:
            assert bool(((value >= bounds[0]) & (value <= bounds[1])).all())
    if wanted.max_atoms_per_element is not None:
        assert int(in_cell.max()) <= wanted.max_atoms_per_element
    systems = {name for formula in crystals.chemical_systems() for name in formula.split("-")}
    assert systems <= set(wanted.elements or env.space.elements)
    for formula in crystals.chemical_systems():
        assert set(wanted.required or ()) <= set(formula.split("-"))
    values = (
        (crystals.lattice_parameters[:, :3], wanted.length),
        (crystals.lattice_parameters[:, 3:], wanted.angle),
        (crystals.volume_per_atom[:, None], wanted.volume_per_atom),
    )
    for value, limits in values:
        if limits is not None:
            assert bool(((value >= limits[0] * (1 - 1e-6)) & (value <= limits[1] * (1 + 1e-6))).all())


@pytest.mark.slow
@settings(max_examples=15)
@given(
    wanted=restrictions(),
    name=st.sampled_from(["mp20", "crystal_gfn"]),
    chemistry=st.sampled_from(["ionic", "any"]),
    seed=seeds,
)
def test_no_restriction_leads_to_a_dead_end_and_every_sample_obeys(
    wanted: Restrictions, name: str, chemistry: str, seed: int
) -> None:
    try:
        env = CrystalEnv(replace(restrict(SPACES[name](), wanted), chemistry=chemistry))
    except RestrictionError:
        return
    trajectories = draw(env, 200, seed, Exploration(epsilon=0.5))
    assert bool(trajectories.legal.all())
    crystals = env.crystals(trajectories.states)
    assert_obeys(crystals, env, wanted)
    assert_lattice_systems(crystals)
    if chemistry == "ionic":
        for formula in set(crystals.formulas()[:40]):
            assert smact_validity(Composition(formula), use_pauling_test=True, include_alloys=False)


def test_right_angles_only_leave_monoclinic_cells_that_the_network_can_draw() -> None:
    # Their interval is narrower than float32 resolves.
    env = CrystalEnv(restrict(mp20_space(), Restrictions(angle=(90, 90), space_groups=[12, 14, 47])))
    torch.manual_seed(0)
    policy = CrystalPolicy(PolicyConfig.for_env(env, width=16, depth=1))
    with torch.no_grad():
        drawn = rollout(env, 200, PolicyChooser(policy, torch.Generator().manual_seed(0)))
        log_p = policy.log_prob(drawn.records, 200)
    angles = env.crystals(drawn.states).lattice_parameters[:, 3:]
    assert bool(log_p.isfinite().all())
    assert_close(angles, torch.full_like(angles, 90.0), rtol=0, atol=1e-6)
    assert Stage.LATTICE in drawn.records


def test_the_prior_knows_mixed_valence_where_the_run_allows_it() -> None:
    from policies.pretrained import UNREPRESENTABLE, load_prior  # noqa: PLC0415 - loads the shipped weights

    magnetite = CrystalBatch(
        space_group=torch.tensor([227]),
        elements=torch.tensor([[26, 26, 8]]),
        letters=torch.tensor([[0, 3, 4]]),
        counts=torch.tensor([[2, 4, 8]]),
        lattice_parameters=torch.tensor([[8.4, 8.4, 8.4, 90.0, 90.0, 90.0]], dtype=torch.float64),
    )
    assert float(load_prior("ionic", mixed_valence=True).log_prob(magnetite)) > UNREPRESENTABLE
    assert float(load_prior("ionic").log_prob(magnetite)) == UNREPRESENTABLE
