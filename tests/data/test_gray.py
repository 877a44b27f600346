"""--gray: grey images keep the numbers that they have without it, through every transform and cache."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_image
from tests.helpers.caches import splits
from utils.choices import AUTO_AUGMENTS, BACKENDS
from utils.data.samplers import SampleKey
from utils.data.transforms import Normalize, evaluation_transform, training_transform

CROP = 16
MEANS = [(0.3162,), (0.2, 0.5, 0.75)]


def grey_image(seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, generator.integers(6, 60, 2), dtype=np.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [None, *AUTO_AUGMENTS])
def test_one_channel_is_augmented_like_three(name, backend):
    for interpolation in ("bilinear", "nearest"):
        for mean, random_erase in ((MEANS[0], 0.0), (MEANS[0], 0.5), (MEANS[1], 0.5)):
            options = {"auto_augment": name, "interpolation": interpolation, "backend": backend}
            gray, colour = (
                training_transform(CROP, mean, random_erase=random_erase, gray=is_gray, **options)
                for is_gray in (True, False)
            )
            normalize = Normalize(mean, (0.3213,))
            for seed in range(12):
                torch.manual_seed(seed)
                one_channel = gray(grey_image(seed))
                torch.manual_seed(seed)
                three_channels = colour(grey_image(seed).convert("RGB"))
                torch.manual_seed(seed)
                assert torch.equal(colour(grey_image(seed)), three_channels), (interpolation, mean, seed)
                assert one_channel.dtype == torch.uint8
                equal = torch.equal(normalize(one_channel[None]), normalize(three_channels[None]))
                assert equal, (interpolation, mean, seed)


def test_gray_stays_one_channel_unless_erasing_needs_three():
    for name in (None, *AUTO_AUGMENTS):
        for mean, random_erase, channels in ((MEANS[0], 0.5, 1), (MEANS[1], 0.0, 1), (MEANS[1], 0.5, 3)):
            transform = training_transform(CROP, mean, auto_augment=name, random_erase=random_erase, gray=True)
            assert transform(grey_image(0)).shape == (channels, CROP, CROP)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_one_channel_is_evaluated_like_three(interpolation, backend):
    options = {"interpolation": interpolation, "backend": backend}
    gray, colour = (evaluation_transform(20, CROP, gray=is_gray, **options) for is_gray in (True, False))
    for seed in range(25):
        image = grey_image(seed)
        three_channels = colour(image.convert("RGB"))
        assert torch.equal(colour(image), three_channels)
        assert gray(image).shape == (1, CROP, CROP) and torch.equal(gray(image).expand(3, -1, -1), three_channels)


@pytest.mark.parametrize(
    ("kind", "flags"),
    [("host", ["--auto-augment", "augmix"]), ("host", ["--auto-augment", "ra", "--backend", "tensor"]), ("device", [])],
)
def test_training_from_a_cache_has_the_same_numbers_with_gray(kind, flags, tmp_path):
    for index in range(6):
        pixels = np.asarray(grey_image(index))
        pixels = pixels if index % 2 else np.repeat(pixels[:, :, None], 3, axis=2)  # grey stored as colour
        for split in ("train", "val"):
            write_image(tmp_path / "data" / split / "ab"[index % 2] / f"{index}.png", pixels)
    batches = []
    for gray in ([], ["--gray"]):
        training = splits(tmp_path / "data", *flags, *gray, cache_dir=tmp_path / "cache", kind=kind).training
        batch = training.__getitems__([SampleKey(index, epoch) for index in range(6) for epoch in range(4)])
        batches.append(batch.images if training.on_device is None else training.on_device(batch.indices, batch.images))
    assert torch.equal(batches[0], batches[1].expand(-1, 3, -1, -1))
