"""Checks of the final flags of the joint training."""

import argparse
from typing import Any

from _policy_gradient.mask import check_mask_range, check_mask_size
from utils import arguments
from utils.checkpoints.checkpoint import Weights
from utils.runtime.errors import UserError
from utils.runtime.progress import say

LEARNING_FLAGS = ("policy_model", "policy_lr", "head_weight", "policy_sign", "baseline", "entropy_weight")
MASK_FLAGS = ("objective", "masks_per_image", "grid", "kernel", "sigma", "mask_range", "keep_mean", "mask_fade_epochs")
IGNORED_FLAGS = {  # by --mask-policy
    "learned": (),
    "prior": ("policy_model",),
    "uniform": LEARNING_FLAGS,
    "none": LEARNING_FLAGS + MASK_FLAGS,
}


def check_flags(args: argparse.Namespace, given: dict[str, Any], weights: Weights | None) -> None:
    """Print which flags the chosen --mask-policy ignores; raise UserError for masks that do not fit the images.

    given: the values that were typed; weights: the file that --test-only evaluates. Without a policy in the file, no
    masks are drawn.
    """
    draws_masks = args.mask_policy != "none" and (weights is None or weights.policy_net is not None)
    ignored = [arguments.flag(name) for name in IGNORED_FLAGS[args.mask_policy] if name in given]
    if ignored:
        say(f"--mask-policy {args.mask_policy}: {' '.join(ignored)} without effect.")
    if draws_masks:
        for size in (args.val_crop_size,) if args.test_only else (args.train_crop_size, args.val_crop_size):
            check_mask_size(size, args.grid, args.kernel, args.sigma)
        check_mask_range(*args.mask_range)
        if args.mask_fade_epochs > args.epochs:
            raise UserError(
                f"--mask-fade-epochs {args.mask_fade_epochs}: more than --epochs {args.epochs}; give at most "
                f"{args.epochs}."
            )
