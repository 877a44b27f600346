"""The learning rates of Plan S: three rates or more for each arm, on three replicates that are not used again.

`python experiments/choose_rates.py RESULTS` chooses the rate of each arm by its cross-entropy on `val` at the last
epoch (`val_loss`). Nothing is tested.
"""

from experiments.plan import Arm, Plan
from experiments.plans.small import ARMS, FIRST_SEED, MAIN, RATES, WIDER, stages

PLAN = Plan(
    name="small_tuning",
    question="Which learning rate suits each arm of Plan S?",
    arms=tuple(
        Arm(f"{name}-{rate:g}", stages(name, rate, test=False), FIRST_SEED)
        for name in (*MAIN, *(name for name in ARMS if name not in MAIN))
        for rate in (*RATES, *WIDER.get(name, ()))
    ),
    baseline=f"none-{RATES[1]:g}",
    hard="*",
)
