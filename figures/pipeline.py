"""The picture of the pipeline, with a mask that the policy of a real run samples: `python figures/pipeline.py RUN`.

The image is always a generated phantom, never one of the run's data. The picture in the README is made by these
commands; the training takes five minutes on one CPU core:

    python -m utils.phantoms runs/phantoms --size 64
    OMP_NUM_THREADS=1 python _policy_gradient/train.py --data-path runs/phantoms --output-dir runs/masks \\
        --device cpu --workers 0 --model test_resnet --policy-model test_resnet \\
        --train-crop-size 64 --val-resize-size 64 --val-crop-size 64 --epochs 20 --batch-size 16 \\
        --opt adamw --lr 2e-3 --policy-lr 4e-3 --lr-scheduler cosineannealinglr --objective reinforce \\
        --baseline loo --masks-per-image 4 --entropy-weight .04 --head-weight .8 --grid 4 --kernel 13 --sigma 6
    python figures/pipeline.py runs/masks -o figures/pipeline.svg --overwrite
"""

import argparse
import base64
import io
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from _policy_gradient.gallery import CPU, as_pixels, checkpoint_of, read_run, stage_name
from _policy_gradient.masking import build_mask, build_policy, draw_masks
from utils.data.transforms import Normalize
from utils.flags import natural
from utils.phantoms.dataset import CLASSES, render
from utils.results.log import read_log
from utils.results.provenance import read_starts
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.files import check_absent, write_atomically
from utils.runtime.processes import run_script
from utils.runtime.text import print_line

WIDTH, HEIGHT = 800, 650  # of the drawing; on a page of 400 pixels, text of 25 is as large as a caption
SIDE = 130  # of a picture or a box
COLUMNS = (26, 222, 418, 626)  # left edges
POLICY_ROW, LOSS_ROW, TUNING_ROW = 92, 290, 538  # upper edges
FONTS = "Helvetica, Arial, sans-serif"
INK, GRADIENT, REWARD = "#222222", "#00609c", "#b34700"
DARK, BRIGHT = np.array([24, 37, 84]), np.array([250, 214, 92])  # a mask of 0 and of 1


class Pictures(NamedTuple):
    """uint8 arrays (height, width, 3): the phantom, one sampled mask for it, and their product."""

    image: np.ndarray
    cells: np.ndarray
    mask: np.ndarray
    masked: np.ndarray


@torch.no_grad()
def sample_pictures(args: argparse.Namespace, state: dict[str, Any], class_name: str, seed: int) -> Pictures:
    """One mask that the run's policy samples for a phantom; seed: of the phantom and of the sample."""
    policy = build_policy(args, state, None, CPU).eval()
    mask, normalize = build_mask(args, args.val_crop_size, CPU), Normalize(args.mean, args.std)
    phantom = torch.from_numpy(render(class_name, np.random.default_rng(seed), args.val_crop_size))
    images = normalize(phantom.expand(1, 3, -1, -1))  # (1, 3, S, S)
    torch.manual_seed(seed)
    masked = draw_masks(policy, mask, *policy(images), images)
    low, high = args.mask_range
    return Pictures(
        _as_bytes(as_pixels(images, normalize)[0]),
        _in_colours(masked.action.cells.view(args.grid, args.grid)),
        _in_colours((masked.masks[0, 0] - low) / (high - low)),
        _as_bytes(as_pixels(masked.images, normalize)[0]),
    )


def _as_bytes(pixels: np.ndarray) -> np.ndarray:
    return np.rint(255 * pixels.clip(0, 1)).astype(np.uint8)


def _in_colours(values: torch.Tensor) -> np.ndarray:
    """Values (height, width) as colours from DARK at 0 to BRIGHT at 1 and above, which --keep-mean can give."""
    shares = values.numpy()[..., None].clip(0, 1)
    return np.rint(DARK + (BRIGHT - DARK) * shares).astype(np.uint8)


def text(x: float, y: float, words: str, **style: object) -> str:
    """Words centred at x, on the baseline y."""
    settings = {"text-anchor": "middle", "font-size": 25, "fill": INK} | style
    return f"<text x='{x:g}' y='{y:g}' {_attributes(settings)}>{words}</text>"


def box(left: float, top: float, width: float, height: float, *lines: str, **style: object) -> str:
    """A frame around centred lines of text."""
    settings = {"rx": 10, "fill": "#ffffff", "stroke": INK, "stroke-width": 2} | style
    frame = f"<rect x='{left:g}' y='{top:g}' width='{width:g}' height='{height:g}' {_attributes(settings)}/>"
    first = top + height / 2 + 9 - 15 * (len(lines) - 1)
    return frame + "".join(text(left + width / 2, first + 30 * number, line) for number, line in enumerate(lines))


def picture(
    left: float, top: float, pixels: np.ndarray, caption: str, size: float = SIDE, rendering: str = "auto"
) -> str:
    """A square picture with its caption above it; rendering: pixelated keeps the edges of few pixels sharp."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    settings = {"x": left, "y": top, "width": size, "height": size, "style": f"image-rendering: {rendering}"}
    image = f"<image {_attributes(settings)} href='data:image/png;base64,{data}'/>"
    return text(left + size / 2, top - 12, caption) + image


def arrow(*points: tuple[float, float], colour: str = INK, dashes: str = "none") -> str:
    """Straight pieces from the first point to the last, which has the head."""
    (x0, y0), (x1, y1) = points[-2:]
    length = max(abs(x1 - x0), abs(y1 - y0))
    dx, dy = 14 * (x1 - x0) / length, 14 * (y1 - y0) / length  # pieces are horizontal or vertical
    ends = [*points[:-1], (x1 - dx, y1 - dy)]
    line = " ".join(f"{x:g},{y:g}" for x, y in ends)
    head = f"{x1:g},{y1:g} {x1 - dx - dy / 2:g},{y1 - dy - dx / 2:g} {x1 - dx + dy / 2:g},{y1 - dy + dx / 2:g}"
    style = _attributes({"fill": "none", "stroke": colour, "stroke-width": 3.5, "stroke-dasharray": dashes})
    return f"<polyline points='{line}' {style}/><polygon points='{head}' fill='{colour}'/>"


def _attributes(values: dict[str, object]) -> str:
    return " ".join(f"{name}='{value}'" for name, value in values.items())


def draw(pictures: Pictures, description: str) -> str:
    """The whole SVG. Its background is white, so that it is readable on a dark page."""
    first, second, third, fourth = COLUMNS
    middle, right = SIDE / 2, SIDE + 8
    policy_y, loss_y, tuning_y = POLICY_ROW + middle, LOSS_ROW + middle, TUNING_ROW + 45
    left_title = {"text-anchor": "start", "font-size": 27, "font-weight": "bold"}
    panel = {"stroke": "none", "fill": "#f1f3f6"}
    parts = [
        box(0, 0, WIDTH, HEIGHT, rx=0, stroke="none"),
        box(8, 8, WIDTH - 16, 466, **panel),
        text(first, 42, "1  Pretrain policy and classifier together", **left_title),
        picture(first, POLICY_ROW, pictures.image, "image"),
        box(second, POLICY_ROW, SIDE, SIDE, "policy", "network", stroke=REWARD),
        picture(third, POLICY_ROW, pictures.cells, "sampled cells", rendering="pixelated"),
        picture(fourth, POLICY_ROW, pictures.mask, "smooth mask"),
        picture(fourth, LOSS_ROW, pictures.masked, "image &#215; mask"),
        box(third, LOSS_ROW, SIDE, SIDE, "classifier", stroke=GRADIENT),
        box(second, LOSS_ROW, SIDE, SIDE, "loss"),
        arrow((first + right, policy_y), (second - 8, policy_y)),
        arrow((second + right, policy_y), (third - 8, policy_y)),
        arrow((third + right, policy_y), (fourth - 8, policy_y)),
        arrow((fourth + middle, POLICY_ROW + right), (fourth + middle, LOSS_ROW - 38)),
        arrow((fourth - 8, loss_y), (third + right, loss_y)),
        arrow((third - 8, loss_y), (second + right, loss_y)),
        arrow((second + middle, LOSS_ROW - 8), (second + middle, POLICY_ROW + right), colour=REWARD, dashes="4 4"),
        text(second + middle - 14, LOSS_ROW - 28, "policy gradient", fill=REWARD, **{"text-anchor": "end"}),
        arrow(
            (second + middle, LOSS_ROW + right),
            (second + middle, LOSS_ROW + right + 14),
            (third + middle, LOSS_ROW + right + 14),
            (third + middle, LOSS_ROW + right),
            colour=GRADIENT,
            dashes="12 5",
        ),
        text((second + third + SIDE) / 2, LOSS_ROW + SIDE + 47, "gradient", fill=GRADIENT),
        box(8, 482, WIDTH - 16, HEIGHT - 490, **panel),
        text(first, 518, "2  Fine-tune on clean images", **left_title),
        picture(first, TUNING_ROW, pictures.image, "", size=90),
        arrow((first + 98, tuning_y), (second - 8, tuning_y)),
        box(second, TUNING_ROW, third + SIDE - second, 90, "heated classifier,", "fine-tuned", stroke=GRADIENT),
        arrow((third + right, tuning_y), (fourth - 8, tuning_y)),
        box(fourth, TUNING_ROW, SIDE, 90, "test"),
        arrow((third + SIDE - 18, LOSS_ROW + right), (third + SIDE - 18, TUNING_ROW - 8)),
        text(third + SIDE - 4, LOSS_ROW + SIDE + 36, "weights", **{"text-anchor": "start"}),
    ]
    size = {"width": WIDTH, "height": HEIGHT, "viewBox": f"0 0 {WIDTH} {HEIGHT}", "font-family": FONTS}
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {_attributes(size)}>"
    return "\n".join([head, f"<title>The pipeline</title><desc>{escape(description)}</desc>", *parts, "</svg>\n"])


def describe(args: argparse.Namespace, stage: str, folder: Path, phantom: str) -> str:
    """What the picture shows, in a sentence each: image, policy, log and commit; stage: see `stage_name`."""
    policy = args.policy_model if args.mask_policy == "learned" else f"--mask-policy {args.mask_policy}"
    objective = f"--objective {args.objective} --policy-sign {args.policy_sign}"
    lines = [
        f"Image: a generated phantom ({phantom}).",
        f"Mask: sampled by a policy ({policy}, {args.grid} x {args.grid} cells) {stage} of {objective}.",
    ]
    if log := read_log(folder):
        names = ("mask_mean", "mask_std_between_images", "policy_entropy", "prior_drift")
        changes = [f"{name} {log[0][name]:.3f} to {log[-1][name]:.3f}" for name in names if name in log[0]]
        lines.append(f"Log, first to last epoch: {', '.join(changes)}.")
    if starts := read_starts(folder):
        lines.append(f"Run of {starts[-1]['time'][:10]}, commit {starts[-1]['commit']}.")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__.splitlines()[0], prog="python figures/pipeline.py")
    parser.add_argument(
        "run", type=expanded_path, metavar="RUN", help="the --output-dir of a pretraining, or one of its checkpoints"
    )
    parser.add_argument("--phantom", default="mr-brain-tumour", choices=CLASSES, help="class of the image")
    parser.add_argument("--seed", type=natural, default=0, help="of the image and of the sampled mask; default: 0")
    parser.add_argument(
        "-o", "--output", type=expanded_path, default=Path("pipeline.svg"), help="an .svg file; default: pipeline.svg"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    options = parser.parse_args(argv)
    check_absent(options.output, options.overwrite)
    path = checkpoint_of(options.run)
    args, state = read_run(path, None, "val")
    pictures = sample_pictures(args, state, options.phantom, options.seed)
    stage = stage_name(state["epoch"], state["step"])
    description = describe(args, stage, path.parent, f"{options.phantom}, --seed {options.seed}")
    write_atomically(options.output, draw(pictures, description).encode())
    for line in description.splitlines():
        print_line(line)


if __name__ == "__main__":
    run_script(main)
