"""Paired differences of each arm to the baseline, by task, with intervals, effect sizes and tests."""

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
from experiments.finished import RunKey, Task, task_names
from experiments.plan import Plan
from utils.runtime.errors import UserError

COMPARED = ("hard_f1", "f1", "balanced_accuracy", "top1")
SEEDS_FOR_P = 8
POINT = 0.01


class Comparison(NamedTuple):
    """One arm minus the baseline in one task and metric, over the seeds that both have. Fractions, not points.

    differences: (n,), one per seed; interval: bootstrap over seeds and test images; t: t-interval over seeds; effect:
    d_z; needed: seeds to detect one point; t, effect and needed are None if too few seeds show their spread; p: None
    with fewer than SEEDS_FOR_P seeds, and for metrics without a test; primary: whether p belongs to the test that was
    fixed before the runs, and is not adjusted.
    """

    task: str
    metric: str
    arm: str
    differences: np.ndarray
    interval: tuple[float, float]
    t: tuple[float, float] | None
    effect: float | None
    needed: int | None
    p: float | None
    primary: bool


def tested_metric(task: Task) -> str:
    """The metric that p-values are computed for: macro F1 of the hard classes."""
    return "hard_f1" if task.has_easy else "f1"


def compare(plan: Plan, tasks: list[Task], resamples: int) -> list[Comparison]:
    """Comparisons by task, metric and arm, without arms that have no seed in common with the baseline.

    Raises UserError if no run of the baseline has finished.
    """
    if not any(arm == plan.baseline for task in tasks for arm, _ in task.runs):
        raise UserError(f"no run of the baseline {plan.baseline!r} has finished and was tested. Run it first.")
    comparisons = []
    for task in tasks:
        resampled = _resample(task, resamples)
        for metric in COMPARED:
            for arm in plan.arms:
                pairs = [((arm.name, seed), (plan.baseline, seed)) for seed in arm.all_seeds]
                pairs = [pair for pair in pairs if task.runs.keys() >= set(pair)]
                if pairs and arm.name != plan.baseline and (task.has_easy or not metric.startswith("hard_")):
                    comparisons.append(_comparison(plan, task, metric, pairs, resampled))
    secondary = [index for index, row in enumerate(comparisons) if row.p is not None and not row.primary]
    for index, p in zip(secondary, holm([comparisons[index].p for index in secondary]), strict=True):
        comparisons[index] = comparisons[index]._replace(p=p)
    return comparisons


def _comparison(
    plan: Plan, task: Task, metric: str, pairs: list[tuple[RunKey, RunKey]], resampled: dict[RunKey, np.ndarray]
) -> Comparison:
    """pairs: a run of the arm and one of the baseline for each seed; p is not adjusted yet."""
    arm, column = pairs[0][0][0], SCORES.index(metric)
    differences = np.array([task.runs[run].metrics[metric] - task.runs[base].metrics[metric] for run, base in pairs])
    resampled_differences = [resampled[run][:, column] - resampled[base][:, column] for run, base in pairs]
    has_p = metric == tested_metric(task) and len(pairs) >= SEEDS_FOR_P
    return Comparison(
        task.name,
        metric,
        arm,
        differences,
        hierarchical_interval(np.stack(resampled_differences, axis=1)),
        t_interval(differences),
        effect_size(differences),
        seeds_needed(differences, POINT),
        sign_flip_p(differences) if has_p else None,
        primary=has_p and task.name == task_names(plan)[0] and arm in {contrast.arm for contrast in plan.primary},
    )


def _resample(task: Task, resamples: int) -> dict[RunKey, np.ndarray]:
    """The scores of each run, (resamples, 6), means over its draws, on the same resamples of the test images."""
    stacked = np.concatenate([tested.predictions for tested in task.runs.values()])
    values = bootstrap_scores(task.targets, stacked, task.hard, resamples)  # (resamples, rows, 6)
    ends = np.cumsum([len(tested.predictions) for tested in task.runs.values()])[:-1]
    return {key: rows.mean(1) for key, rows in zip(task.runs, np.split(values, ends, axis=1), strict=True)}
