"""Confidence intervals: bootstrap, Student's t, Wilson. Arrays in, numbers out."""

from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

LEVEL, RESAMPLES = 0.95, 1000  # of the intervals; of a bootstrap


def bootstrap_weights(n: int, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each of n images occurs in each of `resamples` draws of n with replacement, (n,) int64."""
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(generator.integers(n, size=n), minlength=n)


def percentile_interval(values: np.ndarray) -> list[float]:
    """The bounds of the central 95 % of values (N,)."""
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def t_interval(differences: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """95 % interval of the mean of paired differences (n,) (Student's t).

    None for a single difference, and if all are equal but for rounding, which with few of them is a coincidence.
    """
    from scipy import stats  # takes a second

    if len(differences) < 2 or np.ptp(differences) <= 1e-12:
        return None
    lower, upper = stats.ttest_1samp(differences, 0).confidence_interval(LEVEL)
    return float(lower), float(upper)


def wilson_intervals(right: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds of 95 % intervals of the shares right / images (Wilson 1927). images: above 0."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = right / images
    centre = (share + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * np.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return centre - half, centre + half
