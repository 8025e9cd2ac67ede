"""Which structures occur once, and which do not occur in a set of known ones.

Structures are the same if pymatgen's `StructureMatcher` with its default tolerances (ltol 0.2, stol 0.3, angle 5
degrees; primitive cells, volumes scaled) says so; only structures of the same reduced formula are ever compared. These
are the settings of MatterGen (Zeni et al. 2025, doi:10.1038/s41586-025-08628-5) for ordered structures and of SymmBFN.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure

from discover.worker_pool import TaskFailure, map_in_workers

Task = TypeVar("Task")

_TIME_LIMIT = 120.0  # s for all structures of one formula
_MIN_TASKS_FOR_POOL = 100  # starting workers takes longer than fewer formulas


def unique_structures(
    structures: Sequence[Structure | None], *, n_workers: int = 2, progress: bool = True
) -> NDArray[np.bool_]:
    """Return which structures are the first of their kind; the share of them is the uniqueness.

    Args:
        structures: n structures; None is a failed one.
        n_workers: Processes.
        progress: Show a bar.

    Returns:
        (n,) bool, False for a failure, and for the later ones of a formula whose comparison took too long.
    """
    groups = _by_formula(structures)
    unique = np.array([item is not None for item in structures], dtype=np.bool_)
    several = [list(group) for group in groups.values() if len(group) > 1]
    tasks = [list(group.values()) for group in groups.values() if len(group) > 1]
    for rows, first in zip(several, _in_workers(_first_of_kind, tasks, n_workers, progress=progress), strict=True):
        unique[rows] = first if not isinstance(first, TaskFailure) else [True] + [False] * (len(rows) - 1)
    return unique


def novel_structures(
    structures: Sequence[Structure | None],
    known: Callable[[str], Sequence[Structure]],
    *,
    n_workers: int = 2,
    progress: bool = True,
) -> NDArray[np.bool_]:
    """Return which structures match no known one; the share of them is the novelty.

    Args:
        structures: n structures; None is a failed one.
        known: Gives the known structures of a reduced formula.
        n_workers: Processes.
        progress: Show a bar.

    Returns:
        (n,) bool, False for a failure, and for structures whose comparison took too long.
    """
    novel = np.array([item is not None for item in structures], dtype=np.bool_)
    compared, tasks = [], []
    for formula, group in _by_formula(structures).items():
        if known_structures := list(known(formula)):
            compared.append(list(group))
            tasks.append((list(group.values()), known_structures))
    for rows, matches in zip(compared, _in_workers(_matches_any, tasks, n_workers, progress=progress), strict=True):
        novel[rows] = ~np.array(matches) if not isinstance(matches, TaskFailure) else False
    return novel


@cache
def _matcher() -> StructureMatcher:
    return StructureMatcher()


def _first_of_kind(structures: list[Structure]) -> list[bool]:
    kept: list[Structure] = []
    first = []
    for structure in structures:
        first.append(not any(_same(structure, other) for other in kept))
        if first[-1]:
            kept.append(structure)
    return first


def _matches_any(task: tuple[list[Structure], list[Structure]]) -> list[bool]:
    structures, known = task
    return [any(_same(structure, other) for other in known) for structure in structures]


def _same(first: Structure, second: Structure) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(_matcher().fit(first, second))


def _in_workers(
    function: Callable[[Task], list[bool]], tasks: list[Task], n_workers: int, *, progress: bool
) -> list[list[bool] | TaskFailure]:
    return map_in_workers(
        function,
        tasks,
        n_workers=n_workers if len(tasks) >= _MIN_TASKS_FOR_POOL else 0,
        time_limit=_TIME_LIMIT,
        description="comparing structures",
        unit="formula",
        progress=progress,
    )


def _by_formula(structures: Sequence[Structure | None]) -> dict[str, dict[int, Structure]]:
    """Return {reduced formula: {row: structure}}."""
    groups: dict[str, dict[int, Structure]] = {}
    for row, structure in enumerate(structures):
        if structure is not None:
            groups.setdefault(structure.composition.reduced_formula, {})[row] = structure
    return groups
