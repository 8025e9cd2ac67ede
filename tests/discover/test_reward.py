import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from discover.config import RewardConfig, RunConfig
from discover.errors import ConfigError, RewardError
from discover.gap_scale import to_experiment
from discover.options import parse_args
from discover.properties import Properties
from discover.reward import (
    LOG_FLOOR,
    BandGapFactor,
    NoveltyFactor,
    build_reward,
    log_expected_rbf,
    log_window_probability,
    non_metal_moments,
)
from envs.crystal import CrystalBatch
from proxies.base import Prediction
from tests.discover.crystals import KnownProxy, crystal_batch

NAMES = ["NaCl", "TiO2", "GaAs"]


def known_properties(**changes: KnownProxy) -> Properties:
    proxies = {
        "density": KnownProxy("density", 4.0, 0.0),
        "formation_energy_per_atom": KnownProxy("formation_energy_per_atom", -2.0, 0.25),
        "band_gap": KnownProxy("band_gap", 1.2, 0.3, p_metal=0.2),
        "e_above_hull": KnownProxy("e_above_hull", 0.05, 0.05),
    }
    proxies.update(changes)
    return Properties(proxies=proxies.values())


def log_reward(config: RewardConfig, **changes: KnownProxy) -> float:
    return float(build_reward(config, known_properties(**changes)).log_reward(crystal_batch(["NaCl"]))[0])


@given(st.floats(-1, 4), st.floats(0.01, 2), st.floats(0, 3), st.floats(0.05, 1))
def test_the_target_reward_is_the_expected_utility(mean: float, std: float, target: float, tolerance: float) -> None:
    # The trapezoidal rule is exact to rounding for Gaussians that are wider than the step.
    y = np.arange(min(mean - 12 * std, target - 12 * tolerance), max(mean + 12 * std, target + 12 * tolerance), 0.004)
    utility = np.exp(-((y - target) ** 2) / (2 * tolerance**2))
    expected = 0.004 * float(np.sum(utility * norm.pdf(y, mean, std)))
    got = log_expected_rbf(
        torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64), target, tolerance
    )
    assert float(got.exp()) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_without_uncertainty_the_target_reward_is_the_published_one() -> None:
    gap = torch.tensor([0.5, 1.34, 2.0], dtype=torch.float64)
    got = log_expected_rbf(gap, torch.zeros(3, dtype=torch.float64), 1.34, 0.25)
    torch.testing.assert_close(got, -8.0 * (gap - 1.34) ** 2)


@given(st.floats(-3, 6), st.floats(0.05, 2))
def test_the_window_reward_is_the_probability_of_the_window(mean: float, std: float) -> None:
    got = log_window_probability(
        torch.tensor([mean], dtype=torch.float64), torch.tensor([std], dtype=torch.float64), (1.0, 1.6), 0.05
    )
    scale = math.hypot(std, 0.05)
    expected = norm.cdf((1.6 - mean) / scale) - norm.cdf((1.0 - mean) / scale)
    assert float(got.exp()) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_window_reward_stays_ordered_far_outside() -> None:
    mean = torch.tensor([3.0, 5.0, 9.0, -3.0, -9.0], dtype=torch.float64)
    got = log_window_probability(mean, torch.full((5,), 0.01, dtype=torch.float64), (1.0, 1.6), 0.05)
    assert bool(got.isfinite().all())
    assert got[0] > got[1] > got[2]
    assert got[3] > got[4]


@given(st.floats(0.05, 5), st.floats(0.05, 1), st.floats(0.01, 0.95))
def test_moments_of_non_metals_are_recovered_from_the_mixture(gap: float, std: float, p_metal: float) -> None:
    mean = (1 - p_metal) * gap
    variance = (1 - p_metal) * (std**2 + gap**2) - mean**2
    whole = Prediction(*(torch.tensor([x], dtype=torch.float64) for x in (mean, math.sqrt(variance), p_metal)))
    m, s, log_share = non_metal_moments(whole)
    assert float(m) == pytest.approx(gap, rel=1e-6)
    assert float(s) == pytest.approx(std, rel=1e-4)
    assert float(log_share.exp()) == pytest.approx(1 - p_metal)


def test_the_gap_reward_is_expected_utility_times_non_metal_times_stability() -> None:
    gap, std, p_metal = 1.5, 0.3, 0.2
    mean = (1 - p_metal) * gap
    whole = KnownProxy("band_gap", mean, math.sqrt((1 - p_metal) * (std**2 + gap**2) - mean**2), p_metal=p_metal)
    width = math.hypot(0.25, std)
    utility = (1 - p_metal) * 0.25 / width * math.exp(-((gap - 1.34) ** 2) / (2 * width**2))
    gate = norm.cdf((0.1 - 0.05) / 0.05)
    plain, sharp = RewardConfig(target=1.34, beta=1), RewardConfig(target=1.34)
    assert log_reward(plain, band_gap=whole) == pytest.approx(math.log(utility * gate), abs=1e-5)
    assert log_reward(sharp, band_gap=whole) == pytest.approx(4 * math.log(utility * gate), abs=1e-4)
    without = RewardConfig(target=1.34, beta=1, stability_gate=False)
    assert log_reward(without, band_gap=whole) == pytest.approx(math.log(utility), abs=1e-5)


def test_on_the_experimental_scale_the_target_is_met_by_a_smaller_pbe_gap() -> None:
    gaps = torch.linspace(0.1, 3, 100, dtype=torch.float64)
    whole = {"band_gap": Prediction(gaps, torch.full_like(gaps, 0.05), torch.full_like(gaps, 1e-4))}
    crystals = crystal_batch(["NaCl"] * 100)
    best = {}
    for scale in (False, True):
        values = BandGapFactor(1.34, 0.25, experiment=scale).log_value(crystals, whole)
        best[scale] = float(gaps[int(values.argmax())])
    assert best[False] == pytest.approx(1.34, abs=0.05)
    expected, _ = to_experiment(torch.tensor([best[True]]), torch.tensor([0.0]))
    assert float(expected) == pytest.approx(1.34, abs=0.1)


def test_metals_meet_a_target_of_zero_and_no_other() -> None:
    metal = KnownProxy("band_gap", 0.01, 0.02, p_metal=0.99)
    zero, small = (RewardConfig(target=target, stability_gate=False) for target in (0.0, 0.3))
    assert log_reward(zero, band_gap=metal) == pytest.approx(0.0, abs=4 * 0.02)
    assert log_reward(small, band_gap=metal) < -4


def test_formation_energy_is_charged_for_its_uncertainty() -> None:
    published = RewardConfig(reward="formation_energy", kappa=0)
    assert log_reward(published) == pytest.approx(16.0)  # exp(-8 E), E = -2 eV/atom
    assert log_reward(RewardConfig(reward="formation_energy")) == pytest.approx(16.0 - 8 * 0.25)
    assert log_reward(RewardConfig(reward="formation_energy", beta=2, kappa=0)) == pytest.approx(4.0)


def test_density_is_its_power_or_a_target() -> None:
    assert log_reward(RewardConfig(reward="density")) == pytest.approx(math.log(4.0))
    assert log_reward(RewardConfig(reward="density", beta=3)) == pytest.approx(3 * math.log(4.0))
    assert log_reward(RewardConfig(reward="density", target=4.5)) == pytest.approx(-8 * 0.25, abs=1e-6)


def test_a_product_adds_weighted_logs() -> None:
    product = log_reward(RewardConfig(reward="density^0.5*stability*oxidation_score^2"))
    parts = [log_reward(RewardConfig(reward=name)) for name in ("density", "stability", "oxidation_score")]
    assert product == pytest.approx(0.5 * parts[0] + parts[1] + 2 * parts[2])


def test_a_lower_limit_on_the_energy_above_hull_asks_for_more() -> None:
    limits = (0.1, None, 0.0)
    metastable, default, stable = (log_reward(RewardConfig(reward="stability", hull_limit=limit)) for limit in limits)
    assert stable < default < metastable
    assert default == log_reward(RewardConfig(reward="stability", hull_limit=0.02, beta=4))


def test_beta_is_the_power_of_the_probability_to_be_stable() -> None:
    plain = log_reward(RewardConfig(reward="stability", beta=1, novelty_gate=False))
    assert plain < 0
    assert log_reward(RewardConfig(reward="stability", novelty_gate=False)) == pytest.approx(4 * plain)
    assert log_reward(RewardConfig(reward="stability^0.5", beta=2, novelty_gate=False)) == pytest.approx(plain)


def test_stability_asks_for_new_compositions_unless_told_otherwise() -> None:
    """Sodium chloride is known."""
    known = log_reward(RewardConfig(reward="stability"))
    assert known == pytest.approx(log_reward(RewardConfig(reward="stability", novelty_gate=False)) + LOG_FLOOR)
    assert known == log_reward(RewardConfig(reward="stability*novelty"))
    assert not RewardConfig(reward="formation_energy").novelty_gate
    assert not parse_args(RunConfig, ["reward=stability", "acquire.new=off"]).novelty_gate
    assert parse_args(RunConfig, ["reward=stability"]).novelty_gate
    with pytest.raises(ConfigError, match="same factor"):
        RewardConfig(reward="density*novelty", novelty_gate=True)


@pytest.mark.parametrize("reward", ["bandgap", "formation_energy", "stability"])
def test_hopeless_crystals_have_a_finite_reward_at_the_floor(reward: str) -> None:
    hopeless = {
        "band_gap": KnownProxy("band_gap", 40.0, 1e-9, p_metal=0.0),
        "formation_energy_per_atom": KnownProxy("formation_energy_per_atom", 50.0, 0.0),
        "e_above_hull": KnownProxy("e_above_hull", 50.0, 0.0),
    }
    target = 1.34 if reward == "bandgap" else None
    config = RewardConfig(reward=reward, target=target, stability_gate=False, novelty_gate=False)
    power = config.beta_of("stability") if reward == "stability" else 1.0
    assert log_reward(config, **hopeless) == pytest.approx(power * LOG_FLOOR)


def test_a_composition_without_charge_balance_scores_at_the_floor() -> None:
    reward = build_reward(RewardConfig(reward="oxidation_score"), known_properties())
    assert float(reward.log_reward(crystal_batch(["Fe"]))) == pytest.approx(LOG_FLOOR)


def test_only_needed_properties_are_predicted_and_shown() -> None:
    class Forbidden(KnownProxy):
        def predict(self, crystals: object) -> Prediction:
            del crystals
            raise AssertionError(f"{self.name} was not asked for")

    properties = known_properties(band_gap=Forbidden("band_gap", 0, 0))
    reward = build_reward(RewardConfig(reward="density"), properties)
    assert set(reward.columns(crystal_batch(NAMES))) == {"density", "density_std"}


def test_a_missing_proxy_is_named_before_anything_runs() -> None:
    with pytest.raises(RewardError, match="e_above_hull"):
        build_reward(RewardConfig(reward="stability"), Properties(proxies=[KnownProxy("density", 1, 0)]))


def test_a_proxy_of_ones_own_replaces_the_ensemble() -> None:
    class Ensemble:
        def predict_all(self, crystals: object) -> dict[str, Prediction]:
            del crystals
            one = torch.ones(1, dtype=torch.float64)
            return {name: Prediction(one, one) for name in ("formation_energy_per_atom", "band_gap", "e_above_hull")}

    properties = Properties(Ensemble(), [KnownProxy("band_gap", 2.5, 0.1)])
    got = properties.predict(crystal_batch(["NaCl"]))
    assert {name: float(prediction.mean) for name, prediction in got.items()} == {
        "formation_energy_per_atom": 1.0,
        "band_gap": 2.5,
        "e_above_hull": 1.0,
    }


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def lightness(crystals):\n"
        "    return -crystals.volume_per_atom\n"
        "def wrong_shape(crystals):\n"
        "    return crystals.lattice_parameters\n"
        "def not_finite(crystals):\n"
        "    return crystals.volume * float('nan')\n"
        "def broken(crystals):\n"
        "    raise KeyError('volume')\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("user_module")
def test_a_users_function_is_a_factor_like_any_other() -> None:
    reward = build_reward(RewardConfig(reward="my_rewards:lightness^2*density"), known_properties())
    crystals = crystal_batch(NAMES)
    torch.testing.assert_close(reward.log_reward(crystals), -2 * crystals.volume_per_atom + np.log(4.0))


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("name", "message"),
    [("wrong_shape", r"must return \(1,\)"), ("not_finite", "finite log rewards.*NaCl"), ("broken", "KeyError")],
)
def test_a_users_function_that_fails_is_named(name: str, message: str) -> None:
    reward = build_reward(RewardConfig(reward=f"my_rewards:{name}"), known_properties())
    with pytest.raises(RewardError, match=message):
        reward.log_reward(crystal_batch(["NaCl"]))


@pytest.mark.parametrize(
    ("path", "message"),
    [("no_such_module:f", "cannot import"), ("math:no_such", "has no function"), ("math:pi", "has no")],
)
def test_an_import_path_that_leads_nowhere_is_named(path: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        build_reward(RewardConfig(reward=path), known_properties())


def test_known_compositions_are_worth_nothing_to_novelty() -> None:
    salt = CrystalBatch(
        torch.tensor([225, 225]),
        torch.tensor([[11, 17], [11, 36]]),
        torch.tensor([[0, 1], [0, 1]]),
        torch.tensor([[1, 1], [1, 1]]),
        torch.tensor([[5.6, 5.6, 5.6, 90.0, 90.0, 90.0]] * 2, dtype=torch.float64),
    )
    value = NoveltyFactor().log_value(salt, {})
    assert value.tolist() == pytest.approx([LOG_FLOOR, 0.0], abs=1e-6)
