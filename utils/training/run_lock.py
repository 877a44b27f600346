"""The lock on a run's --output-dir: held by rank 0 while the run lives, released by the kernel when it is killed.

It is a POSIX record lock: loader workers do not inherit it, and it holds across the hosts of a network file system. It
is lost when its process closes any descriptor of the file, so only this module opens the file.
"""

import errno
import fcntl
import json
import os
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from utils.runtime import progress
from utils.runtime.errors import UserError
from utils.runtime.text import printable

LOCK = "run.lock"
MARK = b'{"host": '  # how the content of our files begins
LONGEST = 4096  # bytes of such a file
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # a file system without locks
FLOCK = "hhqqi4x"  # C's struct flock on 64-bit Linux: type, whence, start, length, process
PATIENCE = 1.0  # seconds in which a holder writes its name
ATTEMPTS = 100

_held: dict[tuple[int, int], tuple[Path, int]] = {}  # path and descriptor by the file's device and inode
os.register_at_fork(after_in_child=_held.clear)  # a child holds none of its parent's locks


class Holder(NamedTuple):
    """The process that wrote a lock file."""

    host: str
    process: int
    time: str

    def __str__(self) -> str:
        return f"process {self.process} on {printable(self.host)}, since {printable(self.time)}"


class Lock(NamedTuple):
    """held: None where that cannot be tested; holder: the last process that took the lock, None if unknown."""

    held: bool | None
    holder: Holder | None


def acquire(folder: Path) -> None:
    """Lock a folder that exists for this process; nothing happens if this process holds the lock already.

    A file system without locks gets a warning. Raises UserError if another process holds the lock, which it names, and
    if the file cannot be locked or written.
    """
    path = folder.absolute() / LOCK
    if _identity(path) in _held:
        return
    for _ in range(ATTEMPTS):
        descriptor = _open(path)
        try:
            locked = _try_lock(folder, descriptor)
            identity = _identity(descriptor)
            if identity == _identity(path):
                _held[identity] = path, descriptor
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a run that ended has removed the file since it was opened
    else:
        raise UserError(f"{path}: is replaced all the time; give another --output-dir.")
    _write_holder(path, descriptor)
    if not locked:
        progress.say(
            f"warning: {folder}: its file system has no locks, so a second run in this folder would not be noticed."
        )


def release() -> None:
    """Remove the lock files of this process, then unlock them."""
    while _held:
        identity, (path, descriptor) = _held.popitem()
        with suppress(OSError):
            if _identity(path) == identity:
                path.unlink()
        os.close(descriptor)


@contextmanager
def released_at_end() -> Iterator[None]:
    """Release what the block (or, as a decorator, the function) has locked, also after an exception."""
    try:
        yield
    finally:
        release()


def look_at(folder: Path) -> Lock:
    """Whether a run lives in the folder; never takes, drops or disturbs a lock."""
    path = folder / LOCK
    if own := _held.get(_identity(path)):
        return Lock(True, _read_holder(own[1]))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return Lock(False, None)
    except OSError:
        return Lock(None, None)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return Lock(None, None)
        return Lock(_is_locked(descriptor), _read_holder(descriptor))
    finally:
        os.close(descriptor)


def _identity(file: Path | int) -> tuple[int, int] | None:
    """Device and inode of a path or descriptor; None if there is no such file."""
    with suppress(OSError):
        found = os.fstat(file) if isinstance(file, int) else os.lstat(file)
        return found.st_dev, found.st_ino
    return None


def _open(path: Path) -> int:
    """A descriptor of the lock file, which is created if needed; raises UserError for any other file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        found = os.fstat(descriptor)
        ours = stat.S_ISREG(found.st_mode) and found.st_nlink <= 1
        ours = ours and (found.st_size == 0 or os.pread(descriptor, len(MARK), 0) == MARK)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be opened ({error.strerror}); a run locks its folder with this file. Remove it, or give "
            "another --output-dir."
        ) from None
    if not ours:
        os.close(descriptor)
        raise UserError(f"{path}: is not the lock of a run; rename or remove it, or give another --output-dir.")
    return descriptor


def _try_lock(folder: Path, descriptor: int) -> bool:
    """True once it is locked, False where there are no locks; raises UserError that names another holder."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise UserError(f"--output-dir {folder}: cannot be locked ({error.strerror}); give another one.") from None
    deadline = time.monotonic() + PATIENCE
    while (holder := _read_holder(descriptor)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    raise UserError(
        f"--output-dir {folder}: another run is writing there: {holder or 'a process that gave no name'}. Wait for its "
        "end, stop it, or give another --output-dir."
    )


def _write_holder(path: Path, descriptor: int) -> None:
    holder = Holder(socket.gethostname(), os.getpid(), datetime.now().astimezone().isoformat(timespec="seconds"))
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(holder._asdict()) + "\n").encode(), 0)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from None


def _read_holder(descriptor: int) -> Holder | None:
    """Who wrote the file; None where that is not what we write."""
    try:
        content = json.loads(os.pread(descriptor, LONGEST, 0))
        holder = Holder(**content)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    fits = isinstance(holder.host, str) and isinstance(holder.process, int) and isinstance(holder.time, str)
    return holder if fits else None


def _is_locked(descriptor: int) -> bool | None:
    """Whether another process holds the lock, asked without taking it; None where that cannot be asked."""
    if sys.platform != "linux":
        return None
    asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, asked)
    except OSError:
        return None
    return struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK
