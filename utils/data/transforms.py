"""Transforms for training and evaluation (torchvision v2), and MixUp and CutMix of batches."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from utils.data.samplers import derive_seed, seeded
from utils.runtime.errors import UserError


def training_transform(
    crop_size: int,
    mean: tuple[float, ...],
    *,
    interpolation: str = "bilinear",
    auto_augment: str | None = None,
    ra_magnitude: int = 9,
    augmix_severity: int = 3,
    random_erase: float = 0.0,
    backend: str = "pil",
    gray: bool = False,
) -> nn.Module:
    """PIL RGB or grey image to a uint8 tensor (C, crop_size, crop_size): random resized crop, flip, augmentations.

    torchvision's classification preset, except that images stay uint8 until `Normalize` on the device, so that
    RandomErasing fills with the rounded mean (the preset: with 0 after normalisation). C is 3, also for a grey image;
    with `gray`, for which all images must be grey, 1, or 3 if RandomErasing fills the channels with different values.

    Raises UserError for bicubic automatic augmentation of tensors (always used by augmix): torchvision has none.
    """
    if interpolation == "bicubic" and (auto_augment == "augmix" or (auto_augment is not None and backend == "tensor")):
        raise UserError(
            f"--interpolation bicubic: torchvision cannot use it for --auto-augment {auto_augment} with --backend "
            f"{backend}; give bilinear or nearest."
        )
    mode = v2.InterpolationMode(interpolation)
    steps: list[nn.Module] = [ToTensor()] if backend == "tensor" else []
    steps.append(CropAndFlip(crop_size, mode))
    fill = [round(255 * value) for value in three_values(mean)]
    fills_in_colour = random_erase > 0 and len(set(fill)) > 1
    if auto_augment is not None:
        # torchvision augments one channel differently from three equal ones.
        steps += [ThreeChannels(), _auto_augment(auto_augment, mode, ra_magnitude, augmix_severity)]
    if backend == "pil":
        steps.append(ToTensor())
    if not gray or fills_in_colour:
        steps.append(ThreeChannels())
    elif auto_augment is not None:
        steps.append(v2.Lambda(first_channel))
    if random_erase > 0:
        steps.append(v2.RandomErasing(p=random_erase, value=fill[:1] if gray and not fills_in_colour else fill))
    return v2.Compose(steps)


def _auto_augment(name: str, mode: v2.InterpolationMode, ra_magnitude: int, augmix_severity: int) -> nn.Module:
    if name == "ra":
        return v2.RandAugment(interpolation=mode, magnitude=ra_magnitude)
    if name == "ta_wide":
        return v2.TrivialAugmentWide(interpolation=mode)
    if name == "augmix":
        return v2.AugMix(interpolation=mode, severity=augmix_severity)
    return v2.AutoAugment(policy=v2.AutoAugmentPolicy(name), interpolation=mode)


class ToTensor(nn.Module):
    """v2.PILToTensor of an RGB or grey image, uint8 (C, H, W), three times as fast."""

    def forward(self, image: Image.Image | Tensor) -> Tensor:
        """A tensor (from a cache) is returned unchanged."""
        if isinstance(image, Tensor):
            return image
        pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, 3)
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


class ThreeChannels(nn.Module):
    """RGB from a grey PIL image, (3, H, W) from (1, H, W). RGB stays as it is; v2.RGB would copy it."""

    def forward(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        if isinstance(image, Tensor):
            return image if len(image) == 3 else image.repeat(3, 1, 1)
        return image if image.mode == "RGB" else image.convert("RGB")


def first_channel(image: Tensor) -> Tensor:
    return image[:1]


def evaluation_transform(
    resize_size: int,
    crop_size: int | None,
    *,
    interpolation: str = "bilinear",
    backend: str = "pil",
    gray: bool = False,
) -> nn.Module:
    """PIL RGB or grey image to a uint8 tensor (C, crop_size, crop_size): shorter side to resize_size, centre crop.

    C is 3, also for a grey image; with `gray`, for which all images must be grey, 1.
    crop_size: None for the resize alone, as in a cache; the resize does not change images from a cache.
    """
    steps = [v2.Resize(resize_size, interpolation=v2.InterpolationMode(interpolation), antialias=True)]
    if crop_size is not None:
        steps.append(v2.CenterCrop(crop_size))
    steps = [ToTensor(), *steps] if backend == "tensor" else [*steps, ToTensor()]
    return v2.Compose(steps if gray else [*steps, ThreeChannels()])


class CropAndFlip(nn.Module):
    """v2.RandomResizedCrop and v2.RandomHorizontalFlip in one, with the same draws and pixels.

    Faster: for small images, torchvision spends much of the time on finding the type of each transform's input.
    """

    def __init__(self, crop_size: int, mode: v2.InterpolationMode = v2.InterpolationMode.BILINEAR) -> None:
        super().__init__()
        self.crop, self.flip = v2.RandomResizedCrop(crop_size), v2.RandomHorizontalFlip()
        self.size, self.mode = [crop_size, crop_size], mode

    def draw(self, image: Image.Image | Tensor) -> tuple[dict[str, int], bool]:
        """The crop (top, left, height, width) and whether to flip it."""
        return self.crop.make_params([image]), bool(torch.rand(1) < self.flip.p)

    def forward(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        crop, flipped = self.draw(image)
        image = F.resized_crop(image, **crop, size=self.size, interpolation=self.mode, antialias=True)
        return F.horizontal_flip(image) if flipped else image


class DrawCrop(CropAndFlip):
    """Draws the crop of `training_transform` but leaves the cropping to the device (`DeviceImages`)."""

    def forward(self, image: Tensor) -> Tensor:
        """A tensor (C, H, W), whose values are not read, to (5,) int64: top, left, height, width, flip."""
        crop, flipped = self.draw(image)
        return torch.tensor([crop["top"], crop["left"], crop["height"], crop["width"], flipped])


class Normalize(nn.Module):
    """uint8 images (B, 1 or 3, S, S) to float32 (B, 3, S, S): (x / 255 - mean) / std; one channel is repeated.

    mean, std: one value or three. memory_format: of the result.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.memory_format = memory_format
        std = torch.tensor(three_values(std), dtype=torch.float64).view(3, 1, 1)
        mean = torch.tensor(three_values(mean), dtype=torch.float64).view(3, 1, 1)
        # Buffers, because torchvision's normalize copies both to the device at every call, and waits. As one product
        # and one sum, because each pass over float images takes as long as reading them.
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (mean / std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        # Expanded as bytes, a quarter of float32.
        images = images.expand(-1, 3, -1, -1).contiguous(memory_format=self.memory_format)
        return (images * self.scale).sub_(self.shift)


def three_values(values: tuple[float, ...]) -> list[float]:
    """Three values from one or three."""
    return list(values) * 3 if len(values) == 1 else list(values)


class BatchMixing(nn.Module):
    """MixUp or CutMix of a batch on the device, one of them at random if both are enabled.

    The random numbers depend on (seed, epoch, step, rank) only.
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, num_classes: int, seed: int, rank: int) -> None:
        """Raises UserError for fewer than two classes."""
        super().__init__()
        if num_classes < 2 and (mixup_alpha > 0 or cutmix_alpha > 0):
            raise UserError("--mixup-alpha and --cutmix-alpha need at least two classes.")
        alphas = {v2.MixUp: mixup_alpha, v2.CutMix: cutmix_alpha}
        choices = [mix(alpha=alpha, num_classes=num_classes) for mix, alpha in alphas.items() if alpha > 0]
        self.mix = v2.RandomChoice(choices) if choices else None
        self.seed, self.rank = seed, rank

    def forward(self, images: Tensor, targets: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """images: (B, 3, S, S) float32. targets: (B,) int64; mixed ones are probabilities (B, C)."""
        if self.mix is None:
            return images, targets
        with seeded(derive_seed("mixing", self.seed, epoch, step, self.rank)):
            return self.mix(images, targets)
