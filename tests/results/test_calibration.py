"""Calibration error, Brier score and reliability table: by hand, against a plain loop, and against scikit-learn."""

import inspect
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import brier_score_loss

from tests.helpers.finished_runs import START
from utils.data.folders import ImageFiles
from utils.results.intervals import wilson_intervals
from utils.results.metrics import (
    Outcome,
    bootstrap_intervals,
    calibration_metrics,
    classification_metrics,
    confidence_bins,
    outcome_of,
    reliability_table,
)
from utils.results.run_folder import read_run_folder, write_test_results


def outcome_with(confidences, right) -> Outcome:
    """The outcome of images of class 0 with these confidences; right: whether each is recognised."""
    targets = np.zeros(len(right), int)
    return Outcome(targets, 1 - np.array(right, int), np.ones(len(right)), np.zeros(len(right)), 2,
                   np.array(confidences, float))  # fmt: skip


def metrics_of(logits: torch.Tensor, targets: list[int]) -> dict:
    return classification_metrics(logits, torch.tensor(targets), calibration=True)


def test_calibration_error_by_hand():
    # Bins of 1/15: .61 and .65 share the one up to 10/15, .99 and .98 the last one.
    outcome = outcome_with([0.61, 0.65, 0.98, 0.99, 0.4], [True, False, True, True, False])
    assert calibration_metrics(outcome)["ece"] == pytest.approx((abs(1 - 1.26) + abs(2 - 1.97) + 0.4) / 5)
    weights = np.array([0, 2, 1, 0, 1])
    assert calibration_metrics(outcome, weights)["ece"] == pytest.approx((2 * 0.65 + 0.02 + 0.4) / 4)


def test_brier_score_by_hand():
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]]).log()
    expected = (0.3**2 + 0.2**2 + 0.1**2 + 0.5**2 + 0.25**2 + 0.75**2) / 2
    assert metrics_of(logits, [0, 2])["brier"] == pytest.approx(expected)
    assert metrics_of(torch.tensor([[0.0, 50.0]]), [0])["brier"] == pytest.approx(2)  # the largest value
    assert metrics_of(torch.tensor([[0.0, 50.0]]), [1])["brier"] == pytest.approx(0, abs=1e-12)


def test_a_bin_holds_its_upper_edge():
    edges = np.arange(1, 16) / 15
    assert confidence_bins(edges).tolist() == list(range(15))
    assert confidence_bins(edges[:-1] + 1e-9).tolist() == list(range(1, 15))
    assert confidence_bins(np.array([0.0, 1.0, np.nextafter(1, 2)])).tolist() == [0, 14, 14]
    # The confidences of two equal logits are at no edge, those of one right image at the last one.
    table = reliability_table(outcome_of(torch.tensor([[9.0, 9.0], [99.0, 0.0]]), torch.tensor([1, 0]), True))
    assert [(number, row) for number, row in enumerate(table) if row["images"]] == [
        (7, {"images": 1, "confidence": 0.5, "accuracy": 0.0}),
        (14, {"images": 1, "confidence": 1.0, "accuracy": 1.0}),
    ]
    assert table[0] == {"images": 0, "confidence": None, "accuracy": None}


def by_loop(probabilities: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """ECE and Brier score, image by image and bin by bin."""
    ece = brier = 0.0
    for number in range(15):
        inside = [row for row, p in enumerate(probabilities) if number / 15 < p.max() <= (number + 1) / 15]
        if inside:
            accuracy = np.mean([probabilities[row].argmax() == targets[row] for row in inside])
            ece += len(inside) / len(targets) * abs(accuracy - np.mean([probabilities[row].max() for row in inside]))
    for row, target in zip(probabilities, targets, strict=True):
        brier += sum((p - (label == target)) ** 2 for label, p in enumerate(row)) / len(targets)
    return ece, brier


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 50), st.integers(2, 7), st.integers(0, 999))
def test_calibration_is_that_of_a_loop_and_of_scikit_learn(images, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, generator=generator)
    targets = torch.randint(classes, (images,), generator=generator)  # with few images classes are absent
    metrics = classification_metrics(logits, targets, calibration=True)
    probabilities = logits.double().softmax(1).numpy()
    expected = by_loop(probabilities, targets.numpy())
    assert (metrics["ece"], metrics["brier"]) == pytest.approx(expected, abs=1e-12)
    if "scale_by_half" in inspect.signature(brier_score_loss).parameters:  # scikit-learn 1.7
        labels = np.arange(classes)
        score = brier_score_loss(targets.numpy(), probabilities, labels=labels, scale_by_half=False)
        assert metrics["brier"] == pytest.approx(score, abs=1e-12)
    weights = torch.randint(1, 3, (images,), generator=generator)
    repeated = classification_metrics(
        logits.repeat_interleave(weights, 0), targets.repeat_interleave(weights), calibration=True
    )
    weighted = calibration_metrics(outcome_of(logits, targets, calibration=True), weights.numpy())
    assert weighted == pytest.approx({name: repeated[name] for name in ("ece", "brier")}, abs=1e-12)


def test_only_a_test_computes_them():
    assert not {"ece", "brier"} & classification_metrics(torch.eye(2), torch.tensor([0, 1])).keys()
    assert not {"ece", "brier"} & bootstrap_intervals(outcome_of(torch.eye(2), torch.tensor([0, 1])), 5).keys()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_logits_leave_calibration_undefined(bad):
    logits, targets = torch.eye(3), torch.tensor([0, 1, 2])
    logits[1, 1] = bad
    metrics = classification_metrics(logits, targets, calibration=True)
    assert (metrics["ece"], metrics["brier"]) == (None, None)
    outcome = outcome_of(logits, targets, calibration=True)
    assert reliability_table(outcome) is None
    intervals = bootstrap_intervals(outcome, 50)
    assert (intervals["ece"], intervals["brier"]) == (None, None)
    impossible = metrics_of(torch.tensor([[0.0, -math.inf]]), [1])  # the loss is infinite
    assert (impossible["loss"], impossible["ece"], impossible["brier"]) == (None, 1, 2)


def test_the_bias_of_the_calibration_error_is_as_documented():
    generator = np.random.default_rng(0)
    for images, repeats, expected in ((100, 40, 0.12), (1000, 20, 0.04), (10_000, 10, 0.01)):
        confidences = generator.uniform(size=(repeats, images))
        right = generator.uniform(size=(repeats, images)) < confidences  # perfectly calibrated
        values = [calibration_metrics(outcome_with(*run))["ece"] for run in zip(confidences, right, strict=True)]
        assert np.mean(values) == pytest.approx(expected, abs=0.006)


def test_the_interval_of_the_brier_score_is_scipys():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (300,), generator=generator)
    outcome = outcome_of(torch.randn(300, 4, generator=generator) + 2 * torch.eye(4)[targets], targets, True)
    intervals = bootstrap_intervals(outcome, 1000)
    expected = stats.bootstrap((outcome.brier,), np.mean, n_resamples=1000, method="percentile").confidence_interval
    assert intervals["brier"] == pytest.approx(tuple(expected), abs=0.01)
    lower, upper = intervals["ece"]
    assert 0 < lower < upper < 1


def test_intervals_of_recall_are_scipys():
    right, images = np.array([0, 3, 7, 50]), np.array([4, 5, 7, 90])
    bounds = np.transpose(wilson_intervals(right, images))
    for pair, hits, number in zip(bounds, right, images, strict=True):
        expected = stats.binomtest(int(hits), int(number)).proportion_ci(0.95, method="wilson")
        assert pair == pytest.approx((expected.low, expected.high), abs=1e-12)


# Files


def write(folder, weights="w.pth", heated=False):
    files = ImageFiles(folder / "val", {"a": ["1.png", "2.png", "3.png"], "=b": ["1.png", "2.png"], "none": []})
    logits, targets = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 0, 1, 1])
    predictions = (logits, targets, torch.arange(5))
    results = {"clean": (predictions, classification_metrics(logits, targets, calibration=True))}
    write_test_results(folder, results, files, split="val", weights=str(weights), heated=heated, origin=START)
    return logits, targets


def test_the_reliability_table_is_written(tmp_path):
    logits, targets = write(tmp_path)
    content = json.loads((tmp_path / "metrics.json").read_text())
    table = content["reliability"]["clean"]
    assert table == reliability_table(outcome_of(logits, targets, calibration=True))
    gaps = [row["images"] * abs(row["accuracy"] - row["confidence"]) for row in table if row["images"]]
    assert len(table) == 15 and sum(gaps) / 5 == pytest.approx(content["metrics"]["clean"]["ece"])


@pytest.mark.parametrize(
    ("command", "images", "heated", "expected"),
    [
        ("_normal/train.py", {"none": 3, "a": 70, "=b": 5}, False, ["70", "5", "3"]),
        ("_policy_gradient/train.py", {"none": 3, "a": 70, "=b": 5}, True, ["70", "5", "3"]),
        ("_normal/train.py", {"none": 3, "a": 70, "=b": 5}, True, ["", "", ""]),  # of another training
        ("_normal/train.py", {"none": 3, "a": 70, "c": 5}, False, ["", "", ""]),
        (None, None, False, ["", "", ""]),
    ],
    ids=["its own", "heated", "of another script", "of other classes", "no run.json"],
)
def test_training_images_are_those_of_the_run_of_the_weights(tmp_path, command, images, heated, expected):
    (tmp_path / "run").mkdir()
    if command:
        content = {
            "starts": [START | {"command": command}],
            "data": {"train": {"root": "/data/train", "images": images}},
        }
        (tmp_path / "run" / "run.json").write_text(json.dumps(content))
    write(tmp_path, tmp_path / "run" / "model_best.pth", heated)
    table = read_run_folder(tmp_path).evaluations["clean"].table
    assert [row["train_images"] for row in table] == expected
