"""The tables of an analysis, as GitHub Markdown."""

import math

import numpy as np

from experiments.differences import SEEDS_FOR_P, Comparison, contrasts, main_outcome, outcomes_compared, pairs
from experiments.false_claims import single_run_claims
from experiments.markdown import NONE, markdown
from experiments.outcomes import OUTCOMES
from experiments.plan import Plan
from experiments.run_results import POLICY_KEYS, Log, Run, RunKey
from experiments.tasks import Task, task_names
from utils.results.intervals import LEVEL

HEATED_KEYS = ("val_top1", "val_f1")  # of log.jsonl, shown for the last epoch
PERCENT = f"{100 * LEVEL:.0f} %"


def results_table(plan: Plan, task: Task) -> str:
    """Mean and standard deviation of each arm's outcomes over the seeds that all of them have, or else over its own.

    Other seeds have other images, so that means over different seeds cannot be compared. Hard classes separately if
    there are others.
    """
    names = list(dict.fromkeys((*outcomes_compared(plan, task), *OUTCOMES)))
    names = [name for name in names if task.has_easy or not name.startswith("hard_")]
    seeds = {arm: {seed for name, seed in task.runs if name == arm} for arm, _ in task.runs}
    shared, rows = set.intersection(*seeds.values()), []
    for arm in plan.arms:
        if arm.name in seeds:
            tests = [task.runs[arm.name, seed].metrics for seed in sorted(shared or seeds[arm.name])]
            cells = [_mean_and_deviation([metrics[name] for metrics in tests], name) for name in names]
            rows.append([arm.name, str(len(tests)), *cells])
    return markdown(["arm", "seeds", *(OUTCOMES[name].title for name in names)], rows)


def _mean_and_deviation(values: list[float], name: str) -> str:
    """ "64.12 ± 0.53" percent, or ".9876 ± .0012" for others; a dash if undefined."""
    mean = float(np.mean(values))
    if math.isnan(mean):
        return NONE
    deviation = _value(float(np.std(values, ddof=1)), name) if len(values) > 1 else NONE
    return f"{_value(mean, name)} ± {deviation}"


def _value(value: float, name: str) -> str:
    scale = OUTCOMES[name].scale
    return f"{scale * value:.2f}" if scale == 100 else f"{value:.4f}".removeprefix("0")


def primary_table(comparisons: list[Comparison]) -> str:
    """The tests that were fixed before the runs; "" if there are none."""
    rows = [
        [comparison.question, *_difference_cells(comparison), NONE if comparison.p is None else f"{comparison.p:.2g}"]
        for comparison in comparisons
        if comparison.question
    ]
    return markdown(["question", *DIFFERENCE_HEADER, "p (Holm)"], rows, texts=4) if rows else ""


def differences_table(task: Task, comparisons: list[Comparison]) -> str:
    """The comparisons of a task, by outcome, then in the plan's order; without what the primary table shows."""
    rows = [
        _difference_cells(comparison, bootstrap=task.shared)
        for comparison in comparisons
        if comparison.task == task.name and not comparison.question
    ]
    header = list(DIFFERENCE_HEADER)
    if task.shared:
        header.insert(AFTER_T, f"{PERCENT} bootstrap")
    return markdown(header, rows, texts=3) if rows else ""


DIFFERENCE_HEADER = (
    *("outcome", "arm", "control", "seeds", "improvement", f"{PERCENT} over seeds (t)"),
    *("d_z", "P(better)", f"{PERCENT} (Wilson)", "seeds for .01"),
)
AFTER_T = DIFFERENCE_HEADER.index("d_z")


def _difference_cells(comparison: Comparison, bootstrap: bool = False) -> list[str]:
    outcome = OUTCOMES[comparison.outcome]
    probability, lower, upper = comparison.better
    cells = [
        f"{outcome.title} ({outcome.unit})",
        comparison.arm,
        comparison.control,
        str(len(comparison.differences)),
        _difference(comparison.differences.mean(), comparison.outcome),
        _interval(comparison.t, comparison.outcome),
        NONE if comparison.effect is None else f"{_no_minus_zero(comparison.effect, 2):+.2f}",
        _fraction(probability),
        f"{_fraction(lower)} to {_fraction(upper)}",
        NONE if comparison.needed is None else f"{comparison.needed:,}",
    ]
    if bootstrap:
        cells.insert(AFTER_T, _interval(comparison.interval, comparison.outcome))
    return cells


def _difference(value: float, name: str) -> str:
    """In the outcome's unit, with two decimals, or four where it is not in points."""
    scale = OUTCOMES[name].scale
    digits = 2 if scale == 100 else 4
    return f"{_no_minus_zero(scale * value, digits):+.{digits}f}"


def _no_minus_zero(value: float, digits: int) -> float:
    return round(value, digits) + 0.0


def _interval(interval: tuple[float, float] | None, name: str) -> str:
    return NONE if interval is None else " to ".join(_difference(end, name) for end in interval)


def _fraction(value: float) -> str:
    """ ".75", or "1.00"."""
    return f"{value:.2f}".removeprefix("0")


def claims_table(plan: Plan, task: Task) -> str:
    """What a single run of each arm and its control would claim in top-1, over the seeds that both have."""
    rows = []
    for contrast in contrasts(plan):
        claims, differences = [], []
        for run, base in pairs(plan, task, contrast):
            a, b = task.runs[run], task.runs[base]
            claims += [single_run_claims(a.targets, *both) for both in zip(a.predictions, b.predictions, strict=True)]
            differences.append(a.metrics["top1"] - b.metrics["top1"])
        if claims:
            winners, probabilities, congruences = (np.array(column) for column in zip(*claims, strict=True))
            firm = probabilities < 1 - LEVEL
            refuted = firm & (winners * np.mean(differences) < 0)
            rows.append(
                [
                    contrast.arm,
                    contrast.control,
                    f"{np.mean(congruences):.3f}".removeprefix("0"),
                    f"{np.sum(winners > 0)} of {len(claims)}",
                    _fraction(median) if (median := float(np.median(probabilities))) >= 0.005 else "< .01",
                    f"{firm.sum()} of {len(claims)}",
                    f"{refuted.sum()} of {firm.sum()}",
                ]
            )
    header = ["arm", "control", "congruence", "arm ahead", "P(false claim)", "firm", "refuted"]
    return markdown(header, rows, texts=2) if rows else ""


def health_table(plan: Plan, runs: dict[RunKey, Run]) -> str:
    """First and last epoch of the policy's quantities in the log, means over seeds, one row per arm; "" if none.

    Without quantities that no arm has.
    """
    scripts = {(arm.name, stage.name): stage.script for arm in plan.arms for stage in arm.stages}
    logs: dict[str, list[Log]] = {}  # by arm, the log lines of each seed's stages that train a policy
    for (arm, _), run in runs.items():
        stages = [log for name, log in run.logs.items() if scripts[arm, name] == "_policy_gradient"]
        if log := [line for stage in stages for line in stage]:
            logs.setdefault(arm, []).append(log)
    columns = {}
    for name in POLICY_KEYS:
        ends = [(_over_seeds(seeds, name, 0), _over_seeds(seeds, name, -1)) for seeds in logs.values()]
        columns[f"`{name}`"] = [NONE if first == last == NONE else f"{first} → {last}" for first, last in ends]
    for name in HEATED_KEYS:
        columns[f"`{name}`, last epoch"] = [_over_seeds(seeds, name, -1) for seeds in logs.values()]
    columns = {name: cells for name, cells in columns.items() if set(cells) != {NONE}}
    if not logs or not columns:
        return ""
    return markdown(["arm", *columns], [list(row) for row in zip(logs, *columns.values(), strict=True)])


def _over_seeds(logs: list[Log], name: str, epoch: int) -> str:
    values = [log[epoch].get(name) for log in logs]
    return NONE if None in values else f"{float(np.mean(values)):.4f}"


def test_note(plan: Plan, tasks: list[Task], comparisons: list[Comparison]) -> str:
    """How p was computed, or why there is none."""
    primary = [comparison for comparison in comparisons if comparison.question]
    if not primary:
        return ""
    task = next(task for task in tasks if task.name == task_names(plan)[0])
    outcome = OUTCOMES[main_outcome(plan, task)].title
    text = (
        f"Fixed before the runs, in the outcome {outcome}. p: two-sided paired sign-flip test of the mean difference "
        "over seeds, adjusted for the number of questions (Holm)."
    )
    few = [len(comparison.differences) for comparison in primary if comparison.p is None]
    if few:
        least = ", ".join(f"{2.0 ** (1 - n):.2g} with {n}" for n in sorted(set(few)))
        text += (
            f" With fewer than {SEEDS_FOR_P} seeds no p is given: the test of n seeds cannot give one below 2^(1-n), "
            f"{least}."
        )
    return text
