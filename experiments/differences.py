"""Paired differences of each arm to its control, by task and outcome, with intervals, effect sizes and tests."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.comparisons import (
    SCORES,
    bootstrap_scores,
    effect_size,
    hierarchical_interval,
    holm,
    probability_of_better,
    seeds_needed,
    sign_flip_p,
)
from experiments.outcomes import OUTCOMES
from experiments.plan import Contrast, Plan
from experiments.run_results import RunKey
from experiments.tasks import Task, task_names
from utils.results.intervals import t_interval

COMPARED = ("balanced_loss", "hard_f1", "f1", "balanced_accuracy", "top1", "ece")
SEEDS_FOR_P = 8
SMALL = 0.01  # one point, or .01 nats: the difference for which `needed` is


class Comparison(NamedTuple):
    """One arm and its control in one task and outcome, over the seeds that both have. Fractions, not points.

    question: name of the primary contrast, "" for an exploratory comparison; differences: (n,), one per seed, positive
    where the arm is better, also in outcomes where lower is better; interval: bootstrap over seeds and test images,
    None where each seed has its own images, and for ECE; t: t-interval over seeds; effect: d_z; needed: seeds to detect
    a difference of SMALL; t, effect and needed are None if too few seeds show their spread; better: probability that a
    new replicate of the arm beats its control's, lower and upper bound; p: of the primary tests, adjusted for their
    number (Holm), otherwise None, also with fewer than SEEDS_FOR_P seeds.
    """

    task: str
    outcome: str
    arm: str
    control: str
    question: str
    differences: np.ndarray
    interval: tuple[float, float] | None
    t: tuple[float, float] | None
    effect: float | None
    needed: int | None
    better: tuple[float, float, float]
    p: float | None


def main_outcome(plan: Plan, task: Task) -> str:
    """The outcome that the tests are made in; that of all classes where all are hard."""
    return plan.outcome if task.has_easy else plan.outcome.removeprefix("hard_")


def outcomes_compared(plan: Plan, task: Task) -> list[str]:
    """The main outcome first."""
    names = [name for name in COMPARED if task.has_easy or not name.startswith("hard_")]
    return list(dict.fromkeys((main_outcome(plan, task), *names)))


def contrasts(plan: Plan) -> Iterator[Contrast]:
    """The primary contrasts, then each arm with its control as far as that is none of them, with an empty name."""
    yield from plan.primary
    primary = {(contrast.arm, contrast.control) for contrast in plan.primary}
    for arm in plan.arms:
        control = arm.control or plan.baseline
        if arm.name != control and (arm.name, control) not in primary:
            yield Contrast("", arm.name, control)


def pairs(plan: Plan, task: Task, contrast: Contrast) -> list[tuple[RunKey, RunKey]]:
    """A run of the arm and one of its control for each seed that both have."""
    seeds = next(arm.all_seeds for arm in plan.arms if arm.name == contrast.arm)
    both = [((contrast.arm, seed), (contrast.control, seed)) for seed in seeds]
    return [pair for pair in both if task.runs.keys() >= set(pair)]


def compare(plan: Plan, tasks: list[Task], resamples: int) -> list[Comparison]:
    """Comparisons by task, outcome and arm, without arms that have no seed in common with their control.

    p is adjusted for all primary contrasts, also for those that have too few seeds yet.
    """
    comparisons = []
    for task in tasks:
        matched = [(contrast, both) for contrast in contrasts(plan) if (both := pairs(plan, task, contrast))]
        resampled = _resample(task, resamples) if matched and task.shared else {}
        for outcome in outcomes_compared(plan, task):
            for contrast, both in matched:
                comparisons.append(_comparison(plan, task, outcome, contrast, both, resampled))
    primary = [index for index, row in enumerate(comparisons) if row.p is not None]
    known = [comparisons[index].p for index in primary]
    untested = [1.0] * (len(plan.primary) - len(known))
    for index, p in zip(primary, holm([*known, *untested]), strict=False):
        comparisons[index] = comparisons[index]._replace(p=p)
    return comparisons


def _comparison(
    plan: Plan,
    task: Task,
    outcome: str,
    contrast: Contrast,
    both: list[tuple[RunKey, RunKey]],
    resampled: dict[RunKey, np.ndarray],
) -> Comparison:
    """p is not adjusted yet."""
    sign, runs = OUTCOMES[outcome].sign, task.runs
    differences = sign * np.array([runs[run].metrics[outcome] - runs[base].metrics[outcome] for run, base in both])
    interval = None
    if resampled and outcome in SCORES:
        column = SCORES.index(outcome)
        columns = [sign * (resampled[run][:, column] - resampled[base][:, column]) for run, base in both]
        interval = hierarchical_interval(np.stack(columns, axis=1))
    question = contrast.name if task.name == task_names(plan)[0] and outcome == main_outcome(plan, task) else ""
    return Comparison(
        task.name,
        outcome,
        contrast.arm,
        contrast.control,
        question,
        differences,
        interval,
        t_interval(differences),
        effect_size(differences),
        seeds_needed(differences, SMALL),
        probability_of_better(differences),
        sign_flip_p(differences) if question and len(both) >= SEEDS_FOR_P else None,
    )


def _resample(task: Task, resamples: int) -> dict[RunKey, np.ndarray]:
    """The scores of each run, (resamples, 7), means over its draws, on the same resamples of the test images."""
    tested = list(task.runs.values())
    predictions = np.concatenate([run.predictions for run in tested])
    losses = np.concatenate([run.losses for run in tested])
    values = bootstrap_scores(tested[0].targets, predictions, losses, task.hard, resamples)  # (resamples, rows, 7)
    ends = np.cumsum([len(run.predictions) for run in tested])[:-1]
    return {key: rows.mean(1) for key, rows in zip(task.runs, np.split(values, ends, axis=1), strict=True)}
