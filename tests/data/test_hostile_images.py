"""Images of every kind: read as the pixels that were written, or refused with the path; and `--bad-images skip`."""

import io
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from _normal import train as normal
from tests.conftest import SMALL, write_image, write_image_folder
from tests.helpers.image_files import png, saved
from utils.data import folders
from utils.data.dataset import BadImages, Batch, ImageFolder, batches, build_loader
from utils.data.folders import list_images
from utils.data.images import read_image
from utils.data.listing import PassedOver, find_images
from utils.data.samplers import EvaluationSampler, SampleKey, TrainingSampler
from utils.data.transforms import Normalize, evaluation_transform, training_transform
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.training.evaluation import measure, predict
from utils.training.models import create_classifier

CPU = torch.device("cpu")


def read(path: Path, content: bytes) -> list:
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is to be printed for each image
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
        (png(2, 1, 4, 3, bytes([0x10]), PLTE=PALETTE, tRNS=b"\x00"), [[200, 100, 50], [10, 20, 30]]),
        (png(2, 1, 8, 6, bytes([1, 2, 3, 0, 4, 5, 6, 255])), [[1, 2, 3], [4, 5, 6]]),
        (png(2, 1, 8, 4, bytes([9, 0, 77, 255])), [[9] * 3, [77] * 3]),
        (saved(Image.fromarray(np.array([[True, False]])), "PNG"), [[255] * 3, [0] * 3]),
        (saved(Image.fromarray(np.array([[True, False]])), "TIFF", compression="group4"), [[255] * 3, [0] * 3]),
        (saved(Image.frombytes("CMYK", (3, 1), bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 255, 0, 255])), "TIFF"),
         [[255, 255, 255], [0, 255, 255], [0, 0, 0]]),
        (b"P5 2 1 15 " + bytes([0, 15]), [[0] * 3, [255] * 3]),
    ],
    ids=["grey", "2 bits", "colour made transparent", "palette", "palette with alphas", "4-bit palette", "RGBA", "LA",
         "1 bit", "1-bit tiff", "CMYK", "16 levels"],
)  # fmt: skip
def test_pixels_are_those_that_were_written(content, expected, tmp_path):
    assert read(tmp_path / "a.png", content) == [expected]


def test_cmyk_jpeg(tmp_path):
    [[pixel, *_], *_] = read(tmp_path / "a.jpg", saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    assert np.abs(np.array(pixel) - [255, 0, 0]).max() <= 3


# Files that are refused


def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    for side, match in ((10_000, "10000 x 10000 pixels, more than the 89478485 that are read"), (50_000, "Image size")):
        path.write_bytes(png(side, side, 8, 0, b""))  # decoded, it would be cut short
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            refused(path, match)


def test_an_image_that_is_just_small_enough_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    assert read(tmp_path / "a.png", png(4, 1, 8, 0, bytes(4))) == [[[0] * 3] * 4]
    (tmp_path / "b.png").write_bytes(png(5, 1, 8, 0, bytes(5)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(tmp_path / "b.png", "5 x 1 pixels, more than the 4 that are read")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.png", b"", "cannot identify image file"),
        ("text.png", b"This is text.\n", "cannot identify image file"),
        ("cut.png", png(64, 1, 8, 0, bytes(64))[:-40], ""),
        ("cut.jpg", saved(Image.effect_noise((64, 64), 50), "JPEG")[:900], "image file is truncated"),
        ("script.png", saved(Image.new("RGB", (4, 4)), "EPS"), "cannot identify image file"),  # for Ghostscript
    ],
)
def test_files_that_hold_no_whole_image(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, match)


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.tif", "TIFF"), ("a.webp", "WEBP")])
def test_several_frames(tmp_path, name, kind):
    first, *others = (Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 100, 255))
    (tmp_path / name).write_bytes(saved(first, kind, save_all=True, append_images=others))
    refused(tmp_path / name, "it holds several frames; save each as a file of its own")
    (tmp_path / name).write_bytes(saved(first, kind, save_all=True))
    assert read_image(tmp_path / name).size == (4, 4)


def test_what_is_no_regular_file(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # which would wait for its writer
    for name in ("folder.png", "pipe.png"):
        refused(tmp_path / name, "not a regular file")
    for name, target in (("dangling.png", "nowhere.png"), ("itself.png", "itself.png")):
        (tmp_path / name).symlink_to(target)
    refused(tmp_path / "dangling.png", "No such file or directory")
    refused(tmp_path / "itself.png", "Too many levels of symbolic links")
    refused(tmp_path / ("n" * 300), "File name too long")


def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1, 1, 8, 0, b"\0"))
    (tmp_path / "a.png").chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):
        pytest.skip("this user may read everything")
    refused(tmp_path / "a.png", "Permission denied")


# Folders


NAMES = (b"with space.png", "größe 大.png".encode(), b"\xff\xfe no text.png", b"line\nbreak.png")


def test_names_of_any_bytes(tmp_path):
    for level, name in enumerate(NAMES):
        folder = os.fsencode(tmp_path) + b"/class \xff/"
        os.makedirs(folder, exist_ok=True)
        with open(folder + name, "wb") as file:
            file.write(png(1, 1, 8, 0, bytes([level])))
    dataset = ImageFolder(tmp_path, lambda image: image.getpixel((0, 0))[0])
    found = {os.fsencode(dataset.path(index).name): dataset[SampleKey(index)][0] for index in range(len(dataset))}
    assert found == {name: level for level, name in enumerate(NAMES)}


def test_links_that_lead_in_a_circle_are_refused(tmp_path):
    write_image(tmp_path / "a" / "deep" / "0.png", np.zeros((4, 4)))
    for name in ("one", "two"):  # two links would make 2^40 folders
        (tmp_path / "a" / "deep" / name).symlink_to(tmp_path)
    with pytest.raises(
        UserError, match=r"a/deep/(one|two)/a: a link makes this the same folder as .*/a; remove the link"
    ):
        list_images(tmp_path / "a")
    (tmp_path / "itself").symlink_to("itself")
    with pytest.raises(UserError, match=r"/itself: cannot read this folder \(Too many levels of symbolic links\)"):
        folders.find_classes(tmp_path)


def test_links_that_double_at_each_level_are_refused(tmp_path):
    for level in range(30):
        for name in ("left", "right"):
            folder = tmp_path / str(level)
            folder.mkdir(exist_ok=True)
            (folder / name).symlink_to(tmp_path / str(level + 1))
    write_image(tmp_path / "30" / "0.png", np.zeros((4, 4)))
    with pytest.raises(UserError, match="a link makes this the same folder as"):
        list_images(tmp_path / "0")


def test_links_to_images_and_folders_elsewhere_are_followed(tmp_path):
    write_image(tmp_path / "elsewhere" / "0.png", np.zeros((4, 4)))
    write_image(tmp_path / "a" / "folder.png" / "1.png", np.zeros((4, 4)))  # a folder, whatever it is called
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "2.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    found = find_images(tmp_path / "a", PassedOver())
    assert [Path(path).name for path in found] == ["2.png", "1.png", "0.png"]
    (tmp_path / "b").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "b") == [str(tmp_path / "b" / "0.png")]


def test_folders_that_may_not_be_read(tmp_path, monkeypatch):
    write_image(tmp_path / "a" / "locked" / "0.png", np.zeros((4, 4)))
    real = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for look in (list_images, lambda folder: folders.find_classes(folder / "locked")):
        with pytest.raises(UserError, match=r"a/locked: cannot read this folder \(Permission denied\)"):
            look(tmp_path / "a")


def test_class_names_that_are_no_text_are_printed_and_written(tmp_path, monkeypatch):
    root = write_image_folder(tmp_path / "data", images=8)
    for folder in ("train", "val", "test"):
        os.rename(root / folder / "dark", os.fsencode(root / folder) + b"/\xff dark")
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")  # strict, as a terminal's stream is
    monkeypatch.setattr(sys, "stdout", output)
    flags = [*SMALL, "--data-path", str(root), "--output-dir", str(tmp_path / "run")]
    run_script(lambda: normal.main([*flags, "--epochs", "1"]))
    flags += ["--test-only", "--resume", str(tmp_path / "run" / "checkpoint.pth")]
    run_script(lambda: normal.main(flags))
    output.flush()
    assert "\\udcff dark" in output.buffer.getvalue().decode()
    assert "\\udcff dark,5," in (tmp_path / "run" / "per_class.csv").read_text()
    assert "\\udcff dark/4.png," in (tmp_path / "run" / "predictions.csv").read_text()


# --bad-images skip


@pytest.fixture
def spoilt(tmp_path):
    """A copy of the tiny set whose train and val hold unreadable images: at 0, at 5 and 6, and at their ends."""
    root = write_image_folder(tmp_path / "data")
    for split, bad in (("train", (0, 5, 6, 35)), ("val", (0, 5, 6, 20))):
        dataset = ImageFolder(root / split, None)
        for index in bad:
            dataset.path(index).write_text("no image")
    return root


def test_a_readable_image_of_the_class_stands_in(spoilt):
    whole = ImageFolder(spoilt / "train", training_transform(16, (0.3,)), seed=3)
    dataset = ImageFolder(spoilt / "train", training_transform(16, (0.3,)), seed=3, on_bad_image="replace")
    keys = [SampleKey(index, 1, 2) for index in (0, 5, 6, 35, 12)]
    batch = dataset.__getitems__(keys)
    assert batch.indices[-1] == 12
    assert {message.split(": ")[0] for message in batch.bad} == {str(dataset.path(i)) for i in (0, 5, 6, 35)}
    for image, target, index, key in zip(batch.images, batch.targets, batch.indices.tolist(), keys, strict=True):
        assert index not in (0, 5, 6, 35)
        assert target == dataset.targets[key.index] == dataset.targets[index]
        assert torch.equal(image, whole[SampleKey(index, 1, 2)][0])
    assert "cannot be read as an image" in str(whole.__getitems__(keys))


def test_a_blank_image_stands_in_for_evaluation(spoilt):
    dataset = ImageFolder(spoilt / "val", evaluation_transform(36, 32), on_bad_image="blank")
    batch = dataset.__getitems__([SampleKey(4), SampleKey(5)])
    assert batch.indices.tolist() == [4, -1]
    assert (batch.images.shape, batch.images.dtype) == ((2, 3, 32, 32), torch.uint8)
    assert len(batch.bad) == 1


def test_a_class_without_a_readable_image_ends_the_run(spoilt):
    folder = spoilt / "val" / "dark"
    for name in os.listdir(folder):
        (folder / name).write_text("no image")
    for limit, problem in (
        (100, "none of its 7 images can be read"),
        (6, "none of its 7 images can be read"),
        (3, "4 images cannot be read, more than --max-bad-images 3"),
        (0, "1 images cannot be read, more than --max-bad-images 0"),
    ):
        dataset = ImageFolder(
            spoilt / "val", evaluation_transform(36, 32), on_bad_image="replace", max_bad_images=limit
        )
        bad_class = dataset.targets.tolist().index(1)
        error = dataset.__getitems__([SampleKey(1), SampleKey(bad_class + 2)])
        assert isinstance(error, UserError)
        assert str(error).startswith(f"{folder}: {problem}; replace or remove them; the last: {folder}")


@pytest.mark.parametrize("workers", [0, 2])
def test_training_tells_of_bad_images_from_any_worker(spoilt, workers):
    dataset = ImageFolder(spoilt / "train", training_transform(16, (0.3,)), on_bad_image="replace")
    loader = build_loader(dataset, TrainingSampler(36, 6), workers, pin_memory=False)
    bad_images, seen = BadImages(4), []
    for batch in batches(loader, CPU, bad_images):
        seen += batch.indices.tolist()
    bad_images.share()
    assert bad_images.count == 4
    readable = set(range(36)) - {0, 5, 6, 35}
    assert set(seen) == readable
    assert len(seen) == 36


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_bad_images_out(spoilt, workers, capsys):
    torch.manual_seed(0)
    model = create_classifier("test_resnet", 3, 32)

    def evaluate(on_bad_image, bad_images):
        dataset = ImageFolder(spoilt / "val", evaluation_transform(36, 32), on_bad_image=on_bad_image)
        loader = build_loader(dataset, EvaluationSampler(len(dataset), 4), workers, pin_memory=False)
        return predict(model, loader, Normalize([0.3], [0.3]), CPU, bad_images=bad_images)

    bad_images = BadImages(100)
    skipped = evaluate("blank", bad_images)
    assert bad_images.count == 4
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--bad-images skip: ")]
    paths = [ImageFolder(spoilt / "val", None).path(index) for index in (0, 5, 6, 20)]
    assert [line.split(": ")[1] for line in said] == [str(path) for path in paths]
    with pytest.raises(UserError, match="cannot be read as an image"):
        evaluate("error", None)
    for path in paths:
        path.unlink()
    without = evaluate("error", None)
    assert torch.equal(skipped.targets, without.targets)
    torch.testing.assert_close(skipped.logits, without.logits)
    assert measure(skipped) == pytest.approx(measure(without), abs=1e-6)


def test_an_evaluation_of_no_readable_image_ends(tmp_path):
    root = write_image_folder(tmp_path, images=4)
    for path in (root / "val").rglob("*.png"):
        path.write_text("no image")
    dataset = ImageFolder(root / "val", evaluation_transform(36, 32), on_bad_image="blank")
    loader = build_loader(dataset, EvaluationSampler(len(dataset), 4), 0, pin_memory=False)
    model = create_classifier("test_resnet", 3, 32)
    with pytest.raises(UserError, match=f"^{root / 'val'}: none of the 9 images evaluated can be read"):
        predict(model, loader, Normalize([0.3], [0.3]), CPU, bad_images=BadImages(100))


def flags_of_a_run(spoilt: Path, folder: Path, *more: object) -> list[str]:
    flags = [*SMALL, "--epochs", "2", "--data-path", spoilt, "--output-dir", folder, "--bad-images", "skip", *more]
    return [str(flag) for flag in flags]


def test_a_run_that_skips_images_resumes_exactly(spoilt, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    normal.main(flags_of_a_run(spoilt, whole))
    normal.main(["--resume", str(whole / "checkpoint_prev.pth"), "--output-dir", str(part), "--device", "cpu"])
    found, expected = (torch.load(folder / "model_1.pth", weights_only=True)["model"] for folder in (part, whole))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_run_says_what_it_skips_and_stops_at_too_many(spoilt, tmp_path, capsys):
    normal.main(flags_of_a_run(spoilt, tmp_path / "run"))
    said = [
        line.split(": ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("--bad-images skip")
    ]
    bad = {str(path) for path in spoilt.rglob("*.png") if path.read_bytes() == b"no image"}
    assert len(said) == len(set(said)) >= 7  # the order drops a few images of an epoch
    assert set(said) <= bad
    with pytest.raises(UserError, match=r"^4 images cannot be read, more than --max-bad-images 3"):
        normal.main(flags_of_a_run(spoilt, tmp_path / "few", "--max-bad-images", 3, "--batch-size", 36))
    with pytest.raises(UserError, match="cannot be read as an image"):
        normal.main(flags_of_a_run(spoilt, tmp_path / "none", "--bad-images", "error"))


def test_ranks_share_what_they_met(monkeypatch, capsys):
    other_rank = [{"c", "b"}, {"b", "d"}]  # what it gives at each call
    monkeypatch.setattr(distributed, "all_gather_object", lambda mine: [mine, other_rank.pop(0)])
    bad_images = BadImages(3)
    bad_images.note(["b"])
    bad_images.note(("a", "b"))
    bad_images.share()
    assert bad_images.count == 3
    assert capsys.readouterr().out.splitlines() == [f"--bad-images skip: {name}" for name in "abc"]
    bad_images.note(["a"])
    with pytest.raises(UserError, match=r"^4 images cannot be read, more than --max-bad-images 3; ") as caught:
        bad_images.share()
    assert caught.value.agreed
    assert capsys.readouterr().out.splitlines() == ["--bad-images skip: d"]


def test_without_skipping_nothing_is_gathered(monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_object", lambda _: pytest.fail("a collective"))
    bad_images = BadImages(None)
    bad_images.note(())
    bad_images.share()
    assert bad_images.count == 0


def test_a_batch_keeps_its_messages_when_it_is_pinned(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
    batch = Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), ("a", "b"))
    pinned = pin_memory(batch)
    assert isinstance(pinned, Batch)
    assert list(pinned.bad) == ["a", "b"]
