"""Density is exact: it agrees with pymatgen."""

import pytest
from pymatgen.core import Lattice, Structure

from proxies import DensityProxy
from tests.proxies.textbook import textbook


def test_density_agrees_with_pymatgen() -> None:
    salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    corundum = Structure.from_spacegroup(
        "R-3c", Lattice.hexagonal(4.76, 12.99), ["Al", "O"], [[0, 0, 0.3522], [0.3063, 0, 0.25]]
    )
    predicted = DensityProxy().predict(textbook("NaCl", "Al2O3"))
    assert predicted.mean.tolist() == pytest.approx([float(salt.density), float(corundum.density)], rel=1e-6)
    assert predicted.std.tolist() == [0.0, 0.0]


def test_density_of_copper_is_the_handbook_value() -> None:
    assert DensityProxy().predict(textbook("Cu")).mean.item() == pytest.approx(8.96, rel=0.01)


def test_density_does_not_need_letters() -> None:
    crystals = textbook("NaCl", "TiO2", "Al2O3")
    with_letters, without = DensityProxy().predict(crystals), DensityProxy().predict(crystals.without_letters())
    assert without.mean.tolist() == pytest.approx(with_letters.mean.tolist())
