"""The policy's arithmetic: concentrations, prior, sampling, and what is logged of it."""

import math
from functools import partial

import pytest
import scipy.stats
import timm
import torch
from torch.distributions import Beta

from _policy_gradient.mask import SmoothMask
from _policy_gradient.masking import MaskedImages, draw_masks, policy_health, warn_of_bounds
from _policy_gradient.policy import Policy, SharedConcentrations, create_policy, mean_heads, sample_action
from utils.runtime.errors import UserError


def policy_with(prior_alpha, prior_beta, *head_weight):
    prior = torch.tensor([[prior_alpha], [prior_beta]])  # (2, 1, G*G)
    return Policy(SharedConcentrations(2), prior, *head_weight)


@pytest.mark.parametrize("head_weight", [(), (0.25,), (0.5,), (1.0,)])
def test_log_concentrations_by_hand(head_weight):
    weight = head_weight[0] if head_weight else 0.1  # as published
    prior = [1.0, 0.0, 20.0, -3.0]
    policy = policy_with(prior, [0.5] * 4, *head_weight)
    head = torch.tensor([[2.0, -1.0, 20.0, -3.0], [4.0, 1.0, -20.0, 3.0]])
    log_alpha, log_beta = policy.log_concentrations(head, torch.zeros(2, 4))
    expected = (1 - weight) * torch.tensor(prior) + weight * head
    torch.testing.assert_close(log_alpha, expected.clamp(-6, 6))
    torch.testing.assert_close(log_beta, torch.full((2, 4), 0.5 * (1 - weight)))


def gradient_at_the_heads(*head_weight):
    policy = policy_with([0.0] * 4, [0.0] * 4, *head_weight)
    head = torch.zeros(1, 4, requires_grad=True)
    log_alpha, _ = policy.log_concentrations(head, torch.zeros(1, 4))
    log_alpha.sum().backward()
    assert not policy.prior.requires_grad
    return head.grad


def test_gradient_reaches_the_heads_with_their_weight():
    torch.testing.assert_close(gradient_at_the_heads(), torch.full((1, 4), 0.1))
    for weight in (0.3, 1.0):
        torch.testing.assert_close(gradient_at_the_heads(weight), torch.full((1, 4), weight))


def test_the_published_head_weight_is_the_rest_of_nine_tenths_bit_for_bit():
    """1 - 0.9 is not 0.1, but the same float32."""
    torch.manual_seed(0)
    prior, head_alpha, head_beta = torch.rand(2, 1, 4096), torch.randn(8, 4096), torch.randn(8, 4096)
    found = Policy(SharedConcentrations(64), prior).log_concentrations(head_alpha, head_beta)
    assert torch.equal(found, prior.lerp(torch.stack([head_alpha, head_beta]), 1 - 0.9).clamp(-6, 6))
    assert torch.equal(gradient_at_the_heads(), gradient_at_the_heads(1 - 0.9))


def test_prior_moves_by_a_hundredth_of_the_batch_mean():
    policy = policy_with([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    alpha = torch.tensor([[3.0, 1.0, 0.0, 1.0], [5.0, 1.0, 0.0, 1.0]])
    policy.update_prior(mean_heads(alpha, alpha * 0 + 2), skipped=torch.tensor(False))
    torch.testing.assert_close(policy.prior[0, 0], torch.tensor([1.03, 1.0, 0.99, 1.0]))
    torch.testing.assert_close(policy.prior[1, 0], torch.full((4,), 0.02))
    before = policy.prior.clone()
    policy.update_prior(mean_heads(alpha * math.nan, alpha), skipped=torch.tensor(True))
    assert torch.equal(policy.prior, before)
    drift = math.sqrt((0.03**2 + 0.01**2 + 4 * 0.02**2) / 8)
    assert policy.prior_drift().item() == pytest.approx(drift, rel=1e-5)


def test_learned_policy_has_the_published_shape():
    torch.manual_seed(0)
    policy = create_policy("learned", "resnet10t", grid=8, image_size=32)
    backbone = timm.create_model("resnet10t", num_classes=0)
    linear = [module for module in policy.heads.alpha_head if isinstance(module, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(512, 512), (512, 512), (512, 64)]
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    heads = 2 * (2 * (512 * 512 + 512 + 2 * 512) + 512 * 64 + 64)
    assert sum(parameter.numel() for parameter in policy.parameters()) == parameters + heads
    assert policy.prior.shape == (2, 1, 64)
    assert 0 <= policy.prior.min() < 0.1
    assert 0.9 < policy.prior.max() < 1  # U[0, 1)
    head_alpha, head_beta = policy(torch.rand(3, 3, 32, 32))
    assert head_alpha.shape == head_beta.shape == (3, 64)
    assert {"prior", "initial_prior"} < set(policy.state_dict())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224", "test_convnext"])
def test_any_backbone(name):
    """Also one whose output is wider than its `num_features`, and one that is built for one size."""
    policy = create_policy("learned", name, grid=4, image_size=64)
    assert policy(torch.rand(2, 3, 64, 64))[0].shape == (2, 16)
    with pytest.raises(UserError, match="--policy-model"):
        create_policy("learned", "vit_tiny_patch16_224", grid=4, image_size=8)


def test_each_head_runs_once_a_step():
    policy = create_policy("learned", "test_resnet", grid=4, image_size=32)
    runs = []
    policy.heads.alpha_head.register_forward_hook(lambda *_: runs.append("alpha"))
    policy.heads.beta_head.register_forward_hook(lambda *_: runs.append("beta"))
    heads = policy(torch.rand(4, 3, 32, 32))
    sample_action(*policy.log_concentrations(*heads))
    policy.update_prior(mean_heads(*heads), skipped=torch.tensor(False))
    assert sorted(runs) == ["alpha", "beta"]
    assert policy.heads.alpha_head[1].num_batches_tracked == 1


def test_mean_cells_are_alpha_over_alpha_plus_beta():
    policy = policy_with([1.0, 0.0, 2.0, 3.0], [0.0, 0.5, 1.0, -3.0])
    images = torch.rand(2, 3, 8, 8)
    log_alpha, log_beta = policy.log_concentrations(*policy(images))
    alpha, beta = log_alpha.exp(), log_beta.exp()
    torch.testing.assert_close(policy.mean_cells(images), alpha / (alpha + beta))


def test_control_prior_gives_every_image_the_same():
    policy = create_policy("prior", "unused", grid=4, image_size=32)
    assert [parameter.shape for parameter in policy.parameters()] == [(1, 16), (1, 16)]
    head_alpha, head_beta = policy(torch.rand(3, 3, 8, 8))
    assert head_alpha.shape == (3, 16)
    assert torch.equal(head_alpha, head_beta)
    sample_action(*policy.log_concentrations(head_alpha, head_beta)).log_prob.sum().backward()
    assert policy.heads.log_alpha.grad.abs().sum() > 0


def test_control_uniform_is_beta_1_1_and_stays_so():
    policy = create_policy("uniform", "unused", grid=4, image_size=32)
    assert list(policy.parameters()) == []
    heads = policy(torch.rand(3, 3, 8, 8))
    policy.update_prior(mean_heads(*heads), skipped=torch.tensor(False))
    action = sample_action(*policy.log_concentrations(*heads))
    assert torch.equal(action.log_prob, torch.zeros(3, 16))
    assert torch.equal(policy.mean_cells(torch.rand(2, 3, 8, 8)), torch.full((2, 16), 0.5))


def test_control_none_is_no_policy():
    assert create_policy("none", "unused", grid=4, image_size=32) is None


def test_unknown_policy_model_names_the_closest():
    with pytest.raises(UserError, match=r"--policy-model resnet10q: .*resnet10t"):
        create_policy("learned", "resnet10q", grid=4, image_size=32)


def test_samples_follow_the_distribution_and_the_densities_are_its_own():
    torch.manual_seed(0)
    log_alpha, log_beta = torch.tensor([[0.7, -0.3], [1.1, 0.2]]), torch.tensor([[0.1, 0.4], [-0.2, 2.0]])
    action = sample_action(log_alpha, log_beta, masks_per_image=50_000, clamped_density=True)
    assert action.cells.shape == (100_000, 2)
    by_image = action.cells.view(2, 50_000, 2)  # rows b*K .. b*K+K-1 belong to image b
    distribution = Beta(log_alpha.exp(), log_beta.exp())
    torch.testing.assert_close(by_image.mean(1), distribution.mean, rtol=0, atol=6e-3)
    torch.testing.assert_close(by_image.var(1), distribution.variance, rtol=0, atol=3e-3)
    expected = distribution.log_prob(by_image.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(action.log_prob.view(2, 50_000, 2), expected)
    torch.testing.assert_close(action.entropy.view(2, 50_000, 2)[:, 0], distribution.entropy())


@pytest.mark.parametrize("log_alpha", [-6.0, -4.0, -1.0, 0.0, 3.0, 6.0])
@pytest.mark.parametrize("log_beta", [-6.0, -2.0, 0.0, 6.0])
def test_samples_follow_the_distribution_over_the_whole_range(log_alpha, log_beta):
    """The share of samples below each of several thresholds, against scipy's distribution function."""
    torch.manual_seed(0)
    samples = 40_000
    cells = sample_action(torch.full((1, samples), log_alpha), torch.full((1, samples), log_beta)).cells[0].double()
    distribution = scipy.stats.beta(math.exp(log_alpha), math.exp(log_beta))
    for threshold in (0.001, 0.01, 0.1, 0.3, 0.49, 0.51, 0.7, 0.9, 0.99, 0.999):
        expected = distribution.cdf(threshold)
        spread = math.sqrt(expected * (1 - expected) / samples)
        assert (cells < threshold).double().mean().item() == pytest.approx(expected, abs=4.5 * spread + 1e-5)


@pytest.mark.parametrize("log_concentration", [-6.0, 6.0])
def test_finite_at_the_bounds_and_in_float32_inside_autocast(log_concentration):
    log_alpha = torch.full((4, 1000), log_concentration, requires_grad=True)
    log_beta = torch.full((4, 1000), -6.0, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        action = sample_action(log_alpha, log_beta)
    assert action.cells.dtype == action.log_prob.dtype == torch.float32
    assert action.cells.min() >= 1e-6
    assert action.cells.max() < 1
    (action.log_prob.sum() + action.entropy.sum()).backward()
    for tensor in (action.log_prob, action.entropy, log_alpha.grad, log_beta.grad):
        assert tensor.isfinite().all()
    assert not action.cells.requires_grad


def test_health_by_hand():
    policy = policy_with([0.0] * 4, [0.0] * 4)
    head_alpha = torch.tensor([[10.0, 0.0, 0.0, 0.0], [-10.0, 0.0, 0.0, 0.0]])
    action = sample_action(torch.zeros(2, 4), torch.zeros(2, 4))
    masks = torch.tensor([0.25, 0.75]).view(2, 1, 1, 1)
    log_concentrations = policy.log_concentrations(head_alpha, torch.zeros(2, 4))
    masked = MaskedImages(log_concentrations, action, masks, torch.zeros(2))
    health = policy_health(policy, masked, torch.tensor([1.0, 3.0]))
    spread = torch.sigmoid(torch.tensor(1.0)) - 0.5  # the first cell's means are sigmoid(1) and sigmoid(-1)
    assert health["mask_mean"].item() == pytest.approx(0.5)
    assert health["mask_std"].item() == pytest.approx(0.25)
    assert health["mask_std_between_images"].item() == pytest.approx(spread.item() / 4, rel=1e-5)
    assert health["policy_entropy"].item() == pytest.approx(0, abs=1e-6)
    assert health["policy_log_density"].item() == pytest.approx(0, abs=1e-6)
    assert health["advantage_std"].item() == pytest.approx(1)
    assert health["prior_drift"].item() == 0
    assert health["concentrations_at_bounds"].item() == 0


def test_concentrations_at_their_bounds_are_counted_and_warned_of(capsys):
    policy = policy_with([0.0] * 4, [0.0] * 4)
    heads = torch.tensor([[60.1, -60.1, 59.9, 0.0]]), torch.tensor([[0.0, 0.0, 0.0, 200.0]])  # of weight 0.1
    action = sample_action(*policy.log_concentrations(*heads))
    masked = MaskedImages(policy.log_concentrations(*heads), action, torch.rand(1, 1, 2, 2), torch.zeros(1))
    health = policy_health(policy, masked, torch.zeros(1))
    assert health["concentrations_at_bounds"].item() == 3 / 8
    warn_of_bounds(4, 3 / 8)
    printed = capsys.readouterr().out
    assert "in epoch 4, 37.5 % of the log-concentrations were at their bounds of -6 and 6" in printed
    assert "or with reinforce an --entropy-weight" in printed  # other objectives refuse it
    warn_of_bounds(5, 0.0)
    assert capsys.readouterr().out == ""


def test_masked_images_are_images_times_their_own_masks():
    torch.manual_seed(0)
    policy = policy_with([1.0, 0.0, 2.0, 3.0], [0.0, 0.5, 1.0, -3.0])
    mask = SmoothMask(8, 2, 3, 1.0)
    heads, images = (torch.rand(2, 4), torch.rand(2, 4)), torch.rand(2, 3, 8, 8)
    masked = draw_masks(policy, mask, *heads, images, masks_per_image=3)
    assert masked.images.shape == (6, 3, 8, 8)
    assert torch.equal(masked.masks, mask(masked.action.cells))
    for row in range(6):
        assert torch.equal(masked.images[row], images[row // 3] * masked.masks[row])
    torch.manual_seed(0)
    torch.rand(2, 4), torch.rand(2, 4), torch.rand(2, 3, 8, 8)
    assert torch.equal(sample_action(*policy.log_concentrations(*heads), 3).cells, masked.action.cells)


def test_faded_masks_are_applied_and_a_graph_rereads_their_weight():
    policy, mask = policy_with([1.0, 0.0, 2.0, 3.0], [0.0, 0.5, 1.0, -3.0]), SmoothMask(8, 2, 3, 1.0, 0.5, 1.5)
    heads, images = (torch.rand(2, 4), torch.rand(2, 4)), torch.rand(2, 3, 8, 8)
    weight, graphs = torch.ones(()), []
    plain = partial(draw_masks, policy, mask, masks_per_image=2)
    fading = partial(plain, mask_weight=weight)

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fading, backend=keep)
    for value in (1.0, 2 / 3, 0.25):
        weight.fill_(value)
        results = []
        for draw in (plain, fading, compiled):
            torch.manual_seed(0)
            results.append(draw(*heads, images))
        full, *faded = results
        for masked in faded:
            assert torch.equal(masked.action.cells, full.action.cells)
            torch.testing.assert_close(masked.masks, 1 - value + value * full.masks)
            assert torch.equal(masked.images, images.repeat_interleave(2, dim=0) * masked.masks)
    assert len(graphs) == 1
