"""The model card (README.md) of exported weights, with the front matter that the Hugging Face hub reads."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from utils import arguments
from utils.data.folders import SPLITS
from utils.flags import shared_parser
from utils.inference.classifier import Classifier
from utils.results.metrics import METRIC_NAMES, Metrics
from utils.results.templates import render_markdown
from utils.runtime.reading import read_json


class Measured(NamedTuple):
    """Results of --test-only with exactly these weights, on clean images."""

    split: str
    images: int
    absent: int  # number of classes without images in the split
    metrics: Metrics


def read_measured(weights: Path, averaged: bool | None = None) -> Measured | None:
    """Results from the metrics.json next to the weights, if it is newer than they are and names them; else None.

    averaged: as in `checkpoint.Weights`; the results must be of the same choice. A metrics.json with anything that
    --test-only does not write is ignored.
    """
    path = weights.parent / "metrics.json"
    try:
        if path.stat().st_mtime_ns < weights.stat().st_mtime_ns:
            return None
        content = read_json(path)
        metrics = {name: content["metrics"]["clean"][name] for name in METRIC_NAMES}
        measured = Measured(content["split"], content["images"], len(content.get("absent_classes", [])), metrics)
        is_valid = measured.split in SPLITS and type(measured.images) is int and all(map(_is_metric, metrics.values()))
        is_same = content.get("averaged") is averaged and _names(content["weights"], weights)
        return measured if is_valid and is_same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
    args, weights = classifier.args, classifier.weights
    return render_markdown(
        "model_card.md",
        front_matter=_front_matter(license_name),
        name=name,
        data_name=data_name,
        classes=classifier.classes,
        args=args,
        architecture=args.model.split(".")[0],
        heated=classifier.is_heated,
        recipe=recipe_flags(training_args),
        measured=read_measured(Path(weights.path), weights.averaged),
        license_name=license_name,
        img_size=img_size,
        with_onnx=with_onnx,
    )


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
