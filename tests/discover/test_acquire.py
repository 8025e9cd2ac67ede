"""Scores of candidates and the limits under which they are taken."""

import math
from typing import Any

import pytest
import torch

from discover.acquire import Picker, acquisition_scores, drawn_order, taken_at, uncertainty
from discover.config import RewardConfig
from discover.properties import Properties
from discover.reward import build_reward
from envs.crystal import CrystalBatch
from proxies import DensityProxy, load_pretrained
from proxies.base import Prediction


def crystals(n: int) -> CrystalBatch:
    return CrystalBatch(
        torch.full((n,), 225),
        torch.tensor([[11, 17]] * n),
        torch.tensor([[0, 1]] * n),
        torch.ones(n, 2, dtype=torch.int64),
        torch.tensor([[5.6, 5.6, 5.6, 90.0, 90.0, 90.0]] * n, dtype=torch.float64),
    )


def scores(
    name: str, predictions: dict[str, Prediction], n: int, *, kappa: float = 1.0, **settings: Any
) -> torch.Tensor:
    config = RewardConfig(**settings)
    reward = build_reward(config, Properties(load_pretrained(), [DensityProxy()]))
    generator = torch.Generator().manual_seed(0)
    return acquisition_scores(name, reward, crystals(n), predictions, kappa=kappa, generator=generator)


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_optimism_prefers_the_uncertain_and_expectation_does_not() -> None:
    hull = {"e_above_hull": Prediction(numbers(0.15, 0.15), numbers(0.02, 0.3))}
    asked = {"reward": "stability", "novelty_gate": False}  # the crystals are rock salt
    optimistic, greedy = scores("ucb", hull, 2, **asked), scores("greedy", hull, 2, **asked)
    assert optimistic[1] > optimistic[0]
    assert optimistic[1] == pytest.approx(0.0, abs=1e-6)  # 0.15 - 0.3 lies below the limit
    assert float(greedy.max()) < -5  # both means lie above it
    energy = {"formation_energy_per_atom": Prediction(numbers(-2.0, -2.0), numbers(0.02, 0.3))}
    expected = scores("expected", energy, 2, reward="formation_energy")
    assert expected[0] > expected[1]


def test_no_optimism_is_greedy_and_random_is_neither() -> None:
    gap = {
        "band_gap": Prediction(numbers(1.3, 0.4, 2.0), numbers(0.2, 0.4, 0.3), numbers(0.01, 0.7, 0.02)),
        "e_above_hull": Prediction(numbers(0.02, 0.02, 0.02), numbers(0.01, 0.01, 0.01)),
    }
    asked = {"reward": "bandgap", "target": 1.34}
    torch.testing.assert_close(scores("ucb", gap, 3, kappa=0.0, **asked), scores("greedy", gap, 3, **asked))
    assert scores("greedy", gap, 3, **asked).argmax() == 0
    drawn = scores("random", gap, 3, **asked)
    assert bool(((drawn >= 0) & (drawn < 1)).all())
    assert len(drawn.unique()) == 3


def test_a_likely_metal_is_taken_for_one() -> None:
    gap = Prediction(numbers(0.3, 1.2), numbers(0.5, 0.5), numbers(0.8, 0.1))
    sure = taken_at(gap, 0.0)
    assert sure.p_metal.tolist() == [1.0, 0.0]
    assert sure.mean.tolist() == pytest.approx([0.0, 1.2 / 0.9])


def test_draws_are_in_proportion_to_the_score_and_without_replacement() -> None:
    score, generator = numbers(0.0, -1.0, -2.0, -math.inf), torch.Generator().manual_seed(0)
    orders = torch.stack([drawn_order(score, 0.5, generator).argsort(descending=True) for _ in range(20_000)])
    weight = (score / 0.5).exp()
    share = weight / weight.sum()
    first = orders[:, 0].bincount(minlength=4) / len(orders)
    assert first.tolist() == pytest.approx(share.tolist(), abs=0.01)
    second = orders[orders[:, 0] == 0, 1].bincount(minlength=4).double()
    assert (second / second.sum())[1:].tolist() == pytest.approx((weight[1:] / weight[1:].sum()).tolist(), abs=0.01)
    assert bool((orders[:, 3] == 3).all())
    assert drawn_order(score, 0.0, generator) is score


def test_limits_on_formulas_hold_over_rounds_and_on_systems_within_one() -> None:
    names = [((formula,), (system,), ()) for formula, system in ("Ax", "Ax", "Ax", "Bx", "Cy")]
    picker = Picker(names, (2, 3, 1), taken=["A"], excluded=[4])
    score = numbers(5, 4, 3, 2, 1)
    assert picker.take(score, 1) == [0]
    assert picker.take(score, 9) == [3]  # one more A would be the third, C is excluded
    assert picker.take(score, 9) == []
    picker.lift_limits()
    assert picker.take(score, 9) == [1, 2]


def test_a_prototype_is_taken_so_often_and_may_change_until_then() -> None:
    names = [(("A",), ("salt",)), (("B",), ("salt",)), (("C",), ("rutile",)), (("D",), ("salt",))]
    picker = Picker(names, (1, 1))
    assert picker.widened(2).take(numbers(4, 3, 2, 1), 4) == [0, 1, 2]  # the original keeps its counts
    picker.names[1] = (("B",), ("spinel",))
    picker.exclude([2])
    assert picker.take(numbers(4, 3, 2, 1), 4) == [0, 1]


def test_a_candidate_counts_for_each_of_its_elements() -> None:
    names = [(("Mg", "S"),), (("Ca", "S"),), (("Ca", "O"),), (("Sr", "S"),), (("Ca", "Se"),), ((),)]
    picker = Picker(names, (2,))
    assert picker.take(numbers(6, 5, 4, 3, 2, 1), 9) == [0, 1, 2, 5]  # two with sulfur, two with calcium


def test_uncertainty_compares_properties_in_their_own_units() -> None:
    predictions = {
        "band_gap": Prediction(numbers(1, 1, 1), numbers(0.1, 0.2, 0.3)),
        "e_above_hull": Prediction(numbers(1, 1, 1), numbers(0.03, 0.02, 0.01)),
    }
    total = uncertainty(predictions, ["band_gap", "e_above_hull"])
    assert total.tolist() == pytest.approx([2.0, 2.0, 2.0])
    assert math.isfinite(float(total.sum()))
