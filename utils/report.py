"""An HTML page about one run, or comparing several: `python -m utils.report OUTPUT [OUTPUT ...]` writes report.html.

The page is self-contained: it loads nothing from a network, opens from the disk, and prints.
"""

import itertools
import math
import os
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from utils.arguments import check_command_line
from utils.results.flags import report_parser
from utils.runtime.processes import run_script

if __name__ == "__main__":
    check_command_line(report_parser(__doc__))  # --help and misspelt flags need none of the imports below

from matplotlib.figure import Figure

from utils.checkpoints.checkpoint import BEST, HEATED
from utils.results import templates
from utils.results.curves import learning_curves, policy_health
from utils.results.evaluation_section import TITLES, describe_evaluation, picture
from utils.results.intervals import LEVEL
from utils.results.metrics import CALIBRATION_NAMES
from utils.results.provenance import same_but_seed
from utils.results.run_folder import (
    Evaluation,
    RunFolder,
    describe_tested,
    read_run_folder,
)
from utils.runtime.errors import UserError
from utils.runtime.files import make_parent, write_atomically
from utils.runtime.reading import open_regular, read_bytes
from utils.runtime.text import count, describe_seconds, print_line
from utils.training import run_lock

HEADLINE = "f1"  # the metric of the summary, by which the best epoch is chosen
FEW_IMAGES, FEW_PER_CLASS = 500, 10  # below this a warning
MARK = b'<meta name="generator" content="utils.report">'  # in the head of a page that may be replaced


def page(runs: list[RunFolder], now: datetime | None = None) -> bytes:
    """The report of one or several runs, as HTML. now: when it is written, for the age of the runs."""
    now = now or datetime.now().astimezone()
    names = short_names([run.folder for run in runs])
    name_of = {str(run.folder): name for name, run in zip(names, runs, strict=True)}
    logs = {name: run.log for name, run in zip(names, runs, strict=True) if run.log}
    groups = [[name_of[folder] for folder in group] for group in same_but_seed(list(name_of))]
    groups = [group for group in groups if all(name in logs for name in group)]
    class_lists = {tuple(row["class"] for row in result.table) for run in runs for result in run.evaluations.values()}
    described = [describe_run(name, run, now) for name, run in zip(names, runs, strict=True)]
    return templates.render(
        "report.html",
        same_classes=len(class_lists) < 2,
        title=f"Report of {names[0]}" if len(runs) == 1 else f"Report of {len(runs)} runs",
        written=describe_time(now.isoformat()),
        runs=described,
        metric_titles=shown_titles(described),
        level=f"{100 * LEVEL:.0f} %",
        curves=responsive_picture(learning_curves, logs, groups, "Learning curves"),
        health=responsive_picture(policy_health, logs, groups, "Health of the policy"),
    )


def shown_titles(described: list[dict[str, Any]]) -> dict[str, str]:
    """The titles of the metrics; those that only newer versions compute are left out if no evaluation has them."""
    present = {name for run in described for evaluation in run["evaluations"] for name in evaluation["metrics"]}
    return {name: title for name, title in TITLES.items() if name in present or name not in CALIBRATION_NAMES}


def short_names(folders: list[Path]) -> list[str]:
    """Folder names without their common prefix; a single folder by its own name."""
    paths = [folder.resolve() for folder in folders]
    common = os.path.commonpath([path.parent for path in paths])
    return [os.path.relpath(path, common) for path in paths]


def describe_run(name: str, run: RunFolder, now: datetime) -> dict[str, Any]:
    """The values of a run for the template."""
    data = run.origin.get("data", {})
    evaluations = [
        describe_evaluation(result, describe_tested(run.tested, result), run, evaluation)
        for result, evaluation in run.evaluations.items()
    ]
    starts = [*run.origin.get("starts", []), *([run.tested["origin"]] if "origin" in run.tested else [])]
    return {
        "name": name,
        "folder": str(run.folder),
        "what": describe_training(run),
        "state": describe_state(run, now),
        "result": headline(run, evaluations),
        "best": best_validation(run) if evaluations else None,
        "warnings": warnings(run),
        "starts": [start | {"when": describe_time(start["time"], now)} for start in starts],
        "data": data,
        "classes": sorted(set().union(*(split["images"] for split in data.values()))),
        "tested": run.tested,
        "evaluations": evaluations,
        "galleries": mask_galleries(run.folder),
    }


# Summary


def is_heated(run: RunFolder) -> bool:
    """Whether the run, or the weights that it tested, saw masked images only."""
    heated = run.tested.get("heated")
    return any("mask_mean" in line for line in run.log) if heated is None else heated


def describe_training(run: RunFolder) -> str:
    """A sentence on what was trained, such as "Fine-tuning of resnet50 from a.pth on 800 images of 12 classes."."""
    starts = run.origin.get("starts")
    if not starts:
        return "Unknown training: there is no run.json."
    try:
        script, *words = shlex.split(starts[0]["command"])
    except ValueError:  # not a command
        return "Unknown training: run.json holds no command."
    words = [part for word in words for part in word.split("=", 1)]
    flags = dict(itertools.pairwise([*words, ""]))
    model = f" of {flags['--model']}" if "--model" in flags else ""
    if "_policy_gradient" in script:
        kind = f"Pretraining{model} " + (
            "without masks" if flags.get("--mask-policy") == "none" else "on masked images"
        )
    elif "--finetune" in flags:
        kind = f"Fine-tuning{model} from {flags['--finetune']}"
    else:
        kind = f"Training{model} " + (
            f"from pretrained weights ({flags['--weights']})" if "--weights" in flags else "from scratch"
        )
    images = run.origin["data"].get("train", {}).get("images", {})
    return f"{kind}; {count(sum(images.values()), 'training image')}, {count(len(images), 'class')}."


def describe_state(run: RunFolder, now: datetime) -> str:
    """A sentence on how far the run came."""
    epochs = f"{count(len(run.log), 'epoch')} in the log"
    saved_status = run.status.get("status")
    lock = run_lock.look_at(run.folder)
    holder = f" ({lock.holder})" if lock.holder else ""
    if saved_status is None and lock.held:
        return f"Running{holder}: nothing is saved yet; {epochs}."
    if saved_status is None:
        return f"Unknown: there is no status.json; {epochs}."
    epoch, step = run.status.get("epoch", 0), run.status.get("step", 0)
    done = count(epoch, "epoch") + (f" and {count(step, 'step')}" if step else "")
    saved = f"{epochs}; last saved after {done}, {describe_time(run.status.get('time', ''), now)}"
    if lock.held:  # status.json may be from an earlier start
        return f"Running{holder}; {saved}."
    if saved_status == "running" and lock.held is None:
        return f"Running, or killed{holder}: the lock of its folder cannot be tested here; {saved}."
    if saved_status == "running":
        return f"Killed{holder}: it no longer holds the lock of its folder; {saved}."
    message = run.status.get("message") if saved_status == "failed" else None
    return f"{saved_status.capitalize()}; {saved}." + (f" {message}" if message else "")


def describe_time(text: str, now: datetime | None = None) -> str:
    """An ISO time as "2026-11-29 06:09 UTC", and how long before `now` that was; another text as it is."""
    try:
        time = datetime.fromisoformat(text)
        shown = f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".rstrip()
        seconds = None if now is None else (now - time).total_seconds()
    except (ValueError, TypeError, OverflowError):  # no time, or one without its zone
        return text
    return shown if seconds is None or seconds < 0 else f"{shown} ({describe_seconds(seconds)} before this report)"


def headline(run: RunFolder, evaluations: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The metric of the summary: of the test, else the best of the validations; None without either."""
    title = TITLES[HEADLINE]
    for evaluation in evaluations:
        if HEADLINE in evaluation["metrics"]:
            return {"title": title, "of": evaluation["what"], **evaluation["metrics"][HEADLINE]}
    if best := best_validation(run):
        validated = [line for line in run.log if math.isfinite(validation_f1(line))]
        epochs = count(len(validated), "validated epoch" if len(validated) < len(run.log) else "epoch")
        what = f"val, without masks, best of {epochs} (epoch {best['epoch']})"
        return {"title": title, "of": what, "value": best["val_f1"], "interval": None}
    return None


def best_validation(run: RunFolder) -> dict[str, Any] | None:
    """The line of the log with the highest macro F1 on val; None without any."""
    best = max(run.log, key=validation_f1, default={})
    return best if math.isfinite(validation_f1(best)) else None


def validation_f1(line: dict[str, Any]) -> float:
    """val_f1 of a line of the log, minus infinity if it is missing or not finite."""
    value = line.get("val_f1")
    return value if isinstance(value, (int, float)) and math.isfinite(value) else -math.inf


def warnings(run: RunFolder) -> list[tuple[str, str]]:
    """What a reader of the numbers must know: a few words, and a sentence."""
    sentences = [("Unreadable file", note) for note in run.notes]
    if run_lock.look_at(run.folder).held:
        sentences.append(("Unfinished", "The training is still running."))
    elif run.status.get("status") not in (None, "finished"):
        sentences.append(("Unfinished", "Repeat the command of the training with --resume auto."))
    if is_heated(run):
        sentences.append(("Heated model", HEATED))
    if not run.tested:
        sentence = "train.py --test-only --resume FILE --split test measures the test split."
        sentences.append(("Not tested", sentence))
    elif run.tested["split"] == "val":
        chosen = ", and the epoch was chosen by them" if Path(run.tested["weights"]).name == BEST else ""
        sentence = f"The results are those of val{chosen}; --test-only with --split test measures the test split."
        sentences.append(("Validation, not test", sentence))
    for evaluation in list(run.evaluations.values())[:1]:
        sentences += few_images(evaluation)
        if not run.tested.get("intervals"):
            sentences.append(("No intervals", "An older version wrote metrics.json; run --test-only again."))
    if not run.origin:
        sentences.append(("No run.json", "The command, versions and data of this run are unknown."))
    if not run.log:
        sentences.append(("No log", "No epoch has finished yet: there are no learning curves."))
    return sentences


def few_images(evaluation: Evaluation) -> list[tuple[str, str]]:
    """A warning about small numbers of evaluated images, if they are small."""
    images = len(evaluation.outcome.targets)
    numbers = [int(row["images"]) for row in evaluation.table]
    small = [number for number in numbers if 0 < number < FEW_PER_CLASS]
    sentences = []
    if images < FEW_IMAGES:
        sentences.append(f"{count(images, 'image')} in all: see the intervals.")
    if small:
        classes = "1 class has" if len(small) == 1 else f"{len(small)} classes have"
        sentences.append(
            f"{classes} fewer than {FEW_PER_CLASS} (the smallest: {min(small)}): too few for a result per class."
        )
    return [("Few images", " ".join(sentences))] if sentences else []


# Pictures


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


def responsive_picture(
    draw: Callable[..., Figure], logs: dict[str, list[dict]], groups: list[list[str]], title: str
) -> dict[str, str] | None:
    """A picture with panels in three columns, and one in a single column for narrow screens; None without such data."""
    try:
        figures = [draw(logs, columns=columns, groups=groups) for columns in (3, 1)]
    except UserError:
        return None
    for figure in figures:
        figure.suptitle("")  # the page has this heading
    wide, narrow = (picture(figure, title) for figure in figures)
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
    options = report_parser(__doc__).parse_args(argv)
    folders = options.outputs
    output = options.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    check_output(output)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("OUTPUT: a folder is given twice; give each run once.")
    if options.output:
        make_parent(output)
    write_atomically(output, page([read_run_folder(folder) for folder in folders]))
    print_line(f"{output}: {count(len(folders), 'run')}")


if __name__ == "__main__":
    run_script(main)
