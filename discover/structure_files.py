"""Structures from files and to files: the field's CSV, a folder of CIF files, extxyz; CIF, POSCAR and extxyz out.

Whatever is read becomes one table with a CIF text per row, so that everything after it knows one form of data.
"""

import io
import logging
import math
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import ase.io
import numpy as np
import pandas as pd
from ase import Atoms
from numpy.typing import NDArray
from pymatgen.core import Element, Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.cif import CifParser
from pymatgen.io.vasp import Poscar
from tqdm import tqdm

from discover.errors import DataError
from discover.run_folder import write_atomic
from discover.structure.base import cif_text

logger = logging.getLogger(__name__)

StructureFormat = Literal["cif", "poscar", "extxyz"]

LABELS_FILE = "labels.csv"  # beside the CIF files of a folder: material_id and any other column
SHORTEST_DISTANCE = 0.5  # Å; atoms closer than this overlap, as the field's structural validity says
SMALLEST_VOLUME = 0.1  # Å^3, of a cell; from the same rule
_EXTXYZ_SUFFIXES = (".extxyz", ".xyz")
_CELL_KEYS = tuple(
    f"_cell_{name}" for name in ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
)
#: A line before the atoms of a P1 CIF as pymatgen, ASE and `plain_cif` write it; any other may mean more symmetry.
_IN_PLAIN_CIF = re.compile(
    r"""|\#.*|data_.*|loop_|_cell_\S+\s+\S+|_(?:chemical|audit|citation|journal|symmetry_cell)_\S+\s+.+
    |_(?:symmetry_space_group_name_H-M|space_group_name_H-M_alt)\s+(['"]?)P\s*1\1
    |_(?:symmetry_Int_Tables|space_group_IT)_number\s+1
    |_symmetry_equiv_pos_(?:site_id|as_xyz)|_space_group_symop_(?:id|operation_xyz)
    |(?:1\s+)?(['"]?)\s*x\s*,\s*y\s*,\s*z\s*\2""",
    re.VERBOSE,
)


# --- tables of structures ------------------------------------------------------------------------


def read_table(path: Path) -> pd.DataFrame:
    """Return a table with one structure a row: from a CSV, a folder of CIF files, or an extxyz file.

    A CSV is returned as it is. A folder gives `material_id` (the file's name) and `cif`, with the columns of
    `labels.csv` beside them, if that file is there. An extxyz file gives its frames as `cif` with whatever plain
    values stand in their comment lines; a frame without `material_id` is named by its number, from 0.

    Raises:
        DataError: If there is nothing to read, or nothing of that form.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in _EXTXYZ_SUFFIXES:
        return _read_extxyz(path)
    return _read_csv(path)


def data_files(path: Path) -> list[Path]:
    """Return every file that `read_table` reads for a path."""
    if not path.is_dir():
        return [path]
    labels = path / LABELS_FILE
    return [*sorted(path.glob("*.cif")), *([labels] if labels.is_file() else [])]


def _read_csv(path: Path) -> pd.DataFrame:
    """Return the CSV; sodium nitride's formula is "NaN", so only an empty field means missing, and 007 is no 7."""
    try:
        return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype={"material_id": str})
    except (
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        UnicodeDecodeError,
        OSError,
        EOFError,
        zlib.error,
    ) as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error


def _read_folder(folder: Path) -> pd.DataFrame:
    files = sorted(folder.glob("*.cif"))
    if not files:
        raise DataError(f"no .cif file in the folder {folder}; give a folder of CIF files, a CSV or an extxyz file")
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    table = pd.DataFrame({"material_id": [file.stem for file in files], "cif": texts})
    labels = folder / LABELS_FILE
    if not labels.is_file():
        return table
    columns = _read_csv(labels)
    if "material_id" not in columns.columns:
        raise DataError(f"{labels} lacks the column material_id, which holds the names of the CIF files without .cif")
    columns = columns.drop(columns="cif", errors="ignore")
    if columns["material_id"].duplicated().any():
        twice = columns.loc[columns["material_id"].duplicated(), "material_id"].iloc[0]
        raise DataError(f"{labels} names {twice} more than once; keep one row for each CIF file")
    strangers = columns.loc[~columns["material_id"].isin(table["material_id"]), "material_id"].tolist()
    if strangers:
        logger.warning("%s: %d rows have no CIF file, first %s", labels, len(strangers), ", ".join(strangers[:5]))
    return table.merge(columns, on="material_id", how="left", validate="one_to_one")


def _read_extxyz(path: Path) -> pd.DataFrame:
    frames: list[Atoms] = []
    try:
        for frame in tqdm(ase.io.iread(path, format="extxyz"), desc=f"reading {path.name}", disable=None):
            frames.append(frame)  # noqa: PERF402 - the bar counts while the file is read
    except Exception as error:  # ASE raises many kinds
        raise DataError(f"{path} cannot be read as extxyz after {len(frames)} frames: {error}") from error
    if not frames:
        raise DataError(f"{path} holds no frame")
    rows = [
        {"material_id": str(number), **_plain_values(frame.info), "cif": _frame_cif(frame)}
        for number, frame in enumerate(frames)
    ]
    return pd.DataFrame(rows).astype({"material_id": str})


def _plain_values(info: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if isinstance(value, str | int | float | np.number)}


def _frame_cif(frame: Atoms) -> str:
    """Return a frame as a P1 CIF, as it stands: what is wrong with it is said when the CIF is read."""
    occupied = frame.info.get("occupancy", {}).values()  # where ASE keeps what it read from a disordered CIF
    if any(len(site) != 1 or next(iter(site.values())) != 1.0 for site in occupied):
        return "# partial occupancy"
    matrix = frame.cell.array
    sign = -1.0 if np.linalg.det(matrix) < 0 else 1.0  # a CIF has right-handed axes; -cell and -fractions are the same
    with np.errstate(all="ignore"):
        coords = sign * frame.cell.scaled_positions(frame.positions)
    return plain_cif(frame.cell.cellpar(), coords, list(frame.symbols))


def plain_cif(lattice_parameters: NDArray[np.float64], frac_coords: NDArray[np.float64], symbols: Sequence[str]) -> str:
    """Return a CIF in P1.

    Args:
        lattice_parameters: (6,) a, b, c in Å, alpha, beta, gamma in degrees.
        frac_coords: (n_atoms, 3).
        symbols: Element of each atom.
    """
    cell = [f"{key} {value:.10f}" for key, value in zip(_CELL_KEYS, lattice_parameters, strict=True)]
    columns = [f"_atom_site_{name}" for name in ("type_symbol", "fract_x", "fract_y", "fract_z", "occupancy")]
    atoms = [f"{symbol} {x:.10f} {y:.10f} {z:.10f} 1" for symbol, (x, y, z) in zip(symbols, frac_coords, strict=True)]
    return "\n".join(["data_crystal", *cell, "loop_", *columns, *atoms, ""])


# --- reading one structure -----------------------------------------------------------------------


def read_cif(
    text: str, *, overlaps: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return lattice matrix (3, 3) in Å, fractional coordinates (n_atoms, 3) and atomic numbers of a CIF.

    CIFs in P1 as pymatgen writes them are read directly, any other by pymatgen's parser.

    Args:
        text: The CIF.
        overlaps: Take atoms that overlap too.

    Raises:
        DataError: If the text is not a CIF of an ordered crystal with a volume and with atoms that do not overlap.
    """
    try:
        cell = _read_plain_cif(text)
    except (KeyError, ValueError, IndexError, AttributeError):
        cell = _read_any_cif(text)
    _check_cell(*cell, overlaps=overlaps)
    return cell


def _check_cell(
    matrix: NDArray[np.float64],
    frac_coords: NDArray[np.float64],
    atomic_numbers: NDArray[np.int64],
    *,
    overlaps: bool,
) -> None:
    if len(atomic_numbers) == 0:
        raise DataError("a cell without atoms")
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < SMALLEST_VOLUME:
        raise DataError(f"the cell has no volume (less than {SMALLEST_VOLUME} Å^3)")
    if not np.isfinite(frac_coords).all():
        raise DataError("coordinates that are no finite numbers")
    if overlaps:
        return
    distances = Lattice(matrix).get_all_distances(frac_coords, frac_coords)
    np.fill_diagonal(distances, np.inf)
    first, second = np.unravel_index(distances.argmin(), distances.shape)
    if distances[first, second] < SHORTEST_DISTANCE:
        raise DataError(
            f"atoms {first} and {second} overlap: {distances[first, second]:.2f} Å, "
            f"less than {SHORTEST_DISTANCE} Å apart"
        )


def _read_plain_cif(text: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Read a P1 CIF with full occupancies, 30 times faster than a general parser; raises if it is anything else."""
    lines = [line.strip() for line in text.splitlines()]
    cell = {line.split()[0]: line.split()[1] for line in lines if line.startswith("_cell_")}
    parameters = [float(cell[key]) for key in _CELL_KEYS]
    start = lines.index("_atom_site_type_symbol")
    if not all(_IN_PLAIN_CIF.fullmatch(line) for line in lines[:start]):
        raise ValueError("perhaps not P1")
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("_atom_site_")), len(lines))
    columns = lines[start:end]
    site_of = {
        column: columns.index(f"_atom_site_{column}") for column in ("type_symbol", "fract_x", "fract_y", "fract_z")
    }
    sites = [line.split() for line in lines[end:] if line]
    if any(len(site) != len(columns) for site in sites):
        raise ValueError("more than one loop after the atoms")
    occupancy = columns.index("_atom_site_occupancy")
    if any(float(site[occupancy]) != 1.0 for site in sites):
        raise ValueError("partial occupancy")
    numbers = np.array([_atomic_number(site[site_of["type_symbol"]]) for site in sites], dtype=np.int64)
    coords = np.array([[float(site[site_of[f"fract_{axis}"]]) for axis in "xyz"] for site in sites])
    return matrix_from_parameters(np.array(parameters)), coords, numbers


def _read_any_cif(text: str) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Read any CIF with pymatgen."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = CifParser.from_str(text).parse_structures(primitive=False)[0]
    except Exception as error:  # the parser raises many kinds
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"unparsable CIF: {first_line}") from error
    if not structure.is_ordered:
        raise DataError("disordered structure: every site must hold one element with occupancy 1")
    numbers = np.array([site.specie.Z for site in structure], dtype=np.int64)
    return structure.lattice.matrix, structure.frac_coords, numbers


@cache
def _atomic_number(symbol: str) -> int:
    """Return the atomic number of an element symbol; deuterium and the like raise ValueError."""
    return int(Element(symbol).number)


def matrix_from_parameters(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (3, 3) lattice rows in Å of (6,) a, b, c in Å and angles in degrees (a along x, b in the xy plane)."""
    a, b, c = parameters[:3]
    cos_alpha, cos_beta, cos_gamma = np.cos(np.radians(parameters[3:]))
    sin_gamma = math.sin(math.radians(parameters[5]))
    c_y = (cos_alpha - cos_beta * cos_gamma) / sin_gamma
    height = math.sqrt(1.0 - cos_beta**2 - c_y**2)  # ValueError if the angles close no cell
    return np.array([[a, 0.0, 0.0], [b * cos_gamma, b * sin_gamma, 0.0], [c * cos_beta, c * c_y, c * height]])


# --- writing -------------------------------------------------------------------------------------


def write_structures(
    folder: Path, structures: Mapping[str, Structure], file_format: StructureFormat, *, name: str = "structures"
) -> None:
    """Write structures under their names: CIF files with symmetry, POSCAR files (.vasp), or one extxyz file.

    Args:
        folder: Where to; it is made if it is not there.
        structures: By the name of the file, without suffix; in an extxyz file it becomes `material_id`.
        file_format: What to write.
        name: Of the extxyz file that holds them all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if file_format == "extxyz":
        write_atomic(folder / f"{name}.extxyz", extxyz_text(structures))
        return
    suffix, text = (".cif", cif_text) if file_format == "cif" else (".vasp", _poscar_text)
    for file, structure in tqdm(structures.items(), desc="writing", unit="file", disable=None):
        write_atomic(folder / f"{file}{suffix}", text(structure))


def extxyz_text(structures: Mapping[str, Structure]) -> str:
    """Return structures as the frames of one extxyz file; `properties` of a structure go to its comment line."""
    frames = []
    for name, structure in structures.items():
        frame = AseAtomsAdaptor.get_atoms(structure, msonable=False)
        frame.info = {"material_id": name, **structure.properties}
        frames.append(frame)
    buffer = io.StringIO()
    ase.io.write(buffer, frames, format="extxyz")
    return buffer.getvalue()


def _poscar_text(structure: Structure) -> str:
    return str(Poscar(structure).get_str(significant_figures=10))
