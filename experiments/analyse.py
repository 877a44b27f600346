"""Tables and figures of a plan's finished runs: `python experiments/analyse.py PLAN RESULTS`.

RESULTS is the folder of the runs, or the file of experiments/collect.py. Writes tables.md, differences.png and
validation.png. Lists the runs that have not finished.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import tables
from experiments.differences import Comparison, compare
from experiments.outcomes import IMPROVEMENT
from experiments.plan import Plan, read_plan
from experiments.results_file import read_results
from experiments.run_results import Results, Run, RunKey
from experiments.tasks import Task, read_tasks
from utils.arguments import check_limits
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.reading import read_bytes
from utils.runtime.text import print_line

TABLES = "tables.md"
MARK = "<!-- written by experiments/analyse.py -->"  # marks files that may be replaced
LEGEND = (
    f"{IMPROVEMENT} d_z: mean / standard deviation of these differences. P(better): probability that a new replicate "
    "of the arm beats its control's, estimated by the share of seeds in which it does (equal ones count half). "
    "Bouthillier et al. 2021 recommend .75 as the least that is worth claiming. Seeds for .01: with which a paired "
    "t-test (two-sided, 5 %) finds a difference of one point, or .01 nats, with a power of 80 %. All comparisons "
    "without a p are exploratory: among many, some intervals exclude 0 by chance."
)
BOOTSTRAP = (
    "The bootstrap ({resamples} resamples of seeds and test images, percentiles) is too narrow with few seeds: over "
    "seeds alone it holds the true mean 76 % of the time with 3 and 89 % with 8; with one it is over images only. The "
    "t-interval is the more careful of the two, but leaves out the choice of test images."
)
CLAIMS = (
    "What would be claimed from one run of each? Top-1 on the same images, seed by seed. Congruence: share of images "
    "that both recognise. P(false claim): probability that the true accuracy of the one that is ahead is not higher, "
    "as far as the choice of test images goes (Christodoulou et al. 2025, arXiv 2505.04720), median over seeds. Firm: "
    "seeds in which it is below 5 %. Refuted: firm claims for the one that is behind in the mean over seeds."
)
FIGURES = ("differences.png", "validation.png")


def page(plan: Plan, results: Results, tasks: list[Task], comparisons: list[Comparison], resamples: int) -> str:
    """The content of tables.md."""
    runs = results.runs
    missing = [f"{arm.name} seed {seed}" for arm, seed in plan.runs() if (arm.name, seed) not in runs]
    finished = f"{len(runs)} of {len(runs) + len(missing)} planned runs have finished."
    if missing:
        finished += f" **Preliminary**: missing {', '.join(missing)}."
    parts = [MARK, f"# {plan.name}", plan.question, finished]
    if primary := tables.primary_table(comparisons):
        parts += ["## Primary tests", primary, tables.test_note(plan, tasks, comparisons)]
    for task in tasks:
        parts += task_parts(plan, task, comparisons)
    parts.append(LEGEND)
    if any(task.shared for task in tasks):
        parts.append(BOOTSTRAP.format(resamples=resamples))
    if health := tables.health_table(plan, runs):
        parts += [
            "## The policy",
            "First → last epoch of pretraining, means over seeds; `val_*`: clean images, before any fine-tuning.",
            health,
        ]
    parts += ["## Provenance", provenance(runs, results.origin)]
    return "\n\n".join(part for part in parts if part) + "\n"


def task_parts(plan: Plan, task: Task, comparisons: list[Comparison]) -> list[str]:
    """Heading, results, differences and claims of a task."""
    sizes = sorted({len(tested.targets) for tested in task.runs.values()})
    images = f"{' to '.join(f'{size:,}' for size in dict.fromkeys((sizes[0], sizes[-1])))} test images"
    if not task.shared:
        images += ", other ones for each seed,"
    images += f" of {len(task.classes)} classes"
    if task.has_easy:
        images += f", {task.hard.sum()} of them hard ({plan.hard})"
    draws = {len(tested.predictions) for tested in task.runs.values()} - {1}
    notes = f" Each run is the mean of {', '.join(map(str, sorted(draws)))} draws." if draws else ""
    if not task.shared:
        notes += (
            " The test images of two seeds overlap, so intervals over seeds hold for this collection of images only."
        )
    parts = [
        f"## Task {task.name}",
        f"{images}.{notes} Mean ± standard deviation over the seeds that all arms have; percent, cross-entropy in "
        "nats, AUROC a fraction.",
        tables.results_table(plan, task),
    ]
    if not any(comparison.task == task.name for comparison in comparisons):
        return [*parts, "No differences: no arm has a seed in common with its control."]
    if differences := tables.differences_table(task, comparisons):
        parts += [f"Task {task.name}, improvement over the control, exploratory:", differences]
    return [*parts, CLAIMS, tables.claims_table(plan, task)]


def provenance(runs: dict[RunKey, Run], origin: dict[str, Any]) -> str:
    """Versions, hardware, dates and commits of all finished runs, and their total duration."""
    versions, commits, days = origin["versions"], origin["commits"], origin["days"]
    hours = sum(run.seconds for run in runs.values()) / 3600
    sentences = [
        ", ".join(f"{package} {' and '.join(numbers)}" for package, numbers in versions.items()),
        "; ".join(origin["devices"]),
        " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "dates unknown",
        f"{'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}",
        f"{hours:.1f} hours of computing",
    ]
    text = f"{'; '.join(sentence for sentence in sentences if sentence)}."
    mixed = ["commits"] if len(commits) > 1 else []
    mixed += [f"versions of {package}" for package, numbers in versions.items() if len(numbers) > 1]
    return f"{text} **The runs are of different {' and '.join(mixed)}.**" if mixed else text


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
    parser.add_argument(
        "results",
        type=expanded_path,
        metavar="RESULTS",
        help="the output folder of its runs, or the file of collect.py",
    )
    parser.add_argument(
        "-o", "--output", type=expanded_path, metavar="FOLDER",
        help="default: RESULTS, or the folder of the file; earlier output is replaced",
    )  # fmt: skip
    parser.add_argument(
        "--resamples", type=int, default=2000, help="bootstrap resamples, where all seeds have the same test images; "
        "default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--against", metavar="ARM", help="compare all arms with this one instead, exploratory; needs -o",
    )  # fmt: skip
    options = parser.parse_args(argv)
    check_limits(vars(options))
    if options.against is not None and options.output is None:
        raise UserError("--against: needs -o, so that it does not replace the plan's own tables.")
    if options.resamples < 1:
        raise UserError(f"--resamples {options.resamples}: expected 1 or more.")
    plan = read_plan(options.plan)
    results = read_results(plan, options.results)
    plan = plan if options.against is None else plan.against(options.against)
    tasks = read_tasks(plan, results.runs)
    output = options.output or (options.results.parent if options.results.is_file() else options.results)
    _check_output(output)
    comparisons = compare(plan, tasks, options.resamples)
    text = page(plan, results, tasks, comparisons, options.resamples)
    write_atomically(output / TABLES, text.encode(errors="backslashreplace"))
    write_figures(output, plan, results, tasks, comparisons)
    for line in text.split("\n"):
        print_line(line)


def write_figures(output: Path, plan: Plan, results: Results, tasks: list[Task], comparisons: list[Comparison]) -> None:
    """Write FIGURES, and remove those of an earlier analysis that have nothing to show any more."""
    from experiments import pictures
    from utils.results.figures import write_figure

    figures = (pictures.differences(plan, tasks, comparisons), pictures.validation(plan, tasks, results.runs))
    for name, figure in zip(FIGURES, figures, strict=True):
        if figure is None:
            (output / name).unlink(missing_ok=True)
        else:
            write_figure(output / name, figure)


if __name__ == "__main__":
    run_script(main)
