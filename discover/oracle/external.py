"""Labels that people or other programs make: structures and a form go out, results come back.

`write_requests` fills a folder with one CIF and one POSCAR per structure and with `results.csv`, one row a structure
with its result columns left empty. Whoever computes or measures fills in what is known. `read_results` checks the
file and returns labels. What is left empty is not labelled yet, so a file that is half filled in can be read, and read
again later.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pymatgen.core import Composition, Structure

from discover.engine import Task
from discover.oracle.base import Label, LabelStatus
from discover.structure_files import write_structures

RESULTS = "results.csv"
RELAXED = "relaxed"  # folder beside it, with relaxed structures as ID.cif or ID.vasp
ID, FORMULA, REASON = "candidate_id", "formula", "failed_because"
#: Columns of results with the lowest and highest believable value, and the unit.
COLUMNS: Mapping[str, tuple[float, float, str]] = {
    # the lowest of 102,000 Materials Project entries is -4.6; noble gas compounds and dense nitrogen reach 3
    "formation_energy_per_atom": (-5.5, 5.0, "eV/atom on the MP2020 scale"),
    "energy_per_atom": (-math.inf, math.inf, "eV/atom"),  # all-electron codes count from far below
    "band_gap": (0.0, 15.0, "eV; the widest is that of LiF, 14"),
}
_PROPERTY = "property."  # prefix of columns with numbers of another kind
_FORM = (ID, FORMULA, *COLUMNS, REASON)


class ExternalResultsError(ValueError):
    """A file of results that cannot be used; nothing of it was taken."""


def write_requests(folder: Path, tasks: Sequence[Task]) -> None:
    """Write structures and a form for their results into a folder.

    Args:
        folder: Created if absent.
        tasks: What to label; a name becomes a file's name.

    Raises:
        ExternalResultsError: If there is a form already that somebody may have filled in, or names are not unique or
            no names of files.
    """
    form = folder / RESULTS
    if form.exists():
        raise ExternalResultsError(f"{form} exists; it may hold results. Read it first, or choose another folder")
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ExternalResultsError("two tasks have the same name")
    if bad := [name for name in names if not name or name != Path(name).name or name in (".", "..")]:
        raise ExternalResultsError(f"{bad[0]!r} cannot be the name of a file")
    folder.mkdir(parents=True, exist_ok=True)
    structures = {task.name: task.structure for task in tasks}
    write_structures(folder / "cif", structures, "cif")
    write_structures(folder / "poscar", structures, "poscar")
    table = pd.DataFrame(dict.fromkeys(_FORM, ""), index=range(len(tasks)))
    table[ID], table[FORMULA] = names, [task.structure.composition.reduced_formula for task in tasks]
    partial = form.with_suffix(".partial")
    table.to_csv(partial, index=False)
    partial.replace(form)


def read_results(path: Path, tasks: Sequence[Task]) -> dict[str, Label]:
    """Return the labels of a results file by name; rows without any entry are left out.

    A row that says why it failed, and one whose number is no number, not finite or not believable in the stated
    unit, becomes a failed label with the reason. What is wrong with the file as a whole is an error, raised before
    anything is returned.

    Args:
        path: The file, or the folder that `write_requests` filled.
        tasks: What was asked for, or more.

    Raises:
        ExternalResultsError: If there is no such file, a column is missing or unknown, an id is unknown or comes
            twice, a formula is not that of the structure, or nearly all energies look like meV or eV per cell.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise ExternalResultsError(f"no results at {file}")
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (ValueError, UnicodeDecodeError) as error:  # pandas' own errors are ValueErrors
        raise ExternalResultsError(f"{file} is no CSV: {error}") from error
    structures = {task.name: task.structure for task in tasks}
    table = table.apply(lambda column: column.str.strip())
    _check_columns(table, file)
    _check_rows(table, structures, file)
    columns = [name for name in table.columns if name in COLUMNS or name.startswith(_PROPERTY)]
    filled = (table[columns] != "").any(axis=1)
    if REASON in table:
        filled |= table[REASON] != ""
    rows = table[filled].to_dict("records")
    _check_units(rows, file)
    return {row[ID]: _label(row, columns, structures[row[ID]], file.parent / RELAXED) for row in rows}


def _check_columns(table: pd.DataFrame, file: Path) -> None:
    if ID not in table.columns:
        raise ExternalResultsError(f"{file} has no column {ID!r}; it has {', '.join(table.columns)}")
    unknown = [name for name in table.columns if name not in _FORM and not name.startswith(_PROPERTY)]
    if unknown:
        raise ExternalResultsError(
            f"{file}: unknown column {unknown[0]!r}; there are {', '.join(_FORM)}, and {_PROPERTY}NAME for any other "
            "number"
        )
    if not any(name in COLUMNS or name.startswith(_PROPERTY) for name in table.columns):
        raise ExternalResultsError(f"{file} has no column of results; there are {', '.join(COLUMNS)}")


def _check_rows(table: pd.DataFrame, structures: Mapping[str, Structure], file: Path) -> None:
    for line, name in enumerate(table[ID], start=2):
        if name not in structures:
            raise ExternalResultsError(f"{file}, line {line}: nothing named {name!r} was asked for")
    repeated = table[ID][table[ID].duplicated()]
    if len(repeated):
        raise ExternalResultsError(f"{file}, line {repeated.index[0] + 2}: {repeated.iloc[0]!r} comes twice")
    if FORMULA not in table:
        return
    for line, (name, formula) in enumerate(zip(table[ID], table[FORMULA], strict=True), start=2):
        asked = structures[name].composition.reduced_formula
        if formula and _reduced(formula) != asked:
            raise ExternalResultsError(f"{file}, line {line}: {name!r} is {asked}, but the row says {formula}")


def _reduced(formula: str) -> str:
    try:
        return Composition(formula).reduced_formula
    except ValueError:
        return formula


def _check_units(rows: Sequence[Mapping[str, str]], file: Path) -> None:
    """Refuse a column in which most numbers are not believable: then it is the unit, and not one calculation.

    Raises:
        ExternalResultsError: Naming column, number and unit.
    """
    for name, (lowest, highest, unit) in COLUMNS.items():
        given = [_as_number(row.get(name, "")) for row in rows]
        values = np.array([value for value in given if value is not None and math.isfinite(value)])
        odd = values[(values < lowest) | (values > highest)]
        if len(values) >= 3 and len(odd) > len(values) / 2:
            raise ExternalResultsError(
                f"{file}: {len(odd)} of {len(values)} numbers in {name}, such as {odd[0]:g}, are outside {lowest:g} to "
                f"{highest:g}. It takes {unit}, not meV and not eV per cell"
            )


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _label(row: Mapping[str, str], columns: Sequence[str], asked: Structure, relaxed: Path) -> Label:
    """Return the label of one row."""
    if row.get(REASON):
        return Label(status=LabelStatus.FAILED, reason=row[REASON])
    numbers: dict[str, float] = {}
    for column in columns:
        if not row[column]:
            continue
        value = _as_number(row[column])
        lowest, highest, unit = COLUMNS.get(column, (-math.inf, math.inf, "a number"))
        if value is None or not math.isfinite(value):
            return Label(status=LabelStatus.FAILED, reason=f"{column} is {row[column]!r}, expected a finite number")
        if not lowest <= value <= highest:
            return Label(
                status=LabelStatus.FAILED,
                reason=f"{column} is {value:g}, outside {lowest:g} to {highest:g}; it takes {unit}",
            )
        numbers[column] = value
    structure, wrong = _relaxed_structure(row[ID], asked, relaxed)
    if wrong:
        return Label(status=LabelStatus.FAILED, reason=wrong)
    return Label(
        status=LabelStatus.GIVEN,
        structure=structure,
        properties={name.removeprefix(_PROPERTY): x for name, x in numbers.items() if name.startswith(_PROPERTY)},
        **{name: x for name, x in numbers.items() if name in COLUMNS},  # type: ignore[arg-type] # energies and gap
    )


def _relaxed_structure(name: str, asked: Structure, folder: Path) -> tuple[Structure | None, str]:
    """Return the relaxed structure if there is one, and what is wrong with it, "" if nothing is."""
    for suffix in (".cif", ".vasp"):
        file = folder / f"{name}{suffix}"
        if file.is_file():
            try:
                structure = Structure.from_file(file)
            except Exception as error:  # noqa: BLE001 - pymatgen's parsers raise many kinds
                return None, f"{file.name} cannot be read: {(str(error).splitlines() or [''])[0]}"
            if structure.composition.reduced_formula != asked.composition.reduced_formula:
                return None, f"{file.name} holds {structure.composition.reduced_formula}, not {asked.reduced_formula}"
            return structure, ""
    return None, ""
