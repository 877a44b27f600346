"""The mask gallery of a run: `python -m _policy_gradient.gallery RUN --data-path DATA`.

For images of each class: the image, the means of the prior and of the image's own cells, sampled cells, the smooth mask
and the masked image, before training and as the checkpoint has them.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from _policy_gradient.examples import CPU, Examples, Stage, after, choose_examples, draw_stages, run_policy
from _policy_gradient.flags import SCRIPT
from _policy_gradient.masking import build_mask, build_policy
from _policy_gradient.policy import Policy
from _policy_gradient.train import build_parser
from utils import arguments
from utils.checkpoints import checkpoint
from utils.data import splits as wiring_data
from utils.data.transforms import Normalize
from utils.flags import positive_int
from utils.results.figures import output_path, write_figure
from utils.runtime.command_line import Parser, expanded, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.runtime.text import print_line
from utils.training import build as wiring
from utils.training import start as run


def initial_policy(args: argparse.Namespace, state: dict[str, Any]) -> Policy | None:
    """The policy before training, rebuilt from the run's seed as train.py did; None if this does not give it.

    The running prior is drawn last: where that is the run's, so is all that was drawn before it.
    """
    wiring.seed_everything(args)
    wiring.classifier(args, state["classes"], None, None, CPU)
    policy = build_policy(args, None, None, CPU)
    return policy if policy.state_dict()["initial_prior"].equal(state["policy_net"]["initial_prior"]) else None


def compute_stages(
    args: argparse.Namespace, state: dict[str, Any], examples: Examples, normalize: Normalize
) -> dict[str, Stage | np.ndarray]:
    """Before training and now; of the beginning only the prior's means, (G, G), where it cannot be rebuilt."""
    mask = build_mask(args, args.val_crop_size, CPU)
    before, now = initial_policy(args, state), build_policy(args, state, None, CPU)
    if before is None:
        print_line("The policy's first weights cannot be rebuilt (other versions of torch or timm?): left out.")
        alpha, beta = now.initial_prior  # (1, G*G) each
        stages = {after(0): (alpha - beta).sigmoid().view(args.grid, args.grid).numpy()}
    else:
        stages = {after(0): run_policy(before, mask, normalize, examples, args.seed, 0)}
    epochs = state["epoch"]
    return stages | {after(epochs, state["step"]): run_policy(now, mask, normalize, examples, args.seed, epochs)}


def read_run(path: Path, data_path: str | None, split: str) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments and the state of a checkpoint, for a look at this split on the CPU; raises UserError."""
    state = checkpoint.read_checkpoint(path, SCRIPT)
    if "policy_net" not in state:
        raise UserError(f"{path}: is of a run with --mask-policy none, which has no masks to show.")
    given = {"resume": str(path)} | ({} if data_path is None else {"data_path": data_path})
    args = arguments.for_resume(build_parser(), given, state["args"], str(path))
    # As --test-only would see it. Pretrained weights draw nothing at random.
    new = {"split": split, "test_only": True, "weights": None, "sync_bn": False, "channels_last": None}
    args = argparse.Namespace(**vars(args) | new | {"cache_dataset": "off", "cache_dir": None})
    run.report_paths(args, given, str(path), partial(print, file=sys.stderr))  # stdout is for results
    return args, state


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m _policy_gradient.gallery")
    parser.add_argument(
        "run", type=expanded_path, metavar="RUN", help="the --output-dir of a run, or a checkpoint of it"
    )
    parser.add_argument("--data-path", type=expanded, metavar="FOLDER", help="with {train,val,test}/<class>/"
        "<image>; default: the run's own")  # fmt: skip
    parser.add_argument("--split", default="val", choices=("train", "val", "test"), help="default: val")
    parser.add_argument("--classes", help="names with commas between; default: all, or 16 of more, evenly chosen")
    parser.add_argument("--images-per-class", type=positive_int, default=1, help="the first ones; default: 1")
    parser.add_argument(
        "-o", "--output", type=expanded, help="a .png or .svg file; default: plots/masks.png beside the checkpoint"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over a file that is there already")
    options = parser.parse_args(argv)
    arguments.check_limits(vars(options))
    path = options.run / checkpoint.CHECKPOINT if options.run.is_dir() else options.run
    output = output_path(options.output, path.parent / "plots" / "masks.png", options.overwrite)
    args, state = read_run(path, options.data_path, options.split)
    with redirect_stdout(sys.stderr):  # only the picture's path goes to stdout
        split = wiring_data.open_splits(args, state["classes"], str(path)).evaluation
    examples = choose_examples(split, options.classes and options.classes.split(","), options.images_per_class)
    normalize = Normalize(args.mean, args.std)
    stages = compute_stages(args, state, examples, normalize)
    title = f"Masks of {options.split} images: {options.run}"
    write_figure(output, draw_stages(examples, stages, normalize, title, args.mask_range))
    print_line(output)


if __name__ == "__main__":
    run_script(main)
