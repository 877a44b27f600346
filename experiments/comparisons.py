"""Statistics of paired differences between arms: intervals, effect sizes, tests. Arrays in, numbers out.

A difference belongs to one seed: of the arm's metric to its control's for the same seed and the same test images.
Positive differences are better.
"""

import math

import numpy as np
from scipy import stats

from utils.results.intervals import LEVEL, bootstrap_weights, wilson_intervals
from utils.results.metrics import count_classes, macro_metrics

SCORES = ("top1", "balanced_accuracy", "f1", "hard_top1", "hard_balanced_accuracy", "hard_f1", "balanced_loss")
ALPHA, POWER = 0.05, 0.8
MOST_EXACT, FLIPS = 16, 100_000  # seeds up to which all sign flips are tried; random ones for more


def scores(
    targets: np.ndarray,
    predictions: np.ndarray,
    losses: np.ndarray,
    hard: np.ndarray,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """SCORES of R runs on the same N images, (R, 7); NaN where undefined.

    targets: (N,) classes below C; predictions, losses: (R, N); hard: (C,) bool; weights: (N,) integers, how often each
    image counts (None: once). hard_top1 and hard_balanced_accuracy cover the images of hard classes; hard_f1 is the
    mean F1 of the hard classes over all images. balanced_loss is the mean over the classes of their mean losses. A
    class counts if it occurs in targets.
    """
    counts = count_classes(targets, predictions, weights, len(hard))
    metrics = [macro_metrics(*counts, among) for among in (None, hard)]
    columns = [group[name] for group in metrics for name in ("top1", "balanced_accuracy", "f1")]
    return np.stack([*columns, balanced_loss(targets, losses, counts[0], weights)], axis=1)


def balanced_loss(
    targets: np.ndarray, losses: np.ndarray, images: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Mean over the classes of their mean losses, (R,). images: (C,), how many each class has, by weight."""
    weights = np.ones(len(targets)) if weights is None else weights
    return losses @ (weights / np.maximum(images, 1)[targets]) / np.count_nonzero(images)


def bootstrap_scores(
    targets: np.ndarray, predictions: np.ndarray, losses: np.ndarray, hard: np.ndarray, resamples: int
) -> np.ndarray:
    """`scores` on `resamples` draws of N images with replacement, the same for all runs, (resamples, R, 7)."""
    draws = bootstrap_weights(len(targets), resamples)
    return np.stack([scores(targets, predictions, losses, hard, weights) for weights in draws])


def hierarchical_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean difference, from a bootstrap over test images and seeds (training runs).

    differences: (resamples, n), the differences of n seeds in each resample of the images; this function resamples the
    seeds. With few seeds the interval is too narrow: three seeds have ten different resamples, and the interval over
    seeds alone spans at most the range of the differences. Measured with 2000 draws of n normal differences and 2000
    resamples of seeds only, it contained the true mean 76 % of the time with 3 seeds, 84 % with 5, 89 % with 8 and 92 %
    with 16. `t_interval` contains it 95 % of the time, but ignores the choice of test images.
    """
    resamples, n = differences.shape
    picks = np.random.default_rng([0, 1]).integers(n, size=(resamples, n))  # not the stream that drew the images
    means = np.take_along_axis(differences, picks, axis=1).mean(1)
    lower, upper = np.nanquantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lower), float(upper)


def effect_size(differences: np.ndarray) -> float | None:
    """Cohen's d_z: the mean difference in standard deviations of the differences (n,).

    None for fewer than three differences, and if all are equal.
    """
    if len(differences) < 3 or _constant(differences):
        return None
    return float(differences.mean() / differences.std(ddof=1))


def seeds_needed(differences: np.ndarray, true_difference: float) -> int | None:
    """Smallest number of seeds at which a paired t-test (two-sided, 5 %) detects this difference with 80 % power.

    differences: (n,), for their standard deviation. None for fewer than three, and if all are equal.
    """
    if len(differences) < 3 or _constant(differences):
        return None
    d = true_difference / differences.std(ddof=1)
    with_known_deviation = ((stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER)) / d) ** 2  # a lower bound
    n = max(2, math.floor(with_known_deviation))
    while power_of_t_test(d, n) < POWER:
        n += 1
    return n


def power_of_t_test(d: float, n: int) -> float:
    """Probability that n differences with a mean of d standard deviations give p < 5 % (noncentral t, two-sided)."""
    critical, noncentrality = stats.t.ppf(1 - ALPHA / 2, n - 1), d * math.sqrt(n)
    return float(stats.nct.sf(critical, n - 1, noncentrality) + stats.nct.cdf(-critical, n - 1, noncentrality))


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p-value of the mean of n >= 2 differences under random signs.

    Exact, over all 2^n sign flips, for at most MOST_EXACT differences; otherwise over FLIPS random ones, the same in
    each call, so that p is at least 2 / FLIPS. Unlike the t-test, it does not assume normal differences: without an
    effect, a difference must only be as likely to be positive as negative, at every size.
    """
    flips = np.inf if len(differences) <= MOST_EXACT else FLIPS - 1  # SciPy counts the observed signs in addition
    test = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=flips, rng=0)
    return min(float(test.pvalue), 1.0)


def probability_of_better(differences: np.ndarray) -> tuple[float, float, float]:
    """Probability that a new replicate of the arm beats its control's, and the bounds of its 95 % interval.

    differences: (n,). The probability is the share of seeds in which the arm is better, where equal ones count half
    (Bouthillier et al. 2021, Accounting for Variance in Machine Learning Benchmarks). The
    interval is Wilson's: a bootstrap, as in that paper, has no width if all seeds agree.
    """
    better = np.sum(differences > 0) + np.sum(differences == 0) / 2
    lower, upper = wilson_intervals(better, np.array(len(differences)))
    return float(better / len(differences)), max(float(lower), 0.0), min(float(upper), 1.0)  # beyond by rounding only


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the given order."""
    order = np.argsort(p_values)
    adjusted = np.array(p_values)[order] * np.arange(len(p_values), 0, -1)
    result = np.empty(len(p_values))
    result[order] = np.minimum(np.maximum.accumulate(adjusted), 1)
    return result.tolist()


def _constant(differences: np.ndarray) -> bool:
    """Whether the differences vary by rounding only."""
    return bool(np.ptp(differences) <= 1e-12)
