import math

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Composition, Lattice, Structure

from discover.finalists import (
    Checks,
    Finalist,
    SymmetryChange,
    check_finalist,
    check_finalists,
    checks_table,
    html_cards,
    html_page,
    markdown_table,
)
from discover.nearest import Likeness, Nearest, Reference
from discover.oracle.hull import Hull
from discover.structure.base import cif_text

# Measured structures: Wyckoff's Crystal Structures; rutile and hematite also in every textbook of mineralogy.
NACL = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6402), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
RUTILE = Structure.from_spacegroup(
    "P4_2/mnm", Lattice.tetragonal(4.5937, 2.9587), ["Ti", "O"], [[0, 0, 0], [0.30478, 0.30478, 0]]
)
HEMATITE = Structure.from_spacegroup(
    "R-3c", Lattice.hexagonal(5.0355, 13.7471), ["Fe", "O"], [[0, 0, 0.35534], [0.3056, 0, 0.25]]
)
PEROVSKITE = Structure.from_spacegroup(  # CaTiO3, Pbnm set as Pnma
    "Pnma",
    Lattice.orthorhombic(5.4423, 7.6401, 5.3796),
    ["Ca", "Ti", "O", "O"],
    [[0.0358, 0.25, 0.9929], [0, 0, 0.5], [0.4839, 0.25, 0.0713], [0.2893, 0.0374, 0.7110]],
)
CUBIC_PEROVSKITE = Structure.from_spacegroup(
    "Pm-3m", Lattice.cubic(3.84), ["Ca", "Ti", "O"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0]]
)
MAGNETITE = Structure.from_spacegroup(
    "Fd-3m",
    Lattice.cubic(8.396),
    ["Fe", "Fe", "O"],
    [[0, 0, 0], [0.625, 0.625, 0.625], [0.3799, 0.3799, 0.3799]],  # origin at -43m
).get_primitive_structure()
HULL = Hull({"CaO": -3.3, "TiO2": -3.35, "CaTiO3": -3.4, "Fe2O3": -1.7, "Fe3O4": -1.65, "NaCl": -2.1})


def check(structure: Structure, *, built: Structure | None = None, energy: float = math.nan) -> Checks:
    finalist = Finalist(name="r01-0001", built=built or structure, relaxed=structure, formation_energy=energy)
    return check_finalist(finalist, hull=HULL)


@pytest.mark.parametrize(
    ("structure", "pair", "distance", "ratio"),
    [
        # Crystal radii after Shannon 1976: Na+ 1.16, Cl- 1.67, Ti4+ 0.745, O2- 1.26, Fe3+ 0.785 Å.
        (NACL, "Na-Cl", 2.820, 2.820 / 2.83),
        (RUTILE, "Ti-O", 1.949, 1.949 / 2.005),
        (HEMATITE, "Fe-O", 1.945, 1.945 / 2.045),
    ],
)
def test_the_shortest_distance_is_measured_in_ionic_radii(structure, pair, distance, ratio) -> None:
    contact = check(structure).contact
    assert (contact.pair, contact.radii) == (pair, "ionic")
    assert contact.distance == pytest.approx(distance, abs=2e-3)
    assert contact.ratio == pytest.approx(ratio, abs=2e-3)


def test_a_metal_is_measured_in_covalent_radii_and_has_no_oxidation_states() -> None:
    iron = Structure.from_spacegroup("Im-3m", Lattice.cubic(2.8665), ["Fe"], [[0, 0, 0]])
    checks = check(iron.get_primitive_structure())
    assert (checks.contact.radii, checks.contact.pair) == ("covalent", "Fe-Fe")
    assert checks.contact.ratio == pytest.approx(2.8665 * math.sqrt(3) / 2 / (2 * 1.32), abs=1e-3)  # Cordero, low spin
    assert (checks.oxidation_states, checks.bond_valence.reason) == ("", "no oxidation states")
    assert math.isnan(checks.bond_valence.global_instability)


def test_an_atom_alone_in_a_huge_cell_has_no_neighbours() -> None:
    checks = check(Structure(Lattice.cubic(40), ["Ar"], [[0, 0, 0]]))
    assert math.isnan(checks.contact.ratio)
    assert "no neighbours" in markdown_table([checks])


@pytest.mark.parametrize(
    ("structure", "states", "sums"),
    [
        (NACL, "Na1+ Cl1-", {"Na1+": 0.84, "Cl1-": 0.84}),
        (RUTILE, "Ti4+ O2-", {"Ti4+": 3.80, "O2-": 1.90}),
        (HEMATITE, "Fe3+ O2-", {"Fe3+": 2.51, "O2-": 1.67}),
        (PEROVSKITE, "Ca2+ Ti4+ O2-", {"Ca2+": 1.62, "Ti4+": 3.81}),
    ],
)
def test_sound_crystals_have_sound_valences(structure, states, sums) -> None:
    # Sums by pymatgen's own function; within 20 % of the valence, as the two-number parameters allow.
    checks = check(structure)
    assert checks.oxidation_states == states
    assert checks.oxidation_score > -2
    for ion, value in sums.items():
        assert abs(checks.bond_valence.sums[ion]) == pytest.approx(value, abs=0.02)
    assert 0 < checks.bond_valence.global_instability < 0.45
    assert checks.bond_valence.deviation < 2
    assert checks.remarks() == []


def test_a_stretched_crystal_is_unstable_by_its_bond_valences() -> None:
    stretched = RUTILE.copy()
    stretched.apply_strain(0.25)
    checks = check(stretched, built=RUTILE)
    assert checks.bond_valence.global_instability > 1
    assert checks.volume_change == pytest.approx(1.25**3 - 1)
    assert any("standard deviations" in remark for remark in checks.remarks())
    assert any("volume by +95 %" in remark for remark in checks.remarks())


def test_what_nobody_relaxed_is_said_to_be_as_it_was_proposed() -> None:
    checks = check_finalist(Finalist(name="x", built=NACL, relaxed=NACL, is_relaxed=False))
    assert checks.symmetry is SymmetryChange.UNKNOWN
    assert math.isnan(checks.volume_change)
    assert "not relaxed, since the oracle gave numbers alone" in checks.remarks()[0]


def test_comparisons_that_were_not_made_are_said() -> None:
    nearest = Nearest(likeness=Likeness.NOT_COMPARED, formula="NaCl", reason="1 comparisons failed, first: too slow")
    checks = check_finalist(Finalist(name="x", built=NACL, relaxed=NACL), nearest=nearest)
    assert "NaCl: same formula, not compared (1 comparisons failed, first: too slow)" in markdown_table([checks])
    assert checks_table([checks])["nearest_reason"][0] == nearest.reason


def test_atoms_that_are_too_close_are_remarked() -> None:
    squeezed = NACL.copy()
    squeezed.apply_strain(-0.35)
    assert any("Na-Cl at 1.83 Å" in remark for remark in check(squeezed).remarks())


def test_mixed_valence_is_assigned_by_bond_valences() -> None:
    checks = check(MAGNETITE)
    assert checks.oxidation_states == "Fe2+ Fe3+ O2-"
    assert checks.oxidation_score == -math.inf
    assert set(checks.bond_valence.sums) == {"Fe2+", "Fe3+", "O2-"}


def test_elements_without_parameters_give_a_reason() -> None:
    # O'Keeffe and Brese have no number for neptunium.
    structure = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.43), ["Np", "O"], [[0, 0, 0], [0.25, 0.25, 0.25]])
    bonds = check(structure).bond_valence
    assert math.isnan(bonds.deviation)
    assert "Np" in bonds.reason


def test_symmetry_is_kept_lost_or_gained() -> None:
    noise = np.random.default_rng(0).normal(size=(5, 3))
    shaken = CUBIC_PEROVSKITE.copy()
    for site, move in enumerate(noise):
        shaken.translate_sites([site], 0.3 * move / np.linalg.norm(move), frac_coords=False)
    assert check(CUBIC_PEROVSKITE).symmetry is SymmetryChange.KEPT
    lost = check(shaken, built=CUBIC_PEROVSKITE)
    assert (lost.space_group_built, lost.symmetry) == (221, SymmetryChange.LOST)
    assert any("lowered the symmetry from 221" in remark for remark in lost.remarks())
    assert check(CUBIC_PEROVSKITE, built=shaken).symmetry is SymmetryChange.GAINED


def test_symmetry_does_not_depend_on_the_cell() -> None:
    checks = check(NACL.get_primitive_structure(), built=NACL)
    assert (checks.space_group_built, checks.space_group, checks.symmetry) == (225, 225, SymmetryChange.KEPT)
    assert checks.volume_change == pytest.approx(0.0)


def test_a_doubled_cell_of_the_same_space_group_has_lost_symmetry() -> None:
    # Dimers along one axis: P-1 before and after, with half of the translations.
    chain = Structure(Lattice.from_parameters(4, 5, 6, 81, 84, 77), ["Na"], [[0, 0, 0]])
    doubled = chain * (2, 1, 1)
    doubled.translate_sites([1], [0.1, 0, 0])
    checks = check(doubled, built=chain)
    assert (checks.space_group_built, checks.space_group, checks.symmetry) == (2, 2, SymmetryChange.LOST)


def test_decomposition_is_balanced() -> None:
    hull = Hull({"CaO": -3.3, "TiO2": -3.35})
    finalist = Finalist(name="a", built=None, relaxed=CUBIC_PEROVSKITE, formation_energy=-3.40)
    checks = check_finalist(finalist, hull=hull)
    assert checks.reaction in {"CaTiO3 → TiO2 + CaO", "CaTiO3 → CaO + TiO2"}
    assert checks.decomposition == {"TiO2": pytest.approx(0.6), "CaO": pytest.approx(0.4)}
    assert checks.e_above_hull == pytest.approx(-3.40 - (0.6 * -3.35 + 0.4 * -3.3))
    assert math.isnan(checks.volume_change)
    assert checks.symmetry is SymmetryChange.UNKNOWN


def test_amounts_of_a_reaction_make_up_the_formula() -> None:
    structure = Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.33), ["Fe", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    reaction = check(structure, energy=-1.3).reaction
    assert reaction == "FeO → 0.25 Fe3O4 + 0.25 Fe"
    total = 0.25 * Composition("Fe3O4") + 0.25 * Composition("Fe")
    assert total.almost_equals(Composition("FeO"))


def test_unknown_stability_says_why() -> None:
    barium = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.52), ["Ba", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert check(barium, energy=-2.8).stability_reason == "the hull file has no entry with Ba"
    assert check(NACL).stability_reason == "no formation energy"
    alone = check_finalist(Finalist(name="a", built=None, relaxed=NACL))
    assert (alone.stability_reason, alone.reaction) == ("no hull file", "")


def test_tables_and_cards_hold_every_structure_and_escape_what_is_foreign() -> None:
    reference = Reference.from_table(
        pd.DataFrame({"material_id": ["<known>"], "formula": ["NaCl"], "cif": [cif_text(NACL)]})
    )
    finalists = [
        Finalist(name="r01-0001", built=NACL, relaxed=NACL, formation_energy=-2.1),
        Finalist(name="r01-0002", built=CUBIC_PEROVSKITE, relaxed=CUBIC_PEROVSKITE, formation_energy=-3.2),
    ]
    checks = check_finalists(finalists, hull=HULL, reference=reference, n_workers=0)
    assert [one.nearest.likeness for one in checks if one.nearest] == [Likeness.SAME_MATERIAL, Likeness.NONE]
    assert "known: <known>" in checks[0].remarks()
    assert "0.20 eV/atom above the hull" in checks[1].remarks()
    table = checks_table(checks)
    assert table["name"].tolist() == ["r01-0001", "r01-0002"]
    assert table["nearest_same_prototype"].tolist() == [True, None]
    cards = html_cards(checks, pictures={"r01-0001": b"\x89PNG"})
    assert cards.count('class="card"') == 2
    assert "<known>" not in cards
    assert "&lt;known&gt;" in cards
    assert "CaTiO<sub>3</sub>" in cards
    assert "data:image/png;base64," in cards
    assert "http" not in cards
    assert html_page(checks, title="A & B").count("A &amp; B") == 2
    assert all(
        line.count("|") == markdown_table(checks).splitlines()[0].count("|")
        for line in markdown_table(checks).splitlines()
    )
