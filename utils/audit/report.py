"""What an audit found, in sections of sentences and tables, and as text for a terminal."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from utils.audit.rule import REASONS, Census
from utils.data.folders import LAYOUT
from utils.runtime.text import explain_forms, list_names, printable

SHOWN_NAMES = 20


class Section(NamedTuple):
    """A heading, sentences, and a table (rows of texts and numbers; without rows there is none)."""

    title: str
    sentences: list[str]
    head: Sequence[str] = ()
    rows: Sequence[list[Any]] = ()

    def numeric(self) -> list[bool]:
        """Of each column, whether all of its values are numbers: these are aligned to the right."""
        return [all(map(_is_number, column)) for column in zip(*self.rows, strict=True)]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def sections(census: Census, searched: str) -> list[Section]:
    """All that the report says; searched: how duplicates were looked for."""
    return [
        _splits(census),
        _classes(census),
        _images(census),
        _levels(census),
        _duplicates(census, searched),
        _left_out(census),
        _named("Unreadable files", census, np.flatnonzero(~census.readable()), census.bad),
        _named("Blank images", census, np.flatnonzero(census.blank), {}),
    ]


def _splits(census: Census) -> Section:
    rows = []
    for number, name in enumerate(census.splits):
        here = census.split == number
        bad, blank = (int((here & mask).sum()) for mask in (~census.readable(), census.blank))
        rows.append([name, int(here.sum()), len(np.unique(census.label[here])), bad, blank])
    sentences = []
    for files in census.files:
        if passed_over := files.passed_over.describe():
            sentences.append(f"{files.root.name}: {passed_over}.")
        if ignored := files.describe_ignored():
            sentences.append(f"Warning: {ignored}")
    return Section("Splits", sentences, ["split", "images", "classes", "unreadable", "blank"], rows)


def _classes(census: Census) -> Section:
    counts = np.zeros((len(census.splits), len(census.classes)), np.int64)
    np.add.at(counts, (census.split, census.label), 1)
    sentences = []
    if len(census.classes) == 1:
        sentences.append(f"A single class, {census.classes[0]}: the training refuses this set. Expected {LAYOUT}.")
    for name, of_split in zip(census.splits, counts, strict=True):
        present = of_split[of_split > 0]
        sentences.append(
            f"{name}: {present.min()} to {present.max()} images a class, {present.max() / present.min():.1f} to 1."
        )
        missing = [census.classes[label] for label in np.flatnonzero(of_split == 0)]
        if missing:
            forms = explain_forms(missing, [census.classes[label] for label in np.flatnonzero(of_split)])
            names = list_names(missing, SHOWN_NAMES)
            sentences.append(f"{name} lacks {len(missing)} classes that other splits have: {names}.{forms}")
    rows = [[name, *map(int, counts[:, label])] for label, name in enumerate(census.classes)]
    return Section("Classes", sentences, ["class", *census.splits], rows)


def _images(census: Census) -> Section:
    records = census.records[census.readable()]
    if len(records) == 0:
        return Section("Sizes and channels", ["No image can be read."])
    rows = []
    for name, values in (
        ("width, pixels", records["width"]),
        ("height, pixels", records["height"]),
        ("width / height", records["width"] / records["height"]),
    ):
        rows.append([name, *(f"{value:.4g}" for value in np.percentile(values, [0, 5, 50, 95, 100]))])
    sizes, times = np.unique(records[["width", "height"]], return_counts=True)
    common = [f"{sizes[n][0]} x {sizes[n][1]} ({times[n]})" for n in np.argsort(-times, kind="stable")[:5]]
    kinds = [_tally(records[field]) for field in ("format", "mode")]
    gray = int(records["gray"].sum())
    sentences = [
        f"Sizes: {len(sizes)}; the most frequent: {', '.join(common)}.",
        f"Formats: {kinds[0]}. Modes: {kinds[1]}.",
        f"Grey, whatever their mode: {gray} of {len(records)} readable images."
        + (" All are: give --gray." if gray == len(records) else ""),
    ]
    return Section(
        "Sizes and channels", sentences, ["readable images", "least", "5 %", "median", "95 %", "greatest"], rows
    )


def _tally(values: np.ndarray) -> str:
    return ", ".join(f"{name.decode()} {count}" for name, count in Counter(values.tolist()).most_common())


def normalisation(records: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the pixels in 0..1, (4,) each: red, green, blue, grey; weights: (N,)."""
    mean, square = (np.average(records[field], axis=0, weights=weights) for field in ("mean", "square"))
    return mean / 255, np.sqrt(np.maximum(square - mean**2, 0)) / 255


def _levels(census: Census) -> Section:
    title = "Mean and standard deviation"
    number = census.splits.index("train") if "train" in census.splits else 0
    records = census.records[census.readable() & (census.split == number)]
    if len(records) == 0:
        return Section(title, ["No image can be read."])
    gray = bool(census.records["gray"][census.readable()].all())
    channels = slice(3, 4) if gray else slice(0, 3)
    texts = []
    sizes = records["width"].astype(np.float64) * records["height"]
    for weights in (np.ones(len(records)), sizes):
        pairs = zip(("--mean", "--std"), normalisation(records, weights), strict=True)
        texts.append(" ".join(f"{flag} {' '.join(f'{value:.4f}' for value in both[channels])}" for flag, both in pairs))
    sentences = [
        f"For the training: {'--gray ' if gray else ''}{texts[0]}",
        f"Of the pixels, in 0..1, of the {len(records)} readable images of {census.splits[number]}; each image counts "
        "the same, as in training, where it fills the crop whatever its size.",
        f"Were each pixel to count the same: {texts[1]}",
    ]
    return Section(title, sentences)


def _duplicates(census: Census, searched: str) -> Section:
    crossing = [census.crosses(group) for group in census.groups]
    exact = [census.is_exact(group) for group in census.groups]
    rows = []
    for name, wanted in (
        ("across splits", lambda splits, classes: splits),
        ("across classes", lambda splits, classes: classes),
        ("within one class of one split", lambda splits, classes: not splits and not classes),
        ("all", lambda splits, classes: True),
    ):
        of_kind = [number for number, crosses in enumerate(crossing) if wanted(*crosses)]
        images = sum(len(census.groups[number]) for number in of_kind)
        same = sum(exact[number] for number in of_kind)
        rows.append([name, len(of_kind), same, len(of_kind) - same, images])
    sentences = [
        searched,
        "A group is what copies connect, directly or by a chain; the list of --exclude-list goes by direct ones only.",
        *_largest(census),
        "Groups that cross both splits and classes count in both lines.",
        *_leaks(census),
    ]
    return Section("Duplicates", sentences, ["groups", "number", "same pixels", "near", "images"], rows)


def _largest(census: Census) -> list[str]:
    if not census.groups:
        return []
    largest = max(census.groups, key=len)
    return [
        f"{sum(map(len, census.groups))} images are in groups; the largest has {len(largest)}, "
        f"up to {census.distances(largest).max()} bits from its first image."
    ]


def _leaks(census: Census) -> list[str]:
    """For each two splits, how many images of the later share a group with one of the earlier."""
    sentences = []
    for later, name in enumerate(census.splits):
        for earlier in range(later):
            met = np.unique(census.group[census.split == earlier])
            leaked = (census.split == later) & np.isin(census.group, met[met >= 0])
            share = leaked.sum() / (census.split == later).sum()
            other = census.splits[earlier]
            sentences.append(f"{leaked.sum()} images of {name} ({share:.2%}) share a group with one of {other}.")
    return sentences


def _left_out(census: Census) -> Section:
    counts = np.zeros((len(REASONS), len(census.splits)), np.int64)
    np.add.at(counts, (census.reason, census.split), 1)
    sentences = ["What a list of --exclude-list leaves out; its rule stands in its head."]
    sentences += kept_sentences(census)
    if unlisted := len(census.unlisted()):
        sentences.append(f"{unlisted} of these have names that hold a line break, which no list can: rename them.")
    rows = [[reason, *map(int, row)] for reason, row in zip(REASONS, counts, strict=True)]
    return Section("What to leave out", sentences, ["reason", *census.splits], rows)


def kept_sentences(census: Census) -> list[str]:
    """Which classes the rule would have left without an image in a split, and what stays of them."""
    sentences = []
    if kept := census.kept_classes(readable=True):
        sentences.append(
            "Kept against the rule, which would leave these classes no image that can be read: "
            f"{list_names(kept, SHOWN_NAMES)}."
        )
    if unreadable := census.kept_classes(readable=False):
        sentences.append(
            "Not listed, though no image of these classes can be read: "
            f"{list_names(unreadable, SHOWN_NAMES)}; replace the images, or remove the classes."
        )
    return sentences


def _named(title: str, census: Census, indices: np.ndarray, why: dict[int, str]) -> Section:
    if len(indices) == 0:
        return Section(title, ["None."])
    more = [f"The first {SHOWN_NAMES} of {len(indices)}; images.csv has all."] if len(indices) > SHOWN_NAMES else []
    rows = [
        [census.name(index), *([why[index].removeprefix(f"{census.path(index)}: ")] if why else [])]
        for index in indices[:SHOWN_NAMES].tolist()
    ]
    return Section(title, more, ["image", "reason"][: len(rows[0])], rows)


def as_text(heading: str, content: list[Section]) -> str:
    """For a terminal: aligned columns, and no character that a terminal would obey."""
    lines = [heading]
    for section in content:
        lines += ["", section.title, *(f"  {sentence}" for sentence in section.sentences)]
        table = [[printable(str(cell)) for cell in row] for row in (section.head, *section.rows) if row]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        places = list(zip(section.numeric(), widths, strict=True))
        for row in table:
            cells = [
                f"{cell:{'>' if number else '<'}{width}}" for cell, (number, width) in zip(row, places, strict=True)
            ]
            lines.append("  ".join(["", *cells]).rstrip())
    return "\n".join(map(printable, lines)) + "\n"
