"""Readers of possibly damaged or hostile files: regular files only, a bounded size, JSON of a bounded depth."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 200_000_000  # of a table or a log; predictions of a million images take half of it
MOST_DIGITS = 20  # of a whole number; 2^64 has 20
MOST_DEEP = 100  # levels of nested lists and objects


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading, without ever waiting for the other end of a pipe.

    Raises OSError for anything else, including a name that no file can have.
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
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_bytes(path: str | Path, most: int | None = MOST_BYTES) -> bytes:
    """The content of a regular file. Raises OSError as `open_regular` does, and for more than `most` bytes."""
    with open_regular(path) as file:
        if most is None:
            return file.read()
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"has more than the {most} bytes expected here", str(path))
    return content


def read_json(path: str | Path, most: int = MOST_BYTES) -> Any:
    """The value in a JSON file. Raises OSError as `read_bytes` does, and ValueError as `parse_json` does."""
    return parse_json(read_bytes(path, most))


def parse_json(content: bytes | str) -> Any:
    """The value of a JSON text. Raises ValueError for invalid JSON, deep nesting and very long numbers."""
    try:
        value = json.loads(content, parse_int=_parse_int)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    pending = [(value, 0)]
    while pending:
        container, depth = pending.pop()
        if depth > MOST_DEEP:
            raise ValueError("nested too deeply")
        items = container.values() if isinstance(container, dict) else container if isinstance(container, list) else ()
        pending += [(item, depth + 1) for item in items if isinstance(item, (dict, list))]
    return value


def _parse_int(text: str) -> int:
    if len(text) > MOST_DIGITS + text.startswith("-"):
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
