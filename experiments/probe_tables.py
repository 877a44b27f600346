"""Compare the arms of a plan by its probes: `python experiments/probe_tables.py PLAN RESULTS -o FILE.csv`

Reads probe.json of the finished runs. FILE.csv gets a row for each run, probe and number of training images, with the
means over the draws; FILE.md, written next to it, the paired differences of each arm to its control. Without RESULTS
FILE.md is made from FILE.csv alone.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from experiments import paired_tables
from experiments.paired_tables import Row
from experiments.plan import FINISHED, PROBE, Plan, folder_of_run, read_plan, read_record
from utils.inference.probes import PROBE_TITLES
from utils.probe import JSON
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.reading import read_json
from utils.runtime.text import count, printable

PARTS = ("classes", "probe", "images per class")
REPORTED = ("f1", "balanced_accuracy")


def read_probes(plan: Plan, results: Path) -> list[Row]:
    """The rows of all finished runs. Raises UserError if there are none, and for a damaged file."""
    if not any(stage.script == PROBE for arm in plan.arms for stage in arm.stages):
        raise UserError(f"the plan {plan.name!r}: has no stage with probes (script {PROBE!r}).")
    rows = []
    for arm in plan.arms:
        for seed in arm.all_seeds:
            run = folder_of_run(results, arm.name, seed)
            if read_record(run / FINISHED, arm):
                for stage in arm.stages:
                    if stage.script == PROBE:
                        rows += _rows_of(arm.name, seed, stage.name, run / stage.name / JSON)
    if not rows:
        raise UserError(f"{results}: no run of the plan {plan.name!r} has finished yet (no {FINISHED}).")
    return rows


def _rows_of(arm: str, seed: int, stage: str, path: Path) -> Iterator[Row]:
    """One row for each probe and number of images, all training images last."""
    try:
        by_condition: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for result in read_json(path)["results"]:
            images = "all" if result["shots"] is None else str(int(result["shots"]))
            by_condition.setdefault((PROBE_TITLES[result["probe"]], images), []).append(result["metrics"])
        for condition, metrics in by_condition.items():
            values = {name: float(np.mean([draw[name] for draw in metrics])) for name in REPORTED}
            yield Row(arm, seed, (stage, *condition), values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: missing or damaged. Remove the run's folder, and run the plan again.") from None


def page(plan: Plan, rows: Sequence[Row]) -> str:
    """The content of FILE.md."""
    runs = {(row.arm, row.seed) for row in rows}
    parts = [
        f"# {plan.name}: probes of frozen features",
        f"{plan.question} {count(len(runs), 'run')}; the value of a run is the mean over its draws of training images.",
        f"## Mean over the seeds that all arms have: {paired_tables.title('f1')}",
        paired_tables.levels_table(plan, rows, PARTS, "f1"),
        "## Improvement over the control",
        paired_tables.LEGEND,
        paired_tables.differences_table(plan, rows, PARTS, REPORTED),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python experiments/probe_tables.py")
    add = parser.add_argument
    add("plan", type=expanded_path, metavar="PLAN", help="such as experiments/plans/transfer.py")
    add("results", type=expanded_path, metavar="RESULTS", nargs="?", help="the output folder of its runs")
    add("-o", "--output", type=expanded_path, metavar="FILE.csv", required=True, help="replaced if RESULTS is given")
    options = parser.parse_args(argv)
    plan = read_plan(options.plan)
    table, text = paired_tables.output_paths(options.output, ".md")
    rows = paired_tables.read_rows(table, plan, PARTS, REPORTED)
    if options.results is not None:
        rows = read_probes(plan, options.results)
        paired_tables.write_rows(table, plan, PARTS, rows)
    if not rows:
        raise UserError(f"-o {table}: no such file. Give RESULTS, the output folder of experiments/run.py.")
    content = page(plan, rows)
    write_atomically(text, content.encode(errors="backslashreplace"))
    print("\n".join(map(printable, content.split("\n"))))


if __name__ == "__main__":
    run_script(main)
