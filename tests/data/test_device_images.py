"""Crops on the device against the crops of Pillow and torch, for crops of any shape."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from _normal import train as normal
from tests.conftest import SMALL
from utils import arguments
from utils.data import splits as wiring_data
from utils.data.device_crops import DeviceImages
from utils.runtime.errors import UserError

CPU = torch.device("cpu")
SIZE = 24  # of the crops made, pixels


def hard_image(generator: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    """Black and white noise (H, W, C), which bicubic filters overshoot most."""
    return generator.choice(np.array([0, 255], np.uint8), (height, width, channels))


def random_crops(generator: np.random.Generator, number: int) -> list[tuple[int, int]]:
    """Heights and widths: tall, wide, tiny, and of the size made in one direction or in both."""
    sides = {"short": (1, 12), "long": (100, 400), "any": (1, 90), "same": (SIZE, SIZE + 1)}
    kinds = [("long", "short"), ("short", "long"), ("any", "any"), ("same", "any"), ("any", "same"), ("same", "same")]
    return [
        tuple(int(generator.integers(*sides[side])) for side in kinds[index % len(kinds)]) for index in range(number)
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("backend", "mode"), [("pil", "bilinear"), ("tensor", "bilinear"), ("tensor", "bicubic")])
def test_crops_of_any_shape_are_within_two_levels_of_the_host(backend, mode, channels):
    generator = np.random.default_rng(0)
    for height, width in random_crops(generator, 120):
        top, left, bottom, right = generator.integers(0, 8, 4).tolist()  # pixels around the crop
        pixels = hard_image(generator, top + height + bottom, left + width + right, channels)
        cache = SimpleNamespace(
            index=np.array([[0, *pixels.shape[:2]]]), channels=channels, pixels=np.ascontiguousarray(pixels).reshape(-1)
        )
        crop = torch.tensor([[top, left, height, width, 0]])
        made = DeviceImages(cache, SIZE, mode, CPU)(torch.tensor([0]), crop)[0]
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if backend == "pil":
            image = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
        expected = F.resized_crop(
            image, top, left, height, width, [SIZE, SIZE], InterpolationMode(mode), antialias=True
        )
        expected = F.pil_to_tensor(expected) if backend == "pil" else expected
        assert (made.int() - expected.int()).abs().max() <= 2, (height, width)


def opened(image_folder, tmp_path, *flags):
    parser = normal.build_parser()
    flags = [*SMALL, "--data-path", image_folder, "--cache-dir", tmp_path, "--interpolation", "bicubic", *flags]
    args = arguments.for_fresh_start(parser, arguments.parse_given(parser, list(map(str, flags))))
    return wiring_data.open_splits(args)


def test_bicubic_crops_on_the_device_need_the_tensor_backend(image_folder, tmp_path):
    for flags in ([], ["--gray"], ["--backend", "pil"]):
        with pytest.raises(
            UserError, match=r"bicubic with --backend pil, whose .*; give --backend tensor, --interpolation"
        ):
            opened(image_folder, tmp_path, "--cache-dataset", "device", *flags)
    opened(image_folder, tmp_path, "--cache-dataset", "device", "--backend", "tensor")
    opened(image_folder, tmp_path, "--cache-dataset", "host")
    opened(image_folder, tmp_path, "--cache-dataset", "device", "--test-only", "--resume", "x.pth")
