import numpy as np
import pytest
from pymatgen.core import Composition, Lattice, Structure
from smact.screening import smact_validity

from discover.metrics.validity import COMPOSITION_PROTOCOLS, compositional_validity, structural_validity


def two_atoms(distance: float, edge: float = 10.0) -> Structure:
    return Structure(Lattice.cubic(edge), ["Na", "Cl"], [[0, 0, 0], [distance / edge, 0, 0]])


def test_atoms_closer_than_half_an_angstrom_are_invalid() -> None:
    assert structural_validity([two_atoms(0.51), two_atoms(0.49), None]).tolist() == [True, False, False]


def test_distance_is_taken_through_the_cell_boundary() -> None:
    assert structural_validity([two_atoms(9.6)]).tolist() == [False]


def test_collapsed_and_non_finite_cells_are_invalid() -> None:
    collapsed = Structure(Lattice.cubic(0.4), ["Na"], [[0, 0, 0]])
    broken = two_atoms(float("nan"))
    assert structural_validity([collapsed, broken]).tolist() == [False, False]


def test_known_compositions() -> None:
    formulas = {"NaCl": True, "Na2Cl": False, "Cu3Au": True, "Fe": True, "LiHe2": False}
    valid = compositional_validity([Composition(formula) for formula in formulas])
    assert dict(zip(formulas, valid.tolist(), strict=True)) == formulas


def test_missing_composition_is_invalid() -> None:
    assert compositional_validity([None]).tolist() == [False]


@pytest.mark.parametrize("protocol", list(COMPOSITION_PROTOCOLS))
def test_agrees_with_smact_on_random_compositions(protocol) -> None:
    rng = np.random.default_rng(0)
    elements = np.array(["Na", "Fe", "O", "S", "Cl", "Ti", "La", "N"])
    compositions = [
        Composition(dict(zip(rng.choice(elements, 3, replace=False), rng.integers(1, 5, 3).tolist(), strict=True)))
        for _ in range(40)
    ]
    expected = [bool(smact_validity(c, **COMPOSITION_PROTOCOLS[protocol])) for c in compositions]
    assert compositional_validity(compositions, protocol=protocol).tolist() == expected
    assert 0 < sum(expected) < len(expected)


def test_unknown_protocol_is_an_error() -> None:
    with pytest.raises(KeyError):
        compositional_validity([Composition("NaCl")], protocol="mine")
