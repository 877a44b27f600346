"""A classifier out of a file of weights, with the classes it tells apart and the preprocessing it was made for."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from utils import arguments
from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import Weights
from utils.data.folders import find_classes
from utils.flags import Switch, add_input_flags, positive_float, positive_int, shared_parser
from utils.runtime.command_line import expanded
from utils.runtime.errors import UserError
from utils.runtime.reading import read_bytes
from utils.runtime.text import decode_text, explain_forms, print_line
from utils.training import build as wiring
from utils.training import fitting as loading
from utils.training import models
from utils.training.model_sources import model_name


class Classifier(NamedTuple):
    """A classifier in evaluation mode on its device, and what its file and the command line say of it."""

    model: nn.Module
    classes: list[str]
    args: argparse.Namespace  # the flags of training, defaults included
    weights: Weights


def add_weights_flags(parser: arguments.Parser) -> argparse._ArgumentGroup:
    """The file, and what to say where it does not: model, classes and preprocessing. Returns the group of these."""
    parser.add_argument("file", type=expanded, metavar="WEIGHTS", help="a .pth or .safetensors file; it may say all of "
        "the following")  # fmt: skip
    parser.add_argument("--use-ema", action=Switch, help="of weights with a moving average; None: the "
        "average, if there is one")  # fmt: skip
    group = parser.add_argument_group("only where the file does not say it")
    group.add_argument("--model", type=model_name, help="any timm classifier")
    group.add_argument("--classes", type=expanded, metavar="FILE", help="one name a line, or a folder of class folders")
    add_input_flags(group)
    return group


def add_mask_flags(group: argparse._ActionsContainer) -> None:
    """The masks that a heated classifier was trained with."""
    add = group.add_argument
    add("--mask-policy", choices=("learned", "prior", "uniform", "none"), help="None: learned, if there is a grid")
    add("--grid", type=positive_int, help="cells a side of the masks of a heated model")
    add("--kernel", type=positive_int, help="size of their blur, pixels")
    add("--sigma", type=positive_float, help="standard deviation of their blur, pixels")


def open_classifier(given: dict[str, Any], device: torch.device) -> Classifier:
    """The classifier of `given["file"]`; `given`: what the command line says, of the flags above.

    Raises UserError for an unfit file, for flags that contradict it, and where neither names the model or the classes.
    """
    weights = checkpoint.read_weights(given["file"], given.get("use_ema"))
    known = shared_parser("")
    add_mask_flags(known)
    flags = {name: value for name, value in given.items() if name in arguments.MODEL_FLAGS}
    for note in weights.notes:
        _say(note)
    saved = loading.usable_args(weights, flags, _say)
    args = arguments.for_weights(known, flags, saved, weights.path, test_only=True)
    if "model" not in flags and not isinstance(saved.get("model"), str):
        raise UserError(f"{weights.path}: does not say which model these weights are of; give --model NAME.")
    loading.report_preprocessing(args, flags, weights.args, weights.path, _say)
    classes = _class_names(weights, given.get("classes"))
    model = wiring.classifier(args, classes, None, None, device)
    state_dict = loading.fit(model, weights, _say)
    rows = models.head_size(model, state_dict)
    if rows not in (None, len(classes)):
        raise UserError(
            f"{weights.path}: its head has {rows} classes, and {len(classes)} are named"
            f"{' by ' + given['classes'] if weights.classes is None else ''}."
        )
    loading.load_complete(model, state_dict, weights.path)
    return Classifier(model.eval(), classes, args, weights)


def is_heated(args: argparse.Namespace) -> bool:
    """True if the classifier was trained on masked images."""
    return None not in (args.grid, args.kernel, args.sigma) and args.mask_policy != "none"


def _say(message: str) -> None:
    """A line on stderr; stdout is for results."""
    print_line(message, sys.stderr)


def _class_names(weights: Weights, given: str | None) -> list[str]:
    named = None if given is None else read_class_names(Path(given))
    if weights.classes is None and named is None:
        raise UserError(
            f"{weights.path}: names no classes; give --classes FILE (one name a line) or --classes FOLDER (of class "
            "folders), in the order of the training."
        )
    if weights.classes is not None and named not in (None, weights.classes):
        forms = explain_forms(named, weights.classes)
        raise UserError(f"--classes {given}: {weights.path} names other classes; leave the flag out.{forms}")
    return named or weights.classes


def read_class_names(path: Path) -> list[str]:
    """The lines of a text file, or the sorted class folders of a folder.

    Raises UserError if it cannot be read, and for an empty or repeated name.
    """
    if path.is_dir():
        return find_classes(path)
    try:
        text = decode_text(read_bytes(path))  # names of folders may be no valid text
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--classes {path}: cannot be read ({reason}).") from None
    names = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    name, times = Counter(names).most_common(1)[0]
    if "" in names or times > 1:
        problem = "is empty or holds an empty line" if "" in names else f"names {name!r} {times} times"
        raise UserError(f"--classes {path}: {problem}; expected one class name a line.")
    return names
