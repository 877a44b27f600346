"""Run a plan, all arms and seeds, with the two scripts: `python experiments/run.py PLAN --data-path DATA`."""

import argparse
import fcntl
import os
import queue
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

from experiments import fork_server
from experiments.plan import (
    FINISHED,
    PROBE,
    Arm,
    Plan,
    Stage,
    as_written,
    folder_of_run,
    matches,
    read_plan,
    read_record,
)
from experiments.subsets import link_subset
from utils.arguments import check_limits
from utils.data.folders import LAYOUT
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import not_followed, write_json
from utils.runtime.processes import run_script
from utils.runtime.signals import EXIT_CODE as INTERRUPTED
from utils.runtime.signals import SIGNALS, stopping_signals
from utils.runtime.text import print_line

PROGRESS = "progress.json"  # of a run that has begun
OUTPUT = "output.txt"  # of all commands of a run
SUBSETS = "data"  # folder of the links of all subsets
# Of each finished stage:
KEPT = ("log.jsonl", "run.json", "metrics.json", "per_class.csv", "predictions.csv", "probe.json")


class Unfinished(Exception):
    """A run was stopped, or another process is running it; the message says which."""


class Processes:
    """Runs Python commands for several threads until it is stopped.

    jobs: number of threads; ranks: processes of a training. With enough GPUs for two trainings, each command sees
    `ranks` of them, assigned in turn.
    """

    def __init__(self, jobs: int, ranks: int = 1) -> None:
        self.stopping = False
        self.ranks = ranks
        self.running: set[fork_server.Command | subprocess.Popen] = set()
        self.gpus: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()  # environment variables, one entry per job
        names = visible_gpus()
        groups = [names[first : first + ranks] for first in range(0, len(names) - ranks + 1, ranks)]
        for job in range(jobs):
            group = groups[job % len(groups)] if len(groups) > 1 else None
            self.gpus.put({"CUDA_VISIBLE_DEVICES": ",".join(group)} if group else {})

    def execute(self, command: Sequence[str], output: BinaryIO) -> int:
        """Run a command, append its output to a file, and return its exit code, or INTERRUPTED after `stop`."""
        if self.stopping:
            return INTERRUPTED
        gpu = self.gpus.get()
        environment = {**os.environ, **gpu, "PYTHONPATH": fork_server.with_root(os.environ.get("PYTHONPATH"))}
        try:
            process = self.start(command, output, environment)
            self.running.add(process)
            if self.stopping:  # `stop` was called since the first line, and may not have seen the process
                process.terminate()
            code = process.wait()
            self.running.discard(process)
        finally:
            self.gpus.put(gpu)
        return INTERRUPTED if self.stopping else code

    def start(
        self, command: Sequence[str], output: BinaryIO, environment: dict[str, str]
    ) -> fork_server.Command | subprocess.Popen:
        """Start a command: in a fork of the warm process, or in a new process if trainings have several ranks."""
        if self.ranks == 1:
            return fork_server.Command(command, output, environment)
        # In a session of its own, so that Ctrl-C reaches torchrun once, from `stop`.
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def stop(self, *_: Any) -> None:
        """Let all running commands save a checkpoint and end, and start no more; also a signal handler."""
        self.stopping = True
        for process in tuple(self.running):
            process.terminate()


def visible_gpus() -> list[str]:
    """The names of this machine's GPUs in CUDA_VISIBLE_DEVICES."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(gpu) for gpu in range(count)]


def commands(stage: Stage, seed: int, run: Path, data: Path, flags: Sequence[str], ranks: int = 1) -> list[list[str]]:
    """The commands of a stage as a user would type them: train, average, test; or probe. A training resumes by itself.

    run: the run's folder; flags: for this machine, such as --device and --workers; ranks: processes of a training.
    """
    folder = run / stage.name
    if stage.script == PROBE:
        probe = [sys.executable, "-m", PROBE, str(run / stage.start), "--data-path", str(data), *probe_flags(flags)]
        return [[*probe, *shlex.split(stage.flags), "--seed", str(seed), "--output-dir", str(folder), "--overwrite"]]
    python = [sys.executable, *(torchrun(ranks) if ranks > 1 else [])]
    script = [*python, str(ROOT / stage.script / "train.py"), "--data-path", str(data), *flags]
    start = ["--finetune", str(run / stage.start)] if stage.start else []
    train = [*script, *shlex.split(stage.flags), *start, "--seed", str(seed)]
    result = [[*train, "--resume", "auto", "--output-dir", str(folder)]]
    if stage.average:
        last = [str(folder / f"model_{epoch}.pth") for epoch in range(stage.epochs - stage.average, stage.epochs)]
        average = [sys.executable, "-m", "utils.weight_averaging", *last]
        result.append([*average, "-o", str(folder / "average.pth"), "--overwrite"])
    if stage.test:
        best = ["--resume", str(folder / "model_best.pth"), "--output-dir", str(folder)]
        result.append([*script, "--test-only", "--split", "test", *best])
    return result


def probe_flags(flags: Sequence[str]) -> list[str]:
    """Those of a training's flags for this machine that utils.probe has too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("--device",), ("-j", "--workers"), ("--exclude",), ("--bad-images",), ("--max-bad-images",)):
        parser.add_argument(*names, default=argparse.SUPPRESS)
    known, _ = parser.parse_known_args(flags)
    return [word for name, value in vars(known).items() for word in (f"--{name.replace('_', '-')}", value)]


def torchrun(ranks: int) -> list[str]:
    """What stands between `python` and a script that is to run as several processes.

    torchrun passes on all signals that stop a training; by default SIGUSR1 would kill it.
    """
    signals = ",".join(number.name for number in SIGNALS)
    options = ["--standalone", f"--nproc_per_node={ranks}", f"--signals-to-handle={signals}"]
    return ["-m", "torch.distributed.run", *options]


def run_stages(arm: Arm, seed: int, options: argparse.Namespace, processes: Processes) -> float:
    """Run all stages of an arm that are not done; returns the seconds that the run took in total.

    Raises Unfinished, and UserError for a command that fails.
    """
    run = folder_of_run(options.output, arm.name, seed)
    run.mkdir(parents=True, exist_ok=True)
    with open(run / OUTPUT, "ab", opener=not_followed) as output:
        if not lock(output):
            raise Unfinished("left to another process that is running it")
        if record := read_record(run / FINISHED, arm):  # by another process, since this one started
            return record["seconds"]
        record = read_record(run / PROGRESS, arm) or {"stages": as_written(arm), "done": 0, "seconds": 0}
        for number in range(record["done"], len(arm.stages)):
            stage = arm.stages[number]
            tidy(run, arm.stages[:number], arm.stages[number:])
            record["done"] = number
            flags = split_flags(options.flags)
            data = options.data_path
            if stage.subset:
                data = options.output / SUBSETS / stage.subset.of_seed(seed).name
            elif options.exclude:
                flags += ["--exclude", str(options.exclude)]
            for command in commands(stage, seed, run, data, flags, options.processes):
                write_json(run / PROGRESS, record)
                start, begin = time.monotonic(), output.seek(0, os.SEEK_END)
                code = processes.execute(command, output)
                record["seconds"] = round(record["seconds"] + time.monotonic() - start, 1)
                write_json(run / PROGRESS, record)
                if code == INTERRUPTED:
                    raise Unfinished("interrupted")
                if code != 0:
                    printed = (run / OUTPUT).read_bytes()[begin:].decode(errors="replace")
                    raise UserError(f"{stage.name}: exit code {code}: {reason(printed)} ({run / OUTPUT})")
        write_json(run / FINISHED, {"stages": as_written(arm), "seconds": record["seconds"]})
        tidy(run, arm.stages)
    return record["seconds"]


def reason(printed: str) -> str:
    """The line of a failed command's output that says why: its last error, which torchrun's summary may follow."""
    lines = [line for line in printed.split("\n") if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]


def lock(file: BinaryIO) -> bool:
    """Lock a file until this process and all commands that write to it have closed it; False if it is locked already.

    Neither a second run.py nor one that follows a killed run.py starts a run whose training is still alive.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def tidy(run: Path, done: Sequence[Stage], remaining: Sequence[Stage] = ()) -> None:
    """Keep only KEPT and `keep` of the stages that are done, and the weights from which the remaining stages start.

    The weights of every epoch of every stage would soon fill a disk.
    """
    needed = {run / stage.start for stage in remaining if stage.start}
    for stage in done:
        for path in (run / stage.name).iterdir():
            if path.name not in (*KEPT, *stage.keep) and path not in needed:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not remaining:
        (run / PROGRESS).unlink(missing_ok=True)
        (run / OUTPUT).unlink(missing_ok=True)


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python experiments/run.py")
    add = parser.add_argument
    add("plan", type=expanded_path, help="a Python file that defines PLAN, see experiments/plans")
    add("--data-path", type=expanded_path, required=True, help="DATA/{train,val,test}/<class>/<image>")
    add("--exclude", type=expanded_path, help="list of images to leave out, as for the training scripts")
    add("-o", "--output", type=expanded_path, help="folder for the runs; default: experiments/results/<plan's name>")
    add("--flags", default="", help='for every training, for example "--device cpu --workers 0"')
    add("--jobs", type=int, default=1, help="number of runs at a time; default: %(default)s")
    add("--processes", type=int, default=1, help="processes of each training and test, started by torchrun, each with "
        "its own GPU and the plan's batch size; default: %(default)s")  # fmt: skip
    add("--arms", default="*", metavar="PATTERNS", help="only these arms: shell patterns, separated by commas")
    add("--minutes", type=float, default=float("inf"), help="stop all runs after this time; default: no limit")
    return parser


def run_plan(plan: Plan, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Run everything that is not finished; returns the names of failed and of unfinished runs.

    A signal or the end of --minutes stops all runs.
    """
    pending = []
    runs = [(arm, seed) for arm, seed in plan.runs() if matches(arm.name, options.arms)]
    if not runs:
        raise UserError(f"--arms {options.arms}: matches none of {', '.join(arm.name for arm in plan.arms)}.")
    for arm, seed in runs:
        run = folder_of_run(options.output, arm.name, seed)
        if read_record(run / FINISHED, arm):
            tidy(run, arm.stages)  # again, in case an earlier call was killed
        else:
            read_record(run / PROGRESS, arm)  # raises its errors before anything runs
            pending.append((arm, seed))
    print_line(f"{plan.name}: {len(runs)} runs, {len(runs) - len(pending)} finished before")
    subsets = {stage.subset.of_seed(seed) for arm, seed in pending for stage in arm.stages if stage.subset}
    for subset in sorted(subsets, key=lambda subset: subset.name):
        link_subset(options.data_path, subset, options.output / SUBSETS / subset.name, options.exclude)

    processes = Processes(options.jobs, options.processes)
    for number in stopping_signals():
        signal.signal(number, processes.stop)
    timer = threading.Timer(min(60 * options.minutes, threading.TIMEOUT_MAX), processes.stop)
    timer.daemon = True
    timer.start()
    failed, unfinished = [], []

    def attempt(run: tuple[Arm, int]) -> None:
        arm, seed = run
        name = f"{arm.name}, seed {seed}"
        if processes.stopping:
            unfinished.append(name)
            return
        try:
            outcome = f"finished in {run_stages(arm, seed, options, processes):.0f} s"
        except Unfinished as reason:
            unfinished.append(name)
            outcome = str(reason)
        except (UserError, OSError) as error:  # such as a full disk
            failed.append(name)
            outcome = f"failed: {error}"
        print_line(f"{name}: {outcome}")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(attempt, pending))  # raises unexpected errors
    timer.cancel()
    return failed, unfinished


def split_flags(text: str) -> list[str]:
    """The words of --flags. Raises UserError for a quotation mark without its pair."""
    try:
        return shlex.split(text)
    except ValueError:
        raise UserError(f"--flags {text}: a quotation mark is missing.") from None


def check_processes(processes: int, flags: str) -> None:
    """Raise UserError for less than one process, and for more than the GPUs, unless the flags ask for the CPU."""
    if processes < 1:
        raise UserError(f"--processes {processes}: expected 1 or more.")
    gpus = len(visible_gpus())
    words = [part for word in split_flags(flags) for part in word.split("=")]
    if 0 < gpus < processes and "cpu" not in words:
        raise UserError(
            f"--processes {processes}: every process needs its own GPU, and this machine has {gpus}. Give at most "
            f'{gpus}, or --flags "--device cpu".'
        )


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    check_limits(vars(options))
    plan = read_plan(options.plan)
    # Relative, so that the paths that runs record are valid elsewhere too.
    options.output = options.output or Path(os.path.relpath(ROOT / "experiments" / "results" / plan.name))
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: expected 1 or more.")
    check_processes(options.processes, options.flags)
    if not options.data_path.is_dir():
        raise UserError(f"--data-path {options.data_path}: no such folder. Expected {LAYOUT}.")
    failed, unfinished = run_plan(plan, options)
    if failed:
        raise UserError(f"{len(failed)} runs failed ({'; '.join(failed)}). See the reasons above.")
    if unfinished:
        print_line(f"{len(unfinished)} runs are not finished. Run the same command again to resume them.")


if __name__ == "__main__":
    run_script(main)
