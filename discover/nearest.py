"""The known material that is nearest to a structure, in a reference that the user gives.

The reference is a CSV with a column `cif`, a folder of CIF files, or an extxyz file. Materials of the same formula come
first; where none of them matches, materials of the same anonymous formula and prototype (space group and Wyckoff
positions), with the elements mapped. Structures are compared by pymatgen's `StructureMatcher` at the tolerances of the
field (`discover.metrics.matching`); distances are divided by (volume per atom)^(1/3), so they have no unit.

A reference may be large: it is indexed by formula, and only the materials that are compared are parsed.
"""

import logging
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pymatgen.core import Composition, Element, Lattice, Structure
from tqdm import tqdm

from discover.data import batch_orbits, orbits_of_structure
from discover.errors import DataError
from discover.metrics.matching import MATCHER
from discover.prototypes import prototype_keys
from discover.structure_files import read_cif, read_table
from discover.worker_pool import TaskFailure, map_in_workers

logger = logging.getLogger(__name__)

ID_COLUMN = "material_id"
FORMULA_COLUMNS = ("formula", "pretty_formula")
SPACE_GROUP_COLUMNS = ("spacegroup.number", "space_group", "space_group_number")
MOST_COMPARED = 100  # materials per structure and kind: a common type such as ABC2 has thousands
_SAME_DISTANCE = 0.01  # two distances closer than this count as equal, and the elements decide
_FORMULA_LINE = re.compile(r"^_chemical_formula_sum\s+(?:'([^']*)'|\"([^\"]*)\"|(\S+))\s*$", re.MULTILINE)

_Key = tuple[tuple[str, float], ...]  # a composition divided by its greatest common divisor, elements in order


class Likeness(StrEnum):
    """What the nearest known material has in common with a structure."""

    SAME_MATERIAL = "same material"  # formula and structure match
    SAME_TYPE = "same structure type"  # other elements, the structure matches
    SAME_FORMULA = "same formula, another structure"
    NOT_COMPARED = "same formula, not compared"  # every comparison failed
    NONE = "nothing like it"


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The nearest known material.

    Args:
        likeness: What it has in common.
        material_id: Its id in the reference, "" where the reference has none.
        formula: Its reduced formula.
        rms: Root-mean-square distance of matched atoms over (volume per atom)^(1/3); NaN where nothing matches.
        same_prototype: Same space group and Wyckoff positions; None where spglib could not say.
        n_same_formula: Materials of the same formula in the reference.
        n_compared: Materials that were compared.
        reason: What was left out: comparisons that failed, or that there were too many candidates.
    """

    likeness: Likeness
    material_id: str = ""
    formula: str = ""
    rms: float = math.nan
    same_prototype: bool | None = None
    n_same_formula: int = 0
    n_compared: int = 0
    reason: str = ""

    @property
    def name(self) -> str:
        """Return the id if the reference has ids, else the formula."""
        return self.material_id or self.formula


class _Task(NamedTuple):
    """One structure against one material of the reference."""

    structure: Structure
    prototype: int | None
    space_group: int | None
    cif: str
    anonymous: bool


class _Comparison(NamedTuple):
    rms: float  # NaN = no match
    same_prototype: bool | None


class Reference:
    """Known materials, indexed by formula.

    Args:
        cifs: CIF text of each material, or the file that holds it.
        ids: Id of each material, or None.
        formulas: Formula of each material, or None where it has to be found in the CIF.
        space_groups: Space group number of each material, 0 where unknown; or None.
        name: What messages call the reference.
    """

    def __init__(
        self,
        cifs: Sequence[str | Path],
        *,
        ids: Sequence[str] | None = None,
        formulas: Sequence[str | None] | None = None,
        space_groups: NDArray[np.int64] | None = None,
        name: str = "reference",
    ) -> None:
        self.name = name
        self._cifs, self._ids = cifs, ids
        self.space_groups = np.zeros(len(cifs), np.int64) if space_groups is None else space_groups
        self._of_key: dict[_Key, list[int]] = defaultdict(list)
        self._keys_of_type: dict[tuple[float, ...], list[_Key]] = defaultdict(list)
        self._key_of_row: dict[int, _Key] = {}
        known: dict[str, _Key] = {}
        broken = []
        given = formulas if formulas is not None else [None] * len(cifs)
        rows = enumerate(tqdm(given, desc=f"indexing {name}", unit=" materials", disable=None, delay=2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen warns of elements without electronegativity
            for row, formula in rows:
                try:
                    text = formula or _formula_of_cif(self.cif(row))
                    if text not in known:
                        key = _key(Composition(text))
                        for symbol, _ in key:
                            Element(symbol)  # raises ValueError for a placeholder, such as M or Ln
                        known[text] = key
                except ValueError as error:
                    broken.append(f"row {row}: {error}")
                    continue
                self._add(known[text], row)
        if broken:
            logger.warning("%s: left out %d of %d materials, first %s", name, len(broken), len(cifs), broken[0])

    @classmethod
    def load(cls, path: Path | str) -> "Reference":
        """Return the reference of a CSV with a column `cif`, of a folder of CIF files, or of an extxyz file.

        Used if there: `material_id`; `formula` or `pretty_formula`; `spacegroup.number`, `space_group` or
        `space_group_number`. A CSV without a formula column is read CIF by CIF, which takes longer.

        Raises:
            DataError: If there is nothing to read, or the table has no column `cif`.
        """
        path = Path(path)
        if not path.exists():
            raise DataError(
                f"no reference at {path}; give a CSV with a column cif, a folder of CIF files or an extxyz file"
            )
        if path.is_dir():
            files = sorted(path.glob("*.cif"))
            if not files:
                raise DataError(
                    f"no .cif file in the folder {path}; give a folder of CIF files, a CSV or an extxyz file"
                )
            return cls(files, ids=[file.stem for file in files], name=path.name)
        return cls.from_table(read_table(path), name=path.name)

    @classmethod
    def from_table(cls, table: pd.DataFrame, *, name: str = "reference") -> "Reference":
        """Return the reference of a table that is in memory; see `load`.

        Raises:
            DataError: If it has no column `cif`.
        """
        if "cif" not in table.columns:
            raise DataError(f"{name} has no column cif; it has {', '.join(map(str, table.columns))}")
        table = table[table["cif"].notna()]
        formulas = next((table[column] for column in FORMULA_COLUMNS if column in table.columns), None)
        groups = next((table[column] for column in SPACE_GROUP_COLUMNS if column in table.columns), None)
        return cls(
            table["cif"].astype(str).tolist(),
            ids=table[ID_COLUMN].astype(str).tolist() if ID_COLUMN in table.columns else None,
            formulas=None if formulas is None else [text if isinstance(text, str) else None for text in formulas],
            space_groups=None if groups is None else _group_numbers(groups),
            name=name,
        )

    def __len__(self) -> int:
        """Return the number of materials, those without a readable formula among them."""
        return len(self._cifs)

    def cif(self, row: int) -> str:
        """Return the CIF text of a material."""
        cif = self._cifs[row]
        return cif.read_text(encoding="utf-8", errors="replace") if isinstance(cif, Path) else cif

    def material_id(self, row: int) -> str:
        """Return the id of a material, "" if the reference has none."""
        return "" if self._ids is None else self._ids[row]

    def formula(self, row: int) -> str:
        """Return the reduced formula of a material."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen warns of elements without electronegativity
            return str(Composition(dict(self._key_of_row[row])).reduced_formula)

    def same_formula(self, composition: Composition) -> list[int]:
        """Return the rows of a composition."""
        return list(self._of_key.get(_key(composition), ()))

    def same_type(self, composition: Composition, space_group: int | None) -> list[int]:
        """Return the rows of the same anonymous formula, of other elements and of the same or an unknown space group.

        Those that share the most elements come first, then those whose other elements are the nearest by Mendeleev
        number.
        """
        own = _key(composition)
        keys = [key for key in self._keys_of_type.get(_anonymous(own), ()) if key != own]
        keys.sort(key=lambda key: (_element_distance(own, key), key))
        rows = [row for key in keys for row in self._of_key[key]]
        return [row for row in rows if space_group is None or self.space_groups[row] in (0, space_group)]

    def _add(self, key: _Key, row: int) -> None:
        if key not in self._of_key:
            self._keys_of_type[_anonymous(key)].append(key)
        self._of_key[key].append(row)
        self._key_of_row[row] = key


def find_nearest(
    structures: Sequence[Structure],
    reference: Reference,
    *,
    n_workers: int = 1,
    time_limit: float = 20.0,
    most: int = MOST_COMPARED,
) -> list[Nearest]:
    """Return the nearest known material of each structure, in order.

    Args:
        structures: Ordered structures; primitive cells are matched fastest. One whose primitive cell is a multiple of
            the known one, because symmetry was lost, does not match it.
        reference: Known materials.
        n_workers: Killable processes that compare; 0 compares in this process, without a time limit.
        time_limit: Seconds after which a comparison is given up.
        most: Materials that a structure is compared with, of its formula and of its type each.
    """
    prototypes = [_prototype(structure) for structure in structures]
    same = [reference.same_formula(structure.composition) for structure in structures]
    first = _compare_all(
        structures, prototypes, [rows[:most] for rows in same], reference, False, n_workers, time_limit
    )
    found = [
        _best(reference, rows[:most], results, Likeness.SAME_MATERIAL)
        for rows, results in zip(same, first, strict=True)
    ]
    types = [
        reference.same_type(structure.composition, group) if nearest is None else []
        for structure, (_, group), nearest in zip(structures, prototypes, found, strict=True)
    ]
    second = _compare_all(
        structures, prototypes, [rows[:most] for rows in types], reference, True, n_workers, time_limit
    )
    answers = []
    for i, nearest in enumerate(found):
        answer = nearest or _best(reference, types[i][:most], second[i], Likeness.SAME_TYPE)
        if answer is None and same[i]:
            answer = _other_structure(reference, same[i][:most], first[i])
        answer = answer or Nearest(likeness=Likeness.NONE)
        results = [*first[i], *second[i]]
        answers.append(
            Nearest(
                likeness=answer.likeness,
                material_id=answer.material_id,
                formula=answer.formula,
                rms=answer.rms,
                same_prototype=answer.same_prototype,
                n_same_formula=len(same[i]),
                n_compared=len(results),
                reason=_left_out(results, max(len(same[i]), len(types[i])), most),
            )
        )
    return answers


def _compare_all(
    structures: Sequence[Structure],
    prototypes: Sequence[tuple[int | None, int | None]],
    rows: Sequence[Sequence[int]],
    reference: Reference,
    anonymous: bool,
    n_workers: int,
    time_limit: float,
) -> list[list[_Comparison | TaskFailure]]:
    """Return the comparisons of each structure with its rows, in their order."""
    tasks = [
        _Task(structure, *prototype, reference.cif(row), anonymous)
        for structure, prototype, candidates in zip(structures, prototypes, rows, strict=True)
        for row in candidates
    ]
    results = iter(
        map_in_workers(
            _compare,
            tasks,
            n_workers=n_workers,
            time_limit=time_limit,
            description="looking for the same structure type" if anonymous else "looking for the same material",
            unit="pair",
        )
    )
    return [[next(results) for _ in candidates] for candidates in rows]


def _compare(task: _Task) -> _Comparison:
    """Return how far a structure is from a known material; one of another prototype is not of the same type."""
    matrix, coords, numbers = read_cif(task.cif)
    known = Structure(Lattice(matrix), numbers.tolist(), coords)
    prototype, space_group = _prototype(known)
    same = None if task.prototype is None or prototype is None else prototype == task.prototype
    if not task.anonymous:
        found = MATCHER.get_rms_dist(task.structure, known)
        return _Comparison(math.nan if found is None else float(found[0]), same)
    if same is False or (task.space_group is not None and space_group != task.space_group):
        return _Comparison(math.nan, same)
    rms, _ = MATCHER.get_rms_anonymous(task.structure, known)
    return _Comparison(math.nan if rms is None else float(rms), same)


def _prototype(structure: Structure) -> tuple[int | None, int | None]:
    """Return the key of a structure's prototype and its space group, None where spglib finds no consistent cell."""
    try:
        orbits = orbits_of_structure(structure)
    except DataError:
        return None, None
    crystals, _ = batch_orbits([orbits])
    return int(prototype_keys(crystals)[0]), orbits.space_group


def _best(
    reference: Reference, rows: Sequence[int], results: Sequence[_Comparison | TaskFailure], likeness: Likeness
) -> Nearest | None:
    """Return the match of the least distance, of equal ones one of the same prototype and then the first."""
    matches = [
        (round(result.rms / _SAME_DISTANCE), not result.same_prototype, place)
        for place, result in enumerate(results)
        if isinstance(result, _Comparison) and not math.isnan(result.rms)
    ]
    if not matches:
        return None
    place = min(matches)[-1]
    return _nearest(reference, rows[place], results[place], likeness)


def _other_structure(
    reference: Reference, rows: Sequence[int], results: Sequence[_Comparison | TaskFailure]
) -> Nearest:
    """Return a material of the same formula that does not match, one of the same prototype if there is one."""
    compared = [place for place, result in enumerate(results) if isinstance(result, _Comparison)]
    alike = [place for place in compared if cast(_Comparison, results[place]).same_prototype]
    place = next(iter([*alike, *compared]), 0)
    likeness = Likeness.SAME_FORMULA if compared else Likeness.NOT_COMPARED
    return _nearest(reference, rows[place], results[place], likeness)


def _nearest(reference: Reference, row: int, result: _Comparison | TaskFailure, likeness: Likeness) -> Nearest:
    rms, same_prototype = result if isinstance(result, _Comparison) else (math.nan, None)
    return Nearest(
        likeness=likeness,
        material_id=reference.material_id(row),
        formula=reference.formula(row),
        rms=rms,
        same_prototype=same_prototype,
    )


def _left_out(results: Sequence[_Comparison | TaskFailure], n_candidates: int, most: int) -> str:
    """Return what a chemist has to know about comparisons that were not made."""
    failures = [result.reason for result in results if isinstance(result, TaskFailure)]
    parts = [f"compared with the first {most} of {n_candidates}"] if n_candidates > most else []
    if failures:
        parts.append(f"{len(failures)} comparisons failed, first: {failures[0]}")
    return "; ".join(parts)


# --- keys ----------------------------------------------------------------------------------------


def _key(composition: Composition) -> _Key:
    """Return a composition divided by its greatest common divisor, elements in alphabetical order."""
    amounts = composition.get_el_amt_dict()
    counts = list(amounts.values())
    divisor = math.gcd(*(int(n) for n in counts)) if all(float(n).is_integer() for n in counts) else 1
    return tuple(sorted((symbol, n / max(divisor, 1)) for symbol, n in amounts.items()))


def _anonymous(key: _Key) -> tuple[float, ...]:
    return tuple(sorted(n for _, n in key))


def _element_distance(one: _Key, other: _Key) -> tuple[int, float]:
    """Return a rank: elements not shared, then the difference of Mendeleev numbers at equal amounts."""
    shared = len({symbol for symbol, _ in one} & {symbol for symbol, _ in other})
    numbers = [sorted((n, Element(symbol).mendeleev_no) for symbol, n in key) for key in (one, other)]
    return len(one) - shared, float(sum(abs(a[1] - b[1]) for a, b in zip(*numbers, strict=True)))


def _formula_of_cif(text: str) -> str:
    """Return the formula that a CIF states, else the one of its atoms.

    Raises:
        DataError: If it states none and cannot be read.
    """
    stated = _FORMULA_LINE.search(text)
    if stated:
        return next(group for group in stated.groups() if group is not None)
    symbols = [Element.from_Z(int(z)).symbol for z in read_cif(text)[2]]
    return "".join(f"{symbol}{symbols.count(symbol)}" for symbol in sorted(set(symbols)))


def _group_numbers(values: Iterable[object]) -> NDArray[np.int64]:
    """Return space group numbers, 0 where a field is empty or no number from 1 to 230."""
    numbers = pd.to_numeric(pd.Series(list(values)), errors="coerce").fillna(0).to_numpy(np.float64)
    return np.where((numbers >= 1) & (numbers <= 230), numbers, 0).astype(np.int64)
