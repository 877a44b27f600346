"""Plan S with 10 images of each class, which are among the 40 of the same seed; the same learning rates."""

from experiments.plan import Plan
from experiments.plans.small import ARMS, MAIN, PRIMARY, arms

PLAN = Plan(
    name="small_10",
    question="With 10 images a class: do masks help, and does learning them help?",
    arms=arms(tuple(ARMS), {name: 100 if name in MAIN else 20 for name in ARMS}, shots=10),
    baseline="none",
    primary=PRIMARY,
    outcome="balanced_loss",
    hard="*",
)
