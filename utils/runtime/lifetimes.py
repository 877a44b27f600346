"""Which process ends with which: a rank with its launcher, a loader worker with its rank. Imports no torch."""

import ctypes
import multiprocessing
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def end_with_launcher() -> None:
    """End this rank as soon as the torchrun that started it has ended, whatever the rank does then.

    Call it before the heavy imports. The kernel sends SIGKILL: a rank that waits in C++ for the others would not react
    to another signal, and files are written atomically. Nothing is done for a process that torchrun did not start: one
    from a shell may outlive its shell, and Slurm ends its tasks itself.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    end_with_parent(parent)
    if parent == 1 and not _may_be_launcher(Path("/proc/1/cmdline")):
        os._exit(2)  # torchrun was killed while this process started, and process 1 has adopted it


def end_with_parent(parent: int) -> None:
    """Let the kernel end this process with its parent, process `parent`; on Linux only."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(2)


def _may_be_launcher(command_line: Path) -> bool:
    """Whether process 1 can be torchrun, as in a container; True if it cannot be found out."""
    try:
        command = command_line.read_bytes()
    except OSError:
        return True
    return b"torch" in command or b"python" in command


def end_workers() -> None:
    """Kill the loader workers of this process: a stopped one would keep the process from ending."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own would raise an error for each
    try:
        workers = [process for process in multiprocessing.active_children() if process.daemon]
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(timeout=10)  # longer only in an uninterruptible read
    finally:
        signal.signal(signal.SIGCHLD, handler)
