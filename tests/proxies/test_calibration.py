"""Calibrated intervals cover what they say, on errors that were not used to calibrate."""

import json

import pytest
import torch

from proxies import ProxyError
from proxies.calibration import FactorCurve, LogitCalibration, StdCalibration, interval_coverage, spearman


def wrong_stds(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return errors and raw standard deviations that are too small, the small ones more so."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.exp(torch.randn(n, generator=generator, dtype=torch.float64))
    return true * torch.randn(n, generator=generator, dtype=torch.float64), 0.5 * true**1.3


def test_coverage_is_right_in_every_range_of_the_std() -> None:
    error, std = wrong_stds(20_000, seed=0)
    calibration = StdCalibration.fit(error, std, n_bins=8)
    error, std = wrong_stds(20_000, seed=1)
    for rows in std.argsort().tensor_split(4):
        one, two = interval_coverage(error[rows], calibration(std[rows], std[rows]))
        assert one == pytest.approx(0.683, abs=0.03)  # 5,000 rows: three standard errors are 0.02
        assert two == pytest.approx(0.954, abs=0.02)
    assert interval_coverage(error, std)[0] < 0.62  # uncalibrated, for comparison


def test_energies_far_above_the_hull_get_their_own_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    std, hull = torch.full((n,), 0.1).double(), torch.rand(n, generator=generator, dtype=torch.float64)
    error = (0.05 + 0.2 * hull) * torch.randn(n, generator=generator, dtype=torch.float64)
    calibrated = StdCalibration.fit(error, std, hull)(std, hull)
    for low in (0.1, 0.4, 0.7):
        rows = (hull > low) & (hull < low + 0.2)
        assert interval_coverage(error[rows], calibrated[rows])[0] == pytest.approx(0.683, abs=0.03)


def test_calibration_keeps_the_order_beyond_the_outer_knots() -> None:
    calibration = StdCalibration(FactorCurve((-1.0, 1.0), (0.5, -0.5)))
    raw = torch.tensor([1e-4, 1e-3, 1e2, 1e3], dtype=torch.float64)
    std = calibration(raw, raw)
    assert (std[1:] > std[:-1]).all()
    assert std[0].item() == pytest.approx(1e-4 * 2.718281828**0.5)


def test_calibration_survives_json() -> None:
    calibration = StdCalibration.fit(*wrong_stds(500, seed=0))
    assert StdCalibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration
    error, std = wrong_stds(500, seed=0)
    both = StdCalibration.fit(error, std, std.flip(0))
    assert both.by_hull is not None
    assert StdCalibration.from_json(json.loads(json.dumps(both.to_json()))) == both
    platt = LogitCalibration(0.7, -0.2)
    assert LogitCalibration.from_json(platt.to_json()) == platt


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ProxyError, match="at least 50 held-out rows, got 10"):
        StdCalibration.fit(torch.ones(10), torch.ones(10))


def test_platt_scaling_recovers_the_law_that_made_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    logit = 3.0 * torch.randn(20_000, generator=generator, dtype=torch.float64)
    label = torch.rand(20_000, generator=generator, dtype=torch.float64) < (0.5 * logit + 0.4).sigmoid()
    fitted = LogitCalibration.fit(logit, label)
    assert fitted.scale == pytest.approx(0.5, abs=0.03)
    assert fitted.shift == pytest.approx(0.4, abs=0.06)


def test_platt_scaling_tames_logits_that_are_far_too_large() -> None:
    generator = torch.Generator().manual_seed(0)
    logit = 9.0 * torch.sign(torch.randn(2_000, generator=generator, dtype=torch.float64))
    label = torch.rand(2_000, generator=generator, dtype=torch.float64) < (logit / 5.0).sigmoid()
    fitted = LogitCalibration.fit(logit, label)
    assert fitted.scale == pytest.approx(0.2, abs=0.02)


def test_platt_scaling_survives_labels_that_are_all_alike() -> None:
    fitted = LogitCalibration.fit(torch.linspace(-1, 1, 50).double(), torch.ones(50, dtype=torch.bool))
    assert fitted(torch.zeros(1).double()).item() > 0.9


def test_spearman_counts_order_only_and_averages_ties() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert spearman(x, x**3) == pytest.approx(1.0)
    assert spearman(x, -x) == pytest.approx(-1.0)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    assert spearman(torch.tensor([1.0, 2.0, 2.0, 3.0]), x) == pytest.approx(4.5 / (4.5 * 5.0) ** 0.5)
