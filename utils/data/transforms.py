"""Images to tensors: torchvision's v2 transforms for training and evaluation, and mixing of whole batches."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from utils.data.samplers import derive_seed
from utils.runtime.errors import UserError

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
AUTO_AUGMENTS = ("ra", "ta_wide", "augmix", *(policy.value for policy in v2.AutoAugmentPolicy))
BACKENDS = ("pil", "tensor")


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
    """PIL RGB or grey image to a uint8 tensor (C, crop_size, crop_size): random resized crop, flip, what is asked for.

    torchvision's classification preset, but for the last step: images stay uint8 until they are on the device
    (`Normalize`), and RandomErasing, which fills with 0 after normalisation there, fills with the rounded mean here.
    A grey image has the same values as its RGB copy would have, in one channel, or in three where RandomErasing fills
    each channel with another value.

    Raises UserError for bicubic automatic augmentation of tensors, which torchvision has not (and augmix needs).
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
    if gray and (auto_augment is not None or fills_in_colour):
        steps.append(ThreeChannels())  # torchvision augments one channel in other ways than three equal ones
    if auto_augment is not None:
        steps.append(_auto_augment(auto_augment, mode, ra_magnitude, augmix_severity))
    if backend == "pil":
        steps.append(ToTensor())
    if gray and auto_augment is not None and not fills_in_colour:
        steps.append(FirstChannel())
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
    """v2.PILToTensor of an RGB or grey image, uint8 (C, H, W), in a third of its time."""

    def forward(self, image: Image.Image | Tensor) -> Tensor:
        """A tensor, out of a cache, stays as it is."""
        if isinstance(image, Tensor):
            return image
        pixels = torch.from_numpy(np.array(image))  # (H, W) or (H, W, 3)
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


class ThreeChannels(nn.Module):
    """A grey image, PIL or tensor (1, H, W), as three equal channels."""

    def forward(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        return image.repeat(3, 1, 1) if isinstance(image, Tensor) else image.convert("RGB")


class FirstChannel(nn.Module):
    """A tensor (C, H, W) to (1, H, W)."""

    def forward(self, image: Tensor) -> Tensor:
        return image[:1]


def evaluation_transform(
    resize_size: int, crop_size: int, *, interpolation: str = "bilinear", backend: str = "pil"
) -> nn.Module:
    """PIL RGB or grey image to a uint8 tensor (C, crop_size, crop_size): shorter side to resize_size, then the centre.

    An image whose shorter side is of that size, out of a cache, keeps its pixels.
    """
    mode = v2.InterpolationMode(interpolation)
    resize = [v2.Resize(resize_size, interpolation=mode, antialias=True), v2.CenterCrop(crop_size)]
    return v2.Compose([ToTensor(), *resize] if backend == "tensor" else [*resize, ToTensor()])


def resize_transform(resize_size: int, *, interpolation: str = "bilinear", backend: str = "pil") -> nn.Module:
    """The evaluation's first step alone: PIL image to a uint8 tensor (C, H, W) with a shorter side of resize_size."""
    resize = v2.Resize(resize_size, interpolation=v2.InterpolationMode(interpolation), antialias=True)
    return v2.Compose([ToTensor(), resize] if backend == "tensor" else [resize, ToTensor()])


class CropAndFlip(nn.Module):
    """v2.RandomResizedCrop and v2.RandomHorizontalFlip in one, with the same draws and pixels, in less time.

    Of a small image, much of it goes into finding out what kind of input each transform was given.
    """

    def __init__(self, crop_size: int, mode: v2.InterpolationMode = v2.InterpolationMode.BILINEAR) -> None:
        super().__init__()
        self.crop, self.flip = v2.RandomResizedCrop(crop_size), v2.RandomHorizontalFlip()
        self.size, self.mode = [crop_size, crop_size], mode

    def draw(self, image: Image.Image | Tensor) -> tuple[dict[str, int], bool]:
        """The crop (top, left, height, width), and whether it is flipped."""
        return self.crop.make_params([image]), bool(torch.rand(1) < self.flip.p)

    def forward(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        crop, flipped = self.draw(image)
        image = F.resized_crop(image, **crop, size=self.size, interpolation=self.mode, antialias=True)
        return F.horizontal_flip(image) if flipped else image


class DrawCrop(CropAndFlip):
    """Draw what `training_transform` draws for an image, and leave the crop to the device (`DeviceImages`)."""

    def forward(self, image: Tensor) -> Tensor:
        """A tensor (C, H, W), of which only the size counts, to (5,) int64: top, left, height, width, flip."""
        crop, flipped = self.draw(image)
        return torch.tensor([crop["top"], crop["left"], crop["height"], crop["width"], flipped])


class Normalize(nn.Module):
    """uint8 images (B, 1 or 3, S, S) to float32 (B, 3, S, S), (x / 255 - mean) / std; one channel becomes three alike.

    mean and std have one value or three. memory_format: of the result.
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
        # Buffers, since torchvision's normalize copies both to the device at every call, and waits; and as one product
        # and one sum, since each pass over float images takes as long as reading them all.
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (mean / std).float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1).contiguous(memory_format=self.memory_format)  # a quarter of float's bytes
        return (images * self.scale).sub_(self.shift)


def three_values(values: tuple[float, ...]) -> list[float]:
    """One value for all three channels, or three values."""
    return list(values) * 3 if len(values) == 1 else list(values)


class BatchMixing(nn.Module):
    """MixUp and CutMix of a batch on the device, one of them at random if both are asked for; else nothing.

    What is drawn depends on (seed, epoch, step, rank) only.
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, num_classes: int, seed: int, rank: int) -> None:
        """Raises UserError for a single class, whose mixture is no mixture."""
        super().__init__()
        if num_classes < 2 and (mixup_alpha > 0 or cutmix_alpha > 0):
            raise UserError("--mixup-alpha and --cutmix-alpha need at least two classes.")
        choices: list[nn.Module] = []
        if mixup_alpha > 0:
            choices.append(v2.MixUp(alpha=mixup_alpha, num_classes=num_classes))
        if cutmix_alpha > 0:
            choices.append(v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes))
        self.mix = v2.RandomChoice(choices) if choices else None
        self.seed, self.rank = seed, rank

    def forward(self, images: Tensor, targets: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) float32; targets (B,) int64, which become (B, C) probabilities if anything is mixed."""
        if self.mix is None:
            return images, targets
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(derive_seed("mixing", self.seed, epoch, step, self.rank))
        try:
            return self.mix(images, targets)
        finally:
            torch.random.set_rng_state(state)
