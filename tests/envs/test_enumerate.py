"""The masks are sound and complete: following them lists exactly what brute force lists."""

from collections import Counter
from dataclasses import replace

import pytest

from envs.crystal import CrystalBatch
from envs.crystal_env import CrystalEnv
from envs.enumerate import enumerate_crystals
from envs.errors import SpaceSizeError
from envs.restrictions import Space, crystal_gfn_space, mp20_space
from tests.envs import brute_force

SMALL = replace(mp20_space(), max_count=6, n_atoms=(1, 6), n_elements=(1, 3))
LI_FE_O = replace(SMALL, elements=("Li", "Fe", "O"), space_groups=(62, 123, 166, 225))
#: Electronegativities tie within (H, Ru, Pt) and (C, Se); H, Pt, C and Se are cations and anions.
TIES = ("H", "Ru", "Pt", "C", "Se")

SPACES: dict[str, Space] = {
    "three elements": LI_FE_O,
    "one fixed position each": replace(LI_FE_O, n_atoms=(1, 8), max_count=8, space_groups=(221, 225, 227)),
    "monoclinic": replace(LI_FE_O, n_atoms=(1, 4), space_groups=(3, 5, 14)),
    "ties": replace(SMALL, elements=TIES, n_atoms=(1, 4), max_count=4, space_groups=(166, 216)),
    "ties without letters": replace(SMALL, elements=TIES, wyckoff=False, space_groups=(1, 47, 225)),
    "four ties": replace(
        SMALL, elements=("Si", "Bi", "Tc", "Te"), wyckoff=False, space_groups=(2, 139), n_elements=(1, 4)
    ),
    "required": replace(LI_FE_O, required=("Fe",), n_elements=(3, 3)),
    "required tie": replace(SMALL, elements=TIES, required=("Ru", "Pt"), wyckoff=False, space_groups=(1, 123)),
    "required last": replace(SMALL, elements=(*TIES, "O"), required=("O",), wyckoff=False, space_groups=(1, 123)),
    "smallest number of atoms": replace(LI_FE_O, n_atoms=(5, 6), n_elements=(2, 2)),
    "total below the elements' sum": replace(LI_FE_O, n_atoms=(2, 5), max_count=4, wyckoff=False),
    "at most two of each": replace(LI_FE_O, max_atoms_per_element=2, n_atoms=(1, 6)),
    "exact counts": replace(LI_FE_O, counts=(("Fe", (2,)), ("O", (1, 3))), n_atoms=(1, 8)),
    "allowed": replace(LI_FE_O, allowed=("Fe", "O"), n_atoms=(1, 8), max_count=8),
    "no charge rule": replace(LI_FE_O, chemistry="any", n_atoms=(1, 4), max_count=4),
    "no charge rule, ties, required": replace(
        SMALL, elements=TIES, chemistry="any", wyckoff=False, required=("C",), space_groups=(12, 194), n_atoms=(2, 6)
    ),
    "conventional cell": replace(
        crystal_gfn_space(),
        elements=("Li", "Fe", "O"),
        n_atoms=(1, 24),
        n_elements=(1, 3),
        space_groups=(12, 123, 166, 225),
    ),
    "conventional cell with letters": replace(
        crystal_gfn_space(),
        elements=("Fe", "O"),
        wyckoff=True,
        n_atoms=(1, 12),
        n_elements=(1, 2),
        space_groups=(139, 166, 225),
    ),
}


def leaves_of(crystals: CrystalBatch) -> list[brute_force.Leaf]:
    rows = zip(
        crystals.space_group.tolist(),
        crystals.elements.tolist(),
        crystals.letters.tolist(),
        crystals.counts.tolist(),
        strict=True,
    )
    return [
        (group, tuple(sorted((z, i, n) for z, i, n in zip(elements, letters, counts, strict=True) if n > 0)))
        for group, elements, letters, counts in rows
    ]


@pytest.mark.parametrize("name", SPACES)
def test_following_the_masks_lists_every_crystal_once(name: str) -> None:
    listed = Counter(leaves_of(enumerate_crystals(CrystalEnv(SPACES[name]))))
    expected = Counter(brute_force.leaves(SPACES[name]))
    assert len(expected) > 20
    assert listed == expected


def test_mixed_valence_adds_what_two_states_of_one_sign_reach_and_smact_accepts_it() -> None:
    at_most_three = (("Fe", (1, 2, 3)), ("Bi", (1, 2, 3)))  # SMACT tries every site by itself, which grows fast
    space = replace(
        SMALL, elements=("Fe", "Bi", "O"), counts=at_most_three, n_atoms=(1, 7), wyckoff=False, space_groups=(1,)
    )
    plain = {leaf[1] for leaf in leaves_of(enumerate_crystals(CrystalEnv(space)))}
    mixed_space = replace(space, mixed_valence=True)
    mixed = {leaf[1] for leaf in leaves_of(enumerate_crystals(CrystalEnv(mixed_space)))}
    smact = {leaf[1] for leaf in brute_force.leaves(mixed_space)}
    assert plain < mixed <= smact
    magnetite = ((8, -1, 4), (26, -1, 3))
    assert magnetite in mixed - plain


def test_a_space_that_is_too_large_is_refused() -> None:
    with pytest.raises(SpaceSizeError, match="more than 100 crystals"):
        enumerate_crystals(CrystalEnv(LI_FE_O), max_leaves=100)
