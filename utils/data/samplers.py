"""Samplers for training and evaluation, and the seeds of random numbers that depend on an image only."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.runtime.errors import UserError


class SampleKey(NamedTuple):
    """An image and one of its augmentations. A training sample depends on nothing else but the seed."""

    index: int
    epoch: int = 0
    repeat: int = 0


def derive_seed(purpose: str, *numbers: int) -> int:
    """A well-mixed 64-bit seed from a purpose and non-negative numbers; each purpose has its own stream."""
    entropy = (zlib.crc32(purpose.encode()), *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator within the block, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class TrainingSampler(Sampler[list[SampleKey]]):
    """This rank's share of each global batch, as lists of keys, from any position in an epoch.

    Global batch t is permutation[t*W*B : (t+1)*W*B] for world size W and batch size B; the remainder is dropped. Each
    rank takes every W-th entry. The permutation depends on (seed, epoch) only. With `repeats` above 1 (repeated
    augmentation, Hoffer et al. 2020) each image stands `repeats` times in a row with different augmentations, which go
    to different ranks if there are several; the list is cut to the number of images.
    """

    def __init__(
        self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0, repeats: int = 1
    ) -> None:
        """Raises UserError if there are fewer images than one global batch."""
        if num_images < batch_size * world_size:
            raise UserError(
                f"the training split holds {num_images} images, fewer than one global batch of {batch_size} x "
                f"{world_size} processes = {batch_size * world_size}; give a smaller --batch-size (or fewer "
                "--grad-accum-steps), or more images."
            )
        self.num_images, self.batch_size = num_images, batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.repeats = seed, repeats
        self.set_position(0)

    def set_position(self, epoch: int, first_step: int = 0, first_image: int | None = None) -> None:
        """Let the next iteration start at step `first_step` of an epoch.

        first_image: the images of the epoch's order that earlier steps consumed, if another number of processes ran
        them; None: computed from `first_step`.
        """
        self.epoch, self.first_step = epoch, first_step
        self.first_image = first_step * self.global_batch if first_image is None else first_image

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """The steps of this epoch, including those before the position."""
        return self.first_step + len(self)

    def images_before(self, step: int) -> int:
        """The images of the epoch's order that are consumed when `step` begins."""
        return self.first_image + (step - self.first_step) * self.global_batch

    def __len__(self) -> int:
        return (self.num_images - self.first_image) // self.global_batch

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator).numpy()  # (N,)
        if self.repeats > 1:
            order = order.repeat(self.repeats)[: self.num_images]
        for step in range(self.first_step, self.steps_per_epoch):
            places = range(self.images_before(step) + self.rank, self.images_before(step + 1), self.world_size)
            yield [SampleKey(int(order[place]), self.epoch, place % self.repeats) for place in places]


class EvaluationSampler(Sampler[list[SampleKey]]):
    """This rank's share of a split: images rank, rank + W, rank + 2W, ..., so that all ranks cover each image once."""

    def __init__(
        self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, spread: bool = False
    ) -> None:
        """spread: only about one batch, taken evenly from the whole share."""
        self.indices = range(rank, num_images, world_size)
        if spread:
            self.indices = self.indices[:: max(1, -(-len(self.indices) // batch_size))]
        self.batch_size = batch_size
        self.common_steps = -(-(num_images // world_size) // batch_size)  # of the rank with the fewest images

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [SampleKey(index) for index in self.indices[start : start + self.batch_size]]
