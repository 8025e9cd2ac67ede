"""Input files for density functional theory: VASP as the Materials Project runs it, and Quantum ESPRESSO pw.x.

One folder per structure, named after it; `discover.dft_results` reads the results back from the same folders.

VASP: pymatgen's `MPRelaxSet`, whose energies the MP2020 corrections are made for. Potentials are licensed, so each
folder holds `POTCAR.spec` with their names; `pmg potcar` or a concatenation of the licensed files makes the POTCAR.

Quantum ESPRESSO: a `vc-relax` of pw.x with plain PBE, k-points of the same density as the Materials Project's (64 per
Å^-3 of reciprocal volume, always through Γ), spin from the elements that the Materials Project gives a moment.
Pseudopotentials are those of SSSP (Prandini et al. 2018, doi:10.1038/s41524-018-0127-2). With the JSON file that comes
with that library its file names and cutoffs are used. Without it, a file is called after its element, such as `Fe.upf`,
and cutoffs are 90 and 1080 Ry, which is what SSSP efficiency 1.3 asks for its hardest elements: safe, and slow.
"""

import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase.io.espresso import write_espresso_in
from pymatgen.core import Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.vasp import Kpoints
from pymatgen.io.vasp.sets import MPRelaxSet
from tqdm import tqdm

from discover.run_folder import write_atomic

ESPRESSO_INPUT = "pw.in"
RECIPROCAL_DENSITY = 64  # k-points per Å^-3 of the reciprocal cell, of MPRelaxSet
DEFAULT_ECUTWFC, DEFAULT_ECUTRHO = 90.0, 1080.0  # Ry; copper's wave functions, iron's density
STARTING_MAGNETIZATION = 0.5  # of the valence electrons
_EMPTY_NAMELIST = re.compile(r"^&(?:FCP|RISM)\n/\n", re.MULTILINE)  # which pw.x would complain about
#: Elements that the Materials Project starts with a magnetic moment; of La and Lu it is a formality.
MAGNETIC = frozenset(
    label.rstrip("0123456789+") for label, moment in MPRelaxSet.CONFIG["INCAR"]["MAGMOM"].items() if moment >= 1
) | {"Co"}


class DftError(ValueError):
    """Structures that no input can be written for, or results that cannot be used."""


@dataclass(frozen=True)
class Pseudopotentials:
    """File names and cutoffs of pseudopotentials by element.

    Args:
        files: File name by element; one that is missing is called after its element, such as "Fe.upf".
        ecutwfc: Cutoff of wave functions in Ry by element.
        ecutrho: Cutoff of the density in Ry by element.
    """

    files: Mapping[str, str]
    ecutwfc: Mapping[str, float]
    ecutrho: Mapping[str, float]

    @classmethod
    def load(cls, path: Path | str) -> "Pseudopotentials":
        """Return what the JSON file of an SSSP library says, such as SSSP_1.3.0_PBE_efficiency.json.

        Raises:
            DftError: If it is no such file.
        """
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                files={symbol: str(entry["filename"]) for symbol, entry in entries.items()},
                ecutwfc={symbol: float(entry["cutoff_wfc"]) for symbol, entry in entries.items()},
                ecutrho={symbol: float(entry["cutoff_rho"]) for symbol, entry in entries.items()},
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DftError(
                f"{path} is no SSSP table ({error}); give the JSON file that comes with the pseudopotentials, with "
                "filename, cutoff_wfc and cutoff_rho of each element"
            ) from error

    def cutoffs(self, structure: Structure) -> tuple[float, float]:
        """Return ecutwfc and ecutrho in Ry: the largest that an element of the structure needs."""
        symbols = structure.symbol_set
        return (
            max(self.ecutwfc.get(symbol, DEFAULT_ECUTWFC) for symbol in symbols),
            max(self.ecutrho.get(symbol, DEFAULT_ECUTRHO) for symbol in symbols),
        )


BY_ELEMENT = Pseudopotentials({}, {}, {})


def write_vasp_inputs(folder: Path, structures: Mapping[str, Structure]) -> dict[str, str]:
    """Write INCAR, KPOINTS, POSCAR and POTCAR.spec of each structure into a folder of its name.

    Returns:
        Why nothing was written, by the structure's name; {} if all were: an element without a potential, for example.

    Raises:
        DftError: If a name is no folder name.
    """
    failures = {}
    for name, structure in tqdm(structures.items(), desc="VASP inputs", disable=None, delay=2):
        place = _place(folder, name)
        try:
            files = vasp_inputs(structure)
        except DftError as error:
            failures[name] = str(error)
            continue
        _write(place, files)
    return failures


def vasp_inputs(structure: Structure) -> dict[str, str]:
    """Return the text of INCAR, KPOINTS, POSCAR and POTCAR.spec with the settings of the Materials Project.

    Raises:
        DftError: If the Materials Project has no potential for an element.
    """
    potentials = MPRelaxSet.CONFIG["POTCAR"]
    missing = sorted(set(structure.symbol_set) - potentials.keys())
    if missing:
        raise DftError(f"the Materials Project has no VASP potential for {', '.join(missing)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Yb_2 is odd, and that the potentials are not installed
        written = MPRelaxSet(structure).get_input_set(potcar_spec=True)
    return {name: str(content).rstrip("\n") + "\n" for name, content in written.items() if content is not None}


def write_espresso_inputs(
    folder: Path, structures: Mapping[str, Structure], *, pseudopotentials: Pseudopotentials = BY_ELEMENT
) -> None:
    """Write `pw.in` of each structure into a folder of its name; run it there with `pw.x -in pw.in > pw.out`.

    Pseudopotentials are expected in `pseudo/` beside the folders, results are written to `out/` in each.

    Raises:
        DftError: If a name is no folder name.
    """
    for name, structure in tqdm(structures.items(), desc="Quantum ESPRESSO inputs", disable=None, delay=2):
        _write(_place(folder, name), {ESPRESSO_INPUT: espresso_input(structure, pseudopotentials=pseudopotentials)})


def espresso_input(structure: Structure, *, pseudopotentials: Pseudopotentials = BY_ELEMENT) -> str:
    """Return the input of a variable-cell relaxation with pw.x.

    PBE without +U: its energies are not those of the Materials Project for oxides and fluorides of Co, Cr, Fe, Mn, Mo,
    Ni, V and W. Cold smearing of 0.01 Ry suits metals and insulators. Moments start parallel.
    """
    n_atoms = len(structure)
    ecutwfc, ecutrho = pseudopotentials.cutoffs(structure)
    settings: dict[str, dict[str, Any]] = {
        "control": {
            "calculation": "vc-relax",
            "prefix": "crystal",
            "outdir": "./out",
            "pseudo_dir": "../pseudo",
            "tprnfor": True,
            "tstress": True,
            "etot_conv_thr": 1e-5 * n_atoms,  # Ry
            "forc_conv_thr": 1e-3,  # Ry/bohr, 0.026 eV/Å
            "nstep": 200,
        },
        "system": {
            "ecutwfc": ecutwfc,
            "ecutrho": ecutrho,
            "occupations": "smearing",
            "smearing": "cold",
            "degauss": 0.01,
        },
        "electrons": {"conv_thr": 1e-9 * n_atoms, "mixing_beta": 0.4, "electron_maxstep": 200},
        "ions": {"ion_dynamics": "bfgs"},
        "cell": {"cell_dynamics": "bfgs", "press_conv_thr": 0.5},  # kbar
    }
    atoms = AseAtomsAdaptor.get_atoms(structure, msonable=False)
    moments = [STARTING_MAGNETIZATION if symbol in MAGNETIC else 0.0 for symbol in atoms.symbols]
    atoms.set_initial_magnetic_moments(moments)
    buffer = io.StringIO()
    write_espresso_in(
        buffer,
        atoms,
        input_data=settings,
        pseudopotentials={s: pseudopotentials.files.get(s, f"{s}.upf") for s in structure.symbol_set},
        kpts=k_points(structure),
        crystal_coordinates=True,
    )
    return _EMPTY_NAMELIST.sub("", buffer.getvalue())


def k_points(structure: Structure) -> tuple[int, int, int]:
    """Return the divisions of the k-point mesh: as dense as the Materials Project's."""
    a, b, c = Kpoints.automatic_density_by_vol(structure, RECIPROCAL_DENSITY, force_gamma=True).kpts[0]
    return math.ceil(a), math.ceil(b), math.ceil(c)


def _place(folder: Path, name: str) -> Path:
    if name in ("", ".", "..") or Path(name).name != name:
        raise DftError(f"a structure called {name!r} cannot have a folder of its name; give it a plain name")
    return folder / name


def _write(place: Path, files: Mapping[str, str]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomic(place / name, text)
