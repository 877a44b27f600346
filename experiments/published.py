"""The published results on RadImageNet next to those measured here: `python experiments/published.py PLAN RESULTS`.

Reads the test results of the finished runs of the plan `paper`. Prints the table, and writes RESULTS/published.md.
"""

import sys
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from statistics import fmean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.markdown import markdown
from experiments.plan import FINISHED, Arm, Plan, folder_of_run, read_plan, read_record
from utils.results.run_folder import METRICS_FILE
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.reading import read_json
from utils.runtime.text import count

Scores = dict[str, float]  # by metric
METRICS = {
    "precision": "precision",
    "balanced_accuracy": "recall",
    "f1": "F1",
    "auroc": "AUROC",
}  # as in metrics.json; titles
PUBLISHED: dict[str, Scores] = {  # by arm; Yavuz and Yang 2025, RadImageNet's test images
    "resnet50-conventional": {"precision": 0.5929, "balanced_accuracy": 0.5014, "f1": 0.5226, "auroc": 0.9884},
    "resnet50-published": {"precision": 0.6034, "balanced_accuracy": 0.5211, "f1": 0.5468, "auroc": 0.9900},
}
TABLE = "published.md"
NOTE = """\
Precision, recall (the balanced accuracy) and F1 are means over the classes, and AUROC is the mean over all pairs of
classes. The authors' code does not compute these metrics, so theirs may be averaged in another way. They are of one run
each, and a difference between two runs may come from their seeds alone."""


def read_scores(plan: Plan, results: Path) -> dict[str, dict[int, Scores]]:
    """The metrics on `test` of the finished runs, by title and seed.

    The title is the arm's name; that of a stage in another task than the plan's first, such as the conventional model
    after fine-tuning, also names the stage. Raises UserError if no run has finished, and for damaged files.
    """
    scores: dict[str, dict[int, Scores]] = {}
    for arm in plan.arms:
        finished = [
            (seed, run)
            for seed in arm.all_seeds
            if read_record((run := folder_of_run(results, arm.name, seed)) / FINISHED, arm)
        ]
        for title, stage in titles(plan, arm).items() if finished else ():
            scores[title] = {seed: _read_metrics(run / stage / METRICS_FILE) for seed, run in finished}
    if not scores:
        raise UserError(f"{results}: no run of the plan {plan.name!r} has finished yet (no {FINISHED}).")
    return scores


def titles(plan: Plan, arm: Arm) -> dict[str, str]:
    """The arm's tested stages by title, see `read_scores`."""
    tasks = [stage.test for arm in plan.arms for stage in arm.stages if stage.test]
    return {
        arm.name if stage.test == tasks[0] else f"{arm.name} + {stage.name}": stage.name
        for stage in arm.stages
        if stage.test
    }


def _read_metrics(path: Path) -> Scores:
    try:
        metrics = read_json(path)["metrics"]["clean"]
        return {name: float("nan" if metrics[name] is None else metrics[name]) for name in METRICS}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: missing or damaged. Remove the run's folder, and run the plan again.") from None


def table(plan: Plan, scores: dict[str, dict[int, Scores]]) -> str:
    """Markdown: all results, then the differences between the arms and their controls, published and measured."""
    rows, differences = [], []
    for title, by_seed in scores.items():
        if title in PUBLISHED:
            rows.append(_row(title, [PUBLISHED[title]], published=True))
        rows.append(_row(title, list(by_seed.values())))
    for arm in plan.arms:
        own = scores.get(arm.name, {})
        control = next((other for other in plan.arms if other.name == arm.control), None)
        for title in titles(plan, control) if control and own else ():
            name = f"{arm.name} minus {title}"
            if arm.name in PUBLISHED and title in PUBLISHED:
                differences.append(
                    _row(name, [_difference(PUBLISHED[arm.name], PUBLISHED[title])], "+", published=True)
                )
            other = scores.get(title, {})
            if pairs := [_difference(own[seed], other[seed]) for seed in own if seed in other]:
                differences.append(_row(name, pairs, "+"))
    header = ["", "", *METRICS.values()]
    parts = [f"# {plan.name}", markdown(header, rows, texts=2)]
    if differences:
        parts += ["Differences, above 0 where the first is better:", markdown(header, differences, texts=2)]
    return "\n\n".join([*parts, NOTE]) + "\n"


def _difference(first: Scores, second: Scores) -> Scores:
    return {name: first[name] - second[name] for name in METRICS}


def _row(title: str, runs: list[Scores], sign: str = "", published: bool = False) -> list[str]:
    """The cells of a row: means over the runs, with standard deviations if there are several."""
    cells = [title, "published, 1 run" if published else f"here, {count(len(runs), 'seed')}"]
    for name in METRICS:
        values = [scores[name] for scores in runs]
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
        cells.append("undefined" if isnan(fmean(values)) else f"{fmean(values):{sign}.4f}{spread}")
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python experiments/published.py")
    parser.add_argument("plan", type=expanded_path, metavar="PLAN", help="such as experiments/plans/paper.py")
    parser.add_argument("results", type=expanded_path, metavar="RESULTS", help="the output folder of its runs")
    options = parser.parse_args(argv)
    plan = read_plan(options.plan)
    text = table(plan, read_scores(plan, options.results))
    write_atomically(options.results / TABLE, text.encode())
    print(text, end="")


if __name__ == "__main__":
    run_script(main)
