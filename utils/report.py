"""One page a run, or one that compares several: `python -m utils.report OUTPUT [OUTPUT ...]` makes report.html.

The page holds all it shows: it asks nothing of a network, opens from the disk, and prints.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from utils.results import confusion as class_plots
from utils.results import figures
from utils.results import templates as html
from utils.results.curves import Runs, learning_curves, policy_health
from utils.results.metrics import LEVEL, Outcome, bootstrap_intervals
from utils.results.run_folder import TITLES, Evaluation, RunFolder, describe_tested, read_run_folder
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.reading import open_regular, read_bytes
from utils.runtime.text import print_line
from utils.training import run_lock

TEMPLATE = "report.html"
RESAMPLES = 1000
MARK = b'<meta name="generator" content="utils.report">'  # of a page that may be written anew
METRICS = {
    "top1": "Top-1 accuracy",
    "top5": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "precision": "Macro precision",
    "recall": "Macro recall",
    "f1": "Macro F1",
    "auroc": "AUROC",
    "loss": "Cross-entropy",
}


def page(runs: list[RunFolder]) -> bytes:
    """The report of one or several runs, as HTML."""
    names = names_of([run.folder for run in runs])
    logs = {name: run.log for name, run in zip(names, runs, strict=True) if run.log}
    class_lists = {tuple(row["class"] for row in found.table) for run in runs for found in run.evaluations.values()}
    return html.render(
        TEMPLATE,
        alike=len(class_lists) < 2,
        title=f"Report of {names[0]}" if len(runs) == 1 else f"Report of {len(runs)} runs",
        runs=[describe_run(name, run) for name, run in zip(names, runs, strict=True)],
        metric_names=METRICS,
        level=f"{LEVEL:.0%}",
        resamples=RESAMPLES,
        curves=responsive(learning_curves, logs, "Learning curves"),
        health=responsive(policy_health, logs, "The policy over the epochs"),
    )


def names_of(folders: list[Path]) -> list[str]:
    """Folders without what all of them begin with; the only one by its own name."""
    paths = [folder.resolve() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def describe_run(name: str, run: RunFolder) -> dict[str, Any]:
    """What the page shows of one run."""
    return {
        "name": name,
        "folder": str(run.folder),
        "status": status(run),
        "notes": run.notes + missing(run),
        "starts": [*run.origin.get("starts", []), *([run.tested["origin"]] if "origin" in run.tested else [])],
        "data": data_summary(run.origin.get("data", {})),
        "last": run.log[-1] if run.log else {},
        "best": max(run.log, key=validated_f1) if run.log else {},
        "tested": run.tested,
        "evaluations": [
            describe_evaluation(TITLES.get(of, of), describe_tested(run.tested, of), found)
            for of, found in run.evaluations.items()
        ],
        "galleries": galleries(run.folder),
    }


def validated_f1(line: dict[str, Any]) -> float:
    """Of a line of the log; below all others where it has none."""
    value = line.get("val_f1")
    return value if isinstance(value, (int, float)) and math.isfinite(value) else -math.inf


def status(run: RunFolder) -> str:
    """How far the run came, in a sentence."""
    epochs = f"{len(run.log)} {'epoch' if len(run.log) == 1 else 'epochs'} in the log"
    told = run.status.get("status")
    lock = run_lock.look_at(run.folder)
    holder = f" ({lock.holder})" if lock.holder else ""
    if told is None and lock.held:
        return f"Running{holder}: nothing is saved yet; {epochs}."
    if told is None:
        return f"Not known: there is no status.json; {epochs}."
    done = f"{run.status.get('epoch')} epochs and {run.status.get('step')} steps"
    where = f"last saved with {done} done, {run.status.get('time')}"
    if lock.held:  # status.json may still be of the start before
        return f"Running{holder}; {epochs}; {where}."
    if told == "running" and lock.held is None:
        return f"Running, or killed{holder}: the lock of its folder cannot be tested here; {epochs}; {where}."
    if told == "running":
        return f"Killed{holder}: it no longer holds the lock of its folder; {epochs}; {where}."
    message = run.status.get("message")
    return f"{told.capitalize()}; {epochs}; {where}.{f' {message}' if message and told == 'failed' else ''}"


def missing(run: RunFolder) -> list[str]:
    """What the page lacks, and how it is made."""
    notes = []
    if not run.log:
        notes.append("No epoch is done yet: there are no learning curves.")
    if not run.tested:
        notes.append("Not tested yet: train.py --test-only --resume FILE writes metrics.json and its tables.")
    if not run.origin:
        notes.append("No run.json: the command, versions and data of this run are not known.")
    return notes


def data_summary(data: dict[str, Any]) -> dict[str, Any]:
    """Splits with their images, and a row of counts for each class."""
    counts = {split: of_split["images"] for split, of_split in data.items()}
    classes = sorted(set().union(*counts.values()))
    return {
        "splits": [
            {
                "name": split,
                "root": data[split]["root"],
                "images": sum(of_class.values()),
                "classes": len(of_class),
                "smallest": min(of_class.values()),
                "largest": max(of_class.values()),
            }
            for split, of_class in counts.items()
        ],
        "classes": [{"name": name, "counts": [of.get(name, 0) for of in counts.values()]} for name in classes],
    }


def describe_evaluation(title: str, what: str, evaluation: Evaluation) -> dict[str, Any]:
    """Metrics with intervals, the per-class table with each class's commonest confusion, and two pictures."""
    classes = [row["class"] for row in evaluation.table]
    outcome = evaluation.outcome
    confused = commonest_confusions(outcome, classes)
    return {
        "title": title,
        "what": what,
        "images": len(outcome.targets),
        "metrics": with_intervals(evaluation),
        "table": [row | {"confused": text} for row, text in zip(evaluation.table, confused, strict=True)],
        "pictures": [
            picture(
                class_plots.confusion_matrix(outcome.targets, outcome.predictions, classes, what),
                f"Confusion matrix, {title}",
            ),
            picture(
                class_plots.per_class_recall(outcome.targets, outcome.predictions, classes, what),
                f"Recall of each class, {title}",
            ),
        ],
    }


def with_intervals(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """{metric: {"value": as metrics.json says, "interval": (lower, upper) or None}}, for those that are defined."""
    intervals = bootstrap_intervals(evaluation.outcome, RESAMPLES)
    return {
        name: {"value": evaluation.metrics[name], "interval": intervals.get(name)}
        for name in METRICS
        if evaluation.metrics.get(name) is not None
    }


def commonest_confusions(outcome: Outcome, classes: Sequence[str]) -> list[str]:
    """For each class, what its images were most often mistaken for, and how many: "b (3)"; "" if none was."""
    wrong = outcome.targets != outcome.predictions
    counts = class_plots.count_pairs(outcome.targets[wrong], outcome.predictions[wrong], len(classes))
    return [f"{classes[row.argmax()]} ({row.max()})" if row.any() else "" for row in counts]


def galleries(folder: Path) -> list[dict[str, str]]:
    """The pictures of masks that --plot-every left: before the training, and of the last epoch."""
    made = folder / "plots"
    epochs = sorted(made.glob("masks_[0-9]*.png"), key=lambda path: (len(path.name), path.name))
    paths = [path for path in (made / "masks_before.png", *epochs[-1:]) if path.exists()]
    titles = [
        "before the training" if path.stem == "masks_before" else f"after epoch {path.stem[6:]}" for path in paths
    ]
    found = []
    for path, title in zip(paths, titles, strict=True):
        with suppress(OSError):  # a folder of that name, say
            found.append({"source": html.data_uri(read_bytes(path)), "title": f"Masks {title}"})
    return found


def picture(figure: Figure, title: str) -> dict[str, str]:
    return {"source": html.data_uri(figures.as_svg(figure), "image/svg+xml"), "title": title}


def responsive(draw: Callable[..., Figure], logs: Runs, title: str) -> dict[str, str] | None:
    """A picture of panels side by side, and the same one below the other for narrow screens; None without any."""
    try:
        wide, narrow = (picture(draw(logs, columns=columns), title) for columns in (3, 1))
    except UserError:  # no log holds such quantities
        return None
    return {**wide, "narrow": narrow["source"]}


def _is_report(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return MARK in file.read(4096)
    except OSError:
        return False


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m utils.report")
    parser.add_argument("outputs", nargs="+", type=expanded_path, metavar="OUTPUT", help="the --output-dir of a run")
    parser.add_argument("-o", "--output", type=expanded_path, help="an .html file, replaced each time; "
        "None: report.html in the folder of the only run, or in the current one")  # fmt: skip
    options = parser.parse_args(argv)
    folders = options.outputs
    output = options.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    if output.suffix != ".html":
        raise UserError(f"{output}: expected a name that ends in .html.")
    if output.exists() and not _is_report(output):
        raise UserError(f"{output}: is there and is no report of this command; give another --output.")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("OUTPUT: a folder is named twice; name each run once.")
    write_atomically(output, page([read_run_folder(folder) for folder in folders]))
    print_line(f"{output}: {len(folders)} {'run' if len(folders) == 1 else 'runs'}")


if __name__ == "__main__":
    run_script(main)
