"""Probes: equal to scikit-learn run by hand; nested draws; intervals equal to other routes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from utils.inference import probes
from utils.inference.features import Features
from utils.inference.probes import few_shots, logistic_regression, nearest_neighbours
from utils.results.intervals import percentile_interval
from utils.results.metrics import Outcome, bootstrap_intervals


def clouds(images: int, classes: int, seed: int, spread: float = 1.5) -> Features:
    """Overlapping normal clouds in 6 dimensions, with features of very different scales."""
    generator = np.random.default_rng(seed)
    targets = np.arange(images) % classes
    centres = np.random.default_rng(classes).normal(size=(classes, 6))
    values = (centres[targets] + spread * generator.normal(size=(images, 6))) * [1, 10, 0.1, 1, 1, 100]
    return Features(values.astype(np.float32), targets, np.arange(images))


def macro_f1(truth: Features, predictions: np.ndarray) -> float:
    return f1_score(truth.targets, predictions, average="macro")


@pytest.mark.parametrize("classes", [2, 4])
def test_nearest_neighbours_are_those_of_scikit_learn(classes):
    train, val, test = (clouds(images, classes, seed) for seed, images in enumerate((90, 60, 80)))
    fitted = {}
    for k in (1, 5, 10, 20, 50):
        model = KNeighborsClassifier(k, weights=lambda d: np.exp((1 - d) / 0.07), metric="cosine", algorithm="brute")
        fitted[k] = model.fit(train.values, train.targets)
    by_k = {k: macro_f1(val, model.predict(val.values)) for k, model in fitted.items()}
    best = max(by_k, key=by_k.get)
    probed = nearest_neighbours(train, val, test, classes)
    assert (probed.parameter, probed.val) == (best, pytest.approx(by_k[best]))
    expected = fitted[best].predict_proba(test.values)
    np.testing.assert_allclose(probed.logits.softmax(1).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_logistic_regression_is_that_of_scikit_learn(classes):
    train, val, test = (clouds(images, classes, seed) for seed, images in enumerate((90, 60, 80)))
    fitted = {}
    for strength in (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
        fitted[strength] = model.fit(train.values, train.targets)
    by_strength = {strength: macro_f1(val, model.predict(val.values)) for strength, model in fitted.items()}
    best = max(by_strength, key=by_strength.get)
    probed = logistic_regression(train, val, test, classes)
    assert (probed.parameter, probed.val, probed.converged) == (best, pytest.approx(by_strength[best]), True)
    expected = fitted[best].predict_proba(test.values)
    np.testing.assert_allclose(probed.logits.softmax(1).numpy(), expected, atol=1e-6)
    predictions = fitted[best].predict(test.values)
    scores = expected[:, 1] if classes == 2 else expected
    auroc = roc_auc_score(test.targets, scores, multi_class="ovo")
    assert probes.full_metrics(probed.logits, test.targets) == pytest.approx(
        {
            "f1": macro_f1(test, predictions),
            "top1": accuracy_score(test.targets, predictions),
            "balanced_accuracy": balanced_accuracy_score(test.targets, predictions),
            "auroc": auroc,
        }
    )


def test_a_class_without_training_images_is_never_predicted():
    train, val, test = (clouds(images, 4, seed) for seed, images in enumerate((40, 40, 40)))
    train = train.subset(train.targets != 2)
    for fit in probes.PROBES.values():
        logits = fit(train, val, test, 4).logits
        assert torch.isinf(logits[:, 2]).all()
        assert logits[:, [0, 1, 3]].isfinite().any(1).all()
        assert 0 < probes.full_metrics(logits, test.targets)["auroc"] < 1


def test_a_solver_that_stops_early_is_reported(monkeypatch):
    train, val, test = (clouds(60, 3, seed) for seed in range(3))
    monkeypatch.setattr(probes, "ITERATIONS", 2)
    assert not logistic_regression(train, val, test, 3).converged


def test_few_shot_draws_are_nested_and_repeatable():
    targets = np.repeat([0, 1, 2], [30, 4, 100])
    draws = {shots: few_shots(targets, 3, shots, 0, 7, "train") for shots in (1, 5, 10)}
    assert [np.bincount(targets[draw]).tolist() for draw in draws.values()] == [[1, 1, 1], [5, 4, 5], [10, 4, 10]]
    assert set(draws[1]) < set(draws[5]) < set(draws[10])
    assert (np.diff(draws[10]) > 0).all()
    assert np.array_equal(draws[5], few_shots(targets, 3, 5, 0, 7, "train"))
    for other in ((1, 7, "train"), (0, 8, "train"), (0, 7, "val")):
        assert not np.array_equal(draws[10], few_shots(targets, 3, 10, *other))


def test_bootstrap_intervals_are_those_of_the_test_metrics():
    generator = np.random.default_rng(0)
    targets, predictions = generator.integers(3, size=50), generator.integers(3, size=(2, 50))
    resampled = probes.bootstrap(targets, predictions, 3, seed=5, resamples=40)
    assert resampled.shape == (40, 2, 3)
    for row in range(2):
        outcome = Outcome(targets, predictions[row], np.ones(50), np.zeros(50), 3)
        expected = bootstrap_intervals(outcome, resamples=40, seed=5)
        for place, name in enumerate(probes.SCORES):
            assert percentile_interval(resampled[:, row, place]) == pytest.approx(expected[name])
