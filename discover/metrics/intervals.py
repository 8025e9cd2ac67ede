"""Confidence intervals of rates and means, and of the difference of two methods on the same structures."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, bootstrap

CONFIDENCE = 0.95
_N_RESAMPLES = 10_000
_BATCH = 500  # resamples drawn at once, which bounds memory


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A mean difference with its confidence interval."""

    mean: float
    low: float
    high: float


def wilson_interval(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953).

    Raises:
        ValueError: If there is no trial, or more successes than trials.
    """
    low, high = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(float(low), float(high))


def bootstrap_interval(values: ArrayLike, confidence: float = CONFIDENCE, seed: int = 0) -> Interval:
    """Return the percentile bootstrap interval of the mean of `values`, (n,); NaN for fewer than two.

    Efron 1979, doi:10.1214/aos/1176344552; 10,000 resamples.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return Interval(float("nan"), float("nan"))
    found = bootstrap(
        (sample,),
        np.mean,
        n_resamples=_N_RESAMPLES,
        batch=_BATCH,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def paired_difference(a: ArrayLike, b: ArrayLike, confidence: float = CONFIDENCE, seed: int = 0) -> Difference:
    """Return the mean of a - b over the same structures with its percentile bootstrap interval.

    Structures are resampled, each with both of its outcomes, so what makes a structure hard for both cancels.

    Args:
        a: (n,) outcomes of one method, such as hits (bool) or errors.
        b: (n,) outcomes of the other, in the same order.
        confidence: Coverage of the interval.
        seed: Of the resampling.

    Raises:
        ValueError: If the two have different lengths or are empty.
    """
    first, second = _outcomes(a), _outcomes(b)
    if first.shape != second.shape or not len(first):
        raise ValueError(f"paired outcomes must be of the same structures, got shapes {first.shape} and {second.shape}")
    difference = first - second
    return Difference(float(difference.mean()), *bootstrap_interval(difference, confidence, seed))


def _outcomes(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)
