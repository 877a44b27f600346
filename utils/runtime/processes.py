"""Start and end of a process: joining the other ranks, one sentence per error, and exit codes."""

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch

from utils.runtime import distributed
from utils.runtime.errors import UserError, first_line
from utils.runtime.lifetimes import end_workers
from utils.runtime.node_limits import explain
from utils.runtime.output import drop_lost_output
from utils.runtime.signals import EXIT_CODE as INTERRUPTED_EXIT_CODE
from utils.runtime.signals import Interrupted
from utils.runtime.text import print_line

EXIT_CODE = 2
GRACE_SECONDS = 10
LONGEST_TIMEOUT = 1e6  # seconds; torch and threading refuse much larger numbers


def join_processes(device_name: str | None, timeout_seconds: float = 600) -> torch.device:
    """Join the process group and return this process's device.

    timeout_seconds: how long a rank waits for the others, here and in each later collective. A process that has not
    joined by then ends. Raises UserError for a device that this node lacks, and if joining fails.
    """
    timeout_seconds = min(timeout_seconds, LONGEST_TIMEOUT)
    if distributed.launched_rank() != 0:
        warnings.simplefilter("ignore")  # rank 0 prints them for all
    try:
        with _joining_limited_to(timeout_seconds):
            device = distributed.initialize(device_name, timeout_seconds)
    except ValueError as error:
        raise UserError(str(error), agreed=True) from None
    except Exception as error:
        if explain(error) is None and distributed.is_lost_contact(error):
            raise UserError(_not_joined(timeout_seconds, first_line(error))) from None
        raise
    if device.type == "cpu":
        keep_freed_memory()
    return device


@contextmanager
def _joining_limited_to(seconds: float) -> Iterator[None]:
    """End this process with a sentence if the block takes longer. (Torch only limits each step of joining.)"""

    def give_up() -> None:
        _print_error(_not_joined(seconds, "no answer"))
        _leave_at_once()

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    if distributed.is_launched():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _not_joined(seconds: float, reason: str) -> str:
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return (
        f"rank {distributed.launched_rank()} could not join the other {distributed.launched_world_size() - 1} within "
        f"--timeout {seconds:g} seconds ({reason}): see what the others printed, and whether all were started and "
        f"reach {address}."
    )


def run_script(main: Callable[[], None], *, prints_result: bool = False) -> None:
    """Run `main`, then leave the process group. A UserError becomes one sentence on stderr and exit code 2.

    A rank that fails alone prints its own error and leaves a message for the others, which then stop without a
    traceback of the broken connection. Lost output (a closed pipe, a full disk) does not end the process, except for
    stdout with `prints_result`: it then carries the result.
    """
    drop_lost_output("stderr", *([] if prints_result else ["stdout"]))
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream lacks it
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be text
    try:
        try:
            with _as_user_errors():
                main()
        finally:
            end_workers()
    except UserError as error:
        _end_after_user_error(error)
    except KeyboardInterrupt:  # before the training, so there is nothing to save
        sys.exit(128 + signal.SIGINT)
    except Interrupted as stop:
        if distributed.is_main_process():
            print_line(stop)
        if distributed.in_process_group():
            _wait_for_rank_0()
        distributed.shutdown()
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        _end_after_crash(error)
        raise
    distributed.shutdown()


def _end_after_user_error(error: UserError) -> NoReturn:
    several = distributed.launched_world_size() > 1
    if not several or not error.agreed or distributed.launched_rank() == 0:
        _print_error(str(error))
    if several and error.agreed:
        _wait_for_rank_0()
    elif several:
        distributed.post_failure(str(error))
        _leave_at_once()
    distributed.shutdown()
    sys.exit(EXIT_CODE)


def _end_after_crash(error: Exception) -> None:
    """End this process after an error that is not the user's; returns if it is for Python to print."""
    problem = explain(error)
    if problem is not None:
        _print_error(problem)
        distributed.post_failure(problem)
    elif distributed.launched_world_size() == 1:
        return
    elif not distributed.is_lost_contact(error):
        traceback.print_exc()
        distributed.post_failure(str(error))
    elif not distributed.failure_posted():
        _print_error(lost_contact(error))
    _leave_at_once()


def _print_error(message: str) -> None:
    """Print the message on stderr, and write it where torchrun looks for the message of its own summary."""
    print_line(f"error: {message}", sys.stderr)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError), open(path, "w") as file:
            json.dump({"message": content}, file)


@contextmanager
def _as_user_errors() -> Iterator[None]:
    """Turn errors of the file system, of impossible names and of memory, if not yet handled, into UserErrors."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, (str, bytes)) or explain(error) is not None:
            raise
        raise UserError(f"{os.fsdecode(error.filename)}: {error.strerror}.") from error
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError("there is too little memory for this; give smaller sizes, or fewer of them.") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{error.object!r}: no file can have this name.") from error
    except ValueError as error:
        if "embedded null" not in str(error):
            raise
        raise UserError("a name holds a NUL character, which no file can have; give another.") from error


def lost_contact(error: BaseException) -> str:
    """The message for a failed collective."""
    return (
        f"rank {distributed.rank()}: another rank ended, or did not answer within --timeout ({first_line(error)}); its "
        "own output says why. --resume auto continues from the last checkpoint."
    )


def _wait_for_rank_0() -> None:
    """Let rank 0 print before any rank exits: as soon as one has, torchrun ends all others, including rank 0."""
    if distributed.in_process_group():
        distributed.barrier()
    elif distributed.launched_rank() != 0:
        time.sleep(GRACE_SECONDS)  # rank 0 meets the same error, exits, and torchrun ends this process sooner


def _leave_at_once() -> None:
    """End this process without waiting for collectives that the others never join."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULTS = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65536}
KEEP = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}


def keep_freed_memory(keep: bool = True) -> None:
    """Keep freed memory in the process, instead of returning it to the system. Does nothing without glibc.

    A training step frees hundreds of megabytes of activations. By default glibc returns large blocks to the system,
    which clears all their pages again for the next step: a third of a joint step of two resnet10t on two cores.
    keep: False restores glibc's default.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (KEEP if keep else DEFAULTS).items():
            mallopt(parameter, value)
