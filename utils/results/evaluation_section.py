"""The section of a report on one evaluation: metrics, classes, pictures."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from matplotlib.figure import Figure

from utils.results import templates
from utils.results.confusion import confusion_matrix, count_pairs, per_class_recall, recall_by_frequency
from utils.results.figures import as_svg
from utils.results.metrics import METRIC_TITLES, Outcome
from utils.results.reliability import reliability_diagram
from utils.results.run_folder import RESULT_TITLES, Evaluation, RunFolder, training_images
from utils.runtime.errors import UserError

# Macro recall is left out: it is the balanced accuracy.
TITLES = {name: title for name, title in METRIC_TITLES.items() if name != "recall"}
SCORES = ("precision", "recall", "f1")
FREQUENCY_HELP = (
    "Each point is a class. If the points rise to the right, classes with few training images are recognised less "
    "often. Long intervals mean few evaluated images. From six classes on, the thick lines are the mean recall of the "
    "rarest third of the classes, the middle third and the most frequent one; equally frequent classes stay together."
)
RELIABILITY_HELP = (
    "Each point is a group of images of similar confidence. On the dashed line their probabilities are right; below "
    "it they are too high, above it too low. The bars show how many images each group has."
)


def describe_evaluation(name: str, what: str, run: RunFolder, evaluation: Evaluation) -> dict[str, Any]:
    """Metrics with intervals, the per-class table with the commonest confusion of each class, and the pictures."""
    classes = [row["class"] for row in evaluation.table]
    title = RESULT_TITLES.get(name, name)
    outcome = evaluation.outcome
    confused = commonest_confusions(outcome, classes)
    arguments = (outcome.targets, outcome.predictions, classes, what)
    intervals = run.tested.get("intervals", {}).get(name, {})
    pictures = [
        picture(confusion_matrix(*arguments), f"Confusion matrix, {title}"),
        picture(per_class_recall(*arguments), f"Recall of each class, {title}"),
    ]
    with suppress(UserError):  # an older version, or no run.json next to the weights
        figure = recall_by_frequency(outcome.targets, outcome.predictions, training_images(evaluation.table), what)
        pictures.append(picture(figure, f"Recall by class frequency, {title}") | {"help": FREQUENCY_HELP})
    with suppress(UserError):
        shown = picture(reliability_diagram(outcome, what), f"Reliability, {title}")
        pictures.append(shown | {"help": RELIABILITY_HELP, "is_small": True})
    return {
        "title": title,
        "what": what,
        "images": len(outcome.targets),
        "metrics": {
            metric: {"value": evaluation.metrics[metric], "interval": intervals.get(metric)}
            for metric in TITLES
            if evaluation.metrics.get(metric) is not None
        },
        "table": [
            row
            | {"images": int(row["images"]), "train_images": row.get("train_images"), "confused": text}
            | {score: as_number(row[score]) for score in SCORES}
            for row, text in zip(evaluation.table, confused, strict=True)
        ],
        "has_training_images": any(row.get("train_images") for row in evaluation.table),
        "pictures": pictures,
    }


def as_number(cell: str) -> float | None:
    """A cell of per_class.csv; None for an empty one."""
    return float(cell) if cell else None


def commonest_confusions(outcome: Outcome, classes: Sequence[str]) -> list[str]:
    """For each class the most frequent wrong prediction and its number of images: "b (3)"; "" without any."""
    wrong = outcome.targets != outcome.predictions
    counts = count_pairs(outcome.targets[wrong], outcome.predictions[wrong], len(classes))
    return [f"{classes[row.argmax()]} ({row.max()})" if row.any() else "" for row in counts]


def picture(figure: Figure, title: str) -> dict[str, str]:
    return {"source": templates.data_uri(as_svg(figure), "image/svg+xml"), "title": title}
