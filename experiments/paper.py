"""The paper's experiments on RadImageNet by one command: `python experiments/paper.py DATA --source RADIMAGENET`.

Prepares and audits the images, runs the plan `paper`, prints its results next to the published ones, and transfers its
classifiers to other sets by probes of their features. All steps are commands that could be typed one by one; each
is printed before it runs. After a stop the same command resumes.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.fork_server import with_root
from experiments.plan import FINISHED, Plan, folder_of_run, matches, read_plan
from experiments.published import titles
from experiments.run import check_processes, split_flags
from utils.data.folders import LAYOUT
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.runtime.signals import EXIT_CODE as INTERRUPTED
from utils.runtime.signals import stopping_signals
from utils.runtime.text import print_line

PROCESSES = 8  # of the published recipe, each with the batch of the plan


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python experiments/paper.py")
    add = parser.add_argument
    add("data", type=expanded_path, metavar="DATA", help="DATA/{train,val,test}/<class>/<image>; made of --source")
    add("--source", type=expanded_path, metavar="RADIMAGENET", help="folder or archive as distributed; without it DATA "
        "must exist")  # fmt: skip
    add("--transfer", type=expanded_path, nargs="+", default=[], metavar="SET", help="sets to transfer to: MedMNIST's "
        ".npz files, or folders with {train,val,test}/<class>/<image>")  # fmt: skip
    add("-o", "--output", type=expanded_path, default=Path("runs/paper"), help="folder for everything but DATA; "
        "default: %(default)s")  # fmt: skip
    add("--processes", type=int, default=PROCESSES, choices=(1, 2, 4, 8), help="processes of each training, each with "
        "its own GPU; with fewer than 8, batches are accumulated to the published 256 images; default: "
        "%(default)s")  # fmt: skip
    add("--device", help="cuda or cpu; default: cuda if available")
    add("--flags", default="", help='for every training, for example "--amp --compile --workers 16"')
    add("--arms", default="*", metavar="PATTERNS", help="only these arms: shell patterns, separated by commas, such "
        "as resnet50-*")  # fmt: skip
    add("--plan", type=expanded_path, default=ROOT / "experiments" / "plans" / "paper.py", help="another plan with the "
        "arms of paper.py, such as experiments/plans/paper_trial.py")  # fmt: skip
    return parser


def prepare_commands(data: Path, source: Path | None, sets: dict[Path, Path], output: Path) -> Iterator[list[str]]:
    """What comes before the trainings. sets: as given to --transfer, and their folders."""
    if source is not None:
        origin = ["--source" if source.is_dir() else "--archive", str(source)]
        yield ["-m", "utils.radimagenet", "prepare", *origin, str(data)]
    for given, folder in sets.items():
        if given != folder:
            yield ["-m", "utils.medmnist", "prepare", str(given), str(folder)]
    if not (output / "audit" / "duplicates.csv").exists():  # which is written last
        yield ["-m", "utils.audit", str(data), "-o", str(output / "audit"), "--overwrite"]


def probe_commands(plan: Plan, sets: dict[Path, Path], output: Path, device: list[str]) -> Iterator[list[str]]:
    """A probe for each set, control and seed: of the control's finished run, and of those compared with it."""
    for folder in sets.values():
        for control in (arm for arm in plan.arms if arm.control is None):
            group = [control, *(arm for arm in plan.arms if arm.control == control.name)]
            for seed in control.all_seeds:
                runs = {arm: folder_of_run(output, arm.name, seed) for arm in group}
                weights = [
                    str(run / titles(plan, arm)[arm.name] / "model_best.pth")
                    for arm, run in runs.items()
                    if arm.name in titles(plan, arm) and (run / FINISHED).exists()
                ]
                if weights:
                    results = output / "transfer" / f"{folder.name}-{control.name}-seed{seed}"
                    words = ["--data-path", str(folder), "-o", str(results), "--overwrite", *device]
                    yield ["-m", "utils.probe", *weights, *words]


def execute(words: Sequence[str]) -> None:
    """Print a Python command, and run it; stop signals are passed on to it.

    Raises UserError if the command fails; ends this process after a signal.
    """
    print_line(f"$ python {shlex.join(words)}")
    signals: list[int] = []
    processes: list[subprocess.Popen] = []

    def pass_on(number: int, _: Any) -> None:
        signals.append(number)
        for process in processes:
            process.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in stopping_signals()}
    try:
        # In a session of its own, so that Ctrl-C reaches the command once, from `pass_on`.
        environment = {**os.environ, "PYTHONPATH": with_root(os.environ.get("PYTHONPATH"))}
        processes.append(subprocess.Popen([sys.executable, *words], env=environment, start_new_session=True))
        for number in signals:  # before the process was known
            processes[0].send_signal(number)
        code = processes[0].wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signals:
        print_line("Stopped. Run the same command again to resume.")
        sys.exit(INTERRUPTED)
    if code:
        raise UserError(
            f"python {shlex.join(words)}: exit code {code}; see above. Once that is fixed, the same command resumes."
        )


def transfer_folders(given: Sequence[Path], output: Path) -> dict[Path, Path]:
    """The folders of the --transfer sets. Raises UserError for a missing one, and for two of the same name."""
    folders = {path: path if path.is_dir() else output / "sets" / path.stem for path in given}
    for path in given:
        if not path.exists():
            raise UserError(
                f"--transfer {path}: no such file. Expected an .npz file of MedMNIST, or a folder with {LAYOUT}."
            )
    names = [folder.resolve().name for folder in folders.values()]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--transfer: two sets have the name {name!r}. Rename one.")
    return folders


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    data, output, plan = options.data, options.output, read_plan(options.plan)
    device = ["--device", options.device] if options.device else []
    parts = PROCESSES // options.processes
    accumulation = ["--grad-accum-steps", str(parts)] if parts > 1 else []
    flags = shlex.join([*device, *accumulation, *split_flags(options.flags)])
    check_processes(options.processes, flags)
    if not any(matches(arm.name, options.arms) for arm in plan.arms):
        raise UserError(f"--arms {options.arms}: matches none of {', '.join(arm.name for arm in plan.arms)}.")
    if options.source is None and not data.is_dir():
        raise UserError(f"{data}: no such folder. Expected {LAYOUT}, or give --source.")
    if options.source is not None and not options.source.exists():
        raise UserError(f"--source {options.source}: no such folder or archive. Expected RadImageNet as distributed.")
    sets = transfer_folders(options.transfer, output)

    scripts = os.path.relpath(ROOT / "experiments")
    for command in prepare_commands(data, options.source, sets, output):
        execute(command)
    files = [str(options.plan), "--data-path", str(data), "-o", str(output)]
    settings = ["--processes", str(options.processes), "--arms", options.arms, f"--flags={flags}"]
    execute([f"{scripts}/run.py", *files, *settings])
    execute([f"{scripts}/analyse.py", str(options.plan), str(output)])
    execute([f"{scripts}/published.py", str(options.plan), str(output)])
    for command in probe_commands(plan, sets, output, device):
        execute(command)


if __name__ == "__main__":
    run_script(main)
