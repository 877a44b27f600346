"""The files of a run's --output-dir: writes the results of --test-only; reads them, the log, run.json and status.json.

A run that was interrupted is read as far as it got.
"""

import csv
import io
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from utils.checkpoints.checkpoint import BEST
from utils.data.folders import ImageFiles
from utils.results.intervals import LEVEL, RESAMPLES
from utils.results.log import LOG, read_log
from utils.results.metrics import (
    Metrics,
    Outcome,
    bootstrap_intervals,
    format_metrics,
    outcome_of,
    per_class_table,
    prediction_table,
    reliability_table,
    table_as_csv,
)
from utils.results.provenance import RUN, read_trained
from utils.results.validation import is_origin, is_status, is_tested, read_checked
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically, write_json
from utils.runtime.progress import say
from utils.runtime.reading import read_bytes
from utils.runtime.text import from_cell, list_names, printable

STATUS = "status.json"
BAD_BATCH = "nonfinite_batch.json"
METRICS_FILE = "metrics.json"
MOST_IMAGES = 10**12  # of a class, in a table that is taken seriously
RESULT_TITLES = {"clean": "without masks", "masked": "with mean masks"}


class Evaluation(NamedTuple):
    """A result of --test-only. metrics: by name, None where undefined; table: the rows of per_class.csv, as text.

    outcome: the prediction for each image, with classes numbered as in the table. Tables of older versions lack
    train_images and brier.
    """

    metrics: Metrics
    table: list[dict[str, str]]
    outcome: Outcome


class RunFolder(NamedTuple):
    """The content of a run's folder; empty where a file is missing. notes: sentences about unreadable files.

    origin: run.json; status: status.json; tested: metrics.json; evaluations: by name, "clean" first.
    """

    folder: Path
    log: list[dict[str, Any]]
    origin: dict[str, Any]
    status: dict[str, Any]
    tested: dict[str, Any]
    evaluations: dict[str, Evaluation]
    notes: list[str]


def write_test_results(
    output_dir: Path,
    results: dict[str, tuple[tuple[Tensor, Tensor, Tensor], Metrics]],
    files: ImageFiles,
    *,
    split: str,
    weights: str,
    averaged: bool | None = None,
    heated: bool = False,
    origin: dict[str, Any],
) -> None:
    """Print the results of --test-only, and write metrics.json and two tables for each result. Only on rank 0.

    results: (predictions, metrics) by name, "clean" first. Predictions are logits (N, C) float32, targets (N,) and
    indices in the split (N,), int64, on the CPU. The tables are per_class.csv and predictions.csv, for another name
    per_class_<name>.csv and predictions_<name>.csv. files: the images of the split. averaged: whether the weights are
    the moving average of a file that holds one; None: it holds none. heated: whether they were trained on masked
    images. origin: from `provenance.describe`.

    metrics.json holds these, the folder of the split (root), the numbers of images and classes, absent_classes,
    {result: {metric: value}} as metrics, {result: {metric: [lower, upper]}} as intervals (none for auroc), how the
    intervals were made (bootstrap: level, resamples of the images, seed), and {result: rows} as reliability, with the
    rows of `reliability_table`. It is removed first and written last, so that it never describes tables of another
    evaluation. train_images in per_class.csv is the number of training images of each class, if there is a run.json of
    this training next to the weights. Raises UserError if a file cannot be written, or one of an earlier evaluation
    cannot be removed.
    """
    _remove(output_dir / METRICS_FILE)
    if "masked" not in results:
        _remove(output_dir / "per_class_masked.csv")
        _remove(output_dir / "predictions_masked.csv")
    trained = read_trained(Path(weights), files.classes, heated)
    outcomes = {}
    for name, ((logits, targets, indices), metrics) in results.items():
        suffix = "" if name == "clean" else f"_{name}"
        outcomes[name] = outcome_of(logits, targets, calibration=True)
        rows = per_class_table(logits, targets, files.classes)
        for row in rows:
            row["train_images"] = trained.images[row["class"]] if trained else None
        write_atomically(output_dir / f"per_class{suffix}.csv", table_as_csv(rows))
        names = [files.path_as_text(index) for index in indices.tolist()]
        table = prediction_table(logits, targets, files.classes, names)
        write_atomically(output_dir / f"predictions{suffix}.csv", table_as_csv(table))
        say(f"{split}, {len(targets)} images, {name}: {format_metrics(metrics)}")
        _print_classes(rows)
    absent = [row["class"] for row in rows if not row["images"]]  # the same in each result
    if absent:
        present = len(files.classes) - len(absent)
        say(
            f"{split}: macro metrics are over the {present} of {len(files.classes)} classes that have images here; "
            f"without: {list_names(absent)}."
        )
    summary = {
        "split": split,
        "root": str(files.root),
        "images": len(targets),
        "weights": weights,
        "averaged": averaged,
        "heated": heated,
        "classes": len(files.classes),
        "absent_classes": absent,
        "metrics": {name: metrics for name, (_, metrics) in results.items()},
        "intervals": {name: bootstrap_intervals(outcome) for name, outcome in outcomes.items()},
        "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": 0},
        "reliability": {name: reliability_table(outcome) for name, outcome in outcomes.items()},
        "origin": origin,
    }
    write_json(output_dir / METRICS_FILE, summary)


def _print_classes(rows: list[dict[str, Any]]) -> None:
    """Print a line for each row of `per_class_table` whose class has images."""
    width = max(len(printable(row["class"])) for row in rows)
    for row in rows:
        if row["images"]:
            scores = "  ".join(f"{key} {row[key]:.4f}" for key in ("precision", "recall", "f1"))
            noun = "image " if row["images"] == 1 else "images"
            say(f"  {printable(row['class']):<{width}}  {row['images']:>6} {noun}  {scores}")


def _remove(path: Path) -> None:
    """Remove a file of an earlier evaluation; next to the new ones it would look like one of them."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: left by an earlier evaluation, cannot be removed ({error.strerror}).") from None


def read_run_folder(folder: Path) -> RunFolder:
    """Read the folder of a run as far as it got. Raises UserError if it holds no run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the --output-dir of a run.")
    if not any((folder / name).exists() for name in (LOG, RUN, METRICS_FILE)):
        raise UserError(f"{folder}: holds no run (no {LOG}, {RUN} or {METRICS_FILE}); give the --output-dir of a run.")
    log, evaluations, notes = [], {}, []
    try:
        log = read_log(folder)
    except UserError as error:
        notes.append(str(error))
    contents = {}
    for name, is_valid in ((RUN, is_origin), (STATUS, is_status), (METRICS_FILE, is_tested)):
        content = read_checked(folder / name, is_valid)
        if content is None:
            notes.append(f"{folder / name}: does not hold what a run writes there; ignored.")
        contents[name] = content or {}
    for name, metrics in contents[METRICS_FILE].get("metrics", {}).items():
        try:
            evaluations[name] = read_evaluation(folder, name, metrics)
        except UserError as error:
            notes.append(str(error))
    return RunFolder(folder, log, contents[RUN], contents[STATUS], contents[METRICS_FILE], evaluations, notes)


def describe_tested(tested: dict[str, Any], name: str) -> str:
    """A title for a result in metrics.json: "val, with mean masks, weights model_best.pth (chosen on this split)"."""
    weights = PurePath(str(tested["weights"])).name
    chosen = " (chosen on this split)" if (weights, tested["split"]) == (BEST, "val") else ""
    which = {True: ", moving average", False: ", trained weights"}.get(tested.get("averaged"), "")
    absent = tested.get("absent_classes")
    lacking = f", without images of {len(absent)} of {tested['classes']} classes" if absent else ""
    return f"{tested['split']}, {RESULT_TITLES.get(name, name)}, weights {weights}{which}{chosen}{lacking}"


def read_tested(folder: Path, name: str) -> tuple[Evaluation, dict[str, Any]]:
    """A result of --test-only and metrics.json, which says of which split. Raises UserError if one is missing."""
    path = folder / METRICS_FILE
    tested = read_checked(path, is_tested)
    if not tested:
        problem = "does not hold what --test-only writes there" if tested is None else "no such file"
        raise UserError(f"{path}: {problem}; run --test-only with --output-dir {folder}.")
    if name not in tested["metrics"]:
        raise UserError(f"{path}: holds no result {RESULT_TITLES[name]}; run --test-only again.")
    return read_evaluation(folder, name), tested


def read_evaluation(folder: Path, name: str = "clean", metrics: Metrics | None = None) -> Evaluation:
    """A result of --test-only from its two tables. Raises UserError if one is missing or damaged, or they disagree."""
    suffix = "" if name == "clean" else f"_{name}"
    table = read_table(folder / f"per_class{suffix}.csv", ("class", "images", "precision", "recall", "f1"))
    path = folder / f"predictions{suffix}.csv"
    rows = read_table(path, ("target", "prediction", "true_rank", "loss"))
    number = {row["class"]: index for index, row in enumerate(table)}
    try:
        if len(number) < len(table):
            raise ValueError("a class is listed twice")
        for row in table:
            _ = [float(row[score]) for score in ("precision", "recall", "f1", "auroc") if row.get(score)]
            if not 0 <= int(row.get("train_images") or 0) <= MOST_IMAGES:
                raise ValueError(f"a number of training images is not in 0 to {MOST_IMAGES:,}")
        outcome = Outcome(
            np.array([number[row["target"]] for row in rows]),
            np.array([number[row["prediction"]] for row in rows]),
            np.array([int(row["true_rank"]) for row in rows]),
            np.array([float(row["loss"]) for row in rows]),
            len(table),
            _numbers(rows, "probability", most=1),
            _numbers(rows, "brier", most=2),
        )
        if outcome.true_ranks.min() < 1 or outcome.true_ranks.max() > len(table):
            raise ValueError(f"a true_rank is not in 1 to {len(table)}")
        images = [int(row["images"]) for row in table]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: does not fit per_class{suffix}.csv ({error}); run --test-only again.") from None
    if np.bincount(outcome.targets, minlength=len(table)).tolist() != images:
        raise UserError(f"{path}: holds other images than per_class{suffix}.csv; run --test-only again.")
    return Evaluation(metrics or {}, table, outcome)


def training_images(table: list[dict[str, str]]) -> list[int]:
    """The number of training images of each class. Raises UserError if the table lacks one."""
    if not all(row.get("train_images") for row in table):
        raise UserError(
            "Recall by class frequency: the numbers of training images are missing. --test-only takes them from the "
            "run.json next to the weights; run it again with the weights in the folder of their training."
        )
    return [int(row["train_images"]) for row in table]


def _numbers(rows: list[dict[str, str]], column: str, most: float) -> np.ndarray | None:
    """The numbers of a column, NaN for an empty cell; None if the table lacks it, as older ones do.

    Raises ValueError for a number below 0 or above `most`.
    """
    if column not in rows[0]:
        return None
    numbers = np.array([float(row[column] or "nan") for row in rows])
    if ((numbers < 0) | (numbers > most)).any():
        raise ValueError(f"a {column} is not in 0 to {most}")
    return numbers


def read_table(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises UserError if there are none or one of these columns is missing."""
    try:
        text = io.StringIO(read_bytes(path).decode("utf-8-sig"), newline="")
        rows = list(csv.DictReader(text, strict=True))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --test-only with --output-dir {path.parent} writes it.") from None
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as a table ({reason}); run --test-only again.") from None
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise UserError(f"{path}: expected rows with {', '.join(columns)}; run --test-only again.")
    return [{key: from_cell(cell) if isinstance(cell, str) else cell for key, cell in row.items()} for row in rows]
