"""Kill a training run again and again and show that nothing is lost: the long form of tests/training/test_faults.py.

One run is left undisturbed. Then the same command, with --resume auto and --checkpoint-steps, is started repeatedly,
and all its processes are killed (SIGKILL) at random moments: during start-up, in training, in evaluation, and as soon
as a temporary file shows that a write is in progress. The result must equal the undisturbed run bit for bit.
"""

import argparse
import itertools
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.report import describe, environment
from utils.checkpoints import checkpoint
from utils.phantoms import dataset as phantoms
from utils.results.log import LOG, read_log
from utils.runtime import progress
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script

SCRIPT = "_policy_gradient"
FLAGS = shlex.split(  # --print-freq 1: a line for each step, from which the steps are counted
    "--device cpu --model test_resnet --policy-model test_resnet --batch-size 8 --train-crop-size 32 "
    "--val-resize-size 36 --val-crop-size 32 --grid 8 --kernel 5 --sigma 2 --objective reinforce --model-ema "
    "--model-ema-steps 2 --mixup-alpha 0.2 --auto-augment ta_wide --opt adamw --lr 0.01 "
    "--lr-scheduler cosineannealinglr --print-freq 1"
)
# Arguments and log entries that may differ between equal runs.
FREE = {
    "output_dir", "resume", "workers", "checkpoint_steps", "plot_every", "tensorboard", "tracker", "images_per_second",
}  # fmt: skip
STEP_LINE = re.compile(r"^epoch (\d+) \[(\d+)/(\d+)\]", re.MULTILINE)


class Life:
    """One start of the run: a command with all its child processes, their output in a file."""

    def __init__(self, command: list[str], output: Path) -> None:
        self.output = output
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment["OMP_NUM_THREADS"] = "1"
        with output.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        if not self.has_ended():
            kill_families({self.process.pid})

    def exit_code(self) -> int:
        return self.process.wait()

    def steps(self) -> list[int]:
        """The completed steps, counted from the beginning of training."""
        lines = STEP_LINE.findall(self.output.read_text())
        return [int(epoch) * int(total) + int(step) - 1 for epoch, step, total in lines]


def command(data: Path, output_dir: Path, processes: int, *flags: object) -> list[str]:
    """The command line of a run; with torchrun for several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = torchrun if processes > 1 else []
    script = Path(__file__).resolve().parents[1] / SCRIPT / "train.py"
    words = [sys.executable, *launcher, script, *FLAGS, "--data-path", data, "--output-dir", output_dir, *flags]
    return [str(word) for word in words]


def families(pids: set[int]) -> dict[int, str]:
    """The states (R, S, T, Z, ...) of processes and all their descendants, in any session."""
    processes = {}  # parent and state by process id
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has just ended
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
            processes[int(stat.parent.name)] = int(parent), state
    members = set(pids)
    while children := {pid for pid, (parent, _) in processes.items() if parent in members} - members:
        members |= children
    return {pid: processes[pid][1] for pid in members & processes.keys()}


def kill_families(pids: set[int]) -> None:
    """SIGKILL processes and all their descendants, and wait for their end.

    All are stopped first, so that none can start more processes.
    """
    stopped: set[int] = set()
    while fresh := families(pids).keys() - stopped:
        _send(signal.SIGSTOP, fresh)
        stopped |= fresh
    _send(signal.SIGKILL, stopped)
    while any(state != "Z" or _threads(pid) > 1 for pid, state in families(stopped).items() if pid in stopped):
        time.sleep(0.01)


def _threads(pid: int) -> int:
    """The number of threads; while more than one exits, a zombie's files are still open, and locked."""
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:  # it has ended meanwhile
        return 0


def _send(number: int, pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Aim(NamedTuple):
    """Kill a Life `delay` seconds after it has reached this age and step and, with `at_write`, a temporary file."""

    seconds: float = 0.0
    steps: int = 0
    at_write: bool = False
    delay: float = 0.0


def random_aim(rng: random.Random, checkpoint_steps: int, start_up: float) -> Aim:
    """A random moment to kill at; start_up: seconds from a start to its first step."""
    steps = rng.randint(1, 3 * checkpoint_steps)
    in_start_up = Aim(seconds=rng.uniform(0, start_up))
    after_steps = Aim(steps=steps, delay=rng.uniform(0, 0.1))
    in_write = Aim(steps=steps - 1, at_write=True, delay=rng.uniform(0, 0.005))
    return rng.choices((in_start_up, after_steps, in_write), (1, 4, 3))[0]


def watch(life: Life, folder: Path, aim: Aim | None) -> bool:
    """Wait for the moment to kill (returns True) or the end of the run (returns False)."""
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
    """What a life was doing when it was killed."""
    if left_temporary:
        return "a write"
    if not life.steps():
        return "start-up"
    return "training" if life.output.read_text().splitlines()[-1].startswith("epoch ") else "evaluation"


def positions(folder: Path) -> tuple[list[tuple[int, int]], int]:
    """(epoch, step) of each valid checkpoint, and the number of damaged ones."""
    paths = [path for path in (folder / checkpoint.CHECKPOINT, folder / checkpoint.PREVIOUS) if path.exists()]
    valid = []
    for path in paths:
        with suppress(UserError):
            state = checkpoint.read_checkpoint(path, SCRIPT)
            valid.append((state["epoch"], state["step"]))
    return valid, len(paths) - len(valid)


def leaves(value: Any, place: str) -> Iterator[tuple[str, Hashable]]:
    """Place and bits of every tensor and number in nested lists and dictionaries."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from leaves(entry, f"{place}.{key}")
    elif isinstance(value, torch.Tensor):
        yield place, (value.dtype, value.shape, value.numpy().tobytes())
    else:
        yield place, repr(value)


def contents(folder: Path) -> dict[str, dict[str, Hashable]]:
    """Everything that interruptions must not change, by file: the leaves of checkpoint, weights and log."""
    files = {path.name: checkpoint.read(path) for path in folder.glob("model_*.pth")}
    files[checkpoint.CHECKPOINT] = checkpoint.read(folder / checkpoint.CHECKPOINT)
    files[LOG] = read_log(folder)
    by_file = {name: dict(leaves(content, name)) for name, content in files.items()}
    return {
        name: {place: bits for place, bits in found.items() if FREE.isdisjoint(place.split("."))}
        for name, found in by_file.items()
    }


@dataclass
class Tally:
    """Counts over all runs."""

    kills: Counter = field(default_factory=Counter)  # by phase
    runs: int = 0
    starts: int = 0
    steps_computed: int = 0
    most_repeated: int = 0  # most steps computed again after one kill
    left_temporary: int = 0  # temporary files left by kills
    damaged: int = 0  # damaged checkpoints
    files: int = 0  # files compared
    differences: list[str] = field(default_factory=list)

    def compare(self, reference: Path, folder: Path) -> None:
        """Count a finished run, and add its differences to the undisturbed one."""
        expected, actual = contents(reference), contents(folder)
        self.runs += 1
        self.files += len(expected)
        for name in sorted(expected.keys() | actual.keys()):
            unequal = expected.get(name, {}).items() ^ actual.get(name, {}).items()
            if unequal:
                self.differences.append(f"{folder}: {min(place for place, _ in unequal)}")
        self.differences += [f"{folder}: {name}" for name in sorted(temporary_files(folder))]


def survive(start: Callable[[int], Life], folder: Path, aims: Iterator[Aim], tally: Tally) -> None:
    """Start life 0 of the run, kill it, start life 1, and so on; without more aims the run is left to finish.

    Raises RuntimeError if a life fails, or if no checkpoint is as new as before the kill.
    """
    reached, newest = 0, None  # steps completed, and the position of the newest checkpoint
    for number in itertools.count():
        before = temporary_files(folder)
        life = start(number)
        try:
            killed = watch(life, folder, next(aims, None))
        finally:
            life.kill()
        tally.starts += 1
        if steps := life.steps():
            tally.steps_computed += len(steps)
            tally.most_repeated = max(tally.most_repeated, reached - steps[0])
            reached = max(reached, steps[-1] + 1)
        if killed:
            left = temporary_files(folder) - before
            tally.left_temporary += len(left)
            tally.kills[phase(life, bool(left))] += 1
        elif life.exit_code() != 0:
            raise RuntimeError(f"{life.output}: ended with exit code {life.exit_code()}")
        valid, damaged = positions(folder)
        tally.damaged += damaged
        if newest is not None and max(valid, default=(-1, -1)) < newest:
            raise RuntimeError(f"{folder}: at {newest} before the last kill; the valid checkpoints are now at {valid}")
        newest = max(valid, default=None)
        if not killed:
            return


def report(tally: Tally, steps: int, options: argparse.Namespace, seconds: float) -> str:
    """The table in benchmarks/SOAK.md, and the environment."""
    phases = ("start-up", "training", "evaluation", "a write")
    kills = ", ".join(f"{tally.kills[name]} in {name}" for name in phases)
    rows = {
        "kills": f"{tally.kills.total()}: {kills}",
        "restarts": tally.starts - tally.runs,
        "runs, processes per run": f"{tally.runs}, {options.processes}",
        "steps in these runs": steps * tally.runs,
        "steps computed, including repeated ones": tally.steps_computed,
        "most steps repeated after one kill": f"{tally.most_repeated} (a checkpoint every {options.checkpoint_steps})",
        "temporary files left by kills, all removed by the next start": tally.left_temporary,
        "damaged checkpoints": tally.damaged,
        "files compared": tally.files,
        "**differences**": f"**{len(tally.differences)}**",
        "duration": progress.seconds_as_text(seconds),
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    return f"{table}\n\n{describe(environment(torch.device('cpu'), sys.argv[1:], 'benchmarks.soak'))}"


def main() -> None:
    parser = Parser(__doc__.splitlines()[0], prog="python -m benchmarks.soak")
    add = parser.add_argument
    add("--kills", type=int, default=100)
    add("--processes", type=int, default=2, help="per run")
    add("--checkpoint-steps", type=int, default=4)
    add("--epochs", type=int, default=6, help="per run; runs are repeated until all kills are done")
    add("--seed", type=int, default=0, help="for the random moments")
    add("--output", type=expanded_path, help="folder for data and runs; default: a new temporary one")
    options = parser.parse_args()
    output = (options.output or Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
    output.mkdir(parents=True, exist_ok=True)
    data = phantoms.generate(output / "data", size=40, scale=0.2)
    began, tally, rng = time.monotonic(), Tally(), random.Random(options.seed)

    def start(folder: Path, text: str, *flags: object) -> Life:
        words = command(data, folder, options.processes, "--epochs", options.epochs, *flags)
        return Life(words, output / f"{text}.txt")

    whole = start(output / "whole", "whole", "--workers", 0)
    watch(whole, output / "whole", Aim(steps=1))
    start_up = time.monotonic() - began
    if whole.exit_code() != 0:
        raise RuntimeError(f"{whole.output}: the undisturbed run failed")

    def aims() -> Iterator[Aim]:
        while tally.kills.total() < options.kills:
            yield random_aim(rng, options.checkpoint_steps, start_up)

    while tally.kills.total() < options.kills:
        folder = output / f"run_{tally.runs}"

        def resume(number: int, folder: Path = folder) -> Life:
            flags = ("--resume", "auto", "--checkpoint-steps", options.checkpoint_steps, "--workers", rng.randint(0, 1))
            return start(folder, f"{folder.name}_{number}", *flags)

        survive(resume, folder, aims(), tally)
        tally.compare(output / "whole", folder)
        print(f"{tally.kills.total()} kills, {tally.runs} runs", *tally.differences, sep="\n", flush=True)

    print(report(tally, len(whole.steps()), options, time.monotonic() - began))
    if tally.differences or tally.damaged or tally.most_repeated > options.checkpoint_steps:
        sys.exit(f"error: something was lost; the folders are in {output}")


if __name__ == "__main__":
    run_script(main)
