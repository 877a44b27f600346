"""The command line that both scripts share, and where each value comes from: given, the file, or the default."""

import argparse
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.runtime.command_line import Parser, absolute
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script

NO_TRACKER = "none"  # the value of --tracker that ends those of an earlier start
AUTO = "auto"  # the value of --resume for the newest checkpoint of --output-dir
LOCAL_DIR = "local-dir:"  # begins the value of --model for a model in a folder, as in timm
# What a resumed run may change, because training does not depend on it. `epochs` rebuilds the schedule; for `exclude`
# and `data_path` the remaining images are compared.
FREE_ON_RESUME = {
    "bad_images", "cache_dir", "checkpoint_steps", "data_path", "device", "epochs", "exclude", "finetune",
    "max_bad_images", "num_classes", "output_dir", "plot_every", "print_freq", "resume", "split", "tensorboard",
    "test_only", "timeout", "tracker", "upper_8_bits", "use_ema", "val_every", "workers",
}  # fmt: skip
# What a checkpoint never determines: where a start runs, what it writes to, and what it evaluates.
OF_EACH_START = {"device", "output_dir", "resume", "split", "test_only", "timeout", "use_ema"}
# What weights were trained for: taken from their file if it records them.
MODEL_FLAGS = (
    "model", "policy_model", "mask_policy", "head_weight", "grid", "kernel", "sigma", "mask_range", "keep_mean",
    "train_crop_size", "val_resize_size", "val_crop_size", "interpolation", "gray", "upper_8_bits", "backend",
    "mean", "std",
)  # fmt: skip
# What --finetune may choose although the file says otherwise.
FREE_ON_FINETUNE = {
    "train_crop_size", "val_resize_size", "val_crop_size", "interpolation", "gray", "upper_8_bits", "backend",
}  # fmt: skip
# What an evaluation may choose although the file says otherwise: it affects which images are read, not their pixels.
FREE_ON_EVALUATION = {"upper_8_bits"}
# Far above what any run uses, and below what exhausts the memory or processes of a machine.
LARGEST = {
    "epochs": 100_000, "workers": 1_024, "batch_size": 1_000_000, "grad_accum_steps": 10_000,
    "masks_per_image": 10_000, "ra_reps": 1_000, "train_crop_size": 8_192, "val_resize_size": 8_192,
    "val_crop_size": 8_192, "grid": 1_024, "kernel": 8_191, "images_per_class": 100_000, "jobs": 1_024,
    "resamples": 1_000_000, "draws": 10_000,
}  # fmt: skip


def model_name(text: str) -> str:
    """The `type` of --model. A folder becomes absolute, so that the run can be resumed from any folder."""
    return f"{LOCAL_DIR}{absolute(text.removeprefix(LOCAL_DIR))}" if text.startswith(LOCAL_DIR) else text


def check_command_line(parser: Parser, *, prints_result: bool = False) -> None:
    """Answer --help, or report an error in the flags of this process and end it; otherwise return.

    To be called before the heavy imports, which need seconds. prints_result: as for `run_script`.
    """
    run_script(lambda: parse_given(parser), prints_result=prints_result)


def parse_given(parser: Parser, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The values that were typed, without defaults."""
    absent = object()
    blank = argparse.Namespace(**dict.fromkeys(_actions(parser), absent))
    parsed = vars(parser.parse_args(argv, namespace=blank))
    given = {name: value for name, value in parsed.items() if value is not absent}
    check_limits(given)
    for name in ("mean", "std"):  # three equal values mean one
        if len(given.get(name, ())) == 3 and len(set(given[name])) == 1:
            given[name] = given[name][:1]
    if "tracker" in given:
        given |= _trackers_given(given)
    return given


def _trackers_given(given: dict[str, Any]) -> dict[str, Any]:
    """--tracker as it is stored: without tensorboard, which has its own flag, and None for none.

    Raises UserError for a contradiction.
    """
    names = list(dict.fromkeys(given["tracker"]))
    if NO_TRACKER in names and len(names) > 1:
        raise UserError(f"{typed('tracker', names)}: give {NO_TRACKER} alone, or leave it out.", agreed=True)
    tensorboard = "tensorboard" in names
    if tensorboard and not given.get("tensorboard", True):
        raise UserError("--tracker tensorboard and --no-tensorboard: contradict each other; give one.", agreed=True)
    others = [name for name in names if name not in (NO_TRACKER, "tensorboard")]
    return {"tracker": others or None, "tensorboard": given.get("tensorboard", tensorboard)}


def trackers(args: argparse.Namespace) -> list[str]:
    """The names of the trackers that a run writes to."""
    return [*(["tensorboard"] if args.tensorboard else []), *(args.tracker or [])]


def check_limits(values: dict[str, Any]) -> None:
    """Raise UserError for a number that no machine can handle."""
    for name, largest in LARGEST.items():
        value = values.get(name)
        if value is not None and value > largest:
            raise UserError(f"{typed(name, value)}: expected at most {largest}.", agreed=True)


def defaults(parser: Parser) -> dict[str, Any]:
    return {name: action.default for name, action in _actions(parser).items()}


def _actions(parser: Parser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def for_fresh_start(parser: Parser, given: dict[str, Any]) -> argparse.Namespace:
    return _namespace({**defaults(parser), **given})


def for_resume(parser: Parser, given: dict[str, Any], saved: dict[str, Any], source: str) -> argparse.Namespace:
    """The checkpoint's values, except those that a resumed run may change.

    Raises UserError for a flag that would change the training, and for a saved value that its flag does not accept.
    """
    actions = _actions(parser)
    restored = {name: saved[name] for name in actions if name in saved and name not in OF_EACH_START}
    for name, value in restored.items():
        if not _could_be_given(actions[name], value):
            raise UserError(
                f"{flag(name)}: {source} says {reprlib.repr(value)}, which this flag does not accept; the file was not "
                "written by this code, or was changed: use another checkpoint."
            )
    for name in given.keys() - FREE_ON_RESUME:
        original = saved.get(name, actions[name].default)
        if given[name] != original:
            raise UserError(
                f"{typed(name, given[name])}: {source} was trained {_with(name, original)}, and a resumed run cannot "
                "change this; leave the flag out, or start a new run."
            )
    output_dir = given.get("output_dir", str(Path(source).parent))
    return _namespace({**defaults(parser), **restored, **given, "output_dir": output_dir})


def for_weights(
    parser: Parser, given: dict[str, Any], saved: dict[str, Any], source: str, *, test_only: bool
) -> argparse.Namespace:
    """The values for weights from a file, which determines what they were trained for.

    `saved` may come from other code: only values that the flag accepts are used. --finetune may choose other crops, and
    other classes (the caller reinitialises the head); an evaluation may not. Raises UserError for a flag that
    contradicts the file.
    """
    actions = _actions(parser)
    from_file = {
        name: saved[name]
        for name in MODEL_FLAGS
        if name in actions and name in saved and _could_be_given(actions[name], saved[name])
    }
    for name in (given.keys() & from_file.keys()) - (FREE_ON_EVALUATION if test_only else FREE_ON_FINETUNE):
        if given[name] != from_file[name]:
            raise UserError(
                f"{typed(name, given[name])}: {source} was made {_with(name, from_file[name])}; leave the flag out."
            )
    output_dir = str(Path(source).parent) if test_only and "resume" in given else "."
    return _namespace({**defaults(parser), "output_dir": output_dir, **from_file, **given})


def _could_be_given(action: argparse.Action, value: Any) -> bool:
    """Whether a value from a file is one that this flag accepts."""
    if value is None:
        return action.default is None
    if action.nargs == 0:  # a switch
        return isinstance(value, bool)
    if action.nargs is not None:  # several values: a fixed number, or any
        right_number = isinstance(value, list) and (len(value) == action.nargs or (action.nargs == "+" and value))
        return bool(right_number) and all(_could_be_typed(action, item) for item in value)
    return _could_be_typed(action, value)


def _could_be_typed(action: argparse.Action, value: Any) -> bool:
    """Whether typing this value after the flag gives it back; an int also counts for a flag that takes floats."""
    if not isinstance(value, (str, int, float)):
        return False
    try:
        parsed = (action.type or str)(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return parsed == value and (action.choices is None or value in action.choices)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _with(name: str, value: Any) -> str:
    """Such as "with --grid 64" or "without --gray"."""
    return f"without {flag(name)}" if value is None or value is False else f"with {typed(name, value)}"


def typed(name: str, value: Any) -> str:
    """The flag and value as typed on the command line."""
    if isinstance(value, bool):
        return flag(name) if value else f"--no-{flag(name)[2:]}"
    return f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _namespace(values: dict[str, Any]) -> argparse.Namespace:
    """The final values; raises UserError if two of them contradict each other."""
    check_limits(values)
    args = argparse.Namespace(**values)
    args.output_dir = args.output_dir or "."
    args.cache_dir = args.cache_dir and os.path.abspath(args.cache_dir)  # valid from any folder
    for name in ("mean", "std"):
        if len(getattr(args, name)) not in (1, 3):
            raise UserError(f"--{name}: expected one value or three, got {len(getattr(args, name))}.")
    if args.ra_magnitude > 30:
        raise UserError(f"--ra-magnitude {args.ra_magnitude}: expected 0 to 30.")
    if args.augmix_severity > 10:
        raise UserError(f"--augmix-severity {args.augmix_severity}: expected 1 to 10.")
    if args.val_crop_size > args.val_resize_size:
        raise UserError(
            f"--val-crop-size {args.val_crop_size}: larger than --val-resize-size {args.val_resize_size}, so "
            "evaluation would pad the images; give a larger --val-resize-size."
        )
    if args.lr_scheduler == "cosineannealinglr" and args.lr_min > args.lr:
        raise UserError(f"--lr-min {args.lr_min:g}: above --lr {args.lr:g}, so the learning rate would rise.")
    for name in ("weight_decay", "norm_weight_decay", "bias_weight_decay", "transformer_embedding_decay"):
        decay = getattr(args, name)
        if args.opt != "rmsprop" and decay is not None and args.lr * decay >= 1:
            raise UserError(
                f"{typed(name, decay)}: multiplied by --lr {args.lr:g} it is {args.lr * decay:g}, the fraction of "
                "the weights that each step removes; expected a product below 1 (usual: 1e-4 for sgd, 0.05 for adamw)."
            )
    if args.opt == "sgd_nesterov" and args.momentum == 0:
        raise UserError("--opt sgd_nesterov: Nesterov momentum needs --momentum above 0.")
    for name in ("drop_rate", "drop_path"):
        rate = getattr(args, name)
        if rate and getattr(args, "freeze_backbone", False):
            raise UserError(
                f"{typed(name, rate)}: has no effect with --freeze-backbone, because a frozen backbone has no dropout; "
                "leave one of them out."
            )
    if args.test_only and not (args.resume or getattr(args, "finetune", None)):
        raise UserError("--test-only: name the weights to evaluate with --resume FILE.")
    return args
