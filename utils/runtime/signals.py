"""Signals that stop a run: recorded when they arrive, acted on where all ranks have done the same step."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from utils.runtime.lifetimes import end_with_parent

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_CODE = 75  # EX_TEMPFAIL: start the same command again
WORKER_SECONDS = 20  # less than the 30 seconds after which torchrun sends SIGKILL
# How long a single process, and one of several ranks, waits for its next batch after a signal, to finish the step.
ALONE_SECONDS, TOGETHER_SECONDS = 1, 10
Result = TypeVar("Result")


class Interrupted(Exception):
    """A signal stopped the run, on all ranks together. The message says where."""


class WaitEnded(BaseException):
    """Waiting for a batch took too long, or a signal ended it. No Exception, because the loader would catch one."""


def wait_for(get: Callable[[], Result], seconds: float) -> Result:
    """Return `get()`; raise WaitEnded if it takes longer than `seconds`. No limit outside the main thread.

    Uses an alarm, because the loader's own timeout does not cover the moment in which it asks a worker for a tensor.
    """
    if threading.current_thread() is not threading.main_thread():
        return get()
    waiting = True

    def end_wait(_: int, __: FrameType | None) -> None:
        if waiting:
            raise WaitEnded(f"{seconds:g} seconds")

    previous_handler = signal.signal(signal.SIGALRM, end_wait)
    # The alarm repeats every second, because it may arrive just before `get` starts to wait.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        return get()
    finally:
        waiting = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)


class StopRequest:
    """Context manager in which stop signals are recorded instead of ending the process.

    asked: the name of the last signal, None before any; failed: whether the run has to stop because a write has failed.
    A signal also shortens a wait for a batch. An ignored SIGHUP stays ignored.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.failed = False
        self.previous_handlers: dict = {}  # by signal; empty unless entered
        self._patience: float | None = None  # seconds that a wait may last after a signal; None while nothing waits

    def __enter__(self) -> "StopRequest":
        self.previous_handlers = {number: signal.signal(number, self._record) for number in stopping_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)

    @property
    def is_pending(self) -> bool:
        """Whether the run has to stop, for either reason."""
        return self.failed or self.asked is not None

    def wait_for(self, get: Callable[[], Result], seconds: float, patience: float) -> Result:
        """As the function `wait_for`, but for at most `patience` seconds after a signal."""

        def get_or_stop() -> Result:  # runs after wait_for has set the alarm, which a signal may then shorten
            self._patience = min(seconds, patience)
            try:
                if self.asked is not None:
                    self._shorten_wait()
                return get()
            finally:
                self._patience = None

        return wait_for(get_or_stop, seconds)

    def _record(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        if self._patience is not None:
            self._shorten_wait()

    def _shorten_wait(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._patience, 1)


def stopping_signals() -> list[signal.Signals]:
    """The signals that stop a run: SIGNALS, without SIGHUP where it is ignored (as under nohup)."""
    hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (hangup_ignored and number == signal.SIGHUP)]


def ride_out_signals(_: int) -> None:
    """Keep a loader worker alive until the training process has saved, but no longer than it (a `worker_init_fn`).

    Terminals signal the whole foreground group, and torchrun a rank's whole session. If the workers died of that, the
    training process would fail in the middle of a step. After SIGTERM a worker ends by itself within WORKER_SECONDS.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() == parent.pid:  # not true for the workers of a fork server
        end_with_parent(parent.pid)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(_: int, __: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(WORKER_SECONDS)
