"""Bootstrap intervals: the metrics against scikit-learn, the intervals against SciPy and the binomial distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from utils.results.metrics import (
    Outcome,
    bootstrap_intervals,
    classification_metrics,
    count_classes,
    macro_metrics,
    outcome_metrics,
)


def outcome_of(logits: torch.Tensor, targets: torch.Tensor) -> Outcome:
    order = logits.argsort(dim=1, descending=True, stable=True)
    ranks = (order == targets[:, None]).int().argmax(1) + 1  # as metrics.true_ranks, computed differently
    losses = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    return Outcome(targets.numpy(), order[:, 0].numpy(), ranks.numpy(), losses.numpy(), logits.shape[1])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 60), st.integers(2, 9), st.integers(0, 999))
def test_weighted_metrics_are_those_of_scikit_learn(images, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, generator=generator).bfloat16().float()  # some are equal
    targets = torch.randint(classes, (images,), generator=generator)
    outcome = outcome_of(logits, targets)
    assert outcome_metrics(outcome) == pytest.approx(classification_metrics(logits, targets), rel=1e-12, abs=1e-12)
    weights = torch.randint(3, (images,), generator=generator)  # 2: the image counts twice, 0: not at all
    weights[0] = 1
    expected = classification_metrics(logits.repeat_interleave(weights, 0), targets.repeat_interleave(weights))
    assert outcome_metrics(outcome, weights.numpy()) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_metrics_of_several_runs_are_those_of_each_run():
    generator = np.random.default_rng(0)
    targets, predictions = generator.integers(5, size=30), generator.integers(5, size=(2, 3, 30))
    weights = generator.integers(3, size=30)
    together = macro_metrics(*count_classes(targets, predictions, weights, 5))
    for place in np.ndindex(2, 3):
        alone = macro_metrics(*count_classes(targets, predictions[place], weights, 5))
        assert {name: values[place] for name, values in together.items()} == pytest.approx(alone, abs=1e-12)


def test_metrics_among_some_classes_count_all_predictions():
    counts = count_classes(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 2, 2]), None, 4)
    metrics = macro_metrics(*counts, np.array([True, True, False, True]))  # class 3 has no images
    recall, f1 = (2 / 3 + 1 / 2) / 2, (4 / 5 + 1 / 2) / 2
    assert metrics == pytest.approx(
        {"top1": 3 / 5, "precision": (1 + 1 / 2) / 2, "recall": recall, "f1": f1, "balanced_accuracy": recall}
    )
    assert np.isnan(list(macro_metrics(*counts, np.arange(4) == 3).values())).all()


@pytest.fixture(scope="module")
def outcome():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (300,), generator=generator)
    return outcome_of(torch.randn(300, 4, generator=generator) + 1.5 * torch.eye(4)[targets], targets)


def test_intervals_are_those_of_scipy(outcome):
    intervals = bootstrap_intervals(outcome, 2000)
    right = (outcome.true_ranks == 1).astype(float)
    for name, values in (("top1", right), ("loss", outcome.losses)):
        expected = stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile").confidence_interval
        assert intervals[name] == pytest.approx(tuple(expected), abs=0.01)
    exact = stats.binom.interval(0.95, 300, right.mean())
    assert intervals["top1"] == pytest.approx([count / 300 for count in exact], abs=0.01)
    assert intervals.pop("top5") == (1.0, 1.0)  # with four classes
    metrics = outcome_metrics(outcome)
    assert all(lower < metrics[name] < upper for name, (lower, upper) in intervals.items())


def test_the_same_seed_gives_the_same_intervals(outcome):
    assert bootstrap_intervals(outcome, 50) == bootstrap_intervals(outcome, 50)
    assert bootstrap_intervals(outcome, 50) != bootstrap_intervals(outcome, 50, seed=1)
