"""Figures from log.jsonl: learning curves, and the health of the policy, over the epochs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.results.figures import COLOURS, FAINT, INK, as_text
from utils.runtime.errors import UserError

Runs = dict[str, list[dict]]  # the lines of log.jsonl by run name
STYLES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v")
MARKERS_PER_LINE = 12
LARGEST = 1e100  # values that axes can show
WIDTH, HEIGHT, ASIDE, BELOW = 3.0, 2.0, 1.0, 0.9  # inches: a panel, and the space between two


class Panel(NamedTuple):
    """One quantity of the log over the epochs."""

    key: str
    title: str
    unit: str


CURVES = (
    Panel("train_loss", "Training objective", "objective"),
    Panel("train_cross_entropy", "Training cross-entropy", "nats"),
    Panel("val_loss", "Validation cross-entropy", "nats"),
    Panel("train_top1", "Training top-1 accuracy", "share of images"),
    Panel("val_top1", "Validation top-1 accuracy", "share of images"),
    Panel("val_f1", "Validation macro F1", "mean over classes, 0 to 1"),
    Panel("val_balanced_accuracy", "Validation balanced accuracy", "mean recall of the classes"),
    Panel("lr_classifier", "Learning rate of the classifier", "learning rate"),
    Panel("lr_policy", "Learning rate of the policy", "learning rate"),
)
HEALTH = (
    Panel("mask_mean", "Mean of the masks", "mask value"),
    Panel("mask_std", "Spread of the masks", "standard deviation over pixels"),
    Panel("mask_std_between_images", "Masks' difference between images", "standard deviation; 0: none"),
    Panel("policy_entropy", "Entropy of a cell", "nats; 0: uniform noise"),
    Panel("policy_log_density", "Log-density of a sampled cell", "nats; 0: uniform noise"),
    Panel("advantage_std", "Spread of the advantage", "standard deviation, nats"),
    Panel("prior_drift", "Drift of the prior", "RMS change of log-concentrations"),
    Panel("concentrations_at_bounds", "Log-concentrations at their bounds", "share; there they cannot learn"),
)
FROM_ZERO = ("mask_std", "mask_std_between_images", "advantage_std", "prior_drift", "concentrations_at_bounds")


def learning_curves(runs: Runs, columns: int = 3) -> Figure:
    """Losses, accuracies and learning rates over the epochs: one panel per quantity, one line per run.

    Quantities that no run has are left out. Raises UserError if none is left.
    """
    return _over_epochs(runs, CURVES, "Learning curves", columns)


def policy_health(runs: Runs, columns: int = 4) -> Figure:
    """Quantities of the policy over the epochs, as `learning_curves`. The README explains each of them."""
    return _over_epochs(runs, HEALTH, "Health of the policy", columns)


def _over_epochs(runs: Runs, panels: Sequence[Panel], title: str, columns: int) -> Figure:
    shown = [panel for panel in panels if any(_points(lines, panel.key)[0] for lines in runs.values())]
    if not shown:
        raise UserError(f"{title}: the log of {', '.join(runs)} holds none of these quantities.")
    rows, columns = math.ceil(len(shown) / columns), min(columns, len(shown))
    width, height = columns * (WIDTH + ASIDE) - ASIDE, rows * (HEIGHT + BELOW) - BELOW
    figure = Figure(figsize=(width, height))  # the size of the panels; the labels around them widen the picture
    grid = figure.add_gridspec(
        rows, columns, left=0, right=1, bottom=0, top=1, wspace=ASIDE / WIDTH, hspace=BELOW / HEIGHT
    )
    for place, panel in zip(grid, shown, strict=False):
        _draw_panel(figure.add_subplot(place), panel, runs)
    heading = title if len(runs) > 1 else f"{title}: {as_text(next(iter(runs)))}"
    figure.suptitle(heading, y=1 + 0.45 / height, color=INK)
    if len(runs) > 1:
        handles, names = [], []
        for number, (name, lines) in enumerate(runs.items()):
            if any(_points(lines, panel.key)[0] for panel in shown):
                handles.append(Line2D([], [], **_style(number)))
                # matplotlib 3.9 leaves out labels that begin with an underscore.
                names.append(f" {as_text(name)}" if name.startswith("_") else as_text(name))
        anchor = (0.5, -0.5 / height)
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=anchor, frameon=False, handlelength=4)
    return figure


def _draw_panel(axes: Axes, panel: Panel, runs: Runs) -> None:
    all_values = []
    for number, lines in enumerate(runs.values()):
        epochs, values = _points(lines, panel.key)
        if epochs:
            axes.plot(epochs, values, **_style(number), markevery=math.ceil(len(epochs) / MARKERS_PER_LINE))
        all_values += values
    if panel.key.startswith("lr_") and min(all_values) > 0 and max(all_values) >= 10 * min(all_values):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    # Quantities that cannot be negative start at 0, so that their noise does not look like a trend.
    if panel.key == "mask_mean":
        axes.set_ylim(0, max(1.0, 1.1 * max(all_values)))  # above 1 with some values of --mask-range
    elif panel.key in FROM_ZERO and min(all_values) >= 0:
        axes.set_ylim(0, None if max(all_values) > 0 else 1)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("epoch, from 0")
    axes.set_ylabel(panel.unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color=FAINT)
    axes.spines[["top", "right"]].set_visible(False)


def _points(lines: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Epochs and values of the lines in which the key has a finite number that axes can show."""
    pairs = [(line["epoch"], line[key]) for line in lines if isinstance(line.get(key), (int, float))]
    pairs = [(epoch, float(value)) for epoch, value in pairs if abs(value) < LARGEST]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _style(number: int) -> dict[str, object]:
    """Colour, style and marker of a run's line; no two of the first 140 runs share all three."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.5,
    }
