"""Crops on the device against the crops of Pillow and torch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from tests.helpers.caches import CPU, built, splits
from utils.data.device_crops import DeviceImages, _to_device
from utils.data.samplers import SampleKey
from utils.runtime.errors import UserError

SIZE = 24  # of the resized crops, pixels


def random_crops(generator: np.random.Generator, number: int) -> list[tuple[int, int]]:
    """Heights and widths: tall, wide, tiny, and of the target size in one direction or in both."""
    sides = {"short": (1, 12), "long": (100, 400), "any": (1, 90), "same": (SIZE, SIZE + 1)}
    kinds = [("long", "short"), ("short", "long"), ("any", "any"), ("same", "any"), ("any", "same"), ("same", "same")]
    return [
        tuple(int(generator.integers(*sides[side])) for side in kinds[index % len(kinds)]) for index in range(number)
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("backend", "mode"), [("pil", "bilinear"), ("tensor", "bilinear"), ("tensor", "bicubic")])
def test_crops_of_any_shape_are_within_two_levels_of_the_host(backend, mode, channels):
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate(random_crops(generator, 120)):
        top, left, bottom, right = generator.integers(0, 8, 4).tolist()  # pixels around the crop
        shape = (top + height + bottom, left + width + right, channels)
        pixels = generator.choice(np.array([0, 255], np.uint8), shape)  # which bicubic filters overshoot most
        cache = SimpleNamespace(index=np.array([[0, *shape[:2]]]), channels=channels, pixels=pixels.reshape(-1))
        flip = number % 2
        crop = torch.tensor([[top, left, height, width, flip]])
        resized = DeviceImages(cache, SIZE, mode, CPU)(torch.tensor([0]), crop)[0]
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if backend == "pil":
            image = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
        expected = F.resized_crop(
            image, top, left, height, width, [SIZE, SIZE], InterpolationMode(mode), antialias=True
        )
        expected = F.pil_to_tensor(expected) if backend == "pil" else expected
        expected = expected.flip(2) if flip else expected
        assert (resized.int() - expected.int()).abs().max() <= 2, (height, width)


@pytest.mark.parametrize("flags", [[], ["--gray"], ["--interpolation", "bicubic"]])
def test_the_device_draws_the_crops_of_the_host(flags, folder, tmp_path):
    host, device = (
        splits(folder, *flags, "--backend", "tensor", cache_dir=tmp_path, kind=kind).training
        for kind in ("host", "device")
    )
    for epoch in range(20):
        keys = [SampleKey(index, epoch) for index in range(len(host))]
        expected, drawn = host.__getitems__(keys), device.__getitems__(keys)
        assert drawn.images.shape == (10, 5)
        images = device.on_device(drawn.indices, drawn.images)
        assert (images.dtype, images.shape) == (torch.uint8, expected.images.shape)
        difference = (images.int() - expected.images.int()).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.3
        assert torch.equal(drawn.targets, expected.targets)


def test_too_little_memory_on_the_device_is_an_error(folder, tmp_path, monkeypatch):
    pixels = torch.from_numpy(built(folder, tmp_path).open("size").pixels)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20_000, 40_000))
    with pytest.raises(UserError, match=r"training images take 0\.0 GB, but cuda:0 has only 0\.0 GB free; give host"):
        _to_device(pixels, torch.device("cuda:0"))
