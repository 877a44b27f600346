"""The flags of the joint training, in addition to the shared ones, and of its mask gallery. Imports no torch."""

from utils.arguments import model_name
from utils.choices import BASELINES, MASK_POLICIES, OBJECTIVES, POLICY_SIGNS, SPLITS
from utils.flags import natural, non_negative_float, positive_float, positive_fraction, positive_int, shared_parser
from utils.runtime.command_line import Parser, expanded, expanded_path

SCRIPT = "_policy_gradient"
HEAD_WEIGHT = 0.1  # weight of the heads in the log-concentrations; the running prior has the rest


def build_parser() -> Parser:
    parser = shared_parser("Joint training of a policy network, which masks each image, and a classifier.")
    add = parser.add_argument_group("policy and mask").add_argument
    add("--mask-policy", default="learned", choices=MASK_POLICIES, help="the method, or one of its controls")
    add("--policy-model", type=model_name, default="resnet10t", help="any timm backbone, for the policy network")
    add("--policy-lr", type=positive_float, help="None: --lr / 10; a cosine over all epochs")
    add("--head-weight", type=positive_fraction, default=HEAD_WEIGHT, metavar="W", help="weight of the heads in the "
        "log-concentrations; the running prior has 1 - W")  # fmt: skip
    add("--grid", type=positive_int, default=64, help="cells per side of the mask")
    add("--kernel", type=positive_int, default=13, help="kernel size of the Gaussian blur, pixels, odd")
    add("--sigma", type=positive_float, default=6.0, help="standard deviation of the blur, pixels")
    add("--mask-range", type=non_negative_float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"), help="a mask "
        "m in (0, 1) is applied as LOW + (HIGH - LOW) m")  # fmt: skip
    add("--keep-mean", action="store_true", help="multiply the cells of each image so that their mean is .5: the "
        "policy decides where to mask, not how much")  # fmt: skip
    add("--mask-fade-epochs", type=natural, default=0, metavar="N", help="in the k-th of the last N epochs a mask m is "
        "applied as 1 + w (m - 1), w = 1 - k / (N + 1); 0: none")  # fmt: skip
    add = parser.add_argument_group("objective").add_argument
    add("--objective", default="published", choices=OBJECTIVES, help="the loss; docs/flags.md explains each")
    add("--policy-sign", default="cooperative", choices=POLICY_SIGNS, help="the policy lowers or raises the loss")
    add("--baseline", choices=BASELINES, help="baseline of reinforce; None: ema, a moving average; loo: leave-one-out")
    add("--masks-per-image", type=positive_int, default=1, help="masks sampled per image of a batch")
    add("--entropy-weight", type=non_negative_float, default=0.0, help="weight of the entropy bonus of reinforce")
    return parser


def gallery_parser(description: str) -> Parser:
    parser = Parser(description, prog="python -m _policy_gradient.gallery")
    add_run_arguments(parser)
    parser.add_argument("--classes", help="names with commas between; default: all, or 16 evenly chosen ones")
    parser.add_argument("--images-per-class", type=positive_int, default=1, help="the first ones; default: 1")
    parser.add_argument(
        "-o",
        "--output",
        type=expanded,
        help="a .png or .svg file; default: plots/masks_SPLIT.png next to the checkpoint",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def add_run_arguments(parser: Parser) -> None:
    """RUN, --data-path and --split: the checkpoint, and the images to look at."""
    parser.add_argument(
        "run", type=expanded_path, metavar="RUN", help="the --output-dir of a run, or one of its checkpoints"
    )
    parser.add_argument("--data-path", type=expanded, metavar="FOLDER", help="with {train,val,test}/<class>/"
        "<image>; default: the run's own")  # fmt: skip
    parser.add_argument("--split", default="val", choices=SPLITS, help="default: val")
