"""Bootstrap intervals: the metrics against scikit-learn, the intervals against SciPy and the binomial distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from utils.results.metrics import Outcome, bootstrap_intervals, classification_metrics, metrics_of


def outcome_of(logits: torch.Tensor, targets: torch.Tensor) -> Outcome:
    order = logits.argsort(dim=1, descending=True, stable=True)
    ranks = (order == targets[:, None]).int().argmax(1) + 1  # as metrics.true_ranks, by another way
    losses = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    return Outcome(*(one.numpy() for one in (targets, order[:, 0], ranks, losses)), logits.shape[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(2, 9), st.integers(0, 999))
def test_metrics_are_those_of_scikit_learn(images, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator).bfloat16().float()  # in which some are equal
    targets = torch.randint(classes, (images,), generator=generator)
    outcome = outcome_of(logits, targets)
    assert metrics_of(outcome) == pytest.approx(classification_metrics(logits, targets), rel=1e-6, abs=1e-9)
    # An image of weight 2 is two images, one of weight 0 none.
    weights = torch.randint(3, (images,), generator=generator)
    weights[0] = 1
    expected = classification_metrics(logits.repeat_interleave(weights, 0), targets.repeat_interleave(weights))
    assert metrics_of(outcome, weights.numpy()) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.fixture(scope="module")
def outcome():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (300,), generator=generator)
    return outcome_of(torch.randn(300, 4, generator=generator) + 1.5 * torch.eye(4)[targets], targets)


def test_intervals_are_those_of_scipy(outcome):
    found = bootstrap_intervals(outcome, 2000)
    right = (outcome.true_ranks == 1).astype(float)
    for name, values in (("top1", right), ("loss", outcome.losses)):
        of_scipy = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile")
        assert found[name] == pytest.approx(tuple(of_scipy.confidence_interval), abs=0.01)
    exact = stats.binom.interval(0.95, 300, right.mean())
    assert found["top1"] == pytest.approx([count / 300 for count in exact], abs=0.01)
    assert all(lower < metrics_of(outcome)[name] < upper for name, (lower, upper) in found.items() if name != "top5")
    assert found["top5"] == (1.0, 1.0)  # of four classes


def test_the_same_seed_gives_the_same_intervals(outcome):
    assert bootstrap_intervals(outcome, 50) == bootstrap_intervals(outcome, 50)
    assert bootstrap_intervals(outcome, 50) != bootstrap_intervals(outcome, 50, seed=1)
