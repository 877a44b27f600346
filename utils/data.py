"""ImageFolder splits, a deterministic sampler that knows its position, and the loaders."""

import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.bad_images import BadImages
from utils.errors import UserError
from utils.images import read_image
from utils.interruption import ride_out_signals

LAYOUT = "DATA/{train,val,test}/<class>/<image>"


class SampleKey(NamedTuple):
    """Which image, and which of its augmentations: everything that a training sample depends on, but the seed."""

    index: int
    epoch: int = 0
    repeat: int = 0


class ImageFolder(Dataset):
    """One split in ImageFolder layout; classes sorted by name, images by path.

    An item is (image, target, index): the transform of the RGB image, the class index, and the position in the split.
    The transform draws from torch's global generator, which is seeded here by (seed, epoch, index, repeat) and put
    back: an augmentation does not depend on rank, worker count, or where a run was resumed. Paths and targets are
    NumPy arrays, which worker processes share instead of copying.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
        on_bad_image: Literal["error", "next", "blank"] = "error",
        max_bad_images: int = 100,
    ) -> None:
        """on_bad_image: what a batch holds for an image that cannot be read: an error; the next readable image, which
        depends on the index only; or a blank one of index -1. After `max_bad_images` in a row the next is not tried.

        Raises UserError for a missing or empty folder, and for a class without images.
        """
        self.root = Path(root)
        self.transform = transform
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.max_bad_images = max_bad_images
        self.classes = find_classes(self.root)
        names = [list_images(self.root / name) for name in self.classes]
        self.targets = np.repeat(np.arange(len(names), dtype=np.int32), [len(paths) for paths in names])
        self._paths = np.array([os.fsencode(path) for paths in names for path in paths])

    def __len__(self) -> int:
        return len(self.targets)

    def path(self, index: int) -> Path:
        return Path(os.fsdecode(self._paths[index]))

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int, int]:
        image = read_image(self.path(key.index))
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(derive_seed("augmentation", self.seed, key.epoch, key.index, key.repeat))
        try:
            return self.transform(image), int(self.targets[key.index]), key.index
        finally:
            torch.random.set_rng_state(state)

    def __getitems__(self, keys: list[SampleKey]) -> "Batch | UserError":
        """A batch, or a bad image's UserError itself: raised in a worker, it would arrive wrapped in a traceback."""
        bad: list[str] = []
        try:
            images, targets, indices = zip(*(self._readable(key, bad) for key in keys), strict=True)
        except UserError as error:
            return error
        return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(indices), tuple(bad))

    def _readable(self, key: SampleKey, bad: list[str]) -> tuple[Tensor, int, int]:
        """The item, or what stands in for it; adds to `bad` why images were passed over."""
        tried = min(self.max_bad_images + 1, len(self))
        for index in range(key.index, key.index + tried):
            try:
                return self[key._replace(index=index % len(self))]
            except UserError as error:
                if self.on_bad_image == "error":
                    raise
                bad.append(str(error))
            if self.on_bad_image == "blank":
                return self.transform(Image.new("RGB", (8, 8))), int(self.targets[key.index]), -1
        raise UserError(f"{self.root}: {tried} images in a row cannot be read; the last: {bad[-1]}")


def derive_seed(purpose: str, *numbers: int) -> int:
    """One well-mixed 64-bit seed out of a purpose, which keeps the streams apart, and several non-negative numbers."""
    entropy = (zlib.crc32(purpose.encode()), *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def find_classes(split: Path) -> list[str]:
    """The sorted class folders of a split; raises UserError where there is none."""
    if not split.is_dir():
        raise UserError(f"{split}: no such folder; expected {LAYOUT}.")
    try:
        classes = sorted(entry.name for entry in os.scandir(split) if entry.is_dir())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot read this folder ({error.strerror}).") from None
    if not classes:
        raise UserError(f"{split}: holds no class folders; expected {LAYOUT}.")
    return classes


def list_images(class_folder: Path) -> list[str]:
    """The sorted paths of all images below a class folder.

    Raises UserError if there is none, and for links by which a folder holds itself, or another folder twice.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot read this folder ({error.strerror}).")

    paths: list[str] = []
    seen: dict[tuple[int, int], str] = {}
    for folder, _, names in os.walk(class_folder, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        other = seen.setdefault((status.st_dev, status.st_ino), folder)
        if other != folder:
            raise UserError(f"{folder}: a link makes this the same folder as {other}; remove the link.")
        paths += [os.path.join(folder, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    if not paths:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise UserError(f"{class_folder}: holds no image ({kinds}); expected {LAYOUT}.")
    return sorted(paths)


def check_same_classes(root: Path, splits: dict[str, list[str]]) -> None:
    """Raise UserError if a class stands in one split and not in another; `splits`: class names by split."""
    for here, there in itertools.permutations(splits, 2):
        missing = sorted(set(splits[here]) - set(splits[there]))
        if missing:
            raise UserError(
                f"{root / here / missing[0]}: this class is in '{here}' but not in '{there}' ({len(missing)} such in "
                f"all); every split must hold the same classes: {LAYOUT}."
            )


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

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_images, world_size)
        self.batch_size = batch_size
        self.common_steps = -(-(num_images // world_size) // batch_size)  # of the rank that has the fewest

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [SampleKey(index) for index in self.indices[start : start + self.batch_size]]


class Batch(NamedTuple):
    """Images (B, 3, S, S) uint8, targets (B,) int64 and indices in the split (B,) int64: -1 for a blank stand-in.

    bad: why images were passed over for this batch.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    bad: tuple[str, ...] = ()


def as_it_is(batch: "Batch | UserError") -> "Batch | UserError":
    """What `ImageFolder.__getitems__` gives is a batch already."""
    return batch


def build_loader(dataset: ImageFolder, sampler: Sampler[list[SampleKey]], workers: int, pin_memory: bool) -> DataLoader:
    """A loader of `Batch`es; iterate over it through `batches`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=ride_out_signals,
        # The loader draws a seed at every pass; from its own generator, so that the global one stays where it is.
        generator=torch.Generator(),
    )


def batches(loader: DataLoader, device: torch.device, bad_images: BadImages | None = None) -> Iterator[Batch]:
    """The loader's batches on the device (copied without waiting from pinned memory).

    bad_images: takes note of what was passed over. Raises UserError, with the path, at the first image that cannot be
    read where none may be.
    """
    for batch in loader:
        if isinstance(batch, UserError):
            # A new one: the traceback of this one would hold the frame that holds it, and the loader's workers with it.
            raise UserError(str(batch))
        if bad_images is not None:
            bad_images.note(batch.bad)
        images, targets = (tensor.to(device, non_blocking=True) for tensor in (batch.images, batch.targets))
        yield batch._replace(images=images, targets=targets)
