"""RadImageNet's correction masks: arithmetic by hand, OpenCV's pixels, the same result from folder and archive."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import MakesAFolder
from tests.helpers.radimagenet import contents, expected, fails, pack, rows_of
from utils.data import placing
from utils.radimagenet.__main__ import prepare
from utils.radimagenet.masks import correct, read_mask, resize
from utils.runtime.errors import UserError


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def filled(dtype: str, *values: float) -> np.ndarray:
    """A mask (224, 224, C) with a constant for each channel."""
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
    image = correct(Image.new("RGB", (30, 20), colour), read_mask(npy(mask), "mask"))
    assert image.size == (224, 224)
    assert image.mode == ("L" if len(set(corrected)) == 1 else "RGB")
    assert (np.asarray(image.convert("RGB")) == corrected).all()


@pytest.mark.parametrize(
    ("shape", "digest"),
    [((256, 256), "db2b9777fafc487f"), ((600, 800), "3ba94e0a4c7f86ad"), ((113, 448), "52d6cc43cd69a4a4")],
)
def test_resizing_gives_the_pixels_of_opencv(shape, digest):
    # Digests of cv2.resize(pixels, (224, 224)) with OpenCV 4.10.0 and 5.0.0.
    pixels = np.random.default_rng(shape).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert hashlib.sha256(resize(pixels).tobytes()).hexdigest()[:16] == digest


ZEROS = npy(np.zeros((224, 224)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.zeros((223, 224))), r"has the shape \(223, 224\); expected \(224, 224\)"),
        (npy(np.zeros((224, 224), bool)), "has the dtype bool"),
        (npy(np.zeros((224, 224), np.uint16)), "has the dtype uint16"),
        (npy(np.full((224, 224), -np.inf, np.float16)), "not finite"),
        (ZEROS[:-1], "not a readable array"),
        (ZEROS.replace(b"(224, 224)", b"(2**9, 1)"), "not a readable array"),
        (ZEROS.replace(b"(224, 224), }  ", b"(10**12,), } "), "not a readable array"),
        (b"", "not a readable array"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_masks_are_refused(data, message):
    with pytest.raises(UserError, match=f"^mask: .*{message}"):
        read_mask(data, "mask")


def test_masks_are_not_unpickled(tmp_path):
    data = npy(np.array([MakesAFolder(tmp_path / "made")], dtype=object))
    with pytest.raises(UserError, match="mask: not a readable array"):
        read_mask(data, "mask")
    assert not (tmp_path / "made").exists()


@pytest.fixture
def masks(source: Path, tmp_path: Path) -> Path:
    """A folder with masks for the four ultrasound images only."""
    folder = tmp_path / "masks"
    folder.mkdir()
    for number, image in enumerate(sorted((source / "radiology_ai/US/liver").iterdir())):
        mask = np.random.default_rng(number).integers(-9, 10, (224, 224, 3)).astype(np.int16)
        np.save(folder / f"{image.stem}.npy", mask)
    return folder


def pack_masks(masks: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        tar.add(masks, "correction_masks")
    return archive


def test_corrected_images_are_the_same_from_folder_and_archive(source, masks, output, tmp_path, monkeypatch):
    prepare(output, source, correction_masks=masks)
    corrected, plain = contents(output), expected(source)
    for name, data in corrected.items():
        assert (output / name).is_symlink() == ("US__" not in name)
        if "US__" in name:
            image = Image.open(source / "radiology_ai/US/liver" / Path(name).name).convert("RGB")
            pixels = resize(np.asarray(image)).astype(int) + np.load(masks / f"{Path(name).stem}.npy")[:, :, ::-1]
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels.clip(0, 255))
        else:
            assert data == plain[name]
    packed = pack_masks(masks, tmp_path / "masks.tar.gz")
    archive = pack(source, tmp_path / "images.tar.gz")
    ways = [{"source": source, "correction_masks": packed}, {"archive": archive, "correction_masks": masks}]
    for number, arguments in enumerate(ways):
        prepare(tmp_path / str(number), **arguments)
        assert contents(tmp_path / str(number)) == corrected
        with monkeypatch.context() as patches:
            patches.setattr(placing, "write", None)  # a second run writes nothing
            prepare(tmp_path / str(number), **arguments)


@pytest.mark.parametrize("way", ["folder", "archive of masks", "archive of images"])
def test_images_without_a_mask_are_missing(source, masks, output, tmp_path, way):
    (masks / "train1.npy").unlink()
    arguments = {"correction_masks": masks, "source": source}
    if way == "archive of masks":
        arguments["correction_masks"] = pack_masks(masks, tmp_path / "masks.tar.gz")
    elif way == "archive of images":
        arguments = {"correction_masks": masks, "archive": pack(source, tmp_path / "images.tar")}
    with pytest.raises(UserError, match="1 of 17 listed images, or their masks, are missing"):
        prepare(output, **arguments)
    assert rows_of(output / "missing.csv") == [["train", "radiology_ai/US/liver/train1.png"]]
    assert contents(output).keys() == expected(source).keys() - {"train/US__liver/train1.png"}


def test_plain_images_are_not_taken_for_corrected_ones(source, masks, output):
    prepare(output, source, link="copy")
    message = fails("--source", source, "--link", "copy", "--correction-masks", masks, output)
    assert "exists, but is not what this run makes of " in message
    (masks / "train1.npy").unlink()
    for image in output.glob("*/US__liver/*"):
        if image.name != "train1.png":
            image.unlink()
    message = fails("--source", source, "--link", "copy", "--correction-masks", masks, "--allow-missing", output)
    assert "train1.png: exists from an earlier run, but has no source or mask now" in message


def test_bad_masks_and_images_are_named(source, masks, output, tmp_path):
    def fails_with(path, origin=("--source", source), output=output):
        return fails(*origin, "--correction-masks", path, output)

    assert "holds no correction mask" in fails_with(source)
    assert "no.tar: not a folder, .tar or .tar.gz" in fails_with(tmp_path / "no.tar")
    packed, archive = pack_masks(masks, tmp_path / "masks.tar.gz"), pack(source, tmp_path / "images.tar")
    assert "unpack one of the two" in fails_with(packed, ("--archive", archive))
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for folder in ("a", "b"):
            tar.add(masks / "val0.npy", f"{folder}/val0.npy")
    assert "two masks named val0.npy" in fails_with(tmp_path / "twice.tar")
    (masks / "val0.npy").write_bytes(b"no mask" * 300_000)
    assert "val0.npy: not a readable array" in fails_with(masks, output=tmp_path / "new")
    packed = pack_masks(masks, tmp_path / "masks.tar.gz")
    assert "masks.tar.gz: correction_masks/val0.npy: not a readable" in fails_with(packed, output=tmp_path / "new")
    np.save(masks / "val0.npy", np.zeros((224, 224)))
    (source / "radiology_ai/US/liver/val0.png").write_text("no image")
    archive = pack(source, tmp_path / "images.tar")
    for origin in (("--source", source), ("--archive", archive)):
        message = fails_with(masks, origin, tmp_path / origin[0])
        assert "radiology_ai/US/liver/val0.png: cannot be read as an image (" in message
        assert ".original" not in message
        assert not [name for name in contents(tmp_path / origin[0]) if name.endswith(".tmp")]
