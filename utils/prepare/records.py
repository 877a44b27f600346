"""The images that a table lists: file, label, group and split of each, and the names that they get."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from utils.choices import SPLITS
from utils.data.listing import IMAGE_ENDINGS, is_hidden
from utils.data.tables import Table
from utils.prepare.pixels import DICOM, DICOM_ENDINGS, MORE_BITS
from utils.runtime.errors import UserError
from utils.runtime.text import canonical, count, list_names

LABEL_COLUMNS = {"label", "labels", "class", "classname", "labelname", "diagnosis", "target", "category", "dx"}
SPELLINGS = {  # of splits in tables, lower-case
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
SHOWN_LINES = 5
LONGEST_STEM = 240  # bytes; of a file name without its ending


@dataclass(slots=True)
class Record:
    """An image of the table. name: of its new file; kind: one of pixels.py, "" if it is not available."""

    line: int
    image: str  # normalised path, relative to the root unless the table gives an absolute one
    path: str
    label: str
    group: str  # "" without groups
    split: str  # "" if the table does not name one
    name: str = ""
    kind: str = ""


def read_records(table: Table, columns: dict[str, str], root: str, suffix: str) -> tuple[list[Record], int]:
    """The images sorted by path, and the number of rows that repeat one.

    columns: of "image" and "label", and maybe "group" and "split". Raises UserError for empty cells, for unknown
    names of splits, and for rows that contradict each other on an image.
    """
    records: dict[str, Record] = {}
    repeated, empty, unknown = 0, {meaning: [] for meaning in columns}, Counter()
    for line, cells in table.cells(list(columns.values())):
        row = dict(zip(columns, cells, strict=True))
        row = {meaning: cell if meaning == "image" else cell.strip() for meaning, cell in row.items()}
        for meaning, cell in row.items():
            if not cell:
                empty[meaning].append(line)
        split = SPELLINGS.get(row.get("split", "").lower(), "")
        if row.get("split") and not split:
            unknown[row["split"]] += 1
        path = os.path.abspath(os.path.join(root, row["image"] + suffix))
        image = os.path.normpath(row["image"] + suffix)
        record = Record(line, image, path, row["label"], row.get("group", ""), split)
        first = records.setdefault(path, record)
        if first is not record:
            repeated += 1
            _check_repetition(table, columns, first, record)
    for meaning, lines in empty.items():
        if lines:
            numbers = list_names(list(map(str, lines)), SHOWN_LINES)
            advice = "; give each image without a group a value of its own" if meaning == "group" else ""
            raise UserError(
                f"{table.path}: {columns[meaning]!r} is empty in {count(len(lines), 'row')} (line {numbers}); "
                f"fill it in, or remove the rows{advice}."
            )
    if unknown:
        raise UserError(
            f"{table.path}: the column {columns['split']!r} holds {list_names(list(map(repr, unknown)))}; expected "
            f"{', '.join(SPLITS)}, or {', '.join(name for name in SPELLINGS if name not in SPLITS)}."
        )
    if not records:
        raise UserError(f"{table.path}: lists no image.")
    return sorted(records.values(), key=lambda record: (record.image, record.path)), repeated


def _check_repetition(table: Table, columns: dict[str, str], first: Record, record: Record) -> None:
    for meaning in ("label", "group", "split"):
        values = getattr(first, meaning), getattr(record, meaning)
        if values[0] != values[1]:
            raise UserError(
                f"{table.path}: the lines {first.line} and {record.line} give {record.image!r} different values in the "
                f"column {columns[meaning]!r}: {values[0]!r} and {values[1]!r}; keep one."
            )


def check_splits(records: Collection[Record], classes: Collection[str], grouped: bool) -> None:
    """Raise UserError if the splits of the table lack images, or share groups."""
    by_split = {split: {record.label for record in records if record.split == split} for split in SPLITS}
    for split in ("train", "val"):
        if not by_split[split]:
            raise UserError(f"--split: no image is in {split}; expected images in train and val, and maybe in test.")
        if lacking := sorted(set(classes) - by_split[split]):
            raise UserError(
                f"--split: {count(len(lacking), 'class')} without images in {split}: {list_names(lacking)}; train and "
                "val must hold every class. Merge or remove them, or let --val and --test split the images."
            )
    if not grouped:
        return
    splits: dict[str, set[str]] = {}
    for record in records:
        splits.setdefault(record.group, set()).add(record.split)
    if shared := [group for group, its_splits in sorted(splits.items()) if len(its_splits) > 1]:
        raise UserError(
            f"--split: {count(len(shared), 'group')} of {len(splits):,} are in several splits: {list_names(shared)}. "
            "Correct the column, or let --val and --test split the groups. To keep this split, leave --group out."
        )


def name_files(records: Sequence[Record]) -> None:
    """Set the names of the new files, unique in their classes also where endings, case and Unicode forms do not count.

    Images with the same file name get their path, with __ instead of slashes; if that is too long or not enough, the
    beginning of its hash. Raises UserError for hidden names.
    """
    stems, levels = [""] * len(records), [0] * len(records)
    pending = list(range(len(records)))
    while pending:
        for number in pending:
            stems[number] = STEMS[levels[number]](records[number].image)
        keys = [(record.label, canonical(stem).casefold()) for record, stem in zip(records, stems, strict=True)]
        taken = Counter(keys)
        pending = [
            number
            for number, key in enumerate(keys)
            if levels[number] + 1 < len(STEMS) and (taken[key] > 1 or len(os.fsencode(stems[number])) > LONGEST_STEM)
        ]
        for number in pending:
            levels[number] += 1
    for record, stem in zip(records, stems, strict=True):
        ending = _split_ending(record.image)[1]
        converted = record.kind in (MORE_BITS, DICOM) or ending.lower() in DICOM_ENDINGS
        record.name = stem + (".png" if converted else ending)
        if is_hidden(record.name):
            raise UserError(f"{record.path}: training skips files of this name as hidden; rename it.")


def _split_ending(path: str) -> tuple[str, str]:
    """The path without its ending, and the ending: "" if it is unknown, as DICOM names may be numbers with dots."""
    stem, ending = os.path.splitext(path)
    return (stem, ending) if ending.lower() in (*IMAGE_ENDINGS, *DICOM_ENDINGS) else (path, "")


def _file_stem(image: str) -> str:
    return _split_ending(os.path.basename(image))[0]


def _path_stem(image: str) -> str:
    return "__".join(part for part in _split_ending(image)[0].split(os.sep) if part not in ("", ".."))


def _hashed_stem(image: str) -> str:
    stem = os.fsdecode(os.fsencode(_file_stem(image))[:200])
    return f"{stem}-{hashlib.sha256(os.fsencode(image)).hexdigest()[:16]}"


STEMS: tuple[Callable[[str], str], ...] = (_file_stem, _path_stem, _hashed_stem)
