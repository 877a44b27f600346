"""Reads the finished runs of a plan: logs, origins, and the predictions for the test images of each task."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.comparisons import SCORES, scores
from experiments.plan import FINISHED, PROBE, Plan, Stage, folder_of_run, matches, read_record
from utils.results.run_folder import Evaluation, RunFolder, read_run_folder, read_table
from utils.runtime.errors import UserError

CLEAN = "clean"
METRICS = {  # by name, their titles
    "top1": "top-1",
    "balanced_accuracy": "balanced accuracy",
    "f1": "macro F1",
    "auroc": "AUROC",
    "hard_top1": "hard: top-1",
    "hard_balanced_accuracy": "hard: balanced accuracy",
    "hard_f1": "hard: macro F1",
    "hard_auroc": "hard: AUROC",
}

RunKey = tuple[str, int]  # arm and seed


class Run(NamedTuple):
    """A finished run. stages: its trainings by name, in the plan's order; seconds: duration of all its commands."""

    folder: Path
    stages: dict[str, RunFolder]
    seconds: float


Runs = dict[RunKey, Run]  # in the plan's order


class Tested(NamedTuple):
    """Results of a run in a task.

    predictions: (draws, N) class numbers, one row for each stage that belongs to the task; metrics: by the names in
    METRICS, means over the draws, in [0, 1], NaN where undefined.
    """

    predictions: np.ndarray
    metrics: dict[str, float]


class Task(NamedTuple):
    """The test images of a task, the same for all runs.

    classes: C names; hard: (C,) bool, the plan's hard classes, or all classes if none of them occurs; targets: (N,).
    """

    name: str
    classes: list[str]
    hard: np.ndarray
    targets: np.ndarray
    runs: dict[RunKey, Tested]

    @property
    def has_easy(self) -> bool:
        """Whether some classes are not hard. Otherwise the metrics of hard classes are those of all classes."""
        return not self.hard.all()


def read_runs(plan: Plan, results: Path) -> Runs:
    """The finished runs of the plan.

    Raises UserError if there is none, for a damaged file, and for a run with other stages than the plan's.
    """
    if not results.is_dir():
        raise UserError(f"{results}: no such folder. Expected the output folder of experiments/run.py.")
    runs = {}
    for arm in plan.arms:
        for seed in arm.all_seeds:
            folder = folder_of_run(results, arm.name, seed)
            if record := read_record(folder / FINISHED, arm):
                trainings = [stage for stage in arm.stages if stage.script != PROBE]
                stages = {stage.name: _read_stage(folder / stage.name, stage) for stage in trainings}
                runs[arm.name, seed] = Run(folder, stages, record["seconds"])
    if not runs:
        raise UserError(f"{results}: no run of the plan {plan.name!r} has finished yet (no {FINISHED}).")
    return runs


def _read_stage(folder: Path, stage: Stage) -> RunFolder:
    content = read_run_folder(folder)
    if content.notes:
        raise UserError(content.notes[0])
    if stage.test is not None and CLEAN not in content.evaluations:
        raise UserError(f"{folder}: the run has finished, but has no test results. Run this seed of the arm again.")
    return content


def task_names(plan: Plan) -> list[str]:
    """The tasks, in the order in which the plan first names them."""
    return list(dict.fromkeys(stage.test for arm in plan.arms for stage in arm.stages if stage.test is not None))


def read_tasks(plan: Plan, runs: Runs) -> list[Task]:
    """The tasks with test results, in the plan's order. Raises UserError if two runs saw different test images."""
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
    stages = {arm.name: [stage.name for stage in arm.stages if stage.test == name] for arm in plan.arms}
    draws = {key: [run.stages[stage] for stage in stages[key[0]]] for key, run in runs.items() if stages[key[0]]}
    if not draws:
        return None
    first, *others = (folder for folders in draws.values() for folder in folders)
    images = _images(first)
    for folder in others:
        if _images(folder) != images:
            raise UserError(
                f"{first.folder} and {folder.folder}: were tested on different images or classes, and cannot be "
                f"compared. Test both on the same data for the task {name!r}."
            )
    classes, targets = images[0], first.evaluations[CLEAN].outcome.targets
    hard = np.array([matches(name, plan.hard) for name in classes])
    hard = hard if hard.any() else ~hard
    tested = {
        key: _tested(targets, hard, [folder.evaluations[CLEAN] for folder in folders]) for key, folders in draws.items()
    }
    return Task(name, classes, hard, targets, tested)


def _images(stage: RunFolder) -> tuple[list[str], list[tuple[str, str]]]:
    """The classes, and name and class of each test image in the order of predictions.csv."""
    rows = read_table(stage.folder / "predictions.csv", ("image", "target"))
    return [row["class"] for row in stage.evaluations[CLEAN].table], [(row["image"], row["target"]) for row in rows]


def _tested(targets: np.ndarray, hard: np.ndarray, draws: list[Evaluation]) -> Tested:
    predictions = np.stack([draw.outcome.predictions for draw in draws])
    values = dict(zip(SCORES, scores(targets, predictions, hard).mean(0).tolist(), strict=True))
    aurocs = [draw.metrics.get("auroc") for draw in draws]
    values["auroc"] = float(np.mean([np.nan if auroc is None else auroc for auroc in aurocs]))
    values["hard_auroc"] = float(np.mean([_hard_auroc(draw, hard) for draw in draws]))
    return Tested(predictions, values)


def _hard_auroc(draw: Evaluation, hard: np.ndarray) -> float:
    """Mean one-vs-rest AUROC of the hard classes that have one; NaN if none has, as in tables of older versions."""
    values = [row.get("auroc") for row, is_hard in zip(draw.table, hard, strict=True) if is_hard]
    return float(np.mean([float(value) for value in values if value] or [np.nan]))
