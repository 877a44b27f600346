"""Standard output and error that no run depends on: text that they do not accept is dropped."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


class _Lossy(io.FileIO):
    """A descriptor whose writes never fail; each is tried, since a full disk may have room again later."""

    def write(self, data: bytes | memoryview) -> int:
        written = None
        with suppress(OSError):  # a closed pipe, a lost terminal, a full disk
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


def drop_lost_output(*names: str) -> None:
    """Let sys.stdout, sys.stderr or both ("stdout", "stderr") go on when nobody can receive them, or they are closed.

    Streams that are not the process's own (a notebook's, a test's) stay as they are.
    """
    _open_standard_descriptors()
    for name in names:
        stream = getattr(sys, name)
        if stream is None:  # closed before Python started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open until the process ends)
        elif stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _lossy(stream))


def _open_standard_descriptors() -> None:
    """Open /dev/null in the place of closed ones: a checkpoint opened as descriptor 2 would receive error messages."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _lossy(stream: TextIO) -> TextIO:
    """The same stream, with a raw file that drops."""
    with suppress(OSError, ValueError):
        stream.flush()
    raw = _Lossy(stream.fileno(), "w", closefd=False)
    raw.name = stream.name
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
