"""Which images each rank takes, and when: a training order that knows its position, and every image once."""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from utils.runtime.errors import UserError


class SampleKey(NamedTuple):
    """Which image, and which of its augmentations: everything that a training sample depends on, but the seed."""

    index: int
    epoch: int = 0
    repeat: int = 0


def derive_seed(purpose: str, *numbers: int) -> int:
    """One well-mixed 64-bit seed out of a purpose, which keeps the streams apart, and several non-negative numbers."""
    entropy = (zlib.crc32(purpose.encode()), *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


class TrainingSampler(Sampler[list[SampleKey]]):
    """This rank's share of each global batch, as lists of keys; knows its epoch and its position in it.

    Global batch t is permutation[t*W*B : (t+1)*W*B] for world size W and batch size B, the remainder dropped; this
    rank takes every W-th entry of it. An iteration may begin at any step, and at any place in the order. The
    permutation depends on (seed, epoch) only. With `repeats` above 1 (repeated augmentation, Hoffer et al. 2020) each
    image of it stands `repeats` times in a row, augmented differently, on different ranks where there are several, and
    the list is cut to the number of images.
    """

    def __init__(
        self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, seed: int = 0, repeats: int = 1
    ) -> None:
        """Raises UserError if there are fewer images than one global batch."""
        if num_images < batch_size * world_size:
            raise UserError(
                f"the training split holds {num_images} images, fewer than one global batch of {batch_size} x "
                f"{world_size} processes = {batch_size * world_size}; give a smaller --batch-size or more images."
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.repeats = repeats
        self.set_position(0)

    def set_position(self, epoch: int, first_step: int = 0, first_image: int | None = None) -> None:
        """Let the next iteration give epoch `epoch` from its step `first_step` on.

        first_image: how many images of the epoch's order the steps before took, where that was on another number of
        processes; None: as many as such steps take now.
        """
        self.epoch, self.first_step = epoch, first_step
        self.first_image = first_step * self.global_batch if first_image is None else first_image

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """The steps of this epoch, those before the position included."""
        return self.first_step + len(self)

    def images_before(self, step: int) -> int:
        """How many images of the epoch's order are behind a run when `step` begins."""
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
    """This rank's share of a split, every image exactly once over all ranks: indices rank, rank + W, rank + 2W, ..."""

    def __init__(
        self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1, spread: bool = False
    ) -> None:
        """spread: only about one batch, taken evenly from the whole share."""
        self.indices = range(rank, num_images, world_size)
        if spread:
            self.indices = self.indices[:: max(1, -(-len(self.indices) // batch_size))]
        self.batch_size = batch_size
        self.common_steps = -(-(num_images // world_size) // batch_size)  # of the rank that has the fewest

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [SampleKey(index) for index in self.indices[start : start + self.batch_size]]
