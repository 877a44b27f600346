"""The figures of an analysis: differences to the baseline, health of the policy, and validation over the epochs."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.differences import POINT, Comparison, tested_metric
from experiments.finished import RunKey, Runs, Task, policy_log
from experiments.plan import Arm, Plan, Stage
from utils.results.curves import HEALTH, STYLES
from utils.results.figures import COLOURS, FAINT, INK, as_text, in_lines
from utils.results.run_folder import RunFolder

HEALTH_KEYS = ("policy_entropy", "mask_std_between_images", "prior_drift")  # shown, of those in HEALTH
COLUMNS, WIDTH = 3, 9.0  # panels per row; inches of the figure
ARM_COLOURS = COLOURS[:-1]  # black is for the baseline
ARM_WIDTH = 18  # characters per line of an arm's name

Curve = list[list[tuple[int, float]]]  # pieces of a line, one per stage: epochs and values


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


def health(plan: Plan, runs: Runs) -> Figure | None:
    """Quantities of the policy over the epochs: mean of each arm, and a thin line per seed. None without a policy."""
    titles = {panel.key: panel for panel in HEALTH}
    by_key = {}
    for key in HEALTH_KEYS:
        by_arm = _by_arm(runs, lambda run, key=key: [_curve(policy_log(plan, runs, run), key)])
        if by_arm:
            by_key[key] = by_arm
    if not by_key:
        return None
    figure, panels = _panels(len(by_key), row_height=3.0)
    for axes, (key, by_arm) in zip(panels, by_key.items(), strict=True):
        _draw_curves(axes, plan, by_arm, each=True)
        _finish(axes, titles[key].title, "epoch, from 0", titles[key].unit)
    _legend(figure, plan, set().union(*by_key.values()))
    return figure


def validation(plan: Plan, tasks: list[Task], runs: Runs) -> Figure | None:
    """Macro F1 on val over the epochs of all stages that lead to a task, means over seeds; one panel per task."""
    figure, panels = _panels(len(tasks), row_height=3.0)
    arms = {arm.name: arm for arm in plan.arms}
    drawn = set()
    for task, axes in zip(tasks, panels, strict=True):

        def curves_of(run: RunKey, task: Task = task) -> list[Curve]:
            return [_chain_curve(chain, runs[run].stages) for chain in chains(arms[run[0]], task.name)]

        by_arm = _by_arm(runs, curves_of)
        _draw_curves(axes, plan, by_arm)
        _finish(axes, as_text(task.name), "epoch over all stages, from 0", "macro F1 on val")
        drawn |= by_arm.keys()
    _legend(figure, plan, drawn)
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


def _chain_curve(chain: list[Stage], stages: dict[str, RunFolder]) -> Curve:
    """val_f1 over all stages, concatenated, one piece per stage; empty if a stage has no values."""
    pieces, first = [], 0
    for stage in chain:
        curve = _curve(stages[stage.name].log, "val_f1", first)
        if not curve:
            return []
        pieces += curve
        first += len(curve[0])
    return pieces


def _curve(log: list[dict], key: str, first: int = 0) -> Curve:
    """One piece from the lines with a finite number, numbered from `first`; no piece if there are none."""
    points = [(first + n, line[key]) for n, line in enumerate(log) if isinstance(line.get(key), (int, float))]
    points = [point for point in points if math.isfinite(point[1])]
    return [points] if points else []


def _by_arm(runs: Runs, curves_of: Callable[[RunKey], list[Curve]]) -> dict[str, list[Curve]]:
    """The curves of all seeds, by arm, without empty ones."""
    by_arm: dict[str, list[Curve]] = {}
    for run in runs:
        for curve in filter(None, curves_of(run)):
            by_arm.setdefault(run[0], []).append(curve)
    return by_arm


def _draw_curves(axes: Axes, plan: Plan, by_arm: dict[str, list[Curve]], each: bool = False) -> None:
    """Draw the mean of each arm's curves; with `each`, also every curve as a thin line."""
    for arm, curves in by_arm.items():
        style = _style(plan, arm)
        for pieces in zip(*curves, strict=False):
            seeds = [dict(piece) for piece in pieces]  # values by epoch
            for values in seeds if each else ():
                axes.plot(list(values), list(values.values()), color=style["color"], linewidth=0.6, alpha=0.4)
            epochs = sorted(set.intersection(*map(set, seeds)))
            means = [np.mean([values[epoch] for values in seeds]) for epoch in epochs]
            axes.plot(epochs, means, **style, marker="." if len(epochs) == 1 else None)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _style(plan: Plan, arm: str) -> dict[str, object]:
    """The line style of an arm, the same in all figures: the baseline is black, the others coloured."""
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


def _legend(figure: Figure, plan: Plan, arms: set[str]) -> None:
    """Add a legend of these arms below all panels."""
    shown = [arm.name for arm in plan.arms if arm.name in arms]
    lines = [Line2D([], [], **_style(plan, arm)) for arm in shown]
    figure.legend(lines, map(as_text, shown), loc="outside lower center", ncols=3, frameon=False, handlelength=3.5)
