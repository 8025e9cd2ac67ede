"""The composition-conditioned prior is an exact distribution, and its search finds what is most probable."""

import dataclasses
from pathlib import Path

import pytest
import torch

from envs.crystal import CrystalBatch
from envs.errors import RepresentationError
from envs.lattice import FIXED_ANGLES
from envs.symmetry import SYMMETRY
from policies.composition_network import CompositionNetwork, NetworkConfig
from policies.composition_prior import (
    SHIPPED,
    CompositionPrior,
    load_composition_prior,
    save_composition_prior,
)
from policies.errors import CheckpointError

SMALL = NetworkConfig(n_element_features=3, width=16, n_layers=1, n_heads=2, step_width=16, key_width=8)
PEROVSKITE = {"Sr": 1, "Ti": 1, "O": 3}
ROCK_SALT = {"Na": 1, "Cl": 1}
EVERYTHING = 10_000  # more than there are assignments of small compositions


def network(seed: int) -> CompositionNetwork:
    """Return an untrained network with scores far from uniform."""
    torch.manual_seed(seed)
    made = CompositionNetwork(SMALL, torch.randn(119, 3))
    with torch.no_grad():
        made.seen.fill_(value=True)
        made.group_bias.normal_(std=2.0)
        made.position_bias.weight.normal_(std=2.0)
    return made


@pytest.fixture(scope="module")
def prior() -> CompositionPrior:
    return CompositionPrior([network(0), network(1)])


def test_probabilities_of_all_crystals_of_a_composition_sum_to_one(prior: CompositionPrior) -> None:
    found = prior.propose([ROCK_SALT, {"Mg": 2}], EVERYTHING)
    total = torch.zeros(2, dtype=torch.float64).index_add(0, found.query, found.log_prob.exp())
    assert total.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)  # networks compute in float32


def test_log_prob_agrees_with_the_search(prior: CompositionPrior) -> None:
    found = prior.propose([ROCK_SALT], EVERYTHING)
    assert prior.log_prob(found.crystals).tolist() == pytest.approx(found.log_prob.tolist(), abs=1e-4)


def test_the_beam_finds_the_best_of_all_assignments(prior: CompositionPrior) -> None:
    everything = prior.propose([PEROVSKITE], EVERYTHING, space_groups=[99, 123, 221])
    best = prior.propose([PEROVSKITE], 10, space_groups=[99, 123, 221])
    assert len(best.query) == 10
    assert best.crystals.wyckoff_strings()[0] == everything.crystals.wyckoff_strings()[0]
    lost = everything.log_prob[:10] - best.log_prob
    assert (lost > -1e-5).all()  # the search never invents probability
    assert (lost < 0.5).all()  # a narrow beam misses improbable equivalents, which this network favours


def test_proposals_are_sorted_distinct_and_hold_the_composition(prior: CompositionPrior) -> None:
    found = prior.propose([PEROVSKITE, ROCK_SALT, PEROVSKITE], 30)
    assert torch.bincount(found.query).tolist() == [30, 30, 30]
    for query, amounts in enumerate([PEROVSKITE, ROCK_SALT, PEROVSKITE]):
        rows = (found.query == query).nonzero().flatten()
        crystals, log_prob = found.crystals.select(rows), found.log_prob[rows]
        assert (log_prob.diff() <= 0).all()
        names = list(zip(crystals.space_group.tolist(), crystals.wyckoff_strings(), strict=True))
        assert len(set(names)) == 30
        assert (crystals.n_atoms == sum(amounts.values())).all()
        assert len(set(crystals.formulas())) == 1
    assert found.log_prob[:30].tolist() == pytest.approx(found.log_prob[60:].tolist(), abs=1e-5)


def test_start_cells_obey_the_lattice_system(prior: CompositionPrior) -> None:
    crystals = prior.propose([PEROVSKITE], 100).crystals
    system = SYMMETRY.lattice_system[crystals.space_group - 1]
    rows = system >= 2  # orthorhombic and higher
    assert torch.equal(crystals.lattice_parameters[rows, 3:], FIXED_ANGLES[system[rows]])
    assert ((crystals.volume_per_atom > 1.0) & (crystals.volume_per_atom < 1000.0)).all()


def test_samples_follow_the_probabilities(prior: CompositionPrior) -> None:
    n = 4000
    drawn = prior.sample([ROCK_SALT], n, torch.Generator().manual_seed(0), space_groups=[221, 225])
    exact = prior.propose([ROCK_SALT], EVERYTHING, space_groups=[221, 225])
    share = (drawn.crystals.space_group == 221).double().mean()
    wanted = exact.log_prob[exact.crystals.space_group == 221].exp().sum()
    assert abs(float(share - wanted)) < 4 * 0.5 / n**0.5  # four standard errors of a share


def test_sampling_repeats_itself_with_the_same_seed(prior: CompositionPrior) -> None:
    first, second = (prior.sample([PEROVSKITE], 20, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.crystals.wyckoff_strings() == second.crystals.wyckoff_strings()
    assert torch.equal(first.log_prob, second.log_prob)


def test_a_crystal_that_no_assignment_gives_has_no_probability(prior: CompositionPrior) -> None:
    twice = CrystalBatch(  # two atoms cannot share position a of Pm-3m
        torch.tensor([221]),
        torch.tensor([[11, 17]]),
        torch.tensor([[0, 0]]),
        torch.tensor([[1, 1]]),
        torch.tensor([[4.0, 4.0, 4.0, 90.0, 90.0, 90.0]], dtype=torch.float64),
    )
    assert prior.log_prob(twice).tolist() == [-torch.inf]
    more = dataclasses.replace(twice, letters=torch.tensor([[2, 1]]))  # three atoms on c, where one is counted
    assert prior.log_prob(more).tolist() == [-torch.inf]
    assert prior.log_prob(twice.select([])).tolist() == []
    with pytest.raises(RepresentationError, match="crystals without letters have no images, first row 0"):
        prior.log_prob(dataclasses.replace(twice, letters=torch.tensor([[-1, 1]])))


def test_an_impossible_space_group_is_refused_with_those_that_are_possible(prior: CompositionPrior) -> None:
    with pytest.raises(RepresentationError, match=r"cannot be placed in space groups \[227\]; possible are \[1,"):
        prior.propose([ROCK_SALT, {"Na": 1, "Cl": 2, "K": 1}], 5, space_groups=[227])


def test_a_composition_larger_than_any_in_training_works_with_a_warning(prior: CompositionPrior) -> None:
    with pytest.warns(UserWarning, match="30 atoms per primitive cell"):
        found = prior.propose([{"Al": 12, "O": 18}], 3, space_groups=[1, 2, 14])
    assert found.crystals.n_atoms.tolist() == [30, 30, 30]


def test_an_element_that_training_lacked_works_with_a_warning() -> None:
    blind = network(0)
    blind.seen[86] = False
    with pytest.warns(UserWarning, match=r"atomic number \[86\]"):
        found = CompositionPrior([blind]).propose([{"Rn": 1, "F": 2}], 3)
    assert len(found.query) == 3


def test_saved_priors_come_back_as_they_were(tmp_path: Path) -> None:
    save_composition_prior(tmp_path / "rounded", [network(0), network(1)])
    assert (tmp_path / "rounded.safetensors").stat().st_mode & 0o777 == 0o644  # others may read it
    rounded = load_composition_prior(tmp_path / "rounded")  # to half precision
    save_composition_prior(tmp_path / "again", rounded.networks)
    before, after = (p.propose([PEROVSKITE], 5) for p in (rounded, load_composition_prior(tmp_path / "again")))
    assert before.crystals.wyckoff_strings() == after.crystals.wyckoff_strings()
    assert torch.equal(before.log_prob, after.log_prob)


def test_a_truncated_prior_is_refused(tmp_path: Path) -> None:
    save_composition_prior(tmp_path / "p", [network(0)])
    weights = tmp_path / "p.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a composition prior"):
        load_composition_prior(tmp_path / "p")


def test_predictions_ignore_the_order_of_elements_and_the_company(prior: CompositionPrior) -> None:
    alone = prior.propose([PEROVSKITE], 5)
    turned = prior.propose([{"Li": 4, "P": 2, "O": 6, "H": 1, "C": 1}, {"O": 3, "Ti": 1, "Sr": 1}], 5)
    rows = turned.query == 1
    assert alone.crystals.wyckoff_strings() == turned.crystals.select(rows).wyckoff_strings()
    assert alone.log_prob.tolist() == pytest.approx(turned.log_prob[rows].tolist(), abs=1e-5)


def test_one_more_network_changes_the_average(prior: CompositionPrior) -> None:
    single = CompositionPrior(prior.networks[:1]).propose([ROCK_SALT], 1)
    double = CompositionPrior([prior.networks[0], prior.networks[0]]).propose([ROCK_SALT], 1)
    assert single.log_prob.tolist() == pytest.approx(double.log_prob.tolist(), abs=1e-6)
    assert single.log_prob.tolist() != pytest.approx(prior.propose([ROCK_SALT], 1).log_prob.tolist(), abs=1e-3)


@pytest.mark.skipif(not SHIPPED.with_suffix(".json").is_file(), reason="weights are not shipped yet")
@pytest.mark.parametrize(
    ("amounts", "space_group", "volume"),  # Å³ per atom at room temperature
    [
        (ROCK_SALT, 225, 22.4),
        (PEROVSKITE, 221, 11.9),
        ({"Zn": 1, "S": 1}, 216, 19.8),
        ({"Ca": 1, "F": 2}, 225, 13.6),
        ({"Si": 2}, 227, 20.0),
    ],
)
def test_the_shipped_prior_knows_textbook_structures(amounts: dict[str, int], space_group: int, volume: float) -> None:
    found = load_composition_prior().propose([amounts], 5)
    assert space_group in found.crystals.space_group.tolist()
    first = found.crystals.select([found.crystals.space_group.tolist().index(space_group)])
    assert float(first.volume_per_atom) == pytest.approx(volume, rel=0.2)
