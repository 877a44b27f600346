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
    """Open a regular file for reading. Raises OSError for anything else, also for a name that no file can have."""
    try:
        return open(path, "rb", opener=without_waiting)
    except ValueError:  # a NUL character, or a surrogate that stands for no byte
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None


def without_waiting(path: str, flags: int) -> int:
    """For `open(..., opener=without_waiting)`: raises OSError for pipes and devices, instead of waiting for them."""
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` itself refuses folders
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", path)


def read_bytes(path: str | Path, most: int | None = MOST_BYTES) -> bytes:
    """The content of a regular file. Raises OSError as `open_regular` does, and for more than `most` bytes."""
    with open_regular(path) as file:
        content = file.read(-1 if most is None else most + 1)
    if most is not None and len(content) > most:
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
    level: list[Any] = [[value]]
    for _ in range(MOST_DEEP + 1):
        containers = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in containers for item in items if isinstance(item, (dict, list))]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _parse_int(text: str) -> int:
    if len(text) > MOST_DIGITS + text.startswith("-"):
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
