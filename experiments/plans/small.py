"""Plan S: do masks help where there is little data, and does learning them help?

The setting is one in which masks can help: 40 images of each of seven classes that are hard to tell apart, and training
long enough to overfit. All arms but `conventional` train for 60 epochs with masks, or with what they are compared with,
average the last three, and train for 40 more epochs without masks. All train in batches of 32 and take the same number
of updates.

A replicate (a seed) draws the training images, the initial weights and the order, the same for all arms. All
images that were neither drawn nor in `val` are tested on, with the weights of the last epoch: nothing is chosen on
`val` but the learning rate, once for each arm (small_tuning.py), on seeds that are not used again.
"""

import math
from typing import Any

from experiments.plan import Arm, Contrast, Plan, Stage, Subset

CLASSES = "mr-brain-*,us-breast-*"
SHOTS = 40
FIRST_SEED = 3  # those before are for the tuning
MASKED_EPOCHS, CLEAN_EPOCHS = 60, 40
TASK = "hard classes"
SIZE = 48  # pixels
TRAINING = "--gray --backend tensor --cache-dataset host --channels-last --lr-scheduler cosineannealinglr"
BLUR = "--kernel 3 --sigma 1.7"
MASK = f"--policy-model test_resnet {BLUR} --mask-range 0 2"
UNIFORM = "--mask-policy uniform --objective published-unscaled"
LEARNED = "--grid 8 --head-weight 1"
PUBLISHED_SCALE = math.log(48 * 48)  # factor of `published` on the classifier's gradient, but not on its weight decay

# Name, script and flags of the first training, control; None for a single training.
ARMS: dict[str, tuple[str, str, str | None]] = {
    "none": ("_policy_gradient", "--mask-policy none", None),
    "uniform-4": ("_policy_gradient", f"{MASK} {UNIFORM} --grid 4", "none"),
    "uniform-8-two-masks": ("_policy_gradient", f"{MASK} {UNIFORM} --grid 8 --masks-per-image 2", "none"),
    "reinforce-8": (
        "_policy_gradient",
        f"{MASK} {LEARNED} --objective reinforce --baseline loo --masks-per-image 2",
        "uniform-8-two-masks",
    ),
    "conventional": ("_normal", "", "none"),
    "random-erasing": ("_normal", "--random-erase 0.5", "none"),
    "drop-path": ("_normal", "--drop-path 0.1", "none"),
    "uniform-48": ("_policy_gradient", f"{MASK} {UNIFORM} --grid 48", "none"),
    "uniform-8": ("_policy_gradient", f"{MASK} {UNIFORM} --grid 8", "none"),
    "published-48": ("_policy_gradient", f"{MASK} --grid 48 --objective published", "uniform-48"),
    "uniform-8-kept-mean": ("_policy_gradient", f"{MASK} {UNIFORM} --grid 8 --keep-mean", "none"),
    "pathwise-8": ("_policy_gradient", f"{MASK} {LEARNED} --objective pathwise --keep-mean", "uniform-8-kept-mean"),
    "pathwise-8-adversarial": (
        "_policy_gradient",
        f"{MASK} {LEARNED} --objective pathwise --policy-sign adversarial --keep-mean",
        "uniform-8-kept-mean",
    ),
}
MAIN = ("none", "uniform-4", "uniform-8-two-masks", "reinforce-8")
PRIMARY = (Contrast("masks", "uniform-4", "none"), Contrast("learning", "reinforce-8", "uniform-8-two-masks"))
RATES = (0.125, 0.3, 0.75)  # tried for each arm, and .02 and .05 for those of MAIN, to which they were too low
WIDER = {"none": (1.9,)}  # tried too, because the best of RATES was their last
CHOSEN = dict.fromkeys(ARMS, 0.125) | {"none": 0.3, "uniform-4": 0.3}  # by choose_rates.py


def rate_flags(arm: str, rate: float) -> str:
    """The learning rates of the first training, or of the only one, from that of the classifier."""
    if arm in ("reinforce-8", "pathwise-8", "pathwise-8-adversarial"):  # at a tenth of it the masks hardly moved
        return f"--lr {rate:g} --policy-lr {rate:g}"
    if arm != "published-48":
        return f"--lr {rate:g}"
    return f"--lr {rate / PUBLISHED_SCALE:.4g} --wd {1e-4 * PUBLISHED_SCALE:.4g} --policy-lr {rate / 10:g}"


def common(epochs: int, model: str = "test_resnet", size: int = SIZE) -> str:
    """The flags that all trainings of this number of epochs have."""
    images = f"--batch-size 32 --train-crop-size {size} --val-resize-size {size * 9 // 8} --val-crop-size {size}"
    return f"--model {model} {images} {TRAINING} --epochs {epochs} --val-every {epochs}"


def stages(
    arm: str,
    rate: float,
    *,
    shots: int = SHOTS,
    model: str = "test_resnet",
    size: int = SIZE,
    blur: str = BLUR,
    test: bool = True,
) -> tuple[Stage, ...]:
    """The trainings of an arm with a learning rate; without `test` for a choice on `val`."""
    script, flags, _ = ARMS[arm]
    flags = flags.replace(BLUR, blur)
    subset = Subset(CLASSES, shots=shots, draw="seed", test="rest")
    task, keep = TASK if test else None, ("model_best.pth",) if test else ()
    if arm == "conventional":
        flags = f"{common(MASKED_EPOCHS + CLEAN_EPOCHS, model, size)} {rate_flags(arm, rate)}"
        return (Stage("training", "_normal", flags, test=task, subset=subset, keep=keep),)
    first = f"{common(MASKED_EPOCHS, model, size)} {rate_flags(arm, rate)} {flags}"
    second = f"{common(CLEAN_EPOCHS, model, size)} --lr {rate / 5:g}"
    return (
        Stage("pretraining", script, first, average=3, subset=subset),
        Stage("fine-tuning", "_normal", second, "pretraining/average.pth", test=task, subset=subset, keep=keep),
    )


def arms(names: tuple[str, ...], seeds: dict[str, int], **settings: Any) -> tuple[Arm, ...]:
    """The arms with their chosen learning rates. seeds: by arm, their number; settings: of `stages`."""
    return tuple(
        Arm(name, stages(name, CHOSEN[name], **settings), seeds[name], FIRST_SEED, ARMS[name][2]) for name in names
    )


PLAN = Plan(
    name="small",
    question="With 40 images a class: do masks help, and does learning them help?",
    arms=arms(tuple(ARMS), {name: 40 if name in MAIN else 20 for name in ARMS}),
    baseline="none",
    primary=PRIMARY,
    outcome="balanced_loss",
    hard="*",
)
