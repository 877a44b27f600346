"""Plan B: does a heated model transfer better to an unseen concept, from few images of it?

Done twice: trained on all classes except breast ultrasound, then transferred to these; and the same with brain MR. The
transfer follows the authors' protocol: 15 epochs, batch size 8, AdamW at 1e-3, random crops and flips; with a frozen
backbone, and with the whole network. Few images are drawn three times, the same for all arms and seeds, and the results
of a seed are averaged over the draws. With 5 images per class an epoch is one or two updates, as in the authors'
protocol. The best epoch is chosen on the whole `val` of the concept, for all arms; a real user with five images would
not have it.
"""

from experiments.plan import Arm, Plan, Stage, Subset
from experiments.plans.classification import COMMON, CONVENTIONAL, FINE_TUNING, PRETRAINING, REINFORCE, UNIFORM

SEEDS = 3
CONCEPTS = {"breast": "us-breast-*", "brain": "mr-brain-*"}
SHOTS, DRAWS = (5, 10, 50, None), 3
TRANSFER = f"{COMMON.replace('--batch-size 32', '--batch-size 8')} --epochs 15 --opt adamw --lr 0.001"
HEADS = {"linear": "--freeze-backbone", "whole": ""}


def transfers(concept: str, start: str) -> list[Stage]:
    """All transfers of a trained model to a concept."""
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
    """Pretrained with masks on all other classes, fine-tuned on them without masks, then the transfers."""
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
