"""What the audit measures of an image, and the search for near-duplicates."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.audits import picture, put
from utils.audit.__main__ import DISTANCE
from utils.audit.duplicates import find_groups
from utils.audit.images import difference_hash, measure, measure_all
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


def test_a_difference_hash_changes_little_with_the_same_view():
    def distance(first: Image.Image, second: Image.Image) -> int:
        return int(np.bitwise_count(difference_hash(first) ^ difference_hash(second)).sum())

    for seed in range(10):
        image = picture(seed, 100, 80)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        speck = image.copy()
        speck.putpixel((20, 20), (image.getpixel((20, 20)) + 40) % 256)
        darker, smaller = image.point(lambda level: level * 0.8), image.resize((50, 40), Image.Resampling.BICUBIC)
        assert all(distance(image, same) <= DISTANCE for same in (Image.open(buffer), speck, darker, smaller))
        assert distance(image, picture(seed + 100, 100, 80)) > 30
        assert distance(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 30
    assert not difference_hash(Image.new("L", (20, 20), 90)).any()


def test_a_difference_hash_by_hand():
    """A 12 x 12 image is not resized: a ramp to the right sets the first half of the bits, one down the second."""
    ramp = np.tile(np.arange(0, 240, 20, dtype=np.uint8), (12, 1))
    for pixels, expected in ((ramp, [1] * 121 + [0] * 135), (ramp.T, [0] * 121 + [1] * 121 + [0] * 14)):
        bits = np.unpackbits(difference_hash(Image.fromarray(pixels)).view(np.uint8))
        assert bits.tolist() == expected


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


# Near-duplicates


def components(hashes: np.ndarray, distance: int) -> set[frozenset[int]]:
    """Groups of near hashes, found by comparing all pairs."""
    sets = [{index} for index in range(len(hashes))]
    bits = np.bitwise_count(hashes[:, None] ^ hashes).sum(axis=2)  # of all pairs, (N, N)
    for left, right in np.argwhere(bits <= distance).tolist():
        if sets[left] is not sets[right]:
            sets[right] |= sets[left]
            for index in sets[left]:
                sets[index] = sets[right]
    return {frozenset(group) for group in sets if len(group) > 1}


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 9), st.integers(1, 4), st.integers(0, 40), st.booleans(), st.booleans()
)
def test_banded_search_finds_what_comparing_all_pairs_finds(seed, distance, words, count, sparse, blocks):
    """For hashes around three centres, or around zero, which share bands of zeros; in blocks from two hashes on."""
    rng = np.random.default_rng(seed)
    centres = rng.integers(2**63, size=(3, words), dtype=np.uint64) * np.uint64(not sparse)
    bits = np.unpackbits(centres[rng.integers(3, size=count)].view(np.uint8), axis=1)
    for row in bits:
        row[rng.choice(bits.shape[1], rng.integers(12), replace=False)] ^= 1
    hashes = np.packbits(bits, axis=1).view(np.uint64).reshape(count, words)
    with pytest.MonkeyPatch.context() as patch:
        if blocks:
            patch.setattr("utils.audit.duplicates.LARGE", 2)
            patch.setattr("utils.audit.duplicates.BLOCK", 32)
        groups = find_groups(hashes, distance)
    assert {frozenset(group.tolist()) for group in groups} == components(hashes, distance)
    assert [group[0] for group in groups] == sorted(group.min() for group in groups)


def test_a_chain_is_one_group_although_few_edges_are_held_at_a_time(monkeypatch):
    monkeypatch.setattr("utils.audit.duplicates.EDGES", 3)
    chain = np.packbits(np.tri(64, dtype=np.uint8), axis=1).view(np.uint64)  # each one bit from the next
    assert [group.tolist() for group in find_groups(chain, 1)] == [list(range(64))]
    assert find_groups(chain, 0) == []
