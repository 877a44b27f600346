"""Measures each image of an audit in one decoding: size, levels, a digest of the pixels, a descriptor of the view."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn

from utils.data.dataset import decode_in_order
from utils.data.folders import ImageFiles
from utils.data.images import open_image, to_8_bits
from utils.runtime.errors import UserError
from utils.runtime.progress import Progress

BATCH = 32  # images that a worker decodes before it hands them over
SIDE = 32  # pixels of the thumbnail that a descriptor is made from
FREQUENCIES = 20  # of its cosine transform, in each direction
FAINT = 1.0  # smaller coefficients are rounding errors of a flat image
LEVELS = np.arange(256.0)

_SQUARED = 2 - 2 * np.cos(np.pi * np.arange(FREQUENCIES) / SIDE)  # squared gradient of a wave along one direction
GRADIENT = np.sqrt(_SQUARED[:, None] + _SQUARED)
ORDER = np.argsort(GRADIENT, axis=None, kind="stable")

RECORD = np.dtype(  # 491 bytes per image
    [
        ("width", np.int32),  # 0 for an unreadable image
        ("height", np.int32),
        ("format", "S4"),
        ("mode", "S5"),
        ("gray", np.bool_),
        ("mean", np.float64, 4),  # of the levels 0 to 255, for red, green, blue and grey
        ("square", np.float64, 4),  # mean square of the levels
        ("pixels", np.uint64, 2),  # digest
        ("descriptor", np.int8, FREQUENCIES**2),
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
    record["descriptor"] = descriptor(luma)
    return record[()]


def descriptor(image: Image.Image) -> np.ndarray:
    """Descriptor of a grey image, (400,), int8. Descriptors of one view correlate by nearly 1.

    It holds the cosine transform of a thumbnail, low frequencies first, each coefficient times the size of its wave's
    gradient. Two descriptors thus correlate like the gradients of the thumbnails, without the finest detail; this does
    not depend on brightness and contrast. The constant term, which has no gradient, is 1 instead of 0: images without
    structure are then equal to one another and similar to no other image.
    """
    # In floating point: rounding to levels would add false steps to dark images.
    thumbnail = np.asarray(image.convert("F").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    waves = dctn(thumbnail, norm="ortho")[:FREQUENCIES, :FREQUENCIES] * GRADIENT
    coefficients = np.round(waves * (127 / max(FAINT, np.abs(waves).max()))).astype(np.int8).ravel()[ORDER]
    coefficients[0] = 1
    return coefficients


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
