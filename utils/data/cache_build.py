"""The making of a cache: by one process of a node, in parallel, and so that a kill costs a few seconds of it."""

import fcntl
import io
import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data.cache import INDEX, PIXELS, VERSION, ImageCache
from utils.data.fingerprint import fingerprint
from utils.data.folders import ImageFiles
from utils.data.images import read_image
from utils.data.loaders import TIMEOUT, batch_seconds, in_shared_memory, loaded
from utils.data.samplers import derive_seed
from utils.runtime import distributed
from utils.runtime.errors import UserError, agreed
from utils.runtime.files import not_followed, write_atomically, write_json
from utils.runtime.node_limits import PREFETCH
from utils.runtime.progress import say
from utils.runtime.signals import ride_out_signals, wait_for

SIZES = "sizes.part"
SECONDS = 2.0  # of work, or of waiting, between two words of a build
PAIR = 8  # bytes of a size in `sizes.part`: two int32
CHECKED = 8  # images of a split that are compared with their files when its cache is opened
LEVELS = 2  # of 255, by which processors and versions of libraries may differ
BATCH = 16  # images that a worker decodes before it hands them over


class Decoded(NamedTuple):
    """Of consecutive images: pixels (bytes,) uint8, sizes (B, 2) int32, height and width, 0 of bad ones, and why."""

    pixels: Tensor
    sizes: Tensor
    bad: tuple[str, ...]


class _Decoder(Dataset):
    """Images of a split, decoded and resized, a batch at once."""

    def __init__(
        self, files: ImageFiles, resize: Callable[[Image.Image], Tensor], gray: bool, upper_8_bits: bool
    ) -> None:
        self.files, self.resize, self.gray, self.upper_8_bits = files, resize, gray, upper_8_bits

    def __getitems__(self, indices: Sequence[int]) -> Decoded:
        pixels, sizes, bad = [], [], []
        for index in indices:
            try:
                image = self.decode(self.files.path(index))
            except UserError as error:
                image = torch.empty(0, 0, 1, dtype=torch.uint8)
                bad.append(str(error))
            pixels.append(image.flatten())
            sizes.append(image.shape[:2])
        return Decoded(torch.cat(pixels), torch.tensor(sizes, dtype=torch.int32), tuple(bad))

    def decode(self, path: Path) -> Tensor:
        """One image resized, (H, W, C) uint8; raises UserError if it is unreadable."""
        image = read_image(path, self.gray, self.upper_8_bits)
        try:
            return self.resize(image).permute(1, 2, 0)
        except (MemoryError, ValueError, RuntimeError) as error:  # of an image a thousand times as long as wide, say
            size = f"{image.width} x {image.height}"
            raise UserError(f"{path}: {size} pixels cannot be resized ({error}); replace or remove it.") from None


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
        max_bad_images: int | None,
        workers: int,
        upper_8_bits: bool = False,
        timeout: float = TIMEOUT,
    ) -> None:
        """resize: a PIL image to a tensor (C, H, W) uint8; parameters: all that the pixels depend on.

        max_bad_images: at most this many unreadable images are left out; None: there may be none. timeout: seconds to
        wait for a batch of images, or for another builder that adds none.
        """
        self.seconds = batch_seconds(timeout)
        self.files, self.channels, self.workers = files, 1 if gray else 3, workers
        self.decoder, self.max_bad_images = _Decoder(files, resize, gray, upper_8_bits), max_bad_images
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

        Raises UserError for bad images, if too many, and where the folder cannot be written to or locked.
        """
        try:
            if self.is_whole():
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "a+", opener=not_followed) as lock:
                yield from self._wait_for_lock(lock)
                if not self.is_whole():
                    _name_holder(lock)
                    yield from self._build()
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: the cache cannot be written there ({error.strerror}); free space, "
                "or give another --cache-dir."
            ) from None

    def _wait_for_lock(self, lock: TextIO) -> Iterator[str]:
        """Until this process holds the lock; raises UserError if the one that holds it makes no progress."""
        progress, since = None, time.monotonic()
        word = f"{self.folder}: another process builds this cache; waiting for it."
        while not _acquire(lock):
            now = [(path.stat().st_size, path.stat().st_mtime_ns) for path in self._parts() if path.exists()]
            if now != progress:
                progress, since = now, time.monotonic()
            elif time.monotonic() - since > self.seconds:
                lock.seek(0)
                holder = lock.read(200).strip() or "another process"
                raise UserError(
                    f"{self.folder}: {holder} builds this cache, and has added nothing for "
                    f"{time.monotonic() - since:.0f} seconds. If it hangs, end it, and start again: the build "
                    "continues where it stands; otherwise give a larger --timeout."
                )
            yield word
            word = ""
            time.sleep(SECONDS)

    def _parts(self) -> list[Path]:
        """What a build writes to."""
        return [self.folder / name for name in (PIXELS, SIZES)]

    def _build(self) -> Iterator[str]:
        for path in self.folder.glob(".*.tmp"):  # of a build that was killed
            path.unlink()
        sizes = np.zeros((len(self.files), 2), dtype=np.int32)  # height and width
        with (
            open(self.folder / PIXELS, "ab", opener=not_followed) as pixels,
            open(self.folder / SIZES, "ab", opener=not_followed) as noted,
        ):
            began = done = self._resume(sizes, pixels, noted)
            started, last_word = time.monotonic(), -SECONDS
            for part in self._decode(first=done):
                pixels.write(part.pixels.numpy())
                sizes[done : done + len(part.sizes)] = part.sizes.numpy()
                done += len(part.sizes)
                self._check_bad(sizes[:done], part.bad)
                if time.monotonic() - last_word >= SECONDS:
                    self._note(sizes[:done], pixels, noted)
                    self._check_room(sizes[:done])
                    rate = (done - began) / (time.monotonic() - started)
                    last_word = time.monotonic()
                    yield f"{self.folder}: {done} of {len(self.files)} images, {rate:.0f} images/s"
            self._note(sizes, pixels, noted)
        if not sizes.any():
            raise UserError(f"{self.files.root}: none of its {len(self.files)} images can be read; replace them.")
        self._finish(sizes)
        bad = _count_bad(sizes)
        left_out = f", {bad} images could not be read" if bad else ""
        yield f"{self.folder}: whole, {_count_bytes(sizes, self.channels) / 1e9:.2f} GB{left_out}"

    def _resume(self, sizes: np.ndarray, pixels: BinaryIO, noted: BinaryIO) -> int:
        """Fill in the sizes that an earlier build noted, and cut both files back to them; gives their number."""
        pairs = min(os.path.getsize(noted.name) // PAIR, len(sizes))
        found = np.fromfile(noted.name, dtype=np.int32, count=2 * pairs).reshape(-1, 2)
        # Lost with the power, say; a bad image is tried again where there may be none.
        wrong = (found <= 0).any(1) & ((found != 0).any(1) | (self.max_bad_images is None))
        found = found[: int(wrong.argmax())] if wrong.any() else found
        if _count_bytes(found, self.channels) > os.path.getsize(pixels.name):
            found = found[:0]
        pixels.truncate(_count_bytes(found, self.channels))
        noted.truncate(found.nbytes)
        sizes[: len(found)] = found
        return len(found)

    def _decode(self, first: int) -> Iterator[Decoded]:
        """All images from the first on, in order."""
        starts = range(first, len(self.files), BATCH)
        loader = DataLoader(
            self.decoder,
            batch_sampler=[range(start, min(start + BATCH, len(self.files))) for start in starts],
            num_workers=self.workers,
            collate_fn=in_shared_memory,
            worker_init_fn=ride_out_signals,
            generator=torch.Generator(),
            prefetch_factor=PREFETCH if self.workers > 0 else None,
            persistent_workers=self.workers > 0,  # others raise over a refused fork when they are deleted
        )
        try:
            yield from loaded(loader, partial(wait_for, seconds=self.seconds))
        except UserError as error:
            raise UserError(f"{self.folder}: {error} Started again, the build continues where it stands.") from None

    def _check_bad(self, sizes: np.ndarray, messages: tuple[str, ...]) -> None:
        """Raise UserError if there are more bad images than may be."""
        if messages and self.max_bad_images is None:
            raise UserError(messages[0])
        if messages and _count_bad(sizes) > self.max_bad_images:
            raise UserError(
                f"{self.files.root}: {_count_bad(sizes)} images cannot be read, more than --max-bad-images "
                f"{self.max_bad_images}; the last: {messages[-1]}"
            )

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
        index = np.column_stack([_offsets(sizes, self.channels), sizes]).astype(np.int64)
        buffer = io.BytesIO()
        np.save(buffer, index)
        write_json(self.folder / "cache.json", self.description)
        write_atomically(self.folder / INDEX, buffer.getbuffer())
        (self.folder / SIZES).unlink()

    def open(self, kind: str) -> ImageCache:
        """The whole cache; raises UserError if it is damaged or does not hold the pixels of the files."""
        try:
            cache = ImageCache(self.folder, self.channels, kind)
            sizes = cache.index[:, 1:]
            fits = cache.index.dtype == np.int64 and len(sizes) == len(self.files)
            fits = fits and len(cache.pixels) == _count_bytes(sizes, self.channels)
            if fits and np.array_equal(cache.index[:, 0], _offsets(sizes, self.channels)):
                self._compare_with_files(cache)
                return cache
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be read ({error.strerror}).") from None
        except (ValueError, EOFError, IndexError):  # what NumPy makes of a file that was cut or overwritten
            pass
        raise UserError(f"{self.folder}: this cache is damaged; remove the folder, and it will be built again.")

    def _compare_with_files(self, cache: ImageCache) -> None:
        """Decode a few images, spread over the split, again; raises UserError if their pixels are not in the cache."""
        ends = np.linspace(0, len(cache), min(CHECKED, len(cache)) + 1).astype(int)
        generator = np.random.default_rng(derive_seed("cache", len(cache)))
        for index in generator.integers(ends[:-1], ends[1:]).tolist():
            kept = cache.levels(index)
            if kept is None:
                continue
            path = self.files.path(index)
            found = self.decoder.decode(path).numpy()
            if found.shape != kept.shape or np.abs(found.astype(int) - kept).max() > LEVELS:
                raise UserError(
                    f"{self.folder}: this cache holds other pixels than {path}, which was changed since, or is decoded "
                    "otherwise by the installed versions; remove the folder, and it will be built again."
                )


def build_together(builds: list[CacheBuild]) -> None:
    """Bring all caches into being, one process of each node at work and the others waiting; called by all ranks.

    They meet every few seconds, so that a build may last longer than --timeout: it holds for each batch of images.
    """
    builds_here = distributed.is_first_on_node()
    work = itertools.chain.from_iterable(build.build() if builds_here else build.wait() for build in builds)
    word: str | None = ""
    while any(distributed.all_gather_object(word is not None)):
        with agreed():
            word = next(work, None)
        if word:
            say(word)


def _acquire(lock: TextIO) -> bool:
    """Try to lock a file; the lock ends with the process, however that ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _name_holder(lock: TextIO) -> None:
    """Leave word, for those who wait, of the process that holds the lock."""
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _count_bytes(sizes: np.ndarray, channels: int) -> int:
    """Of images of these sizes (N, 2)."""
    return int(sizes.prod(axis=1, dtype=np.int64).sum()) * channels


def _offsets(sizes: np.ndarray, channels: int) -> np.ndarray:
    """Where in the pixels each image of these sizes (N, 2) begins, (N,)."""
    lengths = sizes.prod(axis=1, dtype=np.int64) * channels
    return np.cumsum(lengths) - lengths


def _count_bad(sizes: np.ndarray) -> int:
    return int((sizes[:, 0] == 0).sum())
