"""The files of an audit: tables of images and duplicates, a page with thumbnails, and the list for --exclude."""

import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from utils.audit.findings import Finding
from utils.audit.report import BLANK, NONE, Section, kept_sentences
from utils.audit.rule import REASONS, STAYS, Census, evaluated_split
from utils.data.images import read_image
from utils.results.templates import data_uri, render
from utils.runtime.errors import UserError
from utils.runtime.text import csv_table, printable

SHOWN_GROUPS, SHOWN_IMAGES, SHOWN_BLANK = 40, 8, 16  # with thumbnails
OPEN_GROUPS = 5  # before the disclosure of the others
SIDE = 120  # pixels of a thumbnail

RULE = """\
# Images to leave out: give this file to the training scripts as --exclude. A line is an image, relative to --data-path.
# Unreadable and blank images are left out. Images with identical pixels and different labels are all left out, because
# nobody knows which label is right; of those with the same label in one split, the first by name stays. An image of val
# is left out if it is a copy of a test image, and an image of train if it is a copy of an image of test or of a
# remaining one of val; only direct copies count, not chains of them. Near copies within a split stay, whatever their
# labels, because neighbouring slices are near copies. A class that would have no image in a split keeps its readable
# images there.
"""
RULE_OF_EVALUATION = """\
# The evaluated split, {fixed}, keeps all readable images, so that results compare with those of others. Images of other
# splits with the same pixels as one of {fixed} are left out, whatever their labels.
"""
IMAGES_HEAD = "split,class,path,width,height,format,mode,gray,mean,std,blank,group,left_out,unreadable\n"
DUPLICATES_HEAD = "group,kind,across_splits,across_classes,correlation,split,class,path,pixels,left_out\n"


def images_csv(census: Census) -> bytes:
    """images.csv: one row per image."""
    mean, square = census.records["mean"][:, 3], census.records["square"][:, 3]  # of the grey levels
    std = np.sqrt(np.maximum(square - mean**2, 0))
    rows = (
        [
            *_place(census, index),
            record["width"],
            record["height"],
            record["format"].decode(),
            record["mode"].decode(),
            int(record["gray"]),
            f"{mean[index]:.3f}",
            f"{std[index]:.3f}",
            int(census.blank[index]),
            "" if census.group[index] < 0 else census.group[index],
            _reason(census, index),
            census.errors[index],
        ]
        for index, record in enumerate(census.records)
    )
    return (IMAGES_HEAD + csv_table(rows)).encode(errors="backslashreplace")


def duplicates_csv(census: Census) -> bytes:
    """duplicates.csv: one row per image of a group, with its correlation with the first image of the group."""
    rows = []
    for number, group in enumerate(census.groups):
        kind = "exact" if census.is_exact(group) else "near"
        across_splits, across_classes = map(int, census.crosses(group))
        for index, correlation in zip(group, census.correlations(group), strict=True):
            pixels = census.records["pixels"][index].tobytes().hex()
            place, reason = _place(census, index), _reason(census, index)
            rows.append([number, kind, across_splits, across_classes, f"{correlation:.4f}", *place, pixels, reason])
    return (DUPLICATES_HEAD + csv_table(rows)).encode(errors="backslashreplace")


def _place(census: Census, index: int) -> tuple[str, str, str]:
    return census.splits[census.split[index]], census.classes[census.label[index]], census.name(index)


def _reason(census: Census, index: int) -> str:
    return "" if census.reason[index] == STAYS else REASONS[census.reason[index]]


def exclude_list(census: Census, search: str) -> bytes:
    """The list for --exclude, with a heading for each reason; names with a line break cannot be listed."""
    fixed = evaluated_split(census.splits)
    parts = [RULE, RULE_OF_EVALUATION.format(fixed=fixed) if fixed else ""]
    for sentence in (search, *kept_sentences(census)):
        parts += [f"# {line}\n" for line in textwrap.wrap(sentence, 117)]
    for reason, heading in enumerate(REASONS):
        if reason == STAYS:
            continue
        names = [census.name(index) for index in np.flatnonzero(census.reason == reason)]
        listed = [name for name in names if "\n" not in name]
        if names:
            parts.append(f"\n# {heading}: {len(listed)}\n")
        parts += [f"{name}\n" for name in listed]
        if len(listed) < len(names):
            parts.append(f"# and {len(names) - len(listed)} with a line break in the name: rename them\n")
    return "".join(parts).encode(errors="surrogateescape")


def page(heading: str, findings: list[Finding], content: list[Section], census: Census, upper_8_bits: bool) -> bytes:
    """report.html: the findings, thumbnails of the worst groups and of blank images, and the sections."""
    return render(
        "audit.html",
        heading=printable(heading),
        findings=[finding._replace(sentence=printable(finding.sentence)) for finding in findings],
        sections=[_printable(section) for section in content if section.title != BLANK and section.sentences != NONE],
        groups=[_shown_group(census, number, upper_8_bits) for number in range(len(census.groups))[:SHOWN_GROUPS]],
        all_groups=len(census.groups),
        open_groups=OPEN_GROUPS,
        blank=[_thumbnail(census, index, upper_8_bits) for index in np.flatnonzero(census.blank)[:SHOWN_BLANK]],
        all_blank=int(census.blank.sum()),
    )


def _printable(section: Section) -> Section:
    rows = [[printable(cell) if isinstance(cell, str) else cell for cell in row] for row in section.rows]
    return section._replace(sentences=list(map(printable, section.sentences)), rows=rows)


def _shown_group(census: Census, number: int, upper_8_bits: bool) -> dict[str, Any]:
    group = census.groups[number]
    crosses = [word for word, crossed in zip(("splits", "classes"), census.crosses(group), strict=True) if crossed]
    images = []
    for index, correlation in zip(group[:SHOWN_IMAGES], census.correlations(group[:SHOWN_IMAGES]), strict=True):
        thumbnail = _thumbnail(census, index, upper_8_bits)
        images.append(thumbnail | {"correlation": f"{correlation:.3f}", "left_out": _reason(census, index)})
    return {
        "number": number,
        "size": len(group),
        "kind": "the same pixels" if census.is_exact(group) else "near",
        "where": f"across {' and '.join(crosses)}" if crosses else "within one class of one split",
        "images": images,
    }


def _thumbnail(census: Census, index: int, upper_8_bits: bool) -> dict[str, str]:
    """Name and thumbnail of an image; the thumbnail is empty if the file can no longer be read."""
    try:
        image = read_image(Path(census.path(index)), upper_8_bits=upper_8_bits)
    except UserError:
        return {"name": printable(census.name(index)), "picture": ""}
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return {"name": printable(census.name(index)), "picture": data_uri(buffer.getvalue(), "image/jpeg")}
