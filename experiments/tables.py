"""The tables of an analysis, as GitHub Markdown."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from experiments.differences import POINT, SEEDS_FOR_P, Comparison
from experiments.finished import METRICS, Runs, Task, task_names
from experiments.plan import Plan
from utils.results.metrics import LEVEL
from utils.runtime.text import printable

NONE = "\N{EN DASH}"
POLICY_KEYS = (  # keys of log.jsonl, shown for the first and last epoch
    "policy_entropy",
    "mask_std_between_images",
    "prior_drift",
    "mask_mean",
    "mask_std",
    "train_cross_entropy",
    "advantage_std",
    "concentrations_at_bounds",
)
HEATED_KEYS = ("val_top1", "val_f1")  # shown for the last epoch


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A table; all columns except the first `texts` are right-aligned."""
    lines = [header, ["---"] * texts + ["---:"] * (len(header) - texts), *rows]
    cells = ([printable(cell).replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def results_table(plan: Plan, task: Task) -> str:
    """Mean and standard deviation over seeds of each arm's metrics; hard classes separately if there are others."""
    names = [name for name in METRICS if task.has_easy or not name.startswith("hard_")]
    rows = []
    for arm in plan.arms:
        seeds = [tested.metrics for (name, _), tested in task.runs.items() if name == arm.name]
        if seeds:
            cells = [_mean_and_deviation([metrics[name] for metrics in seeds], name) for name in names]
            rows.append([arm.name, str(len(seeds)), *cells])
    return markdown(["arm", "seeds", *(METRICS[name] for name in names)], rows)


def _mean_and_deviation(values: list[float], name: str) -> str:
    """ "64.12 ± 0.53" percent, or ".9876 ± .0012" for an AUROC; a dash if undefined."""
    mean = float(np.mean(values))
    if math.isnan(mean):
        return NONE
    deviation = _metric(float(np.std(values, ddof=1)), name) if len(values) > 1 else NONE
    return f"{_metric(mean, name)} ± {deviation}"


def _metric(value: float, name: str) -> str:
    return f"{value:.4f}".removeprefix("0") if name.endswith("auroc") else f"{100 * value:.2f}"


def differences_table(task: Task, comparisons: list[Comparison]) -> str:
    """The comparisons of a task with the baseline."""
    level = f"{100 * LEVEL:.0f} %"
    header = ["metric", "arm", "seeds", "difference", f"{level} over seeds (t)", f"{level} bootstrap", "d_z"]
    header += ["seeds for 1 point", "p"]
    rows = [_difference_cells(comparison) for comparison in comparisons if comparison.task == task.name]
    return markdown(header, rows, texts=2)


def _difference_cells(comparison: Comparison) -> list[str]:
    effect, needed, p = comparison.effect, comparison.needed, comparison.p
    return [
        METRICS[comparison.metric],
        comparison.arm,
        str(len(comparison.differences)),
        _signed(comparison.differences.mean() / POINT),
        _interval(comparison.t),
        _interval(comparison.interval),
        NONE if effect is None else _signed(effect),
        NONE if needed is None else str(needed),
        NONE if p is None else f"{p:.2g} ({'primary' if comparison.primary else 'secondary'})",
    ]


def _signed(value: float) -> str:
    """With two decimals, and 0.00 instead of -0.00."""
    return f"{round(value, 2) + 0.0:+.2f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return NONE if interval is None else " to ".join(_signed(end / POINT) for end in interval)


def health_table(plan: Plan, runs: Runs) -> str:
    """First and last epoch of the policy's quantities in the log, means over seeds, one column per arm; "" if none."""
    scripts = {(arm.name, stage.name): stage.script for arm in plan.arms for stage in arm.stages}
    logs: dict[str, list[list[dict]]] = {}  # by arm, the log lines of each seed's stages that train a policy
    for (arm, _), run in runs.items():
        stages = [stage for name, stage in run.stages.items() if scripts[arm, name] == "_policy_gradient"]
        if log := [line for stage in stages for line in stage.log]:
            logs.setdefault(arm, []).append(log)
    if not logs:
        return ""
    rows = []
    for name in POLICY_KEYS:
        ends = [(_over_seeds(seeds, name, 0), _over_seeds(seeds, name, -1)) for seeds in logs.values()]
        cells = [NONE if first == last == NONE else f"{first} → {last}" for first, last in ends]
        rows.append([f"`{name}`", *cells])
    for name in HEATED_KEYS:
        rows.append([f"`{name}`, last epoch", *(_over_seeds(seeds, name, -1) for seeds in logs.values())])
    return markdown(["", *logs], rows)


def _over_seeds(logs: list[list[dict]], name: str, epoch: int) -> str:
    values = [log[epoch].get(name) for log in logs]
    return NONE if None in values else f"{float(np.mean(values)):.4f}"


def p_value_note(plan: Plan, comparisons: list[Comparison]) -> str:
    """Sentences that explain the p-values, or why there are none."""
    notes = []
    seeds = sorted({len(comparison.differences) for comparison in comparisons})
    few = [f"{2.0 ** (1 - n):.2g} with {n}" for n in seeds if n < SEEDS_FOR_P]
    if few:
        notes.append(
            f"With fewer than {SEEDS_FOR_P} seeds no p is given: the exact test of n seeds cannot give one below "
            f"2^(1-n), {', '.join(few)}."
        )
    tested = [comparison for comparison in comparisons if comparison.p is not None]
    if tested:
        notes.append(
            "p: exact two-sided paired sign-flip test of the mean difference over seeds, of hard macro F1 "
            "(macro F1 in a task of one kind of classes)."
        )
    if any(comparison.primary for comparison in tested):
        arms = ", ".join(contrast.arm for contrast in plan.primary)
        notes.append(f"Primary: {arms} in {task_names(plan)[0]}, named before the runs, not adjusted.")
    secondary = [comparison for comparison in tested if not comparison.primary]
    if secondary:
        tests = f"{len(secondary)} {'test' if len(secondary) == 1 else 'tests'}"
        most_seeds = max(len(comparison.differences) for comparison in secondary)
        least = min(1.0, len(secondary) * 2.0 ** (1 - most_seeds))
        notes.append(f"Secondary: Holm-adjusted for {tests}; the least p that so many seeds can give is {least:.2g}.")
    return " ".join(notes)
