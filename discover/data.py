"""Structures from a CSV, prepared once: space group, orbits on Wyckoff letters, lattice, labels.

The CSV has the form the field uses (MP-20): one row a material, the structure as CIF text; a folder of CIF files or an
extxyz file does as well (`discover.structure_files`). Everything that needs crystallography happens here; what comes
out is plain arrays that train on any machine. Prepared files are kept in the user's cache under a hash of what was
read, never beside it.
"""

import hashlib
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import spglib
import torch
from numpy.typing import NDArray
from pymatgen.core import Structure
from torch import Tensor
from tqdm import tqdm

from discover.errors import DataError
from discover.structure_files import data_files, read_cif, read_table
from envs.crystal import LETTERS, CrystalBatch

logger = logging.getLogger(__name__)

LABELS = ("formation_energy_per_atom", "band_gap", "e_above_hull")
REQUIRED_COLUMNS = ("material_id", "cif")
PREPARATION_VERSION = 4  # part of the cache key: raise it when prepared arrays change
SYMPRECS = (0.1, 0.01)  # Å; 0.1 is what the Materials Project and MP-20 use
_CHUNK = 256
_MIN_ROWS_FOR_POOL = 1024  # starting workers takes longer than this many rows

# PyXtal's setting is spglib's first Hall entry, except origin choice 2 (the second entry) in these 24 groups.
_ORIGIN_CHOICE_2 = frozenset(
    (48, 50, 59, 68, 70, 85, 86, 88, 125, 126, 129, 130, 133, 134, 137, 138, 141, 142, 201, 203, 222, 224, 227, 228)
)


class Failure(NamedTuple):
    """A row of the CSV that was left out, and why."""

    row: int  # 0 = first row below the header
    material_id: str
    reason: str


@dataclass(frozen=True)
class Orbits:
    """One structure in PyXtal's setting: the asymmetric unit and the conventional cell."""

    space_group: int
    elements: tuple[int, ...]
    letters: tuple[int, ...]
    counts: tuple[int, ...]  # atoms per primitive cell
    positions: tuple[tuple[float, float, float], ...]  # one atom of each orbit, fractional, conventional cell
    lattice_parameters: tuple[float, ...]  # a, b, c in Å, alpha, beta, gamma in degrees


@dataclass(frozen=True)
class PreparedData:
    """Rows of a CSV as arrays, in file order without the failures."""

    crystals: CrystalBatch
    positions: Tensor  # (n, max_orbits, 3) float64 fractional coordinates of one atom of each orbit, 0 in padding
    labels: dict[str, Tensor]  # {name in LABELS: (n,) float64, NaN where the row has none}
    ids: NDArray[np.str_]  # (n,)
    formulas: NDArray[np.str_]  # (n,) reduced
    label_source: NDArray[np.str_]  # (n,) "" where unknown
    geometry: NDArray[np.str_]  # (n,) "" where unknown
    failures: tuple[Failure, ...]

    def __len__(self) -> int:
        """Return the number of prepared rows."""
        return len(self.crystals)


@cache
def hall_numbers() -> tuple[int, ...]:
    """Return the Hall number of PyXtal's setting of each space group; index 0 is unused."""
    entries: dict[int, list[int]] = {}
    for hall in range(1, 531):
        kind = spglib.get_spacegroup_type(hall)
        if kind is not None:
            entries.setdefault(kind.number, []).append(hall)
    return (0, *(entries[g][1 if g in _ORIGIN_CHOICE_2 else 0] for g in range(1, 231)))


def find_orbits(
    lattice_matrix: NDArray[np.float64], frac_coords: NDArray[np.float64], atomic_numbers: NDArray[np.int64]
) -> Orbits:
    """Return space group, orbits and conventional cell of a structure in PyXtal's setting.

    The tolerance is 0.1 Å; where spglib finds no symmetry or no consistent cell, 0.01 Å.

    Raises:
        DataError: If spglib fails at both tolerances.
    """
    cell = (lattice_matrix, frac_coords, atomic_numbers)
    reason = "spglib found no symmetry"
    for symprec in SYMPRECS:
        dataset = _symmetry_dataset(cell, symprec)
        if dataset is None:
            continue
        try:
            return _orbits_from_dataset(dataset, atomic_numbers)
        except DataError as error:
            reason = str(error)
    raise DataError(reason)


def orbits_of_structure(structure: Structure) -> Orbits:
    """Return space group, orbits and conventional cell of an ordered pymatgen structure in PyXtal's setting."""
    numbers = np.array([site.specie.Z for site in structure], dtype=np.int64)
    return find_orbits(structure.lattice.matrix, structure.frac_coords, numbers)


def batch_orbits(rows: Iterable[Orbits]) -> tuple[CrystalBatch, Tensor]:
    """Return a crystal batch and (n, max_orbits, 3) float64 positions of one atom of each orbit."""
    items = list(rows)
    n, width = len(items), max((len(item.elements) for item in items), default=1)
    elements, counts = np.zeros((n, width), np.int64), np.zeros((n, width), np.int64)
    letters, positions = np.full((n, width), -1, np.int64), np.zeros((n, width, 3))
    for i, item in enumerate(items):
        used = len(item.elements)
        elements[i, :used], letters[i, :used], counts[i, :used] = item.elements, item.letters, item.counts
        positions[i, :used] = item.positions
    crystals = CrystalBatch(
        torch.tensor([item.space_group for item in items], dtype=torch.int64),
        torch.from_numpy(elements),
        torch.from_numpy(letters),
        torch.from_numpy(counts),
        torch.tensor([item.lattice_parameters for item in items], dtype=torch.float64).reshape(n, 6),
    )
    return crystals, torch.from_numpy(positions)


def prepare(path: Path | str, *, n_workers: int = 2, progress: bool = True, use_cache: bool = True) -> PreparedData:
    """Return the prepared rows of a data set, from the cache if it was prepared before.

    Args:
        path: CSV (or CSV.GZ) with columns `material_id`, `cif` and any of the labels; a folder of CIF files, with the
            labels in `labels.csv`; an extxyz file, with the labels in the comment lines; or a file of `save_prepared`.
        n_workers: Processes that analyse structures.
        progress: Show a bar with rate and remaining time.
        use_cache: Read and write `cache_directory()`.

    Raises:
        DataError: If the file, a needed column, or every row is missing or unusable.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"no data file at {path}; give the path of a CSV with columns {', '.join(REQUIRED_COLUMNS)}, "
            "of a folder of CIF files or of an extxyz file"
        )
    if path.suffix == ".npz":
        return load_prepared(path)
    cached = cache_directory() / "prepared" / f"{_content_key(path)}.npz"
    if use_cache and cached.is_file():
        data = load_prepared(cached)
        report_failures(data.failures, n_rows=len(data) + len(data.failures), name=path.name)
        return data
    data = prepare_table(read_table(path), n_workers=n_workers, progress=progress, name=path.name)
    if use_cache:
        _keep(data, cached)
    return data


def prepare_table(
    table: pd.DataFrame, *, n_workers: int = 2, progress: bool = True, name: str = "table"
) -> PreparedData:
    """Return the prepared rows of a table that is in memory; see `prepare`.

    Raises:
        DataError: If a needed column is missing or no row is usable.
    """
    missing = [column for column in REQUIRED_COLUMNS if column not in table.columns]
    if missing:
        raise DataError(
            f"{name} lacks the column(s) {', '.join(missing)}; needed: {', '.join(REQUIRED_COLUMNS)}; "
            f"labels, all optional: {', '.join(LABELS)}"
        )
    labels, label_failures = _read_labels(table)
    reasons = {**_bad_ids(table), **label_failures}
    found: dict[int, Orbits] = {}
    todo = [(i, cif) for i, cif in enumerate(table["cif"].tolist()) if i not in reasons]
    for row, result in _analyse(todo, n_workers, progress=progress, name=name):
        if isinstance(result, Orbits):
            found[row] = result
        else:
            reasons[row] = result
    ids = table["material_id"].astype(str).to_numpy()
    failures = tuple(Failure(row, str(ids[row]), reasons[row]) for row in sorted(reasons))
    report_failures(failures, n_rows=len(table), name=name)
    if not found:
        first = f": {failures[0].reason}" if failures else ""
        raise DataError(f"no usable row in {name} ({len(table)} rows){first}")
    rows = np.array(sorted(found))
    crystals, positions = batch_orbits(found[row] for row in rows)
    return PreparedData(
        crystals=crystals,
        positions=positions,
        labels={label: torch.from_numpy(values[rows]) for label, values in labels.items()},
        ids=ids[rows].astype(np.str_),
        formulas=np.array(crystals.formulas(), dtype=np.str_),
        label_source=_text_column(table, "label_source")[rows],
        geometry=_text_column(table, "geometry")[rows],
        failures=failures,
    )


def report_failures(failures: tuple[Failure, ...], *, n_rows: int, name: str, n_listed: int = 10) -> None:
    """Log how many rows were left out and the first of them with their reasons."""
    if not failures:
        return
    lines = [f"  row {item.row} ({item.material_id}): {item.reason}" for item in failures[:n_listed]]
    more = [f"  and {len(failures) - n_listed} more"] if len(failures) > n_listed else []
    logger.warning("\n".join([f"{name}: skipped {len(failures)} of {n_rows} rows", *lines, *more]))


def cache_directory() -> Path:
    """Return where prepared data are kept: $CRYSTAL_DISCOVER_CACHE or ~/.cache/crystal-discover."""
    chosen = os.environ.get("CRYSTAL_DISCOVER_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "crystal-discover"


def save_prepared(data: PreparedData, path: Path) -> None:
    """Write `data` as a compressed npz; an interrupted write leaves no file under `path`."""
    crystals = data.crystals
    arrays: dict[str, NDArray[Any]] = {
        "space_group": crystals.space_group.numpy().astype(np.uint8),
        "elements": crystals.elements.numpy().astype(np.uint8),
        "letters": crystals.letters.numpy().astype(np.int8),
        "counts": crystals.counts.numpy().astype(np.uint16),
        "lattice_parameters": crystals.lattice_parameters.numpy(),
        "positions": data.positions.numpy(),
        "ids": data.ids,
        "formulas": data.formulas,
        "label_source": data.label_source,
        "geometry": data.geometry,
        "failures": np.array(json.dumps(data.failures)),
        **{name: data.labels[name].numpy() for name in LABELS},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as handle:
        try:
            np.savez_compressed(handle, allow_pickle=False, **arrays)
            handle.close()
            Path(handle.name).chmod(0o644)  # temporary files are private, prepared data need not be
            Path(handle.name).replace(path)
        except BaseException:
            Path(handle.name).unlink(missing_ok=True)
            raise


def load_prepared(path: Path) -> PreparedData:
    """Return what `save_prepared` wrote.

    Raises:
        DataError: If the file is truncated or was not written by `save_prepared`.
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        names = ("space_group", "elements", "letters", "counts")
        integers = {name: torch.from_numpy(arrays[name].astype(np.int64)) for name in names}
        crystals = CrystalBatch(**integers, lattice_parameters=torch.from_numpy(arrays["lattice_parameters"]))
        return PreparedData(
            crystals=crystals,
            positions=torch.from_numpy(arrays["positions"]),
            labels={name: torch.from_numpy(arrays[name]) for name in LABELS},
            **{name: arrays[name] for name in ("ids", "formulas", "label_source", "geometry")},
            failures=tuple(Failure(*item) for item in json.loads(str(arrays["failures"]))),
        )
    except Exception as error:  # numpy raises many kinds for a broken archive
        raise DataError(f"{path} is not a prepared data file ({error}); delete it and prepare the CSV again") from error


def _keep(data: PreparedData, path: Path) -> None:
    """Store `data` in the cache; a cache that cannot be written costs time, not the result."""
    try:
        save_prepared(data, path)
    except OSError as error:
        logger.warning(
            "could not keep prepared data at %s (%s); set CRYSTAL_DISCOVER_CACHE to a writable folder", path, error
        )


def _content_key(path: Path) -> str:
    """Return the hash of all that is read, and of everything that changes what is prepared from it."""
    digest = hashlib.sha256(f"{PREPARATION_VERSION} {SYMPRECS}".encode())
    for file in data_files(path):
        if path.is_dir():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())  # the names become material_id
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def _read_labels(table: pd.DataFrame) -> tuple[dict[str, NDArray[np.float64]], dict[int, str]]:
    """Return {label: (n,) values, NaN = no label} and {row: reason} for entries that are no finite number."""
    labels: dict[str, NDArray[np.float64]] = {}
    reasons: dict[int, str] = {}
    for name in LABELS:
        if name not in table.columns:
            labels[name] = np.full(len(table), np.nan)
            continue
        values = pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=np.float64)
        bad = (np.isnan(values) & table[name].notna().to_numpy()) | np.isinf(values)
        reasons.update(
            {int(row): f"{name} is not a finite number: {table[name].iloc[row]!r}" for row in np.flatnonzero(bad)}
        )
        labels[name] = values
    return labels, reasons


def _bad_ids(table: pd.DataFrame) -> dict[int, str]:
    """Return {row: reason} for rows without id or structure and for repeated ids (the first one stays)."""
    reasons: dict[int, str] = {}
    repeated = table["material_id"].duplicated(keep="first") & table["material_id"].notna()
    for row in np.flatnonzero(repeated.to_numpy()):
        reasons[int(row)] = f"duplicate material_id {table['material_id'].iloc[row]}; the first row with it is kept"
    for column in REQUIRED_COLUMNS:
        reasons.update({int(row): f"{column} is empty" for row in np.flatnonzero(table[column].isna().to_numpy())})
    return reasons


def _text_column(table: pd.DataFrame, name: str) -> NDArray[np.str_]:
    """Return a column as text, "" where missing."""
    if name not in table.columns:
        return np.full(len(table), "", dtype=np.str_)
    return np.asarray(table[name].fillna(""), dtype=np.str_)


def _analyse(
    todo: list[tuple[int, str]], n_workers: int, *, progress: bool, name: str
) -> Iterator[tuple[int, Orbits | str]]:
    """Yield (row, orbits or the reason of failure) for every (row, CIF)."""
    chunks = [todo[start : start + _CHUNK] for start in range(0, len(todo), _CHUNK)]
    with tqdm(total=len(todo), desc=f"preparing {name}", unit=" crystals", disable=not progress) as bar:
        if n_workers > 1 and len(todo) >= _MIN_ROWS_FOR_POOL:
            with ProcessPoolExecutor(n_workers, mp_context=get_context("spawn")) as pool:
                for results in pool.map(_analyse_chunk, chunks):
                    bar.update(len(results))
                    yield from results
            return
        for chunk in chunks:
            results = _analyse_chunk(chunk)
            bar.update(len(results))
            yield from results


def _analyse_chunk(chunk: list[tuple[int, str]]) -> list[tuple[int, Orbits | str]]:
    """Return (row, orbits or the reason of failure) for a few rows."""
    results: list[tuple[int, Orbits | str]] = []
    for row, cif in chunk:
        try:
            results.append((row, find_orbits(*read_cif(str(cif)))))
        except DataError as error:
            results.append((row, str(error)))
    return results


def _symmetry_dataset(cell: tuple[Any, Any, Any], symprec: float) -> Any | None:
    """Return spglib's dataset in PyXtal's setting, or None if spglib finds no symmetry."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dataset = spglib.get_symmetry_dataset(cell, symprec=symprec)
            if dataset is None:
                return None
            wanted = hall_numbers()[dataset.number]
            if dataset.hall_number != wanted:
                dataset = spglib.get_symmetry_dataset(cell, symprec=symprec, hall_number=wanted)
        except spglib.SpglibError:
            return None
    return dataset


def _orbits_from_dataset(dataset: Any, atomic_numbers: NDArray[np.int64]) -> Orbits:
    """Return the orbits of the standardised conventional cell.

    Raises:
        DataError: If the standardised cell does not hold the input's composition in whole orbits.
    """
    primitive_of_atom = np.asarray(dataset.mapping_to_primitive)
    primitive_of_std = np.asarray(dataset.std_mapping_to_primitive)
    n_primitive = len(np.unique(primitive_of_atom))
    centring = len(primitive_of_std) // n_primitive
    orbit_of_atom = np.asarray(dataset.crystallographic_orbits)
    orbits: list[tuple[int, int, int, tuple[float, float, float]]] = []
    for orbit in np.unique(orbit_of_atom):
        atoms = np.flatnonzero(orbit_of_atom == orbit)
        members = np.flatnonzero(np.isin(primitive_of_std, primitive_of_atom[atoms]))
        element, letter = int(atomic_numbers[atoms[0]]), LETTERS.index(dataset.wyckoffs[atoms[0]])
        if len(members) % centring:
            raise DataError("the standardised cell splits an orbit")
        x, y, z = (np.asarray(dataset.std_positions)[members[0]] % 1.0).tolist()
        orbits.append((element, letter, len(members) // centring, (x, y, z)))
    scale = len(atomic_numbers) / n_primitive
    for element in np.unique(atomic_numbers):
        if sum(o[2] for o in orbits if o[0] == element) * scale != np.count_nonzero(atomic_numbers == element):
            raise DataError("the standardised cell changes the composition")
    orbits.sort(key=lambda o: (o[1], o[0], o[3]))
    return Orbits(
        space_group=int(dataset.number),
        elements=tuple(o[0] for o in orbits),
        letters=tuple(o[1] for o in orbits),
        counts=tuple(o[2] for o in orbits),
        positions=tuple(o[3] for o in orbits),
        lattice_parameters=_symmetrised_parameters(np.asarray(dataset.std_lattice), int(dataset.number)),
    )


def _symmetrised_parameters(matrix: NDArray[np.float64], space_group: int) -> tuple[float, ...]:
    """Return a, b, c, alpha, beta, gamma of a standardised cell with what the crystal system fixes made exact."""
    a, b, c = np.linalg.norm(matrix, axis=1).tolist()
    unit = matrix / np.array([[a], [b], [c]])
    cosines = (unit[1] @ unit[2], unit[0] @ unit[2], unit[0] @ unit[1])
    alpha, beta, gamma = (math.degrees(math.acos(min(1.0, max(-1.0, cosine)))) for cosine in cosines)
    if space_group >= 195:  # cubic
        a = b = c = (a * b * c) ** (1.0 / 3.0)
    elif space_group >= 75:  # tetragonal, trigonal and hexagonal
        a = b = math.sqrt(a * b)
    if space_group >= 3:
        alpha = gamma = 90.0
    if space_group >= 16:
        beta = 90.0
    if 143 <= space_group <= 194:
        gamma = 120.0
    return a, b, c, alpha, beta, gamma
