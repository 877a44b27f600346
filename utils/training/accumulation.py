"""Gradient accumulation: a batch passes through the networks in parts, so that only one part's activations are kept."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from utils.runtime import distributed
from utils.training.loss import cross_entropies
from utils.training.update import GuardedUpdate


class Settings(Protocol):
    """What a forward pass needs of the loop's settings."""

    parts: int
    label_smoothing: float
    class_weights: Tensor | None

    def autocast(self) -> torch.autocast: ...


class Outputs(NamedTuple):
    """Logits (B, C), cross-entropies (B,) without weights, both detached; losses (B,), weighted by --class-weights.

    Only the losses of the last part carry a gradient: the others' backward passes are done.
    """

    logits: Tensor
    cross_entropy: Tensor
    losses: Tensor


def classify(
    network: nn.Module,
    images: Tensor,
    targets: Tensor,
    update: GuardedUpdate,
    settings: Settings,
    scale: Tensor | None = None,
) -> Outputs:
    """The classifier's forward passes over a batch in parts, and the backward passes of all parts but the last.

    images: (B, 3, S, S); targets: (B,) or (B, C); scale: the factor () that the caller's loss gives to the mean of the
    losses, None for 1. Gradients are averaged over the processes in the caller's backward pass, not here.
    """
    size, parts = len(images) // settings.parts, []
    for number, (part, labels) in enumerate(zip(images.split(size), targets.split(size), strict=True), 1):
        last = number == settings.parts
        with nullcontext() if last else distributed.unsynchronized(network):
            with settings.autocast():
                logits = network(part)  # (B / parts, C)
            losses = cross_entropies(logits, labels, settings.label_smoothing, settings.class_weights)
            cross_entropy = losses.detach()
            if settings.class_weights is not None:
                cross_entropy = cross_entropies(logits.detach(), labels, settings.label_smoothing)
            if not last:
                share = losses.mean() / settings.parts
                update.accumulate(share if scale is None else scale * share)
                losses = losses.detach()
        parts.append(Outputs(logits.detach(), cross_entropy, losses))
    return parts[0] if settings.parts == 1 else Outputs(*map(torch.cat, zip(*parts, strict=True)))


class InParts(nn.Module):
    """A network applied to parts of its batch, one after the other; the backward pass computes each part again.

    Dropout repeats its choices in the second pass, and running BatchNorm statistics count each part once.
    """

    def __init__(self, network: nn.Module, parts: int) -> None:
        super().__init__()
        self.network, self.parts = network, parts

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images (B, ...) to the network's output or outputs, tensors (B, ...)."""
        outputs = [
            checkpoint(self.network, part, use_reentrant=False, context_fn=self._contexts)
            for part in images.split(len(images) // self.parts)
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
