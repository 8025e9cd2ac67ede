"""Coverage of a reference set by generated crystals: which of each have a similar one in the other.

Protocol: CDVAE (Xie et al. 2022, arXiv:2110.06197, appendix G; after Xu et al. 2021, arXiv:2102.09268), as DiffCSP and
their followers use it for MP-20. Two crystals are similar in structure within 0.4 of the CrystalNN fingerprint, and in
composition within 10 of the standardised Magpie fingerprint (`discover.metrics.fingerprints`). As there, the nearest
crystal is looked up in each fingerprint on its own, so it need not be the same one; all generated crystals take part,
valid or not; and one without a fingerprint covers nothing but counts.

CDVAE's code standardises with constants of unstated origin; here it is the standard deviation over the reference set,
which differs from them by a few per cent (the mean drops out of distances).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

STRUCTURE_CUTOFF = 0.4
COMPOSITION_CUTOFF = 10.0
_ROUNDING = 1e-9  # of a standard deviation, relative to the mean
_ROWS = 512  # of the generated crystals compared at once, bounds memory

Array = NDArray[np.float64]


@dataclass(frozen=True)
class NearestDistances:
    """Distance of each crystal to the nearest one of the other set; inf where it has no fingerprint."""

    structure_of_reference: Array  # (m,)
    composition_of_reference: Array  # (m,)
    structure_of_generated: Array  # (n,)
    composition_of_generated: Array  # (n,)


def nearest_distances(
    structure: Array, composition: Array, reference_structure: Array, reference_composition: Array
) -> NearestDistances:
    """Return the distances that both coverages are made of.

    Args:
        structure: (n, 61) CrystalNN fingerprints of generated crystals, NaN for one without.
        composition: (n, 132) Magpie fingerprints, likewise.
        reference_structure: (m, 61) of the reference set.
        reference_composition: (m, 132) of the reference set.
    """
    known = _has_fingerprint(reference_structure, reference_composition)
    scale = reference_composition[known].std(axis=0)
    size = np.maximum(1.0, np.abs(reference_composition[known].mean(axis=0)))
    scale[scale <= _ROUNDING * size] = 1.0  # a property that does not vary over the reference
    has = _has_fingerprint(structure, composition)
    by_structure = _nearest(structure, reference_structure, has, known)
    by_composition = _nearest(composition / scale, reference_composition / scale, has, known)
    return NearestDistances(by_structure[1], by_composition[1], by_structure[0], by_composition[0])


def coverage_recall(distances: NearestDistances) -> float:
    """Return the share of reference crystals with a similar generated one (COV-R), see the module."""
    return float(_similar(distances.structure_of_reference, distances.composition_of_reference).mean())


def coverage_precision(distances: NearestDistances) -> float:
    """Return the share of generated crystals with a similar reference one (COV-P), see the module."""
    return float(_similar(distances.structure_of_generated, distances.composition_of_generated).mean())


def _similar(structure: Array, composition: Array) -> NDArray[np.bool_]:
    return (structure <= STRUCTURE_CUTOFF) & (composition <= COMPOSITION_CUTOFF)


def _has_fingerprint(structure: Array, composition: Array) -> NDArray[np.bool_]:
    return np.isfinite(np.concatenate([structure, composition], axis=1)).all(axis=1).astype(np.bool_)


def _nearest(first: Array, second: Array, has: NDArray[np.bool_], known: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return the distances of rows of `first` to the nearest of `second`, (n,), and the other way round, (m,)."""
    of_first, of_second = np.full(len(first), np.inf), np.full(len(second), np.inf)
    columns = np.flatnonzero(known)
    if not len(columns):
        return of_first, of_second
    usable = np.flatnonzero(has)
    for start in range(0, len(usable), _ROWS):
        rows = usable[start : start + _ROWS]
        distance = cdist(first[rows], second[columns])
        of_first[rows] = distance.min(axis=1)
        of_second[columns] = np.minimum(of_second[columns], distance.min(axis=0))
    return of_first, of_second
