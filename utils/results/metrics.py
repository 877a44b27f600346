"""Metrics of a split, their tables, and bootstrap confidence intervals.

scikit-learn is imported inside the functions that need it, on rank 0 only: the import takes more than a second.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.runtime.text import as_cell, csv_line

Metrics = dict[str, float | None]
Intervals = dict[str, tuple[float, float] | None]  # lower and upper bound of each metric; None where undefined
METRIC_NAMES = ("loss", "top1", "top5", "precision", "recall", "f1", "balanced_accuracy", "auroc")
METRIC_TITLES = {
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "precision": "Macro precision",
    "recall": "Macro recall",
    "f1": "Macro F1",
    "auroc": "AUROC",
    "loss": "Cross-entropy",
}
LEVEL, RESAMPLES = 0.95, 1000  # of confidence intervals


class Outcome(NamedTuple):
    """Prediction for each image of a split: arrays (N,), classes as numbers below `num_classes`.

    true_ranks: 1 where the prediction is right, 2 where the true class has the second largest logit, and so on.
    losses: cross-entropy, nats.
    """

    targets: np.ndarray
    predictions: np.ndarray
    true_ranks: np.ndarray
    losses: np.ndarray
    num_classes: int


# Metrics of logits


def classification_metrics(logits: Tensor, targets: Tensor, auroc: bool = False) -> Metrics:
    """Metrics of a whole split, fractions in [0, 1]. logits: (N, C), targets: (N,) int64, on the CPU.

    top1, top5 (1 with five classes or fewer) and loss (cross-entropy, nats; None if it is not finite).
    Over the classes that occur in the targets: macro precision, recall and f1, and balanced_accuracy (mean recall).
    auroc (macro, one-vs-one) if requested; None with a single class or where a logit is not finite.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    log_probabilities = logits.double().log_softmax(1).numpy()
    predictions = logits.argmax(1).numpy()
    truth = targets.numpy()
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth, predictions, labels=np.unique(truth), average="macro", zero_division=0
    )
    loss = float(-log_probabilities[np.arange(len(truth)), truth].mean())
    metrics: Metrics = {
        "loss": loss if np.isfinite(loss) else None,
        "top1": float(accuracy_score(truth, predictions)),
        "top5": float((true_ranks(logits, targets) <= 5).double().mean()),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "balanced_accuracy": float(recall),
    }
    if auroc:
        metrics["auroc"] = _macro_auroc(truth, np.exp(log_probabilities))
    return metrics


def format_metrics(metrics: Metrics) -> str:
    """One line: `loss 0.1234  top1 0.9876 ...`, with `undefined` in place of a missing value."""
    return "  ".join(f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in metrics.items())


def true_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """Rank of the target's logit in its row, (N,) int64: 1 for the largest.

    Equal logits, which are frequent in bfloat16, rank in the order of the classes, as in argmax.
    """
    true = logits.gather(1, targets[:, None])  # (N, 1)
    classes = torch.arange(logits.shape[1])
    before = (logits > true) | ((logits == true) & (classes < targets[:, None]))  # (N, C)
    return before.sum(1) + 1


def _macro_auroc(truth: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Macro one-vs-one AUROC (Hand and Till 2001); each pair of present classes is scored by its own two columns."""
    from sklearn.metrics import roc_auc_score

    present = np.unique(truth)
    if len(present) < 2 or not np.isfinite(probabilities).all():
        return None
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(truth, probabilities[:, 1]))
    classes = np.arange(probabilities.shape[1])
    return float(roc_auc_score(truth, probabilities, multi_class="ovo", average="macro", labels=classes))


def _class_auroc(truth: np.ndarray, scores: np.ndarray) -> float | None:
    """AUROC of one class against the rest. truth: (N,) bool, scores: (N,)."""
    from sklearn.metrics import roc_auc_score

    if truth.all() or not truth.any() or not np.isfinite(scores).all():
        return None
    return float(roc_auc_score(truth, scores))


# Tables


def per_class_table(
    logits: Tensor, targets: Tensor, classes: Sequence[str]
) -> list[dict[str, str | int | float | None]]:
    """One row per class: name, images, precision, recall, f1 (0 where undefined) and auroc (one-vs-rest).

    auroc is None where it is undefined; all metrics of a class without images are None.
    """
    from sklearn.metrics import precision_recall_fscore_support

    truth = targets.numpy()
    precision, recall, f1, images = precision_recall_fscore_support(
        truth, logits.argmax(1).numpy(), labels=np.arange(len(classes)), zero_division=0
    )
    probabilities = logits.double().softmax(1).numpy()  # (N, C)
    return [
        {
            "class": name,
            "images": int(images[number]),
            "precision": float(precision[number]) if images[number] else None,
            "recall": float(recall[number]) if images[number] else None,
            "f1": float(f1[number]) if images[number] else None,
            "auroc": _class_auroc(truth == number, probabilities[:, number]),
        }
        for number, name in enumerate(classes)
    ]


def prediction_table(
    logits: Tensor, targets: Tensor, classes: Sequence[str], names: Sequence[str]
) -> list[dict[str, str | int | float]]:
    """One row per image: its name, target, prediction and the softmax probability of the prediction.

    true_rank: as in `true_ranks`; loss: the cross-entropy of the image, nats.
    """
    log_probabilities = logits.double().log_softmax(1)  # (N, C)
    predictions, rows = logits.argmax(1), torch.arange(len(logits))
    columns = {
        "image": names,
        "target": [classes[target] for target in targets.tolist()],
        "prediction": [classes[prediction] for prediction in predictions.tolist()],
        "probability": log_probabilities[rows, predictions].exp().tolist(),
        "true_rank": true_ranks(logits, targets).tolist(),
        "loss": (-log_probabilities[rows, targets]).tolist(),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def table_as_csv(rows: list[dict[str, str | int | float | None]]) -> bytes:
    """The table as CSV with a header: six decimals for fractions, an empty cell for None, backslashes for non-text.

    Texts that a spreadsheet may take for a formula get a leading apostrophe.
    """
    lines = [csv_line(list(rows[0]))]
    for row in rows:
        lines.append(csv_line(f"{cell:.6f}" if isinstance(cell, float) else as_cell(cell) for cell in row.values()))
    return "".join(lines).encode(errors="backslashreplace")


# Metrics of predicted classes, quick enough for a bootstrap


def outcome_of(logits: Tensor, targets: Tensor) -> Outcome:
    """The outcome of a split. logits: (N, C), targets: (N,) int64, on the CPU."""
    losses = -logits.double().log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    ranks = true_ranks(logits, targets)
    return Outcome(targets.numpy(), logits.argmax(1).numpy(), ranks.numpy(), losses.numpy(), logits.shape[1])


def count_classes(
    targets: np.ndarray, predictions: np.ndarray, weights: np.ndarray | None, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of each class (C,), recognised (..., C), and predicted (..., C), float64, for one run or several.

    targets: (N,), predictions: (..., N), numbers below `classes`; weights: (N,) integers, how often each image counts;
    None: once.
    """
    weights = np.ones(len(targets)) if weights is None else weights.astype(float)
    predictions = np.asarray(predictions)
    runs = predictions.reshape(-1, len(targets))  # (R, N)
    # For each run first the wrong predictions of each class, then the right ones: one count gives both.
    cells = 2 * classes * np.arange(len(runs))[:, None] + classes * (runs == targets) + runs  # (R, N)
    counted = np.broadcast_to(weights, cells.shape).ravel()
    counts = np.bincount(cells.ravel(), counted, minlength=2 * classes * len(runs))
    counts = counts.reshape(*predictions.shape[:-1], 2, classes)
    images = np.bincount(targets, weights, minlength=classes)
    return images, counts[..., 1, :], counts.sum(-2)


def macro_metrics(
    images: np.ndarray, right: np.ndarray, predicted: np.ndarray, among: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """top1, macro precision, recall and f1, and balanced_accuracy, each (...), as in `classification_metrics`.

    images, right, predicted: from `count_classes`. among: (C,) bool, the classes to average over, and those of the
    images of top1; None: all. Classes without images count in no average; NaN if none has images.
    """
    present = images > 0 if among is None else among & (images > 0)
    with np.errstate(invalid="ignore"):
        top1 = right[..., present].sum(-1) / images[present].sum()
        precision = (right / np.maximum(predicted, 1))[..., present].sum(-1) / present.sum()
        recall = (right / np.maximum(images, 1))[..., present].sum(-1) / present.sum()
        f1 = (2 * right / np.maximum(images + predicted, 1))[..., present].sum(-1) / present.sum()
    return {"top1": top1, "precision": precision, "recall": recall, "f1": f1, "balanced_accuracy": recall}


def outcome_metrics(outcome: Outcome, weights: np.ndarray | None = None) -> dict[str, float]:
    """The metrics of `classification_metrics` except auroc, when image n counts weights[n] times.

    weights: (N,) integers, not all 0, or None for once each.
    """
    weights = np.ones(len(outcome.targets)) if weights is None else weights
    macro = macro_metrics(*count_classes(outcome.targets, outcome.predictions, weights, outcome.num_classes))
    return {
        "loss": float(weights @ outcome.losses / weights.sum()),
        "top5": float(weights @ (outcome.true_ranks <= 5) / weights.sum()),
        **{name: float(value) for name, value in macro.items()},
    }


def bootstrap_intervals(outcome: Outcome, resamples: int = RESAMPLES, seed: int = 0) -> Intervals:
    """95 % percentile intervals of `outcome_metrics` over `resamples` draws of N images with replacement (Efron 1979).

    None for a loss that is not finite. They cover the choice of test images only, not the spread between training runs.
    1000 resamples of 100,000 images of 165 classes take 3 s on one CPU core.
    """
    generator = np.random.default_rng(seed)
    n = len(outcome.targets)
    values, tail = [], (1 - LEVEL) / 2
    with np.errstate(invalid="ignore"):  # infinite losses
        for _ in range(resamples):
            weights = np.bincount(generator.integers(n, size=n), minlength=n)
            values.append(list(outcome_metrics(outcome, weights).values()))
        bounds = np.quantile(values, [tail, 1 - tail], axis=0).T.tolist()  # (metrics, 2)
    return {
        name: tuple(pair) if np.isfinite(pair).all() else None
        for name, pair in zip(outcome_metrics(outcome), bounds, strict=True)
    }
