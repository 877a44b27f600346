"""Loads the weights of any accepted file into a classifier: key prefixes, absent counters, absent heads.

What is done to a file's weights is reported in sentences, since foreign files rarely hold exactly the model's keys.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from utils import arguments
from utils.checkpoints import verify as verification
from utils.checkpoints.checkpoint import StateDict, Weights
from utils.runtime.errors import UserError
from utils.runtime.text import explain_forms, printable
from utils.training import models

Report = Callable[[str], None]
# How a file's pixels become the classifier's input; evaluation does without the other flags.
INPUT = ("val_resize_size", "val_crop_size", "interpolation", "gray", "backend", "mean", "std")
COUNTER = "num_batches_tracked"  # of BatchNorm; without an effect as long as the momentum is a number
MOST_NAMED = 4


def usable_args(weights: Weights, given: dict[str, Any], report: Report) -> dict[str, Any]:
    """The arguments in a file of weights, as far as they are used.

    In a file of other code the model's name is only a hint: --model replaces it. Raises UserError if timm does not have
    that model and the command line names none.
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
            f"{weights.path}: names its model {_shown(name)}, which timm does not have; give --model NAME, the "
            "model of timm with the same layers."
        )
    return weights.args


def report_preprocessing(
    args: argparse.Namespace, given: Iterable[str], saved: Iterable[str], path: str, report: Report
) -> None:
    """Report the flags of the preprocessing that neither the command line nor the file says."""
    assumed = [name for name in INPUT if name not in given and name not in saved]
    if assumed:
        values = " ".join(arguments.typed(name, getattr(args, name)) for name in assumed)
        report(f"{path} does not say how its images were prepared; taken for it: {values}")


def fit(model: nn.Module, weights: Weights, report: Report) -> StateDict:
    """The file's weights under the model's own keys; entries of other modules and the prefix of the keys are left out.

    Absent `num_batches_tracked` are 0. A head may be missing. Raises UserError for NaN and infinite values, and where
    the model is in the file more than once.
    """
    expected = model.state_dict()
    prefix = _common_prefix(weights, expected)
    inner = {key.removeprefix(prefix): value for key, value in weights.model.items() if key.startswith(prefix)}
    left_out = [key for key in weights.model if not key.startswith(prefix)]
    if prefix:
        report(f"{weights.path}: '{_shown(prefix)}' is taken off the front of its keys.")
    if left_out:
        report(f"{weights.path}: left out, since they are not below '{_shown(prefix)}': {_listed(left_out)}.")
    absent = [
        key
        for key in expected
        if key.endswith(f".{COUNTER}") and key not in inner and f"{key.removesuffix(COUNTER)}running_mean" in inner
    ]
    if absent:
        report(f"{weights.path}: holds no {COUNTER} for {len(absent)} BatchNorm layers; they start at 0.")
        inner |= {key: expected[key].new_zeros(()) for key in absent}
    verification.check_state_dict(weights.path, inner)
    return inner


def _common_prefix(weights: Weights, expected: Iterable[str]) -> str:
    """What stands before most of the model's keys in a file; empty where fewer than half are found below a prefix."""
    expected = set(expected)
    depth = max(key.count(".") for key in expected) + 1
    found: Counter[str] = Counter()
    for key in weights.model:
        parts = key.rsplit(".", depth)
        for first in range(len(parts)):
            suffix = ".".join(parts[first:])
            if suffix in expected:
                found[key.removesuffix(suffix)] += 1
    most = max(found.values(), default=0)
    best = [prefix for prefix, count in found.items() if count == most]
    if "" in best or 2 * most < len(expected):
        return ""
    if len(best) > 1:
        raise UserError(
            f"{weights.path}: holds the model {len(best)} times, below {_listed(best)}; save the one to use as a state "
            "dict of its own."
        )
    return best[0]


def load_weights(model: nn.Module, weights: Weights, classes: list[str], test_only: bool, report: Report) -> None:
    """Load a file's weights; without a head or for other classes the head is reinitialised and a message is printed.

    Raises UserError for keys that do not fit, and with `test_only` instead of reinitialising the head.
    """
    state_dict = fit(model, weights, report)
    if models.lacks_head(model, state_dict):
        if test_only:
            load_complete(model, state_dict, weights.path)  # raises
        heads = models.head_names(model)
        own = [key for key in state_dict if models.is_head_key(key, heads)]
        models.load_classifier(model, state_dict, weights.path, renew_head=True)
        why = f"its head ({_listed(own)}) is not the model's" if own else "holds no head"
        report(f"{weights.path}: {why}: the head is reinitialised, all other layers keep the file's weights.")
        return
    rows = models.head_size(model, state_dict)
    if rows is not None and rows != len(classes):
        difference = f"{rows} classes instead of {len(classes)}"
    elif weights.classes is not None and weights.classes != classes:
        names = ", ".join(sorted(set(weights.classes) ^ set(classes))[:4])
        difference = f"classes of other names ({names}, ...)"
    else:
        models.load_classifier(model, state_dict, weights.path)
        if weights.classes is None:
            report(f"{weights.path} names no classes; they are taken to be the data's, in the same order.")
        return
    if test_only:
        raise UserError(f"{weights.path}: was trained on {difference}; --test-only needs the classes of the data.")
    models.load_classifier(model, state_dict, weights.path, renew_head=True)
    forms = explain_forms(classes, weights.classes or [])
    report(f"{weights.path} was trained on {difference}: the head is new, the body keeps its weights.{forms}")


def load_complete(model: nn.Module, state_dict: StateDict, path: str) -> None:
    """Load all weights, the head included; raises UserError for keys that do not fit and for an absent head."""
    if models.lacks_head(model, state_dict):
        models.load_classifier(model, state_dict, path, renew_head=True)  # other keys that differ are reported first
        raise UserError(
            f"{path}: holds an encoder without a head ({_listed(models.head_names(model))}), which gives no classes; "
            "train one with _normal/train.py --finetune first."
        )
    models.load_classifier(model, state_dict, path)


def _shown(name: str) -> str:
    return printable(name if len(name) <= 100 else f"{name[:100]}...")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(map(_shown, names[:MOST_NAMED]))}{more}"
