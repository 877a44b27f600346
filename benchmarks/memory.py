"""Row 8: what file names, targets and the cache's index cost a rank: in one process, and in its loader workers."""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from benchmarks.report import Measurement, Target, measured
from benchmarks.setting import Setting
from benchmarks.timing import compare
from utils.data.cache import INDEX, PIXELS, ImageCache
from utils.data.folders import ImageFiles

IMAGES, CLASSES = 1_350_000, 165  # of RadImageNet
RANKS = 8  # of a node
MOST_READS = 100_000  # by each worker
ROOT = Path("/data/radimagenet/train")


class Held(NamedTuple):
    """Bytes that the data add to one rank: alone, and together with a few or many workers that touch all of it."""

    alone: float
    with_few: float
    with_many: float


def names_of(images: int) -> dict[str, list[str]]:
    """For each class the names of its images, such as ct0001234.png."""
    # The classes first, as when a folder is read: between the images' names they would keep those pages from going.
    classes = [f"finding-{number:03d}" for number in range(CLASSES)]
    bounds = [images * number // CLASSES for number in range(CLASSES + 1)]
    ranges = map(range, bounds, bounds[1:])
    return {name: [f"ct{image:07d}.png" for image in of_class] for name, of_class in zip(classes, ranges, strict=True)}


def hold_arrays(images: int) -> Callable[[int], object]:
    """What reads an image's name, target and place in the cache from our arrays."""
    files = ImageFiles(ROOT, names_of(images))
    with tempfile.TemporaryDirectory() as folder:  # what is mapped stays
        np.save(Path(folder) / INDEX, np.full((images, 3), 256))
        (Path(folder) / PIXELS).write_bytes(b"pixels")
        index_of = ImageCache(Path(folder), 1, "size").index  # (N, 3)
    return lambda index: (files.path(index), int(files.targets[index]), index_of[index].tolist())


def hold_objects(images: int) -> Callable[[int], object]:
    """What reads an index of a list of (path, target), as torchvision's ImageFolder holds it."""
    names = names_of(images).items()
    samples = [(f"{ROOT}/{folder}/{name}", target) for target, (folder, of) in enumerate(names) for name in of]
    return samples.__getitem__


def touch(read: Callable[[int], object], images: int, reads: int) -> None:
    """Read so many images, evenly spread: few enough bytes apart that each page is met."""
    for number in range(reads):
        read(number * images // reads)


HOLDERS = {"arrays": hold_arrays, "objects": hold_objects}


def proportional_bytes(process: int) -> int:
    """What the process holds of the machine's memory, pages that it shares divided among those that share them.

    Without the pages of files, such as the cache's index: the system keeps one copy of them for all ranks.
    """
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/{process}/smaps_rollup: holds no Pss_Anon")


@contextmanager
def forked(count: int, touch: Callable[[], None]) -> Iterator[list[int]]:
    """So many children that have run `touch` and now wait."""
    ready, done = os.pipe()
    children = []
    try:
        for _ in range(count):
            child = os.fork()
            if child == 0:
                touch()
                os.write(done, b".")
                signal.pause()
            children.append(child)
        seen = 0
        while seen < count:
            seen += len(os.read(ready, count))
        yield children
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(ready)
        os.close(done)


def bytes_of_family(workers: int, touch: Callable[[], None]) -> int:
    """What this process holds together with so many workers that have run `touch`."""
    with forked(workers, touch) as children:
        return sum(map(proportional_bytes, [os.getpid(), *children]))


def probe(kind: str, images: int, few: int, many: int) -> Held:
    """Hold the data in this process, and say what they add to a set of one image a class that is read as often."""
    reads = min(images, MOST_READS)
    counts = (0, few, many)
    touch_small = partial(touch, HOLDERS[kind](CLASSES), CLASSES, reads)
    before = [bytes_of_family(workers, touch_small) for workers in counts]
    touch_all = partial(touch, HOLDERS[kind](images), images, reads)
    gc.collect()
    return Held(*(bytes_of_family(workers, touch_all) - less for workers, less in zip(counts, before, strict=True)))


def probe_apart(kind: str, images: int, few: int, many: int) -> Held:
    """`probe` in a process of its own, whose memory nothing else has used before; in megabytes."""
    command = [sys.executable, "-m", "benchmarks.memory", kind, *map(str, (images, few, many))]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip().splitlines()[-1]}")
    return Held(*(held / 1e6 for held in json.loads(result.stdout)))


def host_memory(setting: Setting) -> list[Measurement]:
    """Row 8: memory of a rank's file list and cache index: what each worker adds, and what a node holds."""
    # Python objects are copied into each worker, so fewer images are tried, and the bytes an image taken.
    images, fewer, few, many = (4_000, 4_000, 1, 2) if setting.quick else (IMAGES, 200_000, 4, 16)
    repeats = 1 if setting.quick else min(setting.repeats, 3)
    ours = [probe_apart("arrays", images, few, many) for _ in range(repeats)]
    theirs = [probe_apart("objects", fewer, few, many) for _ in range(repeats)]
    what = f"names, targets, cache index of {images} images"
    by_worker = compare([(held.with_many - held.alone) / many for held in ours], [held.alone for held in ours])
    note = f"median MB alone, with {few} and with {many} workers: "
    note += ", ".join(f"{median(values):.1f}" for values in zip(*ours, strict=True))
    note += "; as lists of Python objects, bytes an image: "
    note += ", ".join(f"{1e6 * median(values) / fewer:.0f}" for values in zip(*theirs, strict=True))
    node = compare(
        [RANKS * held.with_many / 1e3 for held in ours],
        [RANKS * held.with_many / 1e3 * images / fewer for held in theirs],
    )
    return [
        measured(8, f"{what}: what each of {many} workers adds to a rank", "MB", by_worker, Target(False, 0.05), note),
        measured(
            8,
            f"{what}: a node of {RANKS} ranks x {many} workers, over lists of Python objects",
            "GB",
            node,
            Target(False, 1.0, of_ours=True),
            f"{RANKS} times one measured rank; theirs scaled up from {fewer} images",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.memory", description="One probe; prints JSON.")
    parser.add_argument("kind", choices=sorted(HOLDERS))
    for name in ("images", "few", "many"):
        parser.add_argument(name, type=int)
    options = parser.parse_args()
    print(json.dumps(probe(options.kind, options.images, options.few, options.many)))


if __name__ == "__main__":
    main()
