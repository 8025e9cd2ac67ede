"""Proxies learn from labels, keep what they knew, and know how wrong they were."""

import pytest
import torch

from discover.learn import LearnSettings, Lesson, Rehearsal, learn, scaled, std_factors
from discover.train_sampler import draw_crystals
from envs.crystal import CrystalBatch
from policies.pretrained import load_prior
from proxies import PropertyEnsemble, load_pretrained

QUICK = LearnSettings(min_steps=20, max_steps=20, batch_size=48)
ENERGY = "formation_energy_per_atom"


@pytest.fixture(scope="module")
def ensemble() -> PropertyEnsemble:
    return load_pretrained()


@pytest.fixture(scope="module")
def drawn() -> CrystalBatch:
    prior = load_prior("any")
    return next(draw_crystals(prior.env, prior.policy, 240, torch.Generator().manual_seed(3)))[0]


def shifted(ensemble: PropertyEnsemble, crystals: CrystalBatch, by: float) -> Lesson:
    """Return labels that lie above what the ensemble says, and nothing about the gap."""
    mean = ensemble.raw_outputs(crystals).mean
    nothing = torch.full((len(crystals),), torch.nan, dtype=torch.float64)
    return Lesson(crystals, torch.stack([mean[ENERGY] + by, mean["e_above_hull"] + by, nothing], dim=1))


def test_labels_move_predictions_towards_them_and_rehearsal_keeps_the_rest(ensemble, drawn) -> None:
    oxides = (drawn.elements == 8).any(dim=1)
    lesson = shifted(ensemble, drawn.select(oxides), 0.5)
    others = drawn.select(~oxides)
    rehearsal = Rehearsal(others, ensemble, torch.Generator().manual_seed(0))
    taught = learn(ensemble, lesson, rehearsal, settings=QUICK)
    moved = taught.raw_outputs(lesson.crystals).mean[ENERGY] - ensemble.raw_outputs(lesson.crystals).mean[ENERGY]
    kept = taught.raw_outputs(others).mean[ENERGY] - ensemble.raw_outputs(others).mean[ENERGY]
    assert float(moved.median()) > 0.1
    assert float(kept.abs().median()) < 0.5 * float(moved.median())


def test_the_same_seed_teaches_the_same_and_the_teacher_stays(ensemble, drawn) -> None:
    lesson = shifted(ensemble, drawn.select(slice(0, 10)), 0.3)
    before = ensemble.raw_outputs(drawn).mean[ENERGY]
    rehearsal = Rehearsal(drawn, ensemble, torch.Generator().manual_seed(0))
    first, again = (learn(ensemble, lesson, rehearsal, settings=QUICK, seed=5) for _ in range(2))
    assert torch.equal(first.raw_outputs(drawn).mean[ENERGY], again.raw_outputs(drawn).mean[ENERGY])
    assert torch.equal(ensemble.raw_outputs(drawn).mean[ENERGY], before)


def test_nothing_to_learn_changes_nothing(ensemble, drawn) -> None:
    unknown = Lesson(drawn, torch.full((len(drawn), 3), torch.nan, dtype=torch.float64))
    rehearsal = Rehearsal(drawn.select(slice(0, 4)), ensemble, torch.Generator().manual_seed(0))
    assert learn(ensemble, unknown, rehearsal, settings=QUICK) is ensemble


def test_errors_as_large_as_predicted_keep_the_uncertainty_and_larger_ones_raise_it(ensemble, drawn) -> None:
    std = ensemble.predict_all(drawn)[ENERGY].std
    mean = ensemble.raw_outputs(drawn).mean
    nothing = torch.full_like(std, torch.nan)

    def factor(errors: torch.Tensor) -> float:
        return std_factors(ensemble, Lesson(drawn, torch.stack([mean[ENERGY] + errors, nothing, nothing], 1)))[ENERGY]

    assert factor(std) == pytest.approx(1.0, abs=1e-6)
    assert factor(3 * std) == pytest.approx(3.0, rel=0.1)
    wider = scaled(ensemble, {ENERGY: 2.0})
    torch.testing.assert_close(wider.predict_all(drawn)[ENERGY].std, 2 * std)
    torch.testing.assert_close(
        wider.predict_all(drawn)["e_above_hull"].std, ensemble.predict_all(drawn)["e_above_hull"].std
    )
    back = scaled(wider, {ENERGY: 1.0})  # factors are of the unscaled ensemble
    torch.testing.assert_close(back.predict_all(drawn)[ENERGY].std, std)
    assert std_factors(wider, Lesson(drawn.select(slice(0, 0)), torch.zeros(0, 3)))[ENERGY] == pytest.approx(2.0)


def test_taught_proxies_survive_saving(ensemble, drawn, tmp_path) -> None:
    wider = scaled(ensemble, {ENERGY: 1.7})
    wider.save(tmp_path / "proxies")
    loaded = PropertyEnsemble.load(tmp_path / "proxies")
    torch.testing.assert_close(loaded.predict_all(drawn)[ENERGY].std, wider.predict_all(drawn)[ENERGY].std)
    assert (
        scaled(loaded, {ENERGY: 1.0}).predict_all(drawn)[ENERGY].std.mean()
        < wider.predict_all(drawn)[ENERGY].std.mean()
    )
