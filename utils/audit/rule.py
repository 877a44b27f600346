"""What an audit goes by: all images of all splits in flat arrays, their groups, and the rule that leaves images out."""

import os
from collections import Counter
from dataclasses import dataclass

import numpy as np

from utils.audit.duplicates import find_groups, near_pairs
from utils.data.folders import SPLITS, ImageFiles

STAYS, UNREADABLE, BLANK, LEAKING, CONTRADICTING, REPEATED = range(6)
REASONS = (
    "stays",
    "cannot be read",
    "blank, or nearly",
    "copy, exact or near, of an image of test or val",
    "same pixels, different labels",
    "same pixels as an image that stays",
)


@dataclass
class Census:
    """N images, split after split; each array has one entry an image, and each group the positions of its images.

    split, label: uint8 and int32 indices into `splits` and `classes`; records: of images.RECORD; bad: why, by
    position; blank: bool; reason: uint8 index into REASONS; group: int64 index into `groups`, -1 in none; kept: bool,
    whether the image stays only because its class would be left without any in its split.
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
    kept: np.ndarray

    def name(self, index: int) -> str:
        """<split>/<class>/<image>."""
        split = self.split[index]
        first = int(np.searchsorted(self.split, split))
        return os.path.join(self.splits[split], self.files[split].path_as_text(int(index) - first))

    def path(self, index: int) -> str:
        return os.path.join(self.files[self.split[index]].root.parent, self.name(index))

    def unlisted(self) -> list[int]:
        """The images to leave out that a list, which has one a line, cannot name."""
        return [index for index in np.flatnonzero(self.reason != STAYS).tolist() if "\n" in self.name(index)]

    def kept_classes(self, readable: bool) -> list[str]:
        """Such as `train/a (3 images)`: the classes that keep images, because these are all that can be read of it.

        readable: False: those of which none can be read, so that all are kept.
        """
        kept = np.flatnonzero(self.kept & (self.readable() == readable))
        counts = Counter(zip(self.split[kept].tolist(), self.label[kept].tolist(), strict=True))
        return [
            f"{self.splits[split]}/{self.classes[label]} ({count} {'image' if count == 1 else 'images'})"
            for (split, label), count in sorted(counts.items())
        ]

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
        kept=np.zeros(len(records), np.bool_),
    )
    compared = np.flatnonzero(readable & ~blank)
    field = "pixels" if distance is None else "likeness"
    found = [compared[group] for group in find_groups(records[field][compared], distance or 0)]
    census.groups = sorted((_in_order(census, group) for group in found), key=lambda group: _rank(census, group))
    for number, group in enumerate(census.groups):
        census.group[group] = number
    alike = [compared[group] for group in find_groups(records["pixels"][compared], 0)]
    _apply_rule(census, alike, records[field], distance or 0)
    return census


def evaluated_split(splits: list[str]) -> str | None:
    """The split that stays as it was published: test, or val where there is no test."""
    return next((split for split in reversed(SPLITS[1:]) if split in splits), None)


def _apply_rule(census: Census, alike: list[np.ndarray], hashes: np.ndarray, distance: int) -> None:
    """Fill in `reason`; alike: the groups of images of the very same pixels; hashes: (N, W) uint64.

    Images of the evaluated split stay, whatever they hold, so that figures compare with those of others; only what
    cannot be read goes. Of the other splits goes what is blank. Images of the very same pixels that bear different
    labels all go, unless one is of the evaluated split, since nobody can tell which is right. Copies leak: one of val
    goes whose hash differs in at most `distance` bits from that of an image of test, and one of train so near to an
    image of test or of val that stays; directly, whatever chains a group consists of. Of images of the very same
    pixels that are left in one split, the first stays. Near copies within a split all stay: neighbouring slices are.
    A class that would be left without an image in a split keeps those that can be read, or all if none can.
    """
    fixed = evaluated_split(census.splits)
    evaluated = census.split == (census.splits.index(fixed) if fixed else -1)
    census.reason[census.blank & ~evaluated] = BLANK
    census.reason[~census.readable()] = UNREADABLE
    for group in alike:
        if not evaluated[group].any() and census.crosses(group)[1]:
            census.reason[group] = CONTRADICTING
    for place in (1, 0):  # val before train: only what stays of val counts as evaluated
        for group in census.groups:
            _leave_out_leaks(census, group, place, hashes, distance)
        _keep_classes(census)
    for group in alike:
        left = group[(census.reason[group] == STAYS) & ~evaluated[group]]
        first = np.unique(census.split[left], return_index=True)[1]  # of each split
        census.reason[np.delete(left, first)] = REPEATED
    _keep_classes(census)


def _leave_out_leaks(census: Census, group: np.ndarray, place: int, hashes: np.ndarray, distance: int) -> None:
    """Of a group's images, those of one place (of `_places`) that are copies of images of later places."""
    places = _places(census, group)
    if place >= places.max():
        return
    stays = census.reason[group] == STAYS
    mine, later = group[stays & (places == place)], group[stays & (places > place)]
    # Each hash once, since a thousand copies of one image would be compared a million times.
    unique, inverse = np.unique(hashes[mine], axis=0, return_inverse=True)
    leaks = np.zeros(len(unique), np.bool_)
    for _, found in near_pairs(np.unique(hashes[later], axis=0), unique, distance):
        leaks[found] = True
    census.reason[mine[leaks[inverse.ravel()]]] = LEAKING


def _keep_classes(census: Census) -> None:
    """Take back what leaves a class without an image in a split; see `_apply_rule`."""
    key = census.split.astype(np.int64) * len(census.classes) + census.label
    stays, readable = (np.bincount(key, mask) > 0 for mask in (census.reason == STAYS, census.readable()))
    back = ~stays[key] & (census.readable() | ~readable[key])
    census.reason[back] = STAYS
    census.kept = (census.kept | back) & (census.reason == STAYS)


def _places(census: Census, group: np.ndarray) -> np.ndarray:
    """Of each of its images: 0 for train (or a folder of another name), 1 for val, 2 for test."""
    place = np.array([SPLITS.index(split) if split in SPLITS else 0 for split in census.splits])
    return place[census.split[group]]


def _in_order(census: Census, group: np.ndarray) -> np.ndarray:
    """The group's images: those of test first, then of val, of many pixels, of a name that comes first."""
    size = census.records["width"][group].astype(np.int64) * census.records["height"][group]
    return group[np.lexsort((group, -size, -_places(census, group)))]


def _rank(census: Census, group: np.ndarray) -> tuple:
    """The worst first: across splits, across classes, of many images."""
    across_splits, across_classes = census.crosses(group)
    return not across_splits, not across_classes, -len(group), int(group.min())
