"""Does a predicted structure match the true one: match rate, RMSE and their variants.

Every pair is compared by pymatgen's `StructureMatcher` at the tolerances of the field. Distances are divided by
(volume per atom)^(1/3), so they have no unit. Each metric is a function of a table `rms`, (n, k): row i holds the
distance of each of the k predictions for material i, best guess first, NaN where it does not match or failed.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure

from discover.metrics.validity import compositional_validity, structural_validity
from discover.worker_pool import TaskFailure, map_in_workers

Rms = NDArray[np.float64]

STOL = 0.5
#: Tolerances of CDVAE (arXiv:2110.06197) and of every structure prediction benchmark since.
MATCHER = StructureMatcher(stol=STOL, angle_tol=10, ltol=0.3)


@dataclass(frozen=True)
class Matches:
    """Distances of n materials with up to k predictions each."""

    rms: Rms  # (n, k), NaN = no match
    rms_filtered: Rms  # (n, k), also NaN where prediction or truth is invalid
    rms_of_anyone: Rms  # (n, k), column j: the least over the j-th predictions for any material of this composition
    failures: tuple[tuple[int, int, str], ...]  # material, prediction, why they could not be compared


def match_predictions(
    predictions: Sequence[Sequence[Structure | None]],
    truths: Sequence[Structure],
    *,
    time_limit: float = 20.0,
    n_workers: int = 2,
) -> Matches:
    """Return the distance of every prediction from its true structure.

    A pair that takes longer than the limit, or that the matcher cannot handle, does not match, with a reason. A missing
    prediction, or one of another composition, does not match either.

    Args:
        predictions: Per material its structures, best guess first; None is a failed one. Primitive cells are matched
            fastest; the result is the same for any cell.
        truths: The true structure of each material, as read from its file.
        time_limit: Seconds after which a comparison is given up.
        n_workers: Processes.
    """
    shape = (len(truths), max(map(len, predictions), default=0))
    rms, of_anyone = np.full(shape, np.nan), np.full(shape, np.nan)
    pairs = list(_pairs(predictions, truths))
    failures = []
    distances = map_in_workers(
        rms_distance,
        [(prediction, truths[truth]) for truth, _, _, prediction in pairs],
        n_workers=n_workers,
        time_limit=time_limit,
        description="matching structures",
        unit="pair",
    )
    for (truth, query, rank, _), distance in zip(pairs, distances, strict=True):
        if isinstance(distance, TaskFailure):
            failures.append((truth, rank, distance.reason))
            continue
        of_anyone[truth, rank] = np.fmin(of_anyone[truth, rank], distance)
        if truth == query:
            rms[truth, rank] = distance
    both_valid = is_valid(truths)[:, None] & np.array(
        [is_valid([*row, *[None] * (shape[1] - len(row))]) for row in predictions], dtype=np.bool_
    ).reshape(shape)
    return Matches(rms, np.where(both_valid, rms, np.nan), of_anyone, tuple(failures))


def rms_distance(pair: tuple[Structure, Structure]) -> float:
    """Return the distance of a prediction from the truth over (volume per atom)^(1/3), NaN if they do not match."""
    found = MATCHER.get_rms_dist(*pair)
    return float("nan") if found is None else float(found[0])


def is_valid(structures: Sequence[Structure | None]) -> NDArray[np.bool_]:
    """Return which structures pass both checks of CDVAE; see `discover.metrics.validity`. (n,) bool."""
    compositions = [None if structure is None else structure.composition for structure in structures]
    return structural_validity(structures) & compositional_validity(compositions)


def match_rate(rms: Rms, k: int) -> float:
    """Return the share of materials that one of the first k predictions matches.

    CDVAE, arXiv:2110.06197 (k = 1); DiffCSP, arXiv:2309.04475 (k > 1). Unfiltered if `rms` is: some published figures
    (DiffCSP, FlowMM) count a pair only if prediction and truth are valid, which caps them near 90 %.
    """
    return float(first_hits(rms, k).mean())


def rmse(rms: Rms, k: int) -> float:
    """Return the mean over matched materials of the least distance among the first k predictions, NaN if none matches.

    CDVAE, arXiv:2110.06197. A mean of root-mean-square displacements, called RMSE in the field. It can improve because
    hard materials are missed; `rmse_all` cannot.
    """
    best = best_rms(rms, k)
    matched = best[~np.isnan(best)]
    return float(matched.mean()) if len(matched) else float("nan")


def rmse_all(rms: Rms, k: int) -> float:
    """Return the mean over all materials of the least distance among the first k, 0.5 (the tolerance) for a miss.

    CrystalFlow, arXiv:2412.11693; the same number is called cRMSE by Martirossyan et al., arXiv:2509.12178.
    """
    return float(penalised_rms(rms, k).mean())


def metre(rms_of_anyone: Rms, k: int) -> float:
    """Return the share of references that any generated structure matches, whichever reference it was made for.

    METRe of Martirossyan et al., arXiv:2509.12178: polymorphs have the same composition, so a prediction for one of
    them that finds another is no miss of that other. The pool is the first k predictions for every material.
    """
    return match_rate(rms_of_anyone, k)


def best_rms(rms: Rms, k: int) -> Rms:
    """Return (n,) the least distance among the first k predictions, NaN for a miss."""
    best: Rms = np.fmin.reduce(rms[:, :k], axis=1, initial=np.nan)
    return best


def penalised_rms(rms: Rms, k: int) -> Rms:
    """Return (n,) the least distance among the first k predictions, 0.5 for a miss."""
    return np.nan_to_num(best_rms(rms, k), nan=STOL)


def first_hits(rms: Rms, k: int) -> NDArray[np.bool_]:
    """Return (n,) whether one of the first k predictions matches."""
    return ~np.isnan(best_rms(rms, k))


def first_match(rms: Rms) -> NDArray[np.int64]:
    """Return (n,) the rank, from 1, of the first prediction that matches, 0 where none does."""
    matched = ~np.isnan(rms)
    return (
        np.where(matched.any(axis=1), matched.argmax(axis=1) + 1, 0) if rms.shape[1] else np.zeros(len(rms), np.int64)
    )


def _pairs(
    predictions: Sequence[Sequence[Structure | None]], truths: Sequence[Structure]
) -> Iterator[tuple[int, int, int, Structure]]:
    """Yield (truth, material it was predicted for, rank, prediction) of pairs of equal composition, truth by truth.

    Comparisons of one truth follow each other because the matcher remembers its reduced cell.
    """
    same: dict[str, list[int]] = defaultdict(list)
    formulas = [truth.composition.reduced_formula for truth in truths]
    for row, formula in enumerate(formulas):
        same[formula].append(row)
    for truth, formula in enumerate(formulas):
        for query in same[formula]:
            for rank, structure in enumerate(predictions[query]):
                if structure is not None and structure.composition.reduced_formula == formula:
                    yield truth, query, rank, structure
