"""A side of a comparison in a process of its own, so that the two share no heap, allocator settings or threads."""

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.timing import Work
from experiments import fork_server


class OwnProcess:
    """Work that is prepared and done in another process; a call returns its seconds. Between calls it waits.

    A context manager that ends the process.
    """

    def __init__(self, prepare: Callable[..., Work], *arguments: Any) -> None:
        """prepare: a function of a module; returns the work. It has to wait for the device itself."""
        context = fork_server.server()  # which has imported torch once for all sides
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, prepare, arguments), daemon=True)
        self.process.start()
        other.close()

    def __call__(self) -> float:
        self.pipe.send(True)
        return self.pipe.recv()  # EOFError if the process has failed; its traceback is on stderr

    def __enter__(self) -> "OwnProcess":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the process may have failed
            self.pipe.send(False)
        self.process.join()


def _serve(pipe: Connection, prepare: Callable[..., Work], arguments: tuple) -> None:
    fork_server.receive_signals()
    work = prepare(*arguments)
    while pipe.recv():
        gc.collect()
        gc.disable()
        start = time.perf_counter()
        work()
        pipe.send(time.perf_counter() - start)
        gc.enable()
