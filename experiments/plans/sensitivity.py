"""Plan C: which grid, blur, policy learning rate and batch size suit the method? One seed each, to choose defaults.

Each arm differs from `reinforce` of Plan A as its name says; with `published`, the grid would also change the effective
learning rate. `batch-128` takes a quarter of the updates in pretraining. Nothing here is a test.
"""

from experiments.plan import Arm, Plan
from experiments.plans.classification import LEARNING_RATE, REINFORCE, heated


def variant(name: str, flags: str = "") -> Arm:
    """`reinforce` with these flags, one seed."""
    return heated(name, f"{REINFORCE} {flags}".strip(), seeds=1)


PLAN = Plan(
    name="sensitivity",
    question="Which grid, blur, policy learning rate and batch does the method want?",
    arms=(
        variant("reinforce"),
        variant("grid-4", "--grid 4"),
        variant("grid-16", "--grid 16"),
        variant("no-blur", "--kernel 1"),
        variant("half-blur", "--kernel 3 --sigma 1.5"),
        variant("double-blur", "--kernel 13 --sigma 6"),
        variant("policy-rate-tenth", f"--policy-lr {LEARNING_RATE / 100:g}"),
        variant("policy-rate-tenfold", f"--policy-lr {LEARNING_RATE:g}"),
        variant("batch-128", f"--batch-size 128 --lr {4 * LEARNING_RATE:g}"),
    ),
    baseline="reinforce",
)
