"""The figures of an analysis: differences to the baseline, and validation over the epochs.

`python -m utils.plots health RUN/STAGE ...` draws the policy's health.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.differences import POINT, Comparison, tested_metric
from experiments.finished import Runs, Task
from experiments.plan import Arm, Plan, Stage
from utils.results.curves import STYLES
from utils.results.figures import COLOURS, FAINT, INK, as_text, in_lines
from utils.results.run_folder import RunFolder

COLUMNS, WIDTH = 3, 9.0  # panels per row; inches of the figure
ARM_COLOURS = COLOURS[:-1]  # black is for the baseline
ARM_WIDTH = 18  # characters per line of an arm's name


def differences(plan: Plan, tasks: list[Task], comparisons: list[Comparison]) -> Figure | None:
    """Differences to the baseline in hard macro F1: each seed, mean, t-interval; one panel per task, one row per arm.

    None if no task has differences.
    """
    tasks = [task for task in tasks if any(comparison.task == task.name for comparison in comparisons)]
    if not tasks:
        return None
    arms = [arm.name for arm in plan.arms if arm.name != plan.baseline]
    figure, panels = _panels(len(tasks), row_height=0.9 + 0.45 * len(arms))
    for number, (task, axes) in enumerate(zip(tasks, panels, strict=True)):
        for comparison in comparisons:
            if (comparison.task, comparison.metric) == (task.name, tested_metric(task)):
                _draw_difference(axes, comparison, arms.index(comparison.arm))
        axes.axvline(0, color=INK, linewidth=1)
        names = [in_lines(arm, ARM_WIDTH) for arm in arms] if number % COLUMNS == 0 else [""] * len(arms)
        axes.set_yticks(range(len(arms)), names)
        axes.set_ylim(len(arms) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        kind = "hard macro F1" if task.has_easy else "macro F1"
        _finish(axes, f"{as_text(task.name)}: {kind}", "difference, points")
        axes.grid(visible=False, axis="y")
    figure.suptitle(f"Difference to {as_text(plan.baseline)} (0): each seed, mean, 95 % t-interval", color=INK)
    return figure


def _draw_difference(axes: Axes, comparison: Comparison, row: int) -> None:
    values = comparison.differences / POINT
    colour = ARM_COLOURS[row % len(ARM_COLOURS)]
    axes.scatter(values, np.full(len(values), row + 0.2), s=22, color=colour, alpha=0.6, linewidths=0, zorder=3)
    if comparison.t is not None:
        axes.plot([end / POINT for end in comparison.t], [row - 0.12] * 2, color=colour, linewidth=2.5)
    axes.plot(values.mean(), row - 0.12, marker="D", markersize=6, color=colour, markeredgecolor="white", zorder=4)


def validation(plan: Plan, tasks: list[Task], runs: Runs) -> Figure | None:
    """Macro F1 on val over the epochs of all stages that lead to a task, means over seeds; one panel per task."""
    figure, panels = _panels(len(tasks), row_height=3.0)
    drawn = {}  # arms in the plan's order, with a line for the legend
    for task, axes in zip(tasks, panels, strict=True):
        for arm in plan.arms:
            curves = []
            for seed in arm.all_seeds:
                if (arm.name, seed) in runs:
                    stages = runs[arm.name, seed].stages
                    curves += [_validation_f1(chain, stages) for chain in chains(arm, task.name)]
            curves = [curve for curve in curves if curve]
            if curves:
                _draw_means(axes, curves, style := _style(plan, arm.name))
                drawn[arm.name] = Line2D([], [], **style)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        _finish(axes, as_text(task.name), "epoch over all stages, from 0", "macro F1 on val")
    names = [as_text(name) for name in drawn]
    figure.legend(drawn.values(), names, loc="outside lower center", ncols=3, frameon=False, handlelength=3.5)
    return figure if drawn else None


def chains(arm: Arm, task: str) -> list[list[Stage]]:
    """For each stage of the task, the stages that lead to it by their `start`, from the first one on."""
    by_name = {stage.name: stage for stage in arm.stages}
    result = []
    for stage in arm.stages:
        if stage.test == task:
            chain = [stage]
            while chain[0].start is not None and Path(chain[0].start).parts[0] in by_name:
                chain.insert(0, by_name[Path(chain[0].start).parts[0]])
            result.append(chain)
    return result


def _validation_f1(chain: list[Stage], stages: dict[str, RunFolder]) -> list[dict[int, float]]:
    """val_f1 by epoch over all stages, one piece per stage; empty if a stage has no values."""
    pieces, first = [], 0
    for stage in chain:
        values = [(epoch, line.get("val_f1")) for epoch, line in enumerate(stages[stage.name].log, first)]
        piece = {epoch: value for epoch, value in values if value is not None and math.isfinite(value)}
        if not piece:
            return []
        pieces.append(piece)
        first += len(piece)
    return pieces


def _draw_means(axes: Axes, curves: list[list[dict[int, float]]], style: dict[str, object]) -> None:
    """Draw the mean of the curves piece by piece, at the epochs that all of them have."""
    for pieces in zip(*curves, strict=False):
        epochs = sorted(set.intersection(*map(set, pieces)))
        means = [np.mean([values[epoch] for values in pieces]) for epoch in epochs]
        axes.plot(epochs, means, **style, marker="." if len(epochs) == 1 else None)


def _style(plan: Plan, arm: str) -> dict[str, object]:
    """The line style of an arm: the baseline is black, the others have their colours in the other figure."""
    if arm == plan.baseline:
        return {"color": "black", "linestyle": "-", "linewidth": 1.8}
    number = [other.name for other in plan.arms if other.name != plan.baseline].index(arm)
    colour, line = ARM_COLOURS[number % len(ARM_COLOURS)], STYLES[number % len(STYLES)]
    return {"color": colour, "linestyle": line, "linewidth": 1.8}


def _panels(count: int, row_height: float) -> tuple[Figure, list[Axes]]:
    rows, columns = math.ceil(count / COLUMNS), min(COLUMNS, count)
    width = max(5.5, WIDTH * columns / COLUMNS)
    figure = Figure(figsize=(width, rows * row_height + 0.5), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _finish(axes: Axes, title: str, x: str, y: str = "") -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
