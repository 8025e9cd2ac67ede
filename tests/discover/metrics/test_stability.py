import math

import numpy as np
import pytest

from discover.metrics.stability import (
    Outcomes,
    cost_per_structure,
    metastable_rate,
    metastable_sun_rate,
    stable_rate,
    sun_rate,
)

OUTCOMES = Outcomes(
    e_above_hull=np.array([-0.2, 0.0, 0.05, 0.3, np.nan]),
    unique=np.array([True, False, True, True, True]),
    novel=np.array([True, True, True, True, False]),
)


def test_failures_stay_in_the_denominator() -> None:
    assert stable_rate(OUTCOMES)[:3] == (2, 5, 0.4)
    assert metastable_rate(OUTCOMES)[:3] == (3, 5, 0.6)


def test_sun_needs_all_three() -> None:
    assert sun_rate(OUTCOMES).hits == 1
    assert metastable_sun_rate(OUTCOMES).hits == 2


def test_a_lower_hull_leaves_fewer_stable_structures() -> None:
    assert stable_rate(OUTCOMES, hull_shift=-0.06).hits == 1
    assert stable_rate(OUTCOMES, hull_shift=0.06).hits == 3


def test_intervals_are_wilsons() -> None:
    # 2 of 5: (0.1176, 0.7693), the values of Wilson's formula
    assert stable_rate(OUTCOMES)[3:] == pytest.approx((0.1176, 0.7693), abs=1e-4)


def test_cost_is_spread_over_the_hits() -> None:
    assert cost_per_structure(10.0, stable_rate(OUTCOMES)) == pytest.approx(5.0)
    assert cost_per_structure(10.0, sun_rate(OUTCOMES, hull_shift=-1.0)) == math.inf


def test_outcomes_must_be_of_the_same_structures() -> None:
    with pytest.raises(ValueError, match="same structures"):
        Outcomes(np.zeros(2), np.ones(2, dtype=bool), np.ones(3, dtype=bool))
