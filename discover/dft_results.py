"""Results of density functional theory as labels.

VASP results become labels on the Materials Project's scale if they were computed with its settings
(`discover.dft_inputs`): pymatgen's `MaterialsProject2020Compatibility` (Wang et al. 2021,
doi:10.1038/s41598-021-94550-5) checks potentials and U and adds the corrections; functional, cutoff and pressure are
checked here, k-points are not. A run with other settings keeps its total energy, and its formation energy is unknown,
with the reason.

Gaps are those of the eigenvalues. Of another functional than PBE, such as a hybrid or the LDA that potentials bring
with them, the gap is no `band_gap`, which is on the PBE scale, but a property named after the functional:
`band_gap_HSE06`, `band_gap_LDA`; `band_gap_unknown` where the file names none.

Energies of Quantum ESPRESSO belong to its pseudopotentials and compare with nothing else. A formation energy needs
energies of the elements with the same pseudopotentials and cutoffs, which the user gives; the same corrections for
anions are then added, so that it compares with the hull. Where the Materials Project uses +U (oxides and fluorides of
Co, Cr, Fe, Mn, Mo, Ni, V and W) a plain PBE energy stays without.

Every result that cannot be used is a `FAILED` label with a reason: nothing that was computed is lost silently.
"""

import logging
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.dft.bandgap import bandgap
from ase.io.espresso import label_to_symbol
from ase.units import Bohr, Hartree
from numpy.typing import NDArray
from pymatgen.analysis.compatibility import CompatibilityError, MaterialsProject2020Compatibility
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.entries.computed_entries import ComputedStructureEntry
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.vasp import Vasprun
from tqdm import tqdm

from discover.dft_inputs import DftError
from discover.finalists import SYMPREC_BUILT, SYMPREC_RELAXED, symmetry
from discover.oracle.base import Label, LabelStatus
from discover.oracle.hull import elemental_energies

logger = logging.getLogger(__name__)

VASP_RESULTS = ("vasprun.xml", "vasprun.xml.gz")
#: Where pw.x leaves its results: the XML has all digits and every band, the printed output is the second choice.
ESPRESSO_RESULTS = ("out/crystal.xml", "out/crystal.save/data-file-schema.xml", "pw.xml", "pw.out", "pw.pwo")
_CUTOFF = 520.0  # eV, of MPRelaxSet
_METALLIC = 1e-3  # eV; a smaller gap is none
_JOB_DONE, _NOT_CONVERGED = "JOB DONE", "convergence NOT achieved"
_NOT_DONE = "the run still goes on, or ended before it was done"
#: How pw.x says in its XML that it has come to its end; it writes 255 after every step of a run that goes on.
_ENDED = ("0", "2", "3")
_RELAXATIONS = ("relax", "vc-relax")
_OUT_OF_STEPS = "The maximum number of steps has been reached"
#: What pymatgen calls PBE where a user asked for it by name; MP2020 knows it as "GGA".
_RUN_TYPES = {"PBE": "GGA", "PBE+U": "GGA+U"}
#: What pymatgen calls the functional that the potentials bring, by the first word of their titles.
_OF_POTENTIALS = {"PAW": "LDA", "PAW_GGA": "PW91"}
#: PBE as pw.x writes it: by its name, or by its parts as the pseudopotential has them.
_ESPRESSO_PBE = ("PBE", "SLA+PW+PBX+PBC", "SLA+PW+PBE+PBE")
_PRINTED_FUNCTIONAL = re.compile(r"Exchange-correlation *= *([^(\n]*)")


def read_results(
    folder: Path, structures: Mapping[str, Structure], *, references: Mapping[str, float] | None = None
) -> dict[str, Label]:
    """Return the labels of all results in the folders that `discover.dft_inputs` wrote.

    Folders without a result are left out: they may still be running.

    Args:
        folder: The folder of folders.
        structures: What was proposed, by name.
        references: Energies in eV/atom of the elements with the same pseudopotentials; for Quantum ESPRESSO.

    Raises:
        DftError: If there is no such folder, or it has results of a name that was not proposed.
    """
    if not folder.is_dir():
        raise DftError(f"no folder of results at {folder}")
    found = {place.name: _result_in(place) for place in sorted(folder.iterdir()) if place.is_dir()}
    results = {name: path for name, path in found.items() if path is not None}
    strangers = sorted(results.keys() - structures.keys())
    if strangers:
        raise DftError(
            f"{folder} has results of {len(strangers)} structures that were not proposed, first {strangers[0]}; "
            "name each folder after its structure, or move the others away"
        )
    missing = len(structures) - len(results)
    if missing:
        logger.info("%s: no result yet of %d of %d structures", folder, missing, len(structures))
    labels = {}
    for name, path in tqdm(results.items(), desc="reading results", disable=None, delay=2):
        try:
            labels[name] = read_result(path, proposed=structures[name], references=references)
        except DftError as error:
            labels[name] = Label(status=LabelStatus.FAILED, reason=str(error))
    return labels


def read_result(
    path: Path, *, proposed: Structure | None = None, references: Mapping[str, float] | None = None
) -> Label:
    """Return the label of one result file, by its kind; see `read_vasp` and `read_espresso`."""
    if path.name.startswith("vasprun"):
        return read_vasp(path, proposed=proposed)
    return read_espresso(path, proposed=proposed, references=references)


def read_vasp(path: Path, *, proposed: Structure | None = None) -> Label:
    """Return the label of a vasprun.xml: total energy without smearing entropy, gap from the eigenvalues.

    Args:
        path: The file, gzipped or not.
        proposed: The structure that was proposed; a result of another composition is an error.

    Raises:
        DftError: If the file is broken, or of another composition.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen warns that it did not converge, which the label says
            run = Vasprun(path, parse_dos=False, parse_potcar_file=False)
            final, initial = run.final_structure, run.initial_structure
            energy = float(run.final_energy)
            first = float(run.ionic_steps[0]["e_0_energy"])
            electronic, ionic, n_steps = run.converged_electronic, run.converged_ionic, len(run.ionic_steps)
            gap = _vasp_gap(run)
            parameters = run.get_computed_entry(inc_structure=False).parameters
            functional = _vasp_functional(run, parameters["run_type"])
    except Exception as error:  # the parser raises many kinds
        raise DftError(f"{path} cannot be read: {_first_line(error)}") from error
    _check_composition(path, final.composition, proposed)
    parameters = {**parameters, "run_type": _RUN_TYPES.get(parameters["run_type"], parameters["run_type"])}
    reason = _other_settings(run)
    formation = start = math.nan
    if not reason:
        formation, reason = _formation_energy(final, energy, parameters, elemental_energies())
        start, _ = _formation_energy(initial, first, parameters, elemental_energies())
    return _label(
        final,
        proposed or initial,
        energy=energy,
        formation=formation,
        initial_formation=start,
        gap=gap,
        functional=functional,
        n_steps=n_steps,
        problem="" if electronic else "the electronic steps did not converge",
        unfinished="" if ionic else "the relaxation ran out of steps (NSW)",
        note=reason,
    )


def read_espresso(
    path: Path, *, proposed: Structure | None = None, references: Mapping[str, float] | None = None
) -> Label:
    """Return the label of a pw.x run: of its XML file, or of what it printed.

    The total energy is the free energy of the smeared electrons, as pw.x minimises it.

    Args:
        path: `crystal.xml` or `data-file-schema.xml`, or the printed output.
        proposed: The structure that was proposed; a result of another composition is an error.
        references: Energies in eV/atom of the elements with the same pseudopotentials and cutoffs.

    Raises:
        DftError: If the file is broken, or of another composition.
    """
    try:
        run = _read_espresso_xml(path) if path.suffix == ".xml" else _read_espresso_output(path)
    except DftError:
        raise
    except Exception as error:  # the parsers raise many kinds
        raise DftError(f"{path} cannot be read: {_first_line(error)}") from error
    final, initial = run["final"], run["initial"]
    _check_composition(path, final.composition, proposed)
    formation = start = math.nan
    if run["functional"] != "PBE":
        reason = f"no formation energy on the MP2020 scale: the functional is {run['functional']}, it has to be PBE"
    elif references is None:
        reason = "no formation energy: energies of these pseudopotentials need elements computed with the same"
    else:
        parameters = {"run_type": "GGA", "hubbards": {}, "software": "espresso"}
        formation, reason = _formation_energy(final, run["energy"], parameters, references)
        start, _ = _formation_energy(initial, run["first_energy"], parameters, references)
    return _label(
        final,
        proposed or initial,
        energy=run["energy"],
        formation=formation,
        initial_formation=start,
        gap=run["gap"],
        functional=run["functional"],
        n_steps=run["n_steps"],
        problem=run["problem"],
        unfinished=run["unfinished"],
        note=reason,
    )


def _label(
    final: Structure,
    proposed: Structure,
    *,
    energy: float,
    formation: float,
    initial_formation: float,
    gap: float,
    functional: str,
    n_steps: int,
    problem: str,
    unfinished: str,
    note: str,
) -> Label:
    """Return the label; an energy that did not converge is a failure, a relaxation that was cut short is not.

    The gap in eV is `band_gap` if the functional is PBE, with U or without, else a property named after it.
    """
    if not math.isfinite(energy):
        problem = problem or "no total energy"
    if problem:
        return Label(status=LabelStatus.FAILED, reason=problem, n_steps=n_steps)
    on_scale = functional.removesuffix("+U") == "PBE"
    return Label(
        status=LabelStatus.STEP_LIMIT if unfinished else LabelStatus.GIVEN,
        reason="; ".join(part for part in (unfinished, note) if part),
        structure=final,
        energy_per_atom=energy / len(final),
        formation_energy_per_atom=formation,
        initial_formation_energy_per_atom=initial_formation,
        band_gap=gap if on_scale else math.nan,
        properties={} if on_scale or math.isnan(gap) else {f"band_gap_{functional}": gap},
        space_group_before=symmetry(proposed, SYMPREC_BUILT)[0],
        space_group_after=symmetry(final, SYMPREC_RELAXED)[0],
        n_steps=n_steps,
    )


def _formation_energy(
    structure: Structure, energy: float, parameters: Mapping[str, Any], references: Mapping[str, float]
) -> tuple[float, str]:
    """Return the formation energy in eV/atom with the MP2020 corrections, or NaN and why there is none.

    Args:
        structure: What the energy is of; the kind of oxygen (oxide, peroxide) is found from its distances.
        energy: Total energy in eV of the cell.
        parameters: What pymatgen's check wants to know of the run.
        references: eV/atom of each element.
    """
    amounts = structure.composition.get_el_amt_dict()
    missing = sorted(amounts.keys() - references.keys())
    if missing:
        return math.nan, f"no formation energy: no reference energy of {', '.join(missing)}"
    entry = ComputedStructureEntry(structure, energy, parameters=dict(parameters))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen warns where it guesses oxidation states
            corrected = MaterialsProject2020Compatibility().process_entry(entry, on_error="raise")
    except CompatibilityError as error:
        return math.nan, f"no formation energy on the MP2020 scale: {str(error).split(' for {')[0]}"
    if corrected is None:
        return math.nan, "no formation energy: the MP2020 corrections do not apply"
    elements = sum(n * references[symbol] for symbol, n in amounts.items())
    return (float(corrected.energy) - elements) / len(structure), ""


def _check_composition(path: Path, composition: Composition, proposed: Structure | None) -> None:
    if proposed is not None and proposed.composition.reduced_formula != composition.reduced_formula:
        raise DftError(
            f"{path} is a result of {composition.reduced_formula}, and {proposed.composition.reduced_formula} was "
            "proposed"
        )


def _result_in(place: Path) -> Path | None:
    """Return the result file of a folder, the one with the most digits if there are several."""
    paths = [place / name for name in (*VASP_RESULTS, *ESPRESSO_RESULTS)]
    there = [path for path in paths if path.is_file()]
    return there[0] if there else None


# --- VASP ----------------------------------------------------------------------------------------


def _other_settings(run: Vasprun) -> str:
    """Return what sets a run apart from the Materials Project's beyond what pymatgen checks, "" if nothing does."""
    if foreign := _foreign_potential(run):
        return f"no formation energy on the MP2020 scale: the potential {foreign} is not one of PBE"
    cutoff = run.parameters.get("ENMAX", run.incar.get("ENCUT", _CUTOFF))
    if float(cutoff) < _CUTOFF:
        return f"no formation energy on the MP2020 scale: the cutoff is {float(cutoff):g} eV, it has to be {_CUTOFF:g}"
    pressure = float(run.incar.get("PSTRESS", 0.0))
    return "" if pressure == 0 else f"no formation energy on the MP2020 scale: at a pressure of {pressure:g} kbar"


def _foreign_potential(run: Vasprun) -> str:
    """Return the title of a potential that is not one of PBE, "" if all are."""
    return next((title for title in sorted(run.potcar_symbols) if not title.startswith("PAW_PBE")), "")


def _vasp_functional(run: Vasprun, run_type: str) -> str:
    """Return the functional's name, "PBE" or "PBE+U" only with potentials of PBE.

    Args:
        run: The run.
        run_type: What pymatgen makes of the INCAR alone: "GGA" for whatever functional the potentials bring.
    """
    functional, plus, u = run_type.partition("+U")
    foreign = _foreign_potential(run)
    if functional in ("GGA", "PBE"):
        kind = foreign.partition(" ")[0]
        own = f"PBE_{kind}" if functional == "PBE" else _OF_POTENTIALS.get(kind, kind)
        functional = own if foreign else "PBE"
    return functional + plus + u


def _vasp_gap(run: Vasprun) -> float:
    """Return the gap in eV, 0 for a metal, NaN without eigenvalues."""
    if run.eigenvalues is None:
        return math.nan
    gap = run.eigenvalue_band_properties[0]
    return _gap(float(gap)) if isinstance(gap, int | float) else math.nan


def _gap(gap: float) -> float:
    """Return a gap, 0 for a metal, NaN where no empty band says how large it is."""
    if not math.isfinite(gap):
        return math.nan
    return 0.0 if gap < _METALLIC else gap


def _gap_of_bands(bands: NDArray[np.float64], level: float) -> float:
    """Return the gap in eV of bands (spin, k-point, band); a state at the level (fixed occupations) is occupied."""
    try:
        return _gap(float(bandgap(eigenvalues=bands, efermi=level + _METALLIC)[0]))
    except ValueError:  # ASE: no empty band
        return math.nan


# --- Quantum ESPRESSO ----------------------------------------------------------------------------


def _read_espresso_output(path: Path) -> dict[str, Any]:
    """Return what pw.x printed, by ASE."""
    text = path.read_text(encoding="utf-8", errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = ase.io.read(path, index=":", format="espresso-out")
    if not isinstance(images, list) or not images:
        raise DftError(f"{path} has no total energy: the run did not get that far")
    last, first = images[-1], images[0]
    problem = ""
    if text.rfind(_NOT_CONVERGED) > text.rfind("!    total energy"):
        problem = "the electronic steps did not converge"
    elif _JOB_DONE not in text:
        problem = _NOT_DONE
    return {
        "final": _ordered(last),
        "initial": _ordered(first),
        "energy": float(last.calc.results.get("energy", math.nan)),
        "first_energy": float(first.calc.results.get("energy", math.nan)),
        "gap": _ase_gap(last),
        "functional": _espresso_functional((_PRINTED_FUNCTIONAL.findall(text) or [""])[-1]),
        "n_steps": len(images),
        "problem": problem,
        "unfinished": "the relaxation ran out of steps (nstep)" if _OUT_OF_STEPS in text else "",
    }


def _espresso_functional(name: str) -> str:
    """Return the name of a functional without spaces, "PBE" in all its spellings, "unknown" for an empty one."""
    name = "+".join(name.upper().replace("+", " ").split())
    return "PBE" if name in _ESPRESSO_PBE else name or "unknown"


def _ordered(atoms: Atoms) -> Structure:
    """Return the structure without what the calculation adds, such as moments and forces."""
    return AseAtomsAdaptor.get_structure(Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True))


def _ase_gap(atoms: Atoms) -> float:
    """Return the gap in eV of the bands that were printed, NaN if they were not."""
    if not atoms.calc.kpts or atoms.calc.eFermi is None:
        return math.nan
    spins = sorted({point.s for point in atoms.calc.kpts})
    bands = np.array([[point.eps_n for point in atoms.calc.kpts if point.s == spin] for spin in spins])
    return _gap_of_bands(bands, atoms.calc.eFermi)


def _read_espresso_xml(path: Path) -> dict[str, Any]:
    """Return what the XML file of pw.x holds (schema of Quantum ESPRESSO 6.3 and later; Hartree and bohr)."""
    root = ET.parse(path).getroot()  # noqa: S314 - expat bounds the expansion of entities itself
    output = root.find("output")
    if output is None or output.find("total_energy/etot") is None:
        raise DftError(f"{path} has no total energy: the run did not get that far")
    steps = root.findall("step")
    first = steps[0] if steps else output
    converged = output.findtext("convergence_info/scf_conv/convergence_achieved", "true").strip() == "true"
    relaxation = root.findtext("input/control_variables/calculation", "").strip() in _RELAXATIONS
    unsaid = "false" if relaxation else "true"
    relaxed = output.findtext("convergence_info/opt_conv/convergence_achieved", unsaid).strip() == "true"
    problem = "" if converged else "the electronic steps did not converge"
    return {
        "final": _xml_structure(output),
        "initial": _xml_structure(first),
        "energy": _xml_energy(output),
        "first_energy": _xml_energy(first),
        "gap": _xml_gap(output.find("band_structure")),
        "functional": _espresso_functional(output.findtext("dft/functional", "")),
        "n_steps": max(len(steps), 1),
        "problem": problem if root.findtext("exit_status", "0").strip() in _ENDED else _NOT_DONE,
        "unfinished": "" if relaxed else "the relaxation ran out of steps (nstep)",
    }


def _xml_energy(element: ET.Element) -> float:
    return float(element.findtext("total_energy/etot", "nan")) * Hartree


def _xml_structure(element: ET.Element) -> Structure:
    structure = element.find("atomic_structure")
    if structure is None:
        raise ValueError("no atomic_structure")
    rows = [_numbers(structure.findtext(f"cell/{axis}", "")) for axis in ("a1", "a2", "a3")]
    atoms = structure.findall("atomic_positions/atom")
    symbols = [label_to_symbol(atom.attrib["name"]) for atom in atoms]
    coords = [[value * Bohr for value in _numbers(atom.text or "")] for atom in atoms]
    return Structure(Lattice(np.array(rows) * Bohr), symbols, coords, coords_are_cartesian=True, to_unit_cell=True)


def _xml_gap(bands: ET.Element | None) -> float:
    """Return the gap in eV; NaN if the file has no bands or no Fermi level."""
    if bands is None:
        return math.nan
    top, bottom = bands.findtext("highestOccupiedLevel"), bands.findtext("lowestUnoccupiedLevel")
    if top is not None and bottom is not None:
        return _gap((float(bottom) - float(top)) * Hartree)
    level = bands.findtext("fermi_energy") or top
    points = [_numbers(point.findtext("eigenvalues", "")) for point in bands.findall("ks_energies")]
    if level is None or not points or not points[0]:
        return math.nan
    values = np.array(points)
    spins = 2 if bands.findtext("lsda", "false").strip() == "true" else 1  # up first, then down, in one row
    values = np.stack(np.split(values, spins, axis=1))
    return _gap_of_bands(values * Hartree, float(level) * Hartree)


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split()]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
