"""``python -m benchmarks.round_trip data=FILE.csv.gz n=5000``: structure -> representation -> structure.

A representation is a space group, orbits on Wyckoff letters with their free parameters, and a lattice. A rebuilt
structure is compared with the one of the CIF (StructureMatcher, ltol 0.1, stol 0.1, angle 2 degrees), and its space
group with the one it was built in (spglib, symprec 0.01 Å). Failures are listed by cause.
"""

import json
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import spglib
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure

from discover.errors import ConfigError, main_guard
from discover.evaluate import print_table
from discover.evaluate_csp import read_targets
from discover.metrics.intervals import wilson_interval
from discover.options import help_text, option, parse_args
from discover.structure.orbits import parameters_of_data, to_structures
from discover.worker_pool import TaskFailure, map_in_workers

USAGE = "python -m benchmarks.round_trip data=FILE.csv.gz n=5000"
SYMPREC = 0.01  # Å
MATCHER = StructureMatcher(ltol=0.1, stol=0.1, angle_tol=2)
LOOSE = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10)
_LISTED = 10  # materials named for each cause


@dataclass(frozen=True, kw_only=True)
class RoundTripConfig:
    """What to rebuild."""

    data: str = option("", "CSV file with structures")
    n: int = option(5000, "random rows, at most all")
    seed: int = option(0, "which rows")
    n_workers: int = option(2, "processes")

    def __post_init__(self) -> None:
        """Check the settings.

        Raises:
            ConfigError: Naming the setting.
        """
        if not self.data:
            raise ConfigError("the round trip needs structures: data=FILE.csv.gz")
        if self.n < 1 or self.n_workers < 0:
            raise ConfigError(f"n must be at least 1 and n_workers at least 0, got {self.n} and {self.n_workers}")


@dataclass(frozen=True)
class Trip:
    """One structure, rebuilt."""

    matches: bool
    mismatch: str  # cause, "" if it matches
    space_group: int  # that spglib finds in the rebuilt structure, 0 if none


def take_trip(task: tuple[Structure, Structure]) -> Trip:
    """Return how a rebuilt structure (first) compares with the one it comes from (second)."""
    rebuilt, truth = task
    matches = bool(MATCHER.fit(rebuilt, truth))
    return Trip(matches, "" if matches else _mismatch(rebuilt, truth), _space_group(rebuilt))


def round_trip(config: RoundTripConfig) -> dict[str, Any]:
    """Return the shares that match and whose space group is found again, and the failures by cause."""
    targets = read_targets(config.data, config.n, config.seed, n_workers=config.n_workers)
    crystals, ids = targets.prepared.crystals, targets.prepared.ids.tolist()
    rebuilt = to_structures(crystals, parameters_of_data(targets.prepared), primitive=True)
    trips = map_in_workers(
        take_trip,
        list(zip(rebuilt, targets.structures, strict=True)),
        n_workers=config.n_workers,
        time_limit=60.0,
        description="comparing",
        unit="structures",
    )
    mismatches: dict[str, list[str]] = defaultdict(list)
    other_groups: dict[str, list[str]] = defaultdict(list)
    for name, group, trip in zip(ids, crystals.space_group.tolist(), trips, strict=True):
        if isinstance(trip, TaskFailure):
            mismatches[trip.reason].append(name)
            other_groups[trip.reason].append(name)
            continue
        if not trip.matches:
            mismatches[trip.mismatch].append(name)
        if trip.space_group != group:
            other_groups[f"{group} found as {trip.space_group}"].append(name)
    unread = [failure.material_id for failure in targets.prepared.failures]
    if unread:
        mismatches["not representable"] = other_groups["not representable"] = unread
    n = len(ids) + len(unread)
    return {
        "n": n,
        "match_rate": _rate(mismatches, n),
        "match_rate_interval": _interval(mismatches, n),
        "same_space_group_rate": _rate(other_groups, n),
        "same_space_group_interval": _interval(other_groups, n),
        "mismatches": _listed(mismatches),
        "other_space_groups": _listed(other_groups),
    }


def _mismatch(rebuilt: Structure, truth: Structure) -> str:
    """Return the cause: what symmetrisation changed, and by how much."""
    sizes = [len(structure.get_reduced_structure().get_primitive_structure()) for structure in (truth, rebuilt)]
    if sizes[0] != sizes[1]:  # its search for a smaller cell has a tolerance of its own, 0.25 Å
        return f"the matcher reduces the input to {sizes[0] / sizes[1]:g} times the atoms of the rebuilt structure"
    loose = LOOSE.get_rms_dist(rebuilt, truth)
    if loose is None:
        return "no match at 0.3/0.5/10 either"
    return "moved too far by symmetrisation" if loose[0] > MATCHER.stol else "cell or one atom beyond the tolerance"


def _space_group(structure: Structure) -> int:
    numbers = [site.specie.Z for site in structure]
    cell: Any = (structure.lattice.matrix, structure.frac_coords, numbers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spglib's change of error handling
        dataset = spglib.get_symmetry_dataset(cell, symprec=SYMPREC)
    return 0 if dataset is None else int(dataset.number)


def _rate(failures: dict[str, list[str]], n: int) -> float:
    return 1.0 - sum(map(len, failures.values())) / n


def _interval(failures: dict[str, list[str]], n: int) -> tuple[float, float]:
    return wilson_interval(n - sum(map(len, failures.values())), n)


def _listed(failures: dict[str, list[str]]) -> dict[str, Any]:
    """Return number and first materials of each cause, most frequent first."""
    ordered = sorted(failures.items(), key=lambda item: -len(item[1]))
    return {cause: {"n": len(names), "first": " ".join(names[:_LISTED])} for cause, names in ordered}


def main(words: Sequence[str]) -> None:
    """Run the command line."""
    if any(word in ("-h", "--help", "help") for word in words):
        print(help_text(RoundTripConfig, USAGE))
        return
    figures = round_trip(parse_args(RoundTripConfig, words))
    print_table(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main_guard(main)
