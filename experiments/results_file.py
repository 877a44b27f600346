"""One compressed file with the finished runs of a plan: all that the analysis needs, image by image.

The file is an .npz archive of NumPy (zip with deflate; the same runs give the same bytes with the same zlib):

metadata: the bytes of a JSON text: "format", "plan", "stages" of each arm, "origin", "image_sets" (digest, classes,
    number of images), and "runs" (arm, seed, seconds, logs, tests: for each task its tests as image set and AUROCs);
targets: class numbers of all image sets, one after the other; predictions: class numbers of all tests in the order of
    the runs; losses: cross-entropy in nats, float16; confidences: softmax probability of wrong predictions, float16.
    Where the prediction is right, the probability is exp(-loss).

float16 has 11 significant bits, so losses and their means change by less than 1 part in 2,000. Class numbers, and the
metrics of them, are exact. Names of images are not stored: the digest of an image set shows that two tests used the
same images.
"""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.plan import Plan, as_written
from experiments.run_results import ImageSet, Predictions, Results, Run, read_folders
from utils.runtime.errors import UserError
from utils.runtime.reading import parse_json, read_bytes

FORMAT = 1
ARRAYS = ("metadata", "targets", "predictions", "losses", "confidences")


def read_results(plan: Plan, path: Path) -> Results:
    """The finished runs from a folder of runs, or from a file that `experiments/collect.py` wrote."""
    if not path.exists():
        raise UserError(f"{path}: does not exist. Expected the output folder of run.py, or a file of collect.py.")
    return read_collected(plan, path) if path.is_file() else read_folders(plan, path)


def pack(plan: Plan, results: Results) -> bytes:
    """The content of the file."""
    tests = [test for run in results.runs.values() for draws in run.tests.values() for test in draws]
    image_sets = {test.images.digest: test.images for test in tests}
    numbers = {digest: number for number, digest in enumerate(image_sets)}

    def described(test: Predictions) -> dict[str, Any]:
        aurocs = [_number(value) for value in test.class_aurocs]
        return {"images": numbers[test.images.digest], "auroc": _number(test.auroc), "class_aurocs": aurocs}

    runs = [
        {
            "arm": arm,
            "seed": seed,
            "seconds": run.seconds,
            "logs": {name: [_rounded(line) for line in log] for name, log in run.logs.items()},
            "tests": {task: [described(test) for test in draws] for task, draws in run.tests.items()},
        }
        for (arm, seed), run in results.runs.items()
    ]
    metadata = {
        "format": FORMAT,
        "plan": plan.name,
        "stages": {arm.name: as_written(arm) for arm in plan.arms},
        "origin": results.origin,
        "image_sets": [
            {"digest": images.digest, "classes": images.classes, "images": len(images.targets)}
            for images in image_sets.values()
        ],
        "runs": runs,
    }
    largest = max((len(images.classes) for images in image_sets.values()), default=0)
    integer = np.min_scalar_type(largest)
    wrong = [test.confidences[test.predictions != test.images.targets] for test in tests]
    buffer = io.BytesIO()
    with np.errstate(over="ignore"):  # a loss above 65,504 becomes infinite
        np.savez_compressed(
            buffer,
            metadata=np.frombuffer(json.dumps(metadata, separators=(",", ":")).encode(), np.uint8),
            targets=_joined([images.targets for images in image_sets.values()], integer),
            predictions=_joined([test.predictions for test in tests], integer),
            losses=_joined([test.losses for test in tests], np.float16),
            confidences=_joined(wrong, np.float16),
        )
    return buffer.getvalue()


def _joined(arrays: list[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(array.astype(dtype) for array in arrays)])


def _rounded(line: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(value) if isinstance(value, float) else value for key, value in line.items()}


def _number(value: float) -> float | None:
    """With six significant digits; None if it is not finite."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def read_collected(plan: Plan, path: Path) -> Results:
    """The runs of the plan's arms in a file. Raises UserError for another plan's file and for a damaged one."""
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ARRAYS}
        metadata = parse_json(arrays["metadata"].tobytes())
        if metadata["format"] != FORMAT:
            raise UserError(f"{path}: has format {metadata['format']}; this version reads format {FORMAT}.")
        _check_stages(plan, metadata, path)
        runs = _unpack(metadata, arrays)
        origin = metadata["origin"]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{path}: not a file of experiments/collect.py, or damaged. Collect the runs again.") from None
    seeds = [(arm.name, seed) for arm in plan.arms for seed in arm.all_seeds]
    runs = {key: runs[key] for key in seeds if key in runs}
    if not runs:
        raise UserError(f"{path}: holds no run of the plan {plan.name!r}.")
    return Results(runs, origin)


def _check_stages(plan: Plan, metadata: dict[str, Any], path: Path) -> None:
    for arm in plan.arms:
        if metadata["stages"].get(arm.name, as_written(arm)) != as_written(arm):
            raise UserError(
                f"{path}: the runs of {arm.name!r} have other stages than the plan {plan.name!r} (the file is of "
                f"{metadata['plan']!r}). Give the plan that was run."
            )


def _unpack(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[tuple[str, int], Run]:
    ends = np.cumsum([entry["images"] for entry in metadata["image_sets"]])
    image_sets = [
        ImageSet(entry["digest"], tuple(entry["classes"]), targets)
        for entry, targets in zip(
            metadata["image_sets"], np.split(arrays["targets"].astype(np.int64), ends)[:-1], strict=True
        )
    ]
    predictions, losses = arrays["predictions"].astype(np.int64), arrays["losses"].astype(float)
    tests = [test for run in metadata["runs"] for draws in run["tests"].values() for test in draws]
    targets = _joined([image_sets[test["images"]].targets for test in tests], np.int64)
    confidences = np.exp(-losses)
    confidences[predictions != targets] = arrays["confidences"]  # raises ValueError where the numbers do not fit
    first, runs = 0, {}
    for run in metadata["runs"]:
        unpacked: dict[str, list[Predictions]] = {}
        for task, draws in run["tests"].items():
            for test in draws:
                images = image_sets[test["images"]]
                part = slice(first, first + len(images.targets))
                first = part.stop
                aurocs = [_or_nan(value) for value in (test["auroc"], *test["class_aurocs"])]
                values = (predictions[part], losses[part], confidences[part], aurocs[0], aurocs[1:])
                unpacked.setdefault(task, []).append(Predictions(images, *values))
        runs[run["arm"], run["seed"]] = Run(run["seconds"], run["logs"], unpacked)
    return runs


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value
