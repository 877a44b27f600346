"""_policy_gradient/README.md: its listing, run as it stands, against the package; what it says of the objectives."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from _policy_gradient.mask import SmoothMask
from _policy_gradient.masking import Masking
from _policy_gradient.objective import Objective, mean_log_sum_density
from _policy_gradient.policy import create_policy, sample_action
from tests.conftest import ROOT
from tests.helpers.markdown import blocks_and_text
from utils.choices import OBJECTIVES

IMAGES, SIZE, GRID, CLASSES, BLUR = 6, 64, 8, 5, (5, 2.0)
# The listing adds, blurs and takes densities in another order than the package. Each order rounds by 6e-8 of a value
# (float32); a hundred such errors are allowed for, because they add up over sums and layers.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def listing():
    """The names that the page's one block of Python defines."""
    blocks, _, _ = blocks_and_text((ROOT / "_policy_gradient" / "README.md").read_text())
    (code,) = (content for language, content in blocks if language == "python")
    names = {}
    exec(code, names)
    return names


def gradient(network: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def assert_equal_but_for_rounding(value, expected):
    assert value.shape == expected.shape
    assert (value - expected).norm() <= ROUNDING * expected.norm()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_listing_computes_what_the_package_computes(name, listing):
    torch.manual_seed(0)
    images, targets = torch.randn(IMAGES, 3, SIZE, SIZE), torch.arange(IMAGES) % CLASSES
    policy = create_policy("learned", "test_resnet", GRID, SIZE)
    policy.prior.uniform_(-8, 2)  # so that log-concentrations are clamped, and many cells, too
    classifier = timm.create_model("test_resnet", num_classes=CLASSES)
    listed_policy, listed_classifier = listing["Policy"]("test_resnet", GRID), copy.deepcopy(classifier)
    state = policy.heads.state_dict() | {"prior": policy.prior.clone()}
    listed_policy.load_state_dict(state)

    mask, objective = SmoothMask(SIZE, GRID, *BLUR), Objective(name)
    masking = Masking(policy, mask, objective, torch.device("cpu"), epochs=1, fade_epochs=0, as_graph=False)
    torch.manual_seed(1)
    heads = masking.policy(images)
    assert torch.equal(listed_policy(images), torch.stack(heads))
    masked = masking.draw(*heads, images)
    cross_entropy = F.cross_entropy(classifier(masked.images), targets, reduction="none")
    loss, _ = masking.objective(cross_entropy, masked.action.log_prob, masked.action.entropy)
    loss.backward()
    masking.update(masking.batch_means(heads, cross_entropy.detach()), torch.tensor(False))

    torch.manual_seed(1)
    listed = listing["training_step"](
        *(listed_policy, listed_classifier, images, targets, listing[name.replace("-", "_")]),
        baseline=cross_entropy.detach().mean(),  # in the first step, as the page says
        kernel=BLUR[0],
        sigma=BLUR[1],
    )
    expected = (masked.log_concentrations, masked.masks, cross_entropy, loss)
    for value, of_package in zip(listed, expected, strict=True):
        assert_equal_but_for_rounding(value, of_package)
    assert_equal_but_for_rounding(gradient(listed_classifier), gradient(classifier))
    assert_equal_but_for_rounding(gradient(listed_policy), gradient(policy))
    assert_equal_but_for_rounding(listed_policy.prior, policy.prior)
    assert not policy.prior.equal(policy.initial_prior)


def log_integral_of_squared_density(alpha, beta):
    """log of the integral of Beta(alpha, beta)'s squared density: a ratio of Beta functions, () each."""

    def log_beta_function(a, b):
        return a.lgamma() + b.lgamma() - (a + b).lgamma()

    return log_beta_function(2 * alpha - 1, 2 * beta - 1) - 2 * log_beta_function(alpha, beta)


def test_published_has_the_expected_gradient_that_the_page_gives():
    log_alpha = torch.tensor(math.log(3.0), requires_grad=True)
    beta = torch.tensor(3.0)
    (expected,) = torch.autograd.grad(log_integral_of_squared_density(log_alpha.exp(), beta) / 2, log_alpha)
    assert expected.item() == pytest.approx(0.113, abs=5e-4)

    torch.manual_seed(0)
    log_alphas = log_alpha.detach().expand(4_000, 256).clone().requires_grad_()
    action = sample_action(log_alphas, beta.log().expand(4_000, 256))
    for density, for_constant_reward in (
        (mean_log_sum_density(action.log_prob), expected.item()),
        (action.log_prob.mean(), 0.0),
    ):
        (estimate,) = torch.autograd.grad(density, log_alphas, retain_graph=True)
        assert estimate.sum().item() == pytest.approx(for_constant_reward, abs=0.005)


@pytest.mark.parametrize(("grid", "uniform", "untrained"), [(8, 4.2, 4.3), (64, 8.3, 8.5)])
def test_published_scales_the_classifiers_gradient_by_the_factors_that_the_page_gives(grid, uniform, untrained):
    assert math.log(grid**2) == pytest.approx(uniform, abs=0.05)
    torch.manual_seed(0)
    policy = create_policy("learned", "resnet10t", grid, SIZE)
    with torch.no_grad():
        action = sample_action(*policy.log_concentrations(*policy(torch.randn(16, 3, SIZE, SIZE))))
    assert mean_log_sum_density(action.log_prob).item() == pytest.approx(untrained, abs=0.05)


@pytest.mark.parametrize(("log_concentration", "clamped"), [(-2.0, -0.171), (-3.0, 0.002), (-4.0, 0.138)])
def test_clamped_densities_have_the_wrong_gradients_that_the_page_gives(log_concentration, clamped):
    torch.manual_seed(0)
    log_alpha = torch.full((400_000, 1), log_concentration, requires_grad=True)
    for exact, expected in ((False, clamped), (True, -0.25)):
        action = sample_action(log_alpha, log_alpha.detach(), clamped_density=not exact)
        reward = 1 - action.cells[:, 0]
        (gradient,) = torch.autograd.grad((reward * action.log_prob[:, 0]).mean(), log_alpha)
        assert gradient.sum().item() == pytest.approx(expected, abs=0.006)
