"""The fingerprint that names a cache's folder: a split's files and the parameters of their pixels."""

import hashlib
import json
import os
import stat
from typing import Any

import numpy as np

from utils.data.cache import VERSION
from utils.data.folders import ImageFiles
from utils.runtime.reading import open_regular

CONTENT = 2**20  # bytes hashed at the start of an image file


def fingerprint(files: ImageFiles, parameters: dict[str, Any]) -> str:
    """A hash (16 hexadecimal digits) of the parameters, the real folders, and the state of every file.

    A file's state is its name, size, times and link target. Of each class, the contents of the first and last image
    are hashed too: at most 330 opened files for 165 classes. ctime, which programs cannot set, changes when a file is
    replaced by one of equal size and mtime; a new owner or mode only costs a rebuild.
    """
    places = [os.path.realpath(files.root), *(os.path.realpath(files.root / name) for name in files.classes)]
    digest = hashlib.sha256(json.dumps([VERSION, parameters, places], sort_keys=True).encode())
    for index in range(len(files)):
        path = files.path_as_text(index)
        digest.update(b"%b\0%b\0" % (os.fsencode(path), _state(os.path.join(files.root, path))))
    ends = np.flatnonzero(np.diff(files.targets, prepend=-1, append=-1))  # where a class begins, and N
    for index in sorted({*ends[:-1].tolist(), *(ends[1:] - 1).tolist()}):
        digest.update(_content(os.fspath(files.path(index))))
    return digest.hexdigest()[:16]


def _state(path: str) -> bytes:
    """Size, times and link target of a file."""
    try:
        status, link = os.lstat(path), b""
        if stat.S_ISLNK(status.st_mode):
            link = os.fsencode(os.readlink(path))
            status = os.stat(path)
    except OSError:  # a broken link, reported later like any unreadable image
        return b"unreadable"
    return b"%d %d %d %b" % (status.st_size, status.st_mtime_ns, status.st_ctime_ns, link)


def _content(path: str) -> bytes:
    """A digest of the file's first bytes."""
    try:
        with open_regular(path) as file:  # never waits for the writer of a pipe
            return hashlib.sha256(file.read(CONTENT)).digest()
    except OSError:
        return b"unreadable"
