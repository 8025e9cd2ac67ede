import math

import numpy as np
import pytest

from discover.metrics.intervals import bootstrap_interval, paired_difference, wilson_interval


def test_wilson_interval_of_a_textbook_case() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_wilson_interval_stays_inside_zero_and_one() -> None:
    low, high = wilson_interval(0, 20)
    assert low == 0.0
    assert 0.1 < high < 0.2


def test_bootstrap_interval_agrees_with_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(0).normal(1.0, 2.0, 2000)
    low, high = bootstrap_interval(values)
    half_width = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half_width, values.mean() + half_width), abs=0.1 * half_width)


def test_bootstrap_of_one_value_has_no_interval() -> None:
    assert all(math.isnan(end) for end in bootstrap_interval([1.0]))


def test_pairing_narrows_the_interval_of_a_shared_difficulty() -> None:
    rng = np.random.default_rng(1)
    b = rng.random(500) < 0.6
    a = b | (rng.random(500) < 0.1)
    paired = paired_difference(a, b)
    shuffled = paired_difference(a, rng.permutation(b))
    assert paired.mean == pytest.approx(a.mean() - b.mean())
    assert paired.low > 0.0
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="same structures"):
        paired_difference([True, False], [True])
