"""The findings of an audit: what is wrong with a set of images, what to look at, and which flags to train with."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from utils.audit.rule import STAYS, Census
from utils.runtime.text import count, list_names

PROBLEM, CHECK, NOTE = "Problem", "Check", "Note"  # severities, the worst first
FEW_IMAGES = 10  # of a class in train; below this it can hardly be learned
UNEVEN = 20  # ratio of the largest class to the smallest


class Finding(NamedTuple):
    """severity: PROBLEM, CHECK or NOTE; sentence: with a number."""

    severity: str
    sentence: str


def findings(census: Census, more: Sequence[Finding] = ()) -> list[Finding]:
    """All findings, the worst first; more: from other sources than the images."""
    result = [*_leaks(census), *more, *_labels(census), *_files(census), *_classes(census)]
    if not any(finding.severity == PROBLEM for finding in result):
        result.append(Finding(NOTE, f"No problem in {count(len(census.records), 'image')}."))
    if left_out := int((census.reason != STAYS).sum()):
        sentence = f"{count(left_out, 'image')} to leave out: --exclude-list writes the list, --exclude reads it."
        result.append(Finding(NOTE, sentence))
    readable = census.records[census.readable()]
    if len(readable) and readable["gray"].all():
        result.append(Finding(NOTE, f"All {count(len(readable), 'readable image')} are grey: train with --gray."))
    return sorted(result, key=lambda finding: (PROBLEM, CHECK, NOTE).index(finding.severity))


def leaks(census: Census) -> list[tuple[str, str, int, float]]:
    """For each pair of splits, later and earlier: the images of the later one that share a group with the earlier one.

    Returns the names, the number, and its share of the later split.
    """
    pairs = []
    for later, name in enumerate(census.splits):
        in_later = census.split == later
        for earlier in range(later):
            groups = np.unique(census.group[census.split == earlier])
            leaked = (in_later & np.isin(census.group, groups[groups >= 0])).sum()
            pairs.append((name, census.splits[earlier], int(leaked), float(leaked / in_later.sum())))
    return pairs


def _leaks(census: Census) -> list[Finding]:
    result = []
    for later, earlier, number, share in reversed(leaks(census)):  # test first
        if number:
            copies = "is a copy" if number == 1 else "are copies"
            sentence = (
                f"{count(number, 'image')} of {later} ({share:.2%}) {copies} of images of {earlier}, directly or in a "
                f"chain: results on {later} would be too good."
            )
            result.append(Finding(PROBLEM, sentence))
    return result


def _labels(census: Census) -> list[Finding]:
    """Images with the same pixels: with different labels, and repeated within a class of a split."""
    compared = np.flatnonzero(census.readable() & ~census.blank)
    _, same = np.unique(census.records["pixels"][compared], axis=0, return_inverse=True)
    same, label, split = same.ravel(), census.label[compared].astype(np.int64), census.split[compared]
    labels = np.bincount(np.unique(np.stack([same, label]), axis=1)[0], minlength=same.max(initial=0) + 1)
    result = []
    if contradicting := int((labels[same] > 1).sum()):
        sentence = f"{count(contradicting, 'image')} with the same pixels as an image of another label."
        result.append(Finding(PROBLEM, sentence))
    if repeated := len(same) - np.unique(np.stack([same, label, split]), axis=1).shape[1]:
        verb = "repeats" if repeated == 1 else "repeat"
        sentence = f"{count(repeated, 'image')} {verb} the pixels of another one of the same class and split."
        result.append(Finding(CHECK, sentence))
    return result


def _files(census: Census) -> list[Finding]:
    result = []
    if unreadable := int((~census.readable()).sum()):
        sentence = f"{count(unreadable, 'image')} cannot be read: the training stops there without --bad-images skip."
        result.append(Finding(PROBLEM, sentence))
    if blank := int(census.blank.sum()):
        result.append(Finding(CHECK, f"{count(blank, 'image')} {'is' if blank == 1 else 'are'} blank, or nearly."))
    return result


def _classes(census: Census) -> list[Finding]:
    result = []
    if len(census.classes) == 1:
        result.append(Finding(PROBLEM, f"1 class only, {census.classes[0]}: the training needs two or more."))
    for split, name in enumerate(census.splits):
        numbers = np.bincount(census.label[census.split == split], minlength=len(census.classes))
        if missing := [census.classes[label] for label in np.flatnonzero(numbers == 0)]:
            severity = CHECK if name == "test" else PROBLEM
            sentence = f"{count(len(missing), 'class')} without images in {name}: {list_names(missing)}."
            result.append(Finding(severity, sentence))
        if name != "train":
            continue
        if few := [census.classes[label] for label in np.flatnonzero((numbers > 0) & (numbers < FEW_IMAGES))]:
            sentence = f"{count(len(few), 'class')} with fewer than {FEW_IMAGES} images in train: {list_names(few)}."
            result.append(Finding(CHECK, sentence))
        ratio = numbers.max() / max(1, numbers[numbers > 0].min())
        if ratio >= UNEVEN:
            sentence = f"The largest class of train has {ratio:.0f} times as many images as the smallest."
            result.append(Finding(CHECK, f"{sentence} Judge results by macro F1 or balanced accuracy."))
    return result
