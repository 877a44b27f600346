"""The mask gallery, drawn from plain arrays: a row per image, a column per step from the image to the masked image."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from utils.results.figures import INK, as_text, in_lines

SIDE, GAP, STAGE_GAP = 1.25, 0.08, 0.3  # inches: a picture, the space between two, and between two stages
SCALES = {  # labels of the colour bars by kind of picture; images have none
    "means": r"means of the cells, $\alpha$ / ($\alpha$ + $\beta$)",
    "cells": "sampled cells",
    "mask": "smooth mask",
}


class Column(NamedTuple):
    """A column of the gallery. stage: the heading above neighbouring columns; kind: "image", or a key of SCALES."""

    stage: str
    title: str
    kind: str


class Row(NamedTuple):
    """An image's row. pictures: float arrays, one per column: images (S, S, 3) and means and cells (G, G) in [0, 1],
    and masks (S, S).
    """

    name: str
    pictures: Sequence[np.ndarray]


def draw_gallery(columns: Sequence[Column], rows: Sequence[Row], title: str, mask_middle: float = 0.5) -> Figure:
    """Draw the gallery. Pictures of one kind share a colour scale: 0 to 1 for cells, else symmetric about a middle.

    mask_middle: the middle of the masks' range; for the means it is 0.5. Masks and means differ so little from the
    middle that they would use only a tenth of a scale from 0 to 1.
    """
    norms = {}
    for kind in SCALES:
        if any(column.kind == kind for column in columns):
            norms[kind] = _norm(kind, columns, rows, mask_middle if kind == "mask" else 0.5)
    lefts = [0.0]  # the left edge of each column, inches
    for previous, column in itertools.pairwise(columns):
        lefts.append(lefts[-1] + SIDE + (GAP if column.stage == previous.stage else STAGE_GAP))
    width, height = lefts[-1] + SIDE, len(rows) * (SIDE + GAP)
    figure = Figure(figsize=(width, height))  # the pictures; the labels around them widen the figure
    for number, row in enumerate(rows):
        bottom = height - (number + 1) * (SIDE + GAP)
        for left, column, picture in zip(lefts, columns, row.pictures, strict=True):
            axes = figure.add_axes((left / width, bottom / height, SIDE / width, SIDE / height))
            if column.kind == "image":
                axes.imshow(picture.clip(0, 1))
            else:
                axes.imshow(picture, "cividis", norms[column.kind], interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if number == 0:
                axes.set_title(column.title, fontsize=8.5, color=INK)
        figure.axes[-len(columns)].set_ylabel(in_lines(row.name, 16), fontsize=8, rotation=0, ha="right", va="center")
    for stage in dict.fromkeys(column.stage for column in columns):
        places = [left for left, column in zip(lefts, columns, strict=True) if column.stage == stage]
        centre = (places[0] + places[-1] + SIDE) / 2
        figure.text(centre / width, 1 + 0.38 / height, stage, ha="center", weight="bold", color=INK)
    figure.text(0.5, 1 + 0.7 / height, as_text(title), ha="center", fontsize=12, color=INK)
    _draw_bars(figure, norms, width, height)
    return figure


def _norm(kind: str, columns: Sequence[Column], rows: Sequence[Row], middle: float) -> Normalize:
    if kind == "cells":
        return Normalize(0, 1)
    reach = 0.01
    for row in rows:
        for column, picture in zip(columns, row.pictures, strict=True):
            if column.kind == kind:
                reach = max(reach, float(np.abs(picture - middle).max()))
    return Normalize(middle - reach, middle + reach)


def _draw_bars(figure: Figure, norms: dict[str, Normalize], width: float, height: float) -> None:
    """One colour bar per kind of picture, side by side below the gallery."""
    length, between = 2.0, 0.8  # inches
    for number, (kind, norm) in enumerate(norms.items()):
        left = number * (length + between)
        axes = figure.add_axes((left / width, -0.3 / height, length / width, 0.12 / height))
        colours = matplotlib.cm.ScalarMappable(norm, "cividis")
        bar = figure.colorbar(colours, cax=axes, orientation="horizontal", label=SCALES[kind])
        ticks = (norm.vmin, (norm.vmin + norm.vmax) / 2, norm.vmax)
        bar.set_ticks(ticks, labels=[f"{value:.2f}" for value in ticks])
