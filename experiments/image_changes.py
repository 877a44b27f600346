"""Changes of test images that experiments/shifts.py tests classifiers under, and their strengths.

They change the 8-bit images of S x S pixels that the classifier gets. The strengths were fixed before arms were
compared, with one model of Plan S's arm `none` (seed 0, which the plan does not use): none brings it near chance.

  contrast      distances of the pixels from the image's mean x 0.7, x 1.4
  gamma         exponent 0.7, 1.4
  noise         Gaussian, standard deviation 0.05, 0.1 of the full range
  speckle       each pixel x (1 + Gaussian noise of standard deviation 0.2, 0.4)
  blur          Gaussian, standard deviation S / 48, S / 24
  resolution    scaled down to S / 2, S / 4 and up again
  border        black, of width S / 24, S / 12

The noise of an image depends on its place in the test set only: it is the same for all arms and strengths.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from utils.data.samplers import derive_seed

CLEAN = "clean"


def unchanged(images: Tensor, noise: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield CLEAN, images


def shifted(images: Tensor, noise: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The images (B, C, S, S) uint8, unchanged and under each change, with its name.

    noise: (B, C, S, S) float32, standard normal.
    """
    size = images.shape[-1]
    yield from unchanged(images, noise)
    for factor in (0.7, 1.4):
        yield f"contrast x {factor}", F.adjust_contrast(images, factor)
    for exponent in (0.7, 1.4):
        yield f"gamma {exponent}", F.adjust_gamma(images, exponent)
    for deviation in (0.05, 0.1):
        yield f"noise {deviation}", _as_bytes(images + 255 * deviation * noise)
    for deviation in (0.2, 0.4):
        yield f"speckle {deviation}", _as_bytes(images * (1 + deviation * noise))
    for part in (48, 24):
        sigma = size / part
        # Three deviations on each side, unless the image is so small that reflection at its border ends before.
        yield f"blur S / {part}", F.gaussian_blur(images, 2 * min(round(3 * sigma), size - 1) + 1, sigma)
    for part in (2, 4):
        small = F.resize(images, [max(1, size // part)] * 2, antialias=True)
        yield f"resolution S / {part}", F.resize(small, [size, size], antialias=True)
    for part in (24, 12):
        width = max(1, round(size / part))
        yield f"border S / {part}", F.pad(F.center_crop(images, [size - 2 * width] * 2), [width])


def _as_bytes(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


def image_noise(indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (B, *shape) float32, which depends on the index of each image only."""
    generator = torch.Generator()
    seeds = (derive_seed("shift", index) for index in indices)
    return torch.stack([torch.randn(*shape, generator=generator.manual_seed(seed)) for seed in seeds])
