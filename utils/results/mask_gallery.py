"""The mask gallery, drawn from plain arrays: a block per stage of training, with a row per image."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from utils.results.figures import INK, as_text, in_lines

SIDE, GAP = 1.6, 0.08  # inches: a picture, and the space between two
HEAD, ROOM = 0.75, 0.3  # inches: above a block for its headings, and between two blocks
NAME_WIDTH = 14  # characters per line of an image's name


class Column(NamedTuple):
    """A column: the field of Row that it shows, its heading, and its colours; None for images in their own colours."""

    field: str
    heading: str
    colours: str | None
    scale: str = ""  # label of the colour bar
    tick: str = "{:.2f}"
    least: float = 0.01  # least distance from the middle of the scale to its ends


COLUMNS = (
    Column("image", "image", None),
    Column("prior", "prior's means", "cividis", r"$\alpha$ / ($\alpha$ + $\beta$)"),
    Column("difference", "image's means\n$-$ prior's means", "PuOr", "difference", "{:+.3f}", 0.001),
    Column("mask", "sampled mask", "cividis", "mask"),
    Column("masked", r"image $\times$ mask", None),
)


class Row(NamedTuple):
    """The pictures of an image, or only the prior's: float arrays.

    image, masked: (S, S, 3) in [0, 1]; mask: (S, S). prior: means of the running prior's cells, (G, G); difference: the
    means of the image's own cells minus the prior's, (G, G).
    """

    name: str
    prior: np.ndarray
    image: np.ndarray | None = None
    difference: np.ndarray | None = None
    mask: np.ndarray | None = None
    masked: np.ndarray | None = None


def draw_gallery(blocks: dict[str, Sequence[Row]], title: str, mask_middle: float = 0.5) -> Figure:
    """Draw the gallery. blocks: the rows by stage of training.

    The pictures of a column share a colour scale, symmetric about a middle: 0.5 for means, 0 for differences, and
    mask_middle, the middle of the masks' range. They differ so little from it that they would use only a small part of
    the whole range.
    """
    width = len(COLUMNS) * (SIDE + GAP) - GAP
    height = sum(HEAD + len(rows) * (SIDE + GAP) for rows in blocks.values()) + (len(blocks) - 1) * ROOM
    figure = Figure(figsize=(width, height))  # the pictures; the labels around them widen the figure
    every_row = [row for rows in blocks.values() for row in rows]
    norms = [_norm(column, every_row, mask_middle) for column in COLUMNS]
    top = height
    for stage, rows in blocks.items():
        figure.text(0, (top - 0.2) / height, stage, weight="bold", fontsize=11, color=INK)
        top -= HEAD
        for number, row in enumerate(rows):
            top -= SIDE + GAP
            for place, (column, norm) in enumerate(zip(COLUMNS, norms, strict=True)):
                picture = getattr(row, column.field)
                if picture is not None:
                    left = place * (SIDE + GAP)
                    axes = figure.add_axes((left / width, top / height, SIDE / width, SIDE / height))
                    _draw_picture(axes, picture, column, norm)
                    if number == 0:
                        axes.set_title(column.heading, fontsize=10, color=INK)
                    if place == 0:
                        name = in_lines(row.name, NAME_WIDTH)
                        axes.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
        top -= ROOM
    figure.text(0, 1 + 0.2 / height, as_text(title), fontsize=12, color=INK)
    _draw_bars(figure, norms, width, height)
    return figure


def _draw_picture(axes: Axes, picture: np.ndarray, column: Column, norm: Normalize | None) -> None:
    if norm is None:
        axes.imshow(picture.clip(0, 1))
    else:
        axes.imshow(picture, column.colours, norm, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _norm(column: Column, rows: Sequence[Row], mask_middle: float) -> Normalize | None:
    if column.colours is None:
        return None
    middle = {"prior": 0.5, "difference": 0.0, "mask": mask_middle}[column.field]
    pictures = [getattr(row, column.field) for row in rows]
    reaches = [float(np.abs(picture - middle).max()) for picture in pictures if picture is not None]
    reach = max([column.least, *reaches])
    return Normalize(middle - reach, middle + reach)


def _draw_bars(figure: Figure, norms: Sequence[Normalize | None], width: float, height: float) -> None:
    """A colour bar below each column that has a scale."""
    for place, (column, norm) in enumerate(zip(COLUMNS, norms, strict=True)):
        if norm is not None:
            left = place * (SIDE + GAP) + 0.15 * SIDE
            axes = figure.add_axes((left / width, -0.2 / height, 0.7 * SIDE / width, 0.12 / height))
            colours = matplotlib.cm.ScalarMappable(norm, column.colours)
            bar = figure.colorbar(colours, cax=axes, orientation="horizontal", label=column.scale)
            ticks = (norm.vmin, (norm.vmin + norm.vmax) / 2, norm.vmax)
            labels = [column.tick.format(value) if value else "0" for value in ticks]
            bar.set_ticks(ticks, labels=[label.replace("-", "\N{MINUS SIGN}") for label in labels], size=8)
