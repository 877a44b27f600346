"""The label-efficiency figure of utils.probe: a score by the number of training images of each class."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from utils.results.curves import line_style
from utils.results.figures import FAINT, as_text, in_lines

NAME_WIDTH = 60  # characters of a line of the legend


class Curve(NamedTuple):
    """The scores of one backbone under one probe: (shots, draws) few-shot scores, and that of all training images."""

    name: str
    draws: np.ndarray
    full: float


def label_efficiency(panels: dict[str, list[Curve]], shots: Sequence[int], mean_images: float, score: str) -> Figure:
    """One panel per probe: the mean over the draws, a band from the lowest to the highest, and `all` at the right.

    panels: the curves by the probe's title, in the same order; shots: ascending; mean_images: training images per
    class, on average; score: the label of the axis.
    """
    figure = Figure(figsize=(3.6 * len(panels), 3.4))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    last = max(mean_images, 1.6 * shots[-1])  # `all` keeps a distance from the last number, for its label
    places = [*shots, last]
    for panel, (title, curves) in zip(axes, panels.items(), strict=True):
        for number, curve in enumerate(curves):
            style = line_style(number)
            values = [*curve.draws.mean(1), curve.full]
            panel.plot(places, values, **style, clip_on=False, zorder=3)
            panel.fill_between(
                shots, curve.draws.min(1), curve.draws.max(1), color=style["color"], alpha=0.2, linewidth=0
            )
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator(places))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticks(places, [*map(str, shots), "all"])
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("training images per class")
        panel.grid(color=FAINT)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(as_text(score))
    names = [in_lines(curve.name, NAME_WIDTH) for curve in next(iter(panels.values()))]
    names = [f" {name}" if name.startswith("_") else name for name in names]  # matplotlib 3.9 leaves others out
    legend = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "frameon": False, "handlelength": 4}
    figure.legend(
        axes[0].lines, names, title="mean of the draws; shaded: lowest to highest", title_fontsize=9, **legend
    )
    figure.tight_layout()
    return figure
