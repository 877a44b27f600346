"""Ends a rank with its launcher, and a loader worker with its rank. Imports no torch."""

import ctypes
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def end_with_launcher() -> None:
    """End this rank as soon as the torchrun that started it has ended.

    Call it before the heavy imports. The kernel sends SIGKILL, because a rank that waits for the others in C++ does not
    react to other signals; files are written atomically, so none is harmed. Processes not started by torchrun are left
    alone: one from a shell may outlive its shell, and Slurm ends its tasks itself.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    end_with_parent(parent)
    if parent == 1:
        with suppress(OSError):
            command = Path("/proc/1/cmdline").read_bytes()
            if b"torch" not in command and b"python" not in command:  # in a container, process 1 may be torchrun
                os._exit(2)  # torchrun was killed while this process started, and process 1 has adopted it


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process with its parent, process `parent`. Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent had already ended
        os._exit(2)


def end_workers() -> None:
    """Kill the loader workers of this process: a stopped worker would keep the process from ending."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own handler would raise an error for each worker
    try:
        workers = [process for process in multiprocessing.active_children() if process.daemon]
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(timeout=10)  # longer only in an uninterruptible read
    finally:
        signal.signal(signal.SIGCHLD, handler)
