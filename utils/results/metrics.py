"""Numbers: running means on the device during training, and scikit-learn's metrics of gathered predictions.

scikit-learn is imported where it is used: on rank 0 only, since it costs each process's start more than a second.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.runtime.text import as_cell, csv_line

Metrics = dict[str, float | None]


def classification_metrics(logits: Tensor, targets: Tensor, auroc: bool = False) -> Metrics:
    """Metrics of a whole split: logits (N, C), targets (N,) int64, on the CPU. Fractions in [0, 1].

    top1, top5 (top-C with fewer than five classes), loss (cross-entropy, nats; None if it is not finite), and over the
    classes that occur in the targets: precision, recall and f1 (macro), balanced_accuracy (mean recall) and, if asked
    for, auroc (macro, one-vs-one; None with a single class, or where a logit is not finite).
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support, recall_score

    log_probabilities = logits.double().log_softmax(1).numpy()
    predictions = logits.argmax(1).numpy()
    truth = targets.numpy()
    present = np.unique(truth)
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predictions, labels=present, average="macro", zero_division=0
    )
    metrics: Metrics = {
        "loss": _finite(float(-log_probabilities[np.arange(len(truth)), truth].mean())),
        "top1": float(accuracy_score(truth, predictions)),
        "top5": float((true_ranks(logits, targets) <= 5).double().mean()),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "balanced_accuracy": float(recall_score(truth, predictions, labels=present, average="macro", zero_division=0)),
    }
    if auroc:
        metrics["auroc"] = _auroc(truth, np.exp(log_probabilities))
    return metrics


def format_metrics(metrics: Metrics) -> str:
    """One line: `loss 0.1234  top1 0.9876 ...`, with `undefined` in place of a missing value."""
    return "  ".join(f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in metrics.items())


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def true_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """1 where the target has the largest logit, 2 where it has the next, and so on, (N,) int64; of equal logits, which
    are frequent in bfloat16, the first class comes first, as argmax has it.
    """
    true = logits.gather(1, targets[:, None])  # (N, 1)
    classes = torch.arange(logits.shape[1])
    before = (logits > true) | ((logits == true) & (classes < targets[:, None]))  # (N, C)
    return before.sum(1) + 1


def _auroc(truth: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Macro one-vs-one AUROC (Hand and Till 2001); every pair of present classes is scored by its own two columns."""
    from sklearn.metrics import roc_auc_score

    present = np.unique(truth)
    if len(present) < 2 or not np.isfinite(probabilities).all():
        return None
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(truth, probabilities[:, 1]))
    classes = np.arange(probabilities.shape[1])
    return float(roc_auc_score(truth, probabilities, multi_class="ovo", average="macro", labels=classes))


def _auroc_of_one(truth: np.ndarray, scores: np.ndarray) -> float | None:
    """AUROC of one class against the rest: truth (N,) bool, scores (N,)."""
    from sklearn.metrics import roc_auc_score

    if truth.all() or not truth.any() or not np.isfinite(scores).all():
        return None
    return float(roc_auc_score(truth, scores))


def per_class_table(
    logits: Tensor, targets: Tensor, classes: Sequence[str]
) -> list[dict[str, str | int | float | None]]:
    """One row a class: name, images, precision, recall, f1 (0 where undefined), auroc (one-vs-rest).

    auroc is None where it is undefined, and all metrics of a class without images are.
    """
    from sklearn.metrics import precision_recall_fscore_support

    truth = targets.numpy()
    columns = precision_recall_fscore_support(
        truth, logits.argmax(1).numpy(), labels=np.arange(len(classes)), zero_division=0
    )
    probabilities = logits.double().softmax(1).numpy()  # (N, C)
    aurocs = [_auroc_of_one(truth == number, probabilities[:, number]) for number in range(len(classes))]
    rows = []
    for name, *scores, images, auroc in zip(classes, *columns, aurocs, strict=True):
        scores = map(float, scores) if images else [None] * 3
        named = dict(zip(("precision", "recall", "f1"), scores, strict=True))
        rows.append({"class": name, "images": int(images), **named, "auroc": auroc})
    return rows


def prediction_table(
    logits: Tensor, targets: Tensor, classes: Sequence[str], names: Sequence[str]
) -> list[dict[str, str | int | float]]:
    """One row an image: its name, target and prediction, and of the softmax the probability of the prediction.

    true_rank: 1 where the prediction is right, 2 where the target comes next, and so on; loss: the image's own
    cross-entropy, nats.
    """
    log_probabilities = logits.double().log_softmax(1)  # (N, C)
    predictions, rows = logits.argmax(1), torch.arange(len(logits))
    return [
        {
            "image": name,
            "target": classes[target],
            "prediction": classes[prediction],
            "probability": probability,
            "true_rank": rank,
            "loss": loss,
        }
        for name, target, prediction, probability, rank, loss in zip(
            names,
            targets.tolist(),
            predictions.tolist(),
            log_probabilities[rows, predictions].exp().tolist(),
            true_ranks(logits, targets).tolist(),
            (-log_probabilities[rows, targets]).tolist(),
            strict=True,
        )
    ]


def table_as_csv(rows: list[dict[str, str | int | float | None]]) -> bytes:
    """The table as CSV with a header; fractions with six decimals, None as nothing, odd names with backslashes.

    A text that a spreadsheet may take for a formula has an apostrophe before it.
    """
    names = list(rows[0])
    lines = [csv_line(names)]
    for row in rows:
        cells = [row[name] for name in names]
        lines.append(csv_line(f"{cell:.6f}" if isinstance(cell, float) else as_cell(cell) for cell in cells))
    return "".join(lines).encode(errors="backslashreplace")


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
