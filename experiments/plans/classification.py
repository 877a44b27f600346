"""Plan A: does a heated model, fine-tuned, classify better than conventional training of equal length?

For a GPU: resnet18 at 112 pixels, the published policy network, grid and objective, and the published blur in
proportion to the image. All arms train for 40 epochs in batches of 32. The `reinforce` arms with a leave-one-out
baseline, and their control, see each image with two masks, in the same number of updates.
"""

import math

from experiments.plan import Arm, Contrast, Plan, Stage, heated_arm

TESTED_SEEDS, SEEDS = 8, 3
PRETRAINING_EPOCHS, FINE_TUNING_EPOCHS = 30, 10
LEARNING_RATE = 0.1
COMMON = (
    "--model resnet18 --batch-size 32 --train-crop-size 112 --val-resize-size 128 --val-crop-size 112 --gray "
    "--cache-dataset device --lr-scheduler cosineannealinglr"
)
MASK = "--policy-model resnet10t --grid 64 --kernel 7 --sigma 3"
PRETRAINING = f"{COMMON} {MASK} --epochs {PRETRAINING_EPOCHS} --lr {LEARNING_RATE}"
FINE_TUNING = f"{COMMON} --epochs {FINE_TUNING_EPOCHS} --lr {LEARNING_RATE / 10:g}"
CONVENTIONAL = f"{COMMON} --epochs {PRETRAINING_EPOCHS + FINE_TUNING_EPOCHS} --lr {LEARNING_RATE}"
SCALE = math.log(64 * 64)  # factor of `published` on the classifier's gradient, but not on its weight decay
SCALED_RATE = f"--lr {LEARNING_RATE * SCALE:.4g} --wd {1e-4 / SCALE:.4g}"
UNIFORM = "--mask-policy uniform --objective published-unscaled"
REINFORCE = "--objective reinforce"
TWO_MASKS = "--masks-per-image 2"


def conventional(name: str, flags: str = "", seeds: int = SEEDS) -> Arm:
    """One training without masks, as long as the two trainings of other arms."""
    return Arm(name, (Stage("training", "_normal", f"{CONVENTIONAL} {flags}".strip(), test="mini-RIN"),), seeds)


def heated(name: str, flags: str, seeds: int = SEEDS) -> Arm:
    """Pretrained with these flags, fine-tuned like all other arms."""
    return heated_arm(name, f"{PRETRAINING} {flags}", FINE_TUNING, seeds, "mini-RIN")


PLAN = Plan(
    name="classification",
    question="Does a heated model, fine-tuned, classify mini-RIN better than conventional training of equal length?",
    arms=(
        conventional("conventional", seeds=TESTED_SEEDS),
        heated("published", "--objective published", TESTED_SEEDS),
        heated("none", "--mask-policy none"),
        heated("none-scaled-rate", f"--mask-policy none {SCALED_RATE}"),
        heated("uniform", UNIFORM),
        heated("uniform-published", "--mask-policy uniform --objective published"),  # the same scaled loss
        heated("uniform-two-masks", f"{UNIFORM} {TWO_MASKS}"),
        heated("prior", f"--mask-policy prior {REINFORCE}"),
        heated("published-unscaled", "--objective published-unscaled"),
        heated("reinforce", f"{REINFORCE} --baseline ema"),
        heated("reinforce-adversarial", f"{REINFORCE} --baseline ema --policy-sign adversarial"),
        heated("reinforce-loo", f"{REINFORCE} --baseline loo {TWO_MASKS}"),
        heated("reinforce-loo-adversarial", f"{REINFORCE} --baseline loo {TWO_MASKS} --policy-sign adversarial"),
        conventional("random-erasing", "--random-erase 0.25 --cache-dataset host"),  # which crops on the CPU
    ),
    baseline="conventional",
    primary=(Contrast("method", "published", "conventional"),),
)
