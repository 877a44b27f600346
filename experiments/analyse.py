"""Tables and figures of a plan's finished runs: `python experiments/analyse.py PLAN RESULTS`.

Writes tables.md, differences.png, health.png and validation.png. Runs that have not finished are left out, and named.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import pictures, tables
from experiments.differences import Comparison, compare
from experiments.plan import Plan, read_plan
from experiments.results import Runs, Task, read_runs, read_tasks, task_names
from utils.arguments import check_limits
from utils.results.figures import write_figure
from utils.results.run_folder import RunFolder
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.reading import read_bytes
from utils.runtime.text import printable

TABLES = "tables.md"
MARK = "<!-- written by experiments/analyse.py -->"  # of a file that may be written anew
FIGURES = ("differences.png", "health.png", "validation.png")


def page(plan: Plan, runs: Runs, tasks: list[Task], found: list[Comparison], resamples: int) -> str:
    """tables.md."""
    health = tables.health_table(plan, runs)
    parts = [
        MARK,
        f"# {plan.name}",
        plan.question,
        finished_and_missing(plan, runs),
        *(part for task in tasks for part in task_parts(plan, task, found)),
        interval_note(resamples) if found else "",
        tables.p_value_note(plan, task_names(plan), found),
        *(["## The policy", "First → last epoch of pretraining, means over seeds; `val_*`: clean images, before any "
           "fine-tuning.", health] if health else []),
        "## Provenance",
        provenance(runs),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def finished_and_missing(plan: Plan, runs: Runs) -> str:
    """How many of the planned runs have finished, and which have not."""
    missing = [f"{arm.name} seed {seed}" for arm, seed in plan.runs() if (arm.name, seed) not in runs]
    planned = len(runs) + len(missing)
    text = f"{len(runs)} of {planned} planned runs have finished."
    return f"{text} **Preliminary**: missing {', '.join(missing)}." if missing else text


def task_parts(plan: Plan, task: Task, found: list[Comparison]) -> list[str]:
    """Heading, results and differences of a task."""
    images = f"{len(task.targets)} test images of {len(task.classes)} classes"
    if task.has_easy:
        images += f", {task.hard.sum()} of them hard ({plan.hard})"
    draws = {len(tested.predictions) for tested in task.runs.values()} - {1}
    averaged = f" Each run is the mean of {', '.join(map(str, sorted(draws)))} draws." if draws else ""
    parts = [
        f"## Task {task.name}",
        f"{images}.{averaged} Mean ± standard deviation over seeds; percent, AUROC as a fraction.",
        tables.results_table(plan, task),
    ]
    if any(one.task == task.name for one in found):
        parts += [
            f"Task {task.name}, paired differences to **{plan.baseline}**, in points:",
            tables.differences_table(task, found),
        ]
    else:
        parts.append(f"No differences: no seed is there of both {plan.baseline} and another arm.")
    return parts


def interval_note(resamples: int) -> str:
    return (
        f"The bootstrap ({resamples} resamples of seeds and test images, percentiles) is too narrow with few seeds: "
        "over seeds alone it holds the true mean 76 % of the time with 3 and 89 % with 8; with one it is over images "
        "only. The t-interval is the more careful of the two, but leaves out the choice of test images. d_z: mean / "
        "standard deviation of the differences. Seeds for 1 point: with which a paired t-test (two-sided, 5 %) has a "
        "power of 80 %."
    )


def provenance(runs: Runs) -> str:
    """Versions, hardware, dates and commits of all finished runs, and how long they took together."""
    starts = [start for run in runs.values() for stage in run.stages.values() for start in _starts(stage)]
    days = sorted(start["time"][:10] for start in starts)
    versions: dict[str, list[str]] = {}
    for start in starts:
        for package, version in start["versions"].items():
            versions.setdefault(package, []).append(version)
    several = [package for package, found in versions.items() if len(set(found)) > 1]
    commits = _different(start["commit"] or "unknown" for start in starts)
    hours = sum(run.seconds for run in runs.values()) / 3600
    sentences = [
        ", ".join(f"{package} {' and '.join(_different(found))}" for package, found in versions.items()),
        "; ".join(_different(f"{start['device']} ({start['machine']})" for start in starts)),
        (days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}") if days else "dates unknown",
        f"{'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}",
        f"{hours:.1f} hours of computing",
    ]
    text = f"{'; '.join(sentence for sentence in sentences if sentence)}."
    mixed = [*(["commits"] if len(commits) > 1 else []), *(f"versions of {package}" for package in several)]
    return f"{text} **The runs are of different {' and '.join(mixed)}.**" if mixed else text


def _starts(stage: RunFolder) -> list[dict[str, Any]]:
    return [*stage.origin.get("starts", []), *([stage.tested["origin"]] if "origin" in stage.tested else [])]


def _different(values: Iterable[str]) -> list[str]:
    """Each once, in their order."""
    return list(dict.fromkeys(values))


def _check_output(folder: Path) -> None:
    """Raise UserError for a folder that cannot be made, or that holds such files of somebody else's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"-o {folder}: cannot be made ({error.strerror}).") from None
    there = [name for name in (TABLES, *FIGURES) if (folder / name).exists()]
    if there and not _is_own(folder / TABLES):
        raise UserError(f"{folder / there[0]}: is there and not of this command; give another -o.")


def _is_own(path: Path) -> bool:
    try:
        return read_bytes(path).startswith(MARK.encode())
    except OSError:
        return False


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python experiments/analyse.py")
    parser.add_argument("plan", type=expanded_path, metavar="PLAN", help="such as experiments/plans/classification.py")
    parser.add_argument("results", type=expanded_path, metavar="RESULTS", help="the folder of its runs")
    parser.add_argument(
        "-o", "--output", type=expanded_path, metavar="FOLDER", help="default: RESULTS; its own files are replaced"
    )
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap; default: %(default)s")
    options = parser.parse_args(argv)
    check_limits(vars(options))
    if options.resamples < 1:
        raise UserError(f"--resamples {options.resamples}: expected 1 or more.")
    plan = read_plan(options.plan)
    runs = read_runs(plan, options.results)
    tasks = read_tasks(plan, runs)
    output = options.output or options.results
    _check_output(output)
    found = compare(plan, tasks, options.resamples)
    text = page(plan, runs, tasks, found, options.resamples)
    write_atomically(output / TABLES, text.encode(errors="backslashreplace"))
    drawn = (
        pictures.differences(plan, tasks, found),
        pictures.health(plan, runs),
        pictures.validation(plan, tasks, runs),
    )
    for name, figure in zip(FIGURES, drawn, strict=True):
        if figure is None:
            (output / name).unlink(missing_ok=True)  # of an earlier analysis
        else:
            write_figure(output / name, figure)
    print("\n".join(map(printable, text.split("\n"))))


if __name__ == "__main__":
    run_script(main)
