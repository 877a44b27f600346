"""Measures each image of an audit in one decoding: size, levels, a digest of the pixels, a difference hash."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.data.dataset import decode_in_order
from utils.data.folders import ImageFiles
from utils.data.images import open_image, to_8_bits
from utils.runtime.errors import UserError
from utils.runtime.progress import Progress

BATCH = 32  # images that a worker decodes before it hands them over
SIDE = 11  # cells of the grid of a difference hash: 2 x 11 x 11 = 242 bits
MARGIN = 0.05  # standard deviations of the grid; smaller differences are noise and give 0
LEVELS = np.arange(256.0)

RECORD = np.dtype(  # 123 bytes per image
    [
        ("width", np.int32),  # 0 for an unreadable image
        ("height", np.int32),
        ("format", "S4"),
        ("mode", "S5"),
        ("gray", np.bool_),
        ("mean", np.float64, 4),  # of the levels 0 to 255, for red, green, blue and grey
        ("square", np.float64, 4),  # mean square of the levels
        ("pixels", np.uint64, 2),  # digest
        ("likeness", np.uint64, 4),  # difference hash
    ]
)


class Measured(NamedTuple):
    """Records (B,) of consecutive images, and their errors, "" for readable ones."""

    records: np.ndarray
    errors: list[str]


def measure(path: Path, upper_8_bits: bool = False) -> np.void:
    """The RECORD of one image, from the pixels that `read_image` returns. Raises UserError as it does."""
    record = np.zeros((), RECORD)
    with open_image(path, upper_8_bits) as image:
        record["format"], record["mode"] = image.format, image.mode
        image = to_8_bits(image)
        image = image.convert("L" if image.mode == "L" else "RGB")
    red, *others = image.split()
    record["gray"] = all(red.tobytes() == other.tobytes() for other in others)
    if record["gray"]:
        image = red
    luma = image.convert("L")
    record["width"], record["height"] = image.size
    histogram = np.array(image.histogram()).reshape(-1, 256)  # (1 or 3, 256)
    histogram = np.vstack([np.broadcast_to(histogram, (3, 256)), luma.histogram()]) / (image.width * image.height)
    record["mean"], record["square"] = histogram @ LEVELS, histogram @ LEVELS**2
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    record["pixels"] = np.frombuffer(digest.digest(), np.uint64)
    record["likeness"] = difference_hash(luma)
    return record[()]


def difference_hash(image: Image.Image) -> np.ndarray:
    """Difference hash of a grey image, (4,) uint64: similar for any size, brightness and compression.

    The image is resized to 12 x 12; a bit is 1 if the right (or lower) neighbour is brighter by more than MARGIN
    standard deviations. Smooth or dark areas, where noise would decide, give 0. The last 14 bits are 0.
    """
    # In floating point: rounding to levels would add false steps to dark images.
    grid = np.asarray(image.convert("F").resize((SIDE + 1, SIDE + 1), Image.Resampling.BILINEAR))
    corner, margin = grid[:-1, :-1], MARGIN * grid.std()
    bits = np.concatenate([(grid[:-1, 1:] - corner).ravel() > margin, (grid[1:, :-1] - corner).ravel() > margin])
    return np.packbits(np.pad(bits, (0, 256 - bits.size))).view(np.uint64)


def measure_all(files: ImageFiles, workers: int, upper_8_bits: bool = False) -> Measured:
    """The records and errors of all images of a split, in its order, measured by worker processes."""
    records, errors = np.zeros(len(files), RECORD), []
    steps = -(-len(files) // BATCH)
    progress = Progress(files.root.name, steps, max(1, steps // 10), BATCH)
    batches = decode_in_order(partial(_measure_batch, files, upper_8_bits), range(len(files)), BATCH, workers)
    try:
        for step, measured in progress.track(batches):
            records[step * BATCH : step * BATCH + len(measured.records)] = measured.records
            errors += measured.errors
            if progress.in_terminal or progress.is_due(step):
                progress.show(step, {})
    except UserError as error:
        raise UserError(f"{files.root}: {error}") from None
    return Measured(records, errors)


def _measure_batch(files: ImageFiles, upper_8_bits: bool, indices: Sequence[int]) -> Measured:
    records, errors = np.zeros(len(indices), RECORD), [""] * len(indices)
    for position, index in enumerate(indices):
        try:
            records[position] = measure(files.path(index), upper_8_bits)
        except UserError as error:
            errors[position] = str(error)
    return Measured(records, errors)
