"""Which cache a run opens: never one of other pixels than its files have now."""

import builtins
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_image
from tests.helpers.caches import build_of, splits
from utils.data.cache import PIXELS
from utils.data.cache_build import CHECKED
from utils.data.fingerprint import CONTENT, fingerprint
from utils.data.folders import ImageFiles
from utils.data.samplers import SampleKey
from utils.runtime.errors import UserError

HOST = ["--cache-dataset", "host"]


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


def print_of(split: Path, **parameters) -> str:
    return fingerprint(ImageFiles.find(split), parameters)


def levels_read(root: Path, cache_dir: Path, *flags: str) -> set[int]:
    """All levels of the images that training and evaluation read from the cache."""
    opened = splits(root, cache_dir, *HOST, *flags)
    return {
        int(level)
        for split in (opened.training, opened.evaluation)
        for index in range(len(split))
        for level in split[SampleKey(index)][0].unique()
    }


def test_sets_of_equal_names_sizes_and_times_have_caches_of_their_own(tmp_path):
    for name, level in (("A", 40), ("B", 200)):
        assert levels_read(write_set(tmp_path / name, level), tmp_path / "cache") == {level}
    assert levels_read(tmp_path / "A", tmp_path / "cache") == {40}
    assert len(list((tmp_path / "cache").glob("train-*"))) == 2


def test_another_set_in_the_place_of_the_first_has_another_cache(tmp_path):
    first, second = write_set(tmp_path / "A", 40), write_set(tmp_path / "B", 200)
    assert levels_read(first, tmp_path / "cache") == {40}
    first.rename(tmp_path / "elsewhere")
    second.rename(first)
    assert levels_read(first, tmp_path / "cache") == {200}


def test_a_link_to_the_data_counts_as_where_it_leads(tmp_path):
    for name, level in (("A", 40), ("B", 200)):
        write_set(tmp_path / name, level)
    link = tmp_path / "data"
    link.symlink_to(tmp_path / "A")
    assert print_of(link / "train") == print_of(tmp_path / "A" / "train")
    assert levels_read(link, tmp_path / "cache") == {40}
    link.unlink()
    link.symlink_to(tmp_path / "B")
    assert levels_read(link, tmp_path / "cache") == {200}


def test_linked_classes_and_images_that_lead_elsewhere_need_another_cache(tmp_path):
    for name, level in (("A", 40), ("B", 200)):
        write_set(tmp_path / name, level)
    for kind, target in (("class", "train/x"), ("image", "train/x/3.bmp")):
        root = shutil.copytree(tmp_path / "A", tmp_path / kind)
        for number, name in enumerate("AB"):
            path = root / target
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            path.symlink_to(tmp_path / name / target)
            assert (200 in levels_read(root, tmp_path / "cache")) == (number == 1)


@pytest.mark.parametrize("number", range(6))
def test_an_image_replaced_with_its_size_and_mtime_kept_needs_another_cache(number, tmp_path):
    root = write_set(tmp_path / "data", 40)
    assert levels_read(root, tmp_path / "cache") == {40}
    path = root / "train" / "y" / f"{number}.bmp"
    before = path.stat()
    if number % 2:
        write_level(path, 200)  # in place
    else:
        write_level(tmp_path / "new.bmp", 200)
        os.rename(tmp_path / "new.bmp", path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert levels_read(root, tmp_path / "cache") == {40, 200}


def test_where_ctime_tells_nothing_the_content_of_each_class_counts(tmp_path, monkeypatch):
    root = write_set(tmp_path / "data", 40)
    monkeypatch.setattr("utils.data.fingerprint._state", lambda path: b"")
    found = {print_of(root / "train")}
    for name in ("x/0.bmp", "x/5.bmp", "y/0.bmp", "y/5.bmp"):
        write_level(root / "train" / name, 200)
        found.add(print_of(root / "train"))
    assert len(found) == 5


def test_a_fingerprint_opens_two_images_a_class_and_reads_a_part(tmp_path, monkeypatch):
    root = write_set(tmp_path / "data", 40, images=20)
    with open(root / "train" / "x" / "0.bmp", "ab") as file:
        file.truncate(50 * CONTENT)
    opened, sizes = [], []
    real = builtins.open

    def counting(path, *more):
        opened.append(Path(path).relative_to(root / "train").as_posix())
        file = real(path, *more)
        read = file.read
        return Proxy(file, lambda size: sizes.append(len(content := read(size))) or content)

    class Proxy:
        def __init__(self, file, read):
            self.file, self.read = file, read

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    monkeypatch.setattr(builtins, "open", counting)
    print_of(root / "train")
    assert sorted(opened) == ["x/0.bmp", "x/9.bmp", "y/0.bmp", "y/9.bmp"]  # sorted as texts
    assert max(sizes) == CONTENT


def test_pipes_and_missing_files_do_not_stop_a_fingerprint(tmp_path):
    root = write_set(tmp_path / "data", 40)
    found = {print_of(root / "train")}
    (root / "train" / "x" / "0.bmp").unlink()
    os.mkfifo(root / "train" / "x" / "0.bmp")
    found.add(print_of(root / "train"))
    (root / "train" / "x" / "0.bmp").unlink()
    (root / "train" / "x" / "0.bmp").symlink_to("nowhere")
    found.add(print_of(root / "train"))
    assert len(found) == 3


def test_a_fingerprint_is_of_names_times_and_parameters(image_folder, tmp_path):
    data = shutil.copytree(image_folder / "train", tmp_path / "train")  # with the times of the original
    files, parameters = ImageFiles.find(data), {"size": 36}
    first = fingerprint(files, parameters)
    assert first == fingerprint(ImageFiles.find(data), parameters)
    found = {first, fingerprint(files, {"size": 37}), fingerprint(files, {"size": 36, "gray": True})}
    without_one = fingerprint(ImageFiles.find(data, {files.path_as_text(3)}), parameters)  # --exclude
    path = files.path(3)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    found.add(fingerprint(files, parameters))
    path.rename(path.with_stem("renamed"))
    found.add(fingerprint(files, parameters))
    found.add(fingerprint(ImageFiles.find(data), parameters))
    path.with_stem("renamed").unlink()
    found.add(fingerprint(ImageFiles.find(data), parameters))
    assert len(found) == 7
    assert fingerprint(ImageFiles.find(data), parameters) == without_one != first


# --- Compared with the files when it is opened


@pytest.fixture
def build(tmp_path):
    """A whole cache of 100 images of noise."""
    for index in range(100):
        noise = np.random.default_rng(index).integers(0, 256, (36, 36, 3))
        write_image(tmp_path / "data" / "train" / "ab"[index % 2] / f"{index:02}.png", noise)
    build = build_of(tmp_path / "data", tmp_path / "cache")
    list(build.build())
    return build


@pytest.mark.parametrize("kind", ["pil", "tensor", "size"])
def test_a_cache_of_other_pixels_is_refused(kind, build):
    assert len(build.open(kind)) == 100
    pixels = np.memmap(build.folder / PIXELS, dtype=np.uint8, mode="r+")
    pixels[:] = 255 - pixels
    del pixels
    with pytest.raises(
        UserError, match=r"/train-\w+: this cache holds other pixels than .*\.png, .*; remove the folder"
    ):
        build.open(kind)


def test_images_that_are_compared_are_spread_and_few(build, monkeypatch):
    compared = []
    decode = build.decoder.decode
    monkeypatch.setattr(build.decoder, "decode", lambda path: compared.append(path) or decode(path))
    build.open("pil")
    places = [next(i for i in range(100) if build.files.path(i) == path) for path in compared]
    assert len(places) == CHECKED
    assert np.histogram(places, bins=CHECKED, range=(0, 100))[0].max() <= 2
    build.open("pil")
    assert compared[:CHECKED] == compared[CHECKED:]  # the same on all ranks


def test_rounding_of_other_versions_is_no_other_image(build, monkeypatch):
    decode = build.decoder.decode
    for change, raises in ((2, False), (3, True)):
        monkeypatch.setattr(build.decoder, "decode", lambda path, by=change: changed(decode(path), by))
        if raises:
            with pytest.raises(UserError, match="holds other pixels than"):
                build.open("pil")
        else:
            build.open("pil")


def changed(image: torch.Tensor, by: int) -> torch.Tensor:
    return torch.where(image < 128, image + by, image - by)


def test_images_that_were_unreadable_are_not_compared(tmp_path):
    root = write_set(tmp_path / "data", 40)
    for number in range(5):
        for name in "xy":
            (root / "train" / name / f"{number}.bmp").write_text("no image")
    build = build_of(root, tmp_path / "cache", max_bad_images=20)
    list(build.build())
    assert [image is None for image in build.open("pil")] == [*[True] * 5, False, *[True] * 5, False]
