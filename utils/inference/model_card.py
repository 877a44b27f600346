"""The model card (README.md) of exported weights, with the front matter that the hub reads."""

import argparse
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils import arguments
from utils.flags import shared_parser
from utils.inference.classifier import is_heated
from utils.results.metrics import Metrics
from utils.results.templates import TEMPLATES
from utils.runtime.reading import read_json
from utils.runtime.text import printable

METRICS = ("loss", "top1", "top5", "precision", "recall", "f1", "balanced_accuracy", "auroc")


class Measured(NamedTuple):
    """What --test-only found with the very weights, on clean images."""

    split: str
    images: int
    absent: int  # classes without images there
    metrics: Metrics


def read_measured(weights: Path, averaged: bool | None = None) -> Measured | None:
    """Out of the metrics.json beside the weights, if it was written after them and names them; else None.

    averaged: whether the weights are the moving average of their file, as in `checkpoint.Weights`: the result must be
    of the same choice. A file that holds anything else than --test-only writes counts as none.
    """
    path = weights.parent / "metrics.json"
    try:
        if path.stat().st_mtime_ns < weights.stat().st_mtime_ns:
            return None
        found = read_json(path)
        clean = {name: found["metrics"]["clean"][name] for name in METRICS}
        split, images = found["split"], found["images"]
        whole = split in ("train", "val", "test") and type(images) is int and all(map(_is_metric, clean.values()))
        absent = len(found.get("absent_classes", []))
        same = found.get("averaged") is averaged and _names(found["weights"], weights)
        return Measured(split, images, absent, clean) if whole and same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _names(written: str, weights: Path) -> bool:
    """True if this is a path of the weights: whole, or as it was typed in some folder."""
    parts = [part for part in Path(written).parts if part != ".."]
    return weights.resolve().parts[-len(parts) :] == tuple(parts)


def _is_metric(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < math.inf)


def recipe_flags(args: dict[str, Any]) -> list[str]:
    """The flags of a training, as typed, but for the defaults that both scripts share, and what is off."""
    defaults = arguments.defaults(shared_parser(""))
    return [
        arguments.typed(name, value)
        for name, value in sorted(args.items())
        if value != defaults.get(name, False) and value is not None
    ]


def model_card(
    name: str,
    data_name: str,
    classes: list[str],
    args: argparse.Namespace,
    *,
    recipe: list[str],
    measured: Measured | None,
    license_name: str,
    img_size: int | None,
    with_onnx: bool,
) -> bytes:
    """The card as UTF-8. img_size: for models that are built for one size of image, pixels."""
    template = _environment().get_template("model_card.md")
    text = template.render(
        front_matter=_front_matter(license_name),
        name=name,
        data_name=data_name,
        classes=classes,
        args=args,
        architecture=args.model.split(".")[0],
        heated=is_heated(args),
        recipe=recipe,
        measured=measured,
        license_name=license_name,
        img_size=img_size,
        with_onnx=with_onnx,
    )
    return text.encode(errors="backslashreplace")


@cache
def _environment() -> Environment:
    environment = Environment(  # Markdown, so without escaping for HTML; foreign text stands in code spans
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code_span
    return environment


def code_span(text: str) -> str:
    """Any text as a Markdown code span of one line that nothing in it can end."""
    shown = printable(text)
    return f"`` {shown.replace('``', '` `')} ``" if "`" in shown else f"`{shown}`"


def _front_matter(license_name: str) -> str:
    """YAML, in the hub's terms; a licence that is not known is `other` there.

    Without the hub's table of results, which names a data set: metrics.json does not.
    """
    known = license_name not in ("unknown", "other")
    data = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["timm", "image-classification", "medical", "radiology", "policy-gradient-noise-mask"],
        license=license_name if known else "other",
        license_name=None if known else "unknown",
    )
    return data.to_yaml()
