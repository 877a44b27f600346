"""What finished runs of a plan leave in their folders, written by hand."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.plan import run_folder
from utils.results.metrics import classification_metrics, per_class_table, prediction_table, table_as_csv

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


def write_stage(folder: Path, log: list[dict], **start: object) -> None:
    """A training's log and origin. start: what differs from START."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps({"epoch": n} | line) + "\n" for n, line in enumerate(log)))
    (folder / "run.json").write_text(json.dumps({"starts": [START | start], "data": {}}))


def write_test(
    folder: Path, logits: torch.Tensor, targets: torch.Tensor, classes: Sequence[str], **start: object
) -> None:
    """What --test-only leaves of these logits (N, C)."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{classes[target]}/{number}.png" for number, target in enumerate(targets.tolist())]
    (folder / "per_class.csv").write_bytes(table_as_csv(per_class_table(logits, targets, classes)))
    (folder / "predictions.csv").write_bytes(table_as_csv(prediction_table(logits, targets, classes, names)))
    metrics = {"clean": classification_metrics(logits, targets, auroc=True)}
    content = {"split": "test", "images": len(targets), "weights": "model_best.pth", "metrics": metrics}
    (folder / "metrics.json").write_text(json.dumps(content | {"origin": START | start}))


def finish(results: Path, arm: str, seed: int, seconds: float = 1800.0) -> None:
    """Say that the run is done."""
    content = {"commands": [], "seconds": seconds}
    (run_folder(results, arm, seed) / "finished.json").write_text(json.dumps(content))
