"""Signals that ask a run to stop: noted at once, obeyed where all ranks are at the same place."""

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
WORKER_SECONDS = 20  # below the 30 after which torchrun sends SIGKILL
# After a signal: how long a single process and several ranks still wait for a batch, to end their step as usual.
ALONE_SECONDS, TOGETHER_SECONDS = 1, 10
Result = TypeVar("Result")


class Interrupted(Exception):
    """The run stopped because a signal asked for it, all ranks together; the message says where."""


class WaitEnded(BaseException):
    """A batch was waited for too long, or a signal ended the wait. No Exception, which the loader would hold back."""


def wait_for(get: Callable[[], Result], seconds: float) -> Result:
    """Returns `get()`; raises WaitEnded if it waits for longer. Without a limit outside of the main thread.

    By an alarm, since the loader's own timeout does not cover the moment in which it asks a worker for a tensor.
    """
    if threading.current_thread() is not threading.main_thread():
        return get()
    waits = True

    def end(_: int, __: FrameType | None) -> None:
        if waits:
            raise WaitEnded(f"{seconds:g} seconds")

    former = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again every second, since a signal can come just before a wait
    try:
        return get()
    finally:
        waits = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


class StopRequest:
    """While entered, the signals that stop a run only leave their name in `asked`, and shorten a wait for a batch.

    An ignored SIGHUP stays ignored.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self.former: dict = {}  # the handlers that were there before; none unless entered
        self._patience: float | None = None  # seconds that a wait lasts on after a signal; None while nothing waits

    def __enter__(self) -> "StopRequest":
        self.former = {number: signal.signal(number, self._note) for number in stopping_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def wait_for(self, get: Callable[[], Result], seconds: float, patience: float) -> Result:
        """As the function `wait_for`; once a signal has come, for `patience` seconds at most."""

        def get_or_stop() -> Result:  # within the limit's alarm, so that no signal finds this half done
            self._patience = min(seconds, patience)
            try:
                if self.asked is not None:
                    self._shorten_wait()
                return get()
            finally:
                self._patience = None

        return wait_for(get_or_stop, seconds)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name
        if self._patience is not None:
            self._shorten_wait()

    def _shorten_wait(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, self._patience, 1)


def stopping_signals() -> list[signal.Signals]:
    """The signals that stop a run: all of SIGNALS, but SIGHUP only where it is not ignored (as nohup does)."""
    hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (hangup_ignored and number == signal.SIGHUP)]


def ride_out_signals(_: int) -> None:
    """Let a loader's worker live on while the training process saves, and no longer than it (a `worker_init_fn`).

    Terminals signal the whole foreground group, and torchrun a rank's whole session: workers that died of it would take
    the training process down in the middle of a step. After SIGTERM, sent once or more often, a worker that nobody ends
    ends by itself.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() == parent.pid:  # not so for a worker that a fork server made
        end_with_parent(parent.pid)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(_: int, __: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(WORKER_SECONDS)
