"""What the user sees: lines and bars on rank 0, and log.jsonl."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from utils import distributed
from utils.errors import UserError
from utils.files import write_atomically

Item = TypeVar("Item")
LOG = "log.jsonl"


def say(message: str) -> None:
    """Print a line, on rank 0 only, without breaking a bar."""
    if distributed.is_main_process():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


class Progress:
    """A pass over `total` steps: a tqdm bar in a terminal, plain lines every `print_freq` steps otherwise."""

    def __init__(self, label: str, total: int, print_freq: int, images_per_step: int, first_step: int = 0) -> None:
        """`images_per_step`: of all ranks together, for the images/s that are shown."""
        self.label, self.total, self.print_freq = label, total, print_freq
        self.images_per_step, self.first_step = images_per_step, first_step
        self.in_terminal = sys.stderr.isatty()
        self.started = time.perf_counter()
        shown = distributed.is_main_process() and self.in_terminal
        self.bar = tqdm(total=total, initial=first_step, desc=label, disable=not shown, leave=False)

    def track(self, items: Iterable[Item]) -> Iterator[tuple[int, Item]]:
        """The items with their step, from first_step on; the bar moves along, and is closed at the end."""
        with self.bar:
            for step, item in enumerate(items, self.first_step):
                yield step, item
                self.bar.update()

    def is_due(self, step: int) -> bool:
        """True at every print_freq-th step and at the last one."""
        return (step + 1) % self.print_freq == 0 or step + 1 == self.total

    def images_per_second(self, step: int) -> float:
        """Of all ranks, from the start of the pass to the end of this step, waiting for data counted in."""
        return (step + 1 - self.first_step) * self.images_per_step / (time.perf_counter() - self.started)

    def show(self, step: int, means: dict[str, float]) -> None:
        """Show the state after this step, on rank 0: the train_* means, images/s, and the time that is left."""
        rate = self.images_per_second(step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items() if name.startswith("train_"))
        if self.in_terminal:
            self.bar.set_postfix_str(f"{text}  {rate:.0f} images/s".lstrip())
            return
        left = seconds_as_text((self.total - step - 1) * self.images_per_step / rate)
        say(f"{self.label} [{step + 1}/{self.total}]  {text}{'  ' if text else ''}{rate:.0f} images/s  {left} left")


def seconds_as_text(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def read_log(folder: Path) -> list[dict]:
    """The lines of a folder's log.jsonl, none if there is no such file; a last line that was cut short is left out."""
    path = folder / LOG
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError:
        raise UserError(f"{path}: holds a line that is no JSON; mend or remove the file.") from None


def write_log(folder: Path, lines: list[dict]) -> None:
    """Write log.jsonl anew, on rank 0: what stood in it either stays whole or is replaced whole."""
    if distributed.is_main_process():
        write_atomically(folder / LOG, "".join(json.dumps(line) + "\n" for line in lines).encode())


def append_log(folder: Path, line: dict) -> None:
    """Add an epoch's line to log.jsonl."""
    write_log(folder, [*read_log(folder), line])
