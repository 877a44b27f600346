"""Reads files that may be broken or hostile: regular files only, a bounded number of bytes, JSON of a sane size."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 200_000_000  # of a table or a log: predictions of a million images take half of it
MOST_DIGITS = 20  # of a whole number: 2^64 has as many
MOST_DEEP = 100  # lists and objects in one another


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, opened for reading; never waits for the other end of a pipe.

    Raises OSError for anything else, for a name that no file can have too.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError:  # a NUL character, or a surrogate that stands for no byte
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "is no regular file", str(path))


def read_bytes(path: str | Path, most: int | None = MOST_BYTES) -> bytes:
    """The content of a regular file; raises OSError as `open_regular`, and for more bytes than `most` (None: any)."""
    with open_regular(path) as file:
        if most is None:
            return file.read()
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"has more than the {most} bytes expected here", str(path))
    return content


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """The value in a JSON file; raises OSError as `read_bytes`, and ValueError for what is no sane JSON."""
    return parse_json(read_bytes(path, most))


def parse_json(content: bytes | str) -> Any:
    """Raises ValueError for what is no JSON, for endless nesting, and for numbers of more digits than any of ours."""
    try:
        value = json.loads(content, parse_int=_short_int)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    pending = [(value, 0)]
    while pending:
        held, depth = pending.pop()
        if depth > MOST_DEEP:
            raise ValueError("nested too deeply")
        inner = held.values() if isinstance(held, dict) else held if isinstance(held, list) else ()
        pending += [(one, depth + 1) for one in inner if isinstance(one, (dict, list))]
    return value


def _short_int(text: str) -> int:
    if len(text) > MOST_DIGITS + text.startswith("-"):
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
