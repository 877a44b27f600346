"""How far metrics of a test set would scatter if other images had been drawn: bootstrap confidence intervals."""

from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Outcome(NamedTuple):
    """What was predicted for each image of a split, arrays (N,); classes are numbers below `num_classes`.

    true_ranks: 1 where the prediction is right, and so on; losses: cross-entropy, nats.
    """

    targets: np.ndarray
    predictions: np.ndarray
    true_ranks: np.ndarray
    losses: np.ndarray
    num_classes: int


def metrics_of(outcome: Outcome, weights: np.ndarray | None = None) -> dict[str, float]:
    """The metrics of `metrics.classification_metrics`, but for auroc, when image n counts weights[n] times.

    weights: (N,) integers, not all 0; None: each image once.
    """
    if weights is None:
        weights = np.ones(len(outcome.targets))
    cells = outcome.targets * outcome.num_classes + outcome.predictions  # (N,)
    confusion = np.bincount(cells, weights, minlength=outcome.num_classes**2).reshape(outcome.num_classes, -1)  # (C, C)
    right, images, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    present = images > 0
    recall = float((right / np.maximum(images, 1))[present].mean())
    total = weights.sum()
    return {
        "loss": float(weights @ outcome.losses / total),
        "top1": float(right.sum() / total),
        "top5": float(weights @ (outcome.true_ranks <= 5) / total),
        "precision": float((right / np.maximum(predicted, 1))[present].mean()),
        "recall": recall,
        "f1": float((2 * right / np.maximum(images + predicted, 1))[present].mean()),
        "balanced_accuracy": recall,
    }


def bootstrap_intervals(outcome: Outcome, resamples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of `metrics_of` over `resamples` draws of N images with replacement (Efron 1979).

    They tell of the choice of test images only, not of the spread between training runs.
    """
    generator = np.random.default_rng(seed)
    n = len(outcome.targets)
    drawn = [
        list(metrics_of(outcome, np.bincount(generator.integers(n, size=n), minlength=n)).values())
        for _ in range(resamples)
    ]
    lower, upper = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)  # (metrics,) each
    return dict(zip(metrics_of(outcome), zip(lower.tolist(), upper.tolist(), strict=True), strict=True))
