"""Iterates over loaders: every wait for a worker has a time limit, and every failure becomes one sentence."""

import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from operator import call
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from utils.runtime.errors import UserError
from utils.runtime.lifetimes import end_workers
from utils.runtime.node_limits import explain, explain_batch, explain_start, no_batch
from utils.runtime.signals import WaitEnded, wait_for

TIMEOUT = 600.0  # seconds that a command without --timeout waits for a batch
LONGEST = 1e6  # seconds
EARLY = 0.9  # of --timeout, so that the rank that lacks a batch reports before those that wait for this rank
Item = TypeVar("Item")
Wait = Callable[[Callable[[], Item]], Item]  # calls a function that waits for a batch, and returns its result
END = object()


def batch_seconds(timeout: float) -> float:
    """The seconds to wait for a batch: a little less than the `timeout` of other waits."""
    return EARLY * min(timeout, LONGEST)


def loaded(loader: DataLoader, wait: Wait | None = None) -> Iterator[Any]:
    """The loader's batches. wait: calls the functions that wait for workers; None: `wait_for` with TIMEOUT.

    Raises UserError if workers cannot be started, end, or deliver no batch in time.
    """
    try:
        yield from _batches(loader, wait)
    except RuntimeError as error:
        # torch's SIGCHLD handler reports a dead worker once, at any moment: also while another error is handled below.
        end_workers()
        problem = explain(error)
        if problem is None:
            raise
        raise UserError(problem) from None


def _batches(loader: DataLoader, wait: Wait | None) -> Iterator[Any]:
    if loader.num_workers == 0:
        wait = call
    elif wait is None:
        wait = partial(wait_for, seconds=TIMEOUT)
    iterator = None
    try:
        iterator = wait(partial(iter, loader))
        while (batch := wait(partial(next, iterator, END))) is not END:
            if isinstance(batch, UserError):
                # A new error: the traceback of this one would keep its frame and so the workers alive.
                raise UserError(str(batch))
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        end_workers()
        problem = explain_start(error) if iterator is None else explain_batch(error)
        if problem is None:
            raise
        if iterator is None:
            _delete_quietly(error)
        raise UserError(problem) from None
    except WaitEnded as error:
        end_workers()
        raise UserError(no_batch(str(error))) from None


def _delete_quietly(error: BaseException) -> None:
    """Delete the incomplete iterator that the error's frames hold; torch raises when it is deleted."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


def in_shared_memory(batch: Any) -> Any:
    """A `collate_fn` for complete batches: moves the tensors of a tuple to shared memory.

    torch would do so in a thread of the worker, where an error goes unnoticed. Returns a UserError if there is no room.
    """
    if get_worker_info() is None:
        return batch
    try:
        for value in batch if isinstance(batch, tuple) else ():
            if isinstance(value, Tensor):
                value.share_memory_()
    except (RuntimeError, OSError) as error:
        problem = explain(error)
        if problem is None:
            raise
        return UserError(problem)
    return batch
