"""Links, copies or writes single images; each appears completely or not at all, and never replaces another file."""

import io
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from utils.data.images import read_image
from utils.data.listing import PassedOver
from utils.radimagenet.archive import Member
from utils.radimagenet.masks import MAX_BYTES, correct, read_mask
from utils.runtime.errors import UserError
from utils.runtime.files import open_new, temporary_path
from utils.runtime.reading import open_regular

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


def copy_corrected(source: str, target: str, exists: bool, mask: str | Member) -> bool:
    """Write the image plus its mask, with the later modification time of the two.

    mask: path of a `.npy` file, or a member with its content. Raises UserError if either is unreadable.
    """
    changed = max(os.stat(source).st_mtime, os.stat(mask).st_mtime if isinstance(mask, str) else mask.changed)
    if exists:
        return is_written(target, changed)
    if isinstance(mask, str):
        with open_regular(mask) as file:
            mask = Member(mask, file.read(MAX_BYTES), changed)  # no mask is longer
    corrected = io.BytesIO()
    correct(read_image(Path(source)), read_mask(mask.data, mask.name)).save(corrected, "PNG")
    write(target, corrected.getvalue(), changed)
    return True


def copy_member(source: str, target: str, exists: bool, member: Member, mask: str | None) -> bool:
    """Write an image of an archive, corrected if there is a mask; source: its name in messages."""
    if mask is None:
        if exists:
            return is_written(target, member.changed, len(member.data))
        write(target, member.data, member.changed)
        return True
    if exists:
        return is_written(target, max(member.changed, os.stat(mask).st_mtime))
    original = str(temporary_path(Path(f"{target}.original")))
    try:
        write(original, member.data, member.changed)
        return copy_corrected(original, target, False, mask)
    except UserError as error:
        raise UserError(str(error).replace(original, source)) from None
    finally:
        Path(original).unlink(missing_ok=True)


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
