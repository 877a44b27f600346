"""What the finished runs of a plan left: their logs and origins, and of each task what was predicted for its images."""

import math
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.comparisons import SCORES, scores
from experiments.plan import Arm, Plan, Stage, as_written, run_folder
from utils.results.run_folder import Evaluation, RunFolder, read_run_folder, read_table
from utils.runtime.errors import UserError
from utils.runtime.reading import read_json

FINISHED = "finished.json"
CLEAN = "clean"
METRICS = ("top1", "balanced_accuracy", "f1", "auroc", "hard_top1", "hard_balanced_accuracy", "hard_f1", "hard_auroc")


class Run(NamedTuple):
    """A finished run. stages: what each left, by name, in the plan's order; seconds: of all its commands."""

    folder: Path
    stages: dict[str, RunFolder]
    seconds: float


Runs = dict[tuple[str, int], Run]  # by arm and seed, in the plan's order


class Tested(NamedTuple):
    """What a run predicted in a task. predictions: (draws, N), classes by number, one row for each stage of the task.

    metrics: METRICS, means over the draws, in [0, 1]; NaN where undefined.
    """

    predictions: np.ndarray
    metrics: dict[str, float]


class Task(NamedTuple):
    """The test images of a task, the same for all runs. classes: C names; hard: (C,) bool; targets: (N,).

    hard: those of the plan; of a task that has none of them, all. runs: by arm and seed.
    """

    name: str
    classes: list[str]
    hard: np.ndarray
    targets: np.ndarray
    runs: dict[tuple[str, int], Tested]

    @property
    def has_easy(self) -> bool:
        """False where the hard classes are all there are, and their metrics those of all classes."""
        return not self.hard.all()


def read_runs(plan: Plan, results: Path) -> Runs:
    """The runs of the plan that have finished.

    Raises UserError if none has, for a file that is damaged, and for a run of other stages than the plan's.
    """
    if not results.is_dir():
        raise UserError(f"{results}: no such folder; expected what experiments/run.py wrote.")
    runs = {}
    for arm, seed in plan.runs():
        folder = run_folder(results, arm.name, seed)
        if (folder / FINISHED).is_file():
            seconds = _seconds(folder / FINISHED, arm)
            stages = {stage.name: _read_stage(folder / stage.name, stage) for stage in arm.stages}
            runs[arm.name, seed] = Run(folder, stages, seconds)
    if not runs:
        raise UserError(f"{results}: no run of the plan {plan.name!r} has finished yet ({FINISHED} is in none).")
    order = [arm.name for arm in plan.arms]
    return {of: runs[of] for of in sorted(runs, key=lambda of: (order.index(of[0]), of[1]))}


def _read_stage(folder: Path, stage: Stage) -> RunFolder:
    found = read_run_folder(folder)
    if found.notes:
        raise UserError(found.notes[0])
    if stage.test is not None and CLEAN not in found.evaluations:
        raise UserError(f"{folder}: the run has finished, but holds no test results; run this seed of the arm again.")
    return found


def _seconds(path: Path, arm: Arm) -> float:
    try:
        content = read_json(path)
        seconds, stages = float(content["seconds"]), content.get("stages", as_written(arm))
        if not 0 <= seconds < math.inf:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: expected the seconds that the run took; run this seed of the arm again.") from None
    if stages != as_written(arm):
        raise UserError(f"{path}: is of other stages than the plan says now; give the plan that was run.")
    return seconds


def task_names(plan: Plan) -> list[str]:
    """In the order in which the plan first names them."""
    return list(dict.fromkeys(stage.test for arm in plan.arms for stage in arm.stages if stage.test is not None))


def read_tasks(plan: Plan, runs: Runs) -> list[Task]:
    """The tasks that were tested, in the plan's order; raises UserError where two runs saw different test images."""
    names = task_names(plan)
    tasks = [task for name in names if (task := _read_task(plan, runs, name)) is not None]
    if not tasks:
        raise UserError(f"the plan {plan.name!r}: none of its finished runs was tested; give stages a `test`.")
    all_there = len(tasks) == len(names)
    if plan.hard and all_there and not any(_is_hard(plan, name) for task in tasks for name in task.classes):
        raise UserError(f"the plan {plan.name!r}: no class of any task is like hard={plan.hard!r}; mend the patterns.")
    return tasks


def _is_hard(plan: Plan, name: str) -> bool:
    return any(fnmatchcase(name, pattern.strip()) for pattern in plan.hard.split(","))


def _read_task(plan: Plan, runs: Runs, name: str) -> Task | None:
    """None if no finished run was tested in it."""
    tests = {arm.name: [stage.name for stage in arm.stages if stage.test == name] for arm in plan.arms}
    folders = {of: [run.stages[stage] for stage in tests[of[0]]] for of, run in runs.items() if tests[of[0]]}
    if not folders:
        return None
    first = next(iter(folders.values()))[0]
    images = _images(first)
    for draws in folders.values():
        for draw in draws:
            if _images(draw) != images:
                raise UserError(
                    f"{first.folder} and {draw.folder}: were tested on different images or classes, so that their "
                    f"difference says nothing of the arms; test both on the same data of task {name!r}."
                )
    evaluation = first.evaluations[CLEAN]
    classes, targets = [row["class"] for row in evaluation.table], evaluation.outcome.targets
    hard = np.array([_is_hard(plan, one) for one in classes])
    hard = hard if hard.any() else ~hard
    tested = {of: _tested(targets, hard, [draw.evaluations[CLEAN] for draw in draws]) for of, draws in folders.items()}
    return Task(name, classes, hard, targets, tested)


def _images(stage: RunFolder) -> tuple[list[str], list[tuple[str, str]]]:
    """The classes, and name and class of each test image, in the order of predictions.csv."""
    rows = read_table(stage.folder / "predictions.csv", ("image", "target"))
    return [row["class"] for row in stage.evaluations[CLEAN].table], [(row["image"], row["target"]) for row in rows]


def _tested(targets: np.ndarray, hard: np.ndarray, draws: list[Evaluation]) -> Tested:
    predictions = np.stack([draw.outcome.predictions for draw in draws])
    values = dict(zip(SCORES, scores(targets, predictions, hard).mean(0).tolist(), strict=True))
    values["auroc"] = float(np.mean([_number(draw.metrics.get("auroc")) for draw in draws]))
    values["hard_auroc"] = float(np.mean([_hard_auroc(draw, hard) for draw in draws]))
    return Tested(predictions, {name: values[name] for name in METRICS})


def _hard_auroc(draw: Evaluation, hard: np.ndarray) -> float:
    """Mean one-vs-rest AUROC of the hard classes that have one; NaN if none has, as in tables of older versions."""
    values = [row.get("auroc") for row, is_hard in zip(draw.table, hard, strict=True) if is_hard]
    return float(np.mean([float(value) for value in values if value] or [np.nan]))


def _number(value: float | None) -> float:
    return np.nan if value is None else value
