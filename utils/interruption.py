"""Signals that ask a run to stop: noted at once, obeyed where all ranks are at the same place."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL: start the same command again
WORKER_SECONDS = 20  # below the 30 after which torchrun sends SIGKILL


class Interrupted(Exception):
    """The run stopped because a signal asked for it, all ranks together; the message says where."""


class StopRequest:
    """While entered, SIGTERM, SIGINT and SIGUSR1 only leave their name in `asked`."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.former: list = []  # the handlers that were there before; none unless entered

    def __enter__(self) -> "StopRequest":
        self.former = [signal.signal(number, self._note) for number in SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(SIGNALS, self.former, strict=True):
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name


def ride_out_signals(_: int) -> None:
    """Let a loader's worker live on while the training process saves and ends it (a `worker_init_fn`).

    Terminals signal the whole foreground group, and torchrun a rank's whole session: workers that died of it would take
    the training process down in the middle of a step. After SIGTERM a worker that nobody ends goes by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(_: int, __: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(WORKER_SECONDS)
