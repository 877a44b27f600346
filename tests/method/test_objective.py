"""The objectives against direct transcriptions of their formulas, finite differences, and a toy that can be learned."""

import math

import pytest
import torch
from torch.distributions import Beta

from _policy_gradient.objective import (
    Objective,
    leave_one_out_baseline,
    mean_log_sum_density,
    normalize_advantage,
    published_loss,
    published_unscaled_loss,
    reinforce_loss,
)
from _policy_gradient.policy import sample_action
from utils.choices import OBJECTIVES
from utils.runtime.errors import UserError


def setting(images=4, cells=9, seed=0):
    """Log-concentrations (B, G*G) that require gradients, sampled cells, and cross-entropies (B,) that do too."""
    generator = torch.Generator().manual_seed(seed)
    log_alpha = torch.randn(images, cells, generator=generator).requires_grad_()
    log_beta = torch.randn(images, cells, generator=generator).requires_grad_()
    cells_ = torch.rand(images, cells, generator=generator).clamp(0.05, 0.95)
    cross_entropy = torch.rand(images, generator=generator).add(0.5).requires_grad_()
    return log_alpha, log_beta, cells_, cross_entropy


def test_published_loss_and_gradients_equal_the_released_formula():
    log_alpha, log_beta, cells, cross_entropy = setting()
    # As released: mean(log(sum(exp(log_prob), 1)) * criterion), where the criterion is the batch's mean.
    log_prob = Beta(log_alpha.exp(), log_beta.exp()).log_prob(cells)
    expected = torch.mean(torch.log(torch.sum(log_prob.exp(), 1)) * cross_entropy.mean())
    expected_gradients = torch.autograd.grad(expected, (log_alpha, log_beta, cross_entropy))

    log_prob = Beta(log_alpha.exp(), log_beta.exp()).log_prob(cells)
    loss, advantage = Objective("published")(cross_entropy, log_prob, torch.zeros_like(log_prob))
    gradients = torch.autograd.grad(loss, (log_alpha, log_beta, cross_entropy))
    torch.testing.assert_close(loss, expected)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(advantage, cross_entropy.mean().expand(4))  # one reward for the whole batch


def test_published_loss_by_hand():
    log_prob = torch.tensor([[math.log(2.0), math.log(4.0)], [math.log(1.0), math.log(3.0)]])
    cross_entropy = torch.tensor([0.5, 1.5])
    expected = (math.log(6) + math.log(4)) / 2 * 1.0
    assert published_loss(cross_entropy, log_prob).item() == pytest.approx(expected)


def test_log_of_a_sum_of_densities_that_overflow():
    assert mean_log_sum_density(torch.full((1, 2), 200.0)).item() == pytest.approx(200 + math.log(2))


def test_published_under_uniform_masks_scales_the_loss_by_log_cells():
    action = sample_action(torch.zeros(5, 64), torch.zeros(5, 64))
    cross_entropy = torch.rand(5)
    loss = published_loss(cross_entropy, action.log_prob)
    assert loss.item() == pytest.approx(math.log(64) * cross_entropy.mean().item(), rel=1e-6)


def test_published_unscaled_gives_the_classifier_its_plain_gradient():
    log_alpha, log_beta, cells, cross_entropy = setting()
    log_prob = Beta(log_alpha.exp(), log_beta.exp()).log_prob(cells)
    published = torch.autograd.grad(published_loss(cross_entropy, log_prob), (log_alpha, log_beta), retain_graph=True)
    for sign in (1.0, -1.0):
        loss = published_unscaled_loss(cross_entropy, log_prob, sign)
        *policy, classifier = torch.autograd.grad(loss, (log_alpha, log_beta, cross_entropy), retain_graph=True)
        torch.testing.assert_close(classifier, torch.full((4,), 0.25))
        for gradient, expected in zip(policy, published, strict=True):
            torch.testing.assert_close(gradient, sign * expected)


def test_leave_one_out_by_hand():
    baseline = leave_one_out_baseline(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    torch.testing.assert_close(baseline, torch.tensor([[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]]))


def test_normalised_advantage_keeps_signs_and_has_unit_mean_square():
    advantage = torch.tensor([3.0, -1.0, 0.5, -7.0])
    normalised = normalize_advantage(advantage, advantage.square().mean())
    assert normalised.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(normalised.sign(), advantage.sign())
    assert torch.equal(normalize_advantage(torch.zeros(3), torch.tensor(0.0)), torch.zeros(3))


@pytest.mark.slow
def test_reinforce_is_an_unbiased_gradient_of_the_expected_loss():
    """Two cells with a loss that depends on both: the mean estimate equals finite differences of the exact integral."""
    cells = 2
    log_concentrations = torch.tensor([[0.3, -0.2, 0.5, 0.1]], dtype=torch.float64)  # log alpha (2), log beta (2)

    def loss_of(masks):  # (N, 2) to (N,)
        return (masks[:, 0] - 0.2) ** 2 + masks[:, 0] * masks[:, 1]

    def expected_loss(parameters):
        alpha, beta = parameters[0, :2].exp(), parameters[0, 2:].exp()
        grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
        density = Beta(alpha, beta).log_prob(grid[:, None].expand(-1, 2)).exp() / 2000  # (2000, 2)
        first, second = torch.meshgrid(grid, grid, indexing="ij")
        losses = loss_of(torch.stack([first.flatten(), second.flatten()], 1)).view(2000, 2000)
        return (density[:, 0] @ losses @ density[:, 1]).item()

    step = 1e-4
    numeric = torch.zeros(4, dtype=torch.float64)
    for index in range(4):
        shift = torch.zeros_like(log_concentrations)
        shift[0, index] = step
        up, down = expected_loss(log_concentrations + shift), expected_loss(log_concentrations - shift)
        numeric[index] = (up - down) / (2 * step)

    torch.manual_seed(0)
    samples = 1_600_000
    parameters = log_concentrations.float().requires_grad_()
    log_alpha, log_beta = parameters[:, :2], parameters[:, 2:]
    action = sample_action(log_alpha, log_beta, samples)
    reward = loss_of(action.cells)
    for baseline in (0.0, reward.mean()):
        loss = reinforce_loss(reward - baseline, action.log_prob)
        (gradient,) = torch.autograd.grad(loss, parameters, retain_graph=True)
        torch.testing.assert_close(gradient[0].double() * cells, numeric, rtol=0, atol=2e-3)
    assert numeric.abs().max() > 0.02  # the bound above says something


@pytest.mark.parametrize(("baseline", "masks_per_image"), [("none", 1), ("ema", 1), ("loo", 2)])
@pytest.mark.parametrize("log_concentration", [0.0, -2.0, -4.0, -6.0])
def test_reinforce_gradient_is_exact_at_small_concentrations(log_concentration, baseline, masks_per_image):
    """dE[1 - x] / d log alpha is -alpha beta / (alpha + beta)^2: -1/4 wherever alpha equals beta."""
    torch.manual_seed(0)
    log_alpha = torch.full((600_000 // masks_per_image, 1), log_concentration, requires_grad=True)
    action = sample_action(log_alpha, log_alpha.detach(), masks_per_image)
    objective = Objective("reinforce", baseline, masks_per_image)
    _, advantage = objective(1 - action.cells[:, 0], action.log_prob, action.entropy)
    reinforce_loss(advantage, action.log_prob).backward()
    assert log_alpha.grad.sum().item() == pytest.approx(-0.25, abs=0.01)


def test_densities_are_exact_for_reinforce_and_clamped_for_published():
    assert [Objective(name).clamped_density for name in OBJECTIVES] == [True, True, False, False]
    torch.manual_seed(0)
    exact = sample_action(torch.full((1, 9999), -5.0), torch.full((1, 9999), -5.0))
    torch.manual_seed(0)
    clamped = sample_action(torch.full((1, 9999), -5.0), torch.full((1, 9999), -5.0), clamped_density=True)
    assert torch.equal(exact.cells, clamped.cells)
    alpha = torch.tensor(math.exp(-5.0), dtype=torch.float64)
    at_clamped = Beta(alpha, alpha).log_prob(clamped.cells.double())
    torch.testing.assert_close(clamped.log_prob.double(), at_clamped, rtol=1e-5, atol=1e-4)
    log_x, log_complement = exact.log_cells.double()
    normalizer = 2 * alpha.lgamma() - (2 * alpha).lgamma()
    expected = (alpha - 1) * (log_x + log_complement) - normalizer
    torch.testing.assert_close(exact.log_prob.double(), expected, rtol=1e-5, atol=1e-4)
    inside = (exact.cells > 1e-3) & (exact.cells < 1 - 1e-3)  # where a float32 near 1 is not rounded much
    assert inside.float().mean() < 0.2  # so that the two differ
    torch.testing.assert_close(exact.log_prob[inside], clamped.log_prob[inside], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_published_estimator_drifts_to_uniform_noise_for_a_constant_reward():
    """What the objective's docstring says: with a constant loss the concentrations fall, where REINFORCE's stay."""

    def train(name):
        torch.manual_seed(0)
        parameters = torch.full((2, 1, 16), math.log(4.3)).requires_grad_()
        objective = Objective(name, baseline=None if name == "published" else "loo", masks_per_image=64)
        optimizer = torch.optim.SGD([parameters], lr=0.2 if name == "published" else 1.0)
        for _ in range(1000):
            action = sample_action(parameters[0], parameters[1], 64)
            loss, _ = objective(torch.ones(64), action.log_prob, action.entropy)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return parameters.exp().mean().item()

    assert train("published") < 2.0
    assert train("reinforce") == pytest.approx(4.3, abs=1e-5)


@pytest.mark.parametrize(("sign", "moves"), [("cooperative", 1), ("adversarial", -1)])
@pytest.mark.parametrize(("baseline", "masks_per_image"), [("ema", 1), ("loo", 4), ("none", 1)])
@pytest.mark.parametrize("start", [0.0, -3.0])
def test_reinforce_learns_which_corner_to_open(sign, moves, baseline, masks_per_image, start):
    """The loss falls as the first cell's mask rises; the policy raises it, or lowers it when adversarial."""
    torch.manual_seed(0)
    log_alpha, log_beta = (torch.full((1, 4), start, requires_grad=True) for _ in range(2))
    objective = Objective("reinforce", baseline, masks_per_image, policy_sign=sign)
    optimizer = torch.optim.SGD([log_alpha, log_beta], lr=0.2)
    for _ in range(200):
        action = sample_action(log_alpha.expand(256, -1), log_beta.expand(256, -1), masks_per_image)
        loss, _ = objective(2.0 - action.cells[:, 0], action.log_prob, action.entropy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.update_baseline(torch.tensor(False))
    means = torch.sigmoid(log_alpha - log_beta).detach()[0]
    assert moves * (means[0] - 0.5) > 0.25
    assert (means[1:] - 0.5).abs().max() < 0.15


def test_moving_average_baseline():
    objective = Objective("reinforce", "ema")
    log_prob = torch.zeros(2, 3)
    _, first = objective(torch.tensor([1.0, 3.0]), log_prob, log_prob)
    objective.update_baseline(torch.tensor(False))
    torch.testing.assert_close(first, torch.tensor([-1.0, 1.0]))  # the first batch's own mean
    _, second = objective(torch.tensor([5.0, 5.0]), log_prob, log_prob)
    torch.testing.assert_close(second, torch.tensor([3.0, 3.0]))  # 5 - 2: this batch has not moved it yet
    objective.update_baseline(torch.tensor(False))
    assert objective.state_dict()["moving_baseline"].item() == pytest.approx(0.99 * 2 + 0.01 * 5)
    for losses in ([math.nan, 5.0], [7.0, 5.0]):
        objective(torch.tensor(losses), log_prob, log_prob)
        objective.update_baseline(torch.tensor(True))  # a skipped step
        assert objective.moving_baseline.item() == pytest.approx(0.99 * 2 + 0.01 * 5)


@pytest.mark.parametrize("baseline", ["none", "ema", "loo"])
def test_ranks_have_the_advantages_of_the_global_batch(baseline):
    whole, *ranks = (Objective("reinforce", baseline, masks_per_image=2) for _ in range(4))
    batch = torch.rand(12, generator=torch.Generator().manual_seed(0)) + torch.arange(12)
    log_prob = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    for losses in (batch, batch.flip(0) ** 2):  # the moving average has no value at the first step, and one at the next
        total, advantage = whole(losses, log_prob, log_prob)
        parts = list(zip(ranks, losses.split(4), log_prob.split(4), strict=True))
        own = [rank.batch_means(part) for rank, part, _ in parts]
        means = [torch.stack(values).mean(0) for values in zip(*own, strict=True)]
        results = [rank(part, density, density, means=means) for rank, part, density in parts]
        torch.testing.assert_close(torch.cat([result.advantage for result in results]), advantage)
        torch.testing.assert_close(torch.stack([result.total for result in results]).mean(), total)
        for objective in (whole, *ranks):
            objective.update_baseline(torch.tensor(False))
            torch.testing.assert_close(objective.moving_baseline, whole.moving_baseline, equal_nan=True)


def test_equal_rewards_on_all_ranks_give_no_advantage_and_a_finite_loss():
    objective, log_prob = Objective("reinforce", "ema"), torch.randn(2, 3)
    reward = torch.tensor([2.3, 2.3])
    mean_square, mean, square = objective.batch_means(reward)
    rounded_down = square * (1 - 1e-15)  # as the mean of the ranks' squares may be
    loss, advantage = objective(reward, log_prob, log_prob, means=[mean_square, mean, rounded_down])
    assert loss.item() == pytest.approx(2.3)
    assert torch.equal(advantage, torch.zeros(2))


def test_entropy_weight_rewards_entropy():
    log_alpha, log_beta = torch.tensor([[1.5]], requires_grad=True), torch.tensor([[1.0]], requires_grad=True)
    torch.manual_seed(0)
    action = sample_action(log_alpha, log_beta)
    cross_entropy = torch.ones(1)
    plain, _ = Objective("reinforce", "none")(cross_entropy, action.log_prob, action.entropy)
    rewarded, _ = Objective("reinforce", "none", entropy_weight=0.5)(cross_entropy, action.log_prob, action.entropy)
    expected = Beta(log_alpha.exp(), log_beta.exp()).entropy().mean()
    torch.testing.assert_close(plain - rewarded, 0.5 * expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"policy_sign": "adversarial"}, "--policy-sign adversarial"),
        ({"baseline": "ema"}, "--baseline ema"),
        ({"name": "published-unscaled", "baseline": "loo", "masks_per_image": 2}, "--baseline loo"),
        ({"entropy_weight": 0.1}, "--entropy-weight"),
        ({"name": "reinforce", "baseline": "loo"}, "--masks-per-image 2 or more"),
    ],
)
def test_flags_that_the_objective_would_ignore(settings, expected):
    with pytest.raises(UserError, match=expected):
        Objective(**settings)
