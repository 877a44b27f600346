"""The tables of an analysis, as GitHub Markdown."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.differences import COMPARED, POINT, SEEDS_FOR_P, Comparison
from experiments.plan import Plan
from experiments.results import METRICS, Runs, Task
from utils.results.metrics import LEVEL
from utils.runtime.text import printable

POLICY = "_policy_gradient"
NONE = "\N{EN DASH}"
TITLES = {
    "top1": "top-1",
    "balanced_accuracy": "balanced accuracy",
    "f1": "macro F1",
    "auroc": "AUROC",
    "hard_top1": "hard: top-1",
    "hard_balanced_accuracy": "hard: balanced accuracy",
    "hard_f1": "hard: macro F1",
    "hard_auroc": "hard: AUROC",
}
HEALTH = (
    "policy_entropy",
    "mask_std_between_images",
    "prior_drift",
    "mask_mean",
    "mask_std",
    "train_cross_entropy",
    "advantage_std",
    "concentrations_at_bounds",
)
HEATED = ("val_top1", "val_f1")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table; all columns but the first `texts` are aligned to the right."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def _escape(cell: str) -> str:
    return printable(cell).replace("|", r"\|")


def results_table(plan: Plan, task: Task) -> str:
    """Mean and standard deviation over seeds of each arm's metrics; of hard classes apart where there are others."""
    shown = [name for name in METRICS if task.has_easy or not name.startswith("hard_")]
    rows = []
    for arm in plan.arms:
        found = [tested.metrics for (name, _), tested in task.runs.items() if name == arm.name]
        if found:
            cells = [_mean_and_deviation([metrics[name] for metrics in found], name) for name in shown]
            rows.append([arm.name, str(len(found)), *cells])
    return markdown(["arm", "seeds", *(TITLES[name] for name in shown)], rows)


def _mean_and_deviation(values: list[float], name: str) -> str:
    """ "64.12 ± 0.53" percent, or ".9876 ± .0012" of an AUROC; a dash for what is undefined."""
    mean = float(np.mean(values))
    if math.isnan(mean):
        return NONE
    deviation = _metric(float(np.std(values, ddof=1)), name) if len(values) > 1 else NONE
    return f"{_metric(mean, name)} ± {deviation}"


def _metric(value: float, name: str) -> str:
    return f"{value:.4f}".removeprefix("0") if name.endswith("auroc") else f"{100 * value:.2f}"


def differences_table(task: Task, found: list[Comparison]) -> str:
    """Of this task's comparisons with the baseline."""
    level = f"{LEVEL:.0%}".replace("%", " %")
    header = ["metric", "arm", "seeds", "difference", f"{level} over seeds (t)", f"{level} bootstrap", "d_z",
              "seeds for 1 point", "p"]  # fmt: skip
    of_task = [one for one in found if one.task == task.name]
    rows = [
        [
            TITLES[one.metric],
            one.arm,
            str(len(one.seeds)),
            _points(one.differences.mean()),
            _interval(one.t),
            _interval(one.interval),
            NONE if one.effect is None else _signed(one.effect),
            NONE if one.needed is None else str(one.needed),
            NONE if one.p is None else f"{one.p:.2g} ({'primary' if one.primary else 'secondary'})",
        ]
        for metric in COMPARED
        for one in of_task
        if one.metric == metric
    ]
    return markdown(header, rows, texts=2)


def _points(difference: float) -> str:
    return _signed(difference / POINT)


def _signed(value: float) -> str:
    """With two decimals, and no -0.00."""
    return f"{round(value, 2) + 0.0:+.2f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return NONE if interval is None else " to ".join(_points(end) for end in interval)


def policy_log(plan: Plan, runs: Runs, of: tuple[str, int]) -> list[dict]:
    """The lines of the stages of a run that train a policy or a control of one, one stage after the other."""
    stages = [stage for arm in plan.arms if arm.name == of[0] for stage in arm.stages]
    return [line for stage in stages if stage.script == POLICY for line in runs[of].stages[stage.name].log]


def health_table(plan: Plan, runs: Runs) -> str:
    """First and last epoch of what the log tells of the policy, means over seeds, one column an arm; "" without any."""
    logs = {arm.name: [log for of in runs if of[0] == arm.name and (log := policy_log(plan, runs, of))]
            for arm in plan.arms}  # fmt: skip
    logs = {arm: of_arm for arm, of_arm in logs.items() if of_arm}
    rows = [
        [f"`{key}`", *(f"{_over_seeds(of, key, 0)} → {_over_seeds(of, key, -1)}" for of in logs.values())]
        for key in HEALTH
    ]
    rows += [[f"`{key}`, last epoch", *(_over_seeds(of, key, -1) for of in logs.values())] for key in HEATED]
    rows = [[row[0], *(NONE if cell == f"{NONE} → {NONE}" else cell for cell in row[1:])] for row in rows]
    return markdown(["", *logs], rows) if logs else ""


def _over_seeds(logs: list[list[dict]], key: str, epoch: int) -> str:
    values = [log[epoch].get(key) for log in logs]
    if None in values:
        return NONE
    return f"{float(np.mean(values)):.4f}"


def p_value_note(plan: Plan, tasks: list[str], found: list[Comparison]) -> str:
    """What p-values there are, or why there are none, in sentences."""
    notes = []
    few = sorted({len(one.seeds) for one in found if len(one.seeds) < SEEDS_FOR_P})
    if few:
        least = ", ".join(f"{2.0 ** (1 - n):.2g} with {n}" for n in few)
        notes.append(
            f"With fewer than {SEEDS_FOR_P} seeds no p is given: the exact test of n seeds cannot give one below "
            f"2^(1-n), {least}."
        )
    if any(one.p is not None for one in found):
        notes.append("p: exact two-sided paired sign-flip test of the mean difference over seeds, of hard macro F1 "
                     "(macro F1 in a task of one kind of classes).")  # fmt: skip
    if any(one.primary for one in found):
        notes.append(f"Primary: {plan.primary} in {tasks[0]}, named before the runs, not adjusted.")
    secondary = [one for one in found if one.p is not None and not one.primary]
    if secondary:
        tests = f"{len(secondary)} {'test' if len(secondary) == 1 else 'tests'}"
        least = min(1.0, len(secondary) * 2.0 ** (1 - max(len(one.seeds) for one in secondary)))
        notes.append(f"Secondary: Holm-adjusted for {tests}; the least p that so many seeds can give is {least:.2g}.")
    return " ".join(notes)
