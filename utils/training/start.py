"""Where a run starts: from scratch, a checkpoint, or weights; and its final arguments."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from utils import arguments
from utils.arguments import AUTO
from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import NotDamaged, Weights
from utils.runtime import distributed, progress
from utils.runtime.distributed import agreed
from utils.runtime.errors import UserError
from utils.runtime.text import printable
from utils.training import weight_loading
from utils.training.model_sources import OWN_WEIGHTS, is_source
from utils.training.trackers import check_installed

PATHS = ("data_path", "exclude", "cache_dir")  # taken from the checkpoint on resume, unless given


class Start(NamedTuple):
    """The final arguments, and what the run starts from: a full state, only weights, or neither."""

    args: argparse.Namespace
    state: dict[str, Any] | None
    weights: Weights | None


def find_checkpoint(given: dict[str, Any], script: str) -> dict[str, Any]:
    """The given values, with `--resume auto` replaced by the newest valid checkpoint of --output-dir, if it has one.

    Rank 0 chooses, so that all ranks start from the same file. --finetune and --weights then count for the first start
    only. Without a checkpoint, `auto` stays. Raises UserError if all checkpoints are damaged.
    """
    if given.get("resume") != AUTO:
        return given
    path = None
    with agreed():
        if distributed.is_main_process():
            path = _newest_valid(Path(given.get("output_dir", ".")), script)
    path = distributed.broadcast_object(path)
    if path is None:
        return given
    first_only = () if given.get("test_only") else ("finetune", "weights")
    return {name: value for name, value in given.items() if name not in first_only} | {"resume": path}


def _newest_valid(output_dir: Path, script: str) -> str | None:
    """The path of the newest checkpoint that can be read; None if there is no checkpoint."""
    newest, previous = output_dir / checkpoint.CHECKPOINT, output_dir / checkpoint.PREVIOUS
    try:
        if newest.exists():
            checkpoint.read_checkpoint(newest, script)
            return str(newest)
    except NotDamaged:
        raise
    except UserError as error:
        if not previous.exists():
            raise
        progress.say(f"{error} Trying {previous}.")
    if not previous.exists():
        return None
    checkpoint.read_checkpoint(previous, script)
    return str(previous)


def choose_start(parser: arguments.Parser, given: dict[str, Any], script: str) -> Start:
    """Start from scratch, --resume, --finetune or --test-only; raises UserError for contradictions and unfit files."""
    resume, finetune = given.get("resume"), given.get("finetune")
    if resume == AUTO:
        if given.get("test_only"):
            raise UserError(f"--resume auto: no checkpoint to test in {given.get('output_dir', '.')}.")
        resume = None
    if resume and finetune:
        raise UserError("--resume and --finetune: one continues a run, the other starts a new one; give one.")
    if (resume or finetune) and given.get("weights"):
        raise UserError(f"--weights {given['weights']}: the weights already come from {resume or finetune}.")
    test_only = given.get("test_only", False)
    if finetune or (resume and test_only):
        weights = checkpoint.read_weights(resume or finetune, given.get("use_ema"))
        for note in weights.notes:
            progress.say(note)
        saved = weight_loading.usable_args(weights, given, progress.say)
        args = arguments.for_weights(parser, given, saved, weights.path, test_only=test_only)
        report_paths(vars(args), given, weights.path)
        if weights.classes is None:
            _report_foreign_args(vars(args), given, saved, weights.path)
        start = Start(args, None, weights)
    elif resume:
        state = checkpoint.read_checkpoint(resume, script)
        args = arguments.for_resume(parser, given, state["args"], resume)
        report_paths(vars(args), given, resume)
        start = Start(args, state, None)
    else:
        args = arguments.for_fresh_start(parser, given)
        _report_random_weights(vars(args))
        start = Start(args, None, None)
    if not test_only:
        check_installed(arguments.trackers(start.args))
    return start


def _report_random_weights(values: dict[str, Any]) -> None:
    """Print that a model name with a tag, or of the hub, does not by itself load weights."""
    name = values["model"]
    if values["weights"] is None and is_source(name):
        progress.say(f"--model {name}: the weights are random; --weights {OWN_WEIGHTS} starts from its own.")
    elif values["weights"] is None and "." in name:
        tag = name.split(".", 1)[1]
        progress.say(f"--model {name}: the weights are random; --weights {tag} starts from those of the tag.")
    policy = values["policy_model"] if values.get("mask_policy") == "learned" else ""
    if is_source(policy) or "." in policy:
        progress.say(f"--policy-model {policy}: the policy's weights are random; those of the name are not loaded.")


def report_paths(
    values: dict[str, Any], given: dict[str, Any], source: str, report: Callable[[str], None] = progress.say
) -> None:
    """Report which paths a resumed run takes from its file, which may come from another person or machine."""
    taken = [name for name in PATHS if name not in given and values[name] is not None]
    models = [name for name in ("model", "policy_model") if is_source(values.get(name, ""))]
    taken += [name for name in models if name not in given]
    if taken:
        flags = " ".join(arguments.typed(name, values[name]) for name in taken)
        report(printable(f"{source}: paths taken from this file: {flags}"))


def _report_foreign_args(values: dict[str, Any], given: dict[str, Any], saved: dict[str, Any], path: str) -> None:
    """Print which flags come from a file of other code, and which preprocessing is assumed."""
    names = [name for name in arguments.MODEL_FLAGS if name in saved and name not in given]
    taken = [arguments.typed(name, saved[name]) for name in names if values.get(name) == saved[name]]
    if taken:
        progress.say(printable(f"{path}: used of its arguments: {' '.join(taken)}"))
    weight_loading.report_preprocessing(values, given, saved, path, progress.say)
