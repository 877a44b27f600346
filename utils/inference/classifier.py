"""Opens a weight file as a classifier, with its class names and preprocessing."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from utils import arguments
from utils.checkpoints.checkpoint import Weights, read_weights
from utils.data.folders import find_classes
from utils.flags import shared_parser
from utils.inference.flags import add_mask_flags
from utils.runtime.errors import UserError
from utils.runtime.reading import read_bytes
from utils.runtime.text import as_line, decode_text, explain_forms
from utils.training import build, models, weight_loading


class Classifier(NamedTuple):
    """A classifier in evaluation mode on its device, and where it comes from."""

    model: nn.Module
    classes: list[str]
    args: argparse.Namespace  # the training's flags, with defaults for what neither file nor command line gives
    weights: Weights

    @property
    def is_heated(self) -> bool:
        """Whether the classifier was trained on masked images."""
        args = self.args
        return None not in (args.grid, args.kernel, args.sigma) and args.mask_policy != "none"


def open_classifier(given: dict[str, Any], device: torch.device) -> Classifier:
    """The classifier in `given["file"]`; `given`: the flags of utils/inference/flags.py as typed, without defaults.

    Raises UserError for an unfit file, for flags that contradict it, and for an unknown model or unknown classes.
    """
    weights = read_weights(given["file"], given.get("use_ema"))
    for note in weights.notes:
        print_to_stderr(note)
    args = args_of(weights, given, test_only=True)
    classes = _class_names(weights, given.get("classes"))
    model = build.classifier(args, classes, None, None, device)
    state_dict = weight_loading.matching_state_dict(model, weights, print_to_stderr)
    rows = models.head_size(model, state_dict)
    if rows not in (None, len(classes)):
        source = f"{weights.path} names" if weights.classes is not None else f"--classes {given['classes']} gives"
        raise UserError(f"{weights.path}: its head has {rows} classes, but {source} {len(classes)}.")
    weight_loading.load_complete(model, state_dict, weights.path)
    return Classifier(model.eval(), classes, args, weights)


def args_of(weights: Weights, given: dict[str, Any], *, test_only: bool) -> argparse.Namespace:
    """The training's flags of a weight file, with `given` and defaults for what it does not record.

    test_only: whether flags for sizes must agree with the file too, as in an evaluation of its classifier. Raises
    UserError for flags that contradict the file, and if neither names a model.
    """
    flags = {name: value for name, value in given.items() if name in arguments.MODEL_FLAGS}
    saved = weight_loading.usable_args(weights, flags, print_to_stderr)
    parser = shared_parser("")
    add_mask_flags(parser)
    args = arguments.for_weights(parser, flags, saved, weights.path, test_only=test_only)
    if "model" not in flags and not isinstance(saved.get("model"), str):
        raise UserError(f"{weights.path}: does not name its model; give --model NAME.")
    weight_loading.report_preprocessing(vars(args), flags, weights.args, weights.path, print_to_stderr)
    return args


def print_to_stderr(message: str) -> None:
    """Print a line on stderr without breaking a progress bar; stdout is for results."""
    tqdm.write(as_line(message), file=sys.stderr)


def _class_names(weights: Weights, given: str | None) -> list[str]:
    named = None if given is None else read_class_names(Path(given))
    if weights.classes is None and named is None:
        raise UserError(
            f"{weights.path}: names no classes. Give --classes FILE (one name per line) or --classes FOLDER (of class "
            "folders), in the order used in training."
        )
    if weights.classes is None:
        return named
    if named not in (None, weights.classes):
        forms = explain_forms(named, weights.classes)
        raise UserError(f"--classes {given}: {weights.path} names other classes; leave the flag out.{forms}")
    return weights.classes


def read_class_names(path: Path) -> list[str]:
    """The lines of a text file, or the sorted class folders of a folder.

    Raises UserError for an unreadable file, and for an empty or repeated name.
    """
    if path.is_dir():
        return find_classes(path)
    try:
        text = decode_text(read_bytes(path))  # folder names need not be valid text
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--classes {path}: cannot be read ({reason}).") from None
    names = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    name, times = Counter(names).most_common(1)[0]
    if "" in names or times > 1:
        problem = "is empty or has an empty line" if "" in names else f"names {name!r} {times} times"
        raise UserError(f"--classes {path}: {problem}; expected one class name per line.")
    return names
