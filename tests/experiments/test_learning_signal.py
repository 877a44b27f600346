"""How well a policy gradient is known from single masks: against autograd, and against Gaussian samples by hand."""

import math

import pytest
import torch

from _policy_gradient import train as policy_gradient
from experiments import learning_signal
from experiments.learning_signal import Samples, measure_signal, report, score
from tests.conftest import SMALL_POLICY
from utils.runtime.errors import UserError

IMAGES, MASKS, NUMBERS, NOISE = 3, 20_000, 4, 2.0


@pytest.fixture(scope="module")
def gaussian():
    """Losses that are linear in Gaussian scores, with noise of variance 4: the gradient is the slopes, (N, C)."""
    torch.manual_seed(0)
    slopes = torch.tensor([[1.0, 0, 0, 0], [1.0, 1.0, 0, 0], [1.0, -1.0, 0, 0]])
    scores = torch.randn(IMAGES, MASKS, NUMBERS)
    noise = NOISE * torch.randn(IMAGES, MASKS)
    levels = torch.tensor([[0.0], [10.0], [-5.0]])  # a baseline must subtract these
    return Samples(torch.einsum("nkc,nc->nk", scores, slopes) + noise + levels, scores)


def test_score_is_that_of_autograd():
    torch.manual_seed(0)
    log_concentrations = torch.randn(2, 1, 9, dtype=torch.float64, requires_grad=True)
    cells = torch.rand(5, 9, dtype=torch.float64)
    alpha, beta = log_concentrations.exp()
    log_prob = torch.distributions.Beta(alpha, beta).log_prob(cells).sum(1)  # (5,)
    scores = score(log_concentrations.detach(), torch.stack([cells.log(), (1 - cells).log()]))
    for actual, value in zip(scores, log_prob, strict=True):
        (expected,) = torch.autograd.grad(value, log_concentrations, retain_graph=True)
        torch.testing.assert_close(actual, expected.flatten())


@pytest.mark.parametrize(("shared", "squared"), [(False, 5 / 3), (True, 1)])
def test_the_signal_of_gaussian_samples(gaussian, shared, squared):
    """The slopes have squared lengths 1, 2 and 2, their mean (1, 0, 0, 0) has 1.

    E[(w.s + n)^2 |s|^2] = |w|^2 (C + 2) + noise^2 C for Gaussian s.
    """
    signal = measure_signal(gaussian, shared)
    assert signal.squared_length == pytest.approx(squared, rel=0.05)
    power = 5 / 3 * (NUMBERS + 2) + NOISE**2 * NUMBERS
    assert signal.masks_needed == pytest.approx((power - squared) / squared, rel=0.05)
    assert signal.deviations > 20


def test_losses_that_do_not_depend_on_the_mask_give_no_signal():
    torch.manual_seed(1)
    signal = measure_signal(Samples(torch.randn(IMAGES, 200), torch.randn(IMAGES, 200, NUMBERS)), shared=False)
    assert abs(signal.deviations) < 4
    assert signal.masks_needed > 100 or math.isinf(signal.masks_needed)


def test_the_report_gives_the_masks_share_of_the_variance():
    """The means 0, 1 and 2 of three images have variance 1; four masks at +-1/2 around each mean have 1/3."""
    torch.manual_seed(0)
    losses = torch.arange(3.0)[:, None] + torch.tensor([-0.5, 0.5, -0.5, 0.5])
    text = report(Samples(losses, torch.randn(3, 4, 2)))
    assert text.startswith("3 images, 4 masks each; mean cross-entropy 1.0000\n")
    assert "between an image's masks: 0.333, 25 % of the total" in text


def test_the_command_reads_a_run(image_folder, tmp_path, capsys):
    run = tmp_path / "run"
    policy_gradient.main([*SMALL_POLICY, "--epochs", "1", "--data-path", str(image_folder), "--output-dir", str(run)])
    capsys.readouterr()
    small = [str(run), "--images-per-class", "2", "--masks-per-image", "4"]
    outputs = set()
    for flags in ([], ["--grid", "32", "--kernel", "1"]):
        learning_signal.main([*small, *flags])
        outputs.add(printed := capsys.readouterr().out)
        assert "6 images, 4 masks each" in printed and printed.count("standard deviations from chance") == 2
    assert len(outputs) == 2
    for flag, value, message in (
        ("--grid", "33", "--grid 33: expected 1 to 32"),
        ("--kernel", "3", "--kernel and --sigma: only for the uniform masks of --grid"),
        ("--masks-per-image", "5", "--masks-per-image 5: expected an even number"),
    ):
        with pytest.raises(UserError, match=message):
            learning_signal.main([str(run), flag, value])
