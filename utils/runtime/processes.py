"""The end of a process: one sentence per error, exit codes, and no rank left waiting. Imports no torch."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, Protocol

from utils.runtime.errors import UserError, first_line
from utils.runtime.launch import current_launch
from utils.runtime.lifetimes import end_workers
from utils.runtime.node_limits import explain
from utils.runtime.output import drop_lost_output
from utils.runtime.signals import EXIT_CODE as INTERRUPTED_EXIT_CODE
from utils.runtime.signals import Interrupted
from utils.runtime.text import print_line

EXIT_CODE = 2


class Group(Protocol):
    """What ending a rank needs of `utils.runtime.distributed`, which imports torch and is therefore passed in."""

    def world_size(self) -> int: ...
    def barrier(self) -> None: ...
    def shutdown(self) -> None: ...
    def post_failure(self, message: str) -> None: ...
    def failure_posted(self) -> bool: ...
    def is_lost_contact(self, error: BaseException) -> bool: ...


_group: Group | None = None  # None until this process begins to join other ranks


def use_group(group: Group) -> None:
    """Let `run_script` end this process as one rank of a group. To be called before joining it."""
    global _group
    _group = group


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
        if current_launch().rank == 0:
            print_line(stop)
        _leave_together()
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        user_error = _as_user_error(error)
        if user_error is not None:
            _end_after_user_error(user_error)
        _end_after_crash(error)
        raise
    if _group is not None:
        _group.shutdown()


def _leave_together() -> None:
    """Leave the process group after rank 0 has printed: as soon as one rank exits, torchrun ends all others."""
    if _group is not None:
        _group.barrier()
        _group.shutdown()


def _end_after_user_error(error: UserError) -> NoReturn:
    launch = current_launch()
    if launch.rank == 0 or not error.agreed:
        _print_error(str(error))
    if launch.world_size > 1 and not error.agreed:
        _post_failure(str(error))
        _leave_at_once()
    if launch.rank != 0 and (_group is None or _group.world_size() == 1):  # the ranks have not joined yet
        time.sleep(10)  # rank 0 meets the same error, exits, and torchrun ends this process sooner
    _leave_together()
    sys.exit(EXIT_CODE)


def _end_after_crash(error: Exception) -> None:
    """End this process after an error that is not the user's; returns if it is for Python to print."""
    problem = explain(error)
    if problem is not None:
        _print_error(problem)
        _post_failure(problem)
    elif current_launch().world_size == 1:
        return
    elif _group is None or not _group.is_lost_contact(error):
        traceback.print_exc()
        _post_failure(str(error))
    elif not _group.failure_posted():
        _print_error(lost_contact(error))
    _leave_at_once()


def _post_failure(message: str) -> None:
    """Leave the message for the ranks that this process has joined."""
    if _group is not None:
        _group.post_failure(message)


def end_at_once(message: str) -> NoReturn:
    """Print the message as an error and end this process, without waiting for collectives."""
    _print_error(message)
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
        f"rank {current_launch().rank}: another rank ended, or did not answer within --timeout ({first_line(error)}); "
        "its own output says why. --resume auto continues from the last checkpoint."
    )


def _leave_at_once() -> NoReturn:
    """End this process without waiting for collectives that the others never join."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_CODE)
