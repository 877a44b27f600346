"""The policy: Beta distributions over the cells of a grid, from a small network and a running prior."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _policy_gradient.flags import HEAD_WEIGHT
from utils.training.models import create_classifier, output_width

PRIOR_DECAY = 0.99  # decay of the running prior per training step
LOG_CONCENTRATION_LIMIT = 6.0  # log-concentrations are clamped to [-6, 6]
SAMPLE_MARGIN = 1e-6  # cells are clamped to (1e-6, 1 - 1e-6), as in the published code


class ConcentrationNetwork(nn.Module):
    """A timm backbone and two heads that output log-concentrations (published: resnet10t, 512 features)."""

    def __init__(self, model_name: str, grid: int, image_size: int) -> None:
        """Raises UserError for an unknown model, and for an image size that the model does not accept."""
        super().__init__()
        self.backbone = create_classifier(model_name, 0, image_size, flag="--policy-model")
        # Not `num_features`: some timm models widen their features before the pooled output.
        features = output_width(self.backbone, image_size, "--policy-model")
        self.alpha_head = _head(features, grid * grid)
        self.beta_head = _head(features, grid * grid)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) to h_a and h_b, (B, G*G) each."""
        features = self.backbone(images)  # (B, F)
        return self.alpha_head(features), self.beta_head(features)


def _head(features: int, cells: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, features),
        nn.BatchNorm1d(features),
        nn.ReLU(inplace=True),
        nn.Linear(features, features),
        nn.BatchNorm1d(features),
        nn.ReLU(inplace=True),
        nn.Linear(features, cells),
    )


class SharedConcentrations(nn.Module):
    """The control `prior`: one learnable pair of log-concentrations for all images, initially 0 (uniform noise)."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(1, grid * grid))
        self.log_beta = nn.Parameter(torch.zeros(1, grid * grid))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, ...) to the same h_a and h_b for each, (B, G*G)."""
        return self.log_alpha.expand(len(images), -1), self.log_beta.expand(len(images), -1)


def mean_heads(head_alpha: Tensor, head_beta: Tensor) -> Tensor:
    """The means of the heads' output (B, G*G) over the batch, (2, 1, G*G), without gradient."""
    return torch.stack([head_alpha.detach(), head_beta.detach()]).mean(1, keepdim=True)


class UniformConcentrations(nn.Module):
    """The control `uniform`: log-concentrations of 0, i.e. Beta(1, 1); nothing is learned."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.cells = grid * grid

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, ...) to zeros, (B, G*G) twice."""
        zeros = torch.zeros(len(images), self.cells, device=images.device)
        return zeros, zeros


class Policy(nn.Module):
    """Concentrations exp((1 - w) r + w h(x)) of the cells, from a running prior r and the heads' output h(x).

    The head weight w is 0.1 as published; at 1 the prior has no effect. `forward` returns h, so that
    DistributedDataParallel sees all learnable arithmetic; `log_concentrations` adds the prior. The prior is a buffer:
    equal on all ranks, saved and restored with the policy's state. `initial_prior` is kept to log the prior's drift.
    """

    prior: Tensor
    initial_prior: Tensor

    def __init__(self, heads: nn.Module, prior: Tensor, head_weight: float = HEAD_WEIGHT) -> None:
        """prior: (2, 1, G*G), the initial r_a and r_b."""
        super().__init__()
        self.heads = heads
        self.head_weight = head_weight
        self.register_buffer("prior", prior.clone())
        self.register_buffer("initial_prior", prior.clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) to the heads' h_a and h_b, (B, G*G) float32 each."""
        head_alpha, head_beta = self.heads(images)
        return head_alpha.float(), head_beta.float()

    def log_concentrations(self, head_alpha: Tensor, head_beta: Tensor) -> Tensor:
        """log alpha and log beta, (2, B, G*G), in [-6, 6]; the heads receive w times the gradient."""
        heads = torch.stack([head_alpha, head_beta])  # (2, B, G*G)
        return self.prior.lerp(heads, self.head_weight).clamp(-LOG_CONCENTRATION_LIMIT, LOG_CONCENTRATION_LIMIT)

    @torch.no_grad()
    def update_prior(self, batch_mean: Tensor, skipped: Tensor) -> None:
        """r <- 0.99 r + 0.01 mean of h over the *global* batch.

        batch_mean: (2, 1, G*G), from `mean_heads`; skipped: whether the step was skipped, which leaves the prior
        unchanged, a bool tensor (). Both equal on all ranks.
        """
        moved = self.prior.lerp(batch_mean, 1 - PRIOR_DECAY)
        self.prior.copy_(torch.where(skipped, self.prior, moved))

    def mean_cells(self, images: Tensor) -> Tensor:
        """The mean alpha / (alpha + beta) of each cell, (B, G*G) in (0, 1): used in evaluation, without sampling."""
        log_alpha, log_beta = self.log_concentrations(*self(images))
        return torch.sigmoid(log_alpha - log_beta)

    def prior_drift(self) -> Tensor:
        """Root mean square change of the prior's log-concentrations since the start of training, a tensor ()."""
        return (self.prior - self.initial_prior).square().mean().sqrt()


def create_policy(
    mask_policy: str, model_name: str, grid: int, image_size: int, head_weight: float = HEAD_WEIGHT
) -> Policy | None:
    """The policy for `--mask-policy`: learned, prior, uniform, or None for none.

    The running prior is initialised from U[0, 1). For `uniform` the prior and the heads' output are 0 and stay 0, so
    every cell is Beta(1, 1) for any head weight.
    """
    if mask_policy == "none":
        return None
    if mask_policy == "uniform":
        return Policy(UniformConcentrations(grid), torch.zeros(2, 1, grid * grid))
    heads = SharedConcentrations(grid) if mask_policy == "prior" else ConcentrationNetwork(model_name, grid, image_size)
    return Policy(heads, torch.rand(2, 1, grid * grid), head_weight)


class Action(NamedTuple):
    """Sampled masks, (B*K, G*G) float32 each, image by image: cells, their log-densities and entropies.

    log_cells: (2, B*K, G*G), log x and log(1 - x) of the samples before the cells were clamped.
    """

    cells: Tensor
    log_prob: Tensor
    entropy: Tensor
    log_cells: Tensor


def sample_action(
    log_alpha: Tensor,
    log_beta: Tensor,
    masks_per_image: int = 1,
    *,
    clamped_density: bool = False,
    pathwise_sign: float = 0.0,
) -> Action:
    """Sample K masks for each image from Beta(alpha, beta), cell by cell, in float32 even under autocast.

    log_alpha, log_beta: (B, G*G). Rows b*K .. b*K+K-1 of the result belong to image b. log_prob and entropy carry the
    gradient to the concentrations, and cells carry none; with a pathwise_sign of 1 or -1 it is the other way round, and
    the cells' gradient is multiplied by the sign.

    The log-density is exact: it is evaluated at the sample itself. At small concentrations most samples lie beyond the
    clamp, and the density at the clamped cell would give a gradient of the wrong size and even the wrong sign.
    clamped_density: evaluate it at the clamped cells nevertheless, as the published objectives do.
    """
    log_concentrations = torch.stack([log_alpha, log_beta]).float()  # (2, B, G*G)
    concentrations = log_concentrations.exp()
    if masks_per_image > 1:
        concentrations = concentrations.repeat_interleave(masks_per_image, dim=1)  # (2, B*K, G*G)
    log_odds = _sample_log_odds(concentrations.detach())  # (B*K, G*G)
    cells = torch.sigmoid(log_odds).clamp(SAMPLE_MARGIN, 1 - SAMPLE_MARGIN)
    if pathwise_sign:
        if masks_per_image > 1:
            log_concentrations = log_concentrations.repeat_interleave(masks_per_image, dim=1)
        slopes = pathwise_sign * _slopes(log_odds, concentrations.detach())  # (2, B*K, G*G)
        concentrations = concentrations.detach()
        cells = cells + (slopes * (log_concentrations - log_concentrations.detach())).sum(0)  # adds 0, and a gradient
    log_cells = F.logsigmoid(torch.stack([log_odds, -log_odds]))  # (2, B*K, G*G)
    evaluated_at = torch.stack([cells.log(), torch.log1p(-cells)]) if clamped_density else log_cells
    return Action(cells, *_log_prob_and_entropy(concentrations, evaluated_at), log_cells)


@torch.no_grad()
def _sample_log_odds(concentrations: Tensor) -> Tensor:
    """log(x / (1 - x)) of samples x of Beta(alpha, beta), from (2, ...): the difference of two log-gammas.

    torch's own sampler divides the gammas themselves. At small concentrations both underflow and it returns 0.5,
    although nearly all mass is at 0 and 1 (3 % of the samples at alpha = beta = exp(-6) on the CPU).
    Gamma(c) is drawn as Gamma(c + 1) times U^(1 / c) (Marsaglia and Tsang 2000).
    """
    uniform = torch.rand_like(concentrations).clamp_min_(torch.finfo(concentrations.dtype).tiny)
    gamma = torch._standard_gamma(concentrations + 1)  # what torch.distributions.Gamma samples from
    log_gamma = torch.addcdiv(gamma.log_(), uniform.log_(), concentrations)
    return log_gamma[0] - log_gamma[1]


def _slopes(log_odds: Tensor, concentrations: Tensor) -> Tensor:
    """How fast samples x of Beta(alpha, beta) move with log alpha and log beta, (2, B*K, G*G), all else equal.

    log_odds: log(x / (1 - x)), (B*K, G*G); concentrations: (2, B*K, G*G). The slope is -(dF / d log alpha) / p(x), with
    the distribution function F and the density p: the implicit reparameterisation gradient (Figurnov et al. 2018),
    which has the least variance of all pathwise estimators. As torch.distributions.Beta has it, but evaluated at x and
    1 - x that are both exact.
    """
    cells = torch.sigmoid(torch.stack([log_odds, -log_odds]))  # (2, B*K, G*G): x and 1 - x
    positive = cells.clamp_min(torch.finfo(cells.dtype).tiny)
    total = concentrations.sum(0, keepdim=True).expand_as(concentrations)
    slopes = torch._dirichlet_grad(positive, concentrations, total.contiguous()) * cells.flip(0) * concentrations
    return torch.stack([slopes[0], -slopes[1]])


def _log_prob_and_entropy(concentrations: Tensor, log_cells: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of Beta(alpha, beta) and differential entropy, (B*K, G*G) each.

    concentrations: alpha and beta; log_cells: log x and log(1 - x); (2, B*K, G*G) each. Equal to
    torch.distributions.Beta, with a third of its kernels: many small kernels would keep a GPU waiting.
    """
    alpha, beta = concentrations
    total = alpha + beta
    stacked = torch.stack([alpha, beta, total])  # (3, B*K, G*G)
    lgamma, digamma = stacked.lgamma(), stacked.digamma()
    log_normalizer = lgamma[0] + lgamma[1] - lgamma[2]
    log_prob = (alpha - 1) * log_cells[0] + (beta - 1) * log_cells[1] - log_normalizer
    entropy = log_normalizer - (alpha - 1) * digamma[0] - (beta - 1) * digamma[1] + (total - 2) * digamma[2]
    return log_prob, entropy
