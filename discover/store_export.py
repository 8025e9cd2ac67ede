"""A run of the store as one file: a table in Parquet, structures in extxyz, or a database of ASE.

A file appears under its name when it is whole. What the Parquet table and the others hold is in `docs/store.md`.
"""

import io
import json
import math
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ase.db
import ase.io
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db.core import reserved_keys
from pymatgen.core import Structure

from discover.oracle.base import Label, LabelStatus
from discover.run_folder import write_atomic
from discover.store import Candidate, Labelled, Store
from discover.store_database import is_store
from discover.store_records import LABEL_NUMBERS
from discover.store_schema import StoreError
from discover.structure_files import plain_cif

_WHOLE_NUMBERS = ("space_group_before", "space_group_after", "n_steps")
_ASE_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def export(store: Store, run: str, path: str | Path) -> None:
    """Write the candidates of a run and their labels to a file, in the form that its suffix names.

    Args:
        store: The store.
        run: A run of it.
        path: Ends in .parquet (a row for each candidate), .extxyz or .db (ASE; a structure for each label, and for each
            candidate without one). An earlier file of that name is replaced.

    Raises:
        StoreError: If the suffix is another, the run is not there, or the file is a store itself.
        RunFolderError: If the file cannot be written; an earlier one is still there.
    """
    path = Path(path)
    contents = {".parquet": _parquet, ".extxyz": _extxyz, ".db": _ase_db}
    if path.suffix not in contents:
        raise StoreError(f"cannot export to {path}; its name must end in {', '.join(contents)}")
    if is_store(path):
        raise StoreError(f"{path} is a store and is not replaced by an export; choose another name")
    write_atomic(path, contents[path.suffix](store, run))


# --- Parquet -------------------------------------------------------------------------------------


def _parquet(store: Store, run: str) -> bytes:
    candidates = store.candidates(run)
    rows = {candidate.candidate_id: _candidate_columns(candidate) for candidate in candidates}
    settings = {}
    for oracle in store.oracles(run):
        settings[oracle] = store.settings(run, oracle)
        for item in store.labels(run, oracle):
            # A label may have arrived, with a round of its own, after the candidates were read.
            if item.candidate.candidate_id in rows:
                columns = {f"{oracle}_{name}": value for name, value in _label_columns(item).items()}
                rows[item.candidate.candidate_id].update(columns)
    names = list(dict.fromkeys(name for row in rows.values() for name in row)) or ["candidate_id"]
    table = pa.table({name: pa.array([row.get(name) for row in rows.values()]) for name in names})
    about = {"run": run, "config": store.run_config(run), "settings": settings}
    table = table.replace_schema_metadata({"crystal_discover": json.dumps(about)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _candidate_columns(candidate: Candidate) -> dict[str, Any]:
    predictions: dict[str, float] = {}
    for name, (mean, std) in candidate.predictions.items():
        predictions |= {f"predicted_{name}": mean, f"predicted_{name}_std": std}
    return {
        "candidate_id": candidate.candidate_id,
        "round": candidate.round,
        "source": candidate.source,
        "formula": candidate.formula,
        "chemical_system": candidate.chemical_system,
        "space_group": candidate.space_group,
        "n_atoms": candidate.n_atoms,
        "prototype": candidate.prototype,
        "key": candidate.key,
        "log_reward": candidate.log_reward,
        "acquisition": candidate.acquisition,
        **predictions,
        "crystal": json.dumps(candidate.crystal),
        "cif": _cif(candidate.structure),
    }


def _label_columns(item: Labelled) -> dict[str, Any]:
    label = item.label
    return {
        "status": str(label.status),
        "reason": label.reason,
        **{name: getattr(label, name) for name in LABEL_NUMBERS},
        "e_above_hull": item.e_above_hull,
        "hull": item.hull,
        **{name: getattr(label, name) for name in _WHOLE_NUMBERS},
        **{f"property_{name}": value for name, value in label.properties.items()},
        "cif": _cif(label.structure),
    }


def _cif(structure: Structure | None) -> str | None:
    if structure is None:
        return None
    # A CIF has right-handed axes; the negatives of axes and coordinates describe the same crystal.
    sign = -1.0 if np.linalg.det(structure.lattice.matrix) < 0 else 1.0
    parameters = np.array(structure.lattice.parameters)
    return plain_cif(parameters, sign * structure.frac_coords, [site.specie.symbol for site in structure])


# --- frames: extxyz and ASE's database -----------------------------------------------------------


def _extxyz(store: Store, run: str) -> bytes:
    frames = []
    for atoms, values in _frames(store, run):
        atoms.info = {"material_id": values["candidate_id"], **_comment(values)}
        frames.append(atoms)
    buffer = io.StringIO()
    ase.io.write(buffer, frames, format="extxyz")
    return buffer.getvalue().encode()


def _comment(values: Mapping[str, str | int | float]) -> dict[str, str | int | float]:
    """Return values that the one comment line of a frame can hold: names without spaces, text without line breaks."""
    return {
        re.sub(r"\W+", "_", key): " ".join(value.split()) if isinstance(value, str) else value
        for key, value in values.items()
        # A reader would take "NaN" (sodium nitride) for a number, and finds the formula in the atoms anyway.
        if key != "formula"
    }


def _ase_db(store: Store, run: str) -> bytes:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "export.db"
        try:
            with ase.db.connect(file) as database:
                for atoms, values in _frames(store, run):
                    pairs = {key: value for key, value in values.items() if _is_ase_pair(key, value)}
                    database.write(atoms, key_value_pairs=pairs, data=values)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"ASE cannot write its database in {folder}: {error}; free some space there") from error
        return file.read_bytes()


def _frames(store: Store, run: str) -> Iterator[tuple[Atoms, dict[str, str | int | float]]]:
    """Yield a frame with its plain values for each label, and for each candidate without one, that has a structure."""
    labels: dict[str, list[tuple[str, Labelled]]] = {}
    for oracle in store.oracles(run):
        for item in store.labels(run, oracle):
            labels.setdefault(item.candidate.candidate_id, []).append((oracle, item))
    for candidate in store.candidates(run):
        columns = _known(_candidate_columns(candidate))
        for oracle, item in labels.get(candidate.candidate_id, []):
            structure = item.label.structure or candidate.structure
            if structure is not None:
                yield _atoms(structure, item.label), {**columns, "oracle": oracle, **_known(_label_columns(item))}
        if candidate.candidate_id not in labels and candidate.structure is not None:
            yield _atoms(candidate.structure, None), columns


def _atoms(structure: Structure, label: Label | None) -> Atoms:
    atoms = Atoms(
        numbers=[site.specie.Z for site in structure],
        cell=structure.lattice.matrix,
        scaled_positions=structure.frac_coords,
        pbc=True,
    )
    # The energy of a relaxed structure that was not kept is not that of the structure as proposed.
    is_of_these_atoms = label is not None and (label.structure is not None or label.status is LabelStatus.SINGLE_POINT)
    if label is not None and is_of_these_atoms and math.isfinite(label.energy_per_atom):
        atoms.calc = SinglePointCalculator(atoms, energy=label.energy_per_atom * len(atoms))
    return atoms


def _known(columns: Mapping[str, Any]) -> dict[str, str | int | float]:
    """Return the plain values that are known: no NaN, nothing empty, no CIF and no JSON."""
    return {
        name: value
        for name, value in columns.items()
        if name not in {"cif", "crystal"}
        and value is not None
        and value != ""
        and not (isinstance(value, float) and math.isnan(value))
    }


def _is_ase_pair(key: str, value: str | float) -> bool:
    """Return whether ASE takes a key-value pair: no reserved word, and no text that reads as a number or truth value.

    "NaN" and "InF" are such texts. What is left out here stands in the row's data.
    """
    if not _ASE_KEY.fullmatch(key) or key in reserved_keys:
        return False
    if not isinstance(value, str):
        return True
    try:
        float(value)
    except ValueError:
        return value not in {"True", "False"}
    return False
