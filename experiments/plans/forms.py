"""Better forms: which change of the mask or of the objective makes a heated model worth its cost?

Each arm differs from `reinforce` or `uniform` of Plan A as its name says. Reasons for these changes: the loss hardly
depends on the published mask, so the policy has nothing to learn from (experiments/learning_signal.py); the
image-specific heads have only a tenth of the weight; the mask halves the contrast, so a heated model never sees a clean
image.
"""

from experiments.plan import Arm, Plan
from experiments.plans.classification import REINFORCE, TWO_MASKS, UNIFORM, conventional, heated

LEAVE_ONE_OUT = f"{REINFORCE} --baseline loo {TWO_MASKS}"
OWN_ADVERSARY = f"{LEAVE_ONE_OUT} --policy-sign adversarial --head-weight 1 --grid 8"


def pair(name: str, flags: str) -> tuple[Arm, Arm]:
    """The same change for learned masks and, as their control, for uniform masks."""
    return heated(f"reinforce-{name}", f"{REINFORCE} {flags}"), heated(f"uniform-{name}", f"{UNIFORM} {flags}")


PLAN = Plan(
    name="forms",
    question="Which form of the mask and of its objective helps most?",
    arms=(
        conventional("conventional"),
        heated("reinforce", REINFORCE),
        heated("uniform", UNIFORM),
        *pair("mean-preserved", "--mask-range 0 2"),
        *pair("bounded", "--mask-range 0.5 1.5"),
        *pair("fading", "--mask-fade-epochs 10"),
        *pair("grid-8", "--grid 8"),
        heated("reinforce-own", f"{REINFORCE} --head-weight 1"),
        heated("reinforce-entropy", f"{REINFORCE} --entropy-weight 0.01"),
        heated("uniform-two-masks-grid-8", f"{UNIFORM} {TWO_MASKS} --grid 8"),
        heated("loo-own-grid-8", f"{LEAVE_ONE_OUT} --head-weight 1 --grid 8"),
        heated("adversarial-own-grid-8", OWN_ADVERSARY),
        heated("adversarial-own-grid-8-mean-fading", f"{OWN_ADVERSARY} --mask-range 0 2 --mask-fade-epochs 10"),
    ),
    baseline="conventional",
)
