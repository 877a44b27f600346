"""What a policy makes of a few images, for the mask gallery; the training that it watches does not move by a bit."""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from _policy_gradient.mask import SmoothMask
from _policy_gradient.masking import draw_masks
from _policy_gradient.policy import Policy
from utils.data.dataset import ImageFolder
from utils.data.samplers import SampleKey, derive_seed
from utils.data.transforms import Normalize
from utils.runtime.errors import UserError
from utils.runtime.text import explain_forms

if TYPE_CHECKING:  # matplotlib costs each process's start a second
    from matplotlib.figure import Figure

MOST_CLASSES = 16  # of more, so many are shown, evenly chosen
CPU = torch.device("cpu")


class Examples(NamedTuple):
    """Images of a split: their paths in it, their indices, and uint8 images (N, 1 or 3, S, S) on the CPU."""

    names: list[str]
    indices: list[int]
    images: Tensor


class Stage(NamedTuple):
    """What a policy makes of N images: arrays in [0, 1], (N, G, G) three times, (N, S, S) and (N, S, S, 3).

    prior: the means of the running prior alone, the same for all images; masks: in the range of --mask-range, not
    faded; masked: as pixels, not normalised.
    """

    prior: np.ndarray
    means: np.ndarray
    cells: np.ndarray
    masks: np.ndarray
    masked: np.ndarray


def choose_examples(split: ImageFolder, classes: Sequence[str] | None = None, images_per_class: int = 1) -> Examples:
    """The first images of each of the classes, through the split's transform; what cannot be read is passed over.

    classes: None: all that have images, or 16 of them evenly chosen. Raises UserError for an unknown class, and for one
    of which no image can be read.
    """
    if classes is None:
        filled = np.unique(split.targets)
        shown = min(MOST_CLASSES, len(filled))
        numbers = filled[np.linspace(0, len(filled) - 1, shown).round().astype(int)].tolist()
    else:
        unknown = [name for name in classes if name not in split.classes]
        if unknown:
            forms = explain_forms(unknown, split.classes)
            raise UserError(f"--classes {unknown[0]}: {split.root} has no such class.{forms}")
        numbers = [split.classes.index(name) for name in classes]
    found = [pair for number in numbers for pair in _first_readable(split, number, images_per_class)]
    indices = [index for index, _ in found]
    names = [split.files.path_as_text(index) for index in indices]
    return Examples(names, indices, torch.stack([image for _, image in found]))


def _first_readable(split: ImageFolder, number: int, count: int) -> list[tuple[int, Tensor]]:
    """Indices and images of a class, at most `count`; raises the UserError of the last image if there is none."""
    found, problem = [], UserError(f"{split.root}: has no image of the class {split.classes[number]}.")
    for index in np.flatnonzero(split.targets == number).tolist():
        try:
            found.append((index, split[SampleKey(index)][0]))
        except UserError as error:
            problem = error
        if len(found) == count:
            break
    if not found:
        raise problem
    return found


@torch.no_grad()
def run_policy(
    policy: Policy, mask: SmoothMask, normalize: Normalize, examples: Examples, seed: int, epochs_done: int
) -> Stage:
    """The policy in evaluation on the CPU in float32, as a copy: training, compiled graphs and statistics stay as is.

    mask, normalize: on the CPU. The cells of an image are drawn from (seed, epochs_done, index) only.
    """
    # A copy of a compiled module is not compiled. Contiguous: see wiring.memory_format.
    policy = copy.deepcopy(policy).to(CPU, torch.float32, memory_format=torch.contiguous_format).eval()
    images = normalize(examples.images)  # (N, 3, S, S)
    head_alpha, head_beta = policy(images)  # (N, G*G) each
    drawn = []
    state = torch.random.get_rng_state()
    try:
        for number, index in enumerate(examples.indices):
            torch.default_generator.manual_seed(derive_seed("gallery", seed, epochs_done, index))
            one = slice(number, number + 1)
            drawn.append(draw_masks(policy, mask, head_alpha[one], head_beta[one], images[one]))
    finally:
        torch.random.set_rng_state(state)
    cells = torch.cat([one.action.cells for one in drawn])
    log_alpha, log_beta = torch.cat([one.log_concentrations for one in drawn], dim=1)
    prior = torch.sigmoid(policy.prior[0] - policy.prior[1]).expand_as(cells)
    return Stage(
        *(_square(values, mask.grid) for values in (prior, torch.sigmoid(log_alpha - log_beta), cells)),
        torch.cat([one.masks for one in drawn]).squeeze(1).numpy(),
        as_pixels(torch.cat([one.images for one in drawn]), normalize),
    )


def _square(values: Tensor, grid: int) -> np.ndarray:
    """(N, G*G) to (N, G, G)."""
    return values.reshape(-1, grid, grid).numpy()


def as_pixels(normalized: Tensor, normalize: Normalize) -> np.ndarray:
    """Normalised images (N, 3, S, S) to pixels (N, S, S, 3), in [0, 1] where they came from pixels."""
    pixels = (normalized + normalize.shift) / (normalize.scale * 255)
    return pixels.permute(0, 2, 3, 1).numpy()


def draw_stages(
    examples: Examples,
    stages: dict[str, Stage | np.ndarray],
    normalize: Normalize,
    title: str,
    mask_range: Sequence[float] = (0, 1),
) -> "Figure":
    """The gallery: each image, and what comes of it in each stage; of a mere array (G, G) the prior's means."""
    from utils.results.mask_gallery import Column, Row, draw_gallery

    columns = [Column("", "image", "image")]
    pictures = [as_pixels(normalize(examples.images), normalize)]
    for name, stage in stages.items():
        columns.append(Column(name, "prior's means", "means"))
        if isinstance(stage, np.ndarray):
            pictures.append(stage[None].repeat(len(examples.indices), axis=0))
            continue
        columns.append(Column(name, "image's means", "means"))
        columns.append(Column(name, "sampled cells", "cells"))
        columns.append(Column(name, "smooth mask", "mask"))
        columns.append(Column(name, r"image $\times$ mask", "image"))
        pictures += stage
    rows = [Row(name, of_image) for name, of_image in zip(examples.names, zip(*pictures, strict=True), strict=True)]
    return draw_gallery(columns, rows, title, mask_middle=sum(mask_range) / 2)


def draw_policy(
    policy: Policy, split: ImageFolder, mask: SmoothMask, normalize: Normalize, seed: int, epochs_done: int
) -> "Figure":
    """The gallery of a policy as it is now, on the first image of each class of the split (of 16, if there are more).

    mask, normalize: on the CPU.
    """
    examples = choose_examples(split)
    stage = run_policy(policy, mask, normalize, examples, seed, epochs_done)
    title, mask_range = f"Masks of {split.root.name} images", (mask.low, mask.high)
    return draw_stages(examples, {after(epochs_done): stage}, normalize, title, mask_range)


def after(epochs: int, steps: int = 0) -> str:
    """What a stage is called."""
    if not epochs and not steps:
        return "before training"
    done = f"after {epochs} epoch{'s' if epochs != 1 else ''}"
    return f"{done} and {steps} steps" if steps else done
