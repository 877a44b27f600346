"""Image files: what is read, and as which pixels; what is refused, and why."""

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from utils.runtime.errors import UserError

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # by content; Pillow would also hand PostScript to Ghostscript

BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR_CONFIGURATION, SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF

# Pillow only warns of an image that is too large, until it is twice so; `read_image` refuses it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: Path, gray: bool = False, upper_8_bits: bool = False) -> Image.Image:
    """Decode an 8-bit image to RGB with Pillow, or to its grey level: palettes are looked up, transparency is dropped.

    upper_8_bits: keep the upper 8 bits of unsigned images that have more, instead of refusing them.

    Raises UserError with the path for a file that is no regular one or no image, is cut short, larger than Pillow's
    MAX_IMAGE_PIXELS, of several frames, or of more than 8 bits a channel: nobody states what range of them is meant.
    """
    with open_image(path, upper_8_bits) as image:
        image = to_8_bits(image)
        if gray and image.mode == "L":
            image.load()
            return image
        return image.convert("RGB").convert("L") if gray else image.convert("RGB")


@contextmanager
def open_image(path: Path, upper_8_bits: bool = False) -> Iterator[Image.Image]:
    """A file's image, its pixels not decoded yet; whatever fails within the block is a UserError of `read_image`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
            raise ValueError("not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            _check_header(image, upper_8_bits)
            image.info.pop("transparency", None)  # Pillow would warn of it, and keep the colours all the same
            yield image
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{path}: cannot be read as an image ({reason}); replace or remove it.") from None


def to_8_bits(image: Image.Image) -> Image.Image:
    """The upper 8 bits of a grey image of 12 or 16; any other image unchanged: Pillow reduces 16-bit colour itself."""
    if not image.mode.startswith("I;16"):
        return image
    levels = (np.asarray(image) >> (_bits(image) - 8)).astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # white: Pillow inverts 8 bits only
        levels = 255 - levels
    return Image.fromarray(levels)


def _check_header(image: Image.Image, upper_8_bits: bool) -> None:
    """Raise ValueError for an image that is not to be decoded."""
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than the {Image.MAX_IMAGE_PIXELS} that are read")
    if getattr(image, "is_animated", False):  # n_frames would read all directories of a TIFF
        raise ValueError("it holds several frames; save each as a file of its own")
    bits = _bits(image)
    if bits <= 8 and image.format == "TIFF" and 2 in image.tag_v2.get(SAMPLE_FORMAT, ()):
        raise ValueError("signed levels, which Pillow takes for unsigned ones; save it with levels of 0 to 255")
    if bits > 8 and not upper_8_bits:
        raise ValueError(
            f"{bits} bits a channel; save it with 8, windowed as it should be seen, or give --upper-8-bits"
        )
    if bits > 8 and not _can_be_reduced(image):
        raise ValueError(
            f"{bits} bits a channel, of which --upper-8-bits reduces unsigned ones in PNG and TIFF only, and no "
            "separate planes; save it with 8, windowed as it should be seen"
        )


def _can_be_reduced(image: Image.Image) -> bool:
    """Whether the upper 8 bits can be taken: not of signed or real levels, nor where Pillow scales or misreads them."""
    in_planes = image.format == "TIFF" and image.tag_v2.get(PLANAR_CONFIGURATION) == 2
    return image.mode not in ("I", "F") and image.format != "PPM" and not in_planes


def _bits(image: Image.Image) -> int:
    """Bits of a channel in the file: Pillow gives 16-bit colour, and 16-bit grey with alpha, a mode of 8 bits."""
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))))
    if image.mode == "F":
        return 32
    decoding = image.tile[0][3] if image.tile else ""  # the raw mode, of some PPM files with the highest level
    if image.format == "PPM" and isinstance(decoding, tuple):
        return decoding[1].bit_length()
    return 16 if image.mode.startswith("I") or str(decoding).endswith(";16B") else 8
