"""Loads the weights of any accepted file into a classifier: key prefixes, missing counters, missing heads.

Each change is reported in a sentence, because files of other code rarely have exactly the model's keys.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from utils import arguments
from utils.checkpoints.checkpoint import StateDict, Weights
from utils.checkpoints.verify import check_state_dict
from utils.runtime.errors import UserError
from utils.runtime.text import explain_forms, list_names, printable
from utils.training import models

Report = Callable[[str], None]
# The flags that turn a file's pixels into the classifier's input; the other model flags do not affect evaluation.
INPUT = ("val_resize_size", "val_crop_size", "interpolation", "gray", "backend", "mean", "std")
COUNTER = "num_batches_tracked"  # of BatchNorm; without effect if the momentum is a number


def usable_args(weights: Weights, given: dict[str, Any], report: Report) -> dict[str, Any]:
    """The arguments in a weight file, without the model's name if --model replaces it.

    In a file of other code the name is only a hint. Raises UserError if timm does not have that model and the command
    line names none.
    """
    name = weights.args.get("model")
    if weights.classes is not None or not isinstance(name, str):
        return weights.args
    if given.get("model") is not None:
        if given["model"] != name:
            report(f"{weights.path}: names its model {_shown(name)}; --model {given['model']} is used.")
        return {key: value for key, value in weights.args.items() if key != "model"}
    if not models.is_known(name):
        raise UserError(
            f"{weights.path}: names its model {_shown(name)}, which timm does not have; give --model NAME, the timm "
            "model with the same layers."
        )
    return weights.args


def report_preprocessing(
    values: dict[str, Any], given: Iterable[str], saved: Iterable[str], path: str, report: Report
) -> None:
    """Report the preprocessing flags that neither the command line nor the file gives."""
    assumed = [name for name in INPUT if name not in given and name not in saved]
    if assumed:
        flags = " ".join(arguments.typed(name, values[name]) for name in assumed)
        report(f"{path}: does not record how its images were prepared; assumed: {flags}")


def matching_state_dict(model: nn.Module, weights: Weights, report: Report) -> StateDict:
    """The file's weights under the model's keys, without a common prefix and without entries of other modules.

    Missing `num_batches_tracked` become 0. The head may be missing. Raises UserError for NaN and infinite values, and
    if the file contains the model more than once.
    """
    expected = model.state_dict()
    prefix = _common_prefix(weights, expected)
    fitted = {key.removeprefix(prefix): value for key, value in weights.model.items() if key.startswith(prefix)}
    left_out = [key for key in weights.model if not key.startswith(prefix)]
    if prefix:
        report(f"{weights.path}: '{_shown(prefix)}' is taken off the front of its keys.")
    if left_out:
        report(f"{weights.path}: left out, since they are not below '{_shown(prefix)}': {list_names(left_out)}.")
    missing = [
        key
        for key in expected
        if key.endswith(f".{COUNTER}") and key not in fitted and f"{key.removesuffix(COUNTER)}running_mean" in fitted
    ]
    if missing:
        report(f"{weights.path}: holds no {COUNTER} for {len(missing)} BatchNorm layers; they start at 0.")
        fitted |= {key: expected[key].new_zeros(()) for key in missing}
    check_state_dict(weights.path, fitted)
    return fitted


def _common_prefix(weights: Weights, expected: Iterable[str]) -> str:
    """The prefix of most of the model's keys in a file; empty if it has fewer than half of them below any prefix."""
    expected = set(expected)
    depth = max(key.count(".") for key in expected) + 1
    counts: Counter[str] = Counter()
    for key in weights.model:
        parts = key.rsplit(".", depth)
        for first in range(len(parts)):
            suffix = ".".join(parts[first:])
            if suffix in expected:
                counts[key.removesuffix(suffix)] += 1
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix, count in counts.items() if count == most]
    if "" in prefixes or 2 * most < len(expected):
        return ""
    if len(prefixes) > 1:
        raise UserError(
            f"{weights.path}: holds the model {len(prefixes)} times, below {list_names(prefixes)}; save the one to use "
            "as a separate state dict."
        )
    return prefixes[0]


def load_weights(model: nn.Module, weights: Weights, classes: list[str], test_only: bool, report: Report) -> None:
    """Load a file's weights; without a head or for other classes the head is reinitialised and a message is printed.

    Raises UserError for keys that do not fit, and with `test_only` instead of reinitialising the head.
    """
    state_dict = matching_state_dict(model, weights, report)
    if models.lacks_head(model, state_dict):
        if test_only:
            load_complete(model, state_dict, weights.path)  # raises
        heads = models.head_names(model)
        foreign = [key for key in state_dict if models.is_head_key(key, heads)]
        reason = f"its head ({list_names(foreign)}) is not the model's" if foreign else "holds no head"
    elif difference := _differing_classes(weights, classes, models.head_size(model, state_dict)):
        reason = f"was trained on {difference}"
        if test_only:
            raise UserError(f"{weights.path}: {reason}; --test-only needs the classes of the data.")
    else:
        models.load_classifier(model, state_dict, weights.path)
        if weights.classes is None:
            report(f"{weights.path}: names no classes; assumed: those of the data, in the same order.")
        return
    models.load_classifier(model, state_dict, weights.path, reinitialise_head=True)
    forms = explain_forms(classes, weights.classes or [])
    report(f"{weights.path}: {reason}: the head is reinitialised, all other layers keep the file's weights.{forms}")


def _differing_classes(weights: Weights, classes: list[str], rows: int | None) -> str:
    """How the file's classes differ from those of the data; empty if they are the same. rows: of the file's head."""
    if rows is not None and rows != len(classes):
        return f"{rows} classes instead of {len(classes)}"
    if weights.classes is not None and weights.classes != classes:
        return f"classes of other names ({list_names(sorted(set(weights.classes) ^ set(classes)))})"
    return ""


def load_complete(model: nn.Module, state_dict: StateDict, path: str) -> None:
    """Load all weights with the head; raises UserError for keys that do not fit and for a missing head."""
    if models.lacks_head(model, state_dict):
        models.load_classifier(model, state_dict, path, reinitialise_head=True)  # first reports other unfit keys
        heads = list_names(models.head_names(model))
        raise UserError(
            f"{path}: holds an encoder without a head ({heads}), which gives no classes; train one with "
            "_normal/train.py --finetune first."
        )
    models.load_classifier(model, state_dict, path)


def _shown(name: str) -> str:
    return printable(name if len(name) <= 100 else f"{name[:100]}...")
