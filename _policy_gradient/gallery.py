"""The mask gallery: `python -m _policy_gradient.gallery RUN --data-path DATA`, or --plot-every during training.

A block before training and one as of the checkpoint. In each a row per example image: the image, the means of the
prior, how much the image's own means differ from them, a sampled mask, and the masked image.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from _policy_gradient.flags import SCRIPT, build_parser, gallery_parser
from utils.arguments import check_command_line
from utils.runtime.processes import run_script

if __name__ == "__main__":
    check_command_line(gallery_parser(__doc__))  # --help and misspelt flags need none of the imports below

import numpy as np
import torch
from torch import Tensor

from _policy_gradient.mask import SmoothMask
from _policy_gradient.masking import build_mask, build_policy, draw_masks
from _policy_gradient.policy import Policy
from utils import arguments
from utils.checkpoints import checkpoint
from utils.data.dataset import ImageFolder
from utils.data.samplers import SampleKey, derive_seed
from utils.data.splits import open_splits
from utils.data.transforms import Normalize
from utils.runtime.errors import UserError
from utils.runtime.text import explain_forms, print_line
from utils.training import build
from utils.training.run import Run
from utils.training.start import report_paths

if TYPE_CHECKING:  # importing matplotlib takes a second
    from matplotlib.figure import Figure

MOST_CLASSES = 16  # of a data set with more classes, 16 evenly chosen ones are shown
CPU = torch.device("cpu")


class Examples(NamedTuple):
    """Images of a split: their paths in it, their indices, and uint8 images (N, 1 or 3, S, S) on the CPU."""

    names: list[str]
    indices: list[int]
    images: Tensor


class Stage(NamedTuple):
    """Masks of N images at one stage of training: arrays in [0, 1].

    prior: means of the running prior alone, equal for all images, (N, G, G). means: means of each image's own
    distribution, (N, G, G). cells: sampled cells, (N, G, G). masks: smooth masks in the range of --mask-range, not
    faded, (N, S, S). masked: masked images as pixels, not normalised, (N, S, S, 3).
    """

    prior: np.ndarray
    means: np.ndarray
    cells: np.ndarray
    masks: np.ndarray
    masked: np.ndarray


def choose_examples(split: ImageFolder, classes: Sequence[str] | None = None, images_per_class: int = 1) -> Examples:
    """The first readable images of each class, through the split's transform.

    classes: None for all classes that have images, at most 16, evenly chosen. Raises UserError for an unknown class,
    and for a class without a readable image.
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
    indices, images = [], []
    for number in numbers:
        for index, image in _first_readable(split, number, images_per_class):
            indices.append(index)
            images.append(image)
    return Examples([split.files.path_as_text(index) for index in indices], indices, torch.stack(images))


def _first_readable(split: ImageFolder, number: int, count: int) -> list[tuple[int, Tensor]]:
    """Indices and images of a class, at most `count`; raises the UserError of the last image if there is none."""
    readable, problem = [], UserError(f"{split.root}: has no image of the class {split.classes[number]}.")
    for index in np.flatnonzero(split.targets == number).tolist():
        try:
            readable.append((index, split[SampleKey(index)][0]))
        except UserError as error:
            problem = error
        if len(readable) == count:
            break
    if not readable:
        raise problem
    return readable


@torch.no_grad()
def run_policy(
    policy: Policy, mask: SmoothMask, normalize: Normalize, examples: Examples, seed: int, epochs_done: int
) -> Stage:
    """The masks of the examples by a float32 copy of the policy on the CPU; training is not affected.

    mask, normalize: on the CPU. The cells of an image depend on (seed, epochs_done, index) only.
    """
    # The copy of a compiled module is not compiled. Contiguous for the reason that build.memory_format gives.
    policy = copy.deepcopy(policy).to(CPU, torch.float32, memory_format=torch.contiguous_format).eval()
    images = normalize(examples.images)  # (N, 3, S, S)
    head_alpha, head_beta = policy(images)  # (N, G*G) each
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for row, index in enumerate(examples.indices):
            torch.default_generator.manual_seed(derive_seed("gallery", seed, epochs_done, index))
            rows = slice(row, row + 1)
            drawn.append(draw_masks(policy, mask, head_alpha[rows], head_beta[rows], images[rows]))
    cells = torch.cat([masked.action.cells for masked in drawn])  # (N, G*G)
    log_alpha, log_beta = torch.cat([masked.log_concentrations for masked in drawn], dim=1)  # (N, G*G) each
    prior = torch.sigmoid(policy.prior[0] - policy.prior[1]).expand_as(cells)

    def square(values: Tensor) -> np.ndarray:
        return values.reshape(-1, mask.grid, mask.grid).numpy()  # (N, G*G) to (N, G, G)

    return Stage(
        square(prior),
        square(torch.sigmoid(log_alpha - log_beta)),
        square(cells),
        torch.cat([masked.masks for masked in drawn]).squeeze(1).numpy(),
        as_pixels(torch.cat([masked.images for masked in drawn]), normalize),
    )


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
    """The gallery: a block per stage, a row per image. For a bare (G, G) array only the prior's means are shown."""
    from utils.results.mask_gallery import Row, draw_gallery

    images = as_pixels(normalize(examples.images), normalize)
    blocks = {}
    for name, stage in stages.items():
        if isinstance(stage, np.ndarray):
            blocks[f"{name}, only the prior"] = [Row("", stage)]
            continue
        arrays = zip(images, stage.prior, stage.means - stage.prior, stage.masks, stage.masked, strict=True)
        blocks[name] = [
            Row(path, prior, image, difference, mask, masked)
            for path, (image, prior, difference, mask, masked) in zip(examples.names, arrays, strict=True)
        ]
    return draw_gallery(blocks, title, mask_middle=sum(mask_range) / 2)


def draw_policy(
    policy: Policy, split: ImageFolder, mask: SmoothMask, normalize: Normalize, seed: int, epochs_done: int
) -> "Figure":
    """The gallery of the policy as it is now, for the first image of each class (of 16 classes, if there are more).

    mask, normalize: on the CPU.
    """
    examples = choose_examples(split)
    stage = run_policy(policy, mask, normalize, examples, seed, epochs_done)
    title, mask_range = f"Masks of {split.root.name} images", (mask.low, mask.high)
    return draw_stages(examples, {stage_name(epochs_done): stage}, normalize, title, mask_range)


def gallery_of(run: Run, policy: Policy | None) -> Callable[..., "Figure"] | None:
    """A function that draws the current masks on the CPU, given `epochs_done`; None without a policy."""
    if policy is None:
        return None
    mask = build_mask(run.args, run.args.val_crop_size, CPU)
    normalize = Normalize(run.args.mean, run.args.std)
    return partial(draw_policy, policy, run.splits.evaluation, mask, normalize, run.args.seed)


def stage_name(epochs: int, steps: int = 0) -> str:
    """Such as "before training" or "after 3 epochs and 20 steps"."""
    if not epochs and not steps:
        return "before training"
    done = f"after {epochs} epoch{'s' if epochs != 1 else ''}"
    return f"{done} and {steps} steps" if steps else done


def initial_policy(args: argparse.Namespace, state: dict[str, Any]) -> Policy | None:
    """The policy before training, rebuilt from the run's seed as train.py does; None if the rebuilt one differs.

    The running prior is drawn last, so if it equals the checkpoint's, everything drawn before it is equal too.
    """
    build.seed_everything(args)
    build.classifier(args, state["classes"], None, None, CPU)
    policy = build_policy(args, None, None, CPU)
    return policy if policy.state_dict()["initial_prior"].equal(state["policy_net"]["initial_prior"]) else None


def compute_stages(
    args: argparse.Namespace, state: dict[str, Any], examples: Examples, normalize: Normalize
) -> dict[str, Stage | np.ndarray]:
    """The stages before training and now. If the first policy cannot be rebuilt: only its prior's means, (G, G)."""
    mask = build_mask(args, args.val_crop_size, CPU)
    before, now = initial_policy(args, state), build_policy(args, state, None, CPU)
    if before is None:
        print_line("The policy's first weights cannot be rebuilt (other versions of torch or timm?): left out.")
        alpha, beta = now.initial_prior  # (1, G*G) each
        stages = {stage_name(0): (alpha - beta).sigmoid().view(args.grid, args.grid).numpy()}
    else:
        stages = {stage_name(0): run_policy(before, mask, normalize, examples, args.seed, 0)}
    epochs = state["epoch"]
    stages[stage_name(epochs, state["step"])] = run_policy(now, mask, normalize, examples, args.seed, epochs)
    return stages


def read_run(path: Path, data_path: str | None, split: str) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The arguments and state of a checkpoint, to show this split on the CPU; raises UserError for unfit files."""
    advice = f"give a run of {SCRIPT}/train.py, or its {checkpoint.CHECKPOINT}: only these hold masks to show"
    state = checkpoint.read_checkpoint(path, SCRIPT, advice)
    if "policy_net" not in state:
        raise UserError(f"{path}: is of a run with --mask-policy none, which has no masks to show.")
    given = {"resume": str(path)} | ({} if data_path is None else {"data_path": data_path})
    values = vars(arguments.for_resume(build_parser(), given, state["args"], str(path)))
    # As --test-only reads the split. Pretrained weights would draw no random numbers, so they are left out.
    values |= {"split": split, "test_only": True, "weights": None, "sync_bn": False, "channels_last": None}
    values |= {"cache_dataset": "off", "cache_dir": None}
    report_paths(values, given, str(path), partial(print, file=sys.stderr))  # stdout is for results
    return argparse.Namespace(**values), state


def checkpoint_of(run: Path) -> Path:
    return run / checkpoint.CHECKPOINT if run.is_dir() else run


def main(argv: Sequence[str] | None = None) -> None:
    options = gallery_parser(__doc__).parse_args(argv)
    from utils.results.figures import output_path, write_figure  # matplotlib: only the command needs it at once

    arguments.check_limits(vars(options))
    path = checkpoint_of(options.run)
    output = output_path(options.output, path.parent / "plots" / f"masks_{options.split}.png", options.overwrite)
    args, state = read_run(path, options.data_path, options.split)
    with redirect_stdout(sys.stderr):  # only the picture's path goes to stdout
        split = open_splits(args, state["classes"], str(path)).evaluation
    classes = None if options.classes is None else options.classes.split(",")
    examples = choose_examples(split, classes, options.images_per_class)
    normalize = Normalize(args.mean, args.std)
    stages = compute_stages(args, state, examples, normalize)
    title = f"Masks of {options.split} images: {options.run}"
    write_figure(output, draw_stages(examples, stages, normalize, title, args.mask_range))
    print_line(output)


if __name__ == "__main__":
    run_script(main)
