"""Writes the files of finished runs by hand, and draws their report without pictures."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.plan import FINISHED, folder_of_run
from utils import report
from utils.results import evaluation_section
from utils.results.metrics import (
    bootstrap_intervals,
    classification_metrics,
    outcome_of,
    per_class_table,
    prediction_table,
    table_as_csv,
)

START = {
    "command": "_normal/train.py --lr 0.1",
    "time": "2026-11-23T10:00:00+00:00",
    "processes": 1,
    "device": "CPU",
    "machine": "Linux x86_64, 2 CPU cores",
    "versions": {"python": "3.11.7", "torch": "2.14.1"},
    "commit": "0123456789ab",
    "epoch": 0,
    "step": 0,
}
CLASSES = ["ct-head-normal", "mr-<b>brain</b>", "us-breast-cyst"]
TARGETS, GUESSES = [0] * 6 + [1] * 3 + [2] * 3, [0] * 5 + [2] + [1, 1, 0] + [0, 0, 2]


def write_stage(folder: Path, log: list[dict], *, data: dict[str, Any] | None = None, **start: object) -> None:
    """The log and run.json of a training. start: values that differ from START."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps({"epoch": n} | line) + "\n" for n, line in enumerate(log)))
    (folder / "run.json").write_text(json.dumps({"starts": [START | start], "data": data or {}}))


def write_test(
    folder: Path, logits: torch.Tensor, targets: torch.Tensor, classes: Sequence[str], **start: object
) -> None:
    """The files of --test-only for these logits (N, C), with 10, 20, ... training images of the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{classes[target]}/{number}.png" for number, target in enumerate(targets.tolist())]
    rows = [row | {"train_images": 10 * n} for n, row in enumerate(per_class_table(logits, targets, classes), 1)]
    (folder / "per_class.csv").write_bytes(table_as_csv(rows))
    (folder / "predictions.csv").write_bytes(table_as_csv(prediction_table(logits, targets, classes, names)))
    metrics = {"clean": classification_metrics(logits, targets, auroc=True, calibration=True)}
    content = {"split": "test", "images": len(targets), "weights": "model_best.pth", "metrics": metrics}
    content["intervals"] = {"clean": bootstrap_intervals(outcome_of(logits, targets, calibration=True), 200)}
    (folder / "metrics.json").write_text(json.dumps(content | {"origin": START | start}))


def finish(results: Path, arm: str, seed: int, seconds: float = 1800.0) -> None:
    """Mark the run of a plan as finished."""
    content = {"commands": [], "seconds": seconds}
    (folder_of_run(results, arm, seed) / FINISHED).write_text(json.dumps(content))


def write_run(folder: Path, epochs: int = 3, tested: bool = True, policy: bool = True) -> Path:
    """The files of a run of up to four epochs; if tested, on 12 images, of which 8 are recognised."""
    of_policy = {"mask_mean": 0.5, "policy_entropy": -0.1} if policy else {}
    log = [
        {"train_loss": 2.0, "lr_classifier": 0.1, "val_f1": f1, "val_top1": 0.75, "val_loss": 1.0, **of_policy}
        for f1 in (0.5, 0.625, 0.25, 0.3)[:epochs]
    ]
    start = {"command": "_policy_gradient/train.py --lr 0.1", "processes": 8, "device": "a GPU"}
    data = {"train": {"root": "/data/train", "images": dict(zip(CLASSES, (60, 30, 7), strict=True))}}
    write_stage(folder, log, data=data, **start)
    status = {"status": "finished", "epoch": epochs, "step": 0, "message": "", "time": "2026-11-23T11:00:00+00:00"}
    (folder / "status.json").write_text(json.dumps(status))
    if tested:
        write_test(folder, torch.eye(3)[GUESSES], torch.tensor(TARGETS), CLASSES, **start)
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Report pages without drawing their pictures, which takes most of the time. Import the fixture to use it."""
    monkeypatch.setattr(evaluation_section, "picture", lambda figure, title: {"source": "", "title": title})
    monkeypatch.setattr(report, "responsive_picture", lambda draw, logs, groups, title: {"source": "", "title": title})
    for name in ("confusion_matrix", "per_class_recall", "recall_by_frequency", "reliability_diagram"):
        monkeypatch.setattr(evaluation_section, name, lambda *_: None)
