"""Result files are made here, as small as the parsers accept, with known numbers."""

import gzip
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from ase.units import Bohr, Hartree, Ry
from pymatgen.core import Lattice, Structure
from pymatgen.io.vasp import Vasprun

from discover.dft_inputs import DftError
from discover.dft_results import _vasp_gap, read_espresso, read_result, read_results, read_vasp
from discover.oracle.base import LabelStatus
from discover.oracle.hull import elemental_energies

NACL = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.6402), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
).get_primitive_structure()
HEMATITE = Structure.from_spacegroup(
    "R-3c", Lattice.hexagonal(5.0355, 13.7471), ["Fe", "O"], [[0, 0, 0.35534], [0.3056, 0, 0.25]]
).get_primitive_structure()
# Corrections of Wang et al. 2021, table 1, in eV per atom of the anion or metal.
CORRECTION_CL, CORRECTION_OXIDE, CORRECTION_FE = -0.614, -0.687, -2.256
POTENTIALS = {"Na": "PAW_PBE Na_pv 19Sep2006", "Cl": "PAW_PBE Cl 06Sep2000", "Fe": "PAW_PBE Fe_pv 02Aug2007"}
POTENTIALS["O"] = "PAW_PBE O 08Apr2002"


def vasprun(
    structure: Structure,
    energies: list[float],
    *,
    potentials: dict[str, str] = POTENTIALS,
    hubbard: dict[str, float] | None = None,
    nelm: int = 60,
    nsw: int = 99,
    bands: tuple[float, float] = (1.0, 6.0),
    cutoff: float = 520.0,
    pressure: float = 0.0,
    hybrid: bool = False,
    gga: str = "--",
) -> str:
    """Return a vasprun.xml whose steps have the given total energies in eV of the cell."""
    symbols = list(dict.fromkeys(site.specie.symbol for site in structure))
    u = ""
    if hubbard:
        values = " ".join(str(hubbard.get(symbol, 0)) for symbol in symbols)
        zeros = " ".join("0" for _ in symbols)
        u = f'<i type="logical" name="LDAU"> T </i><v name="LDAUU">{values}</v><v name="LDAUJ">{zeros}</v>'
    atoms = "".join(f"<rc><c>{s.specie.symbol}</c><c>{symbols.index(s.specie.symbol) + 1}</c></rc>" for s in structure)
    types = "".join(
        f"<rc><c>{structure.composition[s]:.0f}</c><c>{s}</c><c>1.0</c><c>1.0</c><c>{potentials[s]}</c></rc>"
        for s in symbols
    )

    def cell(name: str) -> str:
        rows = "".join(f"<v>{a} {b} {c}</v>" for a, b, c in structure.lattice.matrix)
        places = "".join(f"<v>{a} {b} {c}</v>" for a, b, c in structure.frac_coords)
        return (
            f'<structure name="{name}"><crystal><varray name="basis">{rows}</varray></crystal>'
            f'<varray name="positions">{places}</varray></structure>'
        )

    def energy(value: float) -> str:
        kinds = "".join(f'<i name="{kind}">{value}</i>' for kind in ("e_fr_energy", "e_wo_entrp", "e_0_energy"))
        return f"<energy>{kinds}</energy>"

    eigenvalues = (
        "<eigenvalues><array><set><set comment='spin 1'><set comment='kpoint 1'>"
        f"<r>{bands[0]} 1.0</r><r>{bands[1]} 0.0</r></set></set></set></array></eigenvalues>"
    )
    steps = "".join(
        f"<calculation><scstep>{energy(value)}</scstep><scstep>{energy(value)}</scstep>{cell('')}{energy(value)}"
        f"{eigenvalues if i == len(energies) - 1 else ''}</calculation>"
        for i, value in enumerate(energies)
    )
    return f"""<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
<generator><i name="program" type="string">vasp </i><i name="version" type="string">6.3.0 </i>
<i name="date" type="string">2026 01 14 </i><i name="time" type="string">19:06:57 </i></generator>
<incar>{u}<i name="PSTRESS">{pressure}</i></incar>
<kpoints><generation param="Gamma"><v type="int" name="divisions">1 1 1</v><v name="usershift">0 0 0</v></generation>
<varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1.0</v></varray></kpoints>
<parameters><i name="AEXX">{0.25 * hybrid}</i><i type="logical" name="LHFCALC"> {"FT"[hybrid]} </i>
<i name="HFSCREEN">{0.2 * hybrid}</i>
<i type="string" name="GGA">{gga}</i><i type="logical" name="LDAU"> {"T" if hubbard else "F"} </i>
<i name="ENMAX">{cutoff}</i>
<i type="int" name="NELM">{nelm}</i><i type="int" name="NSW">{nsw}</i><i type="int" name="IBRION">2</i>
<i type="int" name="ISPIN">1</i></parameters>
<atominfo><atoms>{len(structure)}</atoms><types>{len(symbols)}</types>
<array name="atoms"><field type="string">element</field><field type="int">atomtype</field><set>{atoms}</set></array>
<array name="atomtypes"><field type="int">atomspertype</field><field type="string">element</field><field>mass</field>
<field>valence</field><field type="string">pseudopotential</field><set>{types}</set></array></atominfo>
{cell("initialpos")}{steps}{cell("finalpos")}
</modeling>
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_vasp_energies_come_out_on_the_scale_of_the_materials_project(tmp_path) -> None:
    # About the total energy of halite in the Materials Project, whose formation energy there is -2.10 eV/atom.
    label = read_vasp(write(tmp_path / "vasprun.xml", vasprun(NACL, [-6.70, -6.7647])), proposed=NACL)
    elements = elemental_energies()
    references = (elements["Na"] + elements["Cl"]) / 2
    assert label.status is LabelStatus.GIVEN
    assert label.energy_per_atom == pytest.approx(-6.7647 / 2)
    assert label.formation_energy_per_atom == pytest.approx((-6.7647 + CORRECTION_CL) / 2 - references, abs=1e-6)
    assert label.formation_energy_per_atom == pytest.approx(-2.10, abs=0.02)
    assert label.initial_formation_energy_per_atom == pytest.approx((-6.70 + CORRECTION_CL) / 2 - references, abs=1e-6)
    assert (label.band_gap, label.n_steps, label.reason) == (pytest.approx(5.0), 2, "")
    assert (label.space_group_before, label.space_group_after) == (225, 225)
    assert label.structure is not None
    assert label.structure.composition.reduced_formula == "NaCl"


def test_iron_oxide_needs_the_u_of_the_materials_project(tmp_path) -> None:
    text = vasprun(HEMATITE, [-67.0], hubbard={"Fe": 5.3})
    label = read_vasp(write(tmp_path / "vasprun.xml", text))
    elements = elemental_energies()
    corrected = -67.0 + 4 * CORRECTION_FE + 6 * CORRECTION_OXIDE
    expected = (corrected - 4 * elements["Fe"] - 6 * elements["O"]) / 10
    assert label.formation_energy_per_atom == pytest.approx(expected, abs=1e-6)
    plain = read_vasp(write(tmp_path / "plain" / "vasprun.xml", vasprun(HEMATITE, [-67.0])))
    assert plain.status is LabelStatus.GIVEN
    assert plain.energy_per_atom == pytest.approx(-6.7)
    assert math.isnan(plain.formation_energy_per_atom)
    assert "Invalid U value of 0.0 on Fe, expected 5.3" in plain.reason


def test_other_potentials_have_no_formation_energy(tmp_path) -> None:
    text = vasprun(NACL, [-6.7647], potentials={**POTENTIALS, "Na": "PAW_PBE Na_sv 28Sep2000"})
    label = read_vasp(write(tmp_path / "vasprun.xml", text))
    assert math.isnan(label.formation_energy_per_atom)
    assert "Incompatible POTCAR" in label.reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"cutoff": 400.0}, "the cutoff is 400 eV, it has to be 520"),
        ({"pressure": 10.0}, "at a pressure of 10 kbar"),
        (
            {"potentials": {"Na": "PAW Na_pv 28Sep2000", "Cl": "PAW Cl 02Apr1999"}},
            "PAW Cl 02Apr1999 is not one of PBE",
        ),
    ],
)
def test_other_settings_have_no_formation_energy(tmp_path, settings, reason) -> None:
    label = read_vasp(write(tmp_path / "vasprun.xml", vasprun(NACL, [-6.7647], **settings)))
    assert label.status is LabelStatus.GIVEN
    assert math.isnan(label.formation_energy_per_atom)
    assert reason in label.reason


def test_the_gap_of_a_hybrid_is_not_one_on_the_scale_of_pbe(tmp_path) -> None:
    label = read_vasp(write(tmp_path / "vasprun.xml", vasprun(NACL, [-6.7647], hybrid=True)))
    assert label.status is LabelStatus.GIVEN
    assert math.isnan(label.formation_energy_per_atom)
    assert math.isnan(label.band_gap)
    assert label.properties == {"band_gap_HSE06": pytest.approx(5.0)}


@pytest.mark.parametrize(
    ("gga", "kind", "hubbard", "name"),
    [
        ("--", "PAW", None, "band_gap_LDA"),
        ("--", "PAW", {"Na": 1.0}, "band_gap_LDA+U"),
        ("--", "PAW_GGA", None, "band_gap_PW91"),
        ("PE", "PAW", None, "band_gap_PBE_PAW"),
        ("PS", "PAW_PBE", None, "band_gap_PBEsol"),
        ("PE", "PAW_PBE", None, "band_gap"),
        ("PE", "PAW_PBE", {"Na": 1.0}, "band_gap"),
    ],
)
def test_a_gap_on_the_scale_of_pbe_needs_its_potentials(tmp_path, gga, kind, hubbard, name) -> None:
    potentials = {symbol: title.replace("PAW_PBE", kind) for symbol, title in POTENTIALS.items()}
    text = vasprun(NACL, [-6.7647], potentials=potentials, gga=gga, hubbard=hubbard)
    label = read_vasp(write(tmp_path / "vasprun.xml", text))
    assert label.status is LabelStatus.GIVEN
    gaps = {"band_gap": label.band_gap, **label.properties}
    assert {key: gap for key, gap in gaps.items() if not math.isnan(gap)} == {name: pytest.approx(5.0)}


def test_what_did_not_converge_is_a_failure_and_what_was_cut_short_is_not(tmp_path) -> None:
    electronic = read_vasp(write(tmp_path / "a" / "vasprun.xml", vasprun(NACL, [-6.7], nelm=2)))
    assert (electronic.status, electronic.reason) == (LabelStatus.FAILED, "the electronic steps did not converge")
    ionic = read_vasp(write(tmp_path / "b" / "vasprun.xml", vasprun(NACL, [-6.7, -6.71], nsw=2)))
    assert ionic.status is LabelStatus.STEP_LIMIT
    assert "NSW" in ionic.reason
    assert math.isfinite(ionic.formation_energy_per_atom)


def test_a_metal_has_no_gap(tmp_path) -> None:
    label = read_vasp(write(tmp_path / "vasprun.xml", vasprun(NACL, [-6.7], bands=(6.0, 5.0))))
    assert label.band_gap == 0.0


def test_a_truncated_or_foreign_file_is_an_error(tmp_path) -> None:
    text = vasprun(NACL, [-6.7])
    with pytest.raises(DftError, match="cannot be read"):
        read_vasp(write(tmp_path / "vasprun.xml", text[: len(text) // 2]))
    with pytest.raises(DftError, match=r"is a result of NaCl, and Fe2O3 was proposed"):
        read_vasp(write(tmp_path / "vasprun.xml", text), proposed=HEMATITE)
    for name in ("pw.out", "crystal.xml"):
        with pytest.raises(DftError):
            read_result(write(tmp_path / name, "<nothing/>"))


# --- Quantum ESPRESSO ----------------------------------------------------------------------------

PW_OUT = """
     Program PWSCF v.7.2 starts on 14Jan2026 at 10:00:00

     bravais-lattice index     =            0
     lattice parameter (alat)  =       7.5369  a.u.
     unit-cell volume          =     302.7200 (a.u.)^3
     number of atoms/cell      =            2
     number of atomic types    =            2
     Exchange-correlation= {functional}
                           (   1   4   3   4   0   0   0)

     celldm(1)=   7.536900  celldm(2)=   0.000000  celldm(3)=   0.000000

     crystal axes: (cart. coord. in units of alat)
               a(1) = (   0.000000   0.707107   0.707107 )
               a(2) = (   0.707107   0.000000   0.707107 )
               a(3) = (   0.707107   0.707107   0.000000 )

     reciprocal axes: (cart. coord. in units 2 pi/alat)
               b(1) = ( -0.707107  0.707107  0.707107 )
               b(2) = (  0.707107 -0.707107  0.707107 )
               b(3) = (  0.707107  0.707107 -0.707107 )

     atomic species   valence    mass     pseudopotential
        Na             9.00    22.98977     Na( 1.00)
        Cl             7.00    35.45300     Cl( 1.00)

   Cartesian axes

     site n.     atom                  positions (alat units)
         1           Na  tau(   1) = (   0.0000000   0.0000000   0.0000000  )
         2           Cl  tau(   2) = (   0.7071068   0.7071068   0.7071068  )

     number of k points=     1
                       cart. coord. in units 2pi/alat
        k(    1) = (   0.0000000   0.0000000   0.0000000), wk =   2.0000000

     End of self-consistent calculation

          k = 0.0000 0.0000 0.0000 (   749 PWs)   bands (ev):

    -9.0000   1.0000   6.0000   7.0000

     the Fermi energy is     3.5000 ev

!    total energy              =    -{first} Ry

CELL_PARAMETERS (angstrom)
   0.000000000   2.850000000   2.850000000
   2.850000000   0.000000000   2.850000000
   2.850000000   2.850000000   0.000000000

ATOMIC_POSITIONS (crystal)
Na               0.0000000000        0.0000000000        0.0000000000
Cl               0.5000000000        0.5000000000        0.5000000000

     number of k points=     1
                       cart. coord. in units 2pi/alat
        k(    1) = (   0.0000000   0.0000000   0.0000000), wk =   2.0000000

     End of self-consistent calculation

          k = 0.0000 0.0000 0.0000 (   749 PWs)   bands (ev):

    -9.0000   1.2000   6.0000   7.0000

     the Fermi energy is     3.5000 ev

!    total energy              =    -{last} Ry

{end}
"""
DONE = "   JOB DONE."
#: A gap of 0.2 Hartree.
LEVELS = "<highestOccupiedLevel>0.1</highestOccupiedLevel><lowestUnoccupiedLevel>0.3</lowestUnoccupiedLevel>"


def pw_out(first: float = 125.0, last: float = 125.1, end: str = DONE, functional: str = "PBE") -> str:
    return PW_OUT.format(first=f"{first:.8f}", last=f"{last:.8f}", end=end, functional=functional)


def pw_xml(
    energies: list[float],
    *,
    levels: str,
    scf: str = "true",
    opt: str = "true",
    functional: str = "PBE",
    exit_status: int = 0,
) -> str:
    """Return the XML file of a relaxation of halite with the given total energies in Hartree."""
    axes = "".join(f"<a{i + 1}>{a} {b} {c}</a{i + 1}>" for i, (a, b, c) in enumerate(NACL.lattice.matrix / Bohr))
    atoms = "".join(
        f'<atom name="{name}" index="{i + 1}">{" ".join(str(x / Bohr) for x in site.coords)}</atom>'
        for i, (name, site) in enumerate(zip(("Na1", "Cl"), NACL, strict=True))
    )
    cell = (
        f'<atomic_structure nat="2"><atomic_positions>{atoms}</atomic_positions><cell>{axes}</cell></atomic_structure>'
    )
    steps = "".join(
        f'<step n_step="{i + 1}">{cell}<total_energy><etot>{energy}</etot></total_energy></step>'
        for i, energy in enumerate(energies)
    )
    return (
        '<qes:espresso xmlns:qes="http://www.quantum-espresso.org/ns/qes/qes-1.0">'
        f"<input><control_variables><calculation>vc-relax</calculation></control_variables>{cell}</input>{steps}<output><convergence_info><scf_conv><convergence_achieved>{scf}"
        "</convergence_achieved></scf_conv><opt_conv><convergence_achieved>"
        f"{opt}</convergence_achieved></opt_conv></convergence_info>{cell}"
        f"<dft><functional>{functional}</functional></dft>"
        f"<total_energy><etot>{energies[-1]}</etot></total_energy><band_structure>{levels}</band_structure>"
        f"</output><exit_status>{exit_status}</exit_status></qes:espresso>"
    )


def test_what_pw_printed_is_read_by_ase(tmp_path) -> None:
    label = read_espresso(write(tmp_path / "pw.out", pw_out()), proposed=NACL)
    assert label.status is LabelStatus.GIVEN
    assert label.energy_per_atom == pytest.approx(-125.1 * Ry / 2, rel=1e-6)
    assert math.isnan(label.formation_energy_per_atom)
    assert "need elements computed with the same" in label.reason
    assert label.band_gap == pytest.approx(4.8)
    assert label.n_steps == 2
    assert label.structure is not None
    assert label.structure.volume == pytest.approx(2 * 2.85**3)
    assert label.space_group_after == 225


def test_the_highest_occupied_level_is_occupied(tmp_path) -> None:
    printed = pw_out()
    fermi = "the Fermi energy is     3.5000 ev"
    assert fermi in printed
    fixed = printed.replace(fermi, "highest occupied, lowest unoccupied level (ev):     1.2000    6.0000")
    assert read_espresso(write(tmp_path / "pw.out", fixed)).band_gap == pytest.approx(4.8)


def test_without_an_empty_band_the_gap_of_vasp_is_unknown() -> None:
    run = SimpleNamespace(eigenvalues={}, eigenvalue_band_properties=(math.inf, math.inf, 1.0, False))
    assert math.isnan(_vasp_gap(cast(Vasprun, run)))


def test_references_give_a_formation_energy_with_the_same_corrections(tmp_path) -> None:
    references = {"Na": -600.0, "Cl": -1000.0}
    label = read_espresso(write(tmp_path / "pw.out", pw_out()), references=references)
    expected = (-125.1 * Ry + CORRECTION_CL + 1600.0) / 2
    assert label.formation_energy_per_atom == pytest.approx(expected, abs=1e-3)
    assert label.initial_formation_energy_per_atom == pytest.approx(expected + 0.1 * Ry / 2, abs=1e-3)
    lacking = read_espresso(tmp_path / "pw.out", references={"Na": -600.0})
    assert "no reference energy of Cl" in lacking.reason


@pytest.mark.parametrize(
    ("end", "status", "reason"),
    [
        ("", LabelStatus.FAILED, "the run still goes on, or ended before it was done"),
        ("     convergence NOT achieved after 200 iterations: stopping\n" + DONE, LabelStatus.FAILED, "electronic"),
        ("     The maximum number of steps has been reached.\n" + DONE, LabelStatus.STEP_LIMIT, "nstep"),
    ],
)
def test_printed_problems_are_seen(tmp_path, end, status, reason) -> None:
    label = read_espresso(write(tmp_path / "pw.out", pw_out(end=end)))
    assert label.status is status
    assert reason in label.reason


@pytest.mark.parametrize(
    ("levels", "gap"),
    [
        (LEVELS, 0.2),
        (
            (
                "<lsda>false</lsda><fermi_energy>0.2</fermi_energy>"
                "<ks_energies><eigenvalues>-0.5 0.1 0.35</eigenvalues></ks_energies>"
                "<ks_energies><eigenvalues>-0.5 0.05 0.3</eigenvalues></ks_energies>"
            ),
            0.2,
        ),
        (  # spin up has a gap of 0.3, spin down one of 0.25, and together they leave 0.2
            (
                "<lsda>true</lsda><fermi_energy>0.2</fermi_energy>"
                "<ks_energies><eigenvalues>0.05 0.35 0.1 0.35</eigenvalues></ks_energies>"
                "<ks_energies><eigenvalues>0.05 0.3 0.1 0.35</eigenvalues></ks_energies>"
            ),
            0.2,
        ),
        (
            (
                "<lsda>false</lsda><fermi_energy>0.2</fermi_energy>"
                "<ks_energies><eigenvalues>-0.5 0.1 0.35</eigenvalues></ks_energies>"
                "<ks_energies><eigenvalues>-0.5 0.25 0.3</eigenvalues></ks_energies>"
            ),
            0.0,
        ),
        *(  # fixed occupations and no empty band: nobody knows the gap
            (f"<lsda>false</lsda><{level}>{value}</{level}>{bands}", math.nan)
            for level, value in (("highestOccupiedLevel", 0.1), ("fermi_energy", 0.2))
            for bands in (
                "<ks_energies><eigenvalues>-0.5 -0.2 0.1</eigenvalues></ks_energies>",
                (
                    "<ks_energies><eigenvalues>-0.5 0.1</eigenvalues></ks_energies>"
                    "<ks_energies><eigenvalues>-0.5 0.05</eigenvalues></ks_energies>"
                ),
            )
        ),
        ("", math.nan),
    ],
)
def test_the_xml_file_has_energy_structure_and_gap(tmp_path, levels, gap) -> None:
    label = read_espresso(write(tmp_path / "crystal.xml", pw_xml([-62.5, -62.6], levels=levels)), proposed=NACL)
    assert label.status is LabelStatus.GIVEN
    assert label.energy_per_atom == pytest.approx(-62.6 * Hartree / 2)
    assert label.band_gap == pytest.approx(gap * Hartree, nan_ok=True)
    assert label.n_steps == 2
    assert label.structure is not None
    assert label.structure.matches(NACL, scale=False)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("PBE", "PBE"),
        ("pbe", "PBE"),
        ("SLA  PW   PBX  PBC", "PBE"),
        ("SLA+PW+PBE+PBE", "PBE"),
        ("HSE", "HSE"),
        ("PBESOL", "PBESOL"),
        ("SLA  PW   PSX  PSC", "SLA+PW+PSX+PSC"),
        ("", "unknown"),
    ],
)
def test_only_the_functional_that_pw_names_makes_a_gap_one_of_pbe(tmp_path, written, name) -> None:
    texts = {"a.xml": pw_xml([-62.5], levels=LEVELS, functional=written), "pw.out": pw_out(functional=written)}
    for file, text in texts.items():
        path, references = write(tmp_path / file, text), {"Na": -600.0, "Cl": -1000.0}
        label = read_espresso(path, references=references)
        assert label.status is LabelStatus.GIVEN
        gap = pytest.approx(0.2 * Hartree if file == "a.xml" else 4.8)
        if name == "PBE":
            assert (label.band_gap, label.properties, label.reason) == (gap, {}, "")
        else:
            assert label.properties == {f"band_gap_{name}": gap}
            assert math.isnan(label.band_gap)
            assert math.isnan(label.formation_energy_per_atom)
            assert f"the functional is {name}, it has to be PBE" in label.reason


def test_problems_in_the_xml_file_are_seen(tmp_path) -> None:
    failed = read_espresso(write(tmp_path / "a.xml", pw_xml([-62.5], levels="", scf="false")))
    assert failed.status is LabelStatus.FAILED
    short = read_espresso(write(tmp_path / "b.xml", pw_xml([-62.5], levels="", opt="false", exit_status=3)))
    assert short.status is LabelStatus.STEP_LIMIT
    running = read_espresso(write(tmp_path / "c.xml", pw_xml([-62.5], levels="", opt="false", exit_status=255)))
    assert running.status is LabelStatus.FAILED
    assert "still goes on" in running.reason
    unsaid = re.sub("<opt_conv>.*</opt_conv>", "", pw_xml([-62.5], levels=""))
    assert read_espresso(write(tmp_path / "d.xml", unsaid)).status is LabelStatus.STEP_LIMIT


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_gives_a_label_for_each_result_and_a_failure_for_each_broken_one(tmp_path) -> None:
    with gzip.open(write(tmp_path / "a" / "vasprun.xml.gz", ""), "wt") as file:
        file.write(vasprun(NACL, [-6.7647]))
    write(tmp_path / "b" / "pw.out", "nothing of use")
    write(tmp_path / "c" / "out" / "crystal.xml", pw_xml([-62.5], levels=""))
    write(tmp_path / "c" / "pw.out", pw_out())
    write(tmp_path / "d" / "INCAR", "still running")
    write(tmp_path / "e" / "vasprun.xml", vasprun(NACL, [-6.7647]))
    proposed = dict.fromkeys("abcd", NACL) | {"e": HEMATITE}
    labels = read_results(tmp_path, proposed)
    assert sorted(labels) == ["a", "b", "c", "e"]
    assert labels["a"].status is LabelStatus.GIVEN
    assert labels["b"].status is LabelStatus.FAILED
    assert labels["c"].energy_per_atom == pytest.approx(-62.5 * Hartree / 2)  # of the XML file
    assert labels["e"].status is LabelStatus.FAILED
    assert "Fe2O3 was proposed" in labels["e"].reason


def test_results_of_a_stranger_are_refused(tmp_path) -> None:
    write(tmp_path / "x" / "vasprun.xml", vasprun(NACL, [-6.7647]))
    with pytest.raises(DftError, match=r"1 structures that were not proposed, first x"):
        read_results(tmp_path, {"a": NACL})
    with pytest.raises(DftError, match="no folder of results"):
        read_results(tmp_path / "nowhere", {"a": NACL})
