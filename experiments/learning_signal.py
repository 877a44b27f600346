"""Can the policy learn? `python experiments/learning_signal.py RUN --data-path DATA`

Of some images of a split, with many masks each from the policy of a checkpoint, and both networks as in evaluation: how
much of the loss is the masks' doing, and how many masks would it take to tell the policy the way. With --grid, --kernel
and --sigma the same of uniform masks of another form, for the same classifier.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _policy_gradient.gallery import CPU, add_run_arguments, checkpoint_of, choose_examples, read_run
from _policy_gradient.mask import SmoothMask
from _policy_gradient.masking import build_mask, build_policy, draw_masks
from _policy_gradient.objective import leave_one_out_baseline
from _policy_gradient.policy import Policy, create_policy
from utils import arguments
from utils.data.splits import open_splits
from utils.data.transforms import Normalize
from utils.flags import positive_float, positive_int
from utils.runtime.command_line import Parser
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.training import build

SHUFFLES = 20


class Samples(NamedTuple):
    """losses: (N, K), of N images with K masks each; scores: (N, K, 2*G*G), of each mask's log-density."""

    losses: Tensor
    scores: Tensor


class Signal(NamedTuple):
    """Of a policy gradient: the squared length of its expectation, and how far that is from what chance gives.

    masks_needed: of how many masks the mean has as much signal as noise; infinite if no signal was found. deviations:
    of the squared length from that with advantages shuffled, in standard deviations of the latter.
    """

    squared_length: float
    masks_needed: float
    deviations: float


@torch.no_grad()
def sample(
    classifier: nn.Module, policy: Policy, mask: SmoothMask, images: Tensor, targets: Tensor, masks_per_image: int
) -> Samples:
    """Losses and scores of images (N, 3, S, S), targets (N,); one image at a time, to spare memory."""
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
    """How well the textbook gradient, with leave-one-out baselines, is known from single masks.

    shared: the mean gradient of all images, which is what masks that are the same for all could follow; otherwise each
    image's own. The masks of an image are halved; the product of the halves' gradients estimates the squared length of
    the expected one without bias.
    """
    found, power = _squared_length(samples.losses, samples.scores, shared)
    by_chance = torch.stack(
        [_squared_length(_shuffle(samples.losses), samples.scores, shared)[0] for _ in range(SHUFFLES)]
    )
    needed = (power - found) / found if found > 0 else torch.inf
    return Signal(float(found), float(needed), float((found - by_chance.mean()) / by_chance.std()))


def _shuffle(losses: Tensor) -> Tensor:
    """Each image's losses (N, K) in an order of their own."""
    return losses.gather(1, torch.rand_like(losses).argsort(1))


def _squared_length(losses: Tensor, scores: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    """Of the expected gradient, estimated; and the mean squared length of a single mask's."""
    halves, power = [], []
    for loss, of_half in zip(losses.chunk(2, 1), scores.chunk(2, 1), strict=True):
        advantage = loss - leave_one_out_baseline(loss)  # (N, K/2)
        halves.append(torch.einsum("nk,nkc->nc", advantage, of_half) / loss.shape[1])  # (N, 2*G*G)
        power.append((advantage.square() * of_half.square().sum(2)).mean())
    if shared:
        halves = [half.mean(0, keepdim=True) for half in halves]
    return (halves[0] * halves[1]).sum(1).mean(), torch.stack(power).mean()


def report(samples: Samples) -> str:
    """The figures, a line each."""
    losses = samples.losses
    within, between = losses.var(dim=1).mean(), losses.mean(dim=1).var()
    lines = [
        f"{losses.shape[0]} images, {losses.shape[1]} masks each; mean cross-entropy {losses.mean():.4f}",
        f"variance of the loss between an image's masks: {within:.3g}, {100 * within / (within + between):.2g} % of it",
    ]
    for name, shared in (("the mean gradient of all images", True), ("an image's own gradient", False)):
        signal = measure_signal(samples, shared)
        lines.append(
            f"{name}: as much signal as noise after {signal.masks_needed:.3g} masks "
            f"({signal.deviations:.1f} standard deviations from chance)"
        )
    return "\n".join(lines)


def uniform(args: argparse.Namespace, options: argparse.Namespace) -> Policy:
    """A policy of uniform masks of another form, which `args` then say."""
    args.grid, args.kernel, args.sigma = options.grid, options.kernel or args.kernel, options.sigma or args.sigma
    return create_policy("uniform", "", args.grid, args.val_crop_size)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python experiments/learning_signal.py")
    add_run_arguments(parser)
    parser.add_argument("--images-per-class", type=positive_int, default=8, help="the first ones; default: 8")
    parser.add_argument("--masks-per-image", type=positive_int, default=256, help="default: 256")
    parser.add_argument("--seed", type=int, default=0, help="of the masks; default: 0")
    parser.add_argument("--grid", type=positive_int, help="uniform masks of so many cells a side, not the policy's")
    parser.add_argument("--kernel", type=positive_int, help="with --grid: their blur, pixels; default: the run's")
    parser.add_argument("--sigma", type=positive_float, help="with --grid: their blur, pixels; default: the run's")
    options = parser.parse_args(argv)
    arguments.check_limits(vars(options))
    if options.masks_per_image < 4 or options.masks_per_image % 2:
        raise UserError(f"--masks-per-image {options.masks_per_image}: expected an even number of at least 4.")
    if options.grid is None and (options.kernel or options.sigma):
        raise UserError("--kernel and --sigma: are of the uniform masks of --grid; give that too.")
    path = checkpoint_of(options.run)
    args, state = read_run(path, options.data_path, options.split)
    split = open_splits(args, state["classes"], str(path)).evaluation
    examples = choose_examples(split, None, options.images_per_class)
    classifier = build.classifier(args, split.classes, state, None, CPU).eval()
    policy = build_policy(args, state, None, CPU) if options.grid is None else uniform(args, options)
    images = Normalize(args.mean, args.std)(examples.images)  # (N, 3, S, S)
    targets = torch.as_tensor(split.targets)[examples.indices].long()
    torch.manual_seed(options.seed)
    mask = build_mask(args, args.val_crop_size, CPU)
    print(report(sample(classifier, policy.eval(), mask, images, targets, options.masks_per_image)))


if __name__ == "__main__":
    run_script(main, prints_result=True)
