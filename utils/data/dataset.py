"""ImageFolder splits and the loaders."""

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.data.cache import ImageCache
from utils.data.device_crops import DeviceImages
from utils.data.folders import ImageFiles
from utils.data.images import read_image
from utils.data.loaders import Wait, in_shared_memory, loaded
from utils.data.samplers import SampleKey, derive_seed
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.node_limits import PREFETCH
from utils.runtime.progress import say
from utils.runtime.signals import ride_out_signals


class BadImages:
    """What cannot be read, as `read_image` says it; with `limit` None nothing is skipped, and nothing done here."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._met: set[str] = set()  # by this rank
        self._known: set[str] = set()  # to all ranks

    @property
    def count(self) -> int:
        """The bad images of all ranks, up to the last `share`."""
        return len(self._known)

    def note(self, messages: Iterable[str]) -> None:
        """Take in what this rank has met; an image met before does not count again."""
        self._met.update(messages)

    def say_count(self) -> None:
        """At the end: how many there were, if any."""
        if self.count:
            say(f"{self.count} images could not be read and were skipped; they are named above.")

    def share(self) -> None:
        """Tell all ranks of each other's bad images; rank 0 says the new ones. A collective, but without a limit none.

        Raises UserError, on all ranks at once, if more than `limit` are known.
        """
        if self.limit is None:
            return
        met = set().union(*distributed.all_gather_object(self._met - self._known))
        new = sorted(met - self._known)
        for message in new[: max(0, self.limit + 1 - self.count)]:
            say(f"--bad-images skip: {message}")
        self._known.update(new)
        if self.count > self.limit:
            raise UserError(
                f"{self.count} images cannot be read, more than --max-bad-images {self.limit}; replace or remove those "
                "named above, or allow more.",
                agreed=True,
            )


class ImageFolder(Dataset):
    """One split in ImageFolder layout; classes sorted by name, images by path.

    An item is (image, target, index): the transform of the RGB or grey image, the class index, and the position in the
    split. The transform draws from torch's global generator, which is seeded here by (seed, epoch, index, repeat) and
    put back: an augmentation does not depend on rank, worker count, or where a run was resumed.
    """

    cache: ImageCache | None = None  # where images are read from, instead of their files
    on_device: DeviceImages | None = None  # makes the images of a batch from what the transform has drawn

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
        """on_bad_image: what a batch holds for an unreadable image: an error; a readable image of the same class, drawn
        by (seed, epoch, index, repeat) only; or a blank one of index -1. At most `max_bad_images` + 1 are tried.
        files: the split's images, where they are not simply all below `root`.

        Raises UserError for a missing or empty folder, and for a class without images.
        """
        self.root = Path(root)
        self.transform = transform
        self.seed = seed
        self.on_bad_image = on_bad_image
        self.max_bad_images = max_bad_images
        self.gray, self.upper_8_bits = gray, upper_8_bits
        self.files = ImageFiles.find(self.root) if files is None else files
        self.classes, self.targets, self.path = self.files.classes, self.files.targets, self.files.path

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Image.Image | Tensor:
        """The image before its transform; raises UserError, with the path, if it cannot be read."""
        if self.cache is None:
            return read_image(self.path(index), self.gray, self.upper_8_bits)
        image = self.cache[index]
        if image is None:
            read_image(self.path(index), self.gray, self.upper_8_bits)  # which says why
            raise UserError(
                f"{self.path(index)}: could not be read when {self.cache.folder} was built; remove that folder."
            )
        return image

    def __getitem__(self, key: SampleKey) -> tuple[Tensor, int, int]:
        image = self.read(key.index)
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(derive_seed("augmentation", self.seed, key.epoch, key.index, key.repeat))
        try:
            return self.transform(image), int(self.targets[key.index]), key.index
        finally:
            torch.random.set_rng_state(state)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "on_device"}  # no business of a worker

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
        try:
            return self[key]
        except UserError as error:
            if self.on_bad_image == "error":
                raise
            bad.append(str(error))
        if self.on_bad_image == "blank":
            blank = Image.new("L" if self.gray else "RGB", (8, 8))
            return self.transform(blank), int(self.targets[key.index]), -1
        target = self.targets[key.index]
        first, end = np.searchsorted(self.targets, [target, target + 1]).tolist()  # images are sorted by class
        others = self._shuffled(first, end, key)
        for index in others:
            try:
                return self[key._replace(index=index)]
            except UserError as error:
                bad.append(str(error))
        tried = 1 + len(others)
        if tried == end - first:
            problem = f"none of its {tried} images can be read"
        else:
            problem = f"{tried} images cannot be read, more than --max-bad-images {self.max_bad_images}"
        raise UserError(f"{self.root / self.classes[target]}: {problem}; replace or remove them; the last: {bad[-1]}")

    def _shuffled(self, first: int, end: int, key: SampleKey) -> list[int]:
        """Up to `max_bad_images` images of a range other than the key's, drawn by (seed, epoch, index, repeat)."""
        seed = derive_seed("stand-in", self.seed, key.epoch, key.index, key.repeat)
        order = torch.randperm(end - first, generator=torch.Generator().manual_seed(seed))
        shuffled = (first + order[: self.max_bad_images + 1]).tolist()
        return [index for index in shuffled if index != key.index][: self.max_bad_images]


class Batch(NamedTuple):
    """Images (B, C, S, S) uint8, targets (B,) int64 and indices in the split (B,) int64: -1 for a blank stand-in.

    Out of a loader whose dataset makes its images on the device, `images` are the crops drawn for it, (B, 5) int64.
    bad: why images were passed over for this batch.
    """

    images: Tensor
    targets: Tensor
    indices: Tensor
    bad: tuple[str, ...] = ()


def build_loader(dataset: ImageFolder, sampler: Sampler[list[SampleKey]], workers: int, pin_memory: bool) -> DataLoader:
    """A loader of `Batch`es; iterate over it through `batches`."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=in_shared_memory,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH if workers > 0 else None,
        persistent_workers=workers > 0,
        # Not forkserver, Python 3.14's choice, which would give each worker its own copy of the file names.
        multiprocessing_context="fork" if workers > 0 and sys.platform == "linux" else None,
        worker_init_fn=ride_out_signals,
        # The loader draws a seed at every pass; from its own generator, so that the global one stays where it is.
        generator=torch.Generator(),
    )


def batches(
    loader: DataLoader, device: torch.device, bad_images: BadImages | None = None, wait: Wait | None = None
) -> Iterator[Batch]:
    """The loader's batches on the device (copied without waiting from pinned memory).

    bad_images: takes note of what was passed over. wait: see `loaded`. Raises UserError, with the path, at the first
    image that cannot be read where none may be, and for workers that fail.
    """
    for batch in loaded(loader, wait):
        if bad_images is not None:
            bad_images.note(batch.bad)
        # Copies, since each tensor of a worker takes a file handle for as long as it is kept.
        targets, indices = batch.targets.to(device, non_blocking=True, copy=True), batch.indices.clone()
        if loader.dataset.on_device is None:
            images = batch.images.to(device, non_blocking=True)
        else:
            images = loader.dataset.on_device(batch.indices, batch.images)
        yield batch._replace(images=images, targets=targets, indices=indices)
