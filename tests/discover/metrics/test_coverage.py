import numpy as np
import pytest

from discover.metrics.coverage import coverage_precision, coverage_recall, nearest_distances


def fingerprints(structure: list[float], composition: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(structure)[:, None], np.array(composition)[:, None]


def test_crystals_cover_what_is_near_in_both_fingerprints() -> None:
    # compositions of the reference have a standard deviation of 0.5, so 10 of them are 5
    reference = fingerprints([0.0, 10.0], [0.0, 1.0])
    generated = fingerprints([0.3, 0.5, 10.0], [0.0, 0.0, 6.1])
    distances = nearest_distances(*generated, *reference)
    assert coverage_precision(distances) == pytest.approx(1 / 3)  # too far in structure; too far in composition
    assert coverage_recall(distances) == pytest.approx(1.0)


def test_nearest_crystals_of_the_two_fingerprints_may_differ_as_published() -> None:
    reference = fingerprints([0.0, 10.0], [0.0, 1.0])
    generated = fingerprints([0.0, 50.0], [90.0, 0.0])
    distances = nearest_distances(*generated, *reference)
    assert coverage_recall(distances) == pytest.approx(0.5)
    assert coverage_precision(distances) == 0.0


def test_a_crystal_without_fingerprint_covers_nothing_and_stays_in_the_denominator() -> None:
    reference = fingerprints([0.0, 1.0], [0.0, 1.0])
    generated = fingerprints([0.0, np.nan], [0.0, 1.0])
    distances = nearest_distances(*generated, *reference)
    assert coverage_precision(distances) == pytest.approx(0.5)
    assert np.isinf(distances.structure_of_generated[1])


def test_nothing_generated_covers_nothing() -> None:
    reference = fingerprints([0.0, 1.0], [0.0, 1.0])
    distances = nearest_distances(*fingerprints([np.nan], [np.nan]), *reference)
    assert coverage_recall(distances) == coverage_precision(distances) == 0.0


def test_distances_do_not_depend_on_the_size_of_the_chunks(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    sets = rng.random((9, 4)), rng.random((9, 3)), rng.random((7, 4)), rng.random((7, 3))
    whole = nearest_distances(*sets)
    monkeypatch.setattr("discover.metrics.coverage._ROWS", 2)
    parts = nearest_distances(*sets)
    np.testing.assert_allclose(parts.structure_of_reference, whole.structure_of_reference)
    np.testing.assert_allclose(parts.composition_of_generated, whole.composition_of_generated)


def test_a_property_that_varies_by_rounding_alone_is_no_scale() -> None:
    structure = np.zeros((4, 2))
    composition = np.array([[3.44, 0.0], [3.44 + 4e-16, 1.0], [3.44, 2.0], [3.44 - 4e-16, 3.0]])
    distances = nearest_distances(structure[:1], np.array([[3.98, 0.0]]), structure, composition)
    assert distances.composition_of_generated[0] == pytest.approx(0.54)
