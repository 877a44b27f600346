"""RadImageNet's correction masks: by hand, with OpenCV's pixels, the same from folder and archive."""

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import MakesAFolder
from tests.helpers.radimagenet import contents, expected, fails, pack, rows_of
from utils.radimagenet import images as radimagenet_images
from utils.radimagenet.__main__ import prepare
from utils.radimagenet.masks import correct, read_mask, resize
from utils.runtime.errors import UserError


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def uniform(*colour: int) -> Image.Image:
    return Image.new("RGB", (30, 20), colour)


def filled(dtype: str, *values: float) -> np.ndarray:
    """(224, 224, C) of a constant for each channel."""
    return np.full((224, 224, len(values)), values, dtype=dtype)


@pytest.mark.parametrize(
    ("colour", "mask", "corrected"),
    [
        ((10, 20, 30), filled("uint8", 1, 2, 3), (13, 22, 31)),  # blue, green, red
        ((10, 20, 30), filled("uint8", 250, 250, 250), (4, 14, 24)),  # modulo 256: -6
        ((10, 20, 30), filled("int16", -15, -15, -15), (0, 5, 15)),  # clipped
        ((250, 20, 30), filled("int64", 10), (255, 30, 40)),
        ((10, 20, 30), filled("float32", 0.5, 1.5, 0.25), (10, 22, 30)),  # halves to even: 10.25, 21.5, 30.5
        ((10, 20, 30), filled("float64", -1e300), (0, 0, 0)),
        ((10, 10, 10), np.full((224, 224), 5, "int8"), (15, 15, 15)),
    ],
)
def test_masks_are_added_by_hand(colour, mask, corrected):
    image = correct(uniform(*colour), read_mask(npy(mask), "mask"))
    assert image.size == (224, 224)
    assert image.mode == ("L" if len(set(corrected)) == 1 else "RGB")
    assert (np.asarray(image.convert("RGB")) == corrected).all()


def test_masks_are_added_pixel_by_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224), dtype=np.uint8)
    mask = np.zeros((224, 224), np.uint8)
    mask[3, 200] = 7
    pixels[3, 200] = 251
    found = np.asarray(correct(Image.fromarray(pixels).convert("RGB"), mask))
    assert found[3, 200] == 2  # 258 modulo 256
    found = found.copy()
    found[3, 200] = 251
    assert np.array_equal(found, pixels)


@pytest.mark.parametrize(
    ("shape", "digest"),
    [((256, 256), "db2b9777fafc487f"), ((600, 800), "3ba94e0a4c7f86ad"), ((113, 448), "52d6cc43cd69a4a4")],
)
def test_resizing_has_the_pixels_of_opencv(shape, digest):
    # From cv2.resize(pixels, (224, 224)) of OpenCV 4.10.0 and of 5.0.0.
    pixels = np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert hashlib.sha256(resize(pixels).tobytes()).hexdigest()[:16] == digest


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(1, 700), st.integers(1, 700)))
def test_resizing_is_bilinear_without_antialiasing(shape):
    pixels = np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)
    exact = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    exact = torch.nn.functional.interpolate(exact, (224, 224), mode="bilinear")[0].permute(1, 2, 0).numpy()
    assert np.abs(resize(pixels) - exact).max() < 1.01  # OpenCV's fixed point cuts off where it shifts


def test_halving_is_the_mean_of_four():
    pixels = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    means = pixels.reshape(224, 2, 224, 2, 3).sum(axis=(1, 3), dtype=int)
    assert np.array_equal(resize(pixels), (means + 2) // 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros((223, 224))), r"holds \(223, 224\); expected an array \(224, 224\)"),
        (npy(np.zeros((3, 224, 224))), "expected an array"),
        (npy(np.zeros((224, 224), bool)), "numbers of the type bool"),
        (npy(np.zeros((224, 224), np.uint16)), "numbers of the type uint16"),
        (npy(np.zeros((224, 224), complex)), "numbers of the type complex128"),
        (npy(np.full((224, 224), np.nan)), "not finite"),
        (npy(np.full((224, 224), -np.inf, np.float16)), "not finite"),
        (npy(np.zeros((224, 224)))[:-1], "cannot be read as an array"),
        (npy(np.zeros((224, 224))).replace(b"(224, 224)", b"(2**9, 1)"), "cannot be read as an array"),
        (npy(np.zeros((224, 224))).replace(b"(224, 224), }  ", b"(10**12,), } "), "cannot be read as an array"),
        (b"", "cannot be read as an array"),
        (b"PK\x03\x04", "cannot be read as an array"),
    ],
)
def test_what_is_no_mask_is_refused(data, message):
    with pytest.raises(UserError, match=f"^mask: .*{message}"):
        read_mask(data, "mask")


def test_masks_are_not_unpickled(tmp_path):
    data = npy(np.array([MakesAFolder(tmp_path / "made")], dtype=object))
    with pytest.raises(UserError, match="mask: cannot be read as an array"):
        read_mask(data, "mask")
    assert not (tmp_path / "made").exists()


@pytest.fixture
def masks(source: Path, tmp_path: Path) -> Path:
    """A folder with masks for the four ultrasound images, and for none of the others."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for number, image in enumerate(sorted((source / "radiology_ai/US/liver").iterdir())):
        mask = np.random.default_rng(number).integers(-9, 10, (224, 224, 3)).astype(np.int16)
        np.save(folder / f"{image.stem}.npy", mask)
    return folder


def pack_masks(masks: Path, archive: Path, name: Callable[[str], str] = lambda name: name) -> Path:
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for path in sorted(masks.iterdir(), reverse=True):
            tar.add(path, name(path.name))
    return archive


def test_corrected_images_are_the_same_on_all_ways(source, masks, output, tmp_path, monkeypatch):
    prepare(output, source, correction_masks=masks)
    found, plain = contents(output), expected(source)
    for name, data in found.items():
        if "US__" in name:
            image = Image.open(source / "radiology_ai/US/liver" / Path(name).name).convert("RGB")
            pixels = resize(np.asarray(image)).astype(int) + np.load(masks / f"{Path(name).stem}.npy")[:, :, ::-1]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels.clip(0, 255))
            assert not (output / name).is_symlink()
        else:
            assert data == plain[name]
            assert (output / name).is_symlink()
    packed = pack_masks(masks, tmp_path / "masks.tar.gz", lambda name: f"correction_masks/{name}")
    flat = pack_masks(masks, tmp_path / "flat.tar.gz")
    archive = pack(source, tmp_path / "images.tar.gz")
    ways = [{"source": source, "correction_masks": path} for path in (masks, packed, flat)]
    ways.append({"archive": archive, "correction_masks": masks})
    for number, arguments in enumerate(ways):
        prepare(tmp_path / str(number), **arguments)
        assert contents(tmp_path / str(number)) == found
        with monkeypatch.context() as patches:
            patches.setattr(radimagenet_images, "write", None)  # a second run writes nothing
            prepare(tmp_path / str(number), **arguments)


@pytest.mark.parametrize("way", ["folder", "archive of masks", "archive of images"])
def test_images_without_a_mask_are_missing(source, masks, output, tmp_path, way):
    (masks / "train1.npy").unlink()
    path = pack_masks(masks, tmp_path / "masks.tar.gz") if way == "archive of masks" else masks
    arguments = {"correction_masks": path, "source": source}
    if way == "archive of images":
        arguments = {"correction_masks": path, "archive": pack(source, tmp_path / "images.tar")}
    with pytest.raises(UserError, match="1 images that the lists name are missing, or their masks"):
        prepare(output, **arguments)
    assert rows_of(output / "missing.csv") == [["train", "radiology_ai/US/liver/train1.png"]]
    assert contents(output).keys() == expected(source).keys() - {"train/US__liver/train1.png"}


def test_a_plain_image_is_not_taken_for_a_corrected_one(source, masks, output):
    prepare(output, source, link="copy")
    assert "is there already, and is not what this run makes of " in fails(
        "--source", source, "--link", "copy", "--correction-masks", masks, output
    )
    (output / "train/US__liver/train1.png").unlink()
    prepare(output.with_name("other"), source)
    (masks / "train1.npy").unlink()
    for image in output.with_name("other").glob("*/US__liver/*"):
        if image.name != "train1.png":
            image.unlink()
    with pytest.raises(UserError, match=r"train1\.png: is there from an earlier run, but has no source or mask now"):
        prepare(output.with_name("other"), source, correction_masks=masks, allow_missing=True)


def test_bad_masks_and_images_are_named(source, masks, output, tmp_path):
    assert "holds no correction mask" in fails("--source", source, "--correction-masks", source, output)
    assert "is no folder and no .tar" in fails("--source", source, "--correction-masks", tmp_path / "no.tar", output)
    packed = pack_masks(masks, tmp_path / "masks.tar.gz")
    archive = pack(source, tmp_path / "images.tar")
    assert "unpack one of the two" in fails("--archive", archive, "--correction-masks", packed, output)
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for folder in ("a", "b"):
            tar.add(masks / "val0.npy", f"{folder}/val0.npy")
    assert "two masks named val0.npy" in fails("--source", source, "--correction-masks", tmp_path / "twice.tar", output)
    (masks / "val0.npy").write_bytes(b"no mask" * 300_000)
    assert "val0.npy: cannot be read as an array" in fails(
        "--source", source, "--correction-masks", masks, tmp_path / "new"
    )
    packed = pack_masks(masks, tmp_path / "masks.tar.gz")
    assert "masks.tar.gz: val0.npy: cannot be" in fails(
        "--source", source, "--correction-masks", packed, tmp_path / "new"
    )
    np.save(masks / "val0.npy", np.zeros((224, 224)))
    (source / "radiology_ai/US/liver/val0.png").write_text("no image")
    archive = pack(source, tmp_path / "images.tar")
    for arguments in (("--source", source), ("--archive", archive)):
        message = fails(*arguments, "--correction-masks", masks, tmp_path / arguments[0])
        assert "radiology_ai/US/liver/val0.png: cannot be read as an image (" in message
        assert ".original" not in message
        assert not [name for name in contents(tmp_path / arguments[0]) if name.endswith(".tmp")]
