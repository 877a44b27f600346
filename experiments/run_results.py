"""Reads the finished runs of a plan from their folders: logs, origin, and the results for each test image."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.plan import FINISHED, PROBE, Plan, Stage, folder_of_run, read_record
from utils.results.run_folder import Evaluation, RunFolder, read_run_folder, read_table
from utils.runtime.errors import UserError

CLEAN = "clean"
POLICY_KEYS = (  # of log.jsonl, for the first and the last epoch
    "policy_entropy",
    "mask_std_between_images",
    "prior_drift",
    "mask_mean",
    "mask_std",
    "train_cross_entropy",
    "advantage_std",
    "concentrations_at_bounds",
)
VALIDATION_KEYS = ("val_top1", "val_f1", "val_loss")  # for the last epoch; val_f1 for all

RunKey = tuple[str, int]  # arm and seed
Log = list[dict[str, Any]]


class ImageSet(NamedTuple):
    """Images that models were tested on.

    digest: of the names and classes of all images in order; classes: C names; targets: (N,) class numbers.
    """

    digest: str
    classes: tuple[str, ...]
    targets: np.ndarray


class Predictions(NamedTuple):
    """The results of one test.

    predictions: (N,) class numbers; losses: (N,) cross-entropy, nats; confidences: (N,) softmax probability of the
    prediction, NaN where unknown; auroc: macro, one-vs-one; class_aurocs: (C,) one-vs-rest; both NaN where undefined.
    """

    images: ImageSet
    predictions: np.ndarray
    losses: np.ndarray
    confidences: np.ndarray
    auroc: float
    class_aurocs: list[float]


class Run(NamedTuple):
    """A finished run.

    seconds: duration of all its commands; logs: by stage, in the plan's order, the lines of log.jsonl with "epoch" and,
    where they hold them, the keys above; tests: by task, one for each of its stages, such as several draws of images.
    """

    seconds: float
    logs: dict[str, Log]
    tests: dict[str, list[Predictions]]


class Results(NamedTuple):
    """The finished runs, in the plan's order, and the origin of all of them, from `summarise_starts`."""

    runs: dict[RunKey, Run]
    origin: dict[str, Any]


def read_folders(plan: Plan, results: Path) -> Results:
    """The finished runs in the output folder of experiments/run.py.

    Raises UserError if there is none, for a damaged file, and for a run with other stages than the plan's.
    """
    if not results.is_dir():
        raise UserError(f"{results}: no such folder. Expected the output folder of experiments/run.py.")
    runs, starts, image_sets = {}, [], {}
    for arm in plan.arms:
        for seed in arm.all_seeds:
            folder = folder_of_run(results, arm.name, seed)
            if record := read_record(folder / FINISHED, arm):
                trainings = [stage for stage in arm.stages if stage.script != PROBE]
                stages = {stage.name: _read_stage(folder / stage.name, stage) for stage in trainings}
                tests: dict[str, list[Predictions]] = {}
                for stage in arm.stages:
                    if stage.test is not None:
                        tests.setdefault(stage.test, []).append(_predictions(stages[stage.name], image_sets))
                logs = {name: _shortened(stage.log) for name, stage in stages.items()}
                runs[arm.name, seed] = Run(record["seconds"], logs, tests)
                for stage in stages.values():
                    starts += [*stage.origin.get("starts", []), *filter(None, [stage.tested.get("origin")])]
    if not runs:
        raise UserError(f"{results}: no run of the plan {plan.name!r} has finished yet (no {FINISHED}).")
    return Results(runs, summarise_starts(starts))


def _read_stage(folder: Path, stage: Stage) -> RunFolder:
    content = read_run_folder(folder)
    if content.notes:
        raise UserError(content.notes[0])
    if stage.test is not None and CLEAN not in content.evaluations:
        raise UserError(f"{folder}: the run has finished, but has no test results. Run this seed of the arm again.")
    return content


def _shortened(log: Log) -> Log:
    """The lines of a log with what tables and figures need: all keys of the first and the last, val_f1 of the others.

    Lines without any of these are left out.
    """
    lines = []
    for number, line in enumerate(log):
        keys = (*POLICY_KEYS, *VALIDATION_KEYS) if number in (0, len(log) - 1) else ("val_f1",)
        values = {key: line[key] for key in keys if key in line}
        if values or number in (0, len(log) - 1):
            lines.append({"epoch": line["epoch"], **values})
    return lines


def _predictions(stage: RunFolder, image_sets: dict[str, ImageSet]) -> Predictions:
    """image_sets: those read so far, by digest; equal ones are shared."""
    evaluation: Evaluation = stage.evaluations[CLEAN]
    outcome = evaluation.outcome
    rows = read_table(stage.folder / "predictions.csv", ("image", "target"))
    classes = [row["class"] for row in evaluation.table]
    names = [classes, *([row["image"], row["target"]] for row in rows)]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]
    images = image_sets.setdefault(digest, ImageSet(digest, tuple(classes), outcome.targets))
    confidences = outcome.confidences
    if confidences is None:  # a table of an older version
        confidences = np.full(len(outcome.targets), np.nan)
    return Predictions(
        images,
        outcome.predictions,
        outcome.losses,
        confidences,
        _or_nan(evaluation.metrics.get("auroc")),
        [_or_nan(row.get("auroc")) for row in evaluation.table],
    )


def _or_nan(value: str | float | None) -> float:
    return np.nan if value in (None, "") else float(value)


def summarise_starts(starts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """versions: by package; devices, days (ISO dates, sorted), commits: lists of the values that occur, each once."""
    versions: dict[str, list[str]] = {}
    for start in starts:
        for package, version in start["versions"].items():
            versions.setdefault(package, []).append(version)
    return {
        "versions": {package: _unique(numbers) for package, numbers in versions.items()},
        "devices": _unique(f"{start['device']} ({start['machine']})" for start in starts),
        "days": sorted({start["time"][:10] for start in starts}),
        "commits": _unique(start["commit"] or "unknown" for start in starts),
    }


def _unique(values: Iterable[str]) -> list[str]:
    """Each value once, in order."""
    return list(dict.fromkeys(values))
