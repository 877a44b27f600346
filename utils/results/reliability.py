"""Figure of the calibration of a classifier: accuracy against confidence."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from utils.results.figures import COLOURS, FAINT, INK, figure_title
from utils.results.intervals import wilson_intervals
from utils.results.metrics import CONFIDENCE_BINS, Outcome, calibration_metrics, reliability_table
from utils.runtime.errors import UserError

SIDE, LOWER, GAP = 4.2, 1.1, 0.25  # inches: the upper panel, the height of the lower one, and the space between them


def reliability_diagram(outcome: Outcome, what: str = "", note: str = "") -> Figure:
    """Accuracy of each bin of confidence with its 95 % interval, and below it the share of the images in each bin.

    what: split and weights, for the title; note: a sentence below it. Raises UserError if the confidences are not
    known or not finite.
    """
    table = reliability_table(outcome)
    if table is None:
        raise UserError(
            "Reliability: the probabilities of this evaluation are missing or not finite; run --test-only again."
        )
    filled = [row for row in table if row["images"]]
    images, confidence, accuracy = (
        np.array([row[key] for row in filled]) for key in ("images", "confidence", "accuracy")
    )
    height = SIDE + GAP + LOWER
    figure = Figure(figsize=(SIDE, height))
    upper = figure.add_axes((0, 1 - SIDE / height, 1, SIDE / height))
    lower = figure.add_axes((0, 0, 1, LOWER / height), sharex=upper)
    upper.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1, label="perfectly calibrated")
    bounds = np.array(wilson_intervals(np.round(accuracy * images), images))
    upper.vlines(confidence, *bounds, color=COLOURS[0], linewidth=1.2, alpha=0.6, label="95 % interval of a bin")
    ece = calibration_metrics(outcome)["ece"]
    label = f"accuracy of a bin; calibration error {ece:.3f}"
    upper.plot(confidence, accuracy, color=COLOURS[0], marker="o", markersize=5, label=label, clip_on=False, zorder=3)
    for place, align, text in (((0.03, 0.97), "left", "underconfident"), ((0.97, 0.03), "right", "overconfident")):
        upper.text(*place, text, ha=align, va="top" if align == "left" else "bottom", fontsize=9, color="0.4")
    upper.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", ylabel="accuracy: share of right predictions")
    upper.tick_params(labelbottom=False)
    upper.set_title(figure_title("Reliability", len(outcome.targets), what, note), pad=58)
    upper.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9)
    edges = np.arange(CONFIDENCE_BINS) / CONFIDENCE_BINS
    shares = [row["images"] / len(outcome.targets) for row in table]
    lower.bar(edges, shares, 1 / CONFIDENCE_BINS, align="edge", color=COLOURS[0], edgecolor="w", linewidth=0.5)
    lower.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    lower.set(xlabel="confidence: probability of the predicted class", ylabel="share of images")
    for axes in (upper, lower):
        axes.grid(color=FAINT)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
