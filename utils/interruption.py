"""Signals that ask a run to stop: noted at once, obeyed where all ranks are at the same place."""

import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
EXIT_CODE = 75  # EX_TEMPFAIL: start the same command again
WORKER_SECONDS = 20  # below the 30 after which torchrun sends SIGKILL


class Interrupted(Exception):
    """The run stopped because a signal asked for it, all ranks together; the message says where."""


class StopRequest:
    """While entered, the signals that stop a run only leave their name in `asked`; an ignored SIGHUP stays ignored."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self.former: dict = {}  # the handlers that were there before; none unless entered

    def __enter__(self) -> "StopRequest":
        self.former = {number: signal.signal(number, self._note) for number in stopping_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = signal.Signals(number).name


def stopping_signals() -> list[signal.Signals]:
    """The signals that stop a run: all of SIGNALS, but SIGHUP only where it is not ignored (as nohup does)."""
    hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (hangup_ignored and number == signal.SIGHUP)]


def ride_out_signals(_: int) -> None:
    """Let a loader's worker live on while the training process saves and ends it (a `worker_init_fn`).

    Terminals signal the whole foreground group, and torchrun a rank's whole session: workers that died of it would take
    the training process down in the middle of a step. After SIGTERM a worker that nobody ends goes by itself.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(_: int, __: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(WORKER_SECONDS)
