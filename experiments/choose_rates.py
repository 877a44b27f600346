"""Choose the learning rate of each arm of Plan S from its tuning: `python experiments/choose_rates.py RESULTS`.

The rate of an arm is the lowest whose cross-entropy on `val` at the end of training, mean over the replicates, is
within one standard error of the best. A higher rate must be clearly better, because single trainings begin to fail at
the highest ones.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from experiments.markdown import NONE, markdown
from experiments.plan import Arm, Plan
from experiments.plans.small_tuning import PLAN
from experiments.run_results import read_folders
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.processes import run_script
from utils.runtime.text import print_line

Losses = dict[str, dict[float, list[float]]]  # by arm and rate, one for each finished replicate


def final_losses(plan: Plan, results: Path) -> Losses:
    """The val_loss of the last epoch of each finished run; infinite if it was not finite.

    Raises UserError if no run has finished, and for a run with other stages than the plan's.
    """
    losses: Losses = {}
    runs = read_folders(plan, results).runs
    for arm in plan.arms:
        name, rate = split_name(arm)
        values = losses.setdefault(name, {}).setdefault(rate, [])
        for seed in arm.all_seeds:
            if run := runs.get((arm.name, seed)):
                loss = run.logs[arm.stages[-1].name][-1].get("val_loss")
                values.append(math.inf if loss is None or not math.isfinite(loss) else loss)
    return losses


def split_name(arm: Arm) -> tuple[str, float]:
    """The name "uniform-4-0.02" stands for the arm "uniform-4" at the rate .02."""
    name, rate = arm.name.rsplit("-", 1)
    return name, float(rate)


def choose(losses: dict[float, list[float]]) -> float | None:
    """The lowest rate that is within one standard error of the lowest mean loss; None if no run has finished.

    The standard error is that of the paired differences. Only of rates with the most finished replicates, because
    replicates differ by more than rates.
    """
    most = max(map(len, losses.values()))
    candidates = {rate: np.array(values) for rate, values in losses.items() if most and len(values) == most}
    if not candidates:
        return None
    best = min(candidates, key=lambda rate: candidates[rate].mean())
    return min(rate for rate, values in candidates.items() if rate == best or _is_close(values - candidates[best]))


def _is_close(differences: np.ndarray) -> bool:
    """Whether their mean is within one standard error of 0; with one difference, or a loss that is infinite: no."""
    if len(differences) < 2 or not np.isfinite(differences).all():
        return False
    return differences.mean() <= differences.std(ddof=1) / math.sqrt(len(differences))


def table(losses: Losses, replicates: int) -> str:
    """Mean ± standard deviation of the loss at each rate, and the chosen rate."""
    rates = list(dict.fromkeys(rate for by_rate in losses.values() for rate in by_rate))
    rows = []
    for arm, by_rate in losses.items():
        missing = sum(replicates - len(values) for values in by_rate.values())
        chosen = choose(by_rate)
        remarks = [f"incomplete: {missing} of {replicates * len(by_rate)} runs missing"] if missing else []
        if not missing and chosen in (min(by_rate), max(by_rate)):
            remarks.append("at the edge of the rates tried")
        cells = [_cell(by_rate.get(rate, []), replicates) for rate in rates]
        rows.append([arm, *cells, NONE if chosen is None else f"{chosen:g}", "; ".join(remarks)])
    return markdown(["arm", *(f"{rate:g}" for rate in rates), "chosen", "remark"], rows)


def _cell(values: list[float], replicates: int) -> str:
    if not values:
        return NONE
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 and math.isfinite(sum(values)) else ""
    return f"{np.mean(values):.3f}{deviation}" + (f" ({len(values)})" if len(values) < replicates else "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python experiments/choose_rates.py")
    parser.add_argument(
        "results", type=expanded_path, metavar="RESULTS", help="the output folder of experiments/plans/small_tuning.py"
    )
    options = parser.parse_args(argv)
    replicates = max(arm.seeds for arm in PLAN.arms)
    losses = final_losses(PLAN, options.results)
    print_line(f"Cross-entropy on val at the end, mean ± standard deviation over {replicates} replicates.")
    print_line("In parentheses: the number of finished replicates, where some are missing.")
    print_line("")
    for line in table(losses, replicates).split("\n"):
        print_line(line)
    chosen = {arm: rate for arm, by_rate in losses.items() if (rate := choose(by_rate)) is not None}
    print_line("")
    print_line(f"CHOSEN = {chosen}")


if __name__ == "__main__":
    run_script(main)
