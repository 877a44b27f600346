"""The outcomes that arms are compared in: their titles, their units, and which direction is better."""

from typing import NamedTuple

IMPROVEMENT = (
    "Improvement: the arm minus its control, for cross-entropy and calibration error the control minus the arm, so "
    "that positive is better. Mean over the seeds that both have."
)


class Outcome(NamedTuple):
    """scale: factor from the stored value to what is printed, in `unit`; sign: -1 if lower is better."""

    title: str
    unit: str = "points"
    scale: float = 100
    sign: int = 1


OUTCOMES = {  # by name; hard_*: of the plan's hard classes
    "balanced_loss": Outcome("balanced cross-entropy", "nats", 1, -1),
    "balanced_accuracy": Outcome("balanced accuracy"),
    "f1": Outcome("macro F1"),
    "top1": Outcome("top-1"),
    "ece": Outcome("calibration error (ECE)", sign=-1),
    "auroc": Outcome("AUROC", "", 1),
    "hard_f1": Outcome("hard: macro F1"),
    "hard_balanced_accuracy": Outcome("hard: balanced accuracy"),
    "hard_top1": Outcome("hard: top-1"),
    "hard_auroc": Outcome("hard: AUROC", "", 1),
}
