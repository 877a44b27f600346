"""Standard output and error that never end a run: text that nobody can receive is dropped."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


class _Lossy(io.FileIO):
    """A descriptor whose writes never fail. Each write is tried, because a full disk may have room again later."""

    def write(self, data: bytes | memoryview) -> int:
        written = None
        with suppress(OSError):  # a closed pipe, a lost terminal, a full disk
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


def drop_lost_output(*names: str) -> None:
    """Keep sys.stdout or sys.stderr (`names`: "stdout", "stderr") usable when they are closed or cannot be written.

    Streams that are not the process's own (of a notebook, of a test) stay unchanged.
    """
    _open_standard_descriptors()
    for name in names:
        stream = getattr(sys, name)
        if stream is None:  # closed before Python started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (stays open until the process ends)
        elif stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _lossy(stream))


def _open_standard_descriptors() -> None:
    """Open /dev/null for closed ones: a checkpoint opened as descriptor 2 would receive error messages."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _lossy(stream: TextIO) -> TextIO:
    """The same stream on a raw file that drops what it cannot write."""
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
