"""The files of an audit: tables of images and duplicates, a page with thumbnails, and the list for --exclude."""

import csv
import io
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from utils.audit.report import Section, kept_sentences
from utils.audit.rule import REASONS, STAYS, Census, evaluated_split
from utils.data.images import read_image
from utils.results import templates as html
from utils.runtime.errors import UserError
from utils.runtime.text import as_cell, printable

SHOWN_GROUPS, SHOWN_IMAGES, SHOWN_BLANK = 40, 8, 16  # with thumbnails
SIDE = 120  # pixels of a thumbnail

RULE = """\
# Images to leave out: give this file to the training scripts as --exclude. A line is an image, relative to --data-path.
# What cannot be read goes, and what is blank. Images of the very same pixels that bear different labels all go, since
# nobody can tell which is right; of those of one label in one split the first by name stays. An image of val goes that
# is a copy of one of test, and one of train that is a copy of one of test or of val that stays: directly, not by a
# chain of copies. Near copies within a split all stay, whatever their labels: neighbouring slices may be such.
# A class that this would leave without an image in a split keeps all of its images there that can be read.
"""
RULE_OF_EVALUATION = """\
# But of {fixed}, the evaluated split, all that can be read stays, so that figures compare with those of others; images
# of the other splits that have the very same pixels as one of {fixed} go, whatever their labels.
"""


def images_csv(census: Census) -> memoryview:
    """A line for each image."""
    levels = np.sqrt(np.maximum(census.records["square"] - census.records["mean"] ** 2, 0))[:, 3]

    def rows() -> Iterable[list[Any]]:
        yield [
            *("split", "class", "path", "width", "height", "format", "mode", "gray", "mean", "std", "blank", "group"),
            *("left_out", "unreadable"),
        ]
        for index, record in enumerate(census.records):
            yield [
                *_place(census, index),
                *(record["width"], record["height"], record["format"].decode(), record["mode"].decode()),
                *(int(record["gray"]), f"{record['mean'][3]:.3f}", f"{levels[index]:.3f}", int(census.blank[index])),
                census.group[index] if census.group[index] >= 0 else "",
                *(_reason(census, index), census.bad.get(index, "")),
            ]

    return _table(rows())


def duplicates_csv(census: Census) -> memoryview:
    """A line for each image of a group; its distance is that to the group's first image, in bits."""

    def rows() -> Iterable[list[Any]]:
        head = ("group", "kind", "across_splits", "across_classes", "distance", "split", "class", "path", "pixels")
        yield [*head, "left_out"]
        for number, group in enumerate(census.groups):
            kind = "exact" if census.is_exact(group) else "near"
            crosses = map(int, census.crosses(group))
            of_group = [number, kind, *crosses]
            for index, distance in zip(group, census.distances(group), strict=True):
                pixels = census.records["pixels"][index].tobytes().hex()
                yield [*of_group, distance, *_place(census, index), pixels, _reason(census, index)]

    return _table(rows())


def _place(census: Census, index: int) -> tuple[str, str, str]:
    return census.splits[census.split[index]], census.classes[census.label[index]], census.name(index)


def _reason(census: Census, index: int) -> str:
    return "" if census.reason[index] == STAYS else REASONS[census.reason[index]]


def _table(rows: Iterable[list[Any]]) -> memoryview:
    buffer = io.BytesIO()
    text = io.TextIOWrapper(buffer, "utf-8", errors="backslashreplace", newline="")
    csv.writer(text).writerows(map(as_cell, row) for row in rows)
    text.flush()
    text.detach()
    return buffer.getbuffer()


def exclude_list(census: Census, searched: str) -> bytes:
    """The lines of --exclude, a heading above those of each reason; names that hold a line break cannot be listed."""
    fixed = evaluated_split(census.splits)
    parts = [RULE, RULE_OF_EVALUATION.format(fixed=fixed) if fixed else ""]
    lines = [line for text in (searched, *kept_sentences(census)) for line in textwrap.wrap(text, 117)]
    parts += [f"# {line}\n" for line in lines]
    for reason, heading in enumerate(REASONS):
        names = [census.name(index) for index in np.flatnonzero(census.reason == reason)] if reason != STAYS else []
        listed = [name for name in names if "\n" not in name]
        if names:
            parts.append(f"\n# {heading}: {len(listed)}\n" + "".join(f"{name}\n" for name in listed))
        if len(listed) < len(names):
            parts.append(f"# and {len(names) - len(listed)} whose names hold a line break: rename them\n")
    return "".join(parts).encode(errors="surrogateescape")


def page(heading: str, content: list[Section], census: Census, upper_8_bits: bool) -> bytes:
    """report.html: the sections, and thumbnails of the worst groups and of blank images."""
    groups = [_shown(census, number, upper_8_bits) for number in range(min(SHOWN_GROUPS, len(census.groups)))]
    blank = [_thumbnail(census, index, upper_8_bits) for index in np.flatnonzero(census.blank)[:SHOWN_BLANK]]
    return html.render(
        "audit.html",
        heading=printable(heading),
        sections=[_printable(section) for section in content],
        groups=groups,
        all_groups=len(census.groups),
        blank=blank,
    )


def _printable(section: Section) -> Section:
    rows = [[printable(cell) if isinstance(cell, str) else cell for cell in row] for row in section.rows]
    return section._replace(sentences=list(map(printable, section.sentences)), rows=rows)


def _shown(census: Census, number: int, upper_8_bits: bool) -> dict[str, Any]:
    group = census.groups[number]
    crosses = [word for word, crossed in zip(("splits", "classes"), census.crosses(group), strict=True) if crossed]
    return {
        "number": number,
        "size": len(group),
        "kind": "the same pixels" if census.is_exact(group) else "near",
        "where": f"across {' and '.join(crosses)}" if crosses else "within one class of one split",
        "images": [
            {
                **_thumbnail(census, index, upper_8_bits),
                "distance": int(distance),
                "left_out": _reason(census, index),
            }
            for index, distance in zip(group[:SHOWN_IMAGES], census.distances(group[:SHOWN_IMAGES]), strict=True)
        ],
    }


def _thumbnail(census: Census, index: int, upper_8_bits: bool) -> dict[str, str]:
    """A small picture, none if the file has gone since, and its name."""
    try:
        image = read_image(Path(census.path(index)), upper_8_bits=upper_8_bits)
    except UserError:
        return {"name": printable(census.name(index)), "picture": ""}
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return {"name": printable(census.name(index)), "picture": html.data_uri(buffer.getvalue(), "image/jpeg")}
