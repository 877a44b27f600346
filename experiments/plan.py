"""What a plan says: arms, each a chain of trainings through the two scripts, and how they are to be compared."""

import json
import runpy
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.runtime.errors import UserError


@dataclass(frozen=True)
class Subset:
    """A part of the data: classes by shell patterns, and images of `train` by number and draw.

    shots: images of each class in `train`; None: all. draw: which of them, the same for all arms and seeds.
    """

    classes: str = "*"
    without: str = ""
    shots: int | None = None
    draw: int = 0

    @property
    def name(self) -> str:
        """Such as "us-breast-*-5-draw0", a folder's name with no two subsets alike."""
        shots = "" if self.shots is None else f"-{self.shots}-draw{self.draw}"
        return f"{self.classes}{f'-but-{self.without}' if self.without else ''}{shots}".replace("*", "any")


@dataclass(frozen=True)
class Stage:
    """One training, in the folder `name` of its run.

    script: _normal or _policy_gradient; flags: as typed; start: what it fine-tunes, relative to the run's folder;
    average: write average.pth, the mean of so many last epochs; test: evaluate model_best.pth, chosen on `val`, on
    `test`, as part of the task of this name (stages of a run with one task, several draws of few images, say, are
    averaged); subset: of the data.
    """

    name: str
    script: str
    flags: str
    start: str | None = None
    average: int = 0
    test: str | None = None
    subset: Subset | None = None

    @property
    def epochs(self) -> int:
        """As the flags say."""
        words = shlex.split(self.flags)
        return int(words[words.index("--epochs") + 1])


@dataclass(frozen=True)
class Arm:
    """What is compared: stages one after the other, once for each seed."""

    name: str
    stages: tuple[Stage, ...]
    seeds: int


def heated_arm(name: str, pretraining: str, fine_tuning: str, seeds: int, task: str) -> Arm:
    """Pretrain with masks, average the last three epochs, fine-tune without masks, test: the route of the README.

    pretraining, fine_tuning: flags of the two trainings.
    """
    stages = (
        Stage("pretraining", "_policy_gradient", pretraining, average=3),
        Stage("fine-tuning", "_normal", fine_tuning, start="pretraining/average.pth", test=task),
    )
    return Arm(name, stages, seeds)


@dataclass(frozen=True)
class Plan:
    """Arms, and how they are compared.

    baseline: the arm from which differences are taken; primary: the one arm whose test against it was named before the
    runs: of macro F1 over the hard classes, in the first task; None: all is exploratory. hard: patterns of the classes
    that are also reported apart.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    baseline: str
    primary: str | None = None
    hard: str = "mr-brain-*,us-breast-*"

    def runs(self) -> list[tuple[Arm, int]]:
        """Arm and seed: the primary comparison first, and all arms of a seed before the next.

        So whatever was done when time ran out is balanced, and the test that was named before has its seeds.
        """
        first = {self.baseline, self.primary} if self.primary else set()
        order = [(arm, seed) for seed in range(max(arm.seeds for arm in self.arms)) for arm in self.arms]
        return sorted((run for run in order if run[1] < run[0].seeds), key=lambda run: run[0].name not in first)


def run_folder(output: Path, arm: str, seed: int) -> Path:
    """Where a run's stages have their folders."""
    return output / arm / f"seed{seed}"


def as_written(arm: Arm) -> list[dict[str, Any]]:
    """The stages as finished.json holds them."""
    return json.loads(json.dumps([asdict(stage) for stage in arm.stages]))


def read_plan(path: Path) -> Plan:
    """The `PLAN` of a Python file; raises UserError if there is none, or one that contradicts itself."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a plan, such as experiments/plans/classification.py.")
    plan = runpy.run_path(str(path)).get("PLAN")
    if not isinstance(plan, Plan):
        raise UserError(f"{path}: defines no PLAN; expected PLAN = Plan(...), as in experiments/plans.")
    names = [arm.name for arm in plan.arms]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two arms have one name; give each its own.")
    for arm in plan.arms:
        if len({stage.name for stage in arm.stages}) < len(arm.stages):
            raise UserError(f"{path}: two stages of the arm {arm.name!r} have one name, and so one folder; rename one.")
    for name in filter(None, (plan.baseline, plan.primary)):
        if name not in names:
            raise UserError(f"{path}: compares {name!r}, which is none of its arms ({', '.join(names)}).")
    return plan
