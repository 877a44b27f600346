"""RadImageNet's published ultrasound corrections: an array per image, added to it at 224 x 224 pixels.

This follows the released `process.py` of the authors (github.com/ogrenenmakine/Refined-RadImagenet): read the image as
8-bit colour, resize it with OpenCV to 224 x 224 whatever its shape, add `<image stem>.npy` with NumPy, save the sum by
`imwrite`. The published arrays (correction_masks.tar.gz) were not available here, so their shape and dtype are unknown:
each array is checked, and arrays that the released code could not have meant are refused.
"""

import io

import numpy as np
from PIL import Image

from utils.runtime.errors import UserError, first_line

SIZE = 224  # pixels
SHAPES = ((SIZE, SIZE), (SIZE, SIZE, 1), (SIZE, SIZE, 3))
MAX_BYTES = 2**21  # of a file; 224 x 224 x 3 values of 8 bytes take 1.2 million
ONE = 2048  # 1 in OpenCV's fixed point


def read_mask(data: bytes, shown: object) -> np.ndarray:
    """The array of a `.npy` file: (224, 224), (224, 224, 1) or (224, 224, 3); uint8, signed integers or finite floats.

    shown: its name in messages. Raises UserError for anything else. Nothing is unpickled.
    """
    try:
        mask = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, MemoryError, OverflowError) as error:
        raise UserError(f"{shown}: not a readable array ({first_line(error)}); download the mask again.") from None
    if mask.shape not in SHAPES:
        raise UserError(f"{shown}: has the shape {mask.shape}; expected {' or '.join(map(str, SHAPES))}.")
    if mask.dtype != np.uint8 and mask.dtype.kind not in "if":
        raise UserError(f"{shown}: has the dtype {mask.dtype}; expected uint8, signed integers or floats.")
    if not np.isfinite(mask).all():
        raise UserError(f"{shown}: has values that are not finite; download the mask again.")
    return mask


def correct(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The corrected image, 224 x 224, RGB, or grey if its channels are equal; image: RGB; mask: from `read_mask`.

    uint8 masks hold differences that wrap around and are added modulo 256, like uint8 in NumPy. Others are added,
    rounded to nearest (halves to even) and clipped to 0..255, like `imwrite`. Three channels are blue, green, red, the
    order of OpenCV.
    """
    pixels = resize(np.asarray(image))  # (224, 224, 3)
    mask = np.broadcast_to(mask if mask.ndim == 3 else mask[:, :, None], pixels.shape)[:, :, ::-1]
    if mask.dtype == np.uint8:
        pixels = pixels + mask
    else:
        pixels = np.rint(pixels + mask.astype(np.float64)).clip(0, 255).astype(np.uint8)
    if (pixels == pixels[:, :, :1]).all():
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0]))
    return Image.fromarray(pixels)


def resize(pixels: np.ndarray) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (224, 224, 3), bit for bit like OpenCV's `resize` with its defaults.

    Pillow and torch give other pixels than OpenCV (bilinear without antialiasing, in fixed point), and a uint8 mask
    needs the exact ones: where the sum should be 0, one level less would become 255.
    """
    height, width = pixels.shape[:2]
    if (height, width) == (SIZE, SIZE):
        return pixels
    low, high, part = _neighbours(width)
    part = np.where((low < 0) | (low >= width - 1), np.float32(0), part)  # only columns: at the border
    first, second = (weight[:, None] for weight in _fixed_point(part))
    left, right = pixels[:, low.clip(0, width - 1)], pixels[:, high.clip(0, width - 1)]  # (H, 224, 3)
    pixels = (left * first + right * second) >> 4
    low, high, part = _neighbours(height)
    first, second = (weight[:, None, None] for weight in _fixed_point(part))
    above, below = pixels[low.clip(0, height - 1)], pixels[high.clip(0, height - 1)]  # (224, 224, 3)
    pixels = (above * first >> 16) + (below * second >> 16)
    return ((pixels + 2) >> 2).clip(0, 255).astype(np.uint8)


def _neighbours(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two source pixels around each of the 224 target pixels, and the distance from the first; (224,) each."""
    centres = ((np.arange(SIZE) + 0.5) * (1 / (SIZE / length)) - 0.5).astype(np.float32)
    low = np.floor(centres).astype(np.int64)
    return low, low + 1, centres - low.astype(np.float32)


def _fixed_point(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the first and the second neighbour, int32."""
    return np.rint((1 - part) * ONE).astype(np.int32), np.rint(part * ONE).astype(np.int32)
