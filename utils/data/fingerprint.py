"""What a cache's folder is named after: the files of a split and all that their pixels depend on."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.cache import VERSION
from utils.data.folders import ImageFiles

CONTENT = 2**20  # bytes of an image's file that count, from its beginning


def fingerprint(files: ImageFiles, parameters: dict[str, Any]) -> str:
    """16 hexadecimal digits of the parameters, of where the files really are, and of what is in them.

    Of each file name, size, times and link; of each class its folder and the content of its first and last image: of a
    split of 165 classes at most 330 files are opened, however many it holds. ctime, which no program can set, changes
    when a file is replaced by another one of its size and mtime; a changed owner or mode only costs another build.
    """
    places = [os.path.realpath(files.root), *(os.path.realpath(files.root / name) for name in files.classes)]
    digest = hashlib.sha256(json.dumps([VERSION, parameters, places], sort_keys=True).encode())
    for index in range(len(files)):
        path = files.path_as_text(index)
        digest.update(b"%b\0%b\0" % (os.fsencode(path), _state(os.path.join(files.root, path))))
    for index in _first_and_last(files.targets):
        digest.update(_content(files.path(index)))
    return digest.hexdigest()[:16]


def _state(path: str) -> bytes:
    """Size, times of change, and where a link leads."""
    try:
        status, link = os.lstat(path), b""
        if stat.S_ISLNK(status.st_mode):
            link = os.fsencode(os.readlink(path))
            status = os.stat(path)
    except OSError:  # a link that leads nowhere: reported like any unreadable image
        return b"unreadable"
    return b"%d %d %d %b" % (status.st_size, status.st_mtime_ns, status.st_ctime_ns, link)


def _first_and_last(targets: np.ndarray) -> list[int]:
    """Of each class the positions of its first and last image; targets: (N,), sorted."""
    ends = np.flatnonzero(np.diff(targets, prepend=-1, append=-1))  # where another class begins, and N
    return sorted({*ends[:-1].tolist(), *(ends[1:] - 1).tolist()})


def _content(path: Path) -> bytes:
    """A digest of the file's first bytes."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
            return b"no file"
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(CONTENT)).digest()
    except OSError:
        return b"unreadable"
