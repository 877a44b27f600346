"""Metrics of a split, their tables, and their bootstrap intervals.

scikit-learn is imported inside the functions that need it, on rank 0 only: the import takes more than a second.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.results.intervals import LEVEL, RESAMPLES, bootstrap_weights
from utils.runtime.text import as_cell, csv_line

Metrics = dict[str, float | None]
Intervals = dict[str, tuple[float, float] | None]  # lower and upper bound of each metric; None where undefined
METRIC_NAMES = ("loss", "top1", "top5", "precision", "recall", "f1", "balanced_accuracy", "auroc")
CALIBRATION_NAMES = ("ece", "brier")  # only of --test-only
METRIC_TITLES = {
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "precision": "Macro precision",
    "recall": "Macro recall",
    "f1": "Macro F1",
    "auroc": "AUROC",
    "loss": "Cross-entropy",
    "ece": "Calibration error (ECE)",
    "brier": "Brier score",
}
CONFIDENCE_BINS = 15  # of equal width from 0 to 1, as in Guo et al. 2017


class Outcome(NamedTuple):
    """Prediction for each image of a split: arrays (N,), classes as numbers below `num_classes`.

    true_ranks: 1 where the prediction is right, 2 where the true class has the second largest logit, and so on.
    losses: cross-entropy, nats. confidences: softmax probability of the prediction. brier: squared distance of the
    probabilities from the one-hot target, 0 to 2. The last two are None where they are not known.
    """

    targets: np.ndarray
    predictions: np.ndarray
    true_ranks: np.ndarray
    losses: np.ndarray
    num_classes: int
    confidences: np.ndarray | None = None
    brier: np.ndarray | None = None


# Metrics of logits


def classification_metrics(logits: Tensor, targets: Tensor, auroc: bool = False, calibration: bool = False) -> Metrics:
    """Metrics of a whole split, fractions in [0, 1]. logits: (N, C), targets: (N,) int64, on the CPU.

    top1, top5 (1 with five classes or fewer) and loss (cross-entropy, nats; None if it is not finite).
    Over the classes that occur in the targets: macro precision, recall and f1, and balanced_accuracy (mean recall).
    auroc (macro, one-vs-one) if requested; None with a single class or where a logit is not finite.
    ece and brier (see `calibration_metrics`) with `calibration`; None where a logit is NaN or plus infinity.
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
    if calibration:
        values = calibration_metrics(outcome_of(logits, targets, calibration=True))
        metrics |= {name: value if np.isfinite(value) else None for name, value in values.items()}
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

    true_rank: as in `true_ranks`; loss: the cross-entropy of the image, nats; brier: as in `Outcome`.
    """
    outcome = outcome_of(logits, targets, calibration=True)
    columns = {
        "image": names,
        "target": [classes[target] for target in targets.tolist()],
        "prediction": [classes[prediction] for prediction in outcome.predictions.tolist()],
        "probability": outcome.confidences.tolist(),
        "true_rank": outcome.true_ranks.tolist(),
        "loss": outcome.losses.tolist(),
        "brier": outcome.brier.tolist(),
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


def outcome_of(logits: Tensor, targets: Tensor, calibration: bool = False) -> Outcome:
    """The outcome of a split. logits: (N, C), targets: (N,) int64, on the CPU.

    calibration: whether to compute confidences and brier as well.
    """
    log_probabilities, predictions = logits.double().log_softmax(1), logits.argmax(1)  # (N, C), (N,)
    losses = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    ranks = true_ranks(logits, targets)
    outcome = Outcome(targets.numpy(), predictions.numpy(), ranks.numpy(), losses.numpy(), logits.shape[1])
    if not calibration:
        return outcome
    distances = log_probabilities.exp_()
    confidences = distances.gather(1, predictions[:, None]).squeeze(1)
    distances[torch.arange(len(targets)), targets] -= 1
    return outcome._replace(confidences=confidences.numpy(), brier=distances.square_().sum(1).numpy())


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

    With those of `calibration_metrics` if the outcome has confidences and brier.

    weights: (N,) integers, not all 0, or None for once each.
    """
    weights = np.ones(len(outcome.targets)) if weights is None else weights
    macro = macro_metrics(*count_classes(outcome.targets, outcome.predictions, weights, outcome.num_classes))
    return {
        "loss": float(weights @ outcome.losses / weights.sum()),
        "top5": float(weights @ (outcome.true_ranks <= 5) / weights.sum()),
        **{name: float(value) for name, value in macro.items()},
        **calibration_metrics(outcome, weights),
    }


def calibration_metrics(outcome: Outcome, weights: np.ndarray | None = None) -> dict[str, float]:
    """ece and brier, when image n counts weights[n] times; without those whose values the outcome lacks.

    ece: expected calibration error in [0, 1], the mean over the images of the distance between accuracy and mean
    confidence of their bin, with the bins of `confidence_bins` (Guo et al. 2017, On Calibration of Modern Neural
    Networks). It is too high for few images, because chance alone moves the accuracy of a bin: for perfectly calibrated
    predictions with uniform confidences about .12 for 100 images, .04 for 1,000 and .01 for 10,000.
    brier: mean squared distance between the probabilities of all classes and the one-hot target, in [0, 2] (the
    original definition of Brier 1950; for two classes twice the value that many use).
    NaN where a logit was NaN or plus infinity.
    """
    weights = np.ones(len(outcome.targets)) if weights is None else weights
    metrics = {}
    if outcome.confidences is not None:
        gaps = (outcome.targets == outcome.predictions) - outcome.confidences
        sums = np.bincount(confidence_bins(outcome.confidences), weights * gaps)
        metrics["ece"] = float(np.abs(sums).sum() / weights.sum())
    if outcome.brier is not None:
        metrics["brier"] = float(weights @ outcome.brier / weights.sum())
    return metrics


def confidence_bins(confidences: np.ndarray) -> np.ndarray:
    """Number of the bin of each confidence, 0 to 14: bin m holds the values above m / 15, up to (m + 1) / 15."""
    numbers = np.fmax(np.fmin(np.ceil(confidences * CONFIDENCE_BINS), CONFIDENCE_BINS), 1)  # 1 for NaN
    return numbers.astype(np.int64) - 1


def reliability_table(outcome: Outcome) -> list[dict[str, int | float | None]] | None:
    """One row per bin of confidence: images, mean confidence, and accuracy; the latter two None without images.

    None for an outcome whose confidences are not known or not finite.
    """
    if outcome.confidences is None or not np.isfinite(outcome.confidences).all():
        return None
    bins, right = confidence_bins(outcome.confidences), outcome.targets == outcome.predictions
    images, sums, hits = (
        np.bincount(bins, weights, CONFIDENCE_BINS).tolist() for weights in (None, outcome.confidences, right)
    )
    return [
        {
            "images": number,
            "confidence": total / number if number else None,
            "accuracy": hit / number if number else None,
        }
        for number, total, hit in zip(images, sums, hits, strict=True)
    ]


def bootstrap_intervals(outcome: Outcome, resamples: int = RESAMPLES, seed: int = 0) -> Intervals:
    """95 % percentile intervals of `outcome_metrics` over `resamples` draws of N images with replacement (Efron 1979).

    None where a value is not finite. They cover the choice of test images only, not the spread between training runs.
    That of ece shares the bias of ece and adds to it: it can lie above the value itself.
    1000 resamples of 100,000 images of 165 classes take 3 s on one CPU core.
    """
    values, tail = [], (1 - LEVEL) / 2
    with np.errstate(invalid="ignore"):  # infinite losses
        for weights in bootstrap_weights(len(outcome.targets), resamples, seed):
            values.append(list(outcome_metrics(outcome, weights).values()))
        bounds = np.quantile(values, [tail, 1 - tail], axis=0).T.tolist()  # (metrics, 2)
    return {
        name: tuple(pair) if np.isfinite(pair).all() else None
        for name, pair in zip(outcome_metrics(outcome), bounds, strict=True)
    }
