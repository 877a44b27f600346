"""Row 8: what file names, targets and the cache's index take of a node's memory, with loader workers that read them."""

import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np

from benchmarks.report import Measurement, Target, measured
from benchmarks.setting import Setting
from benchmarks.timing import compare
from experiments import fork_server
from utils.data.cache import INDEX, PIXELS, ImageCache
from utils.data.folders import ImageFiles

IMAGES, CLASSES = 1_350_000, 165  # RadImageNet
RANKS, WORKERS = 8, 16  # ranks on a node, workers of each rank
READS = 100_000  # by each worker
ROOT = Path("/data/radimagenet/train")

Read = Callable[[int], object]


def host_memory(setting: Setting) -> list[Measurement]:
    """Row 8: memory of a node's file lists and cache indices, against lists of (path, target) Python objects.

    Workers end up with their own copy of Python objects, so theirs is measured with fewer images and scaled up.
    """
    images, fewer, workers = (4_000, 4_000, 2) if setting.quick else (IMAGES, 200_000, WORKERS)
    repeats = 1 if setting.quick else min(setting.repeats, 3)
    ours = [RANKS * added_gigabytes(arrays, images, workers) for _ in range(repeats)]
    theirs = [RANKS * added_gigabytes(objects, fewer, workers) * images / fewer for _ in range(repeats)]
    what = f"names, targets and cache index of {images} images on a node, {RANKS} ranks x {workers} workers"
    note = f"{RANKS} times one measured rank; theirs scaled up from {fewer} images"
    return [measured(8, what, "GB", compare(ours, theirs), Target(False, 0.05), note)]


def added_gigabytes(hold: Callable[[int], Read], images: int, workers: int) -> float:
    """Gigabytes that the images add to a rank and its workers, measured in a new process."""
    with ProcessPoolExecutor(1, mp_context=fork_server.server(), initializer=fork_server.receive_signals) as pool:
        return pool.submit(_added_bytes, hold, images, workers).result() / 1e9


def _added_bytes(hold: Callable[[int], Read], images: int, workers: int) -> int:
    """Memory with these images minus memory with one image per class, both read equally often."""
    before = _family_bytes(hold(CLASSES), CLASSES, workers)
    return _family_bytes(hold(images), images, workers) - before


def _family_bytes(read: Read, images: int, workers: int) -> int:
    """Bytes of this process and its forks after each fork has read images spread over all."""
    gc.collect()  # which copies pages that were shared with the warm process, so before each measurement
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(workers + 1, timeout=120)  # seconds, in case a fork fails
    forks = [context.Process(target=_read_and_wait, args=(read, images, barrier), daemon=True) for _ in range(workers)]
    for fork in forks:
        fork.start()
    barrier.wait()  # all have read
    held = sum(proportional_bytes(process) for process in [os.getpid(), *(fork.pid for fork in forks)])
    barrier.wait()
    for fork in forks:
        fork.join()
    return held


def _read_and_wait(read: Read, images: int, barrier: Barrier) -> None:
    for number in range(READS):
        read(number * images // READS)
    barrier.wait()
    barrier.wait()  # until this process has been measured


def proportional_bytes(process: int) -> int:
    """A process's memory, shared pages divided among those that share them; without files such as the mapped index."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/{process}/smaps_rollup: holds no Pss_Anon")


def arrays(images: int) -> Read:
    """Reads an image's relative path, target and place in the cache from our arrays."""
    files = ImageFiles(ROOT, names_of(images))
    with tempfile.TemporaryDirectory() as folder:  # what is mapped stays
        np.save(Path(folder) / INDEX, np.full((images, 3), 256))
        (Path(folder) / PIXELS).write_bytes(b"pixels")
        index_of = ImageCache(Path(folder), 1, "size").index  # (N, 3)
    return lambda index: (files.path_as_text(index), int(files.targets[index]), index_of[index].tolist())


def objects(images: int) -> Read:
    """Reads a list of (path, target), which torchvision's ImageFolder holds."""
    names = names_of(images).items()
    samples = [(f"{ROOT}/{folder}/{name}", target) for target, (folder, files) in enumerate(names) for name in files]
    return samples.__getitem__


def names_of(images: int) -> dict[str, list[str]]:
    """For each class the names of its images, such as ct0001234.png."""
    # The classes first, as in `find_classes`: between the images' names they would keep those pages from being freed.
    classes = [f"finding-{number:03d}" for number in range(CLASSES)]
    bounds = [images * number // CLASSES for number in range(CLASSES + 1)]
    ranges = map(range, bounds, bounds[1:])
    return {name: [f"ct{image:07d}.png" for image in images] for name, images in zip(classes, ranges, strict=True)}
