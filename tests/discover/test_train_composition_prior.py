"""Training the composition-conditioned prior end to end on made-up crystals of three structure types."""

from pathlib import Path

import pytest
import torch

from discover.composition_corpus import corpus_of, element_table, fold, split, stability_of
from discover.data import PreparedData, save_prepared
from discover.errors import ConfigError
from discover.train_composition_prior import (
    CompositionPriorTraining,
    Trainer,
    evaluate_terms,
    ranking_figures,
    train_composition_prior,
)
from policies.composition_network import STABLE, UNKNOWN, UNSTABLE, CompositionNetwork, NetworkConfig
from policies.composition_prior import CompositionPrior, load_composition_prior
from tests.discover.structure_types import of_known_types, prepared
from tests.proxies.textbook import random_crystals

SMALL = NetworkConfig(width=16, n_layers=1, n_heads=2, step_width=16, key_width=8, dropout=0.0)


@pytest.fixture(scope="module")
def data() -> PreparedData:
    crystals = of_known_types(480)
    above = torch.zeros(len(crystals), dtype=torch.float64)
    above[::7], above[1::7] = 0.5, torch.nan
    return prepared(crystals, above)


def test_stability_flags_follow_the_label(data: PreparedData) -> None:
    assert stability_of(data)[:3].tolist() == [UNSTABLE, UNKNOWN, STABLE]


def test_no_formula_is_on_both_sides(data: PreparedData) -> None:
    train, inner, held_out = split(data)
    assert len(train) + len(inner) <= len(data)
    assert all(fold(formula) == 0 for formula in held_out.formulas())
    kept = train.assignments.crystals(torch.ones(len(train), 6, dtype=torch.float64))
    assert not set(kept.formulas()) & set(held_out.formulas())


def test_teacher_forcing_gives_what_the_walk_of_the_search_gives() -> None:
    crystals = random_crystals(60, seed=2, max_orbits=3)
    corpus = corpus_of(crystals, torch.full((60,), STABLE))
    assert 30 < len(corpus) <= 60  # some random crystals put two orbits on one fixed position
    torch.manual_seed(0)
    network = CompositionNetwork(SMALL, element_table())
    network.seen.fill_(value=True)
    with torch.no_grad():
        network.position_bias.weight.normal_()
        terms = evaluate_terms(network.eval(), corpus)
    as_written = CompositionPrior([network])._log_prob_as_written(corpus.assignments)
    assert (-terms.nll).tolist() == pytest.approx(as_written.tolist(), abs=1e-3)


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(data: PreparedData, tmp_path: Path) -> None:
    train, inner, _ = split(data)
    settings = CompositionPriorTraining(epochs=2, batch_size=128)
    whole = Trainer(train, inner, SMALL, settings)
    whole.run_epoch()
    whole.save(tmp_path / "stopped")
    expected = whole.run_epoch()
    resumed = Trainer(train, inner, SMALL, settings)
    resumed.load(tmp_path / "stopped")
    assert resumed.epoch == 1
    assert resumed.run_epoch() == pytest.approx(expected, rel=1e-5)


def test_it_learns_which_structure_a_formula_has(data: PreparedData) -> None:
    train, inner, held_out = split(data)
    trainer = Trainer(train, inner, SMALL, CompositionPriorTraining(epochs=8, batch_size=64, lr=1e-2, ema_decay=0.9))
    before = ranking_figures(CompositionPrior([trainer.averaged()]), held_out, (1, 5))
    while trainer.progress < 1:
        trainer.run_epoch()
    after = ranking_figures(CompositionPrior([trainer.averaged()]), held_out, (1, 5))
    assert before.top[1] < 0.5
    assert after.top[1] > 0.9
    assert after.nll < 1.0 < before.nll


def test_training_writes_an_ensemble_that_loads(data: PreparedData, tmp_path: Path) -> None:
    save_prepared(data, tmp_path / "data.npz")
    settings = CompositionPriorTraining(epochs=1, batch_size=256, n_networks=2)
    figures = train_composition_prior(tmp_path / "data.npz", tmp_path / "out", settings, SMALL)
    assert 0 <= figures["top_1"] <= figures["top_5"] <= figures["top_20"] <= 1
    loaded = load_composition_prior(tmp_path / "out" / "composition_prior")
    assert len(loaded.networks) == 2
    assert not torch.equal(loaded.networks[0].group_bias, loaded.networks[1].group_bias)
    assert len(loaded.propose([{"Na": 1, "Cl": 1}], 4).query) == 4


def test_time_ends_a_training_whose_epochs_do_not(data: PreparedData) -> None:
    train, inner, _ = split(data)
    trainer = Trainer(train, inner, SMALL, CompositionPriorTraining(epochs=10_000, batch_size=256, minutes=1e-4))
    trainer.run_epoch()
    assert trainer.progress == 1


def test_data_without_stable_crystals_are_refused() -> None:
    crystals = of_known_types(60)
    with pytest.raises(ConfigError, match="stable ones"):
        split(prepared(crystals, torch.ones(60, dtype=torch.float64)))
