"""Files that appear whole or not at all."""

import os
from pathlib import Path

from utils.errors import UserError


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file that appears whole or not at all: temporary file in the same folder, fsync, rename, folder fsync.

    Raises UserError if the file system refuses; what stood at `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            _write_and_sync(temporary, memoryview(data))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); what was there is unharmed.") from None


def _write_and_sync(path: Path, data: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
