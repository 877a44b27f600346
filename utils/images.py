"""Image files: what is read, and as which pixels; what is refused, and why."""

import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from utils.errors import UserError

FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # by content; Pillow would also hand PostScript to Ghostscript

# Pillow only warns of an image that is too large, until it is twice so; `read_image` refuses it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(path: Path, gray: bool = False) -> Image.Image:
    """Decode an 8-bit image to RGB with Pillow, or to its grey level: palettes are looked up, transparency is dropped.

    Raises UserError with the path for a file that is no regular one or no image, is cut short, larger than Pillow's
    MAX_IMAGE_PIXELS, of several frames, or grey of more than 8 bits: nobody states what range of them is meant, and
    Pillow's own conversion would clip it at 255. (Of 16-bit colour Pillow keeps the upper 8 bits.)
    """
    with open_image(path) as image:
        if gray and image.mode == "L":
            image.load()
            return image
        return image.convert("RGB").convert("L") if gray else image.convert("RGB")


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """A file's image, its pixels not decoded yet; whatever fails within the block is a UserError of `read_image`."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for its writer
            raise ValueError("not a regular file")
        with Image.open(path, formats=FORMATS) as image:
            _check_header(image)
            image.info.pop("transparency", None)  # Pillow would warn of it, and keep the colours all the same
            yield image
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{path}: cannot be read as an image ({reason}); replace or remove it.") from None


def _check_header(image: Image.Image) -> None:
    """Raise ValueError for an image that is not to be decoded."""
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than the {Image.MAX_IMAGE_PIXELS} that are read")
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError("more than 8 bits a channel: save it with 8, windowed as it is to be seen")
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ValueError(f"it holds {frames} frames; save each as a file of its own")
