"""All images of an audit in flat arrays, their groups of copies, and the rule for which images to leave out."""

import os
from collections import Counter
from dataclasses import dataclass

import numpy as np

from utils.audit.duplicates import correlations, equal_groups, near_groups, near_pairs, unique_rows
from utils.choices import SPLITS
from utils.data.folders import ImageFiles

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
    """All N images, one split after the other. An array has one entry per image."""

    splits: list[str]
    files: list[ImageFiles]  # one per split
    classes: list[str]
    split: np.ndarray  # uint8 index into splits
    label: np.ndarray  # int32 index into classes
    records: np.ndarray  # images.RECORD
    errors: list[str]  # why an image is unreadable, or ""
    blank: np.ndarray  # bool
    groups: list[np.ndarray]  # positions of the images of each group
    group: np.ndarray  # int64 index into groups; -1 without a group
    reason: np.ndarray  # uint8 index into REASONS
    kept: np.ndarray  # bool: stays only because its class would have no image in its split

    def name(self, index: int) -> str:
        """<split>/<class>/<image>."""
        split = self.split[index]
        first = int(np.searchsorted(self.split, split))
        return os.path.join(self.splits[split], self.files[split].path_as_text(int(index) - first))

    def path(self, index: int) -> str:
        return os.path.join(self.files[self.split[index]].root.parent, self.name(index))

    def unlisted(self) -> list[int]:
        """Images to leave out with a line break in the name, which a list with one name per line cannot hold."""
        return [index for index in np.flatnonzero(self.reason != STAYS).tolist() if "\n" in self.name(index)]

    def kept_classes(self, readable: bool) -> list[str]:
        """Classes with kept images, such as `train/a (3 images)`; readable: whether these images can be read."""
        kept = np.flatnonzero(self.kept & (self.readable() == readable))
        counts = Counter(zip(self.split[kept].tolist(), self.label[kept].tolist(), strict=True))
        return [
            f"{self.splits[split]}/{self.classes[label]} ({count} {'image' if count == 1 else 'images'})"
            for (split, label), count in sorted(counts.items())
        ]

    def readable(self) -> np.ndarray:
        return self.records["width"] > 0

    def is_exact(self, group: np.ndarray) -> bool:
        """Whether all images of the group have the same pixels."""
        pixels = self.records["pixels"][group]
        return bool((pixels == pixels[0]).all())

    def crosses(self, group: np.ndarray) -> tuple[bool, bool]:
        """Whether the group has images of several splits, and of several classes."""
        return len(np.unique(self.split[group])) > 1, len(np.unique(self.label[group])) > 1

    def correlations(self, group: np.ndarray) -> np.ndarray:
        """Correlation of each image of the group with the first one."""
        descriptors = self.records["descriptor"][group]
        return correlations(descriptors, descriptors[0])


def take_census(
    files: list[ImageFiles], records: np.ndarray, errors: list[str], blank_below: float, correlation: float | None
) -> Census:
    """Find blank images and groups of copies, and apply the rule.

    records, errors: of all splits, in the order of files; blank_below: standard deviation in levels, 0 to 255;
    correlation: from which images are near copies, None for identical pixels only.
    """
    classes = sorted({name for split in files for name in split.classes})
    label = np.concatenate([np.searchsorted(classes, split.classes)[split.targets] for split in files])
    readable = records["width"] > 0
    # Rounding may give variances a little below zero, so squares are compared, not roots.
    blank = readable & ((records["square"] - records["mean"] ** 2).max(axis=1) < blank_below**2)
    census = Census(
        splits=[split.root.name for split in files],
        files=files,
        classes=classes,
        split=np.repeat(np.arange(len(files), dtype=np.uint8), [len(split) for split in files]),
        label=label.astype(np.int32),
        records=records,
        errors=errors,
        blank=blank,
        groups=[],
        group=np.full(len(records), -1),
        reason=np.zeros(len(records), np.uint8),
        kept=np.zeros(len(records), np.bool_),
    )
    compared = np.flatnonzero(readable & ~blank)
    identical = equal_groups(records["pixels"][compared])
    groups = identical if correlation is None else near_groups(records["descriptor"][compared], correlation)
    groups = [_ordered(census, compared[group]) for group in groups]
    census.groups = sorted(groups, key=lambda group: _rank(census, group))
    for number, group in enumerate(census.groups):
        census.group[group] = number
    _apply_rule(census, [compared[group] for group in identical], correlation)
    return census


def evaluated_split(splits: list[str]) -> str | None:
    """The split that stays as published: test, or val without a test split."""
    return next((split for split in reversed(SPLITS[1:]) if split in splits), None)


def _apply_rule(census: Census, identical: list[np.ndarray], correlation: float | None) -> None:
    """Fill in `reason` by the rule of `outputs.RULE`.

    identical: groups of images with identical pixels; correlation: of direct copies, None for identical pixels only.
    """
    fixed = evaluated_split(census.splits)
    evaluated = census.split == (census.splits.index(fixed) if fixed else -1)
    census.reason[census.blank & ~evaluated] = BLANK
    census.reason[~census.readable()] = UNREADABLE
    for group in identical:
        if not evaluated[group].any() and census.crosses(group)[1]:
            census.reason[group] = CONTRADICTING
    for place in (1, 0):  # val before train: train is compared only with what stays of val
        for group in census.groups:
            _leave_out_leaks(census, group, place, correlation)
        _keep_classes(census)
    for group in identical:
        remaining = group[(census.reason[group] == STAYS) & ~evaluated[group]]
        first = np.unique(census.split[remaining], return_index=True)[1]  # one per split
        census.reason[np.delete(remaining, first)] = REPEATED
    _keep_classes(census)


def _leave_out_leaks(census: Census, group: np.ndarray, place: int, correlation: float | None) -> None:
    """Leave out the images of one place (see `_places`) that are copies of images of later places."""
    places = _places(census, group)
    if place >= places.max():
        return
    stays = census.reason[group] == STAYS
    earlier, later = group[stays & (places == place)], group[stays & (places > place)]
    if correlation is None:
        census.reason[earlier] = LEAKING if len(later) else STAYS
        return
    # Each descriptor once: a thousand copies of one image would be compared a million times.
    descriptors = census.records["descriptor"]
    first, inverse = unique_rows(descriptors[earlier])
    later = later[unique_rows(descriptors[later])[0]]
    leaks = np.zeros(len(first), np.bool_)
    for _, positions in near_pairs(descriptors[later], descriptors[earlier[first]], correlation):
        leaks[positions] = True
    census.reason[earlier[leaks[inverse]]] = LEAKING


def _keep_classes(census: Census) -> None:
    """Restore the readable images of a class that would have none in a split, or all if none is readable."""
    key = census.split.astype(np.int64) * len(census.classes) + census.label
    has_image = np.bincount(key, census.reason == STAYS) > 0
    has_readable = np.bincount(key, census.readable()) > 0
    restored = ~has_image[key] & (census.readable() | ~has_readable[key])
    census.reason[restored] = STAYS
    census.kept = (census.kept | restored) & (census.reason == STAYS)


def _places(census: Census, group: np.ndarray) -> np.ndarray:
    """Place of each image of the group: 0 for train (or a folder with another name), 1 for val, 2 for test."""
    place = np.array([SPLITS.index(split) if split in SPLITS else 0 for split in census.splits])
    return place[census.split[group]]


def _ordered(census: Census, group: np.ndarray) -> np.ndarray:
    """The group sorted by split (test, val, train), then by size (largest first), then by name."""
    size = census.records["width"][group].astype(np.int64) * census.records["height"][group]
    return group[np.lexsort((group, -size, -_places(census, group)))]


def _rank(census: Census, group: np.ndarray) -> tuple:
    """Sort key that puts the worst groups first: across splits, across classes, large."""
    across_splits, across_classes = census.crosses(group)
    return not across_splits, not across_classes, -len(group), int(group.min())
