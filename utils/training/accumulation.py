"""Gradient accumulation: a batch is split into micro-batches, and only the activations of one are kept at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from utils.runtime import distributed
from utils.training.loop_settings import LoopSettings
from utils.training.loss import cross_entropies
from utils.training.update import GuardedUpdate


class Outputs(NamedTuple):
    """Logits (B, C), cross-entropies (B,) without weights, both detached; losses (B,), weighted by --class-weights.

    Only the losses of the last micro-batch carry a gradient: the others' backward passes are done.
    """

    logits: Tensor
    cross_entropy: Tensor
    losses: Tensor


def classify(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    update: GuardedUpdate,
    settings: LoopSettings,
    scale: Tensor | None = None,
) -> Outputs:
    """The classifier's forward passes over a batch in micro-batches, and all backward passes but the last.

    images: (B, 3, S, S); targets: (B,) or (B, C); scale: the factor () that the caller's loss gives to the mean of the
    losses, None for 1. Gradients are averaged over the processes in the caller's backward pass, not here.
    """
    number, outputs = settings.micro_batches, []
    size = len(images) // number
    for index, (micro_batch, labels) in enumerate(zip(images.split(size), targets.split(size), strict=True), 1):
        last = index == number
        with nullcontext() if last else distributed.unsynchronized(network):
            with settings.autocast():
                logits = network(micro_batch)  # (B / number, C)
            losses = cross_entropies(logits, labels, settings.label_smoothing, settings.class_weights)
            cross_entropy = losses.detach()
            if settings.class_weights is not None:
                cross_entropy = cross_entropies(logits.detach(), labels, settings.label_smoothing)
            if not last:
                share = losses.mean() / number
                update.accumulate(share if scale is None else scale * share)
                losses = losses.detach()
        outputs.append(Outputs(logits.detach(), cross_entropy, losses))
    return outputs[0] if number == 1 else Outputs(*map(torch.cat, zip(*outputs, strict=True)))


class InMicroBatches(nn.Module):
    """A network applied to one micro-batch after the other; the backward pass computes each of them again.

    Dropout repeats its choices in the second pass, and running BatchNorm statistics count each micro-batch once.
    """

    def __init__(self, network: nn.Module, number: int) -> None:
        super().__init__()
        self.network, self.number = network, number

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images (B, ...) to the network's output or outputs, tensors (B, ...)."""
        outputs = [
            checkpoint(self.network, micro_batch, use_reentrant=False, context_fn=self._contexts)
            for micro_batch in images.split(len(images) // self.number)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return tuple(map(torch.cat, zip(*outputs, strict=True)))

    def _contexts(self) -> tuple:
        """Of the first pass and of its repetition."""
        return nullcontext(), statistics_kept(self.network)


@contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """BatchNorm layers in training mode leave their running statistics as they are."""
    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer, (_, batches) in zip(layers, kept, strict=True):
        layer.momentum, layer.num_batches_tracked = 0.0, batches.clone()
    try:
        yield
    finally:
        for layer, (momentum, batches) in zip(layers, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, batches
