"""Plans: arms, each a chain of trainings with the two scripts, and how to compare them."""

import json
import math
import runpy
import shlex
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from experiments.outcomes import OUTCOMES
from utils.runtime.errors import UserError
from utils.runtime.reading import read_json

PROBE = "utils.probe"  # script of a stage that trains nothing
FINISHED = "finished.json"  # of a finished run: its stages, and the seconds that they took


@dataclass(frozen=True)
class Subset:
    """A part of the data.

    classes, without: shell patterns of classes to include and exclude, separated by commas; shots: images per class in
    `train`, None for all; draw: number of the random choice of these images, the same for all arms and seeds, or "seed"
    for one of each seed; test: "test", or "rest" for all images that are neither drawn nor in `val`, where images are
    drawn from `train` and `test` together.
    """

    classes: str = "*"
    without: str = ""
    shots: int | None = None
    draw: int | Literal["seed"] = 0
    test: Literal["test", "rest"] = "test"

    def of_seed(self, seed: int) -> "Subset":
        """The subset of a run with this seed."""
        return replace(self, draw=seed) if self.draw == "seed" else self

    @property
    def name(self) -> str:
        """A unique folder name, such as "us-breast-any-5-draw0"."""
        name = self.classes
        if self.without:
            name += f"-but-{self.without}"
        if self.shots is not None:
            name += f"-{self.shots}-draw{self.draw}"
        if self.test == "rest":
            name += "-rest"
        return name.replace("*", "any").replace(",", "+")


@dataclass(frozen=True)
class Stage:
    """One training, or the probes of a trained model, in the folder `name` of its run.

    script: _normal, _policy_gradient, or PROBE for `python -m utils.probe`, which writes probe.json and judges the
    features of the weights `start` on the classes of `subset`. flags: as typed. start: weights to fine-tune or to
    probe, relative to the run's folder. average: number of last epochs whose mean is written to average.pth, 0 for
    none. test: name of a task, for which model_best.pth (chosen on `val`) is evaluated on `test`. subset: part of the
    data, None for all. keep: further files of the stage's folder that remain once the stage is done, such as
    model_best.pth. Results of several stages with the same task, such as several draws of few images, are averaged.
    """

    name: str
    script: str
    flags: str
    start: str | None = None
    average: int = 0
    test: str | None = None
    subset: Subset | None = None
    keep: tuple[str, ...] = ()

    @property
    def epochs(self) -> int:
        """Number of epochs, from the flags."""
        words = shlex.split(self.flags)
        return int(words[words.index("--epochs") + 1])


@dataclass(frozen=True)
class Arm:
    """A variant to compare: stages one after the other, once for each of `seeds` seeds, from `first_seed` on.

    control: the arm that it is compared with; None for the plan's baseline.
    """

    name: str
    stages: tuple[Stage, ...]
    seeds: int
    first_seed: int = 0
    control: str | None = None

    @property
    def all_seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.seeds)


def heated_arm(name: str, pretraining: str, fine_tuning: str, seeds: int, task: str) -> Arm:
    """An arm that pretrains with masks, averages the last three epochs, fine-tunes without masks, and tests.

    pretraining, fine_tuning: flags of the two trainings.
    """
    stages = (
        Stage("pretraining", "_policy_gradient", pretraining, average=3),
        Stage("fine-tuning", "_normal", fine_tuning, start="pretraining/average.pth", test=task),
    )
    return Arm(name, stages, seeds)


@dataclass(frozen=True)
class Contrast:
    """A question that is answered by a test: is `arm` better than `control`?"""

    name: str
    arm: str
    control: str


@dataclass(frozen=True)
class Plan:
    """Arms, and how to compare them.

    baseline: the arm with which those are compared that name no control; primary: the contrasts whose tests were fixed
    before the runs, in the first task, none if everything is exploratory; outcome: what they are tested in, of
    OUTCOMES; hard: patterns of the classes that are also reported separately.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    baseline: str
    primary: tuple[Contrast, ...] = ()
    outcome: str = "hard_f1"
    hard: str = "mr-brain-*,us-breast-*"

    def against(self, name: str) -> "Plan":
        """The plan with this arm as the control of all others, and nothing primary. Raises UserError if it has none."""
        if name not in (arm.name for arm in self.arms):
            raise UserError(f"--against {name}: expected one of {', '.join(arm.name for arm in self.arms)}.")
        arms = tuple(replace(arm, control=None) for arm in self.arms)
        return replace(self, arms=arms, baseline=name, primary=())

    def runs(self) -> list[tuple[Arm, int]]:
        """Arm and seed of all runs: the primary contrasts first, then all arms of a seed before the next seed.

        If time runs out, the primary tests have their seeds, and the arms have about equally many.
        """
        first = {name for contrast in self.primary for name in (contrast.arm, contrast.control)}
        runs = [(arm, seed) for arm in self.arms for seed in arm.all_seeds]  # sorting leaves equal ones in this order
        return sorted(runs, key=lambda run: (run[0].name not in first, run[1]))


def matches(name: str, patterns: str) -> bool:
    """Whether a class matches one of the shell patterns, which are separated by commas."""
    return any(fnmatchcase(name, pattern.strip()) for pattern in patterns.split(","))


def folder_of_run(output: Path, arm: str, seed: int) -> Path:
    """The folder that holds a run's stages."""
    return output / arm / f"seed{seed}"


def as_written(arm: Arm) -> list[dict[str, Any]]:
    """The arm's stages in the form that JSON files hold."""
    stages = json.loads(json.dumps([asdict(stage) for stage in arm.stages]))
    for stage in stages:
        del stage["keep"]  # what stays of a run changes nothing in it
    return stages


def read_record(path: Path, arm: Arm) -> dict[str, Any] | None:
    """A run's finished.json or progress.json; None if there is none.

    Keys: "seconds"; "stages", absent from files of older versions; "done", the number of finished stages, in
    progress.json only.
    Raises UserError for a damaged file, and for a run with other stages than the arm's.
    """
    try:
        record = read_json(path)
        if not 0 <= record["seconds"] < math.inf or not isinstance(record.get("done", 0), int):
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged. Remove the run's folder, and run the plan again.") from None
    if record.get("stages", as_written(arm)) != as_written(arm):
        raise UserError(
            f"{path}: the run has other stages than the plan. Give the plan that was run or another --output, or "
            "remove the run's folder."
        )
    return record


def read_plan(path: Path) -> Plan:
    """The `PLAN` of a Python file. Raises UserError if there is none, or if it contradicts itself."""
    if not path.is_file():
        raise UserError(f"{path}: no such file. Expected a plan, such as experiments/plans/classification.py.")
    plan = runpy.run_path(str(path)).get("PLAN")
    if not isinstance(plan, Plan):
        raise UserError(f"{path}: defines no PLAN. Expected PLAN = Plan(...), as in experiments/plans.")
    names = [arm.name for arm in plan.arms]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two arms have the same name. Rename one.")
    for arm in plan.arms:
        if len({stage.name for stage in arm.stages}) < len(arm.stages):
            raise UserError(f"{path}: two stages of the arm {arm.name!r} have the same name. Rename one.")
    if plan.outcome not in OUTCOMES:
        raise UserError(f"{path}: outcome {plan.outcome!r} is unknown. Give one of {', '.join(OUTCOMES)}.")
    compared = [name for contrast in plan.primary for name in (contrast.arm, contrast.control)]
    for name in (plan.baseline, *compared, *(arm.control for arm in plan.arms if arm.control is not None)):
        if name not in names:
            raise UserError(f"{path}: compares {name!r}, which is not one of its arms ({', '.join(names)}).")
    return plan
