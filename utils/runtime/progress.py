"""What the user sees: lines and bars on rank 0, and log.jsonl."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tqdm import tqdm

from utils.runtime import distributed
from utils.runtime.text import as_line

if TYPE_CHECKING:  # data imports this module
    from utils.data.samplers import TrainingSampler


Item = TypeVar("Item")
STEPS_FOR_ESTIMATE = 50


def say(message: str) -> None:
    """Print a line, on rank 0 only, without breaking a bar."""
    if distributed.is_main_process():
        tqdm.write(as_line(message), file=sys.stdout)
        sys.stdout.flush()


class Position(NamedTuple):
    """Where a run stands: so many steps of the epoch are done, with so many images of its order, in so many seconds."""

    epoch: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, state: dict[str, Any] | None) -> "Position":
        """The position of a checkpoint's state; the beginning without one."""
        return cls() if state is None else cls(*(state[name] for name in cls._fields))


class Progress:
    """A pass over `total` steps: a tqdm bar in a terminal, plain lines every `print_freq` steps otherwise."""

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
        """images_per_step: of all ranks together; start: where in the pass, if not at its beginning.

        later_steps: of the run, after this pass, for an estimate of how long it will take; None: no estimate.
        """
        self.label, self.total, self.print_freq = label, total, print_freq
        self.images_per_step, self.start, self.later_steps = images_per_step, start or Position(), later_steps
        self.in_terminal = sys.stderr.isatty()
        self.started = time.perf_counter()
        shown = distributed.is_main_process() and self.in_terminal
        self.bar = tqdm(total=total, initial=self.start.step, desc=as_line(label), disable=not shown, leave=False)

    @classmethod
    def over_epoch(
        cls, sampler: "TrainingSampler", label: str, print_freq: int, start: Position, epochs: int
    ) -> "Progress":
        """The rest of an epoch of the sampler, which stands at `start`, in a run of `epochs`."""
        steps = sampler.steps_per_epoch
        later_steps = (epochs - start.epoch - 1) * steps
        label = f"{label} {start.epoch}"
        return cls(label, steps, print_freq, sampler.global_batch, start=start, later_steps=later_steps)

    def track(self, items: Iterable[Item]) -> Iterator[tuple[int, Item]]:
        """The items with their step, from the start on; the bar moves along, and is closed at the end."""
        with self.bar:
            for step, item in enumerate(items, self.start.step):
                yield step, item
                self.bar.update()
                if self.later_steps is not None and step + 1 - self.start.step == STEPS_FOR_ESTIMATE:
                    self._say_estimate(step)

    def is_due(self, step: int) -> bool:
        """True at every print_freq-th step and at the last one."""
        return (step + 1) % self.print_freq == 0 or step + 1 == self.total

    def position(self, step: int) -> Position:
        """Where the run stands after this step; the seconds are those of all starts of this pass."""
        done = step + 1 - self.start.step
        images = self.start.images + done * self.images_per_step
        seconds = self.start.seconds + time.perf_counter() - self.started
        return Position(self.start.epoch, step + 1, images, seconds)

    def images_per_second(self) -> float:
        """Of all ranks, over the whole pass once its last step is done, waiting for data counted in."""
        end = self.position(self.total - 1)
        return end.images / end.seconds

    def show(self, step: int, means: dict[str, float]) -> None:
        """Show the state after this step, on rank 0: the train_* means, images/s, and the time that is left."""
        now = self.position(step)
        rate = now.images / now.seconds
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items() if name.startswith("train_"))
        if self.in_terminal:
            self.bar.set_postfix_str(f"{text}  {rate:.0f} images/s".lstrip())
            return
        left = seconds_as_text((self.total - step - 1) * self.images_per_step / rate)
        say(f"{self.label} [{step + 1}/{self.total}]  {text}{'  ' if text else ''}{rate:.0f} images/s  {left} left")

    def _say_estimate(self, step: int) -> None:
        seconds_a_step = (time.perf_counter() - self.started) / STEPS_FOR_ESTIMATE
        left = seconds_as_text((self.total - step - 1 + self.later_steps) * seconds_a_step)
        say(f"after {STEPS_FOR_ESTIMATE} steps: about {left} of training are left, evaluation not counted")


def seconds_as_text(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
