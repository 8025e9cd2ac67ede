import numpy as np
import pytest
import torch

from discover.gap_scale import INTERCEPT, REFERENCE_GAPS, RESIDUAL, SLOPE, to_experiment, to_pbe


def test_the_documented_line_is_as_close_to_the_table_as_its_own_best_fit() -> None:
    pbe = np.array([row[2] for row in REFERENCE_GAPS])
    measured = np.array([row[3] for row in REFERENCE_GAPS])
    fit = np.polyfit(pbe, measured, 1)
    best = np.sqrt(np.mean((measured - np.polyval(fit, pbe)) ** 2))
    assert pytest.approx(0.79, abs=0.01) == RESIDUAL
    assert best > 0.95 * RESIDUAL


def test_pbe_is_a_bit_over_half_of_experiment() -> None:
    assert np.median([pbe / measured for _, _, pbe, measured in REFERENCE_GAPS]) == pytest.approx(0.57, abs=0.02)


def test_the_scatter_of_the_line_is_added_in_quadrature() -> None:
    mean, std = to_experiment(torch.tensor([1.0]), torch.tensor([0.3]))
    assert float(mean) == pytest.approx(SLOPE + INTERCEPT)
    assert float(std) == pytest.approx(np.hypot(SLOPE * 0.3, RESIDUAL))


def test_the_way_back_ends_at_metals() -> None:
    assert to_pbe(SLOPE * 1.1 + INTERCEPT) == pytest.approx(1.1)
    assert to_pbe(0.3) == 0.0
