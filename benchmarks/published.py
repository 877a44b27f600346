"""The training step of the authors' released code, as the reference for ours.

float32, NCHW, masks by `interpolate` and `gaussian_blur` at full size, plain torch.distributions.Beta, one loss for
both networks, both heads evaluated again after the step to update the running prior, default optimisers, and three
numbers read by the host at each step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Beta
from torchvision.transforms.functional import gaussian_blur

from _policy_gradient.policy import ConcentrationNetwork


def published_mask(cells: Tensor, size: int, grid: int, kernel: int, sigma: float) -> Tensor:
    """Cells (B, G*G) to masks (B, 1, S, S): nearest upsampling, then a Gaussian blur of the whole image."""
    upsampled = F.interpolate(cells.view(-1, 1, grid, grid), size=(size, size), mode="nearest")  # (B, 1, S, S)
    return gaussian_blur(upsampled, [kernel, kernel], [sigma, sigma])


def published_objective(log_prob: Tensor, cross_entropy: Tensor) -> Tensor:
    """mean_b(log sum_i p(m_bi)) times the mean cross-entropy (); log_prob: (B, G*G)."""
    return torch.mean(torch.log(torch.sum(torch.exp(log_prob), 1))) * cross_entropy


class PublishedStep:
    """Both networks, their optimisers and the running prior. A call is one training step on a batch."""

    def __init__(
        self,
        classifier: nn.Module,
        policy: ConcentrationNetwork,
        prior: Tensor,
        *,
        grid: int,
        kernel: int,
        sigma: float,
        lr: float,
    ) -> None:
        """prior: (2, 1, G*G), the initial r_a and r_b."""
        self.classifier, self.policy = classifier.train(), policy.train()
        self.prior_alpha, self.prior_beta = prior.clone()  # (1, G*G) each
        self.grid, self.kernel, self.sigma = grid, kernel, sigma
        self.optimizer = torch.optim.SGD(classifier.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        self.policy_optimizer = torch.optim.SGD(policy.parameters(), lr / 10, momentum=0.9, weight_decay=1e-4)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[float, float, float]:
        """Train on normalised images (B, 3, S, S) and targets (B,); returns loss, top-1 and top-5, read by the host."""
        features = self.policy.backbone(images)  # (B, F)
        alpha = torch.exp(0.9 * self.prior_alpha + 0.1 * self.policy.alpha_head(features))  # (B, G*G)
        beta = torch.exp(0.9 * self.prior_beta + 0.1 * self.policy.beta_head(features))
        distribution = Beta(alpha, beta)
        cells = distribution.sample()
        log_prob = distribution.log_prob(cells)
        mask = published_mask(cells, images.shape[-1], self.grid, self.kernel, self.sigma)  # (B, 1, S, S)
        logits = self.classifier(images * mask)  # (B, C)
        loss = published_objective(log_prob, F.cross_entropy(logits, targets))

        self.optimizer.zero_grad()
        self.policy_optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.policy_optimizer.step()

        head_alpha, head_beta = self.policy.alpha_head(features), self.policy.beta_head(features)  # evaluated again
        self.prior_alpha = 0.99 * self.prior_alpha + 0.01 * head_alpha.mean(0, keepdim=True).detach()
        self.prior_beta = 0.99 * self.prior_beta + 0.01 * head_beta.mean(0, keepdim=True).detach()

        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]  # (B, 5)
        top1, top5 = best[:, :1].any(dim=1).float().mean(), best.any(dim=1).float().mean()
        return loss.item(), top1.item(), top5.item()
