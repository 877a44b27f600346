"""Paired differences of each arm to the baseline, task by task, with intervals, effect sizes and tests."""

from typing import NamedTuple

import numpy as np

from experiments.comparisons import (
    SCORES,
    bootstrap_scores,
    effect_size,
    hierarchical_interval,
    holm,
    seeds_needed,
    sign_flip_p,
    t_interval,
)
from experiments.plan import Plan
from experiments.results import Task, task_names
from utils.runtime.errors import UserError

COMPARED = ("hard_f1", "f1", "balanced_accuracy", "top1")
SEEDS_FOR_P = 8
POINT = 0.01
Resamples = dict[tuple[str, int], np.ndarray]  # by arm and seed, (resamples, 6)


class Comparison(NamedTuple):
    """One arm less the baseline in one task and metric, of the seeds that both have. All as fractions, not points.

    differences: (n,), one for each of `seeds`; interval: of the bootstrap over seeds and test images; t: over seeds;
    effect: d_z; needed: seeds to see one point; all three None where too few seeds tell nothing of their spread. p:
    None with fewer than 8 seeds, and of metrics that are not tested; primary: it is of the test that was named before
    the runs, and not adjusted.
    """

    task: str
    metric: str
    arm: str
    seeds: list[int]
    differences: np.ndarray
    interval: tuple[float, float]
    t: tuple[float, float] | None
    effect: float | None
    needed: int | None
    p: float | None = None
    primary: bool = False


def tested_metric(task: Task) -> str:
    """The one that p-values are of: macro F1 of the hard classes."""
    return "hard_f1" if task.has_easy else "f1"


def compare(plan: Plan, tasks: list[Task], resamples: int) -> list[Comparison]:
    """Task by task, metric by metric, arm by arm; none where no seed is there of both an arm and the baseline.

    Raises UserError if no run of the baseline has finished.
    """
    if not any(arm == plan.baseline for task in tasks for arm, _ in task.runs):
        raise UserError(f"no run of the baseline {plan.baseline!r} has finished and was tested; run it first.")
    found = [one for task in tasks for one in _compare_in(plan, task, resamples)]
    tested = {task.name: tested_metric(task) for task in tasks}
    testable = [n for n, one in enumerate(found) if one.metric == tested[one.task] and len(one.seeds) >= SEEDS_FOR_P]
    p_values = {n: sign_flip_p(found[n].differences) for n in testable}
    primary = [n for n in testable if (found[n].task, found[n].arm) == (task_names(plan)[0], plan.primary)]
    secondary = [n for n in testable if n not in primary]
    p_values |= dict(zip(secondary, holm([p_values[n] for n in secondary]), strict=True))
    return [one._replace(p=p_values.get(n), primary=n in primary) for n, one in enumerate(found)]


def _compare_in(plan: Plan, task: Task, resamples: int) -> list[Comparison]:
    resampled = _resample(task, resamples)
    seeds_of = {
        arm.name: [seed for seed in range(arm.seeds) if {(arm.name, seed), (plan.baseline, seed)} <= task.runs.keys()]
        for arm in plan.arms
        if arm.name != plan.baseline
    }
    return [
        _comparison(task, metric, arm, plan.baseline, seeds, resampled)
        for metric in COMPARED
        if task.has_easy or not metric.startswith("hard_")
        for arm, seeds in seeds_of.items()
        if seeds
    ]


def _comparison(task: Task, metric: str, arm: str, baseline: str, seeds: list[int], resampled: Resamples) -> Comparison:
    column = SCORES.index(metric)
    differences = np.array(
        [task.runs[arm, seed].metrics[metric] - task.runs[baseline, seed].metrics[metric] for seed in seeds]
    )
    of_resamples = [resampled[arm, seed][:, column] - resampled[baseline, seed][:, column] for seed in seeds]
    return Comparison(
        task.name,
        metric,
        arm,
        seeds,
        differences,
        hierarchical_interval(np.stack(of_resamples, axis=1)),
        t_interval(differences),
        effect_size(differences),
        seeds_needed(differences, POINT),
    )


def _resample(task: Task, resamples: int) -> Resamples:
    """The scores of each run, means over its draws, on the same resamples of the test images for all."""
    stacked = np.concatenate([tested.predictions for tested in task.runs.values()])
    values = bootstrap_scores(task.targets, stacked, task.hard, resamples)  # (resamples, rows, 6)
    ends = np.cumsum([len(tested.predictions) for tested in task.runs.values()])[:-1]
    return {of: rows.mean(1) for of, rows in zip(task.runs, np.split(values, ends, axis=1), strict=True)}
