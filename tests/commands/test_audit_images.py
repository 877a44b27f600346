"""What the audit measures of an image."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import idctn

from tests.helpers.audits import picture, put
from utils.audit.flags import CORRELATION
from utils.audit.images import descriptor, measure, measure_all
from utils.audit.report import normalisation
from utils.data.folders import ImageFiles
from utils.data.images import read_image

# Records


@pytest.mark.parametrize(
    ("mode", "name"),
    [("L", "x.png"), ("RGBA", "x.png"), ("P", "x.png"), ("LA", "x.png"), ("RGB", "x.jpg"), ("1", "x.bmp")],
)
def test_a_record_describes_the_pixels_that_training_reads(mode, name, tmp_path):
    colours = np.random.default_rng(1).integers(256, size=(9, 7, 3), dtype=np.uint8)
    Image.fromarray(colours).convert(mode).save(tmp_path / name)
    record = measure(tmp_path / name)
    pixels = np.asarray(read_image(tmp_path / name)).astype(float)  # (H, W, 3)
    gray = np.asarray(read_image(tmp_path / name, gray=True)).astype(float)
    channels = np.concatenate([pixels, gray[:, :, None]], axis=2).reshape(-1, 4)
    assert record["mean"] == pytest.approx(channels.mean(0))
    assert record["square"] == pytest.approx((channels**2).mean(0))
    assert (record["width"], record["height"]) == (7, 9)
    assert record["gray"] == (pixels == pixels[:, :, :1]).all() == (mode in ("L", "LA", "1"))
    assert record["mode"].decode() == mode
    assert record["format"].decode() == {"png": "PNG", "jpg": "JPEG", "bmp": "BMP"}[name[2:]]


def test_identical_pixels_have_one_digest_however_they_are_stored(tmp_path):
    image = picture(0, 12, 8)
    for name, stored in (
        ("plain.png", image),
        ("fast.png", image),
        ("colour.png", image.convert("RGB")),
        ("other.bmp", image),
        ("turned.png", Image.fromarray(np.asarray(image).reshape(12, 8))),
        ("tinted.png", Image.merge("RGB", (image, image, image.point(lambda level: level ^ 1)))),
    ):
        stored.save(tmp_path / name, **({"compress_level": 0} if name == "fast.png" else {}))
    digest = {path.stem: measure(path)["pixels"].tobytes() for path in tmp_path.iterdir()}
    assert digest["plain"] == digest["fast"] == digest["colour"] == digest["other"]
    assert len(set(digest.values())) == 3


def correlation(first: Image.Image, second: Image.Image) -> float:
    return np.corrcoef(descriptor(first)[1:], descriptor(second)[1:])[0, 1]


def test_descriptors_of_one_view_correlate():
    for seed in range(10):
        image = picture(seed, 100, 80)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        speck = image.copy()
        speck.putpixel((20, 20), (image.getpixel((20, 20)) + 40) % 256)
        darker, smaller = image.point(lambda level: level * 0.8), image.resize((50, 40), Image.Resampling.BICUBIC)
        contrast = ImageEnhance.Contrast(image).enhance(1.2)
        for same in (Image.open(buffer), speck, darker, smaller, contrast):
            assert correlation(image, same) >= CORRELATION
        assert correlation(image, picture(seed + 100, 100, 80)) < 0.6
        assert correlation(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) < 0.6


def test_descriptors_correlate_like_the_gradients_of_the_images():
    """For images of 32 x 32 pixels, which are not resized, and without detail that a descriptor drops."""
    waves = np.zeros((2, 32, 32))
    waves[:, :20, :20] = np.random.default_rng(0).normal(size=(2, 20, 20))
    waves[1] += waves[0]
    pixels = 100 + 50 * idctn(waves, axes=(1, 2), norm="ortho")
    gradients = [np.concatenate([np.diff(image, axis=axis).ravel() for axis in (0, 1)]) for image in pixels]
    cosine = gradients[0] @ gradients[1] / np.linalg.norm(gradients[0]) / np.linalg.norm(gradients[1])
    first, second = (descriptor(Image.fromarray(image.astype(np.float32))).astype(float) for image in pixels)
    assert first @ second / np.linalg.norm(first) / np.linalg.norm(second) == pytest.approx(cosine, abs=1e-3)
    assert 0.6 < cosine < 0.8


def test_descriptors_by_hand():
    wave = np.tile(np.cos(np.pi * (np.arange(32) + 0.5) / 32), (32, 1)).astype(np.float32)  # half a period to the right
    for pixels, expected in (
        (100 + 50 * wave, [1, 127, 0]),
        (60 - 20 * wave, [1, -127, 0]),
        (100 + 50 * wave.T, [1, 0, 127]),
        (0 * wave + 90, [1, 0, 0]),
    ):
        assert descriptor(Image.fromarray(pixels)).tolist() == expected + [0] * 397


def test_mean_and_standard_deviation_by_hand(tmp_path):
    """Of a black, a white and a half-white image, weighted by image and by pixel."""
    half = np.zeros((4, 6), np.uint8)
    half[:2] = 255
    for name, pixels in (("0", np.zeros((2, 2))), ("1", np.full((2, 3), 255)), ("2", half)):
        put(tmp_path / "c" / f"{name}.png", Image.fromarray(pixels.astype(np.uint8)))
    records = measure_all(ImageFiles.find(tmp_path), 0).records
    mean, std = normalisation(records, np.ones(3))
    assert mean == pytest.approx([0.5] * 4)
    assert std == pytest.approx([0.5] * 4)
    mean, std = normalisation(records, records["width"] * records["height"])  # 18 white pixels of 34
    assert mean == pytest.approx([18 / 34] * 4)
    assert std == pytest.approx([np.sqrt(18 / 34 * 16 / 34)] * 4)
