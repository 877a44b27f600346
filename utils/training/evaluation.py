"""Evaluation: every image exactly once, whatever the number of processes, and the files that --test-only leaves."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils.data.dataset import BadImages, Batch, batches
from utils.data.folders import ImageFiles
from utils.data.loaders import Wait
from utils.results.metrics import Metrics, classification_metrics, per_class_table, prediction_table, table_as_csv
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically, write_json
from utils.runtime.progress import Progress, say
from utils.runtime.text import list_names, printable

STOP_STEPS = 10  # between two looks at whether a signal came


class Predictions(NamedTuple):
    """Logits (N, C) float32, targets and indices in the split (N,) int64, on the CPU, in the order of the images.

    All images of the split, but for those that could not be read.
    """

    logits: Tensor
    targets: Tensor
    indices: Tensor


@torch.no_grad()
def logits_of_batches(
    model: nn.Module,
    loaded: Iterable[Batch],
    prepare: Callable[[Tensor], Tensor],
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with its logits (B, C) float32 on the device.

    model: in evaluation mode; prepare: uint8 images (B, C, S, S) on the device to the model's input.
    """
    for batch in loaded:
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            logits = model(prepare(batch.images))
        yield batch, logits.to(torch.float32, copy=True)  # the next batch overwrites the output of a CUDA graph


@torch.no_grad()
def predict(
    model: nn.Module,
    loader: DataLoader,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    autocast_dtype: torch.dtype | None = None,
    print_freq: int = 10,
    label: str = "evaluate",
    stop_if_asked: Callable[[], None] | None = None,
    wait: Wait | None = None,
    bad_images: BadImages | None = None,
) -> Predictions:
    """Predictions of all ranks together, the same on every rank. Rank 0's buffers are broadcast first.

    model: the unwrapped classifier; prepare: uint8 images (B, C, S, S) on the device to the classifier's input;
    stop_if_asked: a collective, called now and then, that raises where the run is to stop; wait: see `loaded`;
    bad_images: takes note of the images that are left out. Raises UserError if they are too many, or all.
    """
    distributed.broadcast_buffers(model)
    model.eval()
    logits, targets, indices = [], [], []
    global_batch = loader.batch_sampler.batch_size * distributed.world_size()
    progress = Progress(label, len(loader), print_freq, global_batch)
    loaded = batches(loader, device, bad_images, wait)
    for step, (batch, output) in progress.track(logits_of_batches(model, loaded, prepare, device, autocast_dtype)):
        logits.append(output)
        targets.append(batch.targets)
        indices.append(batch.indices)
        if progress.is_due(step):
            progress.show(step, {})
        if stop_if_asked is not None and step % STOP_STEPS == 0 and step < loader.batch_sampler.common_steps:
            stop_if_asked()
    if bad_images is not None:
        bad_images.share()
    mine = [torch.cat(parts).cpu() for parts in (logits, targets, indices)] if logits else None
    shares = [share for share in distributed.all_gather_object(mine) if share is not None]
    all_logits, all_targets, all_indices = (torch.cat(parts) for parts in zip(*shares, strict=True))
    order = all_indices.argsort()
    order = order[all_indices[order] >= 0]  # without the stand-ins of images that cannot be read
    if not len(order):
        raise UserError(
            f"{loader.dataset.root}: none of the {len(all_indices)} images evaluated can be read; replace them.",
            agreed=True,
        )
    return Predictions(all_logits[order], all_targets[order], all_indices[order])


def measure(predictions: Predictions, auroc: bool = False) -> Metrics:
    """The metrics, computed on rank 0 and told to all ranks."""
    metrics = None
    if distributed.is_main_process():
        metrics = classification_metrics(predictions.logits, predictions.targets, auroc)
    return distributed.broadcast_object(metrics)


def validate(
    evaluate: Callable[..., Predictions], networks: dict[str, nn.Module], auroc: bool
) -> tuple[Predictions, dict[str, Metrics]]:
    """The metrics of each network by its name (`val`, and `val_ema` of the average); the last one's predictions."""
    metrics = {}
    for name, network in networks.items():
        predictions = evaluate(network, label="evaluate" if name == "val" else f"evaluate {name}")
        metrics[name] = measure(predictions, auroc)
    return predictions, metrics


def report_test(
    output_dir: Path,
    results: dict[str, Predictions],
    files: ImageFiles,
    *,
    split: str,
    weights: str,
    averaged: bool | None = None,
    origin: dict,
) -> dict[str, Metrics]:
    """Print and write what --test-only found, on rank 0: metrics.json and two tables for each result.

    results: predictions by name, "clean" first; its tables are per_class.csv and predictions.csv, those of another name
    per_class_<name>.csv and predictions_<name>.csv. files: the split's. averaged: whether the weights are the moving
    average of a file that holds one; None: it holds none. origin: goes into metrics.json as it is.
    """
    metrics = {name: measure(predictions, auroc=True) for name, predictions in results.items()}
    if not distributed.is_main_process():
        return metrics
    images = len(results["clean"].targets)
    _remove_tables(output_dir, {"masked"} - results.keys())
    for name, predictions in results.items():
        suffix = "" if name == "clean" else f"_{name}"
        rows = per_class_table(predictions.logits, predictions.targets, files.classes)
        write_atomically(output_dir / f"per_class{suffix}.csv", table_as_csv(rows))
        names = [files.path_as_text(index) for index in predictions.indices.tolist()]
        table = prediction_table(predictions.logits, predictions.targets, files.classes, names)
        write_atomically(output_dir / f"predictions{suffix}.csv", table_as_csv(table))
        say(f"{split}, {images} images, {name}: {format_metrics(metrics[name])}")
        width = max(len(printable(row["class"])) for row in rows)
        absent = [row["class"] for row in rows if not row["images"]]
        for row in rows:
            if row["class"] in absent:
                continue
            scores = "  ".join(f"{key} {row[key]:.4f}" for key in ("precision", "recall", "f1"))
            say(f"  {printable(row['class']):<{width}}  {row['images']:>6} images  {scores}")
    if absent:
        present = len(files.classes) - len(absent)
        say(
            f"{split}: macro metrics are over the {present} of {len(files.classes)} classes that have images here; "
            f"without: {list_names(absent)}."
        )
    summary = {
        "split": split,
        "images": images,
        "weights": weights,
        "averaged": averaged,
        "classes": len(files.classes),
        "absent_classes": absent,
        "metrics": metrics,
        "origin": origin,
    }
    write_json(output_dir / "metrics.json", summary)
    return metrics


def _remove_tables(output_dir: Path, names: set[str]) -> None:
    """Remove what an earlier evaluation left of results that this one has not: nothing would tell them apart."""
    for path in (output_dir / f"{table}_{name}.csv" for table in ("per_class", "predictions") for name in names):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: of an earlier evaluation, cannot be removed ({error.strerror}).") from None


def format_metrics(metrics: Metrics) -> str:
    """One line: `loss 0.1234  top1 0.9876 ...`; a metric that is undefined is called so."""
    return "  ".join(f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in metrics.items())
