"""Image datasets, their batches on the device, and the count of unreadable images."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data.cache import ImageCache
from utils.data.device_crops import DeviceImages
from utils.data.folders import ImageFiles
from utils.data.images import read_image
from utils.data.loaders import TIMEOUT, Wait, batch_seconds, in_shared_memory, loaded
from utils.data.samplers import SampleKey, derive_seed, seeded
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.node_limits import PREFETCH
from utils.runtime.progress import say
from utils.runtime.signals import ride_out_signals, wait_for


class BadImages:
    """Collects unreadable images by the messages of `read_image`; inactive with limit None, when none are skipped."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._local: set[str] = set()  # messages of this rank
        self._shared: set[str] = set()  # messages of all ranks, as of the last `share`

    @property
    def count(self) -> int:
        """The number of unreadable images of all ranks, as of the last `share`."""
        return len(self._shared)

    def record(self, messages: Iterable[str]) -> None:
        """Add unreadable images of this rank; each image counts once."""
        self._local.update(messages)

    def say_count(self) -> None:
        """Print the count at the end, if there were any."""
        if self.count:
            say(f"{self.count} unreadable images were skipped; they are named above.")

    def share(self) -> None:
        """Share the unreadable images across ranks and print new ones. A collective, except without a limit.

        Raises UserError on all ranks for more than `limit` images.
        """
        if self.limit is None:
            return
        gathered = set().union(*distributed.all_gather_object(self._local - self._shared))
        new = sorted(gathered - self._shared)
        for message in new[: max(0, self.limit + 1 - self.count)]:
            say(f"--bad-images skip: {message}")
        self._shared.update(new)
        if self.count > self.limit:
            raise UserError(
                f"{self.count} unreadable images, more than --max-bad-images {self.limit}; replace or remove those "
                "named above, or raise the limit.",
                agreed=True,
            )


class ImageFolder(Dataset):
    """One split in ImageFolder layout; classes sorted by name, images by path.

    An item is (image, target, index): the transformed image, the class index, and the position in the split. The
    transform gets grey images as they are, others in RGB, or in grey with `gray`. It draws from torch's global
    generator, seeded by (seed, epoch, index, repeat), so that augmentations do not depend on rank, worker count or
    resume point.
    """

    cache: ImageCache | None = None  # read instead of the files
    on_device: DeviceImages | None = None  # makes a batch's images from the crops that the transform drew

    def __init__(
        self,
        root: str | Path,
        transform: Callable[[Image.Image], Tensor],
        seed: int = 0,
        on_bad_image: Literal["error", "replace", "blank"] = "error",
        max_bad_images: int = 100,
        gray: bool = False,
        upper_8_bits: bool = False,
        files: ImageFiles | None = None,
    ) -> None:
        """on_bad_image: what a batch holds for an unreadable image: an error; a readable image of its class, drawn by
        (seed, epoch, index, repeat), after at most `max_bad_images` + 1 unreadable ones; or a blank image of index -1.
        files: the split's images; None: all images below `root`.

        Raises UserError for a missing or empty folder, and for a class without images.
        """
        self.root, self.transform, self.seed = Path(root), transform, seed
        self.on_bad_image, self.max_bad_images = on_bad_image, max_bad_images
        self.gray, self.upper_8_bits = gray, upper_8_bits
        self.files = ImageFiles.find(self.root) if files is None else files
        self.classes, self.targets, self.path = self.files.classes, self.files.targets, self.files.path

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Image.Image | Tensor:
        """The image before its transform. Raises UserError with the path if it is unreadable."""
        if self.cache is None:
            return read_image(self.path(index), self.gray, self.upper_8_bits, keep_gray=True)
        image = self.cache[index]
        if image is None:
            read_image(self.path(index), self.gray, self.upper_8_bits)  # raises the reason, unless it is readable now
            raise UserError(
                f"{self.path(index)}: was unreadable when {self.cache.folder} was built; remove that folder."
            )
        return image

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int, int]:
        image = self.read(key.index)
        with seeded(derive_seed("augmentation", self.seed, key.epoch, key.index, key.repeat)):
            return self.transform(image), int(self.targets[key.index]), key.index

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "on_device"}  # not needed in workers

    def __getitems__(self, keys: list[SampleKey]) -> "Batch | UserError":
        """A batch, or the UserError of an unreadable image: raised in a worker, it would arrive inside a traceback."""
        unreadable: list[str] = []
        try:
            images, targets, indices = zip(*(self._readable(key, unreadable) for key in keys), strict=True)
        except UserError as error:
            return error
        return Batch(torch.stack(images), torch.tensor(targets), torch.tensor(indices), tuple(unreadable))

    def _readable(self, key: SampleKey, unreadable: list[str]) -> tuple[Tensor, int, int]:
        """The item or its replacement; adds the messages of skipped images to `unreadable`."""
        try:
            return self[key]
        except UserError as error:
            if self.on_bad_image == "error":
                raise
            unreadable.append(str(error))
        if self.on_bad_image == "blank":
            blank = Image.new("L" if self.gray else "RGB", (8, 8))
            return self.transform(blank), int(self.targets[key.index]), -1
        target = self.targets[key.index]
        first, end = np.searchsorted(self.targets, [target, target + 1]).tolist()  # images are sorted by class
        seed = derive_seed("stand-in", self.seed, key.epoch, key.index, key.repeat)
        order = first + torch.randperm(end - first, generator=torch.Generator().manual_seed(seed))
        drawn = order[: self.max_bad_images + 1].tolist()
        others = [index for index in drawn if index != key.index][: self.max_bad_images]
        for index in others:
            try:
                return self[key._replace(index=index)]
            except UserError as error:
                unreadable.append(str(error))
        problem = f"{1 + len(others)} unreadable images, more than --max-bad-images {self.max_bad_images}"
        if 1 + len(others) == end - first:
            problem = f"all {end - first} images are unreadable"
        raise UserError(
            f"{self.root / self.classes[target]}: {problem}; replace or remove them; the last: {unreadable[-1]}"
        )


class Batch(NamedTuple):
    """Images (B, C, S, S) uint8, targets (B,) int64 and indices in the split (B,) int64: -1 for a blank image.

    If the dataset makes its images on the device, a loader's `images` are the drawn crops, (B, 5) int64.
    unreadable: a message for each image that was skipped for this batch.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    unreadable: tuple[str, ...] = ()


def build_loader(dataset: Dataset, sampler: Iterable[Sequence], workers: int, pin_memory: bool) -> DataLoader:
    """A loader whose batches come from the dataset's `__getitems__`; iterate through `batches` or `loaded`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=in_shared_memory,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH if workers > 0 else None,
        persistent_workers=workers > 0,  # others raise over a refused fork when they are deleted
        # Not forkserver, the default of Python 3.14, which would copy the file names into each worker.
        multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
        worker_init_fn=ride_out_signals,
        # Each pass draws a seed: from this generator, so that the global one does not change.
        generator=torch.Generator(),
    )


class _Decoding(Dataset):
    """The dataset of `decode_in_order`."""

    def __init__(self, decode: Callable[[Sequence[int]], Any]) -> None:
        self.decode = decode

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self.decode(indices)


def decode_in_order(
    decode: Callable[[Sequence[int]], Any], indices: range, batch_size: int, workers: int, timeout: float = TIMEOUT
) -> Iterator[Any]:
    """Yield `decode(batch)` for consecutive batches of the indices, in order, computed by worker processes.

    timeout: seconds, of which a batch may take `batch_seconds`. Raises UserError for failing workers.
    """
    steps = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    loader = build_loader(_Decoding(decode), steps, workers, pin_memory=False)
    return loaded(loader, partial(wait_for, seconds=batch_seconds(timeout)))


def batches(
    loader: DataLoader, device: torch.device, bad_images: BadImages | None = None, wait: Wait | None = None
) -> Iterator[Batch]:
    """The loader's batches on the device, copied asynchronously from pinned memory.

    bad_images: records skipped images. wait: see `loaded`. Raises UserError at the first unreadable image if none may
    be skipped, and for failing workers.
    """
    for batch in loaded(loader, wait):
        if bad_images is not None:
            bad_images.record(batch.unreadable)
        # Copies, because each tensor of a worker occupies a file handle while it is kept.
        targets, indices = batch.targets.to(device, non_blocking=True, copy=True), batch.indices.clone()
        if loader.dataset.on_device is None:
            images = batch.images.to(device, non_blocking=True)
        else:
            images = loader.dataset.on_device(batch.indices, batch.images)
        yield batch._replace(images=images, targets=targets, indices=indices)
