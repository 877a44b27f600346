"""The files of --test-only, written and read back."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from tests.helpers.finished_runs import START
from utils.data.folders import ImageFiles
from utils.results import run_folder
from utils.results.metrics import bootstrap_intervals, classification_metrics, outcome_metrics, outcome_of
from utils.results.run_folder import read_run_folder, read_tested, write_test_results
from utils.runtime.errors import UserError

TARGETS = torch.tensor([0, 0, 0, 1, 1])


def write(folder, *names):
    """Write random results for five images of three classes, one of them absent; returns the metrics by name."""
    files = ImageFiles(folder / "val", {"a": ["1.png", "2.png", "3.png"], "=b": ["1.png", "2.png"], "none": []})
    results = {}
    for seed, name in enumerate(names):
        logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        predictions = (logits, TARGETS, torch.arange(5))
        results[name] = predictions, classification_metrics(logits, TARGETS, auroc=True, calibration=True)
    write_test_results(folder, results, files, split="val", weights="w.pth", averaged=None, origin=START)
    return {name: metrics for name, (_, metrics) in results.items()}


def test_results_are_read_back_as_written(tmp_path, capsys):
    metrics = write(tmp_path, "clean", "masked")
    run = read_run_folder(tmp_path)
    assert run.notes == []
    assert {name: evaluation.metrics for name, evaluation in run.evaluations.items()} == metrics
    for name, evaluation in run.evaluations.items():
        assert [row["class"] for row in evaluation.table] == ["a", "=b", "none"]
        expected = {key: value for key, value in metrics[name].items() if key != "auroc"}
        assert outcome_metrics(evaluation.outcome) == pytest.approx(expected, abs=1e-6)
    assert run.tested["absent_classes"] == ["none"] and run.tested["origin"] == START
    printed = capsys.readouterr().out
    assert f"val, 5 images, clean: loss {metrics['clean']['loss']:.4f}  top1" in printed
    assert "val: macro metrics are over the 2 of 3 classes that have images here; without: none." in printed


def test_metrics_have_the_intervals_of_all_possible_resamples(tmp_path):
    """Against the exact distribution over the 5^5 resamples of five images."""
    write(tmp_path, "clean")
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert content["bootstrap"] == {"level": 0.95, "resamples": 1000, "seed": 0}
    outcome = read_run_folder(tmp_path).evaluations["clean"].outcome
    draws = (np.bincount(draw, minlength=5) for draw in product(range(5), repeat=5))
    exact = [outcome_metrics(outcome, weights) for weights in draws]
    intervals = content["intervals"]["clean"]
    assert intervals.keys() == content["metrics"]["clean"].keys() - {"auroc"}
    for name, (lower, upper) in intervals.items():
        values = np.array([metrics[name] for metrics in exact])
        assert (values < lower - 1e-6).mean() < 0.035 > (values > upper + 1e-6).mean()
        assert (values <= lower + 1e-6).mean() > 0.015 < (values >= upper - 1e-6).mean()


def test_an_infinite_loss_has_no_interval(tmp_path):
    logits = torch.tensor([[0.0, -torch.inf], [0.0, 1.0]])
    intervals = bootstrap_intervals(outcome_of(logits, torch.tensor([1, 1])), 100)
    assert intervals["loss"] is None
    assert intervals["top1"] == (0.0, 1.0)


def test_tables_of_an_earlier_masked_evaluation_are_removed(tmp_path):
    write(tmp_path, "clean", "masked")
    write(tmp_path, "clean")
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "per_class.csv", "predictions.csv"}
    assert list(json.loads((tmp_path / "metrics.json").read_text())["metrics"]) == ["clean"]
    (tmp_path / "per_class_masked.csv").mkdir()
    with pytest.raises(UserError, match=r"per_class_masked\.csv: left by an earlier evaluation, cannot be removed"):
        write(tmp_path, "clean")


def test_an_evaluation_that_is_interrupted_leaves_no_metrics_of_another_split(tmp_path, monkeypatch):
    write(tmp_path, "clean")
    monkeypatch.setattr(run_folder, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path, "clean")
    with pytest.raises(UserError, match=r"metrics\.json: no such file; run --test-only with --output-dir"):
        read_tested(tmp_path, "clean")
