"""Run a plan, all arms and seeds, through the two scripts: `python experiments/run.py PLAN --data-path DATA`."""

import argparse
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from experiments.plan import Arm, Plan, Stage, as_written, read_plan, run_folder
from experiments.subsets import link_subset
from utils.arguments import check_limits
from utils.data.folders import LAYOUT
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import not_followed, write_json
from utils.runtime.processes import run_script
from utils.runtime.reading import read_json
from utils.runtime.signals import EXIT_CODE as INTERRUPTED
from utils.runtime.signals import stopping_signals
from utils.runtime.text import print_line

FINISHED = "finished.json"
PROGRESS = "progress.json"  # of a run that has begun
OUTPUT = "output.txt"
# What is left of a finished run's stages.
KEPT = ("log.jsonl", "run.json", "metrics.json", "per_class.csv", "predictions.csv")


class Machine:
    """The processes that run now, and whether any may still be started.

    jobs: runs at a time; on several GPUs each has one, in turn. minutes: from now on, or infinity.
    """

    def __init__(self, jobs: int, minutes: float) -> None:
        self.budget = 60 * minutes
        self.deadline = time.monotonic() + self.budget
        self.stopping = False
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        gpus, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(gpu) for gpu in range(gpus)]
        self._slots = [{"CUDA_VISIBLE_DEVICES": names[job % gpus]} if gpus > 1 else {} for job in range(jobs)]

    def has_time_for(self, seconds: float) -> bool:
        """Is it done before the deadline? What no `minutes` would be enough for is begun too, and goes on next time."""
        return seconds <= self.deadline - time.monotonic() or seconds > self.budget

    def execute(self, command: Sequence[str], output: BinaryIO) -> int:
        """Run to its end, its output appended to a file; the exit code, INTERRUPTED if nothing may be started."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # for `-m utils...` from any folder
        with self._lock:
            if self.stopping:
                return INTERRUPTED
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self._slots[-1]}
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            slot = self._slots.pop()
            self._running.add(process)
        if self.stopping:  # which may have come too late for the first question, and too early to find the process
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        with self._lock:
            self._running.remove(process)
            self._slots.append(slot)
        return code

    def stop(self, *_: Any) -> None:
        """Ask all to stop at their next step, with a checkpoint; nothing is started any more."""
        self.stopping = True
        for process in tuple(self._running):
            process.send_signal(signal.SIGTERM)


def commands(stage: Stage, seed: int, run: Path, data: Path, flags: Sequence[str]) -> list[list[str]]:
    """What a user would type for a stage: train, average, test. Started again, it goes on from its last checkpoint.

    run: the run's folder; flags: of this machine (--device, --workers and the like).
    """
    python, folder = sys.executable, run / stage.name
    script = [python, str(ROOT / stage.script / "train.py"), "--data-path", str(data), *flags]
    start = ["--finetune", str(run / stage.start)] if stage.start else []
    train = [*script, *shlex.split(stage.flags), *start, "--seed", str(seed)]
    typed = [[*train, "--resume", "auto", "--output-dir", str(folder)]]
    if stage.average:
        last = [str(folder / f"model_{epoch}.pth") for epoch in range(stage.epochs - stage.average, stage.epochs)]
        output = str(folder / "average.pth")
        typed.append([python, "-m", "utils.weight_averaging", *last, "-o", output, "--overwrite"])
    if stage.test:
        best = ["--resume", str(folder / "model_best.pth"), "--output-dir", str(folder)]
        typed.append([*script, "--test-only", "--split", "test", *best])
    return typed


def is_finished(arm: Arm, run: Path) -> bool:
    """Has this run come to its end? Raises UserError if it was another one, of the same name."""
    found = _read_json(run / FINISHED, ("stages", "seconds"))
    if found is None:
        return False
    if found["stages"] != as_written(arm):
        raise UserError(f"{run}: was run with other stages than the plan says now; give another --output.")
    return True


def read_progress(arm: Arm, run: Path) -> tuple[int, float]:
    """Of a run: how many of its stages are done, and the seconds that they and the next took so far.

    Raises UserError if it was begun as another one, of the same name: its checkpoints are of other flags.
    """
    found = _read_json(run / PROGRESS, ("stages", "seconds", "done"))
    if found is None:
        return 0, 0.0
    if found["stages"] != as_written(arm):
        raise UserError(f"{run}: was begun with other stages than the plan says now; remove it, or give another -o.")
    return found["done"], found["seconds"]


def _read_json(path: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """What `write_json` wrote, None if there is none; raises UserError where anything else is there."""
    try:
        found = read_json(path)
        seconds, done = found.get("seconds", 0), found.get("done", 0)
        numbers = type(seconds) in (int, float) and 0 <= seconds < float("inf") and type(done) is int and done >= 0
        if numbers and all(name in found for name in names):
            return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
        pass
    raise UserError(f"{path}: does not hold what this command writes there; remove the run's folder, or the file.")


def run_stages(arm: Arm, seed: int, options: argparse.Namespace, machine: Machine) -> str:
    """Bring one run to its end, and say how far it came: finished, interrupted, left, or what failed."""
    run = run_folder(options.output, arm.name, seed)
    if not machine.has_time_for(expected_seconds(options.output, arm.name) - read_progress(arm, run)[1]):
        return "left for another time"
    run.mkdir(parents=True, exist_ok=True)
    with open(run / OUTPUT, "ab", opener=not_followed) as output:
        if not _lock(output):
            return "left to another process, which runs it"
        if is_finished(arm, run):
            tidy(run, arm.stages)
            return "finished by another process"
        return _run_locked(arm, seed, options, machine, output)


def _run_locked(arm: Arm, seed: int, options: argparse.Namespace, machine: Machine, output: BinaryIO) -> str:
    """`run_stages`, from the first stage that is not done."""
    run = run_folder(options.output, arm.name, seed)
    done, seconds = read_progress(arm, run)
    for number, stage in enumerate(arm.stages[done:], start=done):
        tidy(run, arm.stages[:number], arm.stages[number:])
        _write_progress(arm, run, number, seconds)
        data = subset_folder(options.output, stage) if stage.subset else options.data_path
        flags = shlex.split(options.flags)
        if options.exclude and not stage.subset:
            flags += ["--exclude", str(options.exclude)]
        for command in commands(stage, seed, run, data, flags):
            start = time.monotonic()
            code = machine.execute(command, output)
            seconds += time.monotonic() - start
            _write_progress(arm, run, number, seconds)
            if machine.stopping or code == INTERRUPTED:
                return "interrupted; it goes on when the plan is run again"
            if code != 0:
                return f"failed in {stage.name} with exit code {code}: {last_line(run / OUTPUT)} ({run / OUTPUT})"
    write_json(run / FINISHED, {"stages": as_written(arm), "seconds": round(seconds, 1)})
    tidy(run, arm.stages)
    return f"finished in {seconds:.0f} s"


def _lock(file: BinaryIO) -> bool:
    """Lock a file for as long as it is open here or in a process that writes its output there; False: another has it.

    So neither a second run.py nor one that follows a killed one trains where a training still goes on.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _write_progress(arm: Arm, run: Path, done: int, seconds: float) -> None:
    write_json(run / PROGRESS, {"stages": as_written(arm), "done": done, "seconds": round(seconds, 1)})


def last_line(path: Path) -> str:
    """Of a text file; of a script that failed, its error."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def subset_folder(output: Path, stage: Stage) -> Path:
    """Where the links of a stage's subset are."""
    return output / "data" / stage.subset.name


def expected_seconds(output: Path, arm: str) -> float:
    """The longest that a finished run of the arm took, or of any arm if there is none; 0 where nothing is known."""
    seconds = {path: _read_json(path, ["seconds"])["seconds"] for path in output.glob(f"*/seed*/{FINISHED}")}
    own = [value for path, value in seconds.items() if path.parents[1].name == arm]
    return max(own or seconds.values(), default=0.0)


def tidy(run: Path, done: Sequence[Stage], left: Sequence[Stage] = ()) -> None:
    """Leave of stages that are done what the analysis reads, and what the stages left start from.

    Other weights are made again by running it again: those of each epoch of each stage would soon fill a disk.
    """
    needed = {run / stage.start for stage in left if stage.start}
    for stage in done:
        for path in (run / stage.name).iterdir():
            if path.name not in KEPT and path not in needed:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not left:
        (run / PROGRESS).unlink(missing_ok=True)
        (run / OUTPUT).unlink(missing_ok=True)


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python experiments/run.py")
    parser.add_argument(
        "plan", type=expanded_path, help="a Python file that defines PLAN, such as those in experiments/plans"
    )
    parser.add_argument("--data-path", type=expanded_path, required=True, help="DATA/{train,val,test}/<class>/<image>")
    parser.add_argument("--exclude", type=expanded_path, help="images to leave out, as the training scripts take it")
    parser.add_argument(
        "-o", "--output", type=expanded_path, help="folder of the runs; None: experiments/results/<plan's name>"
    )
    parser.add_argument("--flags", default="", help='of this machine, for every training: "--device cpu --workers 0"')
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which all stop; none is begun late")
    return parser


def run_plan(plan: Plan, options: argparse.Namespace) -> dict[tuple[str, int], str]:
    """How far each run came that was not finished; a signal that stops one run, or the deadline, stops all."""
    machine = Machine(options.jobs, options.minutes)
    for signal_number in stopping_signals():
        signal.signal(signal_number, machine.stop)
    left = []
    for arm, seed in plan.runs():
        run = run_folder(options.output, arm.name, seed)
        if is_finished(arm, run):
            tidy(run, arm.stages)  # which a kill may have kept from being done
        else:
            read_progress(arm, run)  # now rather than when its turn comes
            left.append((arm, seed))
    print_line(f"{plan.name}: {len(plan.runs())} runs, {len(plan.runs()) - len(left)} finished before")
    for arm in plan.arms:
        for stage in arm.stages:
            if stage.subset:
                link_subset(options.data_path, stage.subset, subset_folder(options.output, stage), options.exclude)

    def bring_to_end(run: tuple[Arm, int]) -> str:
        arm, seed = run
        try:
            outcome = run_stages(arm, seed, options, machine)
        except (UserError, OSError) as error:  # a full disk, say
            outcome = f"failed: {error}"
        print_line(f"{arm.name}, seed {seed}: {outcome}")
        return outcome

    alarm = threading.Timer(min(machine.budget, threading.TIMEOUT_MAX), machine.stop)
    alarm.daemon = True
    alarm.start()
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = list(pool.map(bring_to_end, left))
    alarm.cancel()
    return {(arm.name, seed): outcome for (arm, seed), outcome in zip(left, outcomes, strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    check_limits(vars(options))
    plan = read_plan(options.plan)
    # Relative, so that what the runs note of their places means something elsewhere too.
    options.output = options.output or Path(os.path.relpath(ROOT / "experiments" / "results" / plan.name))
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: expected 1 or more.")
    if not options.data_path.is_dir():
        raise UserError(f"--data-path {options.data_path}: no such folder; expected {LAYOUT}.")
    outcomes = run_plan(plan, options)
    failed = [f"{arm}, seed {seed}" for (arm, seed), outcome in outcomes.items() if outcome.startswith("failed")]
    if failed:
        raise UserError(f"{len(failed)} runs failed ({'; '.join(failed)}); their output tells why.")
    unfinished = sum(not outcome.startswith("finished") for outcome in outcomes.values())
    if unfinished:
        print_line(f"{unfinished} runs are not finished; the same command goes on with them.")


if __name__ == "__main__":
    run_script(main)
