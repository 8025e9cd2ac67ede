import math

import pytest

from discover.metrics.distributions import density_distance, element_number_distance, space_group_distance


def test_a_shift_of_all_densities_is_their_distance() -> None:
    assert density_distance([1.0, 2.0, 3.0], [1.5, 2.5, 3.5]) == pytest.approx(0.5)


def test_distance_of_element_numbers_is_the_mass_that_moves_times_how_far() -> None:
    assert element_number_distance([2, 2, 2, 3], [2, 2, 3, 3]) == pytest.approx(0.25)


def test_space_group_distance_is_zero_for_equal_and_sqrt_ln_2_for_disjoint_frequencies() -> None:
    assert space_group_distance([1, 225], [1, 1, 225, 225]) == pytest.approx(0.0, abs=1e-7)
    assert space_group_distance([1, 2], [230, 229]) == pytest.approx(math.sqrt(math.log(2)))
