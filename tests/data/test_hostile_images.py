"""Images and folders of every kind: read as written, or refused with the path."""

import io
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from _normal import train as normal
from tests.conftest import SMALL, write_image, write_image_folder
from tests.helpers.image_files import png, saved
from utils.data.folders import find_classes
from utils.data.images import read_image
from utils.data.listing import PassedOver, find_images
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script


def read(path: Path, content: bytes) -> list:
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none may be printed per image
        image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: cannot be read as an image \\({match}") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; replace or remove it.")


# Kinds of pixels


PALETTE = bytes([10, 20, 30, 200, 100, 50])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(3, 1, 8, 0, bytes([0, 7, 255])), [[0] * 3, [7] * 3, [255] * 3]),
        (png(4, 1, 2, 0, bytes([0b00011011])), [[0] * 3, [85] * 3, [170] * 3, [255] * 3]),
        (png(2, 1, 8, 2, bytes([1, 2, 3, 4, 5, 6]), tRNS=bytes([0, 1, 0, 2, 0, 3])), [[1, 2, 3], [4, 5, 6]]),
        (png(3, 1, 8, 3, bytes([1, 0, 1]), PLTE=PALETTE), [[200, 100, 50], [10, 20, 30], [200, 100, 50]]),
        (png(2, 1, 8, 3, bytes([0, 1]), PLTE=PALETTE, tRNS=b"\x00\x80"), [[10, 20, 30], [200, 100, 50]]),
        (png(2, 1, 8, 6, bytes([1, 2, 3, 0, 4, 5, 6, 255])), [[1, 2, 3], [4, 5, 6]]),
        (png(2, 1, 8, 4, bytes([9, 0, 77, 255])), [[9] * 3, [77] * 3]),
        (saved(Image.fromarray(np.array([[True, False]])), "TIFF", compression="group4"), [[255] * 3, [0] * 3]),
        (saved(Image.frombytes("CMYK", (3, 1), bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 255, 0, 255])), "TIFF"),
         [[255, 255, 255], [0, 255, 255], [0, 0, 0]]),
        (b"P5 2 1 15 " + bytes([0, 15]), [[0] * 3, [255] * 3]),
    ],
    ids=["grey", "2 bits", "transparent colour", "palette", "palette with alphas", "RGBA", "LA", "1-bit tiff", "CMYK",
         "16 levels"],
)  # fmt: skip
def test_pixels_are_read_as_written(content, expected, tmp_path):
    assert read(tmp_path / "a.png", content) == [expected]


# Files that are refused


def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    for side, match in ((10_000, "10000 x 10000 pixels, more than the limit of 89478485"), (50_000, "Image size")):
        path.write_bytes(png(side, side, 8, 0, b""))  # decoded, it would be cut short
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            refused(path, match)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.png", b"", "cannot identify image file"),
        ("text.png", b"This is text.\n", "cannot identify image file"),
        ("cut.png", png(64, 1, 8, 0, bytes(64))[:-40], ""),
        ("cut.jpg", saved(Image.effect_noise((64, 64), 50), "JPEG")[:900], "image file is truncated"),
        ("script.png", saved(Image.new("RGB", (4, 4)), "EPS"), "cannot identify image file"),  # would run Ghostscript
    ],
)
def test_files_without_a_complete_image_are_refused(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, match)


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.tif", "TIFF"), ("a.webp", "WEBP")])
def test_several_frames_are_refused(tmp_path, name, kind):
    first, *others = (Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 100, 255))
    (tmp_path / name).write_bytes(saved(first, kind, save_all=True, append_images=others))
    refused(tmp_path / name, "it holds several frames; save each as a separate file")
    (tmp_path / name).write_bytes(saved(first, kind, save_all=True))
    assert read_image(tmp_path / name).size == (4, 4)


def test_other_than_regular_files_are_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer
    for name in ("folder.png", "pipe.png"):
        refused(tmp_path / name, "not a regular file")
    for name, target in (("dangling.png", "nowhere.png"), ("itself.png", "itself.png")):
        (tmp_path / name).symlink_to(target)
    refused(tmp_path / "dangling.png", "a link to nowhere.png, which is not there")
    refused(tmp_path / "itself.png", "Too many levels of symbolic links")
    refused(tmp_path / ("n" * 300), "File name too long")


# Folders


def test_links_in_a_circle_are_refused(tmp_path):
    write_image(tmp_path / "a" / "deep" / "0.png", np.zeros((4, 4)))
    for name in ("one", "two"):  # would make 2^40 folders
        (tmp_path / "a" / "deep" / name).symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"a/deep/(one|two)/a: a link makes this the same folder as .*/a; remove"):
        find_images(tmp_path / "a", PassedOver())
    (tmp_path / "itself").symlink_to("itself")
    with pytest.raises(UserError, match=r"/itself: cannot read this folder \(Too many levels of symbolic links\)"):
        find_classes(tmp_path)


def test_links_to_images_and_folders_elsewhere_are_followed(tmp_path):
    write_image(tmp_path / "elsewhere" / "0.png", np.zeros((4, 4)))
    write_image(tmp_path / "a" / "folder.png" / "1.png", np.zeros((4, 4)))  # a folder, despite its name
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    found = find_images(tmp_path / "a", PassedOver())
    assert [Path(path).name for path in found] == ["2.png", "1.png", "0.png"]


def test_folders_without_permission_are_refused(tmp_path, monkeypatch):
    write_image(tmp_path / "a" / "locked" / "0.png", np.zeros((4, 4)))
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"a/locked: cannot read this folder \(Permission denied\)"):
        find_images(tmp_path / "a", PassedOver())
    with pytest.raises(UserError, match=r"a/locked: cannot read this folder \(Permission denied\)"):
        find_classes(tmp_path / "a" / "locked")


def test_class_names_of_any_bytes_are_printed_and_written(tmp_path, monkeypatch):
    root = write_image_folder(tmp_path / "data", images=8)
    for folder in ("train", "val", "test"):
        os.rename(root / folder / "dark", os.fsencode(root / folder) + b"/\xff dark")
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")  # strict, as a terminal's stream
    monkeypatch.setattr(sys, "stdout", output)
    flags = [*SMALL, "--data-path", str(root), "--output-dir", str(tmp_path / "run")]
    run_script(lambda: normal.main([*flags, "--epochs", "1"]))
    flags += ["--test-only", "--resume", str(tmp_path / "run" / "checkpoint.pth")]
    run_script(lambda: normal.main(flags))
    output.flush()
    assert "\\udcff dark" in output.buffer.getvalue().decode()
    assert "\\udcff dark,5," in (tmp_path / "run" / "per_class.csv").read_text()
    assert "\\udcff dark/4.png," in (tmp_path / "run" / "predictions.csv").read_text()
