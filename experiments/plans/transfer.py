"""Transfer: do masks, or learning them, give features that carry over better to a concept never seen, from few images?

Twice: trained on all classes of mini-RIN but breast ultrasound, then probed on these; and the same with brain MR. The
arms are the four that the primary contrasts of Plan S compare, with its classifier, images, masks and learning rates,
but fewer epochs, since there are ten times as many images. As in Plan S the weights of the last epoch count. A fifth
arm, `conventional`, was added after the runs of these four: one schedule of as many epochs, without masks.

The probes (kNN and logistic regression of frozen features) are fitted to 5, 10 and 50 images of each class of the
concept, ten draws each, and to all that were set apart for them. A replicate (a seed) draws the initial weights, the
order, and the images of the concept to fit to, the same for all arms; it tests on all other images of the concept. So
the intervals over seeds cover the choice of both, and breast is tested on 431 images instead of the 117 of `test`.
"""

from experiments.plan import PROBE, Arm, Plan, Stage, Subset
from experiments.plans import small

SEEDS = 5
MASKED_EPOCHS, CLEAN_EPOCHS = 12, 8
CONCEPTS = {"breast": "us-breast-*", "brain": "mr-brain-*"}
SHOTS, DRAWS = (5, 10, 50), 10
SET_APART = 60  # images of each class to fit to; the smallest class has 101 besides `val`
PROBES = f"--shots {' '.join(map(str, SHOTS))} --draws {DRAWS}"


def stages(arm: str) -> tuple[Stage, ...]:
    """For each concept: trained on all other classes, first with masks, and probed on those of the concept."""
    script, flags, _ = small.ARMS[arm]
    rate = small.CHOSEN[arm]
    result = []
    for concept, pattern in CONCEPTS.items():
        others, of_concept = Subset(without=pattern), Subset(pattern, shots=SET_APART, draw="seed", test="rest")
        first, second = f"without-{concept}-pretraining", f"without-{concept}"
        probes = Stage(concept, PROBE, PROBES, f"{second}/model_best.pth", subset=of_concept)
        task = f"all but {concept}"
        if arm == "conventional":
            single = f"{small.common(MASKED_EPOCHS + CLEAN_EPOCHS)} {small.rate_flags(arm, rate)}"
            result += [Stage(second, "_normal", single, test=task, subset=others), probes]
            continue
        masked = f"{small.common(MASKED_EPOCHS)} {small.rate_flags(arm, rate)} {flags}"
        clean = f"{small.common(CLEAN_EPOCHS)} --lr {rate / 5:g}"
        result += [
            Stage(first, script, masked, average=3, subset=others),
            Stage(second, "_normal", clean, f"{first}/average.pth", test=task, subset=others),
            probes,
        ]
    return tuple(result)


PLAN = Plan(
    name="transfer",
    question="Do masks, or learning them, give features that carry over better to an unseen concept?",
    arms=tuple(Arm(name, stages(name), SEEDS, control=small.ARMS[name][2]) for name in (*small.MAIN, "conventional")),
    baseline="none",
    outcome="balanced_loss",
    hard="*",
)
