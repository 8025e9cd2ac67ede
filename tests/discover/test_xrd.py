import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from discover.plots import png
from discover.xrd import plot_pattern, powder_pattern

NACL = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6402), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_the_pattern_of_halite_is_the_measured_one() -> None:
    # Powder diffraction file 5-628 (NaCl, a = 5.6402 Å, Cu Kα1): d in Å, relative intensity.
    measured = {"1 1 1": (3.260, 13), "2 0 0": (2.821, 100), "2 2 0": (1.994, 55), "2 2 2": (1.628, 15)}
    pattern = powder_pattern(NACL).set_index("hkl")
    assert (pattern["two_theta"].diff().dropna() > 0).all()
    assert pattern["intensity"].idxmax() == "2 0 0"
    for hkl, (d, intensity) in measured.items():
        assert pattern.loc[hkl, "d"] == pytest.approx(d, abs=5e-3)  # the file rounds
        # Without temperature factors the strong lines at high angles come out up to a fifth too strong.
        assert pattern.loc[hkl, "intensity"] == pytest.approx(intensity, abs=12)
    assert pattern.loc["2 0 0", "two_theta"] == pytest.approx(31.7, abs=0.05)
    assert pattern.loc["1 1 1", "multiplicity"] == 8


def test_any_cell_of_a_crystal_has_the_same_peaks() -> None:
    one, other = powder_pattern(NACL), powder_pattern(NACL.get_primitive_structure())
    np.testing.assert_allclose(one["two_theta"], other["two_theta"], atol=1e-6)
    assert one["hkl"].tolist() == other["hkl"].tolist()
    np.testing.assert_allclose(one["intensity"], other["intensity"], rtol=1e-6)


def test_the_plot_is_a_png_also_without_peaks() -> None:
    pattern = powder_pattern(NACL)
    assert png(plot_pattern(pattern, "NaCl")).startswith(b"\x89PNG")
    assert png(plot_pattern(pattern.head(0), "nothing")).startswith(b"\x89PNG")
