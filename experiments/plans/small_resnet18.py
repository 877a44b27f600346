"""Plan S for a GPU: resnet18 at 112 pixels, the blur in proportion, the learning rates of the small classifier."""

from experiments.plan import Plan
from experiments.plans.small import ARMS, MAIN, PRIMARY, arms

PLAN = Plan(
    name="small_resnet18",
    question="With resnet18 at 112 pixels: do masks help, and does learning them help?",
    arms=arms(
        tuple(ARMS),
        {name: 40 if name in MAIN else 20 for name in ARMS},
        model="resnet18",
        size=112,
        blur="--kernel 7 --sigma 4",
    ),
    baseline="none",
    primary=PRIMARY,
    outcome="balanced_loss",
    hard="*",
)
