"""Progress on the terminal, printed by rank 0: lines, bars, and the position in a run."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from utils.runtime import distributed
from utils.runtime.text import as_line

Item = TypeVar("Item")
STEPS_FOR_ESTIMATE = 50


def say(message: str) -> None:
    """Print a line on rank 0, without breaking a progress bar."""
    if distributed.is_main_process():
        tqdm.write(as_line(message), file=sys.stdout)
        sys.stdout.flush()


class Position(NamedTuple):
    """Position in a run: epoch, steps done in it, images of its order consumed, seconds spent."""

    epoch: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> "Position":
        """The position in a checkpoint's state; the beginning if there is none."""
        return cls() if state is None else cls(*(state[name] for name in cls._fields))


class EpochSampler(Protocol):
    steps_per_epoch: int
    global_batch: int


class Progress:
    """A pass over `total` steps: a tqdm bar in a terminal, otherwise a line every `print_freq` steps."""

    def __init__(
        self,
        label: str,
        total: int,
        print_freq: int,
        images_per_step: int,
        *,
        start: Position | None = None,
        later_steps: int | None = None,
    ) -> None:
        """images_per_step: on all ranks together; start: the position in the pass, if it is not at its beginning.

        later_steps: steps of the run after this pass, for an estimate of the time left; None for no estimate.
        """
        self.label, self.total, self.print_freq = label, total, print_freq
        self.images_per_step, self.start, self.later_steps = images_per_step, start or Position(), later_steps
        self.in_terminal = sys.stderr.isatty()
        self.started = time.perf_counter()
        shown = distributed.is_main_process() and self.in_terminal
        self.bar = tqdm(total=total, initial=self.start.step, desc=as_line(label), disable=not shown, leave=False)

    @classmethod
    def over_epoch(cls, sampler: EpochSampler, label: str, print_freq: int, start: Position, epochs: int) -> "Progress":
        """The rest of an epoch from `start`, in a run of `epochs` epochs."""
        steps = sampler.steps_per_epoch
        later_steps = (epochs - start.epoch - 1) * steps
        label = f"{label} {start.epoch}"
        return cls(label, steps, print_freq, sampler.global_batch, start=start, later_steps=later_steps)

    def track(self, items: Iterable[Item]) -> Iterator[tuple[int, Item]]:
        """The items with their steps, counted from the start. Moves the bar, and closes it at the end."""
        with self.bar:
            for step, item in enumerate(items, self.start.step):
                yield step, item
                self.bar.update()
                if self.later_steps is not None and step + 1 - self.start.step == STEPS_FOR_ESTIMATE:
                    self._print_estimate(step)

    def is_due(self, step: int) -> bool:
        """Whether this is a print_freq-th step or the last one."""
        return (step + 1) % self.print_freq == 0 or step + 1 == self.total

    def position(self, step: int) -> Position:
        """The position after this step; its seconds include those of earlier starts in the same epoch."""
        done = step + 1 - self.start.step
        images = self.start.images + done * self.images_per_step
        seconds = self.start.seconds + time.perf_counter() - self.started
        return Position(self.start.epoch, step + 1, images, seconds)

    def images_per_second(self) -> float:
        """Images per second of all ranks over the finished pass, including the wait for data."""
        end = self.position(self.total - 1)
        return end.images / end.seconds

    def show(self, step: int, means: dict[str, float]) -> None:
        """Show on rank 0, after this step: the train_* means, images per second, and the time left."""
        now = self.position(step)
        rate = now.images / now.seconds
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items() if name.startswith("train_"))
        if self.in_terminal:
            self.bar.set_postfix_str(f"{text}  {rate:.0f} images/s".lstrip())
            return
        left = seconds_as_text((self.total - step - 1) * self.images_per_step / rate)
        say(f"{self.label} [{step + 1}/{self.total}]  {text}{'  ' if text else ''}{rate:.0f} images/s  {left} left")

    def _print_estimate(self, step: int) -> None:
        seconds_per_step = (time.perf_counter() - self.started) / STEPS_FOR_ESTIMATE
        left = seconds_as_text((self.total - step - 1 + self.later_steps) * seconds_per_step)
        say(f"after {STEPS_FOR_ESTIMATE} steps: about {left} of training are left, evaluation not counted")


def seconds_as_text(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
