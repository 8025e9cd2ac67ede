import numpy as np
import pytest
from pymatgen.core import Composition, Lattice, Structure

from discover.metrics.fingerprints import (
    N_STRUCTURE_FEATURES,
    composition_features,
    composition_fingerprint,
    structure_fingerprint,
)

ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_composition_fingerprint_is_matminers() -> None:
    # ElementProperty.from_preset("magpie") of matminer 0.10.1 for Fe2O3
    row = composition_fingerprint(Composition("Fe2O3"))
    names = composition_features()
    assert len(row) == len(names) == 132
    expected = {
        "Number minimum": 8.0,
        "Number mean": 15.2,
        "Number avg_dev": 8.64,
        "Number mode": 8.0,
        "MendeleevNumber range": 32.0,
        "Electronegativity mean": 2.796,
        "NdUnfilled maximum": 4.0,
        "GSmagmom mean": 0.84426512,
        "SpaceGroupNumber avg_dev": 104.16,
    }
    found = {name: row[names.index(name)] for name in expected}
    assert found == pytest.approx(expected, rel=1e-6)


def test_mode_of_equally_frequent_elements_is_the_smaller_property() -> None:
    row = composition_fingerprint(Composition("NaCl"))
    assert row[composition_features().index("Number mode")] == 11.0


def test_rock_salt_is_octahedral_and_the_cell_does_not_matter() -> None:
    row = structure_fingerprint(ROCK_SALT)
    assert row.shape == (N_STRUCTURE_FEATURES,)
    weight_of_six, octahedral = row[22], row[24]
    assert (weight_of_six, octahedral) == pytest.approx((1.0, 1.0), abs=1e-3)
    np.testing.assert_allclose(structure_fingerprint(ROCK_SALT.get_primitive_structure()), row, atol=1e-4)
