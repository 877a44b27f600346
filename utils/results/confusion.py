"""Figures of the predictions for a split: confusion matrix, and the recall of each class, alone or by its frequency."""

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from utils.results.figures import COLOURS, FAINT, figure_title, shorten
from utils.results.intervals import wilson_intervals

MOST_CLASSES_WITH_NUMBERS = 16  # with more classes, cells are too small for numbers
MANY_FOR_THIRDS = 6  # classes from which on means of thirds are drawn
WIDER = 1.02  # factor by which the line of a third is longer on each side, so that one frequency is visible
BAR_ROOM = 0.4  # inches from the matrix to the right edge of its colour bar
BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the box behind a number that a line may cross
SHARES = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)  # ticks of the colour bar
# The darkest colour is for the largest share; the lightest can be told from the white of an empty cell.
SHADES = ListedColormap(matplotlib.colormaps["YlGnBu"](np.linspace(0.12, 1, 256)))


def confusion_matrix(
    targets: Sequence[int], predictions: Sequence[int], classes: Sequence[str], what: str = "", note: str = ""
) -> Figure:
    """Confusion matrix with rows that sum to 1. Cells without images are empty; rows of classes without images grey.

    targets, predictions: (N,) class indices; what: split and weights, for the title; note: a sentence below it. The
    colour scale is that of the square root, which makes small shares visible.
    """
    counts = count_pairs(targets, predictions, len(classes))
    images = counts.sum(axis=1)
    shares = np.divide(counts, images[:, None], where=counts > 0, out=np.full(counts.shape, np.nan))
    many = len(classes) > MOST_CLASSES_WITH_NUMBERS
    names, size = [shorten(name) for name in classes], _label_size(len(classes))
    side = max(2.5, (0.14 if many else 0.5) * len(classes))  # inches
    figure = Figure(figsize=(side + BAR_ROOM, side))  # the matrix and its bar; the names around widen the picture
    axes = figure.add_axes((0, 0, side / (side + BAR_ROOM), 1))
    picture = axes.imshow(shares.astype(np.float32), SHADES, PowerNorm(0.5, 0, 1), interpolation="none")
    for row in np.flatnonzero(images == 0):
        axes.axhspan(row - 0.5, row + 0.5, color=FAINT, linewidth=0)
    axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=size)
    rows = [f"{name} ({number})" for name, number in zip(names, images, strict=True)]
    axes.set_yticks(range(len(classes)), rows, fontsize=size)
    for axis in (axes.xaxis, axes.yaxis):  # lines between the cells
        axis.set_ticks(np.arange(0.5, len(classes) - 1), minor=True)
    axes.grid(which="minor", color=FAINT, linewidth=0.4 if many else 0.8)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class (images)")
    axes.set_title(figure_title("Confusion", images.sum(), what, note))
    if not many:
        for row, column in np.argwhere(counts > 0):
            share = shares[row, column]
            text = f"{share:.2f}".removeprefix("0")
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color="w" if share > 0.35 else "k")
    bar_axes = figure.add_axes(
        ((side + 0.2) / (side + BAR_ROOM), 0.5 - 1.2 / side, 0.18 / (side + BAR_ROOM), 2.4 / side)
    )
    bar = figure.colorbar(picture, cax=bar_axes)
    bar.set_label("share of the true class's images")
    bar.set_ticks(SHARES, labels=[f"{share:.0%}" for share in SHARES])
    return figure


def count_pairs(targets: Sequence[int], predictions: Sequence[int], classes: int) -> np.ndarray:
    """Number of images of class i that were predicted as class j, int64 (C, C)."""
    pairs = np.asarray(targets, dtype=np.int64) * classes + np.asarray(predictions, dtype=np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def per_class_recall(
    targets: Sequence[int], predictions: Sequence[int], classes: Sequence[str], what: str = "", note: str = ""
) -> Figure:
    """Bars of the recall of each class with its number of images, the best on top; classes without images last.

    targets, predictions: (N,) class indices; what: split and weights, for the title; note: a sentence below it.
    """
    counts = count_pairs(targets, predictions, len(classes))
    images, right = counts.sum(axis=1), counts.diagonal()
    recall = np.divide(right, images, where=images > 0, out=np.full(len(classes), np.nan))
    order = np.lexsort((-images, -np.nan_to_num(recall, nan=-1)))
    size = _label_size(len(classes))
    height = max(1.5, (0.14 if len(classes) > MOST_CLASSES_WITH_NUMBERS else 0.3) * len(classes))  # inches
    figure = Figure(figsize=(6, height))  # the bars; the labels around them widen the picture
    axes = figure.add_axes((0, 0, 1, 1))
    places = np.arange(len(classes))
    axes.barh(places, np.nan_to_num(recall[order]), height=0.75, color=COLOURS[0])
    for place, index in zip(places, order, strict=True):
        text = f"{recall[index]:.2f}" if images[index] else "no images"
        axes.text(np.nan_to_num(recall[index]) + 0.008, place, text, va="center", fontsize=size, bbox=BEHIND)
    mean = float(np.nanmean(recall)) if images.any() else math.nan
    axes.axvline(mean, color=COLOURS[1], linestyle="--", zorder=1.5, label=f"mean: balanced accuracy {mean:.3f}")
    axes.set_yticks(places, [f"{shorten(classes[index])} ({images[index]})" for index in order], fontsize=size)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.set_xlim(0, 1.08)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("recall: share of the class's images that were recognised")
    axes.set_ylabel("class (images)")
    axes.set_title(figure_title("Recall of each class", images.sum(), what, note), pad=26)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return figure


def recall_by_frequency(
    targets: Sequence[int],
    predictions: Sequence[int],
    train_images: Sequence[int],
    what: str = "",
    note: str = "",
) -> Figure:
    """Recall of each class with its 95 % interval, over the number of its training images on a logarithmic axis.

    targets, predictions: (N,) class indices; train_images: (C,), for each class; what and note: as in
    `per_class_recall`. Classes without images or training images are left out. With six classes or more, lines show the
    mean recall of the rarest third of the classes, the middle and the most frequent one; classes of equal frequency
    stay together, so that a third may be larger or empty.
    """
    counts, frequency = count_pairs(targets, predictions, len(train_images)), np.asarray(train_images)
    shown = (counts.sum(axis=1) > 0) & (frequency > 0)
    images, right, frequency = counts.sum(axis=1)[shown], counts.diagonal()[shown], frequency[shown]
    recall = right / images
    figure = Figure(figsize=(6, 4))  # the axes; the labels around them widen the picture
    axes = figure.add_axes((0, 0, 1, 1))
    many = len(recall) > MOST_CLASSES_WITH_NUMBERS
    axes.scatter(frequency, recall, 18 if many else 30, COLOURS[0], alpha=0.8, lw=0, zorder=2.5, clip_on=False)
    axes.vlines(frequency, *wilson_intervals(right, images), color=COLOURS[0], lw=1, alpha=0.25 if many else 0.5)
    names = ["a class", "its 95 % interval"]
    if len(recall) >= MANY_FOR_THIRDS and frequency.min() < frequency.max():
        third = np.searchsorted(np.quantile(frequency, (1 / 3, 2 / 3)), frequency)  # equal frequencies: the same one
        groups = [np.flatnonzero(third == number) for number in np.unique(third)]
        means = [recall[group].mean() for group in groups]
        lowest = [frequency[group].min() / WIDER for group in groups]
        highest = [frequency[group].max() * WIDER for group in groups]
        axes.hlines(means, lowest, highest, color=COLOURS[1], lw=2.5, zorder=3)
        names.append(f"mean recall of a third of the classes: {', '.join(f'{mean:.2f}' for mean in means)}")
    axes.set_xscale("log")
    if len(frequency) and frequency.max() < 30 * frequency.min():  # decades would be too few ticks
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1)
    axes.set_xlabel("training images of the class (logarithmic)")
    axes.set_ylabel("recall: share of the class's images that were recognised")
    axes.set_title(figure_title("Recall by class frequency", images.sum(), what, note), pad=26)
    axes.grid(color=FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(axes.collections, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)
    return figure


def _label_size(classes: int) -> float:
    """Font size of the names of the classes, points."""
    return 6.0 if classes > MOST_CLASSES_WITH_NUMBERS else 9.0
