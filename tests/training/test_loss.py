"""The classifier's loss: class weights against hand-computed values, torch's own and scikit-learn's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from _normal import train as normal
from _policy_gradient.objective import Objective
from tests.helpers.runs import state_of
from utils.results.log import read_log
from utils.training.loss import class_weights, cross_entropies

LOGITS = torch.tensor([[0.0, math.log(2), math.log(5)], [math.log(3), 0.0, 0.0]])  # softmax: 1 2 5 of 8; 3 1 1 of 5


def test_weights_from_counts():
    assert class_weights("none", [1, 2]) is None
    assert class_weights("balanced", [6, 3, 1]).tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    # sqrt: 1, 1/2 and 1/3 times a factor f with 1 x 1 f + 4 x f / 2 + 9 x f / 3 = 14
    assert class_weights("sqrt", [1, 4, 9]).tolist() == pytest.approx([14 / 6, 14 / 12, 14 / 18])
    for kind in ("balanced", "sqrt"):
        weights = class_weights(kind, [1_000_000, 7, 300])
        assert weights.dtype == torch.float32
        assert (weights.double() @ torch.tensor([1_000_000.0, 7, 300]).double()).item() == pytest.approx(1_000_307)


def test_balanced_weights_are_those_of_scikit_learn():
    targets = np.repeat([0, 1, 2, 3], [40, 3, 17, 1])
    expected = compute_class_weight("balanced", classes=np.arange(4), y=targets)
    assert class_weights("balanced", [40, 3, 17, 1]).tolist() == pytest.approx(expected.tolist())


def test_losses_by_hand():
    weights, targets = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([2, 0])
    negative_log = [[math.log(8), math.log(4), math.log(8 / 5)], [math.log(5 / 3), math.log(5), math.log(5)]]
    plain = cross_entropies(LOGITS, targets)
    assert plain.tolist() == pytest.approx([math.log(8 / 5), math.log(5 / 3)])
    weighted = cross_entropies(LOGITS, targets, weights=weights)
    assert weighted.tolist() == pytest.approx([math.log(8 / 5), 2 * math.log(5 / 3)])
    # Label smoothing .3: .8 for the label and .1 for each other class, each with its own class's weight.
    smoothed = cross_entropies(LOGITS, targets, 0.3, weights)
    first = 0.1 * 2 * negative_log[0][0] + 0.1 * 0.5 * negative_log[0][1] + 0.8 * 1 * negative_log[0][2]
    second = 0.8 * 2 * negative_log[1][0] + 0.1 * 0.5 * negative_log[1][1] + 0.1 * 1 * negative_log[1][2]
    assert smoothed.tolist() == pytest.approx([first, second])
    mixed = cross_entropies(LOGITS, torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]), weights=weights)
    assert mixed.tolist() == pytest.approx([0.25 * 2 * math.log(8) + 0.75 * 0.5 * math.log(4), math.log(5)])
    assert cross_entropies(LOGITS.bfloat16(), targets).dtype == torch.float32


def test_one_hot_targets_give_the_losses_of_their_classes():
    logits, targets, weights = torch.randn(9, 4), torch.arange(9) % 4, torch.rand(4)
    one_hot = F.one_hot(targets, 4).float()
    for smoothing in (0.0, 0.2):
        by_class = cross_entropies(logits, targets, smoothing, weights)
        torch.testing.assert_close(cross_entropies(logits, one_hot, smoothing, weights), by_class)


@pytest.mark.parametrize("name", ["published-unscaled", "reinforce"])
def test_the_policys_reward_is_not_weighted(name):
    """The gradient to the log-densities is that of the cross-entropies; the classifier's is that of the losses."""
    log_prob, entropy = torch.randn(6, 4, requires_grad=True), torch.zeros(6, 4)
    cross_entropy = torch.rand(6)
    losses = (3 * cross_entropy).requires_grad_()
    baseline = "none" if name == "reinforce" else None
    weighted, advantage = Objective(name, baseline)(losses, log_prob, entropy, cross_entropy)
    to_losses, to_policy = torch.autograd.grad(weighted, [losses, log_prob])
    plain, same = Objective(name, baseline)(cross_entropy.clone(), log_prob, entropy)
    assert torch.equal(to_policy, torch.autograd.grad(plain, log_prob)[0])
    assert torch.equal(advantage, same)
    assert to_losses.tolist() == pytest.approx([1 / 6] * 6)


def test_published_is_one_loss_for_both_networks():
    log_prob, losses = torch.randn(6, 4, requires_grad=True), torch.rand(6)
    weighted = Objective("published")(losses, log_prob, log_prob, torch.rand(6))
    for value, same in zip(weighted, Objective("published")(losses, log_prob, log_prob), strict=True):
        assert torch.equal(value, same)


def test_a_run_with_class_weights(image_folder, tmp_path, train, capsys):
    """Trained on 12, 9 and 3 images; val is measured without weights, and class counts come after --exclude."""
    lines = [f"train/dark/{number}.png" for number in range(3)] + [f"train/striped/{n}.png" for n in range(9)]
    (tmp_path / "exclude.txt").write_text("\n".join(lines))
    flags = ["--exclude", tmp_path / "exclude.txt", "--epochs", 1, "--lr", 1e-30]  # the weights stay as they are
    folders = {kind: train(normal, *flags, "--class-weights", kind, name=kind) for kind in ("none", "balanced")}
    assert "--class-weights balanced: 0.667 (bright) to 2.67 (striped); their mean over images is 1" in (
        capsys.readouterr().out
    )
    none, balanced = (read_log(folders[kind])[0] for kind in ("none", "balanced"))
    assert balanced["val_loss"] == pytest.approx(none["val_loss"], rel=1e-6)
    assert balanced["train_loss"] != pytest.approx(none["train_loss"], rel=1e-3)
    assert state_of(folders["balanced"])["args"]["class_weights"] == "balanced"
