"""The ranking: votes add up, near repeats come late, sources are pooled, and weights survive the disk."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from discover.errors import CheckpointError
from discover.proposals import SOURCES, Proposals
from discover.ranking import (
    N_SCALARS,
    Hypotheses,
    Kind,
    Pool,
    Ranking,
    RankingNetwork,
    arrangement_keys,
    cover,
    describe,
    found_probability,
    hypotheses_of,
    load_ranking,
    propose_templates,
    save_ranking,
)
from discover.templates import Query, Templates, templates_of_data
from discover.train_ranking import Examples, RankingTraining, fit, formula_folds, make_examples, ranking_loss
from envs.equivalence import image
from envs.symmetry import SYMMETRY
from tests.discover.crystals import crystal_batch
from tests.discover.test_templates import caesium_chloride, prepared
from tests.discover.textbook import rock_salt, rutile, wurtzite


def halide(kind: str, metal: str, halogen: str, length: float) -> Structure:
    """A rock salt or a caesium chloride of other elements."""
    group, other = {"rock salt": ("Fm-3m", [0.5, 0.5, 0.5]), "caesium chloride": ("Pm-3m", [0.5, 0.5, 0.5])}[kind]
    return Structure.from_spacegroup(group, Lattice.cubic(length), [metal, halogen], [[0, 0, 0], other])


@pytest.fixture(scope="module")
def templates() -> Templates:
    structures = [
        rock_salt(),
        halide("rock salt", "K", "Br", 6.6),
        halide("rock salt", "Li", "F", 4.03),
        halide("rock salt", "Rb", "I", 7.34),
        caesium_chloride(),
        halide("caesium chloride", "Cs", "Br", 4.29),
        wurtzite(),
        rutile(),
    ]
    return templates_of_data(prepared(structures, [0.0] * len(structures)))


@pytest.fixture(scope="module")
def ranking() -> Ranking:
    torch.manual_seed(0)
    kinds: tuple[Kind, ...] = ("rows", "aggregate")
    networks = {kind: RankingNetwork().eval().requires_grad_(requires_grad=False) for kind in kinds}
    return Ranking(networks, dict.fromkeys(kinds, Pool(prior_power=0.4, unseen=1e-4)))


def proposals_of_prior(names: list[str], log_p: list[float]) -> Proposals:
    crystals = crystal_batch(names)
    n = len(crystals)
    return Proposals(
        crystals,
        torch.full((*crystals.letters.shape, 3), math.nan, dtype=torch.float64),
        torch.zeros(n, dtype=torch.int64),
        torch.tensor(log_p, dtype=torch.float64),
        torch.full((n,), SOURCES.index("prior")),
    )


def test_cover_adds_what_helps_most() -> None:
    """Proposals 0 and 1 are the same structure, on which most of the mass lies; 2 is another one."""
    mass = torch.tensor([0.3, 0.3, 0.4]).double()
    match = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
    order, gains = cover(mass, match)
    assert order.tolist() == [0, 2, 1]
    torch.testing.assert_close(gains, torch.tensor([0.57, 0.4, 0.03]).double())
    assert cover(mass, match, n=2)[0].tolist() == [0, 2]


def test_greedy_cover_is_near_the_best_of_all_choices() -> None:
    """Greedy coverage reaches at least 1 - 1/e of the best choice (Nemhauser et al. 1978)."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        mass = torch.rand(8, generator=generator).double()
        match = torch.rand(6, 8, generator=generator).double()
        _, gains = cover(mass, match, n=3)
        best = max(
            float((mass * (1 - (1 - match[list(rows)]).prod(dim=0))).sum())
            for rows in itertools.combinations(range(6), 3)
        )
        assert (1 - 1 / math.e) * best <= float(gains.sum()) <= best + 1e-12


def test_keys_do_not_see_the_setting_and_see_the_elements() -> None:
    crystals = crystal_batch(["NaCl", "NaCl shifted", "GaAs", "TiO2", "SrTiO3", "SiO2"])
    keys = arrangement_keys(crystals)
    assert keys[0] == keys[1]
    assert len(keys.unique()) == 5
    last = SYMMETRY.n_alternatives[crystals.space_group - 1] - 1
    torch.testing.assert_close(arrangement_keys(image(crystals, last)), keys)


def test_a_ranking_orders_all_proposals_of_each_composition(templates: Templates, ranking: Ranking) -> None:
    compositions = [{"Na": 1, "Br": 1}, {"Ti": 7, "O": 11}, {"Sn": 2, "O": 4}]
    proposals = propose_templates(templates, compositions)
    ranked, gains = ranking.rank(proposals, compositions, templates)
    assert len(ranked) == len(proposals)
    assert ranked.query.tolist() == sorted(proposals.query.tolist())
    for index in (0, 2):
        of_query = gains[ranked.query == index]
        assert (of_query.diff() <= 1e-12).all()
        assert 0.9 < float(of_query.sum()) < 1.0 + 1e-9
    # Rock salts in both orders of the elements are one structure: after the first, the others add nothing.
    groups = ranked.crystals.space_group[ranked.query == 0]
    assert set(groups[:2].tolist()) == {221, 225}


def test_one_composition_is_ranked_as_among_many(templates: Templates, ranking: Ranking) -> None:
    compositions = [{"Na": 1, "Br": 1}, {"Sn": 2, "O": 4}, {"K": 1, "I": 1}]
    together, gains = ranking.rank(propose_templates(templates, compositions), compositions, templates)
    for index, composition in enumerate(compositions):
        alone, own = ranking.rank(propose_templates(templates, [composition]), [composition], templates)
        rows = together.query == index
        torch.testing.assert_close(own, gains[rows])
        assert alone.crystals.space_group.tolist() == together.crystals.space_group[rows].tolist()


def test_the_prior_decides_where_nothing_else_is_known(ranking: Ranking) -> None:
    proposals = proposals_of_prior(["NaCl", "TiO2"], [-1.0, -0.5])
    ranked, gains = ranking.rank(proposals, [{"Na": 1, "Cl": 1}], None)
    assert ranked.crystals.space_group.tolist() == [136, 225]
    expected = torch.softmax(torch.tensor([-0.5, -1.0]).double(), dim=0) * torch.tensor([0.77, 0.99])
    torch.testing.assert_close(gains, expected)


def test_letters_that_leave_nothing_free_are_surer() -> None:
    assert found_probability(crystal_batch(["NaCl", "TiO2"])).tolist() == pytest.approx([0.99, 0.77])


def test_the_prior_moves_the_prototypes(templates: Templates, ranking: Ranking) -> None:
    """A prior that is certain of rock salt puts the rock salt with known coordinates first."""
    compositions = [{"Na": 1, "Cl": 1}]
    known = propose_templates(templates, compositions)
    sure = Ranking(ranking.networks, {"rows": Pool(prior_power=0.95, unseen=1e-4)})
    of_prior = proposals_of_prior(["NaCl", "GaAs"], [-0.01, -40.0])
    ranked, _ = sure.rank(Proposals.cat([of_prior, known]), compositions, templates)
    assert int(ranked.crystals.space_group[0]) == 225
    assert ranked.has_coordinates[0]  # equal sequences: the one with coordinates is the safer one
    doubtful = Ranking(ranking.networks, {"rows": Pool(prior_power=0.95, unseen=1e-4, found=0.5)})
    ranked, gains = doubtful.rank(Proposals.cat([of_prior, known]), compositions, templates)
    assert not ranked.has_coordinates[0]  # the generator's are safer than coordinates that are right half the time
    assert float(gains.sum()) <= 1.0


def test_each_kind_of_prototypes_has_its_own_pool(templates: Templates, ranking: Ranking) -> None:
    compositions = [{"Na": 1, "Cl": 1}]
    nameless = replace(templates, formulas=np.full(len(templates), ""))
    pools: dict[Kind, Pool] = {"rows": Pool(0.95, 1e-4), "aggregate": Pool(0.0, 1e-4)}
    split = Ranking(ranking.networks, pools)
    of_prior = proposals_of_prior(["NaCl", "TiO2"], [-0.01, -40.0])
    kinds: dict[Kind, Templates] = {"rows": templates, "aggregate": nameless}
    for kind, known in kinds.items():
        proposals = Proposals.cat([of_prior, propose_templates(known, compositions)])
        alone = Ranking(ranking.networks, dict.fromkeys(pools, pools[kind]))
        torch.testing.assert_close(
            split.rank(proposals, compositions, known)[1], alone.rank(proposals, compositions, known)[1]
        )


def test_hypotheses_know_nothing_of_the_own_formula(templates: Templates) -> None:
    query = Query.of({"Na": 1, "Cl": 1})
    found = hypotheses_of(templates, query, other_formulas=True)
    assert "NaCl" not in templates.formulas[found.rows.numpy()].tolist()
    described = describe(templates, query, found)
    assert described.scalars.shape == (len(found.rows), N_SCALARS)
    assert described.scalars.isfinite().all()
    assert set(described.given.flatten().tolist()) == {11, 17}


def test_training_learns_which_prototypes_are_right() -> None:
    """Examples of which the right hypothesis is the one of a certain scalar are learned in a few passes."""
    generator = torch.Generator().manual_seed(0)
    n, h = 256, 8
    scalars = torch.randn(n, h, N_SCALARS, generator=generator)
    right = torch.nn.functional.one_hot(scalars[:, :, 0].argmax(dim=1), h).float()
    elements = torch.randint(1, 90, (n, h, 2), generator=generator)
    examples = Examples(
        Hypotheses(elements, elements.flip(2), torch.full((n, h, 2), 0.5), scalars), right, torch.full((n,), h)
    )
    untrained = float(ranking_loss(RankingNetwork().eval(), examples).mean().detach())
    network, loss = fit(examples, examples, RankingTraining(epochs=10, batch_size=32, lr=1e-2))
    assert loss < 0.5 * untrained
    assert float(ranking_loss(network, examples).mean().detach()) == pytest.approx(loss, rel=1e-3)


def test_crystals_without_a_hypothesis_are_no_examples(templates: Templates) -> None:
    made = make_examples(templates, templates, [0, 6], progress=False)  # only wurtzite has two formula units
    assert len(made) == 1
    assert 0.9 < float(made.right[0].max()) <= 1.0  # another rock salt


def test_padding_has_no_part_in_the_loss() -> None:
    network = RankingNetwork().eval()
    elements = torch.tensor([[[11, 17], [19, 35]]])
    shares, scalars = torch.full((1, 2, 2), 0.5), torch.zeros(1, 2, N_SCALARS)
    right = torch.tensor([[0.9, 0.1]])
    whole = Examples(Hypotheses(elements, elements.flip(2), shares, scalars), right, torch.tensor([2]))
    pad = torch.nn.functional.pad
    padded = Examples(
        Hypotheses(*(pad(part, (0, 0, 0, 3)) for part in (elements, elements.flip(2), shares, scalars))),
        pad(right, (0, 3)),
        torch.tensor([2]),
    )
    torch.testing.assert_close(ranking_loss(network, padded), ranking_loss(network, whole))


def test_folds_depend_on_the_formula_alone() -> None:
    folds = formula_folds(["TiO2", "NaCl", "TiO2"])
    assert folds[0] == folds[2]
    assert set(formula_folds([f"X{i}" for i in range(500)]).tolist()) == set(range(20))


def test_weights_survive_the_disk(tmp_path: Path, templates: Templates, ranking: Ranking) -> None:
    save_ranking(tmp_path / "ranking", ranking, {})
    loaded = load_ranking(tmp_path / "ranking")
    assert loaded.pools == ranking.pools
    compositions = [{"Na": 1, "Br": 1}]
    proposals = propose_templates(templates, compositions)
    expected, gains = ranking.rank(proposals, compositions, templates)
    found, again = loaded.rank(proposals, compositions, templates)
    torch.testing.assert_close(again, gains)
    assert found.crystals.space_group.tolist() == expected.crystals.space_group.tolist()
    (tmp_path / "ranking.json").write_text("{}")
    load_ranking.cache_clear()
    with pytest.raises(CheckpointError, match="not a ranking of this version"):
        load_ranking(tmp_path / "ranking")
