"""Places the images of a table in class folders: links of 8-bit images, new PNG files of all others."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from utils.data import placing
from utils.data.listing import PassedOver
from utils.data.placing import KINDS, Tree, find_existing, in_threads, is_written, put_one
from utils.prepare.pixels import EIGHT_BITS, Window, as_png, kind_of, recorded_window
from utils.prepare.records import Record
from utils.runtime.errors import UserError

BATCH = 100  # images that a thread handles at once
CONVERTED = "converted"  # folder of the PNG files that the folds link to

Outcome = TypeVar("Outcome")


class Placement:
    """The work on the images of a table.

    reasons: why an image is not available, by its position; windows: of the converted images; made: number of new files
    and links in class folders.
    """

    def __init__(self, records: Sequence[Record], link: str, window: tuple[float, float] | None) -> None:
        """window: given levels, or None for that of each image."""
        self.records, self.link, self.window = records, link, window
        self.reasons: dict[int, str] = {}
        self.windows: dict[int, Window | None] = {}
        self.made = 0
        self._sources = [record.path for record in records]  # that links lead to

    def inspect(self) -> None:
        """Set the kind of each image from its header."""

        def inspect(number: int) -> str:
            try:
                self.records[number].kind = kind_of(self._sources[number])
            except UserError as error:
                return str(error)
            return ""

        everything = range(len(self.records))
        for number, reason in zip(everything, _batched(inspect, everything, "inspect"), strict=True):
            if reason:
                self.reasons[number] = reason

    def available(self) -> list[int]:
        return [number for number in range(len(self.records)) if number not in self.reasons]

    def convert_for_folds(self, output: Path) -> None:
        """Write the converted images once, to OUTPUT/converted/<class>/, where the links of all folds lead to."""
        numbers = [number for number in self.available() if self.records[number].kind != EIGHT_BITS]
        folders = {
            label: os.path.join(output, CONVERTED, label, "") for label in {self.records[n].label for n in numbers}
        }
        existing = {label: find_existing(folder, PassedOver()) for label, folder in folders.items()}
        for folder in folders.values():
            os.makedirs(folder, exist_ok=True)
        targets = {}
        for number in numbers:
            record = self.records[number]
            targets[number] = (folders[record.label] + record.name, record.name in existing[record.label])
            self._sources[number] = targets[number][0]
        self._convert(targets)

    def place(self, folder: Path, splits: Sequence[str]) -> None:
        """Link or write all available images in folder/<split>/<class>/; splits: of all images."""
        names: dict[str, dict[str, set[str]]] = {}
        for record, split in zip(self.records, splits, strict=True):
            by_split = names.setdefault(record.label, {name: set() for name in ("train", "val", "test")})
            by_split[split].add(record.name)
        tree = Tree(folder, names, "the table")
        available: dict[str, set[str]] = {name: set() for name in names}
        linked, converted = {}, {}
        for number in self.available():
            record = self.records[number]
            available[record.label].add(record.name)
            target = tree.folder(record.label, splits[number]) + record.name
            exists = record.name in tree.existing[record.label, splits[number]]
            is_linked = record.kind == EIGHT_BITS or self._sources[number] != record.path
            (linked if is_linked else converted)[number] = (target, exists)
            self.made += not exists
        tree.check_sources(available)
        self._link(linked)
        self._convert(converted)

    def _link(self, targets: dict[int, tuple[str, bool]]) -> None:
        @functools.cache
        def relative(source: str, target: str) -> str:  # so that links hold wherever both trees are mounted
            return os.path.relpath(os.path.realpath(source), os.path.realpath(target))

        def link(number: int) -> None:
            source, (target, exists) = self._sources[number], targets[number]
            if self.link == "symlink":
                folder, name = os.path.split(source)
                source = os.path.join(relative(folder, os.path.dirname(target)), name)
            put_one(source, target, exists, KINDS[self.link])

        for _ in _batched(link, targets, self.link):
            pass

    def _convert(self, targets: dict[int, tuple[str, bool]]) -> None:
        """Write PNG files with the modification times of their sources, by which a later run recognises them."""

        def convert(number: int) -> Window | str | None:
            record, (target, exists) = self.records[number], targets[number]
            changed = os.stat(record.path).st_mtime
            if exists:
                put_one(record.path, target, True, lambda *_: is_written(target, changed))
                return recorded_window(target)
            try:
                png, window = as_png(record.path, record.kind, self.window)
            except UserError as error:
                return str(error)
            put_one(record.path, target, False, lambda *_: placing.write(target, png, changed) is None)
            return window

        for number, outcome in zip(targets, _batched(convert, targets, "convert"), strict=True):
            if isinstance(outcome, str):
                self.reasons[number] = outcome
                self.made -= not targets[number][1]
            else:
                self.windows[number] = outcome


def _batched(function: Callable[[int], Outcome], numbers: Iterable[int], label: str) -> Iterable[Outcome]:
    """function(number) for all numbers, in order, in threads, with a progress bar."""
    numbers = list(numbers)
    batches = [numbers[start : start + BATCH] for start in range(0, len(numbers), BATCH)]
    with tqdm(total=len(numbers), desc=label, unit=" images", disable=None) as bar:
        for outcomes in in_threads(lambda batch: [function(number) for number in batch], batches):
            bar.update(len(outcomes))
            yield from outcomes
