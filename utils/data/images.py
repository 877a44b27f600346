"""Decodes image files, and refuses those whose pixels would be ambiguous or unsafe to read."""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from utils.runtime.errors import UserError

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # by content; PostScript would run Ghostscript

BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR_CONFIGURATION, SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF tags

# Up to twice its size limit Pillow only warns; `read_image` refuses such images.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: Path, gray: bool = False, upper_8_bits: bool = False, keep_gray: bool = False) -> Image.Image:
    """Decode an image to 8-bit RGB, or to grey levels; palettes are applied, transparency is dropped.

    keep_gray: leave grey images in one channel, which is faster to crop than three equal ones;
    upper_8_bits: keep the upper 8 bits of unsigned images with more bits, instead of refusing them.

    Raises UserError with the path for a file that is not regular, not an image, truncated, larger than Pillow's
    MAX_IMAGE_PIXELS, of several frames, or of more than 8 bits a channel: their intended range is unknown.
    """
    with open_image(path, upper_8_bits) as image:
        image = to_8_bits(image)
        if (gray or keep_gray) and image.mode == "L":
            image.load()
            return image
        return image.convert("RGB").convert("L") if gray else image.convert("RGB")


@contextmanager
def open_image(path: Path, upper_8_bits: bool = False, any_depth: bool = False) -> Iterator[Image.Image]:
    """Open an image without decoding its pixels; any error in the block becomes the UserError of `read_image`.

    any_depth: accept images of more than 8 bits a channel, also signed and real ones.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ValueError("not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            _check_header(image, upper_8_bits, any_depth)
            image.info.pop("transparency", None)  # Pillow would warn about it and ignore it
            yield image
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            reason = f"a link to {os.readlink(path)}, which is not there"
        raise UserError(f"{path}: cannot be read as an image ({reason}); replace or remove it.") from None


def to_8_bits(image: Image.Image) -> Image.Image:
    """The upper 8 bits of a 12- or 16-bit grey image. Other images stay: Pillow reduces 16-bit colour itself."""
    if not image.mode.startswith("I;16"):
        return image
    levels = (np.asarray(image) >> (bits_per_channel(image) - 8)).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # 0 is white: Pillow inverts only 8-bit images
        levels = 255 - levels
    return Image.fromarray(levels)


def _check_header(image: Image.Image, upper_8_bits: bool, any_depth: bool) -> None:
    """Raise ValueError for an image that must not be decoded."""
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS}")
    if getattr(image, "is_animated", False):  # n_frames would read every directory of a TIFF
        raise ValueError("it holds several frames; save each as a separate file")
    bits = bits_per_channel(image)
    if bits <= 8 and image.format == "TIFF" and 2 in image.tag_v2.get(SAMPLE_FORMAT, ()):
        raise ValueError("signed levels, which Pillow reads as unsigned; save it with levels of 0 to 255")
    if any_depth:
        return
    if bits > 8 and not upper_8_bits:
        raise ValueError(
            f"{bits} bits a channel; save it with 8, windowed as it should be seen, or give --upper-8-bits"
        )
    in_planes = image.format == "TIFF" and image.tag_v2.get(PLANAR_CONFIGURATION) == 2
    # Not if levels are signed or real, or if Pillow scales or misreads them.
    if bits > 8 and (image.mode in ("I", "F") or image.format == "PPM" or in_planes):
        raise ValueError(
            f"{bits} bits a channel; --upper-8-bits reduces only unsigned PNG and TIFF images, not TIFF images in "
            "separate planes. Save it with 8, windowed as it should be seen"
        )


def bits_per_channel(image: Image.Image) -> int:
    """Bits per channel in the file. Pillow's mode hides them: 16-bit colour, or grey with alpha, opens as 8-bit."""
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))))
    if image.mode == "F":
        return 32
    decoding = image.tile[0][3] if image.tile else ""  # the raw mode; for some PPM files with the highest level
    if image.format == "PPM" and isinstance(decoding, tuple):
        return decoding[1].bit_length()
    return 16 if image.mode.startswith("I") or str(decoding).endswith(";16B") else 8
