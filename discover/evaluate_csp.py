"""Structure prediction against known structures: match rates at every k with their protocol, from one run.

The true structure is the one of the CIF, never a round-tripped one. What a predictor is handed is the contents of the
primitive cell (as preparation finds it, at 0.1 Å), or the true space group and Wyckoff letters as well; never a lattice
or a coordinate.
"""

import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pymatgen.core import Structure
from tqdm import tqdm

from discover.build import seeded
from discover.compositions import cell_contents
from discover.config import EvaluateConfig
from discover.data import PreparedData, prepare_table
from discover.metrics.intervals import Interval, bootstrap_interval, wilson_interval
from discover.metrics.matching import (
    MATCHER,
    Matches,
    best_rms,
    first_hits,
    first_match,
    match_predictions,
    match_rate,
    metre,
    penalised_rms,
    rmse,
    rmse_all,
)
from discover.metrics.validity import COMPOSITION_PROTOCOLS, MIN_DISTANCE, MIN_VOLUME
from discover.run_folder import write_atomic
from discover.structure_files import read_table
from envs.crystal import CrystalBatch

REPORTED_KS = (1, 5, 20, 100)
_BATCH = 64  # materials handed to a predictor at once


@dataclass(frozen=True)
class Queries:
    """What a predictor is told of n materials."""

    compositions: tuple[dict[str, int], ...]  # atoms of each element in the primitive cell
    crystals: CrystalBatch | None  # true space group and letters, lattice NaN; None where only the composition is given


class Predictor(Protocol):
    """Proposes structures."""

    def __call__(self, queries: Queries, k: int, generator: torch.Generator) -> Sequence[Sequence[Structure | None]]:
        """Return up to k structures of each material, best guess first; None is a proposal that failed."""


@dataclass(frozen=True)
class Targets:
    """Materials whose structures are to be predicted."""

    prepared: PreparedData
    structures: tuple[Structure, ...]  # as read from the CIF
    n_skipped: int  # rows without a readable structure

    def __len__(self) -> int:
        """Return the number of materials."""
        return len(self.structures)

    def queries(self, rows: slice, given: str) -> Queries:
        """Return what a predictor is told of some of the materials."""
        crystals = self.prepared.crystals.select(rows)
        hidden = CrystalBatch(
            crystals.space_group,
            crystals.elements,
            crystals.letters,
            crystals.counts,
            torch.full_like(crystals.lattice_parameters, float("nan")),
        )
        return Queries(tuple(cell_contents(crystals)), hidden if given == "wyckoff" else None)


@dataclass(frozen=True)
class Outcome:
    """What was predicted for every target, and how long it took."""

    predictions: list[list[Structure | None]]
    seconds: NDArray[np.float64]  # (n,) per material, for all k; materials of one batch share its time


def evaluate_csp(config: EvaluateConfig, predictor: Predictor) -> dict[str, Any]:
    """Predict the structures that a configuration names, and return every figure; write them where it says.

    Raises:
        DataError: If the data cannot be used.
        RunFolderError: If the output cannot be written.
    """
    targets = read_targets(config.data or "", config.n, config.seed, n_workers=config.n_workers)
    outcome = predict_targets(targets, predictor, k=config.k, given=config.given, seed=config.seed)
    matches = match_predictions(outcome.predictions, targets.structures, n_workers=config.n_workers)
    shown = {
        **figures(matches, outcome, config.k),
        "given": config.given,
        "source": config.source,
        "draws": config.draws,
        "pick": config.pick,
        "templates": config.templates,
        "seed": config.seed,
        "n_skipped": targets.n_skipped,
        "n_threads": torch.get_num_threads(),
    }
    if config.output is not None:
        write_results(Path(config.output), targets, matches, outcome, shown)
    return shown


def read_targets(path: Path | str, n: int, seed: int, *, n_workers: int = 2) -> Targets:
    """Return `n` random rows of a CSV, or all of them if there are fewer.

    The choice depends on the file's number of rows and the seed only; fewer rows with the same seed are the first of
    more. A row whose structure cannot be read is left out and counted.

    Raises:
        DataError: If the file cannot be read or no chosen row is usable.
    """
    path = Path(path)
    table = read_table(path)
    chosen = table.iloc[np.random.default_rng(seed).permutation(len(table))[:n]]
    prepared = prepare_table(chosen, n_workers=n_workers, name=f"{len(chosen)} rows of {path.name}")
    once = chosen[~chosen["material_id"].astype(str).duplicated()]  # as preparation takes them
    cifs = dict(zip(once["material_id"].astype(str), once["cif"], strict=True))
    structures = tuple(_read_structure(cifs[name]) for name in prepared.ids)
    return Targets(prepared, structures, len(chosen) - len(structures))


def predict_targets(targets: Targets, predictor: Predictor, *, k: int, given: str, seed: int) -> Outcome:
    """Return up to `k` predictions for every target, timed after one that is not, which reads tables and weights."""
    predictor(targets.queries(slice(0, 1), given), 1, seeded(seed, "warm up"))
    predictions: list[list[Structure | None]] = []
    seconds = np.zeros(len(targets))
    with tqdm(total=len(targets), desc="predicting", unit=" materials", disable=None) as bar:
        for start in range(0, len(targets), _BATCH):
            rows = slice(start, min(start + _BATCH, len(targets)))
            queries = targets.queries(rows, given)
            started = time.perf_counter()
            found = predictor(queries, k, seeded(seed, f"evaluate csp {start}"))
            seconds[rows] = (time.perf_counter() - started) / len(queries.compositions)
            predictions += [list(row)[:k] for row in found]
            bar.update(rows.stop - rows.start)
    return Outcome(predictions, seconds)


def figures(matches: Matches, outcome: Outcome, k: int) -> dict[str, Any]:
    """Return every figure at `k`, and under `by_k` those at each smaller k that the field reports."""
    ks = [*(smaller for smaller in REPORTED_KS if smaller < k), k]
    return {
        **figures_at(matches, k),
        "n": len(outcome.predictions),
        "k": k,
        "seconds_per_structure": float(outcome.seconds.mean()) / k,
        "seconds_per_material": float(outcome.seconds.mean()),
        "by_k": {str(each): figures_at(matches, each) for each in ks},
        "missing_predictions": 1.0 - sum(_n_made(row) for row in outcome.predictions) / (k * len(outcome.predictions)),
        "pairs_not_compared": len(matches.failures),
        "protocol": protocol(),
    }


def figures_at(matches: Matches, k: int) -> dict[str, float | Interval | None]:
    """Return the figures of the first `k` predictions of each material; a missing one is a miss."""
    hits = first_hits(matches.rms, k)
    return {
        "match_rate": match_rate(matches.rms, k),
        "match_rate_interval": wilson_interval(int(hits.sum()), len(hits)),
        "match_rate_filtered": match_rate(matches.rms_filtered, k),
        "rmse": _number(rmse(matches.rms, k)),
        "rmse_filtered": _number(rmse(matches.rms_filtered, k)),
        "rmse_all": rmse_all(matches.rms, k),
        "rmse_all_interval": _known(bootstrap_interval(penalised_rms(matches.rms, k))),
        "metre": metre(matches.rms_of_anyone, k),
    }


def protocol() -> dict[str, str]:
    """Return how the figures are counted, to print beside them."""
    flags = ", ".join(f"{name}={value}" for name, value in COMPOSITION_PROTOCOLS["cdvae"].items())
    tolerances = f"stol={MATCHER.stol}, angle_tol={MATCHER.angle_tol}, ltol={MATCHER.ltol}"
    return {
        "matcher": f"StructureMatcher.get_rms_dist, {tolerances}",
        "filter": f"prediction and truth valid: distances >= {MIN_DISTANCE} Å, volume >= {MIN_VOLUME} Å^3, "
        f"smact_validity({flags})",
        "intervals": "95 %; Wilson for rates, percentile bootstrap for means",
    }


def write_results(folder: Path, targets: Targets, matches: Matches, outcome: Outcome, shown: Mapping[str, Any]) -> None:
    """Write `figures.json` and `structures.csv`, one row a material.

    The table has the id, the formula, the rank of the first match (0: none), the seconds taken, and at each k the
    distance (empty: no match), unfiltered and filtered. `python -m benchmarks.compare_csp` compares two of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(
        {
            "material_id": targets.prepared.ids,
            "formula": targets.prepared.formulas,
            "first_match": first_match(matches.rms),
            "seconds": outcome.seconds,
            **{
                f"{name}_{k}": best_rms(values, int(k))
                for k in shown["by_k"]
                for name, values in (("rms", matches.rms), ("rms_filtered", matches.rms_filtered))
            },
        }
    )
    write_atomic(folder / "structures.csv", table.to_csv(index=False, float_format="%.6g"))
    write_atomic(folder / "figures.json", json.dumps(shown, indent=1) + "\n")


def _read_structure(cif: str) -> Structure:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rounding of coordinates in the file
        return Structure.from_str(cif, fmt="cif")


def _number(value: float) -> float | None:
    """Return a figure as JSON can hold it; there is no mean of nothing."""
    return None if math.isnan(value) else value


def _known(interval: Interval) -> Interval | None:
    return None if any(math.isnan(end) for end in interval) else interval


def _n_made(row: Sequence[Structure | None]) -> int:
    return sum(structure is not None for structure in row)
