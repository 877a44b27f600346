"""Policy, mask and objective for one batch."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from _policy_gradient.mask import SmoothMask, fading_weight
from _policy_gradient.objective import Losses, Objective
from _policy_gradient.policy import (
    LOG_CONCENTRATION_LIMIT,
    Action,
    Policy,
    create_policy,
    mean_heads,
    sample_action,
)
from utils.checkpoints.checkpoint import Weights
from utils.runtime import distributed
from utils.runtime.progress import say
from utils.training import build, models
from utils.training.accumulation import InMicroBatches
from utils.training.run import Run


class MaskedImages(NamedTuple):
    """A batch after masking: log-concentrations (2, B, G*G), action, masks (B*K, 1, S, S), images (B*K, 3, S, S).

    masks: as applied to the images, in the range of --mask-range and faded.
    """

    log_concentrations: Tensor
    action: Action
    masks: Tensor
    images: Tensor


def draw_masks(
    policy: Policy,
    mask: SmoothMask,
    head_alpha: Tensor,
    head_beta: Tensor,
    images: Tensor,
    *,
    masks_per_image: int = 1,
    clamped_density: bool = False,
    pathwise_sign: float = 0.0,
    mask_weight: Tensor | None = None,
) -> MaskedImages:
    """Sample K masks for each image (B, 3, S, S) from the heads' output (B, G*G), smooth and apply them.

    clamped_density, pathwise_sign: see `sample_action`. mask_weight: from `fading_weight`, () on the device; None: no
    fading. It is a tensor because a CUDA graph reads it at each replay, while a number would become part of the graph.
    The function has no side effects besides random numbers, so that it can be replayed as a CUDA graph.
    """
    log_concentrations = policy.log_concentrations(head_alpha, head_beta)  # (2, B, G*G)
    action = sample_action(
        *log_concentrations, masks_per_image, clamped_density=clamped_density, pathwise_sign=pathwise_sign
    )
    masks = mask(action.cells)  # (B*K, 1, S, S)
    if mask_weight is not None:
        masks = 1 + mask_weight * (masks - 1)
    if masks_per_image > 1:
        images = images.repeat_interleave(masks_per_image, dim=0)
    return MaskedImages(log_concentrations, action, masks, images * masks)


@torch.no_grad()
def policy_health(policy: Policy, masked: MaskedImages, advantage: Tensor) -> dict[str, Tensor]:
    """Scalars () for the log: is the policy learning, and are its masks image-specific?

    advantage: (B*K,). docs/logging.md explains each quantity.
    """
    log_concentrations, action, masks, _ = masked
    means = torch.sigmoid(log_concentrations[0] - log_concentrations[1])  # (B, G*G)
    mask_std, mask_mean = torch.std_mean(masks, correction=0)
    return {
        "mask_mean": mask_mean,
        "mask_std": mask_std,
        "mask_std_between_images": means.std(dim=0, correction=0).mean(),
        "policy_entropy": action.entropy.mean(),
        "policy_log_density": action.log_prob.mean(),
        "advantage_std": advantage.double().std(correction=0),
        "prior_drift": policy.prior_drift(),
        "concentrations_at_bounds": (log_concentrations.abs() >= LOG_CONCENTRATION_LIMIT).double().mean(),
    }


def warn_of_bounds(epoch: int, share: float) -> None:
    """Print a warning if log-concentrations were clamped at their bounds, where they have no gradient."""
    if share > 0:
        say(
            f"warning: in epoch {epoch}, {100 * share:.3g} % of the log-concentrations were at their bounds of "
            f"-{LOG_CONCENTRATION_LIMIT:g} and {LOG_CONCENTRATION_LIMIT:g}, where they have no gradient; a lower "
            "--policy-lr, or with reinforce an --entropy-weight, keeps them inside."
        )


class Masking:
    """The masks of a training: policy, smooth mask and objective, applied to one batch after another.

    policy: the policy, wrapped if there are several processes; images (B, 3, S, S) to h_a and h_b, (B, G*G) each.
    draw: `draw_masks` with these settings.
    """

    def __init__(
        self,
        policy: Policy,
        mask: SmoothMask,
        objective: Objective,
        device: torch.device,
        *,
        epochs: int,
        fade_epochs: int,
        as_graph: bool,
        micro_batches: int = 1,
    ) -> None:
        """epochs, fade_epochs: see `fading_weight`; as_graph: replay the drawing as a CUDA graph.

        micro_batches: the number that the policy's batch is split into.
        """
        self.objective, self.epochs, self.fade_epochs = objective, epochs, fade_epochs
        self._unwrapped = policy
        self.policy = distributed.wrap(InMicroBatches(policy, micro_batches) if micro_batches > 1 else policy, device)
        self.mask_weight = torch.ones((), device=device) if fade_epochs else None
        draw = partial(
            draw_masks,
            policy,
            mask,
            masks_per_image=objective.masks_per_image,
            clamped_density=objective.clamped_density,
            pathwise_sign=objective.pathwise_sign,
            mask_weight=self.mask_weight,
        )
        # The backend replays torch's own kernels and generates none, so results are equal bit for bit.
        self.draw = torch.compile(draw, backend="cudagraphs") if as_graph else draw

    def repeat(self, targets: Tensor) -> Tensor:
        """Targets (B, ...) to those of K masks for each image, (B*K, ...)."""
        masks_per_image = self.objective.masks_per_image
        return targets if masks_per_image == 1 else targets.repeat_interleave(masks_per_image, dim=0)

    def health(self, masked: MaskedImages, advantage: Tensor) -> dict[str, Tensor]:
        """See `policy_health`."""
        return policy_health(self._unwrapped, masked, advantage)

    def batch_means(self, heads: tuple[Tensor, Tensor], cross_entropy: Tensor) -> list[Tensor]:
        """Means over this rank's batch; `loss` and `update` need those over all ranks.

        heads: (B, G*G) each; cross_entropy: (B*K,).
        """
        return [mean_heads(*heads), *self.objective.batch_means(cross_entropy)]

    def loss(self, action: Action, losses: Tensor, cross_entropy: Tensor, means: list[Tensor]) -> Losses:
        """See `Objective.forward`. means: `batch_means` over all ranks."""
        return self.objective(losses, action.log_prob, action.entropy, cross_entropy, means[1:])

    def update(self, means: list[Tensor], skipped: Tensor) -> None:
        """Move the running prior and the moving baseline, unless the step was skipped: a bool tensor ()."""
        self._unwrapped.update_prior(means[0], skipped)
        self.objective.update_baseline(skipped)

    def fade(self, epoch: int) -> dict[str, float]:
        """Set the weight of the masks in this epoch, and return it for the log; nothing without fading."""
        if self.mask_weight is None:
            return {}
        weight = fading_weight(epoch, self.epochs, self.fade_epochs)
        self.mask_weight.fill_(weight)  # in place, because a CUDA graph reads it
        return {"mask_weight": weight}


def build_policy(
    args: argparse.Namespace, state: dict[str, Any] | None, weights: Weights | None, device: torch.device
) -> Policy | None:
    """The policy on its device, with the weights of the checkpoint or file; None if there is none to train or test."""
    if weights is not None and weights.policy_net is None:
        return None
    policy = create_policy(args.mask_policy, args.policy_model, args.grid, args.train_crop_size, args.head_weight)
    if policy is None:
        return None
    if args.test_only and args.mask_policy == "learned" and args.val_crop_size != args.train_crop_size:
        models.output_width(policy.heads.backbone, args.val_crop_size, "--policy-model")
    saved = state["policy_net"] if state else weights.policy_net if weights else None
    if saved is not None:
        models.load_strictly(policy, saved, f"{args.resume}, its policy")
    if args.sync_bn:
        policy = models.synchronize_batch_norm(policy, device)
    return policy.to(device, memory_format=build.memory_format(args, device))


def build_mask(args: argparse.Namespace, size: int, device: torch.device) -> SmoothMask:
    """The mask for images of size x size pixels, on the device; not faded."""
    return SmoothMask(size, args.grid, args.kernel, args.sigma, *args.mask_range, args.keep_mean).to(device)


def build_objective(args: argparse.Namespace) -> Objective:
    return Objective(args.objective, args.baseline, args.masks_per_image, args.entropy_weight, args.policy_sign)


def build_masking(args: argparse.Namespace, policy: Policy, objective: Objective, device: torch.device) -> Masking:
    return Masking(
        policy,
        build_mask(args, args.train_crop_size, device),
        objective,
        device,
        epochs=args.epochs,
        fade_epochs=args.mask_fade_epochs,
        # A graph of the drawing with a gradient to the cells has not been tried.
        as_graph=args.compile and device.type == "cuda" and not objective.pathwise_sign,
        micro_batches=args.grad_accum_steps,
    )


def mean_masks(run: Run, policy: Policy | None) -> dict[str, Callable[[Tensor], Tensor]]:
    """The input of the "masked" evaluation: images times the mean mask of each image, nothing sampled."""
    if policy is None:
        say("The file holds no policy: evaluated without masks only.")
        return {}
    distributed.broadcast_buffers(policy)
    policy.eval()
    mask = build_mask(run.args, run.args.val_crop_size, run.device)

    def masked(images: Tensor) -> Tensor:
        images = run.normalize(images)  # (B, 3, S, S)
        return images * mask(policy.mean_cells(images))

    return {"masked": masked}
