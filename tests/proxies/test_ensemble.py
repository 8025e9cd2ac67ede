"""The shipped ensemble: chemistry it must know, how it reacts to volume, and how it is stored."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from proxies import PRETRAINED, PropertyEnsemble, ProxyError, load_pretrained, median_gap, p_metastable
from proxies.augment import random_alternative
from proxies.base import Prediction
from proxies.ensemble import DESCRIPTION, WEIGHTS
from tests.proxies.textbook import TEXTBOOK, random_crystals, textbook

# formation energies, eV/atom: Materials Project (PBE, MP2020 corrections), rounded; NaCl also CRC: -411 kJ/mol = -2.13
FORMATION_ENERGY = {"NaCl": -2.10, "MgO": -3.05, "TiO2": -3.45, "Al2O3": -3.43, "ZnS": -1.05, "Ni3Al": -0.43, "Cu": 0.0}


@pytest.fixture(scope="module")
def ensemble() -> PropertyEnsemble:
    return load_pretrained()


def energies(ensemble: PropertyEnsemble, name: str, volume_ratio: float) -> float:
    prediction = ensemble.predict_all(textbook(name, volume_ratio=volume_ratio))
    return prediction["formation_energy_per_atom"].mean.item()


@pytest.mark.parametrize(("name", "expected"), FORMATION_ENERGY.items())
def test_formation_energies_of_textbook_crystals(ensemble, name: str, expected: float) -> None:
    assert energies(ensemble, name, 1.0) == pytest.approx(expected, abs=0.2)


def test_metals_are_metals_and_insulators_are_not(ensemble) -> None:
    gap = ensemble.predict_all(textbook("Cu", "Al", "Ni3Al", "NaCl", "MgO", "Al2O3"))["band_gap"]
    assert (gap.p_metal[:3] > 0.8).all()
    assert (gap.p_metal[3:] < 0.2).all()
    assert (gap.mean[3:] > 3.5).all()  # PBE gaps: NaCl 5.0, MgO 4.5, Al2O3 5.9 eV
    assert median_gap(gap)[:3].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["NaCl", "MgO", "Cu", "Al", "Ni3Al", "CaTiO3"])
def test_squeezed_and_blown_up_crystals_cost_energy(ensemble, name: str) -> None:
    relaxed = energies(ensemble, name, 1.0)
    for ratio in (0.4, 0.7, 1.5, 3.0, 10.0):
        assert energies(ensemble, name, ratio) > relaxed + 0.05, ratio
    assert energies(ensemble, name, 0.5) > energies(ensemble, name, 0.7)
    assert energies(ensemble, name, 3.0) > energies(ensemble, name, 1.5)


def test_strained_salt_is_less_stable_too(ensemble) -> None:
    stable, squeezed = (ensemble.predict_all(textbook("NaCl", volume_ratio=r))["e_above_hull"] for r in (1.0, 0.5))
    assert p_metastable(stable).item() > 0.6
    assert p_metastable(squeezed).item() < 0.1


def test_equivalent_letters_get_nearly_the_same_prediction(ensemble) -> None:
    crystals = textbook(*TEXTBOOK)
    first = ensemble.predict_all(crystals)["formation_energy_per_atom"]
    other = random_alternative(crystals, torch.Generator().manual_seed(1))
    second = ensemble.predict_all(other)["formation_energy_per_atom"]
    assert (first.mean - second.mean).abs().max() < 0.1  # averaged by augmentation, so not exact
    assert ((first.mean - second.mean).abs() < first.std).all()


def test_predictions_without_letters_stay_close(ensemble) -> None:
    crystals = textbook(*TEXTBOOK)
    difference = (
        ensemble.predict_all(crystals)["formation_energy_per_atom"].mean
        - ensemble.predict_all(crystals.without_letters())["formation_energy_per_atom"].mean
    )
    assert difference.abs().max() < 0.3


def test_median_of_a_mixture_solves_its_distribution_function() -> None:
    p, m, s = 0.3, 2.0, 0.5
    mean = (1 - p) * m
    std = math.sqrt((1 - p) * (s**2 + m**2) - mean**2)
    tensor = torch.tensor([mean, std, p], dtype=torch.float64)
    median = median_gap(Prediction(tensor[:1], tensor[1:2], tensor[2:]))
    below = p + (1 - p) * torch.special.ndtr((median - m) / s)
    assert below.item() == pytest.approx(0.5)
    with pytest.raises(ProxyError, match="only a prediction of a band gap"):
        median_gap(Prediction(tensor[:1], tensor[1:2]))


def test_chance_to_be_metastable_is_the_gaussian_integral() -> None:
    prediction = Prediction(torch.tensor([0.1, 0.0, 0.3]).double(), torch.tensor([0.05, 0.1, 0.1]).double())
    assert p_metastable(prediction).tolist() == pytest.approx([0.5, 0.8413, 0.0228], abs=1e-4)


def test_saved_ensemble_predicts_the_same(ensemble, tmp_path: Path) -> None:
    ensemble.save(tmp_path)
    again = PropertyEnsemble.load(tmp_path)
    crystals = random_crystals(40)
    for name, prediction in ensemble.predict_all(crystals).items():
        assert_close(again.predict_all(crystals)[name].mean, prediction.mean)
        assert_close(again.predict_all(crystals)[name].std, prediction.std)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([WEIGHTS, DESCRIPTION])


def test_threads_change_nothing_but_the_time(ensemble) -> None:
    crystals, n_threads = random_crystals(700), torch.get_num_threads()
    alone = ensemble.predict_all(crystals)["band_gap"].mean
    try:
        torch.set_num_threads(2)
        together = ensemble.predict_all(crystals)["band_gap"].mean
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(n_threads)
    assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_damaged_and_foreign_files_are_named(ensemble, tmp_path: Path) -> None:
    with pytest.raises(ProxyError, match="holds no readable proxy ensemble"):
        PropertyEnsemble.load(tmp_path)
    ensemble.save(tmp_path)
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ProxyError, match="holds no readable proxy ensemble"):
        PropertyEnsemble.load(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(weights)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    (tmp_path / DESCRIPTION).write_text(json.dumps({**description, "format": "something else"}))
    with pytest.raises(ProxyError, match="not of the format"):
        PropertyEnsemble.load(tmp_path)
    description["network"]["width"] *= 2
    (tmp_path / DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(ProxyError, match="do not fit together"):
        PropertyEnsemble.load(tmp_path)


def test_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) < 10_000_000
