"""Values of a plan's runs under several conditions: their CSV file, and tables of paired differences.

A condition is, for example, a change of the test images. Differences are those of each arm to its control, seed by
seed, and positive where the arm is better.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.comparisons import t_interval
from experiments.plan import Plan
from experiments.tables import markdown
from utils.results.run_folder import read_table
from utils.runtime.errors import UserError
from utils.runtime.files import make_parent, write_atomically
from utils.runtime.text import csv_table

DASH = "\N{EN DASH}"
SIGNS = (
    "Positive differences: the arm is better than its control (for errors such as cross-entropy the sign is reversed). "
    "Mean over the seeds that both have, with a 95 % t-interval in brackets; exploratory, not adjusted for the number "
    "of rows."
)


class Measure(NamedTuple):
    """What is measured. factor: from a value to the unit of the tables, with `digits` decimals."""

    name: str
    title: str
    factor: float = 100
    digits: int = 2
    lower_is_better: bool = False


LOSS = Measure("balanced_loss", "balanced cross-entropy, nats", 1, 3, lower_is_better=True)
ACCURACY = Measure("balanced_accuracy", "balanced accuracy, points")
F1 = Measure("f1", "macro F1, points")
ECE = Measure("ece", "calibration error, points", lower_is_better=True)


class Row(NamedTuple):
    """The values of one run under one condition, by measure. condition: its parts, such as task and shift."""

    arm: str
    seed: int
    condition: tuple[str, ...]
    values: dict[str, float]


def read_rows(path: Path, plan: Plan, parts: Sequence[str], measures: Sequence[Measure]) -> list[Row]:
    """The rows of a file of `write_rows`; none if there is no file.

    parts: names of the parts of a condition. Raises UserError for another file, and for one of another plan.
    """
    if not path.exists():
        return []
    names = [measure.name for measure in measures]
    try:
        table = read_table(path, ("plan", "arm", "seed", *parts, *names))
        rows = [
            Row(
                row["arm"],
                int(row["seed"]),
                tuple(row[part] for part in parts),
                {name: float(row[name]) for name in names},
            )
            for row in table
        ]
    except (UserError, ValueError):
        raise UserError(f"-o {path}: was not written by this command, or is damaged. Give another -o.") from None
    if others := {row["plan"] for row in table} - {plan.name}:
        raise UserError(
            f"-o {path}: holds results of the plan {others.pop()!r}, not of {plan.name!r}. Give another -o."
        )
    return rows


def write_rows(path: Path, plan: Plan, parts: Sequence[str], rows: Iterable[Row]) -> None:
    """Write a CSV file, by seed and arm in the plan's order. Raises UserError if the file system refuses."""
    arms = [arm.name for arm in plan.arms]
    rows = sorted(rows, key=lambda row: (row.seed, arms.index(row.arm) if row.arm in arms else len(arms)))
    head = ["plan", "arm", "seed", *parts, *(rows[0].values if rows else ())]
    lines = [[plan.name, row.arm, row.seed, *row.condition, *row.values.values()] for row in rows]
    write_atomically(path, csv_table([head, *lines]).encode(errors="backslashreplace"))


def output_paths(path: Path, *endings: str) -> list[Path]:
    """The CSV file and, with other endings, the files next to it that are made from it; their folder is created.

    Raises UserError if the name does not end in .csv, and if the other files exist without it.
    """
    if path.suffix != ".csv":
        raise UserError(f"-o {path}: expected a name that ends in .csv.")
    others = [path.with_suffix(ending) for ending in endings]
    for other in others:
        if other.exists() and not path.exists():
            raise UserError(f"{other}: exists, and {path.name} does not. Remove it, or give another -o.")
    make_parent(path, "-o")
    return [path, *others]


def controls(plan: Plan) -> dict[str, str]:
    """By arm, the arm that it is compared with; without the baseline, if that has no control."""
    pairs = {arm.name: arm.control or plan.baseline for arm in plan.arms}
    return {arm: control for arm, control in pairs.items() if arm != control}


def conditions(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """All conditions, in the order of the rows."""
    return list(dict.fromkeys(row.condition for row in rows))


def differences(
    rows: Iterable[Row], condition: tuple[str, ...], arm: str, control: str, measure: Measure
) -> np.ndarray:
    """Differences of a measure over the seeds that both arms have, (n,), positive where the arm is better."""
    values: dict[str, dict[int, float]] = {arm: {}, control: {}}
    for row in rows:
        if row.condition == condition and row.arm in values:
            values[row.arm][row.seed] = row.values[measure.name]
    seeds = sorted(values[arm].keys() & values[control].keys())
    sign = -1 if measure.lower_is_better else 1
    return sign * np.array([values[arm][seed] - values[control][seed] for seed in seeds])


def levels_table(plan: Plan, rows: Sequence[Row], parts: Sequence[str], measure: Measure) -> str:
    """Mean of a measure over the seeds, one row per condition and one column per arm."""
    present = {row.arm for row in rows}
    arms = [arm.name for arm in plan.arms if arm.name in present]
    body = []
    for condition in conditions(rows):
        values = [[row.values for row in rows if (row.condition, row.arm) == (condition, arm)] for arm in arms]
        means = [np.mean([measured[measure.name] for measured in seeds]) if seeds else np.nan for seeds in values]
        body.append([*condition, *(_shown(float(mean), measure) for mean in means)])
    return markdown([*parts, *arms], body, texts=len(parts))


def differences_table(plan: Plan, rows: Sequence[Row], parts: Sequence[str], measures: Sequence[Measure]) -> str:
    """One row per condition and arm with a control, one column per measure."""
    body = []
    for condition in conditions(rows):
        for arm, control in controls(plan).items():
            by_measure = [differences(rows, condition, arm, control, measure) for measure in measures]
            if len(by_measure[0]):
                cells = map(_difference, by_measure, measures)
                body.append([*condition, arm, control, str(len(by_measure[0])), *cells])
    head = [*parts, "arm", "control", "seeds", *(measure.title for measure in measures)]
    return markdown(head, body, texts=len(parts) + 2)


def _shown(value: float, measure: Measure, plus: str = "") -> str:
    """The value in the table's unit; a dash if it is not finite."""
    if not np.isfinite(value):
        return DASH
    return f"{round(measure.factor * value, measure.digits) + 0.0:{plus}.{measure.digits}f}"  # not -0.00


def _difference(values: np.ndarray, measure: Measure) -> str:
    """Mean and interval, such as "+1.20 (-0.31 to +2.71)"."""
    mean = _shown(float(values.mean()), measure, "+")
    interval = t_interval(values) if np.isfinite(values).all() else None
    return mean if interval is None else f"{mean} ({' to '.join(_shown(end, measure, '+') for end in interval)})"
