"""--objective pathwise and --keep-mean: the samples' slopes, the gradient of the expected loss, signs, fixed means."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from _policy_gradient.mask import SmoothMask
from _policy_gradient.masking import draw_masks
from _policy_gradient.objective import Objective
from _policy_gradient.policy import create_policy, sample_action

CELLS = 2


def loss_of(cells):
    """A loss that depends on both cells, from (N, 2) to (N,)."""
    return torch.log1p(torch.exp(3 * cells[:, 0] - 2 * cells[:, 1])) + (cells[:, 0] - 0.3) * cells[:, 1] ** 2


def expected_loss(log_concentrations, points=400):
    """The expected loss for log alpha (2,) and log beta (2,), by quadrature over the quantiles in float64."""
    alpha, beta = np.exp(log_concentrations)
    quantiles = (np.arange(points) + 0.5) / points
    first, second = (torch.from_numpy(stats.beta.ppf(quantiles, alpha[i], beta[i])) for i in range(CELLS))
    pairs = torch.stack([first.repeat_interleave(points), second.repeat(points)], 1)  # (points^2, 2)
    return loss_of(pairs).mean().item()


def finite_differences(log_concentrations, step=0.05):
    """Of `expected_loss`, (2, 2)."""
    gradient = np.zeros((2, CELLS))
    for index in np.ndindex(gradient.shape):
        shift = np.zeros_like(gradient)
        shift[index] = step
        up, down = expected_loss(log_concentrations + shift), expected_loss(log_concentrations - shift)
        gradient[index] = (up - down) / (2 * step)
    return gradient


@pytest.mark.parametrize(
    "log_concentrations",
    [
        [(-4, -4), (-4, -4)],
        [(-4, -2), (-3, 0)],
        [(0, 0), (0, 0)],
        [(1, -1), (0, 3)],
        [(2, 4), (2, 4)],
        [(4, 4), (4, 3)],
    ],
)
def test_the_gradient_is_that_of_the_expected_loss(log_concentrations):
    """In float32, within four standard errors of the mean over samples, at concentrations from e^-4 to e^4."""
    expected = finite_differences(np.array(log_concentrations, dtype=float))
    torch.manual_seed(0)
    samples = 400_000
    parameters = torch.tensor(log_concentrations, dtype=torch.float32)[:, None].repeat(1, samples, 1).requires_grad_()
    cells = sample_action(*parameters, pathwise_sign=1.0).cells
    (gradients,) = torch.autograd.grad(loss_of(cells).sum(), parameters)  # (2, N, 2)
    assert gradients.dtype == torch.float32
    deviation, mean = torch.std_mean(gradients.double(), dim=1)
    error = np.abs(mean.numpy() - expected)
    assert (error <= 4 * deviation.numpy() / math.sqrt(samples) + 2e-3 * np.abs(expected).max()).all(), (mean, expected)
    assert np.abs(expected).max() > 0.05  # the bound above says something


@pytest.mark.parametrize(("log_alpha", "log_beta"), [(-4, -4), (-4, 0), (-1, -2), (0, 0), (0, 3), (2, 2), (4, 4)])
def test_slopes_are_those_of_the_quantile(log_alpha, log_beta):
    """A sample moves with a concentration as the quantile of its rank does: scipy's, in float64."""
    torch.manual_seed(1)
    parameters = torch.tensor([log_alpha, log_beta], dtype=torch.float32)[:, None, None].repeat(1, 4000, 1)
    parameters.requires_grad_()
    action = sample_action(*parameters, pathwise_sign=1.0)
    (slopes,) = torch.autograd.grad(action.cells.sum(), parameters)
    cells = action.cells.detach().double().numpy()[:, 0]
    inner = (cells > 0.01) & (cells < 0.99)  # elsewhere the slope is small, and a rank in float64 has too few digits
    assert inner.sum() > 30
    step = 1e-4
    for index in range(2):
        shift = np.eye(2)[index] * step
        density = stats.beta.pdf(cells, math.exp(log_alpha), math.exp(log_beta))
        up, down = (
            stats.beta.cdf(cells, *np.exp([log_alpha + sign * shift[0], log_beta + sign * shift[1]]))
            for sign in (1, -1)
        )
        expected = -(up - down) / (2 * step) / density
        found = slopes[index, :, 0].double().numpy()
        assert np.allclose(found[inner], expected[inner], rtol=1e-2, atol=1e-3 * np.abs(expected[inner]).max())


def test_samples_are_those_of_the_other_objectives_bit_for_bit():
    parameters = torch.randn(2, 5, 9) * 3
    drawn = []
    for sign in (0.0, 1.0, -1.0):
        torch.manual_seed(2)
        drawn.append(sample_action(*parameters.clone().requires_grad_(), 3, pathwise_sign=sign))
    for action in drawn[1:]:
        assert all(torch.equal(one, other) for one, other in zip(action, drawn[0], strict=True))
        assert action.cells.requires_grad and not action.log_prob.requires_grad and not action.entropy.requires_grad
    assert not drawn[0].cells.requires_grad and drawn[0].log_prob.requires_grad


@pytest.mark.parametrize("log_concentration", [-6.0, 6.0])
def test_finite_at_the_bounds(log_concentration):
    torch.manual_seed(3)
    for log_alpha, log_beta in ((log_concentration, log_concentration), (log_concentration, -log_concentration)):
        parameters = torch.tensor([log_alpha, log_beta])[:, None, None].repeat(1, 20_000, 1).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            cells = sample_action(*parameters, pathwise_sign=1.0).cells
        (gradients,) = torch.autograd.grad(cells.sum(), parameters)
        assert gradients.dtype == torch.float32 and gradients.isfinite().all()


def masked_gradients(sign, masks_per_image=1, keep_mean=False):
    """Gradients of the policy and of a linear classifier, after one batch of four images."""
    torch.manual_seed(4)
    images, targets = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    policy, weight = create_policy("prior", "test_resnet", 4, 16), torch.randn(3, 3 * 16 * 16, requires_grad=True)
    objective = Objective("pathwise", masks_per_image=masks_per_image, policy_sign=sign)
    mask = SmoothMask(16, 4, 3, 1.0, 0, 2, keep_mean)
    masked = draw_masks(
        policy, mask, *policy(images), images, masks_per_image=masks_per_image, pathwise_sign=objective.pathwise_sign
    )
    targets = targets.repeat_interleave(masks_per_image)
    losses = F.cross_entropy(masked.images.flatten(1) @ weight.T, targets, reduction="none")
    loss, advantage = objective(losses, masked.action.log_prob, masked.action.entropy)
    assert torch.equal(loss, losses.mean()) and torch.equal(advantage, losses.detach())
    loss.backward()
    return policy.heads.log_alpha.grad, policy.heads.log_beta.grad, weight.grad


@pytest.mark.parametrize("masks_per_image", [1, 3])
def test_an_adversary_gets_the_opposite_gradient_and_the_classifier_the_same(masks_per_image):
    cooperative = masked_gradients("cooperative", masks_per_image)
    adversarial = masked_gradients("adversarial", masks_per_image)
    assert torch.equal(cooperative[0], -adversarial[0]) and torch.equal(cooperative[1], -adversarial[1])
    assert torch.equal(cooperative[2], adversarial[2])
    assert all(gradient.abs().max() > 1e-5 for gradient in cooperative)


def test_a_kept_mean_is_that_of_uniform_cells():
    torch.manual_seed(5)
    cells = torch.rand(6, 64) ** 3
    mask = SmoothMask(32, 8, 1, 1.0, keep_mean=True)
    by_hand = F.interpolate((cells * 0.5 / cells.mean(1, keepdim=True)).view(6, 1, 8, 8), size=32)
    torch.testing.assert_close(mask(cells), by_hand)
    for low, high in ((0, 1), (0, 2), (0.5, 1)):
        masks = SmoothMask(32, 8, 1, 1.0, low, high, keep_mean=True)(cells)
        torch.testing.assert_close(masks.mean((1, 2, 3)), torch.full((6,), (low + high) / 2))
    uniform = SmoothMask(32, 8, 5, 2.0, keep_mean=True)(torch.full((1, 64), 1e-6))  # the least that a cell can be
    torch.testing.assert_close(uniform, torch.full((1, 1, 32, 32), 0.5))


def test_with_a_kept_mean_a_common_factor_of_the_cells_has_no_gradient():
    """The derivative along the cells themselves, which would change all of them by one factor, is 0."""
    torch.manual_seed(6)
    cells = torch.rand(2, 16, requires_grad=True)
    target = torch.rand(2, 1, 16, 16)
    for keep_mean, vanishes in ((True, True), (False, False)):
        loss = (SmoothMask(16, 4, 3, 1.0, keep_mean=keep_mean)(cells) * target).sum()
        (gradient,) = torch.autograd.grad(loss, cells)
        along = (gradient * cells).sum(1).abs() / (gradient.abs() * cells).sum(1)
        assert (along < 1e-5).all() if vanishes else (along > 0.1).all()
