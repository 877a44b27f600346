"""Can the policy learn? `python experiments/learning_signal.py RUN --data-path DATA`

Draws many masks for each of some images, with the policy and the classifier of a checkpoint in evaluation mode. Prints
how much of the loss's variance comes from the masks, and how many masks the policy gradient needs until it has as much
signal as noise. With --grid, --kernel and --sigma: the same for uniform masks of another form and the same classifier.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _policy_gradient.flags import add_run_arguments
from _policy_gradient.gallery import CPU, checkpoint_of, choose_examples, read_run
from _policy_gradient.mask import SmoothMask
from _policy_gradient.masking import build_mask, build_policy, draw_masks
from _policy_gradient.objective import leave_one_out_baseline
from _policy_gradient.policy import Policy, create_policy
from utils import arguments
from utils.data.splits import open_splits
from utils.data.transforms import Normalize
from utils.flags import positive_float, positive_int, seed
from utils.runtime.command_line import Parser
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.training import build

SHUFFLES = 20


class Samples(NamedTuple):
    """Losses (N, K) of N images with K masks each, and scores (N, K, 2*G*G): gradients of the masks' log-densities."""

    losses: Tensor
    scores: Tensor


class Signal(NamedTuple):
    """How well a policy gradient is known from single masks.

    squared_length: of the expected gradient, estimated; masks_needed: number of masks whose mean gradient has as much
    signal as noise, infinite without signal; deviations: distance of the squared length from its mean for shuffled
    losses, in standard deviations of the latter.
    """

    squared_length: float
    masks_needed: float
    deviations: float


@torch.no_grad()
def sample(
    classifier: nn.Module, policy: Policy, mask: SmoothMask, images: Tensor, targets: Tensor, masks_per_image: int
) -> Samples:
    """Losses and scores for images (N, 3, S, S) and targets (N,), one image at a time to save memory."""
    losses, scores = [], []
    for image, target in zip(images.split(1), targets.split(1), strict=True):
        drawn = draw_masks(policy, mask, *policy(image), image, masks_per_image=masks_per_image)
        losses.append(F.cross_entropy(classifier(drawn.images), target.expand(masks_per_image), reduction="none"))
        scores.append(score(drawn.log_concentrations, drawn.action.log_cells))
    return Samples(torch.stack(losses), torch.stack(scores))


def score(log_concentrations: Tensor, log_cells: Tensor) -> Tensor:
    """d log p / d log-concentration, (K, 2*G*G), of masks under log-concentrations (2, 1, G*G).

    log_cells: log x and log(1 - x) of their samples, (2, K, G*G).
    """
    concentrations = log_concentrations.exp()  # (2, 1, G*G)
    total = torch.digamma(concentrations.sum(0))  # (1, G*G)
    scores = concentrations * (log_cells - torch.digamma(concentrations) + total)  # (2, K, G*G)
    return torch.cat(list(scores), dim=1)


def measure_signal(samples: Samples, shared: bool) -> Signal:
    """The signal of the textbook gradient with leave-one-out baselines.

    shared: of the mean gradient of all images, which masks that do not depend on the image could follow; otherwise of
    image-specific gradients. The masks of an image are split into halves; the product of the halves' gradients is an
    unbiased estimate of the squared length of the expected gradient.
    """
    squared_length, power = _squared_length(samples.losses, samples.scores, shared)
    by_chance = torch.empty(SHUFFLES)
    for number in range(SHUFFLES):
        shuffled = samples.losses.gather(1, torch.rand_like(samples.losses).argsort(1))  # (N, K), within each image
        by_chance[number] = _squared_length(shuffled, samples.scores, shared)[0]
    masks_needed = (power - squared_length) / squared_length if squared_length > 0 else torch.inf
    deviations = (squared_length - by_chance.mean()) / by_chance.std()
    return Signal(float(squared_length), float(masks_needed), float(deviations))


def _squared_length(losses: Tensor, scores: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Squared length of the expected gradient, estimated, and mean squared length of a single mask's gradient."""
    halves, power = [], []
    for loss, half_scores in zip(losses.chunk(2, 1), scores.chunk(2, 1), strict=True):
        advantage = loss - leave_one_out_baseline(loss)  # (N, K/2)
        halves.append(torch.einsum("nk,nkc->nc", advantage, half_scores) / loss.shape[1])  # (N, 2*G*G)
        power.append((advantage.square() * half_scores.square().sum(2)).mean())
    if shared:
        halves = [half.mean(0, keepdim=True) for half in halves]
    return (halves[0] * halves[1]).sum(1).mean(), torch.stack(power).mean()


def report(samples: Samples) -> str:
    """The results, one per line."""
    losses = samples.losses
    within, between = losses.var(dim=1).mean(), losses.mean(dim=1).var()
    share = within / (within + between)
    lines = [
        f"{losses.shape[0]} images, {losses.shape[1]} masks each; mean cross-entropy {losses.mean():.4f}",
        f"variance of the loss between an image's masks: {within:.3g}, {100 * share:.2g} % of the total",
    ]
    for name, shared in (("mean gradient of all images", True), ("image-specific gradient", False)):
        signal = measure_signal(samples, shared)
        lines.append(
            f"{name}: as much signal as noise after {signal.masks_needed:.3g} masks "
            f"({signal.deviations:.1f} standard deviations from chance)"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python experiments/learning_signal.py")
    add_run_arguments(parser)
    add = parser.add_argument
    add("--images-per-class", type=positive_int, default=8, help="the first images of each class; default: 8")
    add("--masks-per-image", type=positive_int, default=256, help="default: 256")
    add("--seed", type=seed, default=0, help="seed of the masks; default: 0")
    add("--grid", type=positive_int, help="draw uniform masks with this many cells per side")
    add("--kernel", type=positive_int, help="with --grid: size of their blur, pixels; default: the run's")
    add("--sigma", type=positive_float, help="with --grid: sigma of their blur, pixels; default: the run's")
    options = parser.parse_args(argv)
    arguments.check_limits(vars(options))
    if options.masks_per_image < 4 or options.masks_per_image % 2:
        raise UserError(f"--masks-per-image {options.masks_per_image}: expected an even number of at least 4.")
    if options.grid is None and (options.kernel or options.sigma):
        raise UserError("--kernel and --sigma: only for the uniform masks of --grid; give --grid too.")
    path = checkpoint_of(options.run)
    args, state = read_run(path, options.data_path, options.split)
    split = open_splits(args, state["classes"], str(path)).evaluation
    examples = choose_examples(split, None, options.images_per_class)
    classifier = build.classifier(args, split.classes, state, None, CPU).eval()
    if options.grid is None:
        policy = build_policy(args, state, None, CPU)
    else:
        args.grid, args.kernel, args.sigma = options.grid, options.kernel or args.kernel, options.sigma or args.sigma
        policy = create_policy("uniform", "", args.grid, args.val_crop_size)
    images = Normalize(args.mean, args.std)(examples.images)  # (N, 3, S, S)
    targets = torch.as_tensor(split.targets)[examples.indices].long()
    torch.manual_seed(options.seed)
    mask = build_mask(args, args.val_crop_size, CPU)
    print(report(sample(classifier, policy.eval(), mask, images, targets, options.masks_per_image)))


if __name__ == "__main__":
    run_script(main, prints_result=True)
