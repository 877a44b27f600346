"""Kill a training run again and again and show that nothing is lost: the long form of tests/training/test_faults.py.

One run goes through undisturbed. Then the same command, with --resume auto and --checkpoint-steps, is started again and
again, and all its processes are killed (SIGKILL) at random moments: at start-up, in training, in evaluation, and as
soon as a temporary file shows that something is being written. The outcome must equal the undisturbed run bit for bit.
"""

import argparse
import itertools
import os
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from utils.checkpoints import checkpoint
from utils.phantoms import dataset as phantoms
from utils.results.log import LOG, read_log
from utils.runtime import progress
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script

SCRIPT = "_policy_gradient"
FLAGS = [
    *("--device", "cpu", "--model", "test_resnet", "--policy-model", "test_resnet", "--batch-size", "8"),
    *("--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32", "--grid", "8", "--kernel", "5"),
    *("--sigma", "2", "--objective", "reinforce", "--model-ema", "--model-ema-steps", "2", "--mixup-alpha", "0.2"),
    *("--auto-augment", "ta_wide", "--opt", "adamw", "--lr", "0.01", "--lr-scheduler", "cosineannealinglr"),
    *("--print-freq", "1"),  # a line for each step, from which the steps are counted
]
FREE_ARGUMENTS = (  # may differ between equal runs
    *("output_dir", "resume", "workers", "checkpoint_steps", "plot_every", "tensorboard"),
)
TIMINGS = ("images_per_second",)
STEP_LINE = re.compile(r"^epoch (\d+) \[(\d+)/(\d+)\]", re.MULTILINE)


class Lost(Exception):
    """What must never happen: after a kill something is gone, or the run does not come back."""


class Life:
    """One start of the run: a command with all the processes it starts, their output in a file."""

    def __init__(self, command: list[str], output: Path) -> None:
        self.output = output
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        with output.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment | {"OMP_NUM_THREADS": "1"}
            )

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        if not self.has_ended():
            kill_families({self.process.pid})

    def exit_code(self) -> int:
        return self.process.wait()

    def steps(self) -> list[int]:
        """The steps that it has done, counted from the beginning of training."""
        found = STEP_LINE.findall(self.output.read_text())
        return [int(epoch) * int(total) + int(step) - 1 for epoch, step, total in found]


def command(data: Path, output_dir: Path, processes: int, *flags: object) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    script = Path(__file__).resolve().parents[1] / SCRIPT / "train.py"
    paths = ("--data-path", data, "--output-dir", output_dir)
    return list(map(str, [sys.executable, *launcher, script, *FLAGS, *paths, *flags]))


def families(pids: set[int]) -> dict[int, str]:
    """The states (R, S, T, Z, ...) of processes and all their descendants, whatever session they are in."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
            found[int(stat.parent.name)] = (int(parent), state)
    while more := {child for child, (parent, _) in found.items() if parent in pids} - pids:
        pids = pids | more
    return {pid: found[pid][1] for pid in pids & found.keys()}


def kill_families(pids: set[int]) -> None:
    """SIGKILL to processes and all their descendants, stopped first so that none starts more; waits for their end."""
    stopped: set[int] = set()
    while fresh := families(pids).keys() - stopped:
        _send(signal.SIGSTOP, fresh)
        stopped |= fresh
    _send(signal.SIGKILL, stopped)
    while {state for pid, state in families(stopped).items() if pid in stopped} - {"Z"}:
        time.sleep(0.01)


def _send(number: int, pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Aim(NamedTuple):
    """Kill as soon as all of this holds for a Life: its age, its steps, and, with `at_write`, a temporary file."""

    seconds: float = 0.0
    steps: int = 0
    at_write: bool = False
    delay: float = 0.0  # seconds, after that


def random_aims(rng: random.Random, checkpoint_steps: int, start_up: float) -> Iterator[Aim]:
    """Moments to kill at, without end; `start_up`: seconds from a start to its first step."""
    while True:
        steps = rng.randint(1, 3 * checkpoint_steps)
        kinds = (
            Aim(seconds=rng.uniform(0, start_up)),
            Aim(steps=steps, delay=rng.uniform(0, 0.1)),
            Aim(steps=steps - 1, at_write=True, delay=rng.uniform(0, 0.005)),
        )
        yield rng.choices(kinds, (1, 4, 3))[0]


def watch(life: Life, folder: Path, aim: Aim | None) -> bool:
    """Wait for the moment to kill (True) or the end of the run (False)."""
    started, leftovers = time.monotonic(), temporary_files(folder)
    while not life.has_ended():
        if (
            aim is not None
            and time.monotonic() - started >= aim.seconds
            and len(life.steps()) >= aim.steps
            and (not aim.at_write or temporary_files(folder) - leftovers)
        ):
            time.sleep(aim.delay)
            return not life.has_ended()
        time.sleep(0.001 if aim is not None and aim.at_write else 0.01)
    return False


def temporary_files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(".*.tmp")}


def phase(life: Life, left_temporary: bool) -> str:
    """What a killed life was doing."""
    if left_temporary:
        return "a write"
    if not life.steps():
        return "start-up"
    return "training" if life.output.read_text().splitlines()[-1].startswith("epoch ") else "evaluation"


def positions(folder: Path) -> tuple[list[tuple[int, int]], int]:
    """(epoch, step) of each checkpoint that is valid, and how many are damaged."""
    found, damaged = [], 0
    for path in (folder / checkpoint.CHECKPOINT, folder / checkpoint.PREVIOUS):
        try:
            state = checkpoint.read_checkpoint(path, SCRIPT) if path.exists() else None
        except UserError:
            damaged += 1
        else:
            found += [(state["epoch"], state["step"])] if state else []
    return found, damaged


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """The first place at which two values are not equal bit for bit; None if there is none."""
    if type(one) is not type(other):
        return where
    if isinstance(one, torch.Tensor):
        same = (one.dtype, one.shape) == (other.dtype, other.shape)
        return None if same and one.numpy().tobytes() == other.numpy().tobytes() else where
    if isinstance(one, (list, tuple)):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return f"{where} (the keys)"
        return next(filter(None, (first_difference(one[key], other[key], f"{where}.{key}") for key in one)), None)
    return None if one == other else where


def contents(folder: Path) -> dict[str, Any]:
    """What must not depend on interruptions: checkpoint, weights and log, without paths, timings and free arguments."""
    found = {path.name: checkpoint.read(path) for path in folder.glob("model_*.pth")}
    found[checkpoint.CHECKPOINT] = checkpoint.read(folder / checkpoint.CHECKPOINT)
    for state in found.values():
        state["args"] = {name: value for name, value in state["args"].items() if name not in FREE_ARGUMENTS}
    lines = read_log(folder)
    found[LOG] = [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]
    return found


@dataclass
class Tally:
    """What happened, over all runs."""

    kills: Counter = field(default_factory=Counter)  # by phase
    runs: int = 0
    starts: int = 0
    steps_computed: int = 0
    most_repeated: int = 0  # steps computed again after one kill
    left_temporary: int = 0  # files that kills left, and were gone at the end
    damaged: int = 0  # checkpoints
    files: int = 0  # compared
    differences: list[str] = field(default_factory=list)

    def compare(self, reference: Path, folder: Path) -> None:
        one, other = contents(reference), contents(folder)
        self.runs, self.files = self.runs + 1, self.files + len(one)
        places = [first_difference(one.get(name), other.get(name), name) for name in one.keys() | other.keys()]
        places += sorted(temporary_files(folder))
        self.differences += [f"{folder}: {place}" for place in places if place]


def survive(start: Callable[[int], Life], folder: Path, aims: Iterator[Aim], tally: Tally) -> None:
    """Start the run's life 0, kill it, start life 1, ... until it has finished; raises Lost for a broken promise."""
    reached, newest = 0, None  # steps done in all, and the newest checkpoint's position
    killed, number = True, 0
    while killed:
        before = temporary_files(folder)
        life = start(number)
        try:
            killed = watch(life, folder, next(aims, None))
        finally:
            life.kill()
        number, tally.starts = number + 1, tally.starts + 1
        if steps := life.steps():
            tally.steps_computed += len(steps)
            tally.most_repeated = max(tally.most_repeated, reached - steps[0])
            reached = max(reached, steps[-1] + 1)
        if killed:
            left = temporary_files(folder) - before
            tally.left_temporary += len(left)
            tally.kills[phase(life, bool(left))] += 1
        elif life.exit_code() != 0:
            raise Lost(f"{life.output}: ended with exit code {life.exit_code()}:\n{life.output.read_text()[-5000:]}")
        found, damaged = positions(folder)
        tally.damaged += damaged
        if newest is not None and max(found, default=(-1, -1)) < newest:
            raise Lost(f"{folder}: at {newest} before the last kill; the valid checkpoints now are at {found}")
        newest = max(found, default=None)


def report(tally: Tally, steps: int, options: argparse.Namespace, seconds: float) -> str:
    """The table for benchmarks/README.md."""
    kills = ", ".join(f"{tally.kills[name]} in {name}" for name in ("start-up", "training", "evaluation", "a write"))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm"))
    rows = {
        "kills": f"{tally.kills.total()}: {kills}",
        "restarts": tally.starts - tally.runs,
        "runs, processes of each": f"{tally.runs}, {options.processes}",
        "steps of these runs": steps * tally.runs,
        "steps computed in all lives": tally.steps_computed,
        "most steps repeated after one kill": f"{tally.most_repeated} (a checkpoint every {options.checkpoint_steps})",
        "temporary files left by kills, all removed by the next start": tally.left_temporary,
        "damaged checkpoints met": tally.damaged,
        "files compared": tally.files,
        "**differences**": f"**{len(tally.differences)}**",
        "versions": f"Python {platform.python_version()}, {packages}; {os.cpu_count()} CPU cores",
        "date, duration": f"{date.today()}, {progress.seconds_as_text(seconds)}",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> None:
    parser = Parser(__doc__.splitlines()[0], prog="python -m benchmarks.soak")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=2, help="of the run that is killed")
    parser.add_argument("--checkpoint-steps", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6, help="of each run; there are as many runs as the kills take")
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    parser.add_argument("--output", type=expanded_path, help="folder for data and runs; None: a new temporary one")
    options = parser.parse_args()
    output = (options.output or Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
    output.mkdir(parents=True, exist_ok=True)
    data = phantoms.generate(output / "data", size=40, scale=0.2)
    began, tally, rng = time.monotonic(), Tally(), random.Random(options.seed)

    flags = ("--epochs", options.epochs)
    whole = Life(command(data, output / "whole", options.processes, *flags, "--workers", 0), output / "whole.txt")
    watch(whole, output / "whole", Aim(steps=1))
    start_up = time.monotonic() - began
    if whole.exit_code() != 0:
        raise Lost(f"the undisturbed run failed:\n{whole.output.read_text()[-5000:]}")

    resume = ("--resume", "auto", "--checkpoint-steps", options.checkpoint_steps)
    aims = random_aims(rng, options.checkpoint_steps, start_up)
    while tally.kills.total() < options.kills:
        folder = output / f"run_{tally.runs}"

        def start(number: int, folder: Path = folder) -> Life:
            again = command(data, folder, options.processes, *flags, *resume, "--workers", rng.randint(0, 1))
            return Life(again, output / f"{folder.name}_{number}.txt")

        survive(start, folder, itertools.takewhile(lambda _: tally.kills.total() < options.kills, aims), tally)
        tally.compare(output / "whole", folder)
        print(f"{tally.kills.total()} kills, {tally.runs} runs", *tally.differences, sep="\n", flush=True)

    print(report(tally, len(whole.steps()), options, time.monotonic() - began))
    if tally.differences or tally.damaged or tally.most_repeated > options.checkpoint_steps:
        sys.exit(f"error: something was lost; the folders are in {output}")


if __name__ == "__main__":
    run_script(main)
