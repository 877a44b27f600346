"""Number types for argparse, and the flags that both scripts share. Imports no torch."""

import argparse
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from utils import choices
from utils.arguments import NO_TRACKER, model_name
from utils.runtime.command_line import Parser, absolute, expanded

Number = TypeVar("Number", int, float)
_SHORT = reprlib.Repr()
_SHORT.maxstring = 80
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-37, 1e37  # beyond these, float32 holds only 0 and infinity


def _number(kind: type[Number], is_allowed: Callable[[Number], bool], expected: str) -> Callable[[str], Number]:
    """A `type` for argparse: parses a number and checks it."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_allowed(value):
            raise argparse.ArgumentTypeError(f"{_SHORT.repr(text)}: expected {expected}")
        return value

    return parse


positive_int = _number(int, lambda value: value >= 1, "a whole number of at least 1")
natural = _number(int, lambda value: value >= 0, "a whole number of at least 0")
seed = _number(int, lambda value: 0 <= value < 2**64, "a whole number from 0 to 2^64 - 1, which torch takes as a seed")
positive_float = _number(
    float,
    lambda value: SMALLEST_NUMBER < value < LARGEST_NUMBER,
    f"a number above 0 (from {SMALLEST_NUMBER:g} to {LARGEST_NUMBER:g})",
)
non_negative_float = _number(
    float,
    lambda value: value == 0 or SMALLEST_NUMBER < value < LARGEST_NUMBER,
    f"a number of at least 0 (0, or from {SMALLEST_NUMBER:g} to {LARGEST_NUMBER:g})",
)
fraction = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
positive_fraction = _number(float, lambda value: SMALLEST_NUMBER < value <= 1, "a number above 0, at most 1")
rate_factor = _number(
    float,
    lambda value: SMALLEST_NUMBER < value <= 1,
    "a number above 0 and at most 1; above 1 the learning rate would rise",
)
momentum = _number(float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")
average_decay = _number(
    float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1, at which the average would never change"
)
drop_rate = _number(
    float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1, at which nothing would be left"
)
smoothing = _number(
    float,
    lambda value: 0 <= value < 1,
    "a number of at least 0 and below 1, at which all classes would be equally right",
)
pixel_mean = _number(
    float,
    lambda value: 0 <= value <= 1,
    "a number from 0 to 1, where white is 1; divide a mean of levels 0 to 255 by 255",
)
pixel_std = _number(
    float,
    lambda value: 0.001 <= value <= 1,
    "a number from 0.001 to 1, where white is 1; divide a deviation of levels 0 to 255 by 255",
)
mixing_alpha = _number(
    float,
    lambda value: value == 0 or 0.01 <= value <= 100,
    "0 for none, or a number from 0.01 to 100; usual: 0.2 for MixUp, 1 for CutMix",
)
seconds = _number(float, lambda value: 0.001 <= value <= 1e7, "a number of seconds from 0.001 to 1e7 (115 days)")


Switch = argparse.BooleanOptionalAction  # --flag and --no-flag


class Several(argparse.Action):
    """A flag with one or more values, which may also be repeated."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs="+", **settings)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        earlier = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, [*(earlier if isinstance(earlier, list) else []), *values])


def shared_parser(description: str) -> Parser:
    """A parser with the flags of both scripts; names and meanings are those of torchvision's reference."""
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
    add("--exclude", type=absolute, metavar="FILE", help="a text file of images to leave out, one per "
        "line, such as train/<class>/<image>; python -m utils.audit writes such lists")  # fmt: skip
    add("--num-classes", type=positive_int, help="checked against the data; default: taken from the data")
    add("--cache-dataset", default="off", choices=("off", "host", "device"), help="decode each image once, into a file "
        "that all processes map; device: also keep the training images in GPU memory")  # fmt: skip
    add("--cache-dir", type=expanded, help="folder of the --cache-dataset files, on a local disk; later runs reuse it")
    add("--bad-images", default="error", choices=("error", "skip"), help="stop at an unreadable image, or skip it")
    add("--max-bad-images", type=natural, default=100, help="with --bad-images skip: more of them end the run")
    add("--split", default="val", choices=choices.SPLITS, help="the split that --test-only evaluates")
    add("-b", "--batch-size", "--batch_size", type=positive_int, default=32, help="images per process that pass "
        "through the networks at once")  # fmt: skip
    add("-j", "--workers", type=natural, default=16, help="data loading processes per process; 0: none")
    add_input_flags(group)


def add_input_flags(group: argparse._ActionsContainer) -> None:
    """Add the flags of how pixels become the classifier's input."""
    add = group.add_argument
    add("--mean", type=pixel_mean, nargs="+", default=[0.3162], help="pixel mean, 0..1; one value or one per channel")
    add("--std", type=pixel_std, nargs="+", default=[0.3213], help="pixel standard deviation; likewise")
    add("--train-crop-size", type=positive_int, default=224, help="size of the random resized crop, pixels")
    add("--val-resize-size", type=positive_int, default=256, help="shorter side in evaluation, pixels")
    add("--val-crop-size", type=positive_int, default=224, help="size of the central crop in evaluation, pixels")
    add("--interpolation", default="bilinear", choices=choices.INTERPOLATIONS, help="interpolation of every resize")
    add("--gray", action=Switch, default=False, help="read images as one channel, expanded to three on the device")
    add("--upper-8-bits", action=Switch, default=False, help="keep the upper 8 bits of PNG and TIFF images with 12 "
        "or 16 bits per channel; without this flag they are refused")  # fmt: skip
    add("--backend", type=str.lower, default="pil", choices=choices.BACKENDS, help="image type of the transforms")


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", type=model_name, default="resnet50", help="any timm classifier; hf-hub:ORG/NAME, local-dir:FOLDER")
    add("--weights", metavar="TAG", help="start from timm's pretrained weights of this tag (such as a1_in1k); "
        "default: the weights of an hf-hub: or local-dir: model")  # fmt: skip
    add("--drop-rate", type=drop_rate, help="probability of dropout, where the model has it; None: the model's own")
    add("--drop-path", type=drop_rate, help="rate of stochastic depth: the probability with which the last residual "
        "block is skipped; None: the model's own")  # fmt: skip
    add("--sync-bn", action="store_true", help="synchronise BatchNorm statistics over all GPUs")
    add("--model-ema", action="store_true", help="also keep, validate and save a moving average of the weights")
    add("--model-ema-steps", type=positive_int, default=32, help="steps between updates of the moving average")
    add(
        "--model-ema-decay",
        type=average_decay,
        default=0.99998,
        help="decay before its adjustment to batch size and epochs; at most 1 - (1 + n)^(-2/3) at update n",
    )


def _add_optimisation_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=positive_int, default=90, help="total epochs, including those before a resumption")
    add("--opt", type=str.lower, default="sgd", choices=choices.OPTIMIZERS, help="optimiser")
    add("--lr", type=positive_float, default=0.1, help="initial learning rate")
    add("--momentum", type=momentum, default=0.9, help="momentum of sgd, sgd_nesterov and rmsprop")
    add("--wd", "--weight-decay", dest="weight_decay", type=non_negative_float, default=1e-4, help="weight decay")
    add("--norm-weight-decay", type=non_negative_float, help="decay of normalisation layers; None: --weight-decay")
    add("--bias-weight-decay", type=non_negative_float, help="weight decay of biases; None: --weight-decay")
    add(
        "--transformer-embedding-decay",
        type=non_negative_float,
        help=f"weight decay of {', '.join(choices.EMBEDDINGS)}; None: --weight-decay",
    )
    add("--label-smoothing", type=smoothing, default=0.0, help="label smoothing of the training loss")
    add("--class-weights", default="none", choices=choices.CLASS_WEIGHTS, help="weigh the classes in the "
        "classifier's loss, in inverse proportion to the number of their training images, or to its square "
        "root")  # fmt: skip
    add("--grad-accum-steps", type=positive_int, default=1, help="batches of --batch-size per update")
    add("--clip-grad-norm", type=positive_float, help="largest norm of each network's gradient; None: no limit")
    add("--amp", action="store_true", help="mixed precision")
    add("--amp-dtype", default="bf16", choices=("bf16", "fp16"), help="precision of --amp")
    add("--compile", action="store_true", help="torch.compile the networks; on a GPU with CUDA graphs")
    add("--channels-last", action=Switch, help="memory format of images and networks; None: only on a GPU")


def _add_schedule_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--lr-scheduler", type=str.lower, default="steplr", choices=choices.SCHEDULERS, help="stepped once per epoch")
    add("--lr-step-size", type=positive_int, default=30, help="epochs between steps of steplr")
    add("--lr-gamma", type=rate_factor, default=0.1, help="factor of steplr and exponentiallr")
    add("--lr-min", type=non_negative_float, default=0.0, help="final learning rate of cosineannealinglr")
    add("--lr-warmup-epochs", type=natural, default=0, help="epochs of warm-up before the schedule starts")
    add("--lr-warmup-method", type=str.lower, default="constant", choices=choices.WARMUPS, help="shape of the warm-up")
    add("--lr-warmup-decay", type=positive_fraction, default=0.01, help="factor at the start of the warm-up")


def _add_augmentation_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--auto-augment", choices=choices.AUTO_AUGMENTS, help="RandAugment, TrivialAugment, AugMix or a policy")
    add("--ra-magnitude", type=natural, default=9, help="magnitude of --auto-augment ra, 0 to 30")
    add("--augmix-severity", type=positive_int, default=3, help="severity of --auto-augment augmix, 1 to 10")
    add("--random-erase", type=fraction, default=0.0, help="probability of erasing a rectangle")
    add("--mixup-alpha", type=mixing_alpha, default=0.0, help="alpha of MixUp; 0: no MixUp")
    add("--cutmix-alpha", type=mixing_alpha, default=0.0, help="alpha of CutMix; 0: no CutMix")
    add("--ra-sampler", action="store_true", help="repeated augmentation: each image several times per epoch")
    add("--ra-reps", type=positive_int, default=3, help="repetitions of --ra-sampler")


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--use-ema", action=Switch, help="whether --finetune and --test-only use the moving average or "
        "the trained weights of a file; None: the average, if there is one")  # fmt: skip
    add("--device", help="cuda or cpu; None: cuda if available")
    add("--seed", type=seed, default=0, help="seed of initial weights, order, augmentation and masks")
    add("--use-deterministic-algorithms", action="store_true", help="only algorithms that are repeatable bit for bit")
    add("--print-freq", type=positive_int, default=10, help="steps between progress lines; each waits for the device")
    add("--output-dir", type=expanded, help="folder for all files; None: that of --resume, else the current one")
    add("--resume", type=expanded, metavar="FILE", help="continue from this checkpoint.pth; auto: from the newest in "
        "--output-dir, if there is one; with --test-only any weights")  # fmt: skip
    add("--checkpoint-steps", type=positive_int, help="steps between checkpoints; None: only after each epoch")
    add("--val-every", type=positive_int, default=1, help="epochs between validations; the last epoch always has one")
    add("--plot-every", type=positive_int, help="epochs between plots in --output-dir/plots; None: no plots")
    add("--tracker", action=Several, choices=(*choices.TRACKER_NAMES, NO_TRACKER), help="also send the log, the mask "
        "gallery and run.json to these trackers; none: to none of those that a resumed run began with")  # fmt: skip
    add("--tensorboard", action=Switch, default=False, help="short for --tracker tensorboard")
    add("--timeout", type=seconds, default=600.0, help="seconds that a process waits for the others or for a batch")
    add("--test-only", action="store_true", help="evaluate the weights of --resume (or --finetune) on --split")
