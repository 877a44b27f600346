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
from collections.abc import Callable
from contextlib import suppress
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


def join_processes(device_name: str | None, timeout_seconds: float = 600) -> torch.device:
    """Join the process group and return this process's device.

    timeout_seconds: how long a rank waits for the others, here and in each later collective. A process that has not
    joined by then ends. Raises UserError for a device that this node lacks, and if joining fails.
    """
    timeout_seconds = min(timeout_seconds, 1e6)  # torch and threading refuse much larger numbers

    def give_up() -> None:
        _print_error(_not_joined(timeout_seconds, "no answer"))
        _leave_at_once()

    timer = threading.Timer(timeout_seconds, give_up)  # torch limits each step of joining, not all together
    timer.daemon = True
    if distributed.is_launched():
        timer.start()
    if distributed.current_launch().rank != 0:
        warnings.simplefilter("ignore")  # rank 0 prints them for all
    try:
        device = distributed.initialize(device_name, timeout_seconds)
    except ValueError as error:
        raise UserError(str(error), agreed=True) from None
    except Exception as error:
        if explain(error) is None and distributed.is_lost_contact(error):
            raise UserError(_not_joined(timeout_seconds, first_line(error))) from None
        raise
    finally:
        timer.cancel()
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _not_joined(seconds: float, reason: str) -> str:
    address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    launch = distributed.current_launch()
    return (
        f"rank {launch.rank} could not join the other {launch.world_size - 1} within "
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
            main()
        finally:
            end_workers()
    except KeyboardInterrupt:  # before the training, so there is nothing to save
        sys.exit(128 + signal.SIGINT)
    except Interrupted as stop:
        if distributed.is_main_process():
            print_line(stop)
        distributed.barrier()  # as soon as one rank exits, torchrun ends all others; rank 0 prints first
        distributed.shutdown()
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        user_error = _as_user_error(error)
        if user_error is not None:
            _end_after_user_error(user_error)
        _end_after_crash(error)
        raise
    distributed.shutdown()


def _end_after_user_error(error: UserError) -> NoReturn:
    launch = distributed.current_launch()
    if launch.rank == 0 or not error.agreed:
        _print_error(str(error))
    if launch.world_size > 1 and not error.agreed:
        distributed.post_failure(str(error))
        _leave_at_once()
    distributed.barrier()  # rank 0 prints first
    if distributed.world_size() == 1 and launch.rank != 0:  # the ranks have not joined yet
        time.sleep(10)  # rank 0 meets the same error, exits, and torchrun ends this process sooner
    distributed.shutdown()
    sys.exit(EXIT_CODE)


def _end_after_crash(error: Exception) -> None:
    """End this process after an error that is not the user's; returns if it is for Python to print."""
    problem = explain(error)
    if problem is not None:
        _print_error(problem)
        distributed.post_failure(problem)
    elif distributed.current_launch().world_size == 1:
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


def _as_user_error(error: Exception) -> UserError | None:
    """The UserError for an error of the file system, an impossible name or too little memory; None for any other."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)) and explain(error) is None:
        return UserError(f"{os.fsdecode(error.filename)}: {error.strerror}.")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return UserError("there is too little memory for this; give smaller sizes, or fewer of them.")
    if isinstance(error, UnicodeEncodeError):
        return UserError(f"{error.object!r}: no file can have this name.")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return UserError("a name holds a NUL character, which no file can have; give another.")
    return None


def lost_contact(error: BaseException) -> str:
    """The message for a failed collective."""
    return (
        f"rank {distributed.rank()}: another rank ended, or did not answer within --timeout ({first_line(error)}); its "
        "own output says why. --resume auto continues from the last checkpoint."
    )


def _leave_at_once() -> None:
    """End this process without waiting for collectives that the others never join."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def keep_freed_memory(keep: bool = True) -> None:
    """Keep freed memory in the process, instead of returning it to the system. Does nothing without glibc.

    A training step frees hundreds of megabytes of activations. By default glibc returns large blocks to the system,
    which clears all their pages again for the next step: a third of a joint step of two resnet10t on two cores.
    keep: False restores glibc's default.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, -1 if keep else 128 * 1024)
        mallopt(M_MMAP_MAX, 0 if keep else 65536)
