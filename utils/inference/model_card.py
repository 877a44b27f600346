"""The model card (README.md) of exported weights, with the front matter that the Hugging Face hub reads."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from utils import arguments
from utils.checkpoints.checkpoint import BEST
from utils.choices import SPLITS
from utils.flags import shared_parser
from utils.inference.classifier import Classifier
from utils.results.intervals import LEVEL
from utils.results.metrics import CALIBRATION_NAMES, METRIC_NAMES, METRIC_TITLES, Intervals, Metrics
from utils.results.provenance import Trained, read_trained
from utils.results.run_folder import METRICS_FILE
from utils.results.templates import render_markdown
from utils.results.validation import is_tested, read_checked
from utils.runtime.text import count


class Measured(NamedTuple):
    """Results of --test-only with exactly these weights, on clean images."""

    split: str
    root: Path | None  # folder of the split; None if an older version wrote metrics.json
    images: int
    absent: int  # number of classes without images in the split
    metrics: Metrics
    intervals: Intervals


def read_measured(weights: Path, averaged: bool | None = None) -> Measured | None:
    """Results from the metrics.json next to the weights, if it is newer than they are and names them; else None.

    averaged: as in `checkpoint.Weights`; the results must be of the same choice. A metrics.json with anything that
    --test-only does not write is ignored.
    """
    path = weights.parent / METRICS_FILE
    content = read_checked(path, is_tested)
    try:
        if not content or path.stat().st_mtime_ns < weights.stat().st_mtime_ns:
            return None
        clean = content["metrics"]["clean"]
        present = [name for name in CALIBRATION_NAMES if name in clean]  # older versions did not compute them
        metrics = {name: clean[name] for name in (*METRIC_NAMES, *present)}
        intervals = content.get("intervals", {}).get("clean", {})
        root = Path(content["root"]) if "root" in content else None
        absent = len(content.get("absent_classes", []))
        measured = Measured(content["split"], root, content["images"], absent, metrics, intervals)
        is_valid = measured.split in SPLITS and type(measured.images) is int and all(map(_is_metric, metrics.values()))
        is_same = content.get("averaged") is averaged and _names(content["weights"], weights)
        return measured if is_valid and is_same else None
    except (OSError, KeyError):
        return None


def _names(written: str, weights: Path) -> bool:
    """Whether a recorded path, absolute or relative to any folder, is that of the weights."""
    parts = [part for part in Path(written).parts if part != ".."]
    return weights.resolve().parts[-len(parts) :] == tuple(parts)


def _is_metric(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < math.inf)


def recipe_flags(args: dict[str, Any]) -> list[str]:
    """The flags of a training as typed, without the defaults that both scripts share and without what is off."""
    defaults = arguments.defaults(shared_parser(""))
    return [
        arguments.typed(name, value)
        for name, value in sorted(args.items())
        if value != defaults.get(name, False) and value is not None
    ]


def model_card(
    name: str,
    data_name: str,
    classifier: Classifier,
    *,
    training_args: dict[str, Any],
    license_name: str,
    img_size: int | None,
    with_onnx: bool,
) -> bytes:
    """The card as UTF-8. training_args: those to publish; img_size: pixels, for models built for one image size."""
    args, weights, path = classifier.args, classifier.weights, Path(classifier.weights.path)
    measured = read_measured(path, weights.averaged)
    trained = read_trained(path, classifier.classes, classifier.is_heated)
    return render_markdown(
        "model_card.md",
        front_matter=_front_matter(license_name),
        name=name,
        data_name=data_name,
        classes=classifier.classes,
        args=args,
        architecture=args.model.split(".")[0],
        heated=classifier.is_heated,
        averaged=weights.averaged,
        recipe=recipe_flags(training_args),
        started_from=training_args.get("finetune"),
        weights_tag=training_args.get("weights"),
        starts=_describe_starts(trained.starts, _training_batch(training_args)) if trained else [],
        train_images=count(sum(trained.images.values()), "image") if trained else "images",
        evaluation=_describe_evaluation(measured, trained, path) if measured else "",
        metrics=_metric_rows(measured) if measured else [],
        level=f"{LEVEL:.0%}",
        license_name=license_name,
        img_size=img_size,
        with_onnx=with_onnx,
    )


def _training_batch(training_args: dict[str, Any]) -> int | None:
    """The images of one update on each process; None if a file does not say. Older files know no accumulation."""
    numbers = training_args.get("batch_size"), training_args.get("grad_accum_steps", 1)
    return math.prod(numbers) if all(isinstance(number, int) for number in numbers) else None


def _describe_starts(starts: list[dict[str, Any]], batch_size: int | None) -> list[str]:
    """The processes, hardware, versions and commit of each start of a training that differs from the others."""
    described = []
    for start in starts:
        parts = [f"{count(start['processes'], 'process')} on {start['device']}"]
        if batch_size is not None:
            parts.append(f"global batch {start['processes'] * batch_size:,}")
        parts += [f"{package} {version}" for package, version in start["versions"].items()]
        described.append(", ".join([*parts, f"commit {start.get('commit') or 'unknown'}"]))
    return list(dict.fromkeys(described))


def _describe_evaluation(measured: Measured, trained: Trained | None, weights: Path) -> str:
    """Sentences on what the metrics were measured on."""
    which = f"a `{measured.split}` split; whether the data set is that of the training is not recorded"
    if trained is not None and measured.root is not None and measured.root.parent == trained.root.parent:
        which = f"the `{measured.split}` split of the same data set"
    images = count(measured.images, "image")
    sentences = [f"Measured with these weights by `--test-only`, without masks, on {images} of {which}."]
    if weights.name == BEST and measured.split == "val":
        sentences.append("The epoch was chosen by its results on this split, so the values are optimistic.")
    if measured.absent:
        sentences.append(f"No average includes the {count(measured.absent, 'class')} without images in this split.")
    return " ".join(sentences)


def _metric_rows(measured: Measured) -> list[tuple[str, str, str]]:
    """Title, value and interval of each metric, as texts."""
    rows = []
    for name, title in METRIC_TITLES.items():
        if name not in measured.metrics:
            continue
        value, interval = measured.metrics[name], measured.intervals.get(name)
        shown = "undefined" if value is None else f"{value:.4f}"
        rows.append((title, shown, f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else ""))
    return rows


def _front_matter(license_name: str) -> str:
    """YAML in the hub's terms, in which an unknown licence is `other`.

    The hub's table of results is left out: it needs the name of a data set, which metrics.json does not record.
    """
    is_known = license_name not in ("unknown", "other")
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "medical", "radiology", "policy-gradient-noise-mask"],
        license=license_name if is_known else "other",
        license_name=None if is_known else "unknown",
    )
    return data.to_yaml()
