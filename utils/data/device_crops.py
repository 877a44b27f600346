"""Random crops of whole batches on the device, from a cache in its memory (--cache-dataset device)."""

import torch
from torch import Tensor

from utils.data.cache import ImageCache
from utils.runtime.errors import UserError
from utils.runtime.progress import say

CHUNK = 2**28  # bytes copied to the device at a time
ALIGNMENT = 8  # the sides of patches are multiples of this, for the matrix units
FAR = 1e4  # pixels, beyond the reach of any filter
SPARE = 0.1  # of the device's free memory that the images must leave


class DeviceImages:
    """A cache in the device's memory, from which crops are resized to one size.

    A resize is separable and linear: out = V P H^T for a crop P, with one row of filter weights for each row (V) and
    column (H) of the result, the weights of Pillow's and torch's antialiased interpolation. A batch is two matrix
    products. Results are within 2 of 255 levels of `--cache-dataset host`, because of rounding. That does not hold for
    Pillow's bicubic crops: their overshoots are clipped after the vertical pass if that comes first.
    """

    def __init__(
        self, cache: ImageCache, size: int, interpolation: str, device: torch.device, compiled: bool = False
    ) -> None:
        """size: of the resized crops, pixels; interpolation: bilinear or bicubic; compiled: by torch.compile.

        Raises UserError if the device has too little memory.
        """
        self.size, self.filter, self.device = size, FILTERS[interpolation], device
        self.offsets = torch.from_numpy(cache.index[:, 0].copy()).to(device)  # (N,)
        self.strides = torch.from_numpy(cache.index[:, 2] * cache.channels).to(device)  # (N,) bytes per row
        self.channel = torch.arange(cache.channels, device=device).view(-1, 1, 1)  # (C, 1, 1)
        self.pixels = _to_device(torch.from_numpy(cache.pixels), device)
        # Of the matrix products: the 11 bits of float16 hold a pixel exactly and a weight to 1/2000.
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.resample = torch.compile(self._resample, dynamic=True) if compiled else self._resample

    def __call__(self, indices: Tensor, crops: Tensor) -> Tensor:
        """Images (B, C, S, S) uint8 on the device.

        indices: (B,) of the images; crops: (B, 5) from `DrawCrop`, top, left, height, width, flip; int64 on the CPU.
        """
        height, width = (-(-longest // ALIGNMENT) * ALIGNMENT for longest in crops[:, 2:4].amax(0).tolist())
        indices, crops = (tensor.to(self.device, non_blocking=True) for tensor in (indices, crops))
        return self.resample(indices, crops, height, width)

    def _resample(self, indices: Tensor, crops: Tensor, height: int, width: int) -> Tensor:
        top, left, heights, widths, flip = crops.unbind(1)  # (B,) each
        row = torch.arange(height, device=self.device).minimum(heights[:, None] - 1)  # (B, H), within the crop
        column = torch.arange(width, device=self.device).minimum(widths[:, None] - 1)  # (B, W)
        row, column = row + top[:, None], column + left[:, None]  # within the image
        row_starts = self.offsets[indices][:, None] + row * self.strides[indices][:, None]  # (B, H)
        row_starts = row_starts[:, None, :, None] + self.channel  # (B, C, H, 1)
        patches = self.pixels[row_starts + len(self.channel) * column[:, None, None]].to(self.dtype)  # (B, C, H, W)
        vertical = self._weights(heights, height)  # (B, S, H)
        horizontal = self._weights(widths, width)  # (B, S, W)
        horizontal = torch.where(flip.bool()[:, None, None], horizontal.flip(1), horizontal)
        with torch.autocast(self.device.type, enabled=False):
            patches = patches @ horizontal.mT[:, None]  # (B, C, H, S)
            if self.filter is _cubic:  # overshoots, which Pillow and torch clip after each direction
                patches = patches.round_().clamp_(0, 255)
            resized = vertical[:, None] @ patches  # (B, C, S, S)
        return resized.round_().clamp_(0, 255).to(torch.uint8)

    def _weights(self, lengths: Tensor, longest: int) -> Tensor:
        """Filter weights (B, S, longest) that resize `lengths` (B,) pixels to S; 0 beyond each length."""
        scale = lengths / self.size  # (B,) source pixels per result pixel
        stretch = scale.clamp_min(1)[:, None]  # downsampling stretches the filter
        centres = (torch.arange(self.size, device=self.device) + 0.5) * scale[:, None] / stretch  # (B, S)
        places = torch.arange(longest, device=self.device) + 0.5  # (longest,)
        places = torch.where(places < lengths[:, None], places / stretch, FAR)  # (B, longest)
        weights = self.filter((places[:, None, :] - centres[:, :, None]).to(self.dtype))  # (B, S, longest)
        return weights.div_(weights.sum(-1, keepdim=True))


def _triangle(distances: Tensor) -> Tensor:
    """The bilinear kernel."""
    return distances.abs_().neg_().add_(1).clamp_min_(0)


def _cubic(distances: Tensor) -> Tensor:
    """The bicubic kernel: Keys' with a = -0.5."""
    x = distances.abs_()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))


FILTERS = {"bilinear": _triangle, "bicubic": _cubic}


def _to_device(pixels: Tensor, device: torch.device) -> Tensor:
    """A copy (bytes,) on the device; on the CPU, the mapped file itself."""
    if device.type == "cpu":
        return pixels
    free, _ = torch.cuda.mem_get_info(device)
    if len(pixels) > (1 - SPARE) * free:
        raise UserError(
            f"--cache-dataset device: the training images take {len(pixels) / 1e9:.1f} GB, but {device} has only "
            f"{free / 1e9:.1f} GB free; give host, a smaller --val-resize-size, or --gray."
        )
    copy = torch.empty_like(pixels, device=device)
    for target, source in zip(copy.split(CHUNK), pixels.split(CHUNK), strict=True):
        target.copy_(source)
    say(f"--cache-dataset device: {len(pixels) / 1e9:.2f} GB of images are on {device}.")
    return copy
