"""MedMNIST files become class folders pixel for pixel; other files end in one sentence."""

import json
import os
import sys
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tables import placed, read_rows
from utils import medmnist
from utils.data.folders import ImageFiles
from utils.runtime.errors import UserError

INFO = {"pathmnist": {"label": {"0": "adipose", "1": "normal, benign", "2": "debris"}}}
COUNTS = {"train": 12, "val": 6, "test": 9}


@pytest.fixture(autouse=True)
def package(monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", types.SimpleNamespace(INFO=INFO))


def arrays(shape=(28, 28), classes=3, **changes):
    random = np.random.default_rng(0)
    made = {}
    for split, number in COUNTS.items():
        made[f"{split}_images"] = random.integers(0, 256, (number, *shape), dtype=np.uint8)
        made[f"{split}_labels"] = (np.arange(number)[:, None] % classes).astype(np.uint8)
    return made | changes


def write(path, save=np.savez_compressed, **content):
    save(path, **content)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    return path


def prepare(path, output, *flags):
    medmnist.main(["prepare", str(path), str(output), *flags])


def fails(path, output, *flags):
    with pytest.raises(UserError) as caught:
        prepare(path, output, *flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("name", "shape"), [("pathmnist", (28, 28)), ("pathmnist_64", (64, 64, 3))])
def test_the_images_come_back_pixel_for_pixel_in_their_classes(tmp_path, save, name, shape, capsys):
    content = arrays(shape)
    prepare(write(tmp_path / f"{name}.npz", save, **content), tmp_path / "data")
    assert "3 classes; named as pathmnist in the package medmnist." in capsys.readouterr().out
    for split, number in COUNTS.items():
        for index in range(number):
            label = INFO["pathmnist"]["label"][str(index % 3)]
            with Image.open(tmp_path / "data" / split / label / f"{index:06}.png") as image:
                assert (np.asarray(image) == content[f"{split}_images"][index]).all()
    assert len(placed(tmp_path / "data")) == 27
    assert ImageFiles.find(tmp_path / "data" / "val").classes == ["adipose", "debris", "normal, benign"]
    rows = read_rows(tmp_path / "data" / "images.csv")
    assert {row["image"]: row["source"] for row in rows}["val/debris/000005.png"] == "val_images[5]"
    record = json.loads((tmp_path / "data" / "prepare.json").read_text())
    assert record["settings"]["classes"] == INFO["pathmnist"]["label"]
    assert record["counts"]["test"] == {"adipose": 3, "normal, benign": 3, "debris": 3}


def test_without_names_classes_are_numbers_that_sort(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "mine.npz", **arrays(classes=11, test_labels=np.arange(9), val_labels=np.arange(5, 11)))
    prepare(path, tmp_path / "data")
    assert "named by number, because the package medmnist knows no set 'mine'" in capsys.readouterr().out
    assert ImageFiles.find(tmp_path / "data" / "train").classes == [f"{number:02}" for number in range(11)]
    monkeypatch.setitem(sys.modules, "medmnist", None)
    prepare(path, tmp_path / "other")
    assert "the package medmnist is not installed" in capsys.readouterr().out
    assert placed(tmp_path / "other") == placed(tmp_path / "data")
    assert fails(path, tmp_path / "x", "--name", "pathmnist").endswith("pip install medmnist.")


def test_another_name_takes_the_classes_of_that_set(tmp_path):
    path = write(tmp_path / "mine.npz", **arrays())
    prepare(path, tmp_path / "data", "--name", "pathmnist")
    assert ImageFiles.find(tmp_path / "data" / "train").classes == ["adipose", "debris", "normal, benign"]
    assert "unknown to the package medmnist; it knows pathmnist." in fails(path, tmp_path / "x", "--name", "pathology")
    path = write(tmp_path / "four.npz", **arrays(classes=4))
    assert "no name for its class 3" in fails(path, tmp_path / "x", "--name", "pathmnist")


def test_a_stopped_run_is_resumed_and_the_same_command_makes_nothing(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "pathmnist.npz", **arrays())
    prepare(path, tmp_path / "data")
    whole = placed(tmp_path / "data")
    for name in list(whole)[::2]:
        (tmp_path / "data" / name).unlink()
    prepare(path, tmp_path / "data")
    assert placed(tmp_path / "data") == whole
    monkeypatch.setattr(medmnist, "write", lambda *_: pytest.fail("written again"))
    capsys.readouterr()
    prepare(path, tmp_path / "data")
    assert "was complete; nothing was left to do" in capsys.readouterr().out
    other = write(tmp_path / "bloodmnist.npz", **arrays(shape=(28, 28, 3)))
    assert "was made with other settings (file_crc32 was" in fails(other, tmp_path / "data", "--name", "pathmnist")
    name = tmp_path / "data" / next(iter(whole))
    name.write_text("mine")
    assert "exists, but is not what this run makes" in fails(path, tmp_path / "data")
    assert name.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (arrays(shape=(28, 28, 28)), "train_images: volumes, of the shape (12, 28, 28, 28); only MedMNIST's 2-D sets"),
        (arrays(val_labels=np.zeros((6, 14), int)), "val_labels: 14 labels for each image; only sets with one class"),
        (arrays(val_labels=np.zeros((5, 1), int)), "val: 6 images and 5 labels; download the file again"),
        (arrays(test_labels=-np.ones((9, 1), int)), "test_labels: -1 is below 0"),
        (arrays(test_labels=np.ones((9, 1))), "test_labels.npy: float64 of the shape (9, 1); expected whole numbers"),
        (
            arrays(train_images=np.zeros((12, 28, 28))),
            "train_images: float64 of the shape (12, 28, 28); expected uint8",
        ),
        (arrays(train_images=np.array([None] * 12)), "train_images: an array of object"),
        (
            arrays(shape=(28, 28, 1)),
            "train_images: uint8 of the shape (12, 28, 28, 1); expected uint8 of (N, H, W) or (N, H, W, 3).",
        ),
        ({"x": np.zeros(3)}, "lacks train_images, train_labels, val_images, val_labels, test_images, test_labels; exp"),
    ],
)
def test_other_arrays_end_in_a_sentence(tmp_path, content, message):
    path = write(tmp_path / "pathmnist.npz", **content)
    assert message in fails(path, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_damaged_files_end_in_a_sentence(tmp_path):
    path = write(tmp_path / "pathmnist.npz", np.savez, **arrays())
    data = path.read_bytes()
    path.write_bytes(data[:5000])
    assert "not a readable .npz file, or damaged (File is not a zip file); download it again" in fails(
        path, tmp_path / "x"
    )
    path.write_bytes(data[:2000] + b"damage" + data[2006:])
    assert "damaged (Bad CRC-32 for file 'train_images.npy'); download it again" in fails(path, tmp_path / "y")
    with zipfile.ZipFile(path, "w") as archive:
        for name in arrays():
            archive.writestr(f"{name}.npy", b"no array")
    assert "not a readable array" in fails(path, tmp_path / "z")
    assert "No such file or directory" in fails(tmp_path / "gone.npz", tmp_path / "z")
    os.mkfifo(tmp_path / "pipe.npz")
    assert "not a regular file" in fails(tmp_path / "pipe.npz", tmp_path / "z")


def test_no_image_of_a_damaged_split_stays_for_a_later_run(tmp_path):
    """The whole file has the time of the damaged one, as downloads keep the server's."""
    path = write(tmp_path / "pathmnist.npz", np.savez, **arrays())
    whole = path.read_bytes()
    prepare(path, tmp_path / "expected")
    path.write_bytes(whole[:2000] + b"damage" + whole[2006:])
    os.utime(path, (1_600_000_000, 1_600_000_000))
    fails(path, tmp_path / "data")
    assert placed(tmp_path / "data") == {}
    path.write_bytes(whole)
    os.utime(path, (1_600_000_000, 1_600_000_000))
    prepare(path, tmp_path / "data")
    assert placed(tmp_path / "data") == placed(tmp_path / "expected")


def test_a_class_without_images_in_val_is_named(tmp_path, capsys):
    content = arrays(val_labels=np.array([[0], [1]] * 3, np.uint8))
    prepare(write(tmp_path / "pathmnist.npz", **content), tmp_path / "data")
    assert "warning: 1 class without available images in val: debris; training needs" in capsys.readouterr().out
