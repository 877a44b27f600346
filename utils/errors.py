"""What the user must mend: one clear sentence, printed once, a non-zero exit on every rank, no rank left waiting."""

import errno
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from utils import distributed
from utils.allocator import keep_freed_memory
from utils.interruption import EXIT_CODE as INTERRUPTED_EXIT_CODE
from utils.interruption import Interrupted
from utils.text import print_line

EXIT_CODE = 2
GRACE_SECONDS = 10
TOO_MANY_FILES = (
    "too many open files for this process: raise the limit in the shell that starts the run (ulimit -n 65536), or give "
    "fewer --workers."
)


class UserError(Exception):
    """Bad input, a full disk, and the like; the message names the thing, what was expected, and what to do.

    `agreed` is set when every rank raises the same error at the same place, so that rank 0 may speak for all.
    """

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


@contextmanager
def agreed() -> Iterator[None]:
    """Run a block without collectives that may fail on some ranks only; if one fails, all raise its UserError."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = [found for found in distributed.all_gather_object(problem) if found is not None]
    if problems:
        raise UserError(problems[0], agreed=True)


def join_processes(device_name: str | None, timeout_seconds: float = 600) -> torch.device:
    """Join the process group; returns this process's device. Raises UserError for a device that is not there.

    timeout_seconds: how long a rank waits for the others, here and in each later collective.
    """
    if distributed.launched_rank() != 0:
        warnings.simplefilter("ignore")  # rank 0 speaks for all
    try:
        device = distributed.initialize(device_name, timeout_seconds)
    except ValueError as error:
        raise UserError(str(error), agreed=True) from None
    if device.type == "cpu":
        keep_freed_memory()
    return device


def run_script(main: Callable[[], None]) -> None:
    """Run `main`, then leave the process group; a UserError becomes one sentence on stderr and exit code 2.

    A rank that fails alone speaks for itself, and leaves word for the others, so that they stop without a traceback of
    the broken connection.
    """
    if hasattr(sys.stdout, "reconfigure"):  # which a stream in a notebook lacks
        sys.stdout.reconfigure(errors="backslashreplace")  # the names of files may be no text
    try:
        with _as_sentences():
            main()
    except UserError as error:
        alone = distributed.launched_world_size() == 1
        if alone or not error.agreed or distributed.launched_rank() == 0:
            print_line(f"error: {error}", sys.stderr)
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
        if _says_too_many_files(error):
            print_line(f"error: {TOO_MANY_FILES}", sys.stderr)
            distributed.post_failure(TOO_MANY_FILES)
            _leave_at_once()
        if distributed.launched_world_size() == 1:
            raise
        if distributed.is_lost_contact(error):
            if not distributed.failure_posted():
                print_line(f"error: {lost_contact(error)}", sys.stderr)
        else:
            traceback.print_exc()
            distributed.post_failure(str(error))
        _leave_at_once()
    distributed.shutdown()


@contextmanager
def _as_sentences() -> Iterator[None]:
    """Turn what a file system, a name or the memory refuses, where nothing closer has done so, into a UserError."""
    try:
        yield
    except OSError as error:
        if not isinstance(error.filename, (str, bytes)) or _says_too_many_files(error):
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


def _says_too_many_files(error: BaseException | None) -> bool:
    """True for an OSError of too many open files, also where the loader's end has raised something else over it."""
    while error is not None and not (isinstance(error, OSError) and error.errno == errno.EMFILE):
        error = error.__cause__ or error.__context__
    return error is not None


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
