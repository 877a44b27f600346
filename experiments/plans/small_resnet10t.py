"""Plan S with a classifier of 5 million parameters, resnet10t: four arms, with the learning rates of the small one."""

from experiments.plan import Plan
from experiments.plans.small import MAIN, PRIMARY, arms

PLAN = Plan(
    name="small_resnet10t",
    question="With a larger classifier: do masks help, and does learning them help?",
    arms=arms(MAIN, dict.fromkeys(MAIN, 16), model="resnet10t"),
    baseline="none",
    primary=PRIMARY,
    outcome="balanced_loss",
    hard="*",
)
