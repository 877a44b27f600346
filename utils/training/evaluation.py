"""Evaluation: every image exactly once, for any number of processes."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils.data.dataset import BadImages, Batch, batches
from utils.data.loaders import Wait
from utils.results.metrics import Metrics, classification_metrics
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.progress import Progress

STOP_STEPS = 10  # steps between two checks for a stop signal


class Predictions(NamedTuple):
    """Logits (N, C) float32, targets and indices in the split (N,) int64, on the CPU, in the order of the split.

    Unreadable images are left out.
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
    """Predictions of all ranks together, equal on every rank. Rank 0's buffers are broadcast first.

    model: the unwrapped classifier. prepare: turns uint8 images (B, C, S, S) on the device into the classifier's input.
    stop_if_asked: a collective, called every few steps, that raises if the run should stop. wait: see `loaded`.
    bad_images: collects unreadable images. Raises UserError if there are too many of them, or no readable image.
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
    own = [torch.cat(parts).cpu() for parts in (logits, targets, indices)] if logits else None
    shares = [share for share in distributed.all_gather_object(own) if share is not None]
    all_logits, all_targets, all_indices = (torch.cat(parts) for parts in zip(*shares, strict=True))
    order = all_indices.argsort()
    order = order[all_indices[order] >= 0]  # without the stand-ins for unreadable images
    if not len(order):
        raise UserError(
            f"{loader.dataset.root}: none of the {len(all_indices)} images evaluated can be read; replace them.",
            agreed=True,
        )
    return Predictions(all_logits[order], all_targets[order], all_indices[order])


def measure(predictions: Predictions, auroc: bool = False, calibration: bool = False) -> Metrics:
    """The metrics, computed on rank 0 and broadcast."""
    metrics = None
    if distributed.is_main_process():
        metrics = classification_metrics(predictions.logits, predictions.targets, auroc, calibration)
    return distributed.broadcast_object(metrics)


def validate(
    evaluate: Callable[..., Predictions], networks: dict[str, nn.Module], auroc: bool
) -> tuple[Predictions, dict[str, Metrics]]:
    """The metrics of each network by name (`val`, and `val_ema` for the average), and the predictions of the last."""
    metrics = {}
    for name, network in networks.items():
        predictions = evaluate(network, label="evaluate" if name == "val" else f"evaluate {name}")
        metrics[name] = measure(predictions, auroc)
    return predictions, metrics
