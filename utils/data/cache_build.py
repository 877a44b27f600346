"""Builds caches: one process per node, parallel workers, resumable after a kill."""

import fcntl
import io
import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.data.cache import INDEX, PIXELS, VERSION, ImageCache
from utils.data.dataset import decode_in_order
from utils.data.fingerprint import fingerprint
from utils.data.folders import ImageFiles
from utils.data.images import read_image
from utils.data.loaders import TIMEOUT, batch_seconds
from utils.data.samplers import derive_seed
from utils.runtime import distributed
from utils.runtime.distributed import agreed
from utils.runtime.errors import UserError
from utils.runtime.files import not_followed, write_atomically, write_json
from utils.runtime.launch import is_first_on_node
from utils.runtime.progress import say

SIZES = "sizes.part"
SECONDS = 2.0  # of work, or of waiting, between two messages of a build
SIZE_BYTES = 8  # of an image in `sizes.part`: two int32
CHECKED = 8  # images that are compared with their files when a cache is opened
LEVELS = 2  # of 255, by which processors and library versions may differ
BATCH = 16  # images that a worker decodes at a time


class Decoded(NamedTuple):
    """Consecutive images: pixels (bytes,) uint8; sizes (B, 2) int32, height and width, 0 if unreadable; messages."""

    pixels: Tensor
    sizes: Tensor
    unreadable: tuple[str, ...]


class CacheBuild:
    """The cache of one split: complete, or built by the process that holds the lock of its folder.

    Pixels are appended to `pixels.u8`. `sizes.part` records how many images are safely on disk, from where a killed
    build resumes. `index.npy`, written last and atomically, makes the cache complete.
    """

    def __init__(
        self,
        cache_dir: Path,
        files: ImageFiles,
        resize: Callable[[Image.Image], Tensor],
        *,
        gray: bool,
        parameters: dict[str, str | int | bool],
        max_bad_images: int | None,
        workers: int,
        upper_8_bits: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        """resize: from a PIL image to a tensor (C, H, W) uint8; parameters: everything that the pixels depend on.

        max_bad_images: the number of unreadable images that are skipped; None: none may be. timeout: seconds to wait
        for a batch of images, or for another builder without progress.
        """
        self.files, self.resize, self.gray, self.upper_8_bits = files, resize, gray, upper_8_bits
        self.max_bad_images, self.workers, self.timeout = max_bad_images, workers, timeout
        self.channels = 1 if gray else 3
        self.description = {"version": VERSION, "split": str(files.root), "images": len(files), **parameters}
        self.folder = cache_dir / f"{files.root.name}-{fingerprint(files, parameters)}"

    def is_complete(self) -> bool:
        return (self.folder / INDEX).exists()

    def wait(self) -> Iterator[str]:
        """Wait until another process has built the cache; yields "" every few seconds."""
        while not self.is_complete():
            time.sleep(SECONDS)
            yield ""

    def build(self) -> Iterator[str]:
        """Build the cache, or wait while another process holds the lock; yields a message every few seconds.

        Raises UserError for too many unreadable images, and for a folder that cannot be written to or locked.
        """
        try:
            if self.is_complete():
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "a+", opener=not_followed) as lock:
                yield from self._wait_for_lock(lock)
                if not self.is_complete():
                    lock.truncate(0)  # names this process in the messages of waiting processes
                    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                    lock.flush()
                    yield from self._build()
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: the cache cannot be written there ({error.strerror}); free space, "
                "or give another --cache-dir."
            ) from None

    def _wait_for_lock(self, lock: TextIO) -> Iterator[str]:
        """Wait until this process holds the lock. Raises UserError if its holder makes no progress."""
        parts = [self.folder / PIXELS, self.folder / SIZES]
        previous, since = None, time.monotonic()
        message = f"{self.folder}: another process builds this cache; waiting for it."
        while not _acquire(lock):
            progress = [(path.stat().st_size, path.stat().st_mtime_ns) for path in parts if path.exists()]
            if progress != previous:
                previous, since = progress, time.monotonic()
            elif time.monotonic() - since > batch_seconds(self.timeout):
                lock.seek(0)
                holder = lock.read(200).strip() or "another process"
                raise UserError(
                    f"{self.folder}: {holder} builds this cache but has added nothing for "
                    f"{time.monotonic() - since:.0f} seconds. If it hangs, end it and start again: the build resumes. "
                    "Otherwise give a larger --timeout."
                )
            yield message
            message = ""
            time.sleep(SECONDS)

    def _build(self) -> Iterator[str]:
        for path in self.folder.glob(".*.tmp"):  # left by a killed build
            path.unlink()
        sizes = np.zeros((len(self.files), 2), dtype=np.int32)  # height and width
        with (
            open(self.folder / PIXELS, "ab", opener=not_followed) as pixels,
            open(self.folder / SIZES, "ab", opener=not_followed) as recorded,
        ):
            first = done = self._resume(sizes, pixels, recorded)
            started, last_message = time.monotonic(), -SECONDS
            for decoded in self._decode(first):
                pixels.write(decoded.pixels.numpy())
                sizes[done : done + len(decoded.sizes)] = decoded.sizes.numpy()
                done += len(decoded.sizes)
                self._check_unreadable(sizes[:done], decoded.unreadable)
                if time.monotonic() - last_message >= SECONDS:
                    self._record(sizes[:done], pixels, recorded)
                    self._check_room(sizes[:done])
                    rate = (done - first) / (time.monotonic() - started)
                    last_message = time.monotonic()
                    yield f"{self.folder}: {done} of {len(self.files)} images, {rate:.0f} images/s"
            self._record(sizes, pixels, recorded)
        if not sizes.any():
            raise UserError(f"{self.files.root}: all {len(self.files)} images are unreadable; replace them.")
        self._finish(sizes)
        unreadable = np.count_nonzero(sizes[:, 0] == 0)
        skipped = f", {unreadable} unreadable images skipped" if unreadable else ""
        yield f"{self.folder}: complete, {self._lengths(sizes).sum() / 1e9:.2f} GB{skipped}"

    def _resume(self, sizes: np.ndarray, pixels: BinaryIO, recorded: BinaryIO) -> int:
        """Fill in the sizes that an earlier build recorded, and truncate both files to them; returns their number."""
        count = min(os.path.getsize(recorded.name) // SIZE_BYTES, len(sizes))
        earlier = np.fromfile(recorded.name, dtype=np.int32, count=2 * count).reshape(-1, 2)
        # Corrupt after a power failure, for example. Unreadable images are tried again if none may be skipped.
        invalid = (earlier <= 0).any(1) & ((earlier != 0).any(1) | (self.max_bad_images is None))
        if invalid.any():
            earlier = earlier[: int(invalid.argmax())]
        if self._lengths(earlier).sum() > os.path.getsize(pixels.name):
            earlier = earlier[:0]
        pixels.truncate(self._lengths(earlier).sum())
        recorded.truncate(earlier.nbytes)
        sizes[: len(earlier)] = earlier
        return len(earlier)

    def _decode(self, first: int) -> Iterator[Decoded]:
        """All images from the first on, in order."""
        try:
            indices = range(first, len(self.files))
            yield from decode_in_order(self._decode_batch, indices, BATCH, self.workers, self.timeout)
        except UserError as error:
            raise UserError(f"{self.folder}: {error} Started again, the build resumes.") from None

    def _decode_batch(self, indices: Sequence[int]) -> Decoded:
        pixels, sizes, unreadable = [], [], []
        for index in indices:
            try:
                image = self.decode(self.files.path(index))
            except UserError as error:
                image = torch.empty(0, 0, 1, dtype=torch.uint8)
                unreadable.append(str(error))
            pixels.append(image.flatten())
            sizes.append(image.shape[:2])
        return Decoded(torch.cat(pixels), torch.tensor(sizes, dtype=torch.int32), tuple(unreadable))

    def decode(self, path: Path) -> Tensor:
        """A resized image, (H, W, C) uint8. Raises UserError if it is unreadable."""
        image = read_image(path, self.gray, self.upper_8_bits, keep_gray=True)
        try:
            return self.resize(image).permute(1, 2, 0)
        except (MemoryError, ValueError, RuntimeError) as error:  # for example if it is 1000 times as long as wide
            size = f"{image.width} x {image.height}"
            raise UserError(f"{path}: {size} pixels cannot be resized ({error}); replace or remove it.") from None

    def _check_unreadable(self, sizes: np.ndarray, messages: tuple[str, ...]) -> None:
        """Raise UserError for too many unreadable images."""
        if messages and self.max_bad_images is None:
            raise UserError(messages[0])
        unreadable = np.count_nonzero(sizes[:, 0] == 0)
        if messages and unreadable > self.max_bad_images:
            raise UserError(
                f"{self.files.root}: {unreadable} unreadable images, more than --max-bad-images "
                f"{self.max_bad_images}; the last: {messages[-1]}"
            )

    def _record(self, sizes: np.ndarray, pixels: BinaryIO, recorded: BinaryIO) -> None:
        """Flush the pixels to disk, then record the sizes of their images."""
        pixels.flush()
        os.fsync(pixels.fileno())
        recorded.write(sizes[os.path.getsize(recorded.name) // SIZE_BYTES :].tobytes())
        recorded.flush()
        os.fsync(recorded.fileno())

    def _check_room(self, sizes: np.ndarray) -> None:
        """Raise UserError if the disk is too small for the remaining images, estimated from the first ones."""
        needed = self._lengths(sizes).sum() * (len(self.files) / len(sizes) - 1)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: has {free / 1e9:.2f} GB free, but the cache needs about {needed / 1e9:.2f} GB more; "
                "free space, or give another --cache-dir."
            )

    def _finish(self, sizes: np.ndarray) -> None:
        """Write a description for people, and the index (N, 3), which makes the cache complete."""
        buffer = io.BytesIO()
        np.save(buffer, self._index(sizes))
        write_json(self.folder / "cache.json", self.description)
        write_atomically(self.folder / INDEX, buffer.getbuffer())
        (self.folder / SIZES).unlink()

    def _lengths(self, sizes: np.ndarray) -> np.ndarray:
        """The bytes of images of these sizes, (N, 2): (N,) int64."""
        return sizes.prod(axis=1, dtype=np.int64) * self.channels

    def _index(self, sizes: np.ndarray) -> np.ndarray:
        """The offset, height and width of each image of these sizes, (N, 2): (N, 3) int64."""
        lengths = self._lengths(sizes)
        return np.column_stack([np.cumsum(lengths) - lengths, sizes]).astype(np.int64)

    def open(self, kind: str) -> ImageCache:
        """The complete cache. Raises UserError if it is damaged or its pixels differ from the files."""
        try:
            cache = ImageCache(self.folder, self.channels, kind)
            sizes = cache.index[:, 1:]
            is_intact = (
                cache.index.dtype == np.int64
                and len(sizes) == len(self.files)
                and len(cache.pixels) == self._lengths(sizes).sum()
                and np.array_equal(cache.index, self._index(sizes))
            )
        except (FileNotFoundError, ValueError, EOFError, IndexError):  # NumPy's, for truncated or overwritten files
            is_intact = False
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({error.strerror}).") from None
        if not is_intact:
            raise UserError(f"{self.folder}: this cache is damaged; remove the folder, and it will be built again.")
        self._compare_with_files(cache)
        return cache

    def _compare_with_files(self, cache: ImageCache) -> None:
        """Decode a few images, spread over the split, again. Raises UserError if their pixels differ."""
        ends = np.linspace(0, len(cache), min(CHECKED, len(cache)) + 1).astype(int)
        generator = np.random.default_rng(derive_seed("cache", len(cache)))
        for index in generator.integers(ends[:-1], ends[1:]).tolist():
            cached = cache.levels(index)
            if cached is None:
                continue
            path = self.files.path(index)
            decoded = self.decode(path).numpy()
            if decoded.shape != cached.shape or np.abs(decoded.astype(int) - cached).max() > LEVELS:
                raise UserError(
                    f"{self.folder}: this cache holds other pixels than {path}: the file has changed, or the installed "
                    "versions decode it differently. Remove the folder, and it will be built again."
                )


def build_together(builds: list[CacheBuild]) -> None:
    """Build all caches: one process per node works, the others wait. Called by all ranks.

    Ranks meet every few seconds, so that a build may last longer than --timeout, which limits each batch of images.
    """
    builds_here = is_first_on_node()
    work = itertools.chain.from_iterable(build.build() if builds_here else build.wait() for build in builds)
    message: str | None = ""
    while any(distributed.all_gather_object(message is not None)):
        with agreed():
            message = next(work, None)
        if message:
            say(message)


def _acquire(lock: TextIO) -> bool:
    """Try to lock a file; the lock ends with the process."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
