"""Distances between the distributions of generated and of reference crystals."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

N_SPACE_GROUPS = 230
#: Valid crystals that the publications compare, drawn at random; more of them have a smaller finite-sample error.
PUBLISHED_SAMPLE = 1000


def density_distance(generated: ArrayLike, reference: ArrayLike) -> float:
    """Return the Wasserstein-1 distance of densities in g/cm^3.

    Protocol: CDVAE, arXiv:2110.06197, section 5.3: 1,000 random valid generated crystals against the whole test set.

    Args:
        generated: (n,) densities of valid generated crystals.
        reference: (m,) densities of the reference set.
    """
    return float(wasserstein_distance(np.asarray(generated, np.float64), np.asarray(reference, np.float64)))


def element_number_distance(generated: ArrayLike, reference: ArrayLike) -> float:
    """Return the Wasserstein-1 distance of the number of different elements.

    Protocol: CDVAE, arXiv:2110.06197, section 5.3: 1,000 random valid generated crystals against the whole test set.

    Args:
        generated: (n,) numbers of elements of valid generated crystals.
        reference: (m,) numbers of elements of the reference set.
    """
    return float(wasserstein_distance(np.asarray(generated, np.float64), np.asarray(reference, np.float64)))


def space_group_distance(generated: ArrayLike, reference: ArrayLike) -> float:
    """Return the Jensen-Shannon distance of space-group frequencies: the root of the divergence, in nats.

    Protocol: that of SymmBFN: groups of `SpacegroupAnalyzer` at symprec 0.1 before any relaxation, scipy's
    `jensenshannon` at its default base e, so that the largest value is sqrt(ln 2) = 0.833.

    Args:
        generated: (n,) international numbers of valid generated crystals; one where none is found counts as 1.
        reference: (m,) international numbers of the reference set.
    """
    return float(jensenshannon(_frequencies(generated), _frequencies(reference)))


def _frequencies(space_groups: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(space_groups, dtype=np.int64)
    return np.bincount(numbers, minlength=N_SPACE_GROUPS + 1)[1:] / max(len(numbers), 1)
