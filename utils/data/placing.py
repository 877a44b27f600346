"""Links, copies or writes single images; each appears completely or not at all, and never replaces another file."""

import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from utils.choices import SPLITS
from utils.data.listing import PassedOver
from utils.runtime.errors import UserError
from utils.runtime.files import open_new, temporary_path
from utils.runtime.reading import open_regular
from utils.runtime.text import list_names

THREADS = 16  # network file systems answer slowly, but many calls at once
TOLERANCE = 2.0  # seconds; every file system stores modification times at least this exactly
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # left by a killed run

Item, Outcome = TypeVar("Item"), TypeVar("Outcome")
# Puts source at target; if something exists there, returns whether it already is what would be put.
Put = Callable[[str, str, bool], bool]


def symlink(source: str, target: str, exists: bool) -> bool:
    if exists:
        return os.path.islink(target) and os.readlink(target) == source
    os.symlink(source, target)
    return True


def hardlink(source: str, target: str, exists: bool) -> bool:
    if exists:
        return os.path.samestat(os.stat(source), os.lstat(target))
    os.link(os.path.realpath(source) if os.path.islink(source) else source, target)
    return True


def copy(source: str, target: str, exists: bool) -> bool:
    """Copy with the modification time of the source; a later run recognises the copy by time and length."""
    status = os.stat(source)
    if exists:
        return is_written(target, status.st_mtime, status.st_size)
    with open_regular(source) as file:
        write(target, file.read(), status.st_mtime)
    return True


KINDS: dict[str, Put] = {"symlink": symlink, "hardlink": hardlink, "copy": copy}


def write(target: str, data: bytes, changed: float) -> None:
    """Write a complete file with a modification time; safe against kills, but not synced against power failures."""
    temporary = temporary_path(Path(target))
    try:
        with open(open_new(temporary), "wb") as file:
            file.write(data)
        os.utime(temporary, (changed, changed))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def is_written(target: str, changed: float, size: int | None = None) -> bool:
    """Whether target is a regular file with this modification time, and this length (default: not empty)."""
    status = os.lstat(target)
    same_time = stat.S_ISREG(status.st_mode) and abs(status.st_mtime - changed) < TOLERANCE
    return same_time and (status.st_size > 0 if size is None else status.st_size == size)


class Batch(NamedTuple):
    """Images of one class and split."""

    source: str  # prefix of each name
    target: str  # prefix of each name
    names: list[str]
    existing: set[str]  # names in the target folder


def put_all(batch: Batch, put: Put) -> int:
    """Put a batch in place and return its length; raises UserError as `put_one`."""
    for name in batch.names:
        put_one(batch.source + name, batch.target + name, name in batch.existing, put)
    return len(batch.names)


def put_one(source: str, target: str, exists: bool, put: Put) -> None:
    """Put one image in place; raises UserError if the file system refuses, or if something else exists there."""
    try:
        same = put(source, target, exists)
    except OSError as error:
        raise UserError(f"{target}: cannot be made from {source} ({error.strerror}).") from None
    if not same:
        raise UserError(f"{target}: exists, but is not what this run makes of {source}; remove it.")


class Tree:
    """OUTPUT/{train,val,test}/<class>/<image>, and the names that exist in it."""

    def __init__(self, output: Path, names: dict[str, dict[str, set[str]]], listed_in: str) -> None:
        """Create the folders. Raises UserError if one cannot be created, or holds names that are not listed.

        names: of images, by class and split; listed_in: what lists them, for messages.
        """
        self.output, self.names = output, names
        self.passed_over = PassedOver()  # in the tree and in the source
        self.existing: dict[tuple[str, str], set[str]] = {}
        for split in SPLITS:
            classes = [name for name, splits in names.items() if splits[split]]
            folders = find_existing(str(output / split), self.passed_over)
            _check_listed(output / split, folders, set(classes), listed_in)
            for name in classes:
                folder = self.folder(name, split)
                self.existing[name, split] = find_existing(folder, self.passed_over)
                _check_listed(Path(folder), self.existing[name, split], names[name][split], listed_in)
        try:
            for name, split in self.existing:
                os.makedirs(self.folder(name, split), exist_ok=True)
        except OSError as error:
            raise UserError(f"{error.filename}: this folder cannot be created ({error.strerror}).") from None

    def folder(self, name: str, split: str) -> str:
        return os.path.join(self.output, split, name, "")

    def put(self, source: str, name: str, image: str, put: Put) -> None:
        """Put an image of a class in every split that lists it."""
        for split in self.splits_of(name, image):
            put_one(source, self.folder(name, split) + image, image in self.existing[name, split], put)

    def check_sources(self, available: dict[str, set[str]], needed: str = "source") -> None:
        """Raise UserError for an image of an earlier run that has no source now; available: images by class.

        needed: what it lacks, for the message.
        """
        for (name, split), existing in self.existing.items():
            if gone := sorted(existing - available[name]):
                path = self.folder(name, split) + gone[0]
                raise UserError(f"{path}: exists from an earlier run, but has no {needed} now; remove it.")

    def splits_of(self, name: str, image: str) -> list[str]:
        return [split for split in SPLITS if image in self.names[name][split]]


def _check_listed(folder: Path, existing: set[str], listed: set[str], listed_in: str) -> None:
    if unlisted := sorted(existing - listed):
        raise UserError(f"{folder}: not in {listed_in}: {list_names(unlisted)}; remove them, or give another OUTPUT.")


def find_files(folder: str, passed_over: PassedOver) -> set[str]:
    """Names of the regular files in a folder, and of links to such; none without a folder. Hidden ones are counted."""
    try:
        files = {entry.name: entry.is_file() for entry in os.scandir(folder)}
        return {name for name in passed_over.keep_visible(list(files)) if files[name]}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"{folder}: cannot read this folder ({error.strerror}).") from None


def find_existing(folder: str, passed_over: PassedOver) -> set[str]:
    """All names in a folder; hidden ones are counted, and temporary files of a killed run are removed."""
    names = set()
    try:
        for entry in os.scandir(folder):
            if TEMPORARY.fullmatch(entry.name):
                os.unlink(entry.path)
            else:
                names.add(entry.name)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read or removed ({error.strerror}).") from None
    return set(passed_over.keep_visible(list(names)))


def in_threads(function: Callable[[Item], Outcome], items: Iterable[Item]) -> Iterator[Outcome]:
    """function(item) for all items, in order; few calls are pending at a time, so that an error soon stops the rest."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
