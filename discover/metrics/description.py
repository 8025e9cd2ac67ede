"""What the distributions and coverage of generated crystals are computed from, one pass over the structures."""

import hashlib
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pymatgen.core import Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from discover.data import cache_directory
from discover.metrics.fingerprints import (
    N_STRUCTURE_FEATURES,
    composition_features,
    composition_fingerprint,
    structure_fingerprint,
)
from discover.run_folder import write_atomic
from discover.structure_files import data_files
from discover.worker_pool import TaskFailure, map_in_workers

logger = logging.getLogger(__name__)

SYMPREC = 0.1  # Å; what the Materials Project and the published distances use
DESCRIPTION_VERSION = 2  # part of the cache key: raise it when descriptions change
_TIME_LIMIT = 60.0  # s per structure
_KILLED = "killed"  # name in the cache of the rows that are to be tried again
_MIN_FOR_POOL = 200  # starting workers takes longer than fewer structures


@dataclass(frozen=True)
class Descriptions:
    """Numbers of n structures; NaN in a row that failed."""

    structure: NDArray[np.float64]  # (n, 61) CrystalNN fingerprint
    composition: NDArray[np.float64]  # (n, 132) Magpie fingerprint
    density: NDArray[np.float64]  # (n,) g/cm^3
    n_elements: NDArray[np.float64]  # (n,)
    space_group: NDArray[np.float64]  # (n,) international number, 1 where spglib finds none

    @property
    def complete(self) -> NDArray[np.bool_]:
        """(n,) bool: rows that did not fail."""
        return np.asarray(np.isfinite(self.structure).all(axis=1), dtype=np.bool_)

    def __len__(self) -> int:
        """Return the number of structures."""
        return len(self.density)

    def select(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> "Descriptions":
        """Return some rows."""
        return Descriptions(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def describe(
    structures: Sequence[Structure | None], *, n_workers: int = 2, progress: bool = True, name: str = "structures"
) -> Descriptions:
    """Return the description of every structure, in order; None, and one that CrystalNN cannot read, give NaN."""
    return _describe(structures, n_workers=n_workers, progress=progress, name=name)[0]


def _describe(
    structures: Sequence[Structure | None], *, n_workers: int, progress: bool, name: str
) -> tuple[Descriptions, NDArray[np.int64]]:
    """Return the descriptions, and (k,) rows whose worker was killed: another time it may come to its end."""
    present = {row: structure for row, structure in enumerate(structures) if structure is not None}
    results = map_in_workers(
        _describe_one,
        list(present.values()),
        n_workers=n_workers if len(present) >= _MIN_FOR_POOL else 0,
        time_limit=_TIME_LIMIT,
        description=f"fingerprints of {name}",
        unit="structure",
        progress=progress,
    )
    n = len(structures)
    width = N_STRUCTURE_FEATURES + len(composition_features()) + 3
    table = np.full((n, width), np.nan)
    failures = []
    for row, result in zip(present, results, strict=True):
        if isinstance(result, TaskFailure):
            failures.append(f"  {row}: {result.reason}")
        else:
            table[row] = result
    if failures:
        listed = "\n".join(failures[:5])
        logger.warning("%d of %d %s have no fingerprint, first:\n%s", len(failures), n, name, listed)
    structure, composition, rest = np.split(table, [N_STRUCTURE_FEATURES, width - 3], axis=1)
    killed = [row for row, r in zip(present, results, strict=True) if isinstance(r, TaskFailure) and r.may_pass]
    return Descriptions(structure, composition, *rest.T), np.array(killed, dtype=np.int64)


def describe_file(
    path: Path,
    structures: Sequence[Structure | None],
    *,
    selection: str = "all",
    n_workers: int = 2,
    progress: bool = True,
) -> Descriptions:
    """Return the descriptions of structures of a data file, from the cache if they were computed before.

    Those whose worker was killed before, as on a busy machine, are tried again.

    Args:
        path: The file or folder that the structures were read from; its content is the cache's key.
        structures: Structures of the file.
        selection: Says which, where they are not all of them in order; the rest of the key.
        n_workers: Processes.
        progress: Show a bar.
    """
    kept = cache_directory() / "descriptions" / f"{_key(path, selection)}.npz"
    if kept.is_file():
        with np.load(kept, allow_pickle=False) as stored:
            found = Descriptions(**{field.name: stored[field.name] for field in fields(Descriptions)})
            rows = stored[_KILLED]
        if not len(rows):
            return found
        chosen = [structures[row] for row in rows.tolist()]
        again, killed = _describe(chosen, n_workers=n_workers, progress=progress, name=f"{path.name}, once more")
        for field in fields(Descriptions):
            getattr(found, field.name)[rows] = getattr(again, field.name)
        killed = rows[killed]
    else:
        found, killed = _describe(structures, n_workers=n_workers, progress=progress, name=path.name)
    arrays = {field.name: getattr(found, field.name) for field in fields(Descriptions)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays, **{_KILLED: killed})
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, buffer.getvalue())
    except (OSError, ValueError) as error:
        logger.warning("could not keep fingerprints (%s); set CRYSTAL_DISCOVER_CACHE to a writable folder", error)
    return found


def _describe_one(structure: Structure) -> NDArray[np.float64]:
    """Return all numbers of one structure in a row."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        composition = structure.composition
        rest = [float(structure.density), float(len(composition)), float(_space_group(structure))]
        return np.concatenate([structure_fingerprint(structure), composition_fingerprint(composition), rest])


def _space_group(structure: Structure) -> int:
    try:
        return int(SpacegroupAnalyzer(structure, symprec=SYMPREC).get_space_group_number())
    except Exception:  # noqa: BLE001 - pymatgen raises several kinds where spglib finds nothing
        return 1


def _key(path: Path, selection: str) -> str:
    digest = hashlib.sha256(f"{DESCRIPTION_VERSION} {selection}".encode())
    for file in data_files(path):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
