"""The figures of an analysis: differences of each arm to its control, and validation over the epochs.

`python -m utils.plots health RUN/STAGE ...` draws the policy's health.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.differences import Comparison, contrasts, main_outcome
from experiments.outcomes import OUTCOMES
from experiments.plan import Arm, Plan, Stage
from experiments.run_results import Log, Run, RunKey
from experiments.tasks import Task
from utils.results.curves import STYLES
from utils.results.figures import COLOURS, FAINT, INK, as_text, in_lines

COLUMNS, WIDTH = 3, 10.0  # panels per row; inches of the figure
ARM_COLOURS = COLOURS[:-1]  # black is for the baseline
ARM_WIDTH = 24  # characters per line of an arm's name
WITH_ONE_TASK = ("balanced_accuracy", "ece")  # further panels next to that of the main outcome
JITTER = 0.14  # rows; seeds are spread over this height below their mean


def differences(plan: Plan, tasks: list[Task], comparisons: list[Comparison]) -> Figure | None:
    """Differences of each arm to its control: each seed, mean, t-interval; one row per comparison.

    One panel for each task, in the main outcome; with a single task, panels for WITH_ONE_TASK too. None if no task has
    differences.
    """
    tasks = [task for task in tasks if any(comparison.task == task.name for comparison in comparisons)]
    if not tasks:
        return None
    shown = [(task, main_outcome(plan, task)) for task in tasks]
    if len(tasks) == 1:
        shown += [(tasks[0], name) for name in WITH_ONE_TASK if name != shown[0][1]]
    order = [(arm.name, control) for arm in plan.arms for control in _controls(plan, arm.name)]
    rows = [pair for pair in order if any((row.arm, row.control) == pair for row in comparisons)]
    figure, panels = _panels(len(shown), row_height=0.9 + 0.42 * len(rows))
    for number, ((task, name), axes) in enumerate(zip(shown, panels, strict=True)):
        for comparison in comparisons:
            if (comparison.task, comparison.outcome) == (task.name, name):
                _draw_difference(axes, comparison, rows.index((comparison.arm, comparison.control)))
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(range(len(rows)), [_row_label(*pair) if number % COLUMNS == 0 else "" for pair in rows])
        axes.tick_params(axis="y", labelsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        outcome = OUTCOMES[name]
        title = outcome.title if len(tasks) == 1 else f"{as_text(task.name)}: {outcome.title}"
        _finish(axes, title, f"improvement, {outcome.unit}")
        axes.grid(visible=False, axis="y")
    figure.suptitle("Improvement over the control: each seed, mean, 95 % t-interval", color=INK, fontsize=11)
    return figure


def _controls(plan: Plan, arm: str) -> list[str]:
    return [contrast.control for contrast in contrasts(plan) if contrast.arm == arm]


def _row_label(arm: str, control: str) -> str:
    return f"{in_lines(arm, ARM_WIDTH)}\n\N{MINUS SIGN} {in_lines(control, ARM_WIDTH)}"


def _draw_difference(axes: Axes, comparison: Comparison, row: int) -> None:
    scale = OUTCOMES[comparison.outcome].scale
    values = comparison.differences * scale
    colour = ARM_COLOURS[row % len(ARM_COLOURS)]
    heights = row + 0.22 + JITTER * (np.arange(len(values)) % 3 - 1)
    axes.scatter(values, heights, s=9, color=colour, alpha=0.5, linewidths=0, zorder=3)
    if comparison.t is not None:
        axes.plot([end * scale for end in comparison.t], [row - 0.15] * 2, color=colour, linewidth=2.5)
    axes.plot(values.mean(), row - 0.15, marker="D", markersize=5, color=colour, markeredgecolor="white", zorder=4)


def validation(plan: Plan, tasks: list[Task], runs: dict[RunKey, Run]) -> Figure | None:
    """Macro F1 on val over the epochs of all stages that lead to a task, means over seeds; one panel per task.

    None if no stage was validated more than once.
    """
    figure, panels = _panels(len(tasks), row_height=3.0)
    drawn = {}  # arms in the plan's order, with a line for the legend
    is_curve = False
    for task, axes in zip(tasks, panels, strict=True):
        for arm in plan.arms:
            curves = []
            for seed in arm.all_seeds:
                if (arm.name, seed) in runs:
                    logs = runs[arm.name, seed].logs
                    curves += [_validation_f1(chain, logs) for chain in chains(arm, task.name)]
            curves = [curve for curve in curves if curve]
            is_curve = is_curve or any(len(piece) > 1 for curve in curves for piece in curve)
            if curves:
                _draw_means(axes, curves, style := _style(plan, arm.name))
                drawn[arm.name] = Line2D([], [], **style)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        _finish(axes, as_text(task.name), "epoch over all stages, from 0", "macro F1 on val")
    names = [as_text(name) for name in drawn]
    figure.legend(drawn.values(), names, loc="outside lower center", ncols=3, frameon=False, handlelength=3.5)
    return figure if is_curve else None


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


def _validation_f1(chain: list[Stage], logs: dict[str, Log]) -> list[dict[int, float]]:
    """val_f1 by epoch over all stages, one piece per stage; empty if a stage has no values."""
    pieces, first = [], 0
    for stage in chain:
        log = logs[stage.name]
        values = [(first + line["epoch"], line.get("val_f1")) for line in log]
        piece = {epoch: value for epoch, value in values if value is not None and math.isfinite(value)}
        if not piece:
            return []
        pieces.append(piece)
        first += log[-1]["epoch"] + 1
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
