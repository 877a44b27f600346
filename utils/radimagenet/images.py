"""Images put in their places: linked, copied or written, each whole or not at all, and never over another file."""

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

THREADS = 16  # a file system on the network answers each call late, and many calls at once
TOLERANCE = 2.0  # seconds to which every file system keeps the time of change
LEFT = re.compile(r"\..+\.\d+\.tmp")  # by a run that was killed

Item, Outcome = TypeVar("Item"), TypeVar("Outcome")
# Puts `source` at `target`, or, if something is there, tells whether it is just that.
Put = Callable[[str, str, bool], bool]


def symlink(source: str, target: str, there: bool) -> bool:
    if there:
        return os.path.islink(target) and os.readlink(target) == source
    os.symlink(source, target)
    return True


def hardlink(source: str, target: str, there: bool) -> bool:
    if there:
        return os.path.samestat(os.stat(source), os.lstat(target))
    os.link(os.path.realpath(source) if os.path.islink(source) else source, target)
    return True


def copy(source: str, target: str, there: bool) -> bool:
    """A copy has its source's time of change, by which (and by its length) a later run knows it."""
    status = os.stat(source)
    if there:
        return is_written(target, status.st_mtime, status.st_size)
    with open_regular(source) as file:
        write(target, file.read(), status.st_mtime)
    return True


def copy_corrected(source: str, target: str, there: bool, mask: str | Member) -> bool:
    """Write the image with its mask added, with the time of change of the newer of the two.

    mask: the path of its `.npy` file, or that file's content. Raises UserError if either cannot be read.
    """
    changed = max(os.stat(source).st_mtime, os.stat(mask).st_mtime if isinstance(mask, str) else mask.changed)
    if there:
        return is_written(target, changed)
    name, data = (mask, _read_start(mask)) if isinstance(mask, str) else (mask.name, mask.data)
    file = io.BytesIO()
    correct(read_image(Path(source)), read_mask(data, name)).save(file, "PNG")
    write(target, file.getvalue(), changed)
    return True


def _read_start(mask: str) -> bytes:
    """A mask's file, or, if it is longer than a mask can be, so much of it that it cannot be taken for one."""
    with open_regular(mask) as file:
        return file.read(MAX_BYTES)


def copy_member(source: str, target: str, there: bool, member: Member, mask: str | None) -> bool:
    """Write an archive's image, corrected if there is a mask; source: what it is called in messages."""
    if there and mask is None:
        return is_written(target, member.changed, len(member.data))
    if there:
        return is_written(target, max(member.changed, os.stat(mask).st_mtime))
    if mask is None:
        write(target, member.data, member.changed)
        return True
    original = str(temporary_path(Path(f"{target}.original")))
    try:
        write(original, member.data, member.changed)
        return copy_corrected(original, target, False, mask)
    except UserError as error:
        raise UserError(str(error).replace(original, source)) from None
    finally:
        Path(original).unlink(missing_ok=True)


def write(target: str, data: bytes, changed: float) -> None:
    """Write a file that appears whole, with this time of change. A kill cannot halve it; a power failure might."""
    temporary = temporary_path(Path(target))
    try:
        with open(open_new(temporary), "wb") as file:
            file.write(data)
        os.utime(temporary, (changed, changed))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def is_written(target: str, changed: float, size: int | None = None) -> bool:
    """Whether a file is there with this time of change, and of this length."""
    status = os.lstat(target)
    right = stat.S_ISREG(status.st_mode) and abs(status.st_mtime - changed) < TOLERANCE
    return right and (status.st_size == size if size is not None else status.st_size > 0)


class Batch(NamedTuple):
    """Images of one class and split."""

    source: str  # what stands before each name
    target: str  # the same
    names: list[str]
    there: set[str]  # names that the target's folder has already


def put_all(batch: Batch, put: Put) -> int:
    """Put a batch in its place; gives its number. Raises UserError where another thing stands, or nothing may stand."""
    for name in batch.names:
        put_one(batch.source + name, batch.target + name, name in batch.there, put)
    return len(batch.names)


def put_one(source: str, target: str, there: bool, put: Put) -> None:
    try:
        right = put(source, target, there)
    except OSError as error:
        raise UserError(f"{target}: cannot be made of {source} ({error.strerror}).") from None
    if not right:
        raise UserError(f"{target}: is there already, and is not what this run makes of {source}; remove it.")


def find_files(folder: str, passed_over: PassedOver) -> set[str]:
    """The names of the regular files of a folder, and of links to such, without hidden ones, which are counted.

    None of a folder that is not there.
    """
    try:
        files = {entry.name: entry.is_file() for entry in os.scandir(folder)}
        return {name for name in passed_over.keep_visible(list(files)) if files[name]}
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise UserError(f"{folder}: cannot read this folder ({error.strerror}).") from None


def find_there(folder: str, passed_over: PassedOver) -> set[str]:
    """All names of a folder but hidden ones, which are counted; what a killed run has left half-written is removed."""
    names = set()
    try:
        for entry in os.scandir(folder):
            if LEFT.fullmatch(entry.name):
                os.unlink(entry.path)
            else:
                names.add(entry.name)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read or removed ({error.strerror}).") from None
    return set(passed_over.keep_visible(list(names)))


def in_threads(function: Callable[[Item], Outcome], items: Iterable[Item]) -> Iterator[Outcome]:
    """function(item) of all items, in order; no more than some are under way, so that an error ends the rest soon."""
    with ThreadPoolExecutor(THREADS) as pool:
        under_way: deque = deque()
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) > 2 * THREADS:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
