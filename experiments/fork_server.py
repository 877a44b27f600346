"""Starts commands as forks of one process that has already imported everything: in a tenth of a second instead of five.

The warm process is Python's fork server. It never computes or uses CUDA, so each fork does both as a new process would.
It ends once the process that started it and all forks have ended.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, BinaryIO

from utils.runtime.signals import SIGNALS

ROOT = Path(__file__).resolve().parents[1]
# The warm process imports these, and with them everything that takes long.
PRELOAD = ["_normal.train", "_policy_gradient.train", "sklearn.metrics"]

_lock = threading.Lock()  # multiprocessing's table of processes is not safe if several threads change it


class Command:
    """A running `python ...` command in a fork of the warm process; stopped and awaited as a subprocess.Popen.

    command: `[sys.executable, SCRIPT, ...]` or `[sys.executable, "-m", MODULE, ...]`; output: receives stdout and
    stderr; the fork shares this open file, and with it the file's lock; environment: all variables. OMP_NUM_THREADS
    and others that libraries read when they are loaded are those of the process that started the warm process.
    """

    def __init__(self, command: Sequence[str], output: BinaryIO, environment: Mapping[str, str]) -> None:
        descriptor = output.fileno()
        self._process = start(_run, command[1:], dict(environment), stdout=descriptor, stderr=descriptor)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def wait(self) -> int:
        """The exit code, once the command has ended; negative for a signal."""
        wait([self._process.sentinel])
        with _lock:
            self._process.join()
        return self._process.exitcode


def start(
    target: Callable[..., None],
    *arguments: object,
    stdout: int | None,
    stderr: int | None,
    cwd: Path | None = None,
) -> BaseProcess:
    """Call a function of a module in a fork of the warm process.

    stdout, stderr: descriptors of this process, None for closed; cwd: the function's working directory, None for this
    process's. Raises ChildProcessError if the warm process ends before it has forked.
    """
    streams = [None if number is None else _Descriptor(number) for number in (stdout, stderr)]
    context = server()
    process = context.Process(target=_call, args=(target, arguments, streams, cwd))
    with _lock:
        try:
            process.start()
        except (EOFError, ConnectionError):
            raise ChildProcessError(
                "the process that starts commands has ended, perhaps for lack of memory. Run the same command again."
            ) from None
    return process


def server() -> ForkServerContext:
    """The context whose processes are forks of the warm process, which is started if needed.

    The functions that these processes call must first call `receive_signals`.
    """
    context = multiprocessing.get_context("forkserver")
    with _lock:
        context.set_forkserver_preload(PRELOAD)
        resource_tracker.ensure_running()  # the fork server would start it too, but it unblocks signals
        # A signal to the whole process group must not end the warm process while forks still run. Blocked, and not
        # ignored, so that a signal to a fork that has just begun is delivered a little later.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        python_path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = with_root(python_path)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if python_path is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = python_path
    return context


def with_root(python_path: str | None) -> str:
    """PYTHONPATH with the repository's root in front, so that `-m utils...` works from any folder."""
    return os.pathsep.join([str(ROOT), *filter(None, [python_path])])


def receive_signals() -> None:
    """Let this fork receive signals, which are blocked in the warm process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class _Descriptor:
    """A descriptor among the arguments of a process: the process gets the number of its own copy."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, (DupFd(self.number),)


def _copied(duplicate: Any) -> int:
    return duplicate.detach()


def _call(
    target: Callable[..., None], arguments: Sequence[object], streams: Sequence[int | None], cwd: Path | None
) -> None:
    receive_signals()
    if cwd is not None:
        os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a run from the command line
    for number, (name, copy) in enumerate(zip(("stdout", "stderr"), streams, strict=True), 1):
        if copy is None:
            os.close(number)
            setattr(sys, name, None)
        else:
            os.dup2(copy, number)
            os.close(copy)
    target(*arguments)


def _run(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """What `python WORDS...` does."""
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
