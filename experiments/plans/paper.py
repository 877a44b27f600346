"""RadImageNet as the paper has it: does pretraining with masks help ResNet-50, ResNet-18 and ResNet-10t?

For 8 processes: an update then sees the published 256 images. (The authors fine-tuned with 64 images on each of four
GPUs, which is also 256.) As published, conventional training takes 90 epochs, and the other arms take 90 with masks and
10 without. To show what the ten more epochs do, the conventional model is also fine-tuned like the others, and tested
again as EQUAL_LENGTH. One seed, as published, so nothing can be tested for significance.
"""

from experiments.plan import Arm, Contrast, Plan, Stage

MODELS = ("resnet50", "resnet18", "resnet10t")
TASK, EQUAL_LENGTH = "RadImageNet", "RadImageNet, conventional and fine-tuned"
MASK = "--policy-model resnet10t --grid 64 --kernel 13 --sigma 6"
OPTIMIZER = "--opt sgd --momentum 0.9 --wd 1e-4 --sync-bn"
TRAINING = f"{OPTIMIZER} --lr 0.1 --lr-scheduler steplr --lr-step-size 30 --lr-gamma 0.1"
FINE_TUNING = f"{OPTIMIZER} --lr 0.001 --lr-warmup-epochs 7 --lr-warmup-method linear"
HEATED = {
    "published": "--objective published",
    "reinforce": "--objective reinforce --baseline ema",
    "uniform": "--mask-policy uniform --objective published-unscaled",
}


def arms(
    model: str,
    epochs: int = 90,
    fine_tuning_epochs: int = 10,
    images: str = "--batch-size 32",
    mask: str = MASK,
    seeds: int = 1,
) -> tuple[Arm, ...]:
    """All arms of a classifier, `conventional` first. images: flags of their number and size; mask: of the masks."""
    training = f"--model {model} {images} --epochs {epochs} {TRAINING}"
    fine_tuning = f"--model {model} {images} --epochs {fine_tuning_epochs} {FINE_TUNING}"
    keep = ("model_best.pth",)

    def fine_tuned(start: str, task: str) -> Stage:
        return Stage("fine-tuning", "_normal", fine_tuning, f"{start}/average.pth", test=task, keep=keep)

    conventional = Stage("training", "_normal", training, average=3, test=TASK, keep=keep)
    result = [Arm(f"{model}-conventional", (conventional, fine_tuned("training", EQUAL_LENGTH)), seeds)]
    for name, flags in HEATED.items():
        pretraining = f"{training} {mask} {flags}"
        heated = Stage("pretraining", "_policy_gradient", pretraining, average=3, keep=("average.pth",))
        stages = (heated, fine_tuned("pretraining", TASK))
        result.append(Arm(f"{model}-{name}", stages, seeds, control=result[0].name))
    return tuple(result)


PLAN = Plan(
    name="paper",
    question="Does pretraining with masks, then fine-tuning, classify RadImageNet better than conventional training?",
    arms=tuple(arm for model in MODELS for arm in arms(model)),
    baseline="resnet50-conventional",
    primary=(Contrast("method", "resnet50-published", "resnet50-conventional"),),
    hard="*",
)
