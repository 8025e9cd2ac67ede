import numpy as np
from pymatgen.core import Lattice, Structure

from discover.metrics.novelty_uniqueness import novel_structures, unique_structures


def rock_salt(a: float, cation: str = "Na") -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(a), [cation, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


CESIUM_CHLORIDE = Structure(Lattice.cubic(3.5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_the_first_of_each_kind_is_unique_and_a_failure_is_not() -> None:
    structures = [rock_salt(5.64), None, CESIUM_CHLORIDE, rock_salt(5.70), rock_salt(6.0, "K")]
    found = unique_structures(structures, n_workers=0)
    assert found.tolist() == [True, False, True, False, True]


def test_a_structure_is_known_if_one_of_its_formula_matches() -> None:
    structures = [rock_salt(5.64), CESIUM_CHLORIDE, rock_salt(6.0, "K"), None]
    known = {"NaCl": [rock_salt(5.5).get_primitive_structure()]}
    found = novel_structures(structures, lambda formula: known.get(formula, []), n_workers=0)
    assert found.tolist() == [False, True, True, False]


def test_nothing_is_neither_unique_nor_novel() -> None:
    assert unique_structures([None], n_workers=0).tolist() == [False]
    assert novel_structures([], lambda _: [], n_workers=0).shape == np.zeros(0).shape
