"""Plan A at the size of two CPU cores: does pretraining on masked images help a small classifier of mini-RIN?

All arms train for 16 epochs in batches of 32, so their classifiers take the same number of updates. The mask has the
published proportions to the image. Published: 224 pixels, 64 cells per side of 3.5 pixels, and a blur of 13 pixels,
which is 3.7 cells or 5.8 % of the image. Here: 48 pixels, 48 cells of 1 pixel, and a blur of 3 pixels. The policy
network costs a sixth of the classifier; in the published setting (resnet10t and resnet50) a quarter.

The learning rate is the best of .0125, .025, .05 and .1 for the conventional arm (macro F1 on `val` after six epochs,
seed 0), so that the baseline has no disadvantage. `published` multiplies it by ln(48 * 48) = 7.7.
"""

import math

from experiments.plan import Arm, Contrast, Plan, Stage, heated_arm

SEEDS = 3
PRETRAINING_EPOCHS, FINE_TUNING_EPOCHS = 12, 4
COMMON = (
    "--model resnet10t --batch-size 32 --train-crop-size 48 --val-resize-size 54 --val-crop-size 48 --gray "
    "--backend tensor --cache-dataset host --lr-scheduler cosineannealinglr"
)
MASK = "--policy-model test_resnet --grid 48 --kernel 3 --sigma 1.7"
PRETRAINING = f"{COMMON} {MASK} --epochs {PRETRAINING_EPOCHS} --lr 0.1"
FINE_TUNING = f"{COMMON} --epochs {FINE_TUNING_EPOCHS} --lr 0.01"
SCALE = math.log(48 * 48)  # factor of `published` on the classifier's gradient, but not on its weight decay
DIVIDED_RATE = f"--lr {0.1 / SCALE:.4g} --wd {1e-4 * SCALE:.4g}"


def heated(name: str, flags: str, seeds: int = SEEDS) -> Arm:
    """Pretrained with these flags, fine-tuned like all other arms."""
    return heated_arm(name, f"{PRETRAINING} {flags}", FINE_TUNING, seeds, "mini-RIN")


CONVENTIONAL = Arm(
    "conventional",
    (
        Stage(
            "training",
            "_normal",
            f"{COMMON} --epochs {PRETRAINING_EPOCHS + FINE_TUNING_EPOCHS} --lr 0.1",
            test="mini-RIN",
        ),
    ),
    SEEDS,
)

PLAN = Plan(
    name="classification_small",
    question="Does a heated model, fine-tuned, classify mini-RIN better than conventional training of equal length?",
    arms=(
        CONVENTIONAL,
        heated("published", "--objective published"),
        heated("uniform", "--mask-policy uniform --objective published-unscaled"),
        heated("reinforce", "--objective reinforce --baseline ema"),
        heated("none", "--mask-policy none"),
        # Added after seeing seed 0, to separate the effect of the masks of `published` from that of its learning rate.
        heated("published-divided-rate", f"--objective published {DIVIDED_RATE} --policy-lr 0.01", seeds=1),
    ),
    baseline="conventional",
    primary=(Contrast("method", "published", "conventional"),),
)
