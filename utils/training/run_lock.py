"""The lock on a run's --output-dir: held by rank 0 while the run lives; the kernel releases it after a kill.

It is a POSIX record lock: loader workers do not inherit it, and it works across the hosts of a network file system. A
process loses it when it closes any descriptor of the file, so only this module opens the file.
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
MARK = b'{"host": '  # the first bytes of our lock files
LONGEST = 4096  # bytes of a lock file
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # a file system without locks
FLOCK = "hhqqi4x"  # C's struct flock on 64-bit Linux: type, whence, start, length, process
PATIENCE = 1.0  # seconds to wait for a holder to write its name
ATTEMPTS = 100

_held: dict[tuple[int, int], tuple[Path, int]] = {}  # path and descriptor, by the device and inode of the file
os.register_at_fork(after_in_child=_held.clear)  # a child does not hold its parent's locks


class Holder(NamedTuple):
    """The process that wrote a lock file."""

    host: str
    process: int
    time: str

    def __str__(self) -> str:
        return f"process {self.process} on {printable(self.host)}, since {printable(self.time)}"


class Lock(NamedTuple):
    """held: None if that cannot be tested. holder: the last process that took the lock, None if unknown."""

    held: bool | None
    holder: Holder | None


def acquire(folder: Path) -> None:
    """Lock an existing folder for this process, unless this process already holds the lock.

    On a file system without locks a warning is printed. Raises UserError if another process holds the lock, naming it,
    and if the file cannot be locked or written.
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
        os.close(descriptor)  # a finished run removed the file after it was opened
    else:
        raise UserError(f"{path}: other processes keep replacing it; give another --output-dir.")
    _write_holder(path, descriptor)
    if not locked:
        progress.say(
            f"warning: {folder}: its file system has no locks, so a second run in this folder would not be detected."
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
    """Release all locks at the end of the block (or of the decorated function), also after an exception."""
    try:
        yield
    finally:
        release()


def look_at(folder: Path) -> Lock:
    """Whether a run holds the folder; never takes, releases or disturbs a lock."""
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
        status = os.fstat(file) if isinstance(file, int) else os.lstat(file)
        return status.st_dev, status.st_ino
    return None


def _open(path: Path) -> int:
    """A descriptor of the lock file, created if needed; raises UserError if the file is something else."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        status = os.fstat(descriptor)
        ours = stat.S_ISREG(status.st_mode) and status.st_nlink <= 1
        ours = ours and (status.st_size == 0 or os.pread(descriptor, len(MARK), 0) == MARK)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be opened ({error.strerror}); this file locks the folder of a run. Remove it, or give "
            "another --output-dir."
        ) from None
    if not ours:
        os.close(descriptor)
        raise UserError(f"{path}: is not the lock file of a run; rename or remove it, or give another --output-dir.")
    return descriptor


def _try_lock(folder: Path, descriptor: int) -> bool:
    """True if locked, False on a file system without locks; raises UserError, naming the holder, if another has it."""
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
        f"--output-dir {folder}: another run is writing there: {holder or 'an unknown process'}. Wait for its "
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
    """The process that wrote the file; None if the content is not ours."""
    try:
        content = json.loads(os.pread(descriptor, LONGEST, 0))
        holder = Holder(**content)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    fits = isinstance(holder.host, str) and isinstance(holder.process, int) and isinstance(holder.time, str)
    return holder if fits else None


def _is_locked(descriptor: int) -> bool | None:
    """Whether another process holds the lock, tested without taking it; None if that cannot be tested."""
    if sys.platform != "linux":
        return None
    asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, asked)
    except OSError:
        return None
    return struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK
