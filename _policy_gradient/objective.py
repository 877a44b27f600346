"""The losses of classifier and policy: the published objective, its unscaled form, REINFORCE, and pathwise."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.runtime.errors import UserError
from utils.runtime.progress import say

BASELINE_DECAY = 0.99  # decay of the moving-average baseline per training step
ADVANTAGE_EPSILON = 1e-5  # above the rounding error of a cross-entropy, so that rounding is never amplified


def mean_log_sum_density(log_prob: Tensor) -> Tensor:
    """mean_b(log sum_i p(m_bi)), a tensor (), from log-densities (B, G*G).

    The published code computes `log(sum(exp(log_prob), 1))`; logsumexp gives the same. It is *not* the joint
    log-likelihood of a mask, which is the sum of the log-densities.
    """
    return log_prob.logsumexp(dim=1).mean()


def published_loss(cross_entropy: Tensor, log_prob: Tensor) -> Tensor:
    """The authors' released loss for both networks: mean_b(log sum_i p(m_bi)) times the batch-mean cross-entropy.

    cross_entropy: (B,), of this rank's images; log_prob: (B, G*G). Its consequences:
    - The reward is a mean over the batch, so no image gets credit for its own mask.
    - There is no baseline, and the log of *summed* densities is not a log-likelihood, so the expected gradient is not
      zero for a constant reward. For any reward it descends the integral of the squared density, and the policy drifts
      to uniform noise.
    - The classifier's gradient is multiplied by about ln(G*G), 8.3 at G = 64, so --grid changes its learning rate.
    """
    return mean_log_sum_density(log_prob) * cross_entropy.mean()


def published_unscaled_loss(
    losses: Tensor, log_prob: Tensor, sign: float = 1.0, reward: Tensor | None = None
) -> Tensor:
    """The mean of the classifier's losses (B,), and the published form for the policy only.

    log_prob: (B, G*G); with `sign` -1 the policy raises the loss; reward: (B,), None for the losses.
    """
    reward = losses if reward is None else reward
    return losses.mean() + sign * mean_log_sum_density(log_prob) * reward.detach().mean()


def leave_one_out_baseline(cross_entropy: Tensor) -> Tensor:
    """For each mask, the mean cross-entropy of the *other* masks of its image: (B, K) to (B, K), K >= 2."""
    masks = cross_entropy.shape[1]
    return (cross_entropy.sum(dim=1, keepdim=True) - cross_entropy) / (masks - 1)


def normalize_advantage(advantage: Tensor, mean_square: Tensor) -> Tensor:
    """Advantage (B,) divided by its root mean square over the global batch; nothing is subtracted.

    mean_square: (). Subtracting the mean would make `--baseline none` and `ema` equal.
    """
    return advantage / (mean_square.sqrt() + ADVANTAGE_EPSILON)


def reinforce_loss(advantage: Tensor, log_prob: Tensor) -> Tensor:
    """mean_b(A_b * (1 / G^2) sum_i log p(m_bi)): advantage (B,) without gradient, log_prob (B, G*G).

    Its gradient estimates the gradient of the expected loss, divided by the number of cells G^2 (Williams 1992).
    """
    return (advantage * log_prob.mean(dim=1)).mean()


class Losses(NamedTuple):
    """`total`: the loss () for one backward pass over both networks; `advantage`: the credit of each mask, (B*K,)."""

    total: Tensor
    advantage: Tensor


class Objective(nn.Module):
    """The loss of --objective. Its only state is the moving-average baseline.

    Raises UserError for flags that the chosen objective does not use.
    """

    moving_baseline: Tensor

    def __init__(
        self,
        name: str = "published",
        baseline: str | None = None,
        masks_per_image: int = 1,
        entropy_weight: float = 0.0,
        policy_sign: str = "cooperative",
    ) -> None:
        """baseline: None means ema for `reinforce`; the other objectives accept only None."""
        super().__init__()
        check_objective(name, baseline, masks_per_image, entropy_weight, policy_sign)
        self.name = name
        self.baseline = baseline or ("ema" if name == "reinforce" else None)
        self.masks_per_image = masks_per_image
        self.entropy_weight = entropy_weight
        self.sign = 1.0 if policy_sign == "cooperative" else -1.0
        self.register_buffer("moving_baseline", torch.tensor(math.nan))
        self._proposed_baseline: Tensor | None = None  # by the last `forward`, for `update_baseline`

    @property
    def clamped_density(self) -> bool:
        """Whether log-densities are evaluated at the clamped cells, as published (see `sample_action`)."""
        return self.name in ("published", "published-unscaled")

    @property
    def pathwise_sign(self) -> float:
        """The factor of the loss's gradient at the cells on its way to the policy; 0: none (see `sample_action`)."""
        return self.sign if self.name == "pathwise" else 0.0

    def print_fact(self, grid: int) -> None:
        """Print the objective's name and, for `published`, its effect on the classifier's learning rate."""
        scale = f"{math.log(grid**2):.1f}"
        implied = f": it multiplies the classifier's loss, and so its learning rate, by about ln({grid}^2) = {scale}"
        say(f"objective: {self.name}{implied if self.name == 'published' else ''}")

    def classifier_scale(self, log_prob: Tensor) -> Tensor | None:
        """The factor () of the classifier's loss in the total, for log-densities (B*K, G*G); None for 1."""
        return mean_log_sum_density(log_prob.detach()) if self.name == "published" else None

    def batch_means(self, reward: Tensor) -> list[Tensor]:
        """Means of this rank's batch that `forward` needs over the global one, tensors () without gradient.

        reward: (B*K,), the cross-entropies. Empty for objectives without an advantage to normalise.
        """
        if self.name != "reinforce":
            return []
        mean = reward.mean()
        return [self._advantage(reward, mean).square().mean(), mean.double(), mean.double().square()]

    def forward(
        self,
        losses: Tensor,
        log_prob: Tensor,
        entropy: Tensor,
        reward: Tensor | None = None,
        means: list[Tensor] | None = None,
    ) -> Losses:
        """losses (B*K,) with the classifier's gradient; log_prob, entropy (B*K, G*G) with the policy's.

        reward: (B*K,), the cross-entropies by which the policy is judged; None: the losses. `published` and `pathwise`
        have one loss for both networks, so that there the losses are the reward too. means: `batch_means` over all
        ranks; None if this batch is the global one.
        """
        if reward is None or self.name in ("published", "pathwise"):
            reward = losses.detach()
        if self.name == "pathwise":  # the policy's gradient comes through the masks
            return Losses(losses.mean(), reward)
        if self.name == "published":
            return Losses(published_loss(losses, log_prob), reward.mean().expand_as(reward))
        if self.name == "published-unscaled":
            total = published_unscaled_loss(losses, log_prob, self.sign, reward)
            return Losses(total, reward.mean().expand_as(reward))
        mean_square, mean, square_of_mean = self.batch_means(reward) if means is None else means
        advantage = self._advantage(reward, mean.float())
        normalized = normalize_advantage(advantage, self._global_mean_square(mean_square, mean, square_of_mean))
        policy_loss = self.sign * reinforce_loss(normalized, log_prob)
        total = losses.mean() + policy_loss - self.entropy_weight * entropy.mean()
        return Losses(total, advantage)

    def _advantage(self, reward: Tensor, batch_mean: Tensor) -> Tensor:
        """Reward (B*K,) minus its baseline. batch_mean: (), the baseline before the moving average has a value."""
        if self.baseline == "none":
            return reward
        if self.baseline == "loo":
            by_image = reward.view(-1, self.masks_per_image)  # (B, K)
            return (by_image - leave_one_out_baseline(by_image)).flatten()  # (B*K,)
        return reward - torch.where(self.moving_baseline.isnan(), batch_mean, self.moving_baseline)

    def _global_mean_square(self, mean_square: Tensor, mean: Tensor, square_of_mean: Tensor) -> Tensor:
        """The mean square () of the advantages over all ranks, from `batch_means`; proposes the next moving average.

        At the first step the baseline is the mean over all ranks, but each rank could only measure around its own mean:
        the variance of these means is added.
        """
        if self.baseline != "ema":
            return mean_square
        is_first, batch_mean = self.moving_baseline.isnan(), mean.float()
        baseline = torch.where(is_first, batch_mean, self.moving_baseline)
        self._proposed_baseline = BASELINE_DECAY * baseline + (1 - BASELINE_DECAY) * batch_mean
        variance = (square_of_mean - mean.square()).clamp_min(0).float()  # equal means may give a little less than 0
        return torch.where(is_first, mean_square + variance, mean_square)

    def update_baseline(self, skipped: Tensor) -> None:
        """Add the last batch to the moving average, unless its step was skipped: bool tensor () on the device."""
        if self._proposed_baseline is not None:
            self.moving_baseline.copy_(torch.where(skipped, self.moving_baseline, self._proposed_baseline))
            self._proposed_baseline = None


def check_objective(
    name: str, baseline: str | None, masks_per_image: int, entropy_weight: float, policy_sign: str
) -> None:
    """Raise UserError for a flag that the objective does not use or that contradicts another flag."""
    if name == "published" and policy_sign == "adversarial":
        raise UserError(
            "--policy-sign adversarial: the published objective is one loss for both networks, so its sign cannot be "
            "reversed for the policy only; use another objective."
        )
    if name != "reinforce" and baseline is not None:
        raise UserError(f"--baseline {baseline}: --objective {name} has no baseline; use --objective reinforce.")
    if name != "reinforce" and entropy_weight != 0:
        raise UserError(f"--entropy-weight: --objective {name} has no entropy term; use --objective reinforce.")
    if baseline == "loo" and masks_per_image < 2:
        raise UserError("--baseline loo: leaving one mask out needs --masks-per-image 2 or more.")
