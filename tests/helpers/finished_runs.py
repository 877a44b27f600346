"""What finished runs of a plan leave in their folders, written by hand."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.plan import FINISHED, folder_of_run
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
    (folder_of_run(results, arm, seed) / FINISHED).write_text(json.dumps(content))


CLASSES = ["ct-head-normal", "mr-<b>brain</b>", "us-breast-cyst"]
TARGETS, GUESSES = [0] * 6 + [1] * 3 + [2] * 3, [0] * 5 + [2] + [1, 1, 0] + [0, 0, 2]


def write_run(folder: Path, epochs: int = 3, tested: bool = True, policy: bool = True) -> Path:
    """What a run of these epochs leaves; tested: 12 images, of which 8 are recognised."""
    folder.mkdir(parents=True)
    lines = [
        {"epoch": epoch, "train_loss": 2 - epoch / 4, "lr_classifier": 0.1, "val_f1": [0.5, 0.625, 0.25, 0.3][epoch],
         "val_top1": 0.75, "val_loss": 1.0, **({"mask_mean": 0.5, "policy_entropy": -0.1} if policy else {})}
        for epoch in range(epochs)
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {"command": "_policy_gradient/train.py --lr 0.1", "time": "2026-11-23T10:00:00+00:00", "processes": 8,
             "device": "a GPU", "machine": "Linux", "versions": {"torch": "9.8.7"}, "commit": "0123456789ab",
             "epoch": 0, "step": 0}  # fmt: skip
    data = {"train": {"root": "/data/train", "images": dict(zip(CLASSES, (60, 30, 7), strict=True))}}
    (folder / "run.json").write_text(json.dumps({"starts": [start], "data": data}))
    status = {"status": "finished", "epoch": epochs, "step": 0, "message": "", "time": "2026-11-23T11:00:00+00:00"}
    (folder / "status.json").write_text(json.dumps(status))
    if tested:
        write_result(folder, start)
    return folder


def write_result(folder: Path, origin: dict) -> None:
    rows = [{"class": name, "images": TARGETS.count(number), "precision": 0.5, "recall": recall, "f1": 0.25 * number}
            for number, (name, recall) in enumerate(zip(CLASSES, (5 / 6, 2 / 3, 1 / 3), strict=True))]  # fmt: skip
    (folder / "per_class.csv").write_bytes(table_as_csv(rows))
    images = [
        {"image": f"{number}.png", "target": CLASSES[target], "prediction": CLASSES[guess], "probability": 0.5,
         "true_rank": 1 if target == guess else 2, "loss": 0.25 if target == guess else 1.0}
        for number, (target, guess) in enumerate(zip(TARGETS, GUESSES, strict=True))
    ]  # fmt: skip
    (folder / "predictions.csv").write_bytes(table_as_csv(images))
    metrics = {"loss": 0.5, "top1": 8 / 12, "f1": 0.61, "auroc": None}
    content = {"split": "test", "images": 12, "weights": "w.pth", "metrics": {"clean": metrics}, "origin": origin}
    (folder / "metrics.json").write_text(json.dumps(content))
