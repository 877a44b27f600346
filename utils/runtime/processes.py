"""How a process joins the others at the start and leaves at the end, with one sentence per error."""

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

import torch

from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.lifetimes import end_workers
from utils.runtime.node_limits import explain
from utils.runtime.output import drop_lost_output
from utils.runtime.signals import EXIT_CODE as INTERRUPTED_EXIT_CODE
from utils.runtime.signals import Interrupted
from utils.runtime.text import print_line

EXIT_CODE = 2
GRACE_SECONDS = 10
LONGEST_TIMEOUT = 1e6  # seconds; torch and threading take no number at all


def join_processes(device_name: str | None, timeout_seconds: float = 600) -> torch.device:
    """Join the process group; returns this process's device.

    timeout_seconds: how long a rank waits for the others, here and in each later collective. A process that has not
    joined by then is ended. Raises UserError for a device that is not there, and where joining fails.
    """
    timeout_seconds = min(timeout_seconds, LONGEST_TIMEOUT)
    if distributed.launched_rank() != 0:
        warnings.simplefilter("ignore")  # rank 0 speaks for all
    try:
        with _joining_limited_to(timeout_seconds):
            device = distributed.initialize(device_name, timeout_seconds)
    except ValueError as error:
        raise UserError(str(error), agreed=True) from None
    except Exception as error:
        if explain(error) is None and distributed.is_lost_contact(error):
            raise UserError(_not_joined(timeout_seconds, str(error).split("\n")[0])) from None
        raise
    if device.type == "cpu":
        keep_freed_memory()
    return device


@contextmanager
def _joining_limited_to(seconds: float) -> Iterator[None]:
    """End this process with a sentence if the block lasts longer: each step of joining has a limit of its own."""

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
    """Run `main`, then leave the process group; a UserError becomes one sentence on stderr and exit code 2.

    A rank that fails alone speaks for itself, and leaves word for the others, so that they stop without a traceback of
    the broken connection. Lost output (a closed pipe, a full disk) does not end the process; with prints_result, where
    stdout carries the result, only a lost stderr does not.
    """
    drop_lost_output("stderr", *([] if prints_result else ["stdout"]))
    if hasattr(sys.stdout, "reconfigure"):  # which a stream in a notebook lacks
        sys.stdout.reconfigure(errors="backslashreplace")  # the names of files may be no text
    try:
        try:
            with _as_sentences():
                main()
        finally:
            end_workers()
    except UserError as error:
        alone = distributed.launched_world_size() == 1
        if alone or not error.agreed or distributed.launched_rank() == 0:
            _print_error(str(error))
        if not alone and error.agreed:
            _wait_for_rank_0()
        elif not alone:
            distributed.post_failure(str(error))
            _leave_at_once()
        distributed.shutdown()
        sys.exit(EXIT_CODE)
    except KeyboardInterrupt:  # before the training: there is nothing to save
        sys.exit(128 + signal.SIGINT)
    except Interrupted as stop:
        if distributed.is_main_process():
            print_line(stop)
        if distributed.in_process_group():
            _wait_for_rank_0()
        distributed.shutdown()
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        if (problem := explain(error)) is not None:
            _print_error(problem)
            distributed.post_failure(problem)
            _leave_at_once()
        if distributed.launched_world_size() == 1:
            raise
        if distributed.is_lost_contact(error):
            if not distributed.failure_posted():
                _print_error(lost_contact(error))
        else:
            traceback.print_exc()
            distributed.post_failure(str(error))
        _leave_at_once()
    distributed.shutdown()


def _print_error(message: str) -> None:
    """Print the sentence on stderr, and leave it where torchrun looks for what to show in its own summary."""
    print_line(f"error: {message}", sys.stderr)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError), open(path, "w") as file:
            json.dump({"message": content}, file)


@contextmanager
def _as_sentences() -> Iterator[None]:
    """Turn what a file system, a name or the memory refuses, where nothing closer has done so, into a UserError."""
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
    """What to say where a collective failed."""
    reason = str(error).splitlines()[0]
    return (
        f"rank {distributed.rank()}: another rank ended, or did not answer within --timeout ({reason}); what it "
        "printed itself tells why. --resume auto goes on from the last checkpoint."
    )


def _wait_for_rank_0() -> None:
    """Let rank 0 speak before any rank exits: torchrun ends all others, rank 0 too, as soon as one has gone."""
    if distributed.in_process_group():
        distributed.barrier()
    elif distributed.launched_rank() != 0:
        time.sleep(GRACE_SECONDS)  # rank 0 meets the same error, exits, and torchrun ends this process sooner


def _leave_at_once() -> None:
    """End this process without waiting for collectives that the others will never join."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)


# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
DEFAULTS = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65536}
KEEP = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}


def keep_freed_memory(keep: bool = True) -> None:
    """Let the process keep the memory that it frees; nothing is done where the C library is not glibc.

    A training step frees hundreds of megabytes of activations, and glibc gives large blocks back to the system, which
    clears every page of them anew for the next step: a third of the time of a joint step of two resnet10t on two cores.
    False: as glibc has it by itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (KEEP if keep else DEFAULTS).items():
            mallopt(parameter, value)
