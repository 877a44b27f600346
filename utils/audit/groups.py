"""Groups of images, such as patients, from a table: those that stand in several splits."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.audit.findings import NOTE, PROBLEM, Finding
from utils.audit.report import SHOWN_NAMES, Section
from utils.data.folders import ImageFiles
from utils.data.tables import IMAGE_COLUMNS, Table
from utils.runtime.errors import UserError
from utils.runtime.text import count, list_names


@dataclass
class Groups:
    """The groups of a set of images; counts: (G, S) images of each group in each split."""

    names: list[str]
    splits: list[str]
    counts: np.ndarray
    without: int  # images without a group

    def shared(self) -> np.ndarray:
        """The groups with images in several splits."""
        return np.flatnonzero((self.counts > 0).sum(axis=1) > 1)


def read_groups(path: Path, column: str, files: Sequence[ImageFiles]) -> Groups:
    """The groups of a table with paths <split>/<class>/<image>; files: one set of images per split.

    Raises UserError for an unreadable table, for two groups of one image, and if no image has a group.
    """
    table = Table(path)
    columns = [
        table.column(None, "--groups", IMAGE_COLUMNS, "the path of an image"),
        table.column(column, "--group-column", (), ""),
    ]
    group_of: dict[str, str] = {}
    for line, (image, group) in table.cells(columns):
        if group.strip() and group_of.setdefault(os.path.normpath(image), group.strip()) != group.strip():
            raise UserError(f"{path}, line {line}: {image!r} has another group in an earlier line; keep one.")
    images = [os.path.join(split.root.name, split.path_as_text(n)) for split in files for n in range(len(split))]
    group_of_image = [group_of.get(image) for image in images]
    names = sorted({group for group in group_of_image if group is not None})
    if not names:
        example = f", but it has {next(iter(group_of))!r}" if group_of else ""
        raise UserError(
            f"{path}: has no group for any image; expected paths such as {images[0]!r} in {columns[0]!r}{example}."
        )
    position = {name: number for number, name in enumerate(names)}
    number = np.array([-1 if group is None else position[group] for group in group_of_image])
    split = np.repeat(np.arange(len(files)), [len(split) for split in files])
    counts = np.zeros((len(names), len(files)), np.int64)
    np.add.at(counts, (number[number >= 0], split[number >= 0]), 1)
    return Groups(names, [split.root.name for split in files], counts, int((number < 0).sum()))


def group_findings(groups: Groups) -> list[Finding]:
    """Groups in several splits, and images without a group."""
    result, shared = [], groups.shared()
    if len(shared):
        verb = "is" if len(shared) == 1 else "are"
        images = count(int(groups.counts[shared].sum()), "image")
        names = list_names([groups.names[number] for number in shared])
        sentence = (
            f"{count(len(shared), 'group')} of {len(groups.names):,} {verb} in several splits, with {images}: {names}. "
            "Results would be too good: split the images by group."
        )
        result.append(Finding(PROBLEM, sentence))
    else:
        result.append(Finding(NOTE, f"None of {count(len(groups.names), 'group')} is in several splits."))
    if groups.without:
        sentence = f"{count(groups.without, 'image')} without a group in the table: not checked."
        result.append(Finding(NOTE, sentence))
    return result


def group_section(groups: Groups) -> Section:
    """The groups in several splits, those with the most images outside of their largest split first."""
    shared = groups.shared()
    sentences = [
        "Groups of --groups, such as patients. Not the groups of copies above.",
        f"{count(len(groups.names), 'group')} in {count(int(groups.counts.sum()), 'image')}; "
        f"{len(shared):,} in several splits; {count(groups.without, 'image')} without a group.",
    ]
    if len(shared) > SHOWN_NAMES:
        sentences.append(f"The first {SHOWN_NAMES}:")
    counts = groups.counts[shared]
    order = np.lexsort((shared, counts.max(axis=1) - counts.sum(axis=1)))[:SHOWN_NAMES]
    rows = [[groups.names[shared[place]], *map(int, counts[place])] for place in order]
    return Section("Groups across splits", sentences, ["group", *groups.splits] if rows else [], rows)
