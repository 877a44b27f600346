"""Images kept on the device as they lie in the cache, and the random crops of a batch made there, all at once."""

import torch
from torch import Tensor

from utils.data.cache import ImageCache
from utils.runtime.errors import UserError
from utils.runtime.progress import say

CHUNK = 2**28  # bytes copied to the device at a time
ALIGNMENT = 8  # of the patches' sides, for the matrix units
FAR = 1e4  # pixels: beyond any filter
SPARE = 0.1  # of the device's free memory must be left when all images are there


class DeviceImages:
    """Crops out of a cache that lies in the device's memory whole, brought to one size.

    A resize is separable and linear: out = V P H^T for a crop P with one row of filter weights for each row (V) and
    column (H) of the result, the weights of Pillow and torch's antialiased interpolation. A batch is two matrix
    products. The result lies within 2 of 255 levels of what `--cache-dataset host` gives, rounding in each direction;
    not for bicubic crops by Pillow, which overshoot, and are cut off after the vertical pass where that comes first.
    """

    def __init__(
        self, cache: ImageCache, size: int, interpolation: str, device: torch.device, compiled: bool = False
    ) -> None:
        """size: of the crops made, pixels; interpolation: bilinear or bicubic; compiled: by torch.compile.

        Raises UserError if the device has too little memory.
        """
        self.size, self.filter, self.device = size, FILTERS[interpolation], device
        self.offsets = torch.from_numpy(cache.index[:, 0].copy()).to(device)  # (N,)
        self.strides = torch.from_numpy(cache.index[:, 2] * cache.channels).to(device)  # (N,) bytes of a row
        self.channel = torch.arange(cache.channels, device=device).view(-1, 1, 1)  # (C, 1, 1)
        self.pixels = _to_device(torch.from_numpy(cache.pixels), device)
        # What pixels and weights are multiplied in: 11 bits hold a pixel exactly and a weight to 1/2000.
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.resample = torch.compile(self._resample, dynamic=True) if compiled else self._resample

    def __call__(self, indices: Tensor, crops: Tensor) -> Tensor:
        """Images (B, C, S, S) uint8 on the device, from what `DrawCrop` drew.

        indices: (B,) of the images; crops: (B, 5), top, left, height, width and flip of each; both int64 on the CPU.
        """
        height, width = (-(-longest // ALIGNMENT) * ALIGNMENT for longest in crops[:, 2:4].amax(0).tolist())
        indices, crops = (tensor.to(self.device, non_blocking=True) for tensor in (indices, crops))
        return self.resample(indices, crops, height, width)

    def _resample(self, indices: Tensor, crops: Tensor, height: int, width: int) -> Tensor:
        top, left, heights, widths, flip = crops.unbind(1)  # (B,) each
        row = torch.arange(height, device=self.device).minimum(heights[:, None] - 1)  # (B, H), of each crop
        column = torch.arange(width, device=self.device).minimum(widths[:, None] - 1)  # (B, W)
        row, column = row + top[:, None], column + left[:, None]  # of each image
        row_starts = self.offsets[indices][:, None] + row * self.strides[indices][:, None]  # (B, H)
        row_starts = row_starts[:, None, :, None] + self.channel  # (B, C, H, 1)
        patches = self.pixels[row_starts + len(self.channel) * column[:, None, None]].to(self.dtype)  # (B, C, H, W)
        vertical = self._weights(heights, height)  # (B, S, H)
        horizontal = self._weights(widths, width)  # (B, S, W)
        horizontal = torch.where(flip.bool()[:, None, None], horizontal.flip(1), horizontal)
        with torch.autocast(self.device.type, enabled=False):
            patches = patches @ horizontal.mT[:, None]  # (B, C, H, S)
            if self.filter is _cubic:  # which overshoots: cut off in each direction, as Pillow and torch do
                patches = patches.round_().clamp_(0, 255)
            resized = vertical[:, None] @ patches  # (B, C, S, S)
        return resized.round_().clamp_(0, 255).to(torch.uint8)

    def _weights(self, lengths: Tensor, longest: int) -> Tensor:
        """The filter's weights (B, S, longest) that bring `lengths` (B,) pixels to S; 0 beyond each length."""
        scale = lengths / self.size  # (B,) pixels of the source for each of the result
        stretch = scale.clamp_min(1)[:, None]  # the filter is stretched where pixels are averaged
        centres = (torch.arange(self.size, device=self.device) + 0.5) * scale[:, None] / stretch  # (B, S)
        places = torch.arange(longest, device=self.device) + 0.5  # (longest,)
        places = torch.where(places < lengths[:, None], places / stretch, FAR)  # (B, longest)
        weights = self.filter((places[:, None, :] - centres[:, :, None]).to(self.dtype))  # (B, S, longest)
        return weights.div_(weights.sum(-1, keepdim=True))


def _triangle(distances: Tensor) -> Tensor:
    """Of bilinear interpolation."""
    return distances.abs_().neg_().add_(1).clamp_min_(0)


def _cubic(distances: Tensor) -> Tensor:
    """Of bicubic interpolation: Keys' kernel with a = -0.5."""
    x = distances.abs_()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0))


FILTERS = {"bilinear": _triangle, "bicubic": _cubic}


def _to_device(pixels: Tensor, device: torch.device) -> Tensor:
    """A copy (bytes,) on the device; on the CPU the mapped file itself."""
    if device.type == "cpu":
        return pixels
    free, _ = torch.cuda.mem_get_info(device)
    if len(pixels) > (1 - SPARE) * free:
        raise UserError(
            f"--cache-dataset device: the training images take {len(pixels) / 1e9:.1f} GB, and {device} has "
            f"{free / 1e9:.1f} GB free; give host, a smaller --val-resize-size, or --gray."
        )
    copy = torch.empty_like(pixels, device=device)
    for target, source in zip(copy.split(CHUNK), pixels.split(CHUNK), strict=True):
        target.copy_(source)
    say(f"--cache-dataset device: {len(pixels) / 1e9:.2f} GB of images are on {device}.")
    return copy
