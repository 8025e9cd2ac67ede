import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from discover.metrics.matching import (
    MATCHER,
    best_rms,
    first_hits,
    first_match,
    match_predictions,
    match_rate,
    metre,
    penalised_rms,
    rms_distance,
    rmse,
    rmse_all,
)

NAN = float("nan")
RMS = np.array([[NAN, 0.2, 0.1], [0.3, NAN, 0.4], [NAN, NAN, NAN]])


def rock_salt(a: float = 5.6, cation: str = "Na", anion: str = "Cl") -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def caesium_chloride(cation: str = "Na", anion: str = "Cl") -> Structure:
    return Structure(Lattice.cubic(3.5), [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


def rutile(x: float = 0.305) -> Structure:
    return Structure.from_spacegroup("P4_2/mnm", Lattice.tetragonal(4.6, 2.96), ["Ti", "O"], [[0, 0, 0], [x, x, 0]])


def anatase() -> Structure:
    return Structure.from_spacegroup(
        "I4_1/amd", Lattice.tetragonal(3.78, 9.51), ["Ti", "O"], [[0, 0, 0], [0, 0, 0.208]]
    )


def test_best_of_k() -> None:
    assert np.isnan(best_rms(RMS, 1)).tolist() == [True, False, True]
    assert best_rms(RMS, 3)[:2].tolist() == [0.1, 0.3]
    assert first_hits(RMS, 2).tolist() == [True, True, False]
    assert penalised_rms(RMS, 2).tolist() == [0.2, 0.3, 0.5]
    assert first_match(RMS).tolist() == [2, 1, 0]


def test_figures_of_a_table() -> None:
    assert match_rate(RMS, 1) == pytest.approx(1 / 3)
    assert match_rate(RMS, 20) == pytest.approx(2 / 3)
    assert rmse(RMS, 3) == pytest.approx(0.2)
    assert rmse_all(RMS, 3) == pytest.approx((0.1 + 0.3 + 0.5) / 3)
    assert np.isnan(rmse(RMS[2:], 3))


def test_no_predictions_at_all_are_misses() -> None:
    assert match_rate(np.zeros((4, 0)), 1) == 0.0
    assert rmse_all(np.zeros((4, 0)), 1) == 0.5


def test_primitive_and_conventional_cells_give_one_distance() -> None:
    truth = rutile()
    for prediction in (rutile(0.28), rutile(0.28).to_conventional(), rutile(0.28) * (1, 1, 2)):
        assert rms_distance((prediction, truth)) == pytest.approx(rms_distance((rutile(0.28), truth)), abs=1e-6)
    conventional = anatase()
    primitive = conventional.get_primitive_structure()
    shifted = primitive.copy().perturb(0.15, seed=0)
    assert rms_distance((conventional, shifted)) > 0.01
    assert rms_distance((conventional, shifted)) == pytest.approx(rms_distance((primitive, shifted)), abs=1e-6)


def test_predictions_are_compared_with_their_truths() -> None:
    truths = [rock_salt(), rutile(), rock_salt(cation="Lu")]
    predictions = [
        [caesium_chloride(), rock_salt(5.0), None],
        [rock_salt()],  # another composition
        [rock_salt(cation="Lu", a=4.3)],
    ]
    matches = match_predictions(predictions, truths, n_workers=0)
    assert first_match(matches.rms).tolist() == [2, 0, 1]
    assert matches.rms.shape == (3, 3)
    assert matches.failures == ()
    # LuCl has no neutral combination, so the pair counts in the unfiltered figure only
    assert first_match(matches.rms_filtered).tolist() == [2, 0, 0]
    assert match_rate(matches.rms, 1) == pytest.approx(1 / 3)


def test_a_prediction_that_finds_the_other_polymorph_counts_in_metre_only() -> None:
    matches = match_predictions([[anatase()], [rutile()]], [rutile(), anatase()], n_workers=0)
    assert match_rate(matches.rms, 1) == 0.0
    assert metre(matches.rms_of_anyone, 1) == 1.0


def test_a_pair_that_takes_too_long_is_a_miss_with_a_reason() -> None:
    slow = rutile() * (3, 3, 4)
    slow.perturb(0.2)
    matches = match_predictions([[slow]], [slow.copy().perturb(0.2)], time_limit=0.01, n_workers=1)
    assert match_rate(matches.rms, 1) == 0.0
    assert matches.failures[0][:2] == (0, 0)
    assert "killed" in matches.failures[0][2]


def test_tolerances_are_those_of_the_field() -> None:
    assert (MATCHER.stol, MATCHER.angle_tol, MATCHER.ltol) == (0.5, 10, 0.3)
