"""What a single point of a built structure changes in predictions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from discover.oracle.base import P_METAL, Label, LabelStatus
from discover.screen import Trust, screened
from proxies.base import Prediction

NO_TRUST = Trust({}, {})


def look(energy: float, gap: float = math.nan, p_metal: float = math.nan) -> Label:
    properties = {} if math.isnan(p_metal) else {P_METAL: p_metal}
    return Label(status=LabelStatus.SINGLE_POINT, formation_energy_per_atom=energy, band_gap=gap, properties=properties)


def proxies(n: int, *, gap: float = 1.0, p_metal: float = 0.2, std: float = 0.1) -> dict[str, Prediction]:
    whole, ones = (1 - p_metal) * gap, torch.ones(n, dtype=torch.float64)
    gap_std = math.sqrt((1 - p_metal) * (0.3**2 + gap**2) - whole**2)
    return {
        "formation_energy_per_atom": Prediction(-1.0 * ones, std * ones),
        "e_above_hull": Prediction(0.05 * ones, std * ones),
        "band_gap": Prediction(whole * ones, gap_std * ones, p_metal * ones),
        "density": Prediction(5 * ones, 0 * ones),
    }


@given(st.lists(st.floats(-0.5, 5.0), min_size=2, max_size=8))
def test_the_higher_a_structure_is_built_the_higher_it_is_expected_to_end(built: list[float]) -> None:
    built = sorted(built)
    looks = [look(-2.0 + above) for above in built]  # the hull is at -2 eV/atom
    known = screened(proxies(len(built), std=1e6), looks, built, NO_TRUST)
    above = known["e_above_hull"].mean
    assert bool((above.diff() >= -1e-9).all())
    assert bool((above <= torch.tensor(built) + 1e-6).all() or built[0] < 0)
    torch.testing.assert_close(known["formation_energy_per_atom"].mean, above - 2.0)


def test_what_is_known_weighs_by_how_well_it_is_known() -> None:
    sure, vague = (screened(proxies(1, std=std), [look(-1.5)], [0.56], NO_TRUST)["e_above_hull"] for std in (1e-3, 1e3))
    assert float(sure.mean) == pytest.approx(0.05, abs=1e-3)
    assert float(vague.mean) == pytest.approx(0.28, abs=1e-3)
    assert float(vague.std) == pytest.approx(0.15, abs=1e-3)


def test_what_was_not_seen_stays_as_the_proxies_have_it() -> None:
    before = proxies(2)
    after = screened(before, [look(math.nan)] * 2, [math.nan] * 2, NO_TRUST)
    for name, prediction in before.items():
        torch.testing.assert_close(after[name].mean, prediction.mean)
        torch.testing.assert_close(after[name].std, prediction.std)


def test_a_gap_that_is_seen_moves_the_gap_and_a_metal_that_is_seen_is_likelier_one() -> None:
    looks = [look(-1.0, 2.0, 0.02), look(-1.0, 0.0, 0.98), look(-1.0, 1.0, 0.2)]
    gap = screened(proxies(3), looks, [0.0, 0.0, 0.0], NO_TRUST)["band_gap"]
    assert gap.p_metal is not None
    assert gap.p_metal[1] > 0.6
    assert gap.p_metal[0] < 0.1
    assert gap.mean[0] > gap.mean[2] > gap.mean[1]
    crowded = screened(proxies(1), [look(-0.4, 1.0, 0.2)], [0.6], NO_TRUST)["band_gap"]
    assert crowded.mean[0] > gap.mean[2]  # relaxation opens gaps


def test_labels_correct_what_the_tables_are_wrong_about() -> None:
    generator = torch.Generator().manual_seed(0)
    errors = 0.1 + 0.15 * torch.randn(2000, generator=generator)  # shifted, and wider than the 0.1 that was claimed
    trust = Trust.of({"e_above_hull": [(0.0, 0.1)] * 2000}, {"e_above_hull": errors.tolist()})
    assert trust.shift["e_above_hull"] == pytest.approx(0.1, abs=0.02)
    assert trust.factor["e_above_hull"] == pytest.approx(1.5, abs=0.1)
    few = Trust.of({"e_above_hull": [(0.0, 0.1)] * 2}, {"e_above_hull": [0.1, math.nan]})
    assert few.shift["e_above_hull"] == pytest.approx(0.1 / 11)
    none = Trust.of({"e_above_hull": []}, {"e_above_hull": []})
    assert (none.shift["e_above_hull"], none.factor["e_above_hull"]) == (0.0, 1.0)
    looks, built = [look(-1.0)], [0.1]
    plain = screened(proxies(1), looks, built, NO_TRUST)["e_above_hull"]
    corrected = screened(proxies(1), looks, built, trust)["e_above_hull"]
    assert float(corrected.mean - plain.mean) == pytest.approx(trust.shift["e_above_hull"])
    assert float(corrected.std / plain.std) == pytest.approx(trust.factor["e_above_hull"])


def test_more_labels_find_the_whole_of_a_bias() -> None:
    """Rounds keep what the tables said, not what was made of it: what was corrected once stays as it was told."""
    generator = torch.Generator().manual_seed(0)
    told, found, shifts = [], [], []
    for _ in range(6):
        plain = screened(proxies(40, std=1e6), [look(-1.5)] * 40, [0.26] * 40, NO_TRUST)["e_above_hull"]
        told += list(zip(plain.mean.tolist(), plain.std.tolist(), strict=True))
        found += (plain.mean + 0.1 + 0.05 * torch.randn(40, generator=generator)).tolist()
        shifts.append(Trust.of({"e_above_hull": told}, {"e_above_hull": found}).shift["e_above_hull"])
    assert shifts[-1] == pytest.approx(0.1, abs=0.01)
