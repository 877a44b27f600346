"""The tasks of a plan: the metrics of each run on their test images."""

from typing import NamedTuple

import numpy as np

from experiments.comparisons import SCORES, scores
from experiments.plan import Plan, matches
from experiments.run_results import Predictions, Run, RunKey
from utils.results.metrics import Outcome, calibration_metrics
from utils.runtime.errors import UserError

Runs = dict[RunKey, Run]


class Tested(NamedTuple):
    """Results of a run in a task.

    targets: (N,); predictions: (draws, N) class numbers and losses: (draws, N), nats, one row for each stage that
    belongs to the task; metrics: by the names in OUTCOMES, means over the draws, NaN where undefined.
    """

    targets: np.ndarray
    predictions: np.ndarray
    losses: np.ndarray
    metrics: dict[str, float]


class Task(NamedTuple):
    """The results of a task.

    classes: C names; hard: (C,) bool, the plan's hard classes, or all classes if none of them occurs; shared: whether
    all seeds have the same test images; otherwise each seed has its own, the same for all arms.
    """

    name: str
    classes: tuple[str, ...]
    hard: np.ndarray
    shared: bool
    runs: dict[RunKey, Tested]

    @property
    def has_easy(self) -> bool:
        """Whether some classes are not hard. Otherwise the metrics of hard classes are those of all classes."""
        return not self.hard.all()


def task_names(plan: Plan) -> list[str]:
    """The tasks, in the order in which the plan first names them."""
    return list(dict.fromkeys(stage.test for arm in plan.arms for stage in arm.stages if stage.test is not None))


def read_tasks(plan: Plan, runs: Runs) -> list[Task]:
    """The tasks with test results, in the plan's order.

    Raises UserError if two runs that are compared saw different test images.
    """
    names = task_names(plan)
    tasks = [task for name in names if (task := _read_task(plan, runs, name)) is not None]
    if not tasks:
        raise UserError(f"the plan {plan.name!r}: none of its finished runs was tested. Give stages a `test`.")
    hard_classes_exist = any(matches(name, plan.hard) for task in tasks for name in task.classes)
    if plan.hard and len(tasks) == len(names) and not hard_classes_exist:
        raise UserError(f"the plan {plan.name!r}: hard={plan.hard!r} matches no class of any task. Fix the patterns.")
    return tasks


def _read_task(plan: Plan, runs: Runs, name: str) -> Task | None:
    """None if no finished run was tested in the task."""
    tests = {key: run.tests[name] for key, run in runs.items() if name in run.tests}
    if not tests:
        return None
    shared = not _drawn_by_seed(plan, name)
    first = next(iter(tests))
    first_of_seed: dict[int, RunKey] = {}
    for key, draws in tests.items():
        other = first if shared else first_of_seed.setdefault(key[1], key)
        images = tests[other][0].images
        same_classes = images.classes == tests[first][0].images.classes
        if not same_classes or any(draw.images.digest != images.digest for draw in draws):
            raise UserError(
                f"{_described(first if not same_classes else other)} and {_described(key)}: were tested on different "
                f"images or classes, and cannot be compared. Test both on the same data for the task {name!r}."
            )
    classes = tests[first][0].images.classes
    hard = np.array([matches(name, plan.hard) for name in classes])
    hard = hard if hard.any() else ~hard
    return Task(name, classes, hard, shared, {key: _tested(draws, hard) for key, draws in tests.items()})


def _drawn_by_seed(plan: Plan, task: str) -> bool:
    """Whether each seed draws its own test images of a task."""
    subsets = [stage.subset for arm in plan.arms for stage in arm.stages if stage.test == task]
    return any(subset is not None and subset.test == "rest" and subset.draw == "seed" for subset in subsets)


def _described(key: RunKey) -> str:
    return f"{key[0]}, seed {key[1]}"


def _tested(draws: list[Predictions], hard: np.ndarray) -> Tested:
    targets = draws[0].images.targets
    predictions = np.stack([draw.predictions for draw in draws])
    losses = np.stack([draw.losses for draw in draws])
    values = dict(zip(SCORES, scores(targets, predictions, losses, hard).mean(0).tolist(), strict=True))
    values["ece"] = float(np.mean([_calibration_error(draw) for draw in draws]))
    values["auroc"] = float(np.mean([draw.auroc for draw in draws]))
    values["hard_auroc"] = float(np.mean([_mean_of_known(np.array(draw.class_aurocs)[hard]) for draw in draws]))
    return Tested(targets, predictions, losses, values)


def _calibration_error(draw: Predictions) -> float:
    targets, classes = draw.images.targets, len(draw.images.classes)
    ranks = np.ones_like(targets)  # not used
    return calibration_metrics(Outcome(targets, draw.predictions, ranks, draw.losses, classes, draw.confidences))["ece"]


def _mean_of_known(values: np.ndarray) -> float:
    """NaN if no value is known, as in tables of older versions."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
