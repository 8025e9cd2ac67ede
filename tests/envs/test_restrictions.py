"""Restrictions narrow a space, and bad ones are refused with a message that names the culprits."""

import pytest

from envs.crystal_env import CrystalEnv
from envs.errors import RestrictionError
from envs.restrictions import UNWANTED, Restrictions, crystal_gfn_space, mp20_space, restrict

MP20, CRYSTAL_GFN = mp20_space(), crystal_gfn_space()

BAD: list[tuple[Restrictions, str]] = [
    (Restrictions(elements=["Fe", "Xx"]), "restrict.elements: Xx"),
    (Restrictions(elements=["fe"]), "did you mean Fe"),
    (Restrictions(elements=["He", "O"]), "restrict.elements: He"),
    (Restrictions(elements=[]), "restrict.elements is empty"),
    (Restrictions(exclude=["Zz"]), "restrict.exclude: Zz"),
    (Restrictions(required=["Qq"]), "restrict.required: Qq"),
    (Restrictions(required=["Pm"]), "restrict.required: Pm"),
    (
        Restrictions(elements=["Fe", "O"], required=["Li"]),
        "restrict.required names Li, which restrict.elements leaves out",
    ),
    (Restrictions(elements=["Fe", "O"], exclude=["Fe"]), "restrict.exclude contradicts.*Fe"),
    (Restrictions(elements=["Fe"], exclude=[], n_elements=[2, 3]), "at least 2 elements but only 1 may occur: Fe"),
    (Restrictions(required=["Li", "Fe", "O"], n_elements=[1, 2]), "restrict.required names 3 elements.*at most 2"),
    (Restrictions(n_elements=[3, 2]), r"restrict.n_elements must be \[low, high\]"),
    (Restrictions(n_elements=[7, 9]), "restrict.n_elements.*outside"),
    (Restrictions(n_elements=[0, 0]), "restrict.n_elements.*outside"),
    (Restrictions(n_atoms=[30, 40]), "restrict.n_atoms.*outside"),
    (Restrictions(n_atoms=[1, 2, 3]), "restrict.n_atoms must be"),
    (Restrictions(max_atoms_per_element=0), "restrict.max_atoms_per_element must be at least 1, got 0"),
    (Restrictions(counts={"Fe": [0]}), "restrict.counts of Fe.*1 to 20"),
    (Restrictions(counts={"Fe": [-1]}), "restrict.counts of Fe.*1 to 20"),
    (Restrictions(counts={"Fe": [21]}), "restrict.counts of Fe.*1 to 20"),
    (Restrictions(counts={"Fe": []}), "restrict.counts of Fe.*1 to 20"),
    (Restrictions(counts={"Xx": [1]}), "restrict.counts: Xx"),
    (Restrictions(space_groups=[0]), r"1-230, got \[0\]"),
    (Restrictions(space_groups=[1, 231]), r"1-230, got \[231\]"),
    (Restrictions(space_groups=[]), "leave no space group"),
    (
        Restrictions(space_groups=[225], crystal_systems=["monoclinic"]),
        "space_groups and restrict.crystal_systems leave no",
    ),
    (Restrictions(crystal_systems=["cubical"]), "unknown cubical, did you mean cubic"),
    (Restrictions(length=[5, 4]), "restrict.length must be"),
    (Restrictions(length=[-1, 4]), "restrict.length must be"),
    (Restrictions(length=[float("nan"), 4]), "restrict.length must be"),
    (Restrictions(length=[200, 300]), "restrict.length.*outside"),
    (Restrictions(angle=[100, 80]), "restrict.angle must be"),
    (Restrictions(angle=[10, 20]), r"restrict.angle=\[10.0, 20.0\] leaves no cell"),
    (
        Restrictions(angle=[91, 100], crystal_systems=["cubic"]),
        r"leaves no cell in the allowed lattice systems \(cubic\)",
    ),
    (Restrictions(volume_per_atom=[0, 0]), "restrict.volume_per_atom must be"),
    (Restrictions(volume_per_atom=[9, 8]), "restrict.volume_per_atom must be"),
    (
        Restrictions(volume_per_atom=[5, 30], length=[20, 30]),
        "restrict.length.*restrict.volume_per_atom.*exclude each other",
    ),
    (
        Restrictions(volume_per_atom=[50, 60], length=[1, 4]),
        "restrict.length.*restrict.volume_per_atom.*exclude each other",
    ),
]


@pytest.mark.parametrize(("restrictions", "message"), BAD)
def test_bad_restrictions_are_refused_by_name(restrictions: Restrictions, message: str) -> None:
    with pytest.raises(RestrictionError, match=message):
        restrict(MP20, restrictions)


def test_what_an_environment_does_not_have_is_refused() -> None:
    for restrictions, message in (
        (Restrictions(elements=["Xe", "O"]), "restrict.elements: Xe"),
        (Restrictions(elements=["Tc", "O"]), "restrict.elements: Tc"),
        (Restrictions(required=["Tc"]), "restrict.required: Tc"),
        (Restrictions(space_groups=[17]), "restrict.space_groups .17. are not in this environment's 113 groups"),
    ):
        with pytest.raises(RestrictionError, match=message):
            restrict(CRYSTAL_GFN, restrictions)


NOTHING_LEFT: list[tuple[Restrictions, str]] = [
    (Restrictions(elements=["Na", "K"]), "no charge-neutral, Pauling-ordered composition of K, Na|of Na, K"),
    (Restrictions(elements=["Na", "Cl"], counts={"Na": [1], "Cl": [2]}), "no charge-neutral"),
    (Restrictions(elements=["Na", "Cl"], n_atoms=[3, 3]), "no charge-neutral"),
    (Restrictions(elements=["O"]), "no charge-neutral"),
    (Restrictions(elements=["Na", "Cl"], n_atoms=[2, 2], space_groups=[227]), "none of the 1 allowed space groups"),
    (Restrictions(required=["Na", "Cl", "K"], n_atoms=[2, 2]), "no composition of|no charge-neutral"),
]


@pytest.mark.parametrize(("restrictions", "message"), NOTHING_LEFT)
def test_a_combination_that_leaves_nothing_is_found_when_the_tables_are_built(
    restrictions: Restrictions, message: str
) -> None:
    with pytest.raises(RestrictionError, match=message):
        CrystalEnv(restrict(MP20, restrictions))


def test_unwanted_elements_are_excluded_unless_named() -> None:
    allowed = restrict(MP20, Restrictions()).allowed
    assert allowed is not None
    assert not set(allowed) & set(UNWANTED)
    assert "Th" in (restrict(MP20, Restrictions(elements=["Th", "O"])).allowed or ())
    assert "Tc" in (restrict(MP20, Restrictions(exclude=[])).allowed or ())
    excluded = restrict(MP20, Restrictions(exclude=["Pb"])).allowed or ()
    assert "Pb" not in excluded
    assert restrict(CRYSTAL_GFN, Restrictions(exclude=["Hg", "He", "Tc"][::2])).allowed == CRYSTAL_GFN.elements


def test_a_restricted_space_is_narrowed_further() -> None:
    first = Restrictions(elements=["Fe", "O", "S"], required=["Fe"], max_atoms_per_element=6, counts={"Fe": [2, 4]})
    space = restrict(MP20, first)
    assert restrict(space, Restrictions()) == space
    more = Restrictions(elements=["Fe", "O"], required=["O"], max_atoms_per_element=9, counts={"Fe": [4, 6]})
    narrowed = restrict(space, more)
    assert sorted(narrowed.allowed or ()) == ["Fe", "O"]
    assert sorted(narrowed.required) == ["Fe", "O"]
    assert (narrowed.max_atoms_per_element, narrowed.counts) == (6, (("Fe", (4,)),))
    for contradiction, message in (
        (Restrictions(elements=["Na", "O"]), "Na were left out before"),
        (Restrictions(elements=["O", "S"]), "Fe must be in every crystal and may be in none"),
        (Restrictions(counts={"Fe": [6]}), "counts of Fe leaves no number"),
    ):
        with pytest.raises(RestrictionError, match=message):
            restrict(space, contradiction)


def test_restrictions_only_narrow() -> None:
    space = restrict(MP20, Restrictions(n_atoms=[0, 50], length=[0, 1000], angle=[10, 170], n_elements=[2, 9]))
    assert space.n_atoms == (1, 20)
    assert space.n_elements == (2, 6)
    assert space.box.length == MP20.box.length
    assert space.box.angle == (10.0, 170.0)
    assert space.elements == MP20.elements  # actions stay the same, so that one policy serves every restriction


def test_presets_are_those_of_the_design() -> None:
    assert len(CRYSTAL_GFN.elements) == 22
    assert len(set(CRYSTAL_GFN.space_groups)) == 113
    assert (CRYSTAL_GFN.max_count, CRYSTAL_GFN.n_atoms, CRYSTAL_GFN.n_elements) == (16, (1, 80), (1, 5))
    assert CRYSTAL_GFN.conventional
    assert not CRYSTAL_GFN.wyckoff
    assert MP20.n_atoms == (1, 20)
    assert MP20.wyckoff
    assert not MP20.conventional
    assert len(MP20.space_groups) == 230


def test_trigonal_covers_both_of_its_lattice_systems() -> None:
    assert restrict(MP20, Restrictions(crystal_systems=["trigonal"])).space_groups == tuple(range(143, 168))
    assert restrict(MP20, Restrictions(crystal_systems=["cubic", "triclinic"])).space_groups == (1, 2, *range(195, 231))
