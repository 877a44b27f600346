"""The findings of an audit as sections of sentences and tables, and as text for a terminal."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from utils.audit.findings import Finding, leaks
from utils.audit.rule import REASONS, Census
from utils.data.folders import LAYOUT
from utils.runtime.text import explain_forms, list_names, printable

SHOWN_NAMES = 20
UNREADABLE = "No image can be read."
BLANK, NONE = "Blank images", ["None."]


class Section(NamedTuple):
    """A heading, sentences, and a table of texts and numbers; without rows there is no table."""

    title: str
    sentences: list[str]
    head: Sequence[str] = ()
    rows: Sequence[list[Any]] = ()

    def numeric(self) -> list[bool]:
        """Whether each column holds only numbers, which are aligned to the right."""
        return [all(map(_is_number, column)) for column in zip(*self.rows, strict=True)]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def sections(census: Census, search: str) -> list[Section]:
    """All sections of the report; search: a sentence about the search for copies."""
    return [
        _splits(census),
        _classes(census),
        _images(census),
        _levels(census),
        _duplicates(census, search),
        _left_out(census),
        _named("Unreadable files", census, ~census.readable()),
        _named(BLANK, census, census.blank),
    ]


def _splits(census: Census) -> Section:
    rows, sentences = [], []
    for number, (name, files) in enumerate(zip(census.splits, census.files, strict=True)):
        inside = census.split == number
        counts = (inside & ~census.readable()).sum(), (inside & census.blank).sum()
        rows.append([name, int(inside.sum()), len(np.unique(census.label[inside])), *map(int, counts)])
        if passed_over := files.passed_over.describe():
            sentences.append(f"{name}: {passed_over}.")
        if ignored := files.describe_ignored():
            sentences.append(f"Warning: {ignored}")
    return Section("Splits", sentences, ["split", "images", "classes", "unreadable", "blank"], rows)


def _classes(census: Census) -> Section:
    counts = np.zeros((len(census.splits), len(census.classes)), np.int64)
    np.add.at(counts, (census.split, census.label), 1)
    sentences = []
    if len(census.classes) == 1:
        sentences.append(f"A single class, {census.classes[0]}: the training refuses this set. Expected {LAYOUT}.")
    for name, numbers in zip(census.splits, counts, strict=True):
        present = numbers[numbers > 0]
        ratio = present.max() / present.min()
        sentences.append(f"{name}: {present.min()} to {present.max()} images per class, {ratio:.1f} to 1.")
        missing = [census.classes[label] for label in np.flatnonzero(numbers == 0)]
        if missing:
            forms = explain_forms(missing, [census.classes[label] for label in np.flatnonzero(numbers)])
            names = list_names(missing, SHOWN_NAMES)
            sentences.append(f"{name} lacks {len(missing)} classes of other splits: {names}.{forms}")
    rows = [[name, *map(int, counts[:, label])] for label, name in enumerate(census.classes)]
    return Section("Classes", sentences, ["class", *census.splits], rows)


def _images(census: Census) -> Section:
    title, records = "Sizes and channels", census.records[census.readable()]
    if len(records) == 0:
        return Section(title, [UNREADABLE])
    rows = []
    for name, values in (
        ("width, pixels", records["width"]),
        ("height, pixels", records["height"]),
        ("width / height", records["width"] / records["height"]),
    ):
        rows.append([name, *(f"{value:.4g}" for value in np.percentile(values, [0, 5, 50, 95, 100]))])
    sizes = Counter(f"{width} x {height}" for width, height in records[["width", "height"]].tolist())
    gray = int(records["gray"].sum())
    sentences = [
        f"Sizes: {len(sizes)}; the most frequent: {_tally(sizes, 5)}.",
        f"Formats: {_tally(Counter(records['format'].astype(str)))}. "
        f"Modes: {_tally(Counter(records['mode'].astype(str)))}.",
        f"Grey, whatever their mode: {gray} of {len(records)} readable images."
        + (" All are: give --gray." if gray == len(records) else ""),
    ]
    head = ["readable images", "least", "5 %", "median", "95 %", "greatest"]
    return Section(title, sentences, head, rows)


def _tally(counts: Counter, most: int | None = None) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common(most))


def normalisation(records: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the pixels, (4,) each in 0..1: red, green, blue, grey; weights: (N,)."""
    mean, square = (np.average(records[field], axis=0, weights=weights) for field in ("mean", "square"))
    return mean / 255, np.sqrt(np.maximum(square - mean**2, 0)) / 255


def _levels(census: Census) -> Section:
    title = "Mean and standard deviation"
    number = census.splits.index("train") if "train" in census.splits else 0
    records = census.records[census.readable() & (census.split == number)]
    if len(records) == 0:
        return Section(title, [UNREADABLE])
    gray = bool(census.records["gray"][census.readable()].all())

    def flags(weights: np.ndarray) -> str:
        channels = slice(3, 4) if gray else slice(0, 3)
        mean, std = (" ".join(f"{value:.4f}" for value in part[channels]) for part in normalisation(records, weights))
        return f"--mean {mean} --std {std}"

    sentences = [
        f"For the training: {'--gray ' if gray else ''}{flags(np.ones(len(records)))}",
        f"Of the pixels, 0 to 1, of the {len(records)} readable images of {census.splits[number]}. Each image has the "
        "same weight, as in training, where it fills the crop whatever its size.",
        f"With the same weight for each pixel: {flags(records['width'].astype(np.float64) * records['height'])}",
    ]
    return Section(title, sentences)


def _duplicates(census: Census, search: str) -> Section:
    crossing = np.array([census.crosses(group) for group in census.groups], np.bool_).reshape(-1, 2)
    exact = np.array([census.is_exact(group) for group in census.groups], np.bool_)
    sizes = np.array([len(group) for group in census.groups], np.int64)
    across_splits, across_classes = crossing.T
    rows = []
    for name, chosen in (
        ("across splits", across_splits),
        ("across classes", across_classes),
        ("within one class of one split", ~across_splits & ~across_classes),
        ("all", np.ones(len(sizes), np.bool_)),
    ):
        counts = chosen.sum(), (chosen & exact).sum(), (chosen & ~exact).sum(), sizes[chosen].sum()
        rows.append([name, *map(int, counts)])
    sentences = [
        search,
        "A group is connected by copies, directly or in a chain; the list of --exclude-list counts only direct copies.",
    ]
    if census.groups:
        largest = max(census.groups, key=len)
        sentences.append(
            f"{sizes.sum()} images are in groups; the largest has {len(largest)}, "
            f"each of which correlates by at least {census.correlations(largest).min():.2f} with the first."
        )
    sentences += ["Groups across splits and classes count in both rows.", *_leaks(census)]
    return Section("Duplicates", sentences, ["groups", "number", "same pixels", "near", "images"], rows)


def _leaks(census: Census) -> list[str]:
    return [
        f"{number} images of {later} ({share:.2%}) share a group with one of {earlier}."
        for later, earlier, number, share in leaks(census)
    ]


def _left_out(census: Census) -> Section:
    counts = np.zeros((len(REASONS), len(census.splits)), np.int64)
    np.add.at(counts, (census.reason, census.split), 1)
    sentences = ["What the list of --exclude-list leaves out; the list begins with its rule.", *kept_sentences(census)]
    if unlisted := len(census.unlisted()):
        sentences.append(f"{unlisted} of these have a line break in the name, which no list can hold: rename them.")
    rows = [[reason, *map(int, row)] for reason, row in zip(REASONS, counts, strict=True)]
    return Section("What to leave out", sentences, ["reason", *census.splits], rows)


def kept_sentences(census: Census) -> list[str]:
    """Sentences about classes that would have no image in a split, and about the images kept for them."""
    sentences = []
    if kept := census.kept_classes(readable=True):
        sentences.append(
            "Kept against the rule, which would leave these classes without a readable image: "
            f"{list_names(kept, SHOWN_NAMES)}."
        )
    if unreadable := census.kept_classes(readable=False):
        sentences.append(
            "Not listed, although these classes have no readable image: "
            f"{list_names(unreadable, SHOWN_NAMES)}; replace the images, or remove the classes."
        )
    return sentences


def _named(title: str, census: Census, mask: np.ndarray) -> Section:
    """The first images of a mask (N,), and the errors of unreadable ones."""
    indices = np.flatnonzero(mask).tolist()
    if not indices:
        return Section(title, NONE)
    more = [f"The first {SHOWN_NAMES} of {len(indices)}; images.csv has all."] if len(indices) > SHOWN_NAMES else []
    rows = []
    for index in indices[:SHOWN_NAMES]:
        error = census.errors[index].removeprefix(f"{census.path(index)}: ")
        rows.append([census.name(index), error] if error else [census.name(index)])
    return Section(title, more, ["image", "reason"][: len(rows[0])], rows)


def as_text(heading: str, findings: list[Finding], content: list[Section]) -> str:
    """The report for a terminal: findings, then sections with aligned columns, without control characters."""
    lines = [heading, "", "Findings", *(f"  {severity}: {sentence}" for severity, sentence in findings)]
    for section in content:
        lines += ["", section.title, *(f"  {sentence}" for sentence in section.sentences)]
        table = [[printable(str(cell)) for cell in row] for row in (section.head, *section.rows) if row]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            line = ""
            for cell, width, numeric in zip(row, widths, section.numeric(), strict=True):
                line += "  " + (cell.rjust(width) if numeric else cell.ljust(width))
            lines.append(line.rstrip())
    return "\n".join(map(printable, lines)) + "\n"
