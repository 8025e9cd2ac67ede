"""The cost of wrong volumes: an equation of state with bulk moduli of the right size."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from proxies import PRETRAINED, ProxyError
from proxies.augment import strain
from proxies.equation_of_state import MAX_RISE, EquationOfState, fit_curve, rise
from tests.proxies.textbook import textbook

EV_PER_CUBIC_ANGSTROM = 160.2177  # in GPa


@pytest.fixture(scope="module")
def shipped() -> EquationOfState:
    return EquationOfState.load(PRETRAINED / "equation_of_state.json")


def test_rise_is_zero_at_equilibrium_with_the_stiffness_as_curvature() -> None:
    stiffness, width = torch.tensor([10.0]).double(), torch.tensor([0.2]).double()
    x = torch.tensor([-1e-3, 0.0, 1e-3]).double()
    energy = rise(x, stiffness, width)
    assert energy[1].item() == 0.0
    curvature = (energy[0] + energy[2] - 2 * energy[1]) / 1e-6
    assert curvature.item() == pytest.approx(10.0, rel=1e-3)  # d²E/dx² = B V0


def test_rise_grows_away_from_equilibrium_and_stays_bounded() -> None:
    x = torch.linspace(-4.0, 6.0, 101).double()
    energy = rise(x, torch.full_like(x, 10.0), torch.full_like(x, 0.2))
    assert (energy[x < 0].diff() <= 0).all()
    assert (energy[x > 0].diff() >= 0).all()
    assert energy.max() <= MAX_RISE


def test_fit_recovers_the_parameters_of_a_curve() -> None:
    ratios = np.array([0.75, 0.85, 0.93, 1.0, 1.07, 1.18, 1.35, 1.6])
    a = (ratios ** (1 / 3) - 1) / 0.22
    energies = -3.0 + 9 * 0.22**2 * 12.0 * (1 - (1 + a) * np.exp(-a))
    assert np.exp(fit_curve(ratios, energies)) == pytest.approx([12.0, 0.22], rel=1e-3)
    assert np.isnan(fit_curve(ratios, -ratios)).all()  # no minimum inside


def test_bulk_moduli_are_of_the_measured_size(shipped: EquationOfState) -> None:
    names = ("NaCl", "MgO", "Cu", "Si", "Al")
    measured = torch.tensor([24.4, 160.0, 140.0, 98.0, 76.0])  # GPa, CRC Handbook; the fit is on CHGNet's PBE
    crystals = textbook(*names)
    stiffness, _ = shipped.parameters(crystals)
    modulus = stiffness / crystals.volume_per_atom * EV_PER_CUBIC_ANGSTROM
    assert (modulus / measured).log().abs().max() < np.log(1.6)


def test_strain_changes_the_volume_by_what_it_says_and_costs_what_the_equation_says(shipped) -> None:
    crystals = textbook("TiO2", "NaCl")
    log_volume = torch.tensor([0.2, -0.1]).double()
    stretched, cost = strain(crystals, log_volume, torch.tensor([0.3, 0.0]).double(), shipped)
    assert_close((stretched.volume / crystals.volume).log(), log_volume)
    ratio = (stretched.lattice_parameters / crystals.lattice_parameters)[:, :3].log()
    assert_close(ratio[0, 2] - ratio[0, 0], torch.tensor(0.3).double())
    assert_close(cost[1], shipped.rise(crystals, log_volume)[1])
    assert cost[0] > shipped.rise(crystals, log_volume)[0]


def test_equation_survives_json_and_damage_is_named(shipped: EquationOfState, tmp_path) -> None:
    shipped.save(tmp_path / "again.json")
    again = EquationOfState.load(tmp_path / "again.json")
    assert_close(again.coefficients, shipped.coefficients, rtol=0, atol=1e-6)
    (tmp_path / "broken.json").write_text('{"properties": [')
    with pytest.raises(ProxyError, match="no equation of state"):
        EquationOfState.load(tmp_path / "broken.json")
