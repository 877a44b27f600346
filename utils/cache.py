"""Every image decoded once: a split's pixels in one memory-mapped file, shared by all processes of a node."""

import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils import distributed
from utils.errors import UserError, agreed
from utils.files import write_atomically
from utils.folders import ImageFiles
from utils.images import read_image
from utils.interruption import ride_out_signals
from utils.progress import say

VERSION = 1  # of the files' format
PIXELS, INDEX, SIZES = "pixels.u8", "index.npy", "sizes.part"
SECONDS = 2.0  # of work, or of waiting, between two words of a build
PAIR = 8  # bytes of a size in `sizes.part`: two int32
BATCH = 32  # images that a worker decodes before it hands them over


class ImageCache:
    """A whole cache: image i as PIL image, tensor (C, H, W) uint8, or only its size; None if its file is unreadable.

    `pixels` is one array of bytes, image after image, (H, W, C) each; `index` (N, 3) int64 has offset, height and width
    of each. Both are mapped from files: all processes of a node share one copy, which the system keeps or drops.
    """

    def __init__(self, folder: Path, channels: int, kind: str) -> None:
        """kind: what an item is, "pil", "tensor", or "size": a tensor (C, H, W) without values."""
        self.folder, self.channels, self.kind = folder, channels, kind
        self.index = np.load(folder / INDEX, mmap_mode="r")  # (N, 3)
        # Copy on write: torch warns of arrays that cannot be written to.
        self.pixels = np.memmap(folder / PIXELS, dtype=np.uint8, mode="c")

    def __reduce__(self) -> tuple:
        return type(self), (self.folder, self.channels, self.kind)  # not its gigabytes

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Image.Image | Tensor | None:
        offset, height, width = self.index[index].tolist()
        if height == 0:
            return None
        if self.kind == "size":
            return torch.empty(self.channels, height, width, dtype=torch.uint8, device="meta")
        pixels = self.pixels[offset : offset + height * width * self.channels].reshape(height, width, self.channels)
        if self.kind == "pil":
            return Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)
        return torch.from_numpy(pixels).permute(2, 0, 1)  # (C, H, W)


class Decoded(NamedTuple):
    """Pixels of consecutive images, (bytes,) uint8, and their sizes (B, 2) int32: height and width."""

    pixels: Tensor
    sizes: Tensor


class _Decoder(Dataset):
    """Images of a split, decoded and resized; a batch of them is one `Decoded`, or the UserError of a bad image."""

    def __init__(self, files: ImageFiles, resize: Callable[[Image.Image], Tensor], gray: bool, skip: bool) -> None:
        self.files, self.resize, self.gray, self.skip = files, resize, gray, skip

    def __getitems__(self, indices: list[int]) -> Decoded | UserError:
        pixels, sizes = [], []
        for index in indices:
            try:
                image = self.resize(read_image(self.files.path(index), self.gray)).permute(1, 2, 0)  # (H, W, C)
            except UserError as error:
                if not self.skip:
                    return error
                image = torch.empty(0, 0, 1, dtype=torch.uint8)
            pixels.append(image.flatten())
            sizes.append(image.shape[:2])
        return Decoded(torch.cat(pixels), torch.tensor(sizes, dtype=torch.int32))


class CacheBuild:
    """One split's cache in the making: found whole, or built by whichever process holds the lock of its folder.

    Pixels are appended to `pixels.u8`, and what is safely there is noted in `sizes.part`; a build that is killed goes
    on from there. `index.npy`, written last and at once, makes the cache a whole one.
    """

    def __init__(
        self,
        cache_dir: Path,
        files: ImageFiles,
        resize: Callable[[Image.Image], Tensor],
        *,
        gray: bool,
        parameters: dict[str, str | int | bool],
        skip_bad_images: bool,
        workers: int,
    ) -> None:
        """resize: a PIL image to a tensor (C, H, W) uint8; parameters: all that the pixels depend on.

        Raises UserError for an image file that is gone.
        """
        self.files, self.channels, self.workers = files, 1 if gray else 3, workers
        self.decoder = _Decoder(files, resize, gray, skip_bad_images)
        self.description = {"version": VERSION, "split": str(files.root), "images": len(files), **parameters}
        self.folder = cache_dir / f"{files.root.name}-{fingerprint(files, parameters)}"

    def is_whole(self) -> bool:
        return (self.folder / INDEX).exists()

    def wait(self) -> Iterator[str]:
        """Until another process has built the cache."""
        while not self.is_whole():
            time.sleep(SECONDS)
            yield ""

    def build(self) -> Iterator[str]:
        """Until the cache is whole, by this process or by another that holds the lock; every few seconds what to say.

        Raises UserError for a bad image, unless they are skipped, and where the folder cannot be written to or locked.
        """
        try:
            if self.is_whole():
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "w") as lock:
                word = f"{self.folder}: another process builds this cache; waiting for it."
                while not _acquire(lock):
                    yield word
                    word = ""
                    time.sleep(SECONDS)
                if not self.is_whole():
                    yield from self._build()
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: the cache cannot be written there ({error.strerror}); free space, "
                "or give another --cache-dir."
            ) from None

    def _build(self) -> Iterator[str]:
        with open(self.folder / PIXELS, "ab") as pixels, open(self.folder / SIZES, "ab") as noted:
            sizes = self._resume(pixels, noted)
            began, started, last_word = len(sizes), time.monotonic(), -SECONDS
            for part in self._decode(first=len(sizes)):
                pixels.write(part.pixels.numpy())
                sizes = np.concatenate([sizes, part.sizes.numpy()])
                if time.monotonic() - last_word >= SECONDS:
                    self._note(sizes, pixels, noted)
                    self._check_room(sizes)
                    rate = (len(sizes) - began) / (time.monotonic() - started)
                    last_word = time.monotonic()
                    yield f"{self.folder}: {len(sizes)} of {len(self.files)} images, {rate:.0f} images/s"
            self._note(sizes, pixels, noted)
        if not sizes.any():
            raise UserError(f"{self.files.root}: none of its {len(self.files)} images can be read; replace them.")
        self._finish(sizes)
        yield f"{self.folder}: whole, {_count_bytes(sizes, self.channels) / 1e9:.2f} GB"

    def _resume(self, pixels: BinaryIO, noted: BinaryIO) -> np.ndarray:
        """The sizes (n, 2) that an earlier build noted, both files cut back to them."""
        whole_pairs = os.path.getsize(noted.name) // PAIR
        sizes = np.fromfile(noted.name, dtype=np.int32, count=2 * whole_pairs).reshape(-1, 2)
        if _count_bytes(sizes, self.channels) > os.path.getsize(pixels.name):  # lost with the power, say
            sizes = sizes[:0]
        pixels.truncate(_count_bytes(sizes, self.channels))
        noted.truncate(sizes.nbytes)
        return sizes

    def _decode(self, first: int) -> Iterator[Decoded]:
        """All images from the first on, in order; raises UserError at a bad one, unless they are skipped."""
        starts = range(first, len(self.files), BATCH)
        loader = DataLoader(
            self.decoder,
            batch_sampler=[range(start, min(start + BATCH, len(self.files))) for start in starts],
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=ride_out_signals,
            generator=torch.Generator(),
        )
        for part in loader:
            if isinstance(part, UserError):
                raise UserError(str(part))
            yield part

    def _note(self, sizes: np.ndarray, pixels: BinaryIO, noted: BinaryIO) -> None:
        """Note how far the pixels have safely come: theirs first, then the sizes that vouch for them."""
        _flush_to_disk(pixels)
        noted.write(sizes[os.path.getsize(noted.name) // PAIR :].tobytes())
        _flush_to_disk(noted)

    def _check_room(self, sizes: np.ndarray) -> None:
        """Raise UserError if the rest will not fit, taken to be like what is there."""
        written = _count_bytes(sizes, self.channels)
        needed, free = written * (len(self.files) / len(sizes) - 1), shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: has {free / 1e9:.2f} GB free, and the cache needs about {needed / 1e9:.2f} GB more; "
                "free space, or give another --cache-dir."
            )

    def _finish(self, sizes: np.ndarray) -> None:
        """Write the index (N, 3), which makes the cache a whole one, and for people what it was made of."""
        ends = np.cumsum(sizes.prod(axis=1, dtype=np.int64) * self.channels)
        index = np.column_stack([np.concatenate([[0], ends[:-1]]), sizes]).astype(np.int64)
        buffer = io.BytesIO()
        np.save(buffer, index)
        write_atomically(self.folder / "cache.json", (json.dumps(self.description, indent=2) + "\n").encode())
        write_atomically(self.folder / INDEX, buffer.getbuffer())
        (self.folder / SIZES).unlink()

    def open(self, kind: str) -> ImageCache:
        """The whole cache; raises UserError if it is damaged."""
        try:
            cache = ImageCache(self.folder, self.channels, kind)
            if len(cache) == len(self.files) and len(cache.pixels) == _count_bytes(cache.index[:, 1:], self.channels):
                return cache
        except (OSError, ValueError):  # files cut short, or gone
            pass
        raise UserError(f"{self.folder}: this cache is damaged; remove the folder, and it will be built anew.")


def build_together(builds: list[CacheBuild]) -> None:
    """Bring all caches into being, one process of each node at work and the others waiting; called by all ranks.

    They meet every few seconds, so that --timeout holds as long as the work goes on, however long it takes.
    """
    builds_here = distributed.is_first_on_node()
    work = itertools.chain.from_iterable(build.build() if builds_here else build.wait() for build in builds)
    word: str | None = ""
    while any(distributed.all_gather_object(word is not None)):
        with agreed():
            word = next(work, None)
        if word:
            say(word)


def fingerprint(files: ImageFiles, parameters: dict[str, Any]) -> str:
    """16 hexadecimal digits of the parameters and of each file's name, size and time of last change.

    Raises UserError for a file that is gone.
    """
    digest = hashlib.sha256(json.dumps([VERSION, parameters], sort_keys=True).encode())
    for index in range(len(files)):
        path = files.path_as_text(index)
        try:
            status = os.stat(os.path.join(files.root, path))
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}).") from None
        digest.update(b"%b\0%d\0%d\0" % (os.fsencode(path), status.st_size, status.st_mtime_ns))
    return digest.hexdigest()[:16]


def _acquire(lock: TextIO) -> bool:
    """Try to lock a file; the lock ends with the process, however that ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _count_bytes(sizes: np.ndarray, channels: int) -> int:
    """Of images of these sizes (N, 2)."""
    return int(sizes.prod(axis=1, dtype=np.int64).sum()) * channels


def _as_it_is(part: Decoded | UserError) -> Decoded | UserError:
    return part
