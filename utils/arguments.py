"""The command line that both scripts share, and where each value comes from: given, the file, or the default."""

import argparse
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.data import transforms
from utils.flag_types import (
    average_decay,
    fraction,
    mixing_alpha,
    momentum,
    natural,
    non_negative_float,
    pixel_mean,
    pixel_std,
    positive_float,
    positive_fraction,
    positive_int,
    rate_factor,
    seconds,
    seed,
    smoothing,
)
from utils.runtime.command_line import Parser, absolute, expanded
from utils.runtime.errors import UserError
from utils.training import optim
from utils.training.model_sources import model_name

# What a resumed run may be given anew, since the trajectory does not depend on it (`epochs` rebuilds the schedule; of
# `exclude` and `data_path` the images left are compared).
FREE_ON_RESUME = {
    "bad_images", "cache_dir", "checkpoint_steps", "data_path", "device", "epochs", "exclude", "finetune",
    "max_bad_images", "num_classes", "output_dir", "plot_every", "print_freq", "resume", "split", "tensorboard",
    "test_only", "timeout", "upper_8_bits", "use_ema", "workers",
}  # fmt: skip
# What a checkpoint never decides: where and on what a start runs, what it writes to, and what it evaluates.
OF_EACH_START = {"device", "output_dir", "resume", "split", "test_only", "timeout", "use_ema"}
# What weights were made for: taken from their file when it says so.
MODEL_FLAGS = (
    "model", "policy_model", "mask_policy", "head_weight", "grid", "kernel", "sigma", "mask_range",
    "train_crop_size", "val_resize_size", "val_crop_size", "interpolation", "gray", "upper_8_bits", "backend",
    "mean", "std",
)  # fmt: skip
# What a fine-tuning may choose anew although the file says otherwise.
FREE_ON_FINETUNE = {
    "train_crop_size", "val_resize_size", "val_crop_size", "interpolation", "gray", "upper_8_bits", "backend",
}  # fmt: skip
# What an evaluation may choose although the file says otherwise: it changes which images are read, not their pixels.
FREE_ON_EVALUATION = {"upper_8_bits"}


LARGEST = {  # far above what any run uses, and below what takes all memory or processes of a machine
    **{"epochs": 100_000, "workers": 1_024, "batch_size": 1_000_000, "masks_per_image": 10_000, "ra_reps": 1_000},
    **{"train_crop_size": 8_192, "val_resize_size": 8_192, "val_crop_size": 8_192, "grid": 1_024, "kernel": 8_191},
    **{"images_per_class": 100_000, "jobs": 1_024, "resamples": 1_000_000},
}

Switch = argparse.BooleanOptionalAction  # --flag and --no-flag


def shared_parser(description: str) -> Parser:
    """The flags of both scripts, in groups, with their defaults; names and meanings as in torchvision's reference."""
    parser = Parser(description, show_defaults=True)
    _add_data_flags(parser.add_argument_group("data"))
    _add_model_flags(parser.add_argument_group("classifier"))
    _add_optimisation_flags(parser.add_argument_group("optimisation"))
    _add_schedule_flags(parser.add_argument_group("learning-rate schedule of the classifier"))
    _add_augmentation_flags(parser.add_argument_group("augmentation"))
    _add_run_flags(parser.add_argument_group("run"))
    return parser


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data-path", type=expanded, metavar="FOLDER", help="with {train,val,test}/<class>/<image>; without it, "
        "generated phantoms are used")  # fmt: skip
    add("--exclude", type=absolute, metavar="FILE", help="leave out the images that this text file names, one a "
        "line, as train/<class>/<image>; python -m utils.audit writes such lists")  # fmt: skip
    add("--num-classes", type=positive_int, help="checked against the data when given, else taken from it")
    add("--cache-dataset", default="off", choices=("off", "host", "device"), help="decode each image once, into a file "
        "that all processes map; device: and keep the training images in the GPU's memory")  # fmt: skip
    add("--cache-dir", type=expanded, help="where --cache-dataset keeps its files, for later runs too: a local disk")
    add("--bad-images", default="error", choices=("error", "skip"), help="stop at an unreadable image, or leave it out")
    add("--max-bad-images", type=natural, default=100, help="of --bad-images skip: more than so many end the run")
    add("--split", default="val", choices=("train", "val", "test"), help="what --test-only evaluates on")
    add("-b", "--batch-size", "--batch_size", type=positive_int, default=32, help="images in each process")
    add("-j", "--workers", type=natural, default=16, help="data loading processes for each process; 0: none")
    add_input_flags(group)


def add_input_flags(group: argparse._ActionsContainer) -> None:
    """How a file's pixels become the classifier's input."""
    add = group.add_argument
    add(
        "--mean",
        type=pixel_mean,
        nargs="+",
        default=[0.3162],
        help="of the pixels in 0..1; one value, or one a channel",
    )
    add("--std", type=pixel_std, nargs="+", default=[0.3213], help="of the pixels; one value, or one a channel")
    add("--train-crop-size", type=positive_int, default=224, help="pixels, random resized crop")
    add("--val-resize-size", type=positive_int, default=256, help="pixels, shorter side in evaluation")
    add("--val-crop-size", type=positive_int, default=224, help="pixels, central crop in evaluation")
    add("--interpolation", default="bilinear", choices=transforms.INTERPOLATIONS, help="of every resize")
    add("--gray", action=Switch, default=False, help="read images as one channel, and make it three on the device")
    add("--upper-8-bits", action=Switch, default=False, help="of PNG and TIFF images of 12 or 16 bits a channel, keep "
        "the upper 8 bits; without it they are refused")  # fmt: skip
    add("--backend", type=str.lower, default="pil", choices=transforms.BACKENDS, help="what the transforms work on")


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", type=model_name, default="resnet50", help="any timm classifier; hf-hub:ORG/NAME, local-dir:FOLDER")
    add("--weights", metavar="TAG", help="start from timm's pretrained weights of this tag (a1_in1k, say); "
        "default: those of the hf-hub: or local-dir: model")  # fmt: skip
    add("--sync-bn", action="store_true", help="share BatchNorm statistics over all GPUs")
    add("--model-ema", action="store_true", help="keep, validate and save a moving average of the weights too")
    add("--model-ema-steps", type=positive_int, default=32, help="steps between updates of the moving average")
    add(
        "--model-ema-decay",
        type=average_decay,
        default=0.99998,
        help="before the adjustment to batch size and epochs, and at most 1 - (1 + n)^(-2/3) at its update n",
    )


def _add_optimisation_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=positive_int, default=90, help="in all, those before a resumption included")
    add("--opt", type=str.lower, default="sgd", choices=optim.OPTIMIZERS, help="optimiser")
    add("--lr", type=positive_float, default=0.1, help="initial learning rate")
    add("--momentum", type=momentum, default=0.9, help="of sgd, sgd_nesterov and rmsprop")
    add("--wd", "--weight-decay", dest="weight_decay", type=non_negative_float, default=1e-4, help="weight decay")
    add("--norm-weight-decay", type=non_negative_float, help="of normalisation layers; None: as --weight-decay")
    add("--bias-weight-decay", type=non_negative_float, help="of biases; None: as --weight-decay")
    add(
        "--transformer-embedding-decay",
        type=non_negative_float,
        help=f"of {', '.join(optim.EMBEDDINGS)}; None: as --weight-decay",
    )
    add("--label-smoothing", type=smoothing, default=0.0, help="of the training loss")
    add("--clip-grad-norm", type=positive_float, help="largest norm of each network's gradient; None: no limit")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", default="bf16", choices=("bf16", "fp16"), help="of --amp")
    add("--compile", action="store_true", help="torch.compile the networks; on a GPU with CUDA graphs")
    add("--channels-last", action=Switch, help="memory format of images and networks; None: on a GPU, not on the CPU")


def _add_schedule_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lr-scheduler", type=str.lower, default="steplr", choices=optim.SCHEDULERS, help="stepped once an epoch")
    add("--lr-step-size", type=positive_int, default=30, help="epochs between the steps of steplr")
    add("--lr-gamma", type=rate_factor, default=0.1, help="factor of steplr and exponentiallr")
    add("--lr-min", type=non_negative_float, default=0.0, help="where cosineannealinglr ends")
    add("--lr-warmup-epochs", type=natural, default=0, help="epochs before the schedule begins")
    add("--lr-warmup-method", type=str.lower, default="constant", choices=optim.WARMUPS, help="shape of the warm-up")
    add("--lr-warmup-decay", type=positive_fraction, default=0.01, help="factor at the start of the warm-up")


def _add_augmentation_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--auto-augment", choices=transforms.AUTO_AUGMENTS, help="RandAugment, TrivialAugment, AugMix or a policy")
    add("--ra-magnitude", type=natural, default=9, help="of --auto-augment ra, 0 to 30")
    add("--augmix-severity", type=positive_int, default=3, help="of --auto-augment augmix, 1 to 10")
    add("--random-erase", type=fraction, default=0.0, help="probability of erasing a rectangle")
    add("--mixup-alpha", type=mixing_alpha, default=0.0, help="0: no MixUp")
    add("--cutmix-alpha", type=mixing_alpha, default=0.0, help="0: no CutMix")
    add("--ra-sampler", action="store_true", help="repeated augmentation: each image several times in an epoch")
    add("--ra-reps", type=positive_int, default=3, help="repetitions of --ra-sampler")


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--use-ema", action=Switch, help="of weights with a moving average, which of the two --finetune and "
        "--test-only take; None: the average, if there is one")  # fmt: skip
    add("--device", help="cuda or cpu; None: cuda where there is one")
    add("--seed", type=seed, default=0, help="of initial weights, order, augmentation and masks")
    add("--use-deterministic-algorithms", action="store_true", help="only algorithms that repeat bit for bit")
    add("--print-freq", type=positive_int, default=10, help="steps between two lines, each a wait for the device")
    add(
        "--output-dir",
        type=expanded,
        help="where files are written; None: the folder of --resume, else the current one",
    )
    add("--resume", type=expanded, metavar="FILE", help="go on from this checkpoint.pth, or the newest of --output-dir "
        "if there is one: auto; with --test-only any weights")  # fmt: skip
    add("--checkpoint-steps", type=positive_int, help="steps between checkpoints within an epoch; None: none within")
    add("--plot-every", type=positive_int, help="epochs between pictures in --output-dir/plots; None: no pictures")
    add("--tensorboard", action=Switch, default=False, help="write the log to --output-dir/tensorboard too; "
        "needs the package tensorboard")  # fmt: skip
    add("--timeout", type=seconds, default=600.0, help="seconds that a process waits for the others, or for a batch")
    add("--test-only", action="store_true", help="evaluate the weights of --resume (or --finetune) on --split")


def parse_given(parser: Parser, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Only what the command line says, without defaults."""
    absent = object()
    blank = argparse.Namespace(**dict.fromkeys(_actions(parser), absent))
    parsed = vars(parser.parse_args(argv, namespace=blank))
    given = {name: value for name, value in parsed.items() if value is not absent}
    check_limits(given)
    for name in ("mean", "std"):  # three equal values are one
        if len(given.get(name, ())) == 3 and len(set(given[name])) == 1:
            given[name] = given[name][:1]
    return given


def check_limits(values: dict[str, Any]) -> None:
    """Raise UserError for a number that no machine could use."""
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
    """All from the checkpoint, but what is free.

    Raises UserError for a flag that would change the trajectory, and for a value that no flag could have given it.
    """
    actions = _actions(parser)
    again = {name: saved[name] for name in actions if name in saved and name not in OF_EACH_START}
    for name, value in again.items():
        if not _could_be_given(actions[name], value):
            raise UserError(
                f"{flag(name)}: {source} says {reprlib.repr(value)}, which this flag does not take; the file was not "
                "written by this code, or was changed: take another checkpoint."
            )
    for name in given.keys() - FREE_ON_RESUME:
        began = saved.get(name, actions[name].default)
        if given[name] != began:
            raise UserError(
                f"{typed(name, given[name])}: {source} was trained {_with(name, began)}, and a resumed run must "
                "go on as it began; leave the flag out, or start a new run."
            )
    output_dir = given.get("output_dir", str(Path(source).parent))
    return _namespace({**defaults(parser), **again, **given, "output_dir": output_dir})


def for_weights(
    parser: Parser, given: dict[str, Any], saved: dict[str, Any], source: str, *, test_only: bool
) -> argparse.Namespace:
    """What the weights were made for comes from their file; raises UserError for a flag that contradicts it.

    `saved` may be the arguments of other code: only values that the flag takes are taken. A fine-tuning may choose
    other crops (and other classes: the caller renews the head); an evaluation may not.
    """
    actions = _actions(parser)
    told = {
        name: saved[name]
        for name in MODEL_FLAGS
        if name in actions and name in saved and _could_be_given(actions[name], saved[name])
    }
    for name in (given.keys() & told.keys()) - (FREE_ON_EVALUATION if test_only else FREE_ON_FINETUNE):
        if given[name] != told[name]:
            raise UserError(
                f"{typed(name, given[name])}: {source} was made {_with(name, told[name])}; leave the flag out."
            )
    output_dir = str(Path(source).parent) if test_only and "resume" in given else "."
    return _namespace({**defaults(parser), "output_dir": output_dir, **told, **given})


def _could_be_given(action: argparse.Action, value: Any) -> bool:
    """True if a value out of a file is one that this flag could have been given."""
    if value is None:
        return action.default is None
    if action.nargs == 0:  # a switch
        return isinstance(value, bool)
    if action.nargs is not None:  # several: so many, or any number
        right_number = isinstance(value, list) and (len(value) == action.nargs or (action.nargs == "+" and value))
        return bool(right_number) and all(_could_be_typed(action, one) for one in value)
    return _could_be_typed(action, value)


def _could_be_typed(action: argparse.Action, value: Any) -> bool:
    """True if typing this value after the flag gives it back; a whole number will do for a flag that takes any."""
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
    """A flag as it was typed."""
    if isinstance(value, bool):
        return flag(name) if value else f"--no-{flag(name)[2:]}"
    return f"{flag(name)} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def _namespace(values: dict[str, Any]) -> argparse.Namespace:
    """The final values; raises UserError where two of them do not go together."""
    check_limits(values)
    args = argparse.Namespace(**values)
    args.output_dir = args.output_dir or "."
    args.cache_dir = args.cache_dir and os.path.abspath(args.cache_dir)  # the same when resumed from another folder
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
        raise UserError(f"--lr-min {args.lr_min:g}: above --lr {args.lr:g}, so that the learning rate would rise.")
    for name in ("weight_decay", "norm_weight_decay", "bias_weight_decay", "transformer_embedding_decay"):
        decay = getattr(args, name)
        if args.opt != "rmsprop" and decay is not None and args.lr * decay >= 1:
            raise UserError(
                f"{typed(name, decay)}: times --lr {args.lr:g} it is {args.lr * decay:g}, the share that "
                "each step takes off the weights; expected a product below 1 (usual are 1e-4 for sgd, 0.05 for adamw)."
            )
    if args.opt == "sgd_nesterov" and args.momentum == 0:
        raise UserError("--opt sgd_nesterov: Nesterov momentum needs --momentum above 0.")
    if args.test_only and not (args.resume or getattr(args, "finetune", None)):
        raise UserError("--test-only: name the weights to evaluate with --resume FILE.")
    return args
