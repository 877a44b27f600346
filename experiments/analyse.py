"""Tables and figures of a plan's finished runs: `python experiments/analyse.py PLAN RESULTS`.

Writes tables.md, differences.png and validation.png. Lists the runs that have not finished.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import tables
from experiments.differences import Comparison, compare
from experiments.finished import Runs, Task, read_runs, read_tasks
from experiments.plan import Plan, read_plan
from utils.arguments import check_limits
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.reading import read_bytes
from utils.runtime.text import printable

TABLES = "tables.md"
MARK = "<!-- written by experiments/analyse.py -->"  # marks files that may be replaced
INTERVALS = (
    "The bootstrap ({resamples} resamples of seeds and test images, percentiles) is too narrow with few seeds: over "
    "seeds alone it holds the true mean 76 % of the time with 3 and 89 % with 8; with one it is over images only. The "
    "t-interval is the more careful of the two, but leaves out the choice of test images. d_z: mean / standard "
    "deviation of the differences. Seeds for 1 point: with which a paired t-test (two-sided, 5 %) has a power of 80 %."
)
FIGURES = ("differences.png", "validation.png")


def page(plan: Plan, runs: Runs, tasks: list[Task], comparisons: list[Comparison], resamples: int) -> str:
    """The content of tables.md."""
    missing = [f"{arm.name} seed {seed}" for arm, seed in plan.runs() if (arm.name, seed) not in runs]
    finished = f"{len(runs)} of {len(runs) + len(missing)} planned runs have finished."
    if missing:
        finished += f" **Preliminary**: missing {', '.join(missing)}."
    parts = [MARK, f"# {plan.name}", plan.question, finished]
    for task in tasks:
        parts += task_parts(plan, task, comparisons)
    if comparisons:
        parts.append(INTERVALS.format(resamples=resamples))
    parts.append(tables.p_value_note(plan, comparisons))
    if health := tables.health_table(plan, runs):
        parts += [
            "## The policy",
            "First → last epoch of pretraining, means over seeds; `val_*`: clean images, before any fine-tuning.",
            health,
        ]
    parts += ["## Provenance", provenance(runs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def task_parts(plan: Plan, task: Task, comparisons: list[Comparison]) -> list[str]:
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
    if any(comparison.task == task.name for comparison in comparisons):
        parts += [
            f"Task {task.name}, paired differences to **{plan.baseline}**, in points:",
            tables.differences_table(task, comparisons),
        ]
    else:
        parts.append(f"No differences: {plan.baseline} and the other arms have no seed in common.")
    return parts


def provenance(runs: Runs) -> str:
    """Versions, hardware, dates and commits of all finished runs, and their total duration."""
    starts = []
    for run in runs.values():
        for stage in run.stages.values():
            starts += stage.origin.get("starts", [])
            if "origin" in stage.tested:
                starts.append(stage.tested["origin"])
    versions: dict[str, list[str]] = {}
    for start in starts:
        for package, version in start["versions"].items():
            versions.setdefault(package, []).append(version)
    versions = {package: _unique(numbers) for package, numbers in versions.items()}
    commits = _unique(start["commit"] or "unknown" for start in starts)
    days = sorted({start["time"][:10] for start in starts})
    hours = sum(run.seconds for run in runs.values()) / 3600
    sentences = [
        ", ".join(f"{package} {' and '.join(numbers)}" for package, numbers in versions.items()),
        "; ".join(_unique(f"{start['device']} ({start['machine']})" for start in starts)),
        " to ".join(_unique((days[0], days[-1]))) if days else "dates unknown",
        f"{'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}",
        f"{hours:.1f} hours of computing",
    ]
    text = f"{'; '.join(sentence for sentence in sentences if sentence)}."
    mixed = ["commits"] if len(commits) > 1 else []
    mixed += [f"versions of {package}" for package, numbers in versions.items() if len(numbers) > 1]
    return f"{text} **The runs are of different {' and '.join(mixed)}.**" if mixed else text


def _unique(values: Iterable[str]) -> list[str]:
    """Each value once, in order."""
    return list(dict.fromkeys(values))


def _check_output(folder: Path) -> None:
    """Raise UserError if the folder cannot be made, or holds files of these names that this command did not write."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replaceable = read_bytes(folder / TABLES).startswith(MARK.encode())
    except FileNotFoundError:
        replaceable = False
    except OSError as error:
        raise UserError(f"-o {folder}: cannot be used ({error.strerror}).") from None
    existing = [name for name in (TABLES, *FIGURES) if (folder / name).exists()]
    if existing and not replaceable:
        raise UserError(f"{folder / existing[0]}: exists, and was not written by this command. Give another -o.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python experiments/analyse.py")
    parser.add_argument("plan", type=expanded_path, metavar="PLAN", help="such as experiments/plans/classification.py")
    parser.add_argument("results", type=expanded_path, metavar="RESULTS", help="the output folder of its runs")
    parser.add_argument(
        "-o", "--output", type=expanded_path, metavar="FOLDER", help="default: RESULTS; earlier output is replaced"
    )
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap resamples; default: %(default)s")
    options = parser.parse_args(argv)
    check_limits(vars(options))
    if options.resamples < 1:
        raise UserError(f"--resamples {options.resamples}: expected 1 or more.")
    plan = read_plan(options.plan)
    runs = read_runs(plan, options.results)
    tasks = read_tasks(plan, runs)
    output = options.output or options.results
    _check_output(output)
    comparisons = compare(plan, tasks, options.resamples)
    text = page(plan, runs, tasks, comparisons, options.resamples)
    write_atomically(output / TABLES, text.encode(errors="backslashreplace"))
    write_figures(output, plan, runs, tasks, comparisons)
    print("\n".join(map(printable, text.split("\n"))))


def write_figures(output: Path, plan: Plan, runs: Runs, tasks: list[Task], comparisons: list[Comparison]) -> None:
    """Write FIGURES, and remove those of an earlier analysis that have nothing to show any more."""
    from experiments import pictures
    from utils.results.figures import write_figure

    figures = (pictures.differences(plan, tasks, comparisons), pictures.validation(plan, tasks, runs))
    for name, figure in zip(FIGURES, figures, strict=True):
        if figure is None:
            (output / name).unlink(missing_ok=True)
        else:
            write_figure(output / name, figure)


if __name__ == "__main__":
    run_script(main)
