"""The training split as batches for the networks: on the device, normalised and mixed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from utils.data.dataset import BadImages, Batch, batches
from utils.data.loaders import Wait
from utils.data.samplers import TrainingSampler
from utils.data.transforms import BatchMixing, Normalize
from utils.runtime.progress import Position


@dataclass
class TrainingBatches:
    """Loads, normalises and mixes the training images of an epoch, from any step on."""

    loader: DataLoader
    normalize: Normalize
    mixing: BatchMixing
    device: torch.device
    bad_images: BadImages

    def with_loader(self, loader: DataLoader) -> "TrainingBatches":
        """The same processing for the batches of another loader."""
        return replace(self, loader=loader)

    @property
    def sampler(self) -> TrainingSampler:
        return self.loader.batch_sampler

    def path(self, index: int) -> Path:
        """The file of an image of the split."""
        return self.loader.dataset.path(index)

    def set_position(self, position: Position) -> None:
        """Let the next pass start at this position of its epoch."""
        self.sampler.set_position(position.epoch, position.step, position.images)

    def batches(self, wait: Wait | None = None) -> Iterator[Batch]:
        """Batches with images (B, 3, S, S) float32 and targets (B,) int64, or (B, C) if MixUp or CutMix mixed them.

        wait: see `loaders.loaded`. Raises UserError for unreadable images, unless they are skipped.
        """
        epoch, first_step = self.sampler.epoch, self.sampler.first_step
        for step, batch in enumerate(batches(self.loader, self.device, self.bad_images, wait), first_step):
            images, targets = self.mixing(self.normalize(batch.images), batch.targets, epoch, step)
            yield batch._replace(images=images, targets=targets)
