"""What an audit goes by: all images of all splits in flat arrays, their groups, and the rule that leaves images out."""

import os
from dataclasses import dataclass

import numpy as np

from utils.audit.duplicates import find_groups
from utils.folders import SPLITS, ImageFiles

STAYS, UNREADABLE, BLANK, OF_EVALUATION, CONTRADICTING, REPEATED = range(6)
REASONS = (
    "stays",
    "cannot be read",
    "blank, or nearly",
    "copy of an image of the evaluated split",
    "copies that bear different labels",
    "copy of an image that stays",
)


@dataclass
class Census:
    """N images, split after split; each array has one entry an image, and each group the positions of its images.

    split, label: uint8 and int32 indices into `splits` and `classes`; records: of images.RECORD; bad: why, by
    position; blank: bool; reason: uint8 index into REASONS; group: int64 index into `groups`, -1 in none.
    """

    splits: list[str]
    files: list[ImageFiles]
    classes: list[str]
    split: np.ndarray
    label: np.ndarray
    records: np.ndarray
    bad: dict[int, str]
    blank: np.ndarray
    groups: list[np.ndarray]
    group: np.ndarray
    reason: np.ndarray

    def name(self, index: int) -> str:
        """<split>/<class>/<image>."""
        split = self.split[index]
        first = int(np.searchsorted(self.split, split))
        return os.path.join(self.splits[split], self.files[split].path_as_text(int(index) - first))

    def path(self, index: int) -> str:
        return os.path.join(self.files[self.split[index]].root.parent, self.name(index))

    def readable(self) -> np.ndarray:
        return self.records["width"] > 0

    def is_exact(self, group: np.ndarray) -> bool:
        """Whether all of its images have the same pixels."""
        pixels = self.records["pixels"][group]
        return bool((pixels == pixels[0]).all())

    def crosses(self, group: np.ndarray) -> tuple[bool, bool]:
        """Whether its images stand in several splits, and in several classes."""
        return len(np.unique(self.split[group])) > 1, len(np.unique(self.label[group])) > 1

    def distances(self, group: np.ndarray) -> np.ndarray:
        """In how many bits each image's likeness differs from the first one's."""
        likeness = self.records["likeness"][group]
        return np.bitwise_count(likeness ^ likeness[0]).sum(axis=1)


def take_census(
    files: list[ImageFiles], records: np.ndarray, bad: dict[int, str], blank_below: float, distance: int | None
) -> Census:
    """records, bad: of all splits in their order; blank_below: standard deviation in levels of 0..255.

    distance: bits that still count as near; None: only images of the same pixels are duplicates.
    """
    classes = sorted({name for split in files for name in split.classes})
    label = np.concatenate([np.searchsorted(classes, split.classes)[split.targets] for split in files])
    readable = records["width"] > 0
    # Variances of the channels, whose rounding may fall a little below zero.
    blank = readable & ((records["square"] - records["mean"] ** 2).max(axis=1) < blank_below**2)
    census = Census(
        splits=[split.root.name for split in files],
        files=files,
        classes=classes,
        split=np.repeat(np.arange(len(files), dtype=np.uint8), [len(split) for split in files]),
        label=label.astype(np.int32),
        records=records,
        bad=bad,
        blank=blank,
        groups=[],
        group=np.full(len(records), -1),
        reason=np.zeros(len(records), np.uint8),
    )
    compared = np.flatnonzero(readable & ~blank)
    field = "pixels" if distance is None else "likeness"
    found = find_groups(records[field][compared], distance or 0) if len(compared) else []
    census.groups = sorted(
        (_in_order(census, compared[group]) for group in found), key=lambda group: _rank(census, group)
    )
    for number, group in enumerate(census.groups):
        census.group[group] = number
    _apply_rule(census)
    return census


def evaluated_split(splits: list[str]) -> str | None:
    """The split that stays as it was published: test, or val where there is no test."""
    return next((split for split in reversed(SPLITS[1:]) if split in splits), None)


def _apply_rule(census: Census) -> None:
    """Fill in `reason`.

    Images of the evaluated split stay, whatever they hold, so that figures compare with those of others; only what
    cannot be read goes. Of the other splits goes what is blank, and each copy of an evaluated image. Of copies that
    bear different labels all go, since nobody can tell which is right; of others the first one stays, one of val before
    those of train, then one of the most pixels.
    """
    fixed = evaluated_split(census.splits)
    stays = census.split == (census.splits.index(fixed) if fixed else -1)
    census.reason[census.blank & ~stays] = BLANK
    census.reason[~census.readable()] = UNREADABLE
    for group in census.groups:
        free = group[~stays[group]]
        if len(free) < len(group):
            census.reason[free] = OF_EVALUATION
        elif census.crosses(group)[1]:
            census.reason[group] = CONTRADICTING
        else:
            census.reason[group[1:]] = REPEATED


def _in_order(census: Census, group: np.ndarray) -> np.ndarray:
    """The group's images: those of test first, then of val, of many pixels, of a name that comes first."""
    size = census.records["width"][group].astype(np.int64) * census.records["height"][group]
    place = np.array([SPLITS.index(split) if split in SPLITS else 0 for split in census.splits])
    return group[np.lexsort((group, -size, -place[census.split[group]]))]


def _rank(census: Census, group: np.ndarray) -> tuple:
    """The worst first: across splits, across classes, of many images."""
    across_splits, across_classes = census.crosses(group)
    return not across_splits, not across_classes, -len(group), int(group.min())
