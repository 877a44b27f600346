"""Outcomes of a plan's runs under several conditions: their CSV file, and tables of paired differences.

A condition is, for example, a change of the test images. Differences are those of each arm to its control, seed by
seed, and positive where the arm is better.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.differences import contrasts
from experiments.markdown import NONE, markdown
from experiments.outcomes import IMPROVEMENT, OUTCOMES
from experiments.plan import Plan
from utils.results.intervals import t_interval
from utils.results.run_folder import read_table
from utils.runtime.errors import UserError
from utils.runtime.files import make_parent, write_atomically
from utils.runtime.text import csv_table

LEGEND = f"{IMPROVEMENT} In brackets: 95 % t-interval, exploratory, not adjusted for the number of rows."


class Row(NamedTuple):
    """The values of a run under a condition, by the names of OUTCOMES. condition: its parts, such as task and shift."""

    arm: str
    seed: int
    condition: tuple[str, ...]
    values: dict[str, float]


def read_rows(path: Path, plan: Plan, parts: Sequence[str], outcomes: Sequence[str]) -> list[Row]:
    """The rows of a file of `write_rows`; none if there is no file.

    parts: names of the parts of a condition. Raises UserError for another file, and for one of another plan.
    """
    if not path.exists():
        return []
    try:
        table = read_table(path, ("plan", "arm", "seed", *parts, *outcomes))
        rows = [
            Row(
                row["arm"],
                int(row["seed"]),
                tuple(row[part] for part in parts),
                {name: float(row[name]) for name in outcomes},
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


def conditions(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """All conditions, in the order of the rows."""
    return list(dict.fromkeys(row.condition for row in rows))


def differences(rows: Iterable[Row], condition: tuple[str, ...], arm: str, control: str, outcome: str) -> np.ndarray:
    """Differences of an outcome over the seeds that both arms have, (n,), positive where the arm is better."""
    values: dict[str, dict[int, float]] = {arm: {}, control: {}}
    for row in rows:
        if row.condition == condition and row.arm in values:
            values[row.arm][row.seed] = row.values[outcome]
    seeds = sorted(values[arm].keys() & values[control].keys())
    return OUTCOMES[outcome].sign * np.array([values[arm][seed] - values[control][seed] for seed in seeds])


def levels_table(plan: Plan, rows: Sequence[Row], parts: Sequence[str], outcome: str) -> str:
    """Mean of an outcome over the seeds that all arms have, one row per condition and one column per arm."""
    present = {row.arm for row in rows}
    arms = [arm.name for arm in plan.arms if arm.name in present]
    body = []
    for condition in conditions(rows):
        by_arm: dict[str, dict[int, float]] = {arm: {} for arm in arms}
        for row in rows:
            if row.condition == condition:
                by_arm[row.arm][row.seed] = row.values[outcome]
        shared = sorted(set.intersection(*(set(values) for values in by_arm.values() if values)))
        means = [np.mean([v[seed] for seed in shared]) if v and shared else np.nan for v in by_arm.values()]
        body.append([*condition, *(_shown(float(mean), outcome) for mean in means)])
    return markdown([*parts, *arms], body, texts=len(parts))


def differences_table(plan: Plan, rows: Sequence[Row], parts: Sequence[str], outcomes: Sequence[str]) -> str:
    """One row per condition and arm with a control, one column per outcome."""
    body = []
    for condition in conditions(rows):
        for contrast in contrasts(plan):
            arm, control = contrast.arm, contrast.control
            values = [differences(rows, condition, arm, control, outcome) for outcome in outcomes]
            if len(values[0]):
                cells = map(_difference, values, outcomes)
                body.append([*condition, arm, control, str(len(values[0])), *cells])
    head = [*parts, "arm", "control", "seeds", *map(title, outcomes)]
    return markdown(head, body, texts=len(parts) + 2)


def title(outcome: str) -> str:
    """The outcome with its unit."""
    return f"{OUTCOMES[outcome].title}, {OUTCOMES[outcome].unit}"


def _shown(value: float, outcome: str, plus: str = "") -> str:
    """The value in the outcome's unit; a dash if it is not finite."""
    if not np.isfinite(value):
        return NONE
    digits = 3 if OUTCOMES[outcome].unit == "nats" else 2
    return f"{round(OUTCOMES[outcome].scale * value, digits) + 0.0:{plus}.{digits}f}"  # not -0.00


def _difference(values: np.ndarray, outcome: str) -> str:
    """Mean and interval, such as "+1.20 (-0.31 to +2.71)"."""
    mean = _shown(float(values.mean()), outcome, "+")
    interval = t_interval(values) if np.isfinite(values).all() else None
    return mean if interval is None else f"{mean} ({' to '.join(_shown(end, outcome, '+') for end in interval)})"
