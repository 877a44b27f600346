"""Writers of files that appear whole or not at all."""

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from utils.runtime.errors import UserError
from utils.runtime.reading import without_waiting

TEMPORARY = ".tmp"
BUFFER_BYTES = 2**20
OURS = re.compile(
    r"\.(checkpoint\w*\.pth|model_\w+\.pth|\w+\.jsonl?|(per_class|predictions)\w*\.csv|\w+\.png|probe)\.\d+\.tmp"
)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file or nothing, as `stream_atomically` does."""
    stream_atomically(path, lambda file: file.write(data))


def stream_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """A whole file or nothing: `write` fills a temporary file in the same folder; fsync, rename, fsync of the folder.

    Raises UserError if the file system refuses; a previous file at `path` is then unchanged.
    """
    try:
        with _temporary(path) as temporary:
            _write_and_sync(temporary, write)
            os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); what was there is unharmed.") from None
    try:
        _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: written, but a power failure may undo it ({error.strerror}).") from None


def write_json(path: Path, content: Any) -> None:
    """Write a value as indented ASCII JSON. Raises UserError as `write_atomically` does."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def check_absent(path: Path, overwrite: bool, flag: str = "--output") -> None:
    """Raise UserError if `path` already exists, unless --overwrite was given."""
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path}: already exists; give another {flag}, or --overwrite.")


def make_parent(path: Path, flag: str = "--output") -> None:
    """Create the folder of an output file. Raises UserError if the file system refuses."""
    make_folder(path.parent, flag)


def make_folder(folder: Path, flag: str = "--output") -> None:
    """Create an output folder. Raises UserError if it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror}); give another {flag}.") from None
    if not os.access(folder, os.W_OK):  # now, not after hours of work
        raise UserError(f"{folder}: no permission to write there; give another {flag}.")


@contextmanager
def opened_atomically(path: Path) -> Iterator[TextIO]:
    """A text file (UTF-8) to write line by line, which appears under its name when the block ends without an error.

    Characters that UTF-8 cannot encode become backslash escapes. Raises UserError if the file system refuses.
    """
    try:
        with _temporary(path) as temporary:
            with open(open_new(temporary), "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from None


def open_new(path: str | Path) -> int:
    """A descriptor for writing a new file. Anything else of this name is removed, and links are not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o666)
    except FileExistsError:
        os.unlink(path)
        return os.open(path, flags, 0o666)


def not_followed(path: str, flags: int) -> int:
    """For `open(..., opener=not_followed)`: as `without_waiting`, and raises OSError for a link."""
    return without_waiting(path, flags | os.O_NOFOLLOW)


def temporary_path(path: Path) -> Path:
    """Where this process writes before it renames to `path`: a hidden file in the same folder."""
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """The temporary path of `path`, removed at the end if it still exists."""
    temporary = temporary_path(path)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove temporary files of killed runs. Raises UserError if the file system refuses."""
    for path in folder.glob(f".*{TEMPORARY}"):
        try:
            if OURS.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: left by a run that was killed, cannot be removed ({error.strerror}).") from None


def prove_writable(folder: Path, data: memoryview) -> None:
    """Write the bytes to a temporary file in the folder and remove it. Raises UserError if that fails."""
    try:
        with _temporary(folder / "probe") as probe:
            _write_and_sync(probe, lambda file: file.write(data))
    except OSError as error:
        raise UserError(
            f"{folder}: a checkpoint of {len(data) / 1e6:.0f} MB cannot be written there ({error.strerror}); "
            "free space, or give another --output-dir."
        ) from None


class _File(io.FileIO):
    """A descriptor that keeps the first error of a write: torch.save may raise an error of its own instead."""

    error: OSError | None = None

    def write(self, data: memoryview) -> int:  # the buffer above it continues after a partial write
        try:
            return os.write(self.fileno(), data)
        except OSError as error:
            self.error = self.error or error
            raise


_being_written: set[int] = set()  # descriptors


def _release_in_child() -> None:
    """Release these files in a forked loader worker, which would keep their disk space until it ends.

    The descriptors lead to /dev/null then, because objects of the writing thread still hold them.
    """
    if _being_written:
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in _being_written:
            os.dup2(null, descriptor, inheritable=False)
        os.close(null)


os.register_at_fork(after_in_child=_release_in_child)


def _write_and_sync(path: Path, write: Callable[[BinaryIO], object]) -> None:
    raw = _File(open_new(path), "wb")
    descriptor = raw.fileno()
    try:
        with io.BufferedWriter(raw, BUFFER_BYTES) as file:
            _being_written.add(descriptor)
            try:
                write(file)
                file.flush()
                os.fsync(descriptor)
            finally:
                _being_written.discard(descriptor)
    finally:
        if raw.error is not None:
            raise raw.error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
