"""Draws the overview of the method, figures/pipeline.svg: `python figures/pipeline.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch import Tensor

from _policy_gradient.mask import SmoothMask
from _policy_gradient.policy import sample_action
from utils.data.transforms import Normalize
from utils.phantoms.dataset import render

SIZE, GRID, KERNEL, SIGMA = 224, 16, 13, 6.0  # the cells of the default grid, 64, would be too small to see
WIDTH, HEIGHT = 9.375, 4.26  # inches, the unit of all coordinates; 900 CSS pixels on a page, so that 8 pt stay 8 pt
SIDE, LINE = 0.84, 0.158  # side of a picture; distance between lines of text
INK, REINFORCE, GRADIENT = "0.15", "#b34700", "#00609c"  # dashes and labels carry the same meaning as the colours


def hand_made_concentrations() -> tuple[Tensor, Tensor]:
    """log alpha and log beta, (1, G*G), chosen by hand so that the means visibly differ; not a trained policy."""
    axis = torch.linspace(-1, 1, GRID)
    hill = torch.exp(-((axis - 0.25) ** 2 + (axis[:, None] - 0.1) ** 2) / 0.35)  # (G, G)
    log_ratio = (3 * hill - 1.3).view(1, -1)
    return 0.7 + log_ratio / 2, 0.7 - log_ratio / 2


def compute_pictures() -> tuple[Tensor, ...]:
    """An image, the means of its cells, sampled cells, their mask, and the masked image; each (height, width)."""
    torch.manual_seed(0)
    phantom = torch.from_numpy(render("mr-brain-tumour", np.random.default_rng(4), SIZE))
    image = Normalize((0.3162,), (0.3213,))(phantom.expand(1, 3, SIZE, SIZE))  # (1, 3, S, S)
    log_alpha, log_beta = hand_made_concentrations()
    means = torch.sigmoid(log_alpha - log_beta)  # alpha / (alpha + beta), (1, G*G)
    cells = sample_action(log_alpha, log_beta).cells  # (1, G*G)
    mask = SmoothMask(SIZE, GRID, KERNEL, SIGMA)(cells)  # (1, 1, S, S)
    return image[0, 0], means.view(GRID, GRID), cells.view(GRID, GRID), mask[0, 0], (image * mask)[0, 0]


def show(ax: Axes, left: float, y: float, picture: Tensor, caption: str) -> None:
    """Draw a picture centred at height y, with its caption above."""
    # A normalised image ranges from -0.98 to 2.13.
    colours, low, high = ("gray", -0.98, 2.13) if picture.min() < 0 else ("cividis", 0, 1)
    interpolation = "none" if len(picture) == GRID else "auto"  # so that cells stay crisp at any zoom
    extent = (left, left + SIDE, y - SIDE / 2, y + SIDE / 2)
    ax.imshow(picture.numpy(), colours, vmin=low, vmax=high, extent=extent, interpolation=interpolation, zorder=2)
    ax.text(left + SIDE / 2, y + SIDE / 2 + 0.08, caption, ha="center")  # y is that of its last baseline


def box(ax: Axes, left: float, y: float, width: float, height: float, *lines: str, bold: int = 1, **style) -> None:
    """Draw a frame centred at height y around lines of text.

    The first `bold` lines are a title; other lines that contain - or _ are code.
    """
    style = {"facecolor": "white", "edgecolor": INK, "zorder": 2} | style
    ax.add_patch(FancyBboxPatch((left, y - height / 2), width, height, "round,pad=0,rounding_size=0.05", **style))
    for i, line in enumerate(lines):
        font = {}
        if i < bold:
            font = {"weight": "bold"}
        elif "-" in line or "_" in line:
            font = {"family": "monospace", "size": 8}
        ax.text(left + width / 2, y - 0.042 + LINE * ((len(lines) - 1) / 2 - i), line, ha="center", **font)


def arrow(ax: Axes, *points: tuple[float, float], color: str = INK, dashes: str | tuple = "-") -> None:
    """Draw an arrow in straight pieces from the first point to the last."""
    before, end = np.array(points[-2:])
    neck = end - 0.07 * (end - before) / np.linalg.norm(
        end - before
    )  # where dashes end, so that they do not fray the head
    ax.plot(*zip(*points[:-1], neck, strict=True), color=color, linestyle=dashes, linewidth=1.2, zorder=1)
    head = {"arrowstyle": "-|>,head_length=4,head_width=2", "mutation_scale": 1.4, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, neck, arrowprops=head | {"color": color})


def panel(ax: Axes, y: float, height: float, title: str, script: str) -> None:
    """Draw the background of a row, with its title and script on top."""
    box(ax, 0.04, y, WIDTH - 0.08, height, facecolor="0.955", edgecolor="none", zorder=0)
    ax.text(4.6, y + height / 2 - 0.22, title, ha="right", size=10, weight="bold")
    ax.text(4.72, y + height / 2 - 0.22, script, size=9, family="monospace")


def draw_pretraining(ax: Axes, y: float) -> None:
    """Draw the upper row, its pictures centred at height y."""
    top, bottom, low, high = y + SIDE / 2, y - SIDE / 2, y + 0.62, y + 0.9
    network, plus, times, weights = 1.82, 2.625, 6.105, 7.83
    image, means, cells, mask, masked = compute_pictures()
    show(ax, 0.16, y, image, "image")
    show(ax, 2.88, y, means, "means of\nBeta($\\alpha$, $\\beta$)")
    show(ax, 3.96, y, cells, "sampled\n$G \\times G$ cells")
    show(ax, 5.04, y, mask, "smooth\nmask")
    show(ax, 6.36, y, masked, r"image $\times$ mask")
    box(ax, 1.24, y, 1.16, SIDE, "policy network", "resnet10t,", "two heads")
    box(ax, 1.24, y - 0.8, 1.16, 0.28, "running prior")
    box(ax, 7.44, y, 0.78, SIDE, "classifier", "resnet50")
    box(ax, 8.46, y, 0.755, SIDE, "cross-", "entropy", bold=2)
    for start, end in ((1, 1.24), (2.4, 2.88), (3.72, 3.96), (4.8, 5.04), (5.88, 6.36), (7.2, 7.44), (8.22, 8.46)):
        arrow(ax, (start, y), (end, y))
    for x, sign in ((plus, "+"), (times, "x")):
        ax.plot(x, y, "o", markersize=12.5, markerfacecolor="white", markeredgecolor=INK)
        ax.plot(x, y, sign, markersize=6, color=INK)

    arrow(ax, (network, bottom), (network, y - 0.66))
    arrow(ax, (2.4, y - 0.8), (plus, y - 0.8), (plus, y - 0.09))
    arrow(ax, (0.58, bottom), (0.58, y - 1.1), (times, y - 1.1), (times, y - 0.09))
    ax.text(plus + 0.09, y - 0.64 - LINE, "log $\\alpha$, log $\\beta$ =\n0.9 prior + 0.1 heads")
    arrow(ax, (8.71, top), (8.71, low), (weights, low), (weights, top), color=GRADIENT, dashes=(0, (4, 1.5)))
    ax.text(8.27, low + 0.055, "gradient", ha="center", color=GRADIENT)
    arrow(ax, (8.96, top), (8.96, high), (network, high), (network, top), color=REINFORCE, dashes=(0, (1.5, 1.2)))
    ax.text(5.39, high + 0.055, "REINFORCE (policy gradient)", ha="center", color=REINFORCE)
    arrow(ax, (weights, bottom), (weights, 1.36), (0.9, 1.36), (0.9, 0.93))
    ax.text(weights - 0.08, y - 0.84, "weights of every epoch", ha="right")


def draw_finetuning(ax: Axes, y: float) -> None:
    """Draw the lower row, its boxes centred at height y."""
    for shift in (0.08, 0.04):  # files behind one another
        box(ax, 0.16 + shift, y + shift, 1.5, 0.7)
    box(ax, 0.16, y, 1.5, 0.7, "last epochs' weights", "model_87.pth", "model_88.pth", "model_89.pth")
    box(ax, 2.06, y, 1.64, 0.7, "average", "utils.weight_averaging")
    box(ax, 4.02, y, 1.14, 0.7, "heated model", facecolor="#ffe9b8")
    box(ax, 5.48, y, 1.7, 0.7, "fine-tune", "--finetune", "clean images, no policy")
    box(ax, 7.5, y, 1.715, 0.7, "evaluate", "--test-only", "clean images, no policy")
    for start, end in ((1.74, 2.06), (3.7, 4.02), (5.16, 5.48), (7.18, 7.5)):
        arrow(ax, (start, y), (end, y))


def main() -> None:
    # Without a fixed salt, the ids in the file are random.
    plt.rcParams.update({"svg.hashsalt": "pipeline", "font.size": 8.5, "text.color": INK})
    figure = plt.figure(figsize=(WIDTH, HEIGHT))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    ax.axis("off")
    panel(ax, 2.85, 2.74, "1  Pretraining", "_policy_gradient/train.py")
    panel(ax, 0.64, 1.2, "2  Fine-tuning and evaluation", "_normal/train.py")
    draw_pretraining(ax, 2.72)
    draw_finetuning(ax, 0.5)
    figure.savefig(Path(__file__).with_suffix(".svg"), dpi=192, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
