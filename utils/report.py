"""An HTML page about one run, or comparing several: `python -m utils.report OUTPUT [OUTPUT ...]` writes report.html.

The page is self-contained: it loads nothing from a network, opens from the disk, and prints.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from utils.results import templates
from utils.results.confusion import confusion_matrix, count_pairs, per_class_recall
from utils.results.curves import Runs, learning_curves, policy_health
from utils.results.figures import as_svg
from utils.results.metrics import LEVEL, METRIC_TITLES, Outcome, bootstrap_intervals
from utils.results.run_folder import RESULT_TITLES, Evaluation, RunFolder, describe_tested, read_run_folder
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.reading import open_regular, read_bytes
from utils.runtime.text import print_line
from utils.training import run_lock

RESAMPLES = 1000
MARK = b'<meta name="generator" content="utils.report">'  # in the head of a page that may be replaced


def page(runs: list[RunFolder]) -> bytes:
    """The report of one or several runs, as HTML."""
    names = short_names([run.folder for run in runs])
    logs = {name: run.log for name, run in zip(names, runs, strict=True) if run.log}
    class_lists = {tuple(row["class"] for row in result.table) for run in runs for result in run.evaluations.values()}
    return templates.render(
        "report.html",
        same_classes=len(class_lists) < 2,
        title=f"Report of {names[0]}" if len(runs) == 1 else f"Report of {len(runs)} runs",
        runs=[describe_run(name, run) for name, run in zip(names, runs, strict=True)],
        metric_titles=METRIC_TITLES,
        level=f"{LEVEL:.0%}",
        resamples=RESAMPLES,
        curves=responsive_picture(learning_curves, logs, "Learning curves"),
        health=responsive_picture(policy_health, logs, "The policy over the epochs"),
    )


def short_names(folders: list[Path]) -> list[str]:
    """Folder names without their common prefix; a single folder by its own name."""
    paths = [folder.resolve() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def describe_run(name: str, run: RunFolder) -> dict[str, Any]:
    """The values of a run for the template."""
    data = run.origin.get("data", {})
    return {
        "name": name,
        "folder": str(run.folder),
        "status": status(run),
        "notes": run.notes + missing_files(run),
        "starts": [*run.origin.get("starts", []), *([run.tested["origin"]] if "origin" in run.tested else [])],
        "data": data,
        "classes": sorted(set().union(*(split["images"] for split in data.values()))),
        "last": run.log[-1] if run.log else {},
        "best": max(run.log, key=validation_f1) if run.log else {},
        "tested": run.tested,
        "evaluations": [
            describe_evaluation(RESULT_TITLES.get(result, result), describe_tested(run.tested, result), evaluation)
            for result, evaluation in run.evaluations.items()
        ],
        "galleries": mask_galleries(run.folder),
    }


def validation_f1(line: dict[str, Any]) -> float:
    """val_f1 of a line of the log, minus infinity if it is missing or not finite."""
    value = line.get("val_f1")
    return value if isinstance(value, (int, float)) and math.isfinite(value) else -math.inf


def status(run: RunFolder) -> str:
    """A sentence on how far the run came."""
    epochs = f"{len(run.log)} {'epoch' if len(run.log) == 1 else 'epochs'} in the log"
    saved_status = run.status.get("status")
    lock = run_lock.look_at(run.folder)
    holder = f" ({lock.holder})" if lock.holder else ""
    if saved_status is None and lock.held:
        return f"Running{holder}: nothing is saved yet; {epochs}."
    if saved_status is None:
        return f"Unknown: there is no status.json; {epochs}."
    done = f"{run.status.get('epoch')} epochs and {run.status.get('step')} steps"
    saved = f"last saved after {done}, {run.status.get('time')}"
    if lock.held:  # status.json may be from an earlier start
        return f"Running{holder}; {epochs}; {saved}."
    if saved_status == "running" and lock.held is None:
        return f"Running, or killed{holder}: the lock of its folder cannot be tested here; {epochs}; {saved}."
    if saved_status == "running":
        return f"Killed{holder}: it no longer holds the lock of its folder; {epochs}; {saved}."
    message = run.status.get("message") if saved_status == "failed" else None
    return f"{saved_status.capitalize()}; {epochs}; {saved}." + (f" {message}" if message else "")


def missing_files(run: RunFolder) -> list[str]:
    """Sentences on what the page lacks, and which command adds it."""
    notes = []
    if not run.log:
        notes.append("No epoch has finished yet: there are no learning curves.")
    if not run.tested:
        notes.append("Not tested yet: train.py --test-only --resume FILE writes metrics.json and its tables.")
    if not run.origin:
        notes.append("No run.json: the command, versions and data of this run are unknown.")
    return notes


def describe_evaluation(title: str, what: str, evaluation: Evaluation) -> dict[str, Any]:
    """Metrics with intervals, the per-class table with the commonest confusion of each class, and two pictures."""
    classes = [row["class"] for row in evaluation.table]
    outcome = evaluation.outcome
    confused = commonest_confusions(outcome, classes)
    arguments = (outcome.targets, outcome.predictions, classes, what)
    return {
        "title": title,
        "what": what,
        "images": len(outcome.targets),
        "metrics": with_intervals(evaluation),
        "table": [row | {"confused": text} for row, text in zip(evaluation.table, confused, strict=True)],
        "pictures": [
            picture(confusion_matrix(*arguments), f"Confusion matrix, {title}"),
            picture(per_class_recall(*arguments), f"Recall of each class, {title}"),
        ],
    }


def with_intervals(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """{metric: {"value": as in metrics.json, "interval": (lower, upper) or None}} for the metrics that are defined."""
    intervals = bootstrap_intervals(evaluation.outcome, RESAMPLES)
    return {
        name: {"value": evaluation.metrics[name], "interval": intervals.get(name)}
        for name in METRIC_TITLES
        if evaluation.metrics.get(name) is not None
    }


def commonest_confusions(outcome: Outcome, classes: Sequence[str]) -> list[str]:
    """For each class the most frequent wrong prediction and its number of images: "b (3)"; "" without any."""
    wrong = outcome.targets != outcome.predictions
    counts = count_pairs(outcome.targets[wrong], outcome.predictions[wrong], len(classes))
    return [f"{classes[row.argmax()]} ({row.max()})" if row.any() else "" for row in counts]


def mask_galleries(folder: Path) -> list[dict[str, str]]:
    """The mask galleries that --plot-every wrote: before training, and after the last epoch."""
    plots = folder / "plots"
    by_epoch = sorted(plots.glob("masks_[0-9]*.png"), key=lambda path: (len(path.name), path.name))
    titles = {plots / "masks_before.png": "Masks before training"}
    titles |= {path: f"Masks after epoch {path.stem[6:]}" for path in by_epoch[-1:]}
    galleries = []
    for path, title in titles.items():
        with suppress(OSError):  # missing, or a folder of that name
            galleries.append({"source": templates.data_uri(read_bytes(path)), "title": title})
    return galleries


def picture(figure: Figure, title: str) -> dict[str, str]:
    return {"source": templates.data_uri(as_svg(figure), "image/svg+xml"), "title": title}


def responsive_picture(draw: Callable[..., Figure], logs: Runs, title: str) -> dict[str, str] | None:
    """A picture with panels in three columns, and one in a single column for narrow screens; None without such data."""
    try:
        wide, narrow = (picture(draw(logs, columns=columns), title) for columns in (3, 1))
    except UserError:
        return None
    return {**wide, "narrow": narrow["source"]}


def check_output(path: Path) -> None:
    """Raise UserError unless the path is free, or holds a page of this command."""
    if path.suffix != ".html":
        raise UserError(f"{path}: expected a name that ends in .html.")
    if not path.exists():
        return
    with suppress(OSError), open_regular(path) as file:
        if MARK in file.read(4096):
            return
    raise UserError(f"{path}: already exists and is not a report of this command; give another --output.")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m utils.report")
    parser.add_argument("outputs", nargs="+", type=expanded_path, metavar="OUTPUT", help="the --output-dir of a run")
    parser.add_argument("-o", "--output", type=expanded_path, help="an .html file, replaced each time; "
        "default: report.html in the folder of a single run, or in the current folder for several")  # fmt: skip
    options = parser.parse_args(argv)
    folders = options.outputs
    output = options.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    check_output(output)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("OUTPUT: a folder is given twice; give each run once.")
    write_atomically(output, page([read_run_folder(folder) for folder in folders]))
    print_line(f"{output}: {len(folders)} {'run' if len(folders) == 1 else 'runs'}")


if __name__ == "__main__":
    run_script(main)
