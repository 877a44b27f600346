"""Plan B: does a heated model carry over better to a concept it has never seen, from few images of it?

Twice: trained on all classes but those of breast ultrasound, then transferred to these; and the same with brain MR. The
transfer follows the authors' protocol: 15 epochs, batch 8, AdamW at 1e-3, random crops and flips; with the backbone
frozen, and whole. Few images are drawn three times, the same for all arms and seeds, and the results of a seed averaged
over the draws. With 5 images of each class an epoch is one or two updates, as it is in theirs. Epochs are chosen on the
whole `val` of the concept, which a real user with five images has not; it is so for all arms.
"""

from experiments.plan import Arm, Plan, Stage, Subset
from experiments.plans.classification import COMMON, CONVENTIONAL, FINE_TUNING, PRETRAINING, REINFORCE, UNIFORM

SEEDS = 3
CONCEPTS = {"breast": "us-breast-*", "brain": "mr-brain-*"}
SHOTS, DRAWS = (5, 10, 50, None), 3
TRANSFER = f"{COMMON.replace('--batch-size 32', '--batch-size 8')} --epochs 15 --opt adamw --lr 0.001"
HEADS = {"linear": "--freeze-backbone", "whole": ""}


def transfers(concept: str, start: str) -> list[Stage]:
    """All transfers of one trained model to a concept."""
    stages = []
    for shots in SHOTS:
        for draw in range(DRAWS if shots else 1):
            subset = Subset(CONCEPTS[concept], shots=shots, draw=draw)
            for head, flags in HEADS.items():
                images = f"{shots} images" if shots else "all images"
                name = f"{concept}-{shots or 'all'}-draw{draw}-{head}"
                task = f"{concept}, {images}, {head}"
                stages.append(Stage(name, "_normal", f"{TRANSFER} {flags}".strip(), start, test=task, subset=subset))
    return stages


def conventional() -> Arm:
    """One training without masks on all other classes, then the transfers."""
    stages: list[Stage] = []
    for concept, pattern in CONCEPTS.items():
        name = f"without-{concept}"
        stages.append(Stage(name, "_normal", CONVENTIONAL, subset=Subset(without=pattern)))
        stages += transfers(concept, f"{name}/model_best.pth")
    return Arm("conventional", tuple(stages), SEEDS)


def heated(name: str, flags: str) -> Arm:
    """Pretrained with masks on all other classes, fine-tuned on these without, then the transfers."""
    stages: list[Stage] = []
    for concept, pattern in CONCEPTS.items():
        first, second, others = f"without-{concept}-heated", f"without-{concept}", Subset(without=pattern)
        stages += [
            Stage(first, "_policy_gradient", f"{PRETRAINING} {flags}", average=3, subset=others),
            Stage(second, "_normal", FINE_TUNING, f"{first}/average.pth", subset=others),
            *transfers(concept, f"{second}/model_best.pth"),
        ]
    return Arm(name, tuple(stages), SEEDS)


PLAN = Plan(
    name="unseen",
    question="Does a heated model carry over better to a concept it has never seen, from few images of it?",
    arms=(
        conventional(),
        heated("published", "--objective published"),
        heated("uniform", UNIFORM),
        heated("reinforce", REINFORCE),
    ),
    baseline="conventional",
)
