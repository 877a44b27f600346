"""Which cache a run opens: never one whose pixels differ from the present files."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_image
from tests.helpers.caches import built, splits
from utils.data.cache import PIXELS
from utils.data.cache_build import CHECKED
from utils.data.fingerprint import fingerprint
from utils.data.folders import ImageFiles
from utils.data.samplers import SampleKey
from utils.runtime.errors import UserError


def write_level(path: Path, level: int) -> None:
    """An image whose size and mtime do not depend on its level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (level,) * 3).save(path)
    os.utime(path, (0, 0))


def write_set(root: Path, level: int, images: int = 6) -> Path:
    """DATA/{train,val}/{x,y}/<number>.bmp, all of one level."""
    for split in ("train", "val"):
        for name in "xy":
            for number in range(images):
                write_level(root / split / name / f"{number}.bmp", level)
    return root


@pytest.fixture
def sets(tmp_path):
    """Two sets of equal names, sizes and times, of the levels 40 and 200."""
    return write_set(tmp_path / "A", 40), write_set(tmp_path / "B", 200)


def print_of(split: Path) -> str:
    return fingerprint(ImageFiles.find(split), {})


def levels_read(root: Path, cache_dir: Path) -> set[int]:
    """All levels of the images that training and evaluation read from the cache."""
    opened = splits(root, cache_dir=cache_dir)
    return {
        int(level)
        for split in (opened.training, opened.evaluation)
        for index in range(len(split))
        for level in split[SampleKey(index)][0].unique()
    }


def test_sets_of_equal_names_sizes_and_times_have_separate_caches(sets, tmp_path):
    for data, level in zip(sets, (40, 200), strict=True):
        assert levels_read(data, tmp_path / "cache") == {level}
    assert levels_read(sets[0], tmp_path / "cache") == {40}
    assert len(list((tmp_path / "cache").glob("train-*"))) == 2


def test_a_link_to_the_data_counts_as_its_target(sets, tmp_path):
    link = tmp_path / "data"
    link.symlink_to(sets[0])
    assert print_of(link / "train") == print_of(sets[0] / "train")
    assert levels_read(link, tmp_path / "cache") == {40}
    link.unlink()
    link.symlink_to(sets[1])
    assert levels_read(link, tmp_path / "cache") == {200}


@pytest.mark.parametrize("target", ["train/x", "train/x/3.bmp"])
def test_a_redirected_link_to_a_class_or_image_needs_a_new_cache(target, sets, tmp_path):
    data = shutil.copytree(sets[0], tmp_path / "data")
    path = data / target
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(sets[0] / target)
    assert levels_read(data, tmp_path / "cache") == {40}
    path.unlink()
    path.symlink_to(sets[1] / target)
    assert levels_read(data, tmp_path / "cache") == {40, 200}


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_replaced_image_of_equal_size_and_mtime_needs_a_new_cache(number, in_place, tmp_path):
    root = write_set(tmp_path / "data", 40)
    assert levels_read(root, tmp_path / "cache") == {40}
    path = root / "train" / "y" / f"{number}.bmp"
    before = path.stat()
    if in_place:
        write_level(path, 200)
    else:
        write_level(tmp_path / "new.bmp", 200)
        os.rename(tmp_path / "new.bmp", path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert levels_read(root, tmp_path / "cache") == {40, 200}


def test_without_ctime_the_content_of_each_class_counts(tmp_path, monkeypatch):
    root = write_set(tmp_path / "data", 40)
    monkeypatch.setattr("utils.data.fingerprint._state", lambda path: b"")
    prints = {print_of(root / "train")}
    for name in ("x/0.bmp", "x/5.bmp", "y/0.bmp", "y/5.bmp"):
        write_level(root / "train" / name, 200)
        prints.add(print_of(root / "train"))
    assert len(prints) == 5


def test_a_fingerprint_does_not_wait_for_pipes_or_fail_on_broken_links(tmp_path):
    root = write_set(tmp_path / "data", 40)
    path = root / "train" / "x" / "0.bmp"
    prints = {print_of(root / "train")}
    path.unlink()
    os.mkfifo(path)
    prints.add(print_of(root / "train"))
    path.unlink()
    path.symlink_to("nowhere")
    prints.add(print_of(root / "train"))
    assert len(prints) == 3


def test_a_fingerprint_depends_on_names_times_and_parameters(image_folder, tmp_path):
    data = shutil.copytree(image_folder / "train", tmp_path / "train")  # with the original times
    files = ImageFiles.find(data)
    first, excluded = print_of(data), fingerprint(ImageFiles.find(data, {files.path_as_text(3)}), {})
    assert first == print_of(data)
    prints = {first, excluded, fingerprint(files, {"size": 37})}
    path = files.path(3)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    prints.add(print_of(data))
    path.rename(path.with_stem("renamed"))
    prints.add(print_of(data))
    path.with_stem("renamed").unlink()
    assert len(prints) == 5
    assert print_of(data) == excluded


# The comparison with the files when a cache is opened


@pytest.fixture
def build(tmp_path):
    """A complete cache of 100 images of noise."""
    for index in range(100):
        noise = np.random.default_rng(index).integers(0, 256, (36, 36, 3))
        write_image(tmp_path / "data" / "train" / "ab"[index % 2] / f"{index:02}.png", noise)
    return built(tmp_path / "data", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["pil", "tensor", "size"])
def test_a_cache_of_other_pixels_is_refused(kind, build):
    assert len(build.open(kind)) == 100
    pixels = np.memmap(build.folder / PIXELS, dtype=np.uint8, mode="r+")
    pixels[:] = 255 - pixels
    del pixels
    with pytest.raises(
        UserError, match=r"/train-\w+: this cache holds other pixels than .*\.png: .* Remove the folder"
    ):
        build.open(kind)


def test_a_few_images_across_the_split_are_compared(build, monkeypatch):
    compared = []
    decode = build.decode
    monkeypatch.setattr(build, "decode", lambda path: compared.append(path) or decode(path))
    build.open("pil")
    places = [next(i for i in range(100) if build.files.path(i) == path) for path in compared]
    assert len(places) == CHECKED
    assert np.histogram(places, bins=CHECKED, range=(0, 100))[0].max() <= 2
    build.open("pil")
    assert compared[:CHECKED] == compared[CHECKED:]  # the same on all ranks


def test_rounding_of_other_versions_is_accepted(build, monkeypatch):
    decode = build.decode

    def changed(path, by):
        image = decode(path)
        return torch.where(image < 128, image + by, image - by)

    monkeypatch.setattr(build, "decode", lambda path: changed(path, 2))
    build.open("pil")
    monkeypatch.setattr(build, "decode", lambda path: changed(path, 3))
    with pytest.raises(UserError, match="holds other pixels than"):
        build.open("pil")
