"""Figures from log.jsonl: learning curves, and the health of the policy, over the epochs."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from utils.results.figures import COLOURS, FAINT, INK, as_text
from utils.runtime.errors import UserError

Runs = dict[str, list[dict]]  # the lines of log.jsonl by run name
STYLES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v")
MARKERS_PER_LINE = 12
LARGEST = 1e100  # values that axes can show
SPREAD = 10  # ratio of the largest to the smallest value from which on a logarithmic axis is used
WIDTH, HEIGHT, ASIDE, BELOW = 2.7, 2.0, 0.9, 1.1  # inches: a panel, and the space between two


class Panel(NamedTuple):
    """A quantity of the log over the epochs.

    log: whether widely spread values get a logarithmic axis; from_zero: whether the axis starts at 0, so that the
    noise of small values does not look like a trend; line: a value to compare with; good: a range of values to aim
    for, shaded; hint: what line and shade mean.
    """

    key: str
    title: str
    unit: str
    log: bool = False
    from_zero: bool = False
    line: float | None = None
    good: tuple[float, float] | None = None
    hint: str = ""


CURVES = (
    Panel("train_loss", "Training objective", "objective", log=True),
    Panel("train_cross_entropy", "Training cross-entropy", "nats", log=True),
    Panel("val_loss", "Validation cross-entropy", "nats", log=True),
    Panel("train_top1", "Training top-1 accuracy", "share of images"),
    Panel("val_top1", "Validation top-1 accuracy", "share of images"),
    Panel("val_f1", "Validation macro F1", "mean over classes, 0 to 1"),
    Panel("val_balanced_accuracy", "Validation balanced accuracy", "mean recall of the classes"),
    Panel("lr_classifier", "Learning rate of the classifier", "learning rate", log=True),
    Panel("lr_policy", "Learning rate of the policy", "learning rate", log=True),
)
HEALTH = (
    Panel("mask_mean", "Mean of the masks", "mask value", from_zero=True, good=(0.2, 0.8),
          hint="shaded: usual with --mask-range 0 1"),
    Panel("mask_std", "Spread of the masks", "standard deviation over pixels", from_zero=True, line=0,
          hint="good: well above 0 (0: flat masks)"),
    Panel("mask_std_between_images", "Masks' difference between images", "standard deviation", from_zero=True,
          good=(0.02, math.inf), hint="shaded: masks depend on the image"),
    Panel("policy_entropy", "Entropy of a cell", "nats", line=0, hint="line: uniform noise; below: more certain"),
    Panel("policy_log_density", "Log-density of a sampled cell", "nats", line=0,
          hint="line: uniform noise; above: more certain"),
    Panel("advantage_std", "Spread of the advantage", "standard deviation, nats", from_zero=True, line=0,
          hint="good: above 0 (0: no credit to single masks)"),
    Panel("prior_drift", "Drift of the prior", "RMS change, log-concentrations", from_zero=True, line=0,
          hint="good: levels off (0: has not moved)"),
    Panel("concentrations_at_bounds", "Log-concentrations at their bounds", "share of the values", from_zero=True,
          line=0, hint="good: 0; values at a bound cannot learn"),
)  # fmt: skip


def learning_curves(runs: Runs, columns: int = 3, groups: Sequence[Sequence[str]] = ()) -> Figure:
    """Losses, accuracies and learning rates over the epochs: one panel per quantity, one line per run.

    groups: names of runs that differ only in their seed; they share a line, their mean, and a band from the lowest to
    the highest value. Quantities that no run has are left out. Raises UserError if none is left.
    """
    return _over_epochs(runs, CURVES, "Learning curves", columns, groups)


def policy_health(runs: Runs, columns: int = 3, groups: Sequence[Sequence[str]] = ()) -> Figure:
    """Quantities of the policy over the epochs, as `learning_curves`."""
    return _over_epochs(runs, HEALTH, "Health of the policy", columns, groups)


def _over_epochs(
    runs: Runs, panels: Sequence[Panel], title: str, columns: int, groups: Sequence[Sequence[str]]
) -> Figure:
    lines = _lines(runs, groups)
    shown = [panel for panel in panels if any(_points(logs, panel.key) for logs in lines.values())]
    if not shown:
        raise UserError(f"{title}: the log of {', '.join(runs)} holds none of these quantities.")
    rows, columns = math.ceil(len(shown) / columns), min(columns, len(shown))
    width, height = columns * (WIDTH + ASIDE) - ASIDE, rows * (HEIGHT + BELOW) - BELOW
    figure = Figure(figsize=(width, height))  # the size of the panels; the labels around them widen the picture
    grid = figure.add_gridspec(
        rows, columns, left=0, right=1, bottom=0, top=1, wspace=ASIDE / WIDTH, hspace=BELOW / HEIGHT
    )
    for place, panel in zip(grid, shown, strict=False):
        _draw_panel(figure.add_subplot(place), panel, lines)
    heading = title if len(lines) > 1 else f"{title}: {as_text(next(iter(lines)))}"
    figure.suptitle(heading, y=1 + 0.6 / height, color=INK)
    if len(lines) > 1:
        handles, names = [], []
        for number, (name, logs) in enumerate(lines.items()):
            if any(_points(logs, panel.key) for panel in shown):
                handles.append(Line2D([], [], **line_style(number)))
                # matplotlib 3.9 leaves out labels that begin with an underscore.
                names.append(f" {as_text(name)}" if name.startswith("_") else as_text(name))
        anchor = (0.5, -0.5 / height)
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=anchor, frameon=False, handlelength=4)
    return figure


def _lines(runs: Runs, groups: Sequence[Sequence[str]]) -> dict[str, list[list[dict]]]:
    """The logs that each line shows, by its name in the legend, in the order of the runs."""
    group_of = {name: group for group in groups for name in group}
    lines = {}
    for name in runs:
        group = group_of.get(name, [name])
        label = name if len(group) == 1 else f"{braced(group)}: mean and range of {len(group)} seeds"
        lines[label] = [runs[member] for member in group]
    return lines


def braced(names: Sequence[str]) -> str:
    """Names that differ in one place as a shell would write them: "run/seed{0,1}/fine-tuning"."""
    prefix = _common_start(names)
    rest = [name[len(prefix) :] for name in names]
    suffix = _common_start([name[::-1] for name in rest])[::-1]
    middles = [name.removesuffix(suffix) for name in rest]
    return f"{prefix}{{{','.join(middles)}}}{suffix}"


def _common_start(names: Sequence[str]) -> str:
    """What all names begin with, without digits at its end, which may be part of a number."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("0123456789")


def _draw_panel(axes: Axes, panel: Panel, lines: dict[str, list[list[dict]]]) -> None:
    all_values = []
    for number, logs in enumerate(lines.values()):
        if points := _points(logs, panel.key):
            epochs, values = list(points), list(points.values())
            means = [sum(several) / len(several) for several in values]
            style = line_style(number)
            every = math.ceil(len(epochs) / MARKERS_PER_LINE)
            # A line at the end of the axis keeps its whole width: not clipped, and in front of the axis (2.5).
            axes.plot(epochs, means, **style, markevery=every, clip_on=False, zorder=3)
            if len(logs) > 1:
                lowest, highest = list(map(min, values)), list(map(max, values))
                axes.fill_between(epochs, lowest, highest, color=style["color"], alpha=0.2, linewidth=0)
            all_values += [value for several in values for value in several]
    _scale(axes, panel, all_values)
    axes.set_title(panel.title, fontsize=10, pad=17 if panel.hint else 6)
    axes.text(0.5, 1.03, panel.hint, transform=axes.transAxes, ha="center", fontsize=8, color="0.3")
    axes.set_xlabel("epoch, from 0")
    axes.set_ylabel(panel.unit, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color=FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(axes: Axes, panel: Panel, values: list[float]) -> None:
    """The scale and limits of the value axis, and what there is to compare with."""
    if panel.log and min(values) > 0 and max(values) >= SPREAD * min(values):
        axes.set_yscale("log")
        is_wide = max(values) >= SPREAD**2 * min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if panel.line is not None:
        axes.axhline(panel.line, color=INK, linewidth=1, zorder=1.5)
    if panel.from_zero and min(values) >= 0:
        least = 1.0 if panel.key == "mask_mean" else 1.5 * panel.good[0] if panel.good else 0.0
        axes.set_ylim(0, max(least, 1.1 * max(values)) or 1)
    if panel.good is not None:
        bottom, top = axes.get_ylim()
        axes.axhspan(panel.good[0], min(panel.good[1], top), color="0.9", linewidth=0, zorder=0)
        axes.set_ylim(bottom, top)


def _points(logs: Sequence[list[dict]], key: str) -> dict[int, list[float]]:
    """The values of all logs at each epoch in which all of them have a finite one that axes can show."""
    by_log = []
    for log in logs:
        pairs = [(line["epoch"], _value(line, key)) for line in log]
        by_log.append({epoch: float(value) for epoch, value in pairs if value is not None and abs(value) < LARGEST})
    epochs = sorted(set.intersection(*map(set, by_log)))
    return {epoch: [values[epoch] for values in by_log] for epoch in epochs}


def _value(line: dict, key: str) -> float | None:
    """A quantity of a line of the log. Without masks the training loss is a cross-entropy, and no other objective."""
    is_plain = line.get("train_cross_entropy", line.get("train_loss")) == line.get("train_loss")
    if is_plain and key in ("train_loss", "train_cross_entropy"):
        key = "train_loss" if key == "train_cross_entropy" else ""
    value = line.get(key)
    return value if isinstance(value, (int, float)) else None


def line_style(number: int) -> dict[str, object]:
    """Colour, style and marker of a run's line; no two of the first 140 runs share all three."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4.5,
        "linewidth": 1.5,
    }
