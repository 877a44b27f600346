"""A split's images, decoded once into a memory-mapped file that all processes of a node share."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.runtime.reading import open_regular

PIXELS, INDEX = "pixels.u8", "index.npy"
VERSION = 2  # of these files and of the folder's fingerprint

warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nothing writes to it


class ImageCache:
    """A complete cache. Item i is image i, or None if its file was unreadable.

    `pixels` holds the bytes of all images one after another, (H, W, C) each; `index`, (N, 3) int64, their offsets,
    heights and widths. Both are mapped from files, so that the processes of a node share one copy in memory.
    """

    def __init__(self, folder: Path, channels: int, kind: str) -> None:
        """kind: of the items; "pil", "tensor" (C, H, W) uint8, or "size" for tensors (C, H, W) without values."""
        self.folder, self.channels, self.kind = folder, channels, kind
        for name in (INDEX, PIXELS):
            open_regular(folder / name).close()  # refuses pipes, on which NumPy would wait
        # Plain arrays are faster to slice; read-only, because a writable map would count as memory.
        self.index = np.asarray(np.load(folder / INDEX, mmap_mode="r"))  # (N, 3)
        self.pixels = np.asarray(np.memmap(folder / PIXELS, dtype=np.uint8, mode="r"))

    def __reduce__(self) -> tuple:
        return type(self), (self.folder, self.channels, self.kind)  # without gigabytes of pixels

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> Image.Image | Tensor | None:
        pixels = self.levels(index)
        if pixels is None:
            return None
        if self.kind == "size":
            return torch.empty(self.channels, *pixels.shape[:2], dtype=torch.uint8, device="meta")
        if self.kind == "pil":
            return Image.fromarray(pixels[:, :, 0] if self.channels == 1 else pixels)
        return torch.from_numpy(pixels).permute(2, 0, 1)  # (C, H, W)

    def levels(self, index: int) -> np.ndarray | None:
        """The pixels of an image, (H, W, C) uint8; None if its file was unreadable."""
        offset, height, width = self.index[index].tolist()
        if height == 0:
            return None
        return self.pixels[offset : offset + height * width * self.channels].reshape(height, width, self.channels)
