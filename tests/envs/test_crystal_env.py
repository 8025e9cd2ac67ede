"""The description of a space is checked where the environment is built."""

from dataclasses import replace

import pytest

from envs.crystal_env import CrystalEnv
from envs.errors import RestrictionError
from envs.restrictions import mp20_space

SMALL = replace(mp20_space(), max_count=4, n_atoms=(1, 4), n_elements=(1, 2))


@pytest.mark.parametrize("elements", [("O", "Li"), ("Li", "Li", "O")])
def test_elements_out_of_order_are_refused(elements: tuple[str, ...]) -> None:
    with pytest.raises(RestrictionError, match="in order of increasing electronegativity"):
        CrystalEnv(replace(SMALL, elements=elements))


def test_an_unknown_chemistry_is_refused() -> None:
    with pytest.raises(RestrictionError, match="chemistry must be 'ionic' or 'any', got 'covalent'"):
        CrystalEnv(replace(SMALL, elements=("Li", "O"), chemistry="covalent"))


def test_groups_that_cannot_hold_any_composition_are_masked() -> None:
    env = CrystalEnv(replace(SMALL, elements=("Na", "Cl"), n_atoms=(2, 2)))
    # Two atoms of two elements need two positions of multiplicity one; 227 starts at two.
    assert not bool(env.group_mask[226])
    assert bool(env.group_mask[224])
