"""The figures of an analysis: differences to the baseline, the policy's health, and the course of the validation."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from experiments.differences import POINT, Comparison, tested_metric
from experiments.plan import Arm, Plan, Stage
from experiments.results import Runs, Task
from experiments.tables import policy_log
from utils.results.curves import STYLES
from utils.results.figures import COLOURS, FAINT, INK, as_text, in_lines
from utils.results.run_folder import RunFolder

HEALTH = {
    "policy_entropy": ("Entropy of a cell", "nats; 0: uniform noise"),
    "mask_std_between_images": ("Masks: between images", "standard deviation; 0: none"),
    "prior_drift": ("Drift of the prior", "RMS, log-concentrations"),
}
COLUMNS, WIDTH = 3, 9.0  # panels beside each other; inches of the figure
ARM_COLOURS = COLOURS[:-1]  # black is the baseline's
ARM_WIDTH = 18  # characters of a line of an arm's name

Curve = list[list[tuple[int, float]]]  # pieces of a line, one a stage: epochs and values


def differences(plan: Plan, tasks: list[Task], found: list[Comparison]) -> Figure | None:
    """Each seed's difference to the baseline in hard macro F1, mean and t-interval; a panel a task, a row an arm.

    None where no task has differences.
    """
    tasks = [task for task in tasks if any(one.task == task.name for one in found)]
    if not tasks:
        return None
    arms = [arm.name for arm in plan.arms if arm.name != plan.baseline]
    figure, panels = _panels(len(tasks), row_height=0.9 + 0.45 * len(arms))
    for number, (task, axes) in enumerate(zip(tasks, panels, strict=True)):
        metric = tested_metric(task)
        for one in found:
            if (one.task, one.metric) == (task.name, metric):
                _draw_difference(axes, one, arms.index(one.arm))
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


def _draw_difference(axes: Axes, one: Comparison, row: int) -> None:
    values = one.differences / POINT
    colour = ARM_COLOURS[row % len(ARM_COLOURS)]
    axes.scatter(values, np.full(len(values), row + 0.2), s=22, color=colour, alpha=0.6, linewidths=0, zorder=3)
    if one.t is not None:
        axes.plot([end / POINT for end in one.t], [row - 0.12] * 2, color=colour, linewidth=2.5)
    axes.plot(values.mean(), row - 0.12, marker="D", markersize=6, color=colour, markeredgecolor="white", zorder=4)


def health(plan: Plan, runs: Runs) -> Figure | None:
    """What the log tells of the policy over the epochs, thin each seed; None if no run has a policy."""
    curves = {
        key: _by_arm(plan, runs, lambda arm, run, key=key: [_curve(policy_log(plan, runs, (arm.name, run)), key)])
        for key in HEALTH
    }
    curves = {key: of_key for key, of_key in curves.items() if of_key}
    if not curves:
        return None
    figure, panels = _panels(len(curves), row_height=3.0)
    for axes, (key, of_key) in zip(panels, curves.items(), strict=True):
        _draw_curves(axes, plan, of_key, each=True)
        _finish(axes, HEALTH[key][0], "epoch, from 0", HEALTH[key][1])
    _legend(figure, plan, set().union(*curves.values()))
    return figure


def validation(plan: Plan, tasks: list[Task], runs: Runs) -> Figure | None:
    """Macro F1 on val over the epochs of all stages that lead to a task, means over seeds; one panel a task."""
    figure, panels = _panels(len(tasks), row_height=3.0)
    drawn = set()
    for task, axes in zip(tasks, panels, strict=True):
        curves = _by_arm(plan, runs, lambda arm, seed, task=task: [
            _chain_curve(chain, runs[arm.name, seed].stages) for chain in chains(arm, task.name)])  # fmt: skip
        _draw_curves(axes, plan, curves)
        _finish(axes, as_text(task.name), "epoch over all stages, from 0", "macro F1 on val")
        drawn |= curves.keys()
    _legend(figure, plan, drawn)
    return figure if drawn else None


def chains(arm: Arm, task: str) -> list[list[Stage]]:
    """For each stage of the task, the stages from the first one to it, as their `start` says."""
    by_name = {stage.name: stage for stage in arm.stages}
    found = []
    for stage in arm.stages:
        if stage.test == task:
            chain = [stage]
            while chain[0].start is not None and Path(chain[0].start).parts[0] in by_name:
                chain.insert(0, by_name[Path(chain[0].start).parts[0]])
            found.append(chain)
    return found


def _chain_curve(chain: list[Stage], stages: dict[str, RunFolder]) -> Curve:
    """val_f1, one piece a stage, each behind the one before."""
    pieces, first = [], 0
    for stage in chain:
        (piece,) = _curve(stages[stage.name].log, "val_f1", first) or [[]]
        pieces.append(piece)
        first += len(piece)
    return pieces if all(pieces) else []


def _curve(log: list[dict], key: str, first: int = 0) -> Curve:
    """One piece, of the lines that have a finite number; none if there is none."""
    points = [(first + n, line[key]) for n, line in enumerate(log) if isinstance(line.get(key), (int, float))]
    points = [point for point in points if math.isfinite(point[1])]
    return [points] if points else []


def _by_arm(plan: Plan, runs: Runs, curves_of: Callable[[Arm, int], list[Curve]]) -> dict[str, list[Curve]]:
    """The curves of all seeds of each arm that has any."""
    found = {
        arm.name: [curve for name, seed in runs if name == arm.name for curve in curves_of(arm, seed) if curve]
        for arm in plan.arms
    }
    return {arm: curves for arm, curves in found.items() if curves}


def _draw_curves(axes: Axes, plan: Plan, by_arm: dict[str, list[Curve]], each: bool = False) -> None:
    """The mean of each arm's curves; each: and thin every single one."""
    for arm, curves in by_arm.items():
        style = _style(plan, arm)
        for pieces in zip(*curves, strict=False):
            for piece in pieces if each else ():
                axes.plot(*zip(*piece, strict=True), color=style["color"], linewidth=0.6, alpha=0.4)
            epochs = sorted(set.intersection(*(set(dict(piece)) for piece in pieces)))
            means = [np.mean([dict(piece)[epoch] for piece in pieces]) for epoch in epochs]
            axes.plot(epochs, means, **style, marker="." if len(epochs) == 1 else None)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _style(plan: Plan, arm: str) -> dict[str, object]:
    """Of an arm, the same in all figures: the baseline black, the others in the colours of `differences`."""
    if arm == plan.baseline:
        return {"color": "black", "linestyle": "-", "linewidth": 1.8}
    number = [one.name for one in plan.arms if one.name != plan.baseline].index(arm)
    return {
        "color": ARM_COLOURS[number % len(ARM_COLOURS)],
        "linestyle": STYLES[number % len(STYLES)],
        "linewidth": 1.8,
    }


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
    """Below all panels."""
    shown = [arm.name for arm in plan.arms if arm.name in arms]
    lines = [Line2D([], [], **_style(plan, arm)) for arm in shown]
    figure.legend(lines, map(as_text, shown), loc="outside lower center", ncols=3, frameon=False, handlelength=3.5)
