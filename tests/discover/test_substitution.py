import pytest
import torch
from pymatgen.core import Element, Lattice, Structure

from discover.metrics.validity import compositional_validity
from discover.substitution import SubstitutionError, similar_elements, substitute


def rock_salt(cation: str, anion: str) -> Structure:
    return Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), [cation, anion], [[0, 0, 0], [0.5, 0.5, 0.5]])


PARENTS = [rock_salt(c, a) for c in ("Li", "Na", "K", "Rb", "Cs") for a in ("F", "Cl", "Br", "I")]


def test_neighbours_are_alike() -> None:
    nearest = similar_elements(tuple(range(1, 84)))
    assert Element("K").Z in nearest[Element("Rb").Z]
    assert Element("Br").Z in nearest[Element("Cl").Z]
    assert all(len(row) == 6 and z not in row for z, row in nearest.items())


def test_children_are_new_valid_and_keep_the_parents_geometry() -> None:
    known = {"NaCl", "KCl", "LiF"}
    found = substitute(PARENTS, 30, known=known, generator=torch.Generator().manual_seed(0))
    assert len(found) == 30
    for child in found:
        assert child.composition.reduced_formula not in known
        assert len(child.composition) == 2
        assert child.lattice == PARENTS[0].lattice
    assert all(compositional_validity([child.composition], protocol="smact4")[0] for child in found)
    assert len({child.composition.reduced_formula for child in found}) > 10


def test_the_seed_decides() -> None:
    first, second, other = (
        [
            item.composition.formula
            for item in substitute(PARENTS, 5, known=(), generator=torch.Generator().manual_seed(s))
        ]
        for s in (1, 1, 2)
    )
    assert first == second != other


def test_parents_that_yield_too_little_are_named() -> None:
    with pytest.raises(SubstitutionError, match="needs parents"):
        substitute([], 1, known=(), generator=torch.Generator())
    with pytest.raises(SubstitutionError, match="1 parents gave 0 of the 1"):
        substitute([rock_salt("Na", "Cl")], 1, known={"NaCl"}, generator=torch.Generator())
