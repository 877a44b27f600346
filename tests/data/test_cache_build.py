"""A cache is built once, completely, and resumed after any kill; errors of the build end in a sentence."""

import errno
import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from tests.helpers.caches import COMPLETE, built, new_build, splits
from utils.data import cache_build
from utils.data.cache import INDEX, PIXELS
from utils.data.cache_build import SIZES
from utils.data.samplers import SampleKey
from utils.runtime.errors import UserError


def contents(build):
    return (build.folder / PIXELS).read_bytes(), (build.folder / INDEX).read_bytes()


@pytest.fixture
def complete(folder, tmp_path):
    return contents(built(folder, tmp_path / "complete"))


@pytest.fixture
def in_small_steps(monkeypatch):
    """Builds record every three images, and do not wait."""
    monkeypatch.setattr(cache_build, "BATCH", 3)
    monkeypatch.setattr(cache_build, "SECONDS", 0.0)


@pytest.fixture
def cut_off(folder, tmp_path, in_small_steps):
    """A build in tmp_path / "cut" that ended after six of its ten images."""
    build = new_build(folder, tmp_path / "cut")
    work = build.build()
    next(work), next(work)
    work.close()
    return build


def test_pixels_lie_one_image_after_another(folder, tmp_path):
    build = new_build(folder, tmp_path)
    assert not build.is_complete()
    assert list(build.build())[-1].endswith(COMPLETE)
    images = build.open("pil")
    assert len(images) == 10
    offset = 0
    for index in range(10):
        expected = F.resize(Image.open(build.files.path(index)), [36])
        assert np.array_equal(np.asarray(images[index]), np.asarray(expected))
        assert images.index[index].tolist() == [offset, expected.height, expected.width]
        offset += 3 * expected.height * expected.width
    assert (build.folder / PIXELS).stat().st_size == offset
    assert list(new_build(folder, tmp_path).build()) == []  # nothing left to do


# Kills


def test_a_build_resumes_where_it_was_cut_off(cut_off, complete, folder, tmp_path, monkeypatch):
    decoded = []
    read = cache_build.read_image
    monkeypatch.setattr(
        cache_build, "read_image", lambda path, *how, **also: decoded.append(path) or read(path, *how, **also)
    )
    with open(cut_off.folder / PIXELS, "ab") as pixels, open(cut_off.folder / SIZES, "ab") as sizes:
        pixels.write(b"not recorded yet")
        sizes.write(b"12345")
    assert not cut_off.is_complete()
    again = built(folder, tmp_path / "cut")
    assert decoded == [again.files.path(index) for index in range(6, 10)]
    assert contents(again) == complete
    assert sorted(os.listdir(again.folder)) == ["cache.json", "index.npy", "lock", "pixels.u8"]


def test_pixels_lost_in_a_power_failure_are_decoded_again(cut_off, complete, folder, tmp_path):
    os.truncate(cut_off.folder / PIXELS, 100)
    assert contents(built(folder, tmp_path / "cut")) == complete


def test_images_recorded_as_unreadable_are_tried_again(cut_off, complete, folder, tmp_path):
    """If none may be skipped: zeros, also from a power failure, mean an unreadable image."""
    with open(cut_off.folder / SIZES, "ab") as sizes:
        sizes.write(bytes(16))
    assert contents(built(folder, tmp_path / "cut")) == complete


def build_slowly(*arguments, **settings):
    os.setsid()  # with its workers
    for _ in new_build(*arguments, **settings).build():
        time.sleep(0.02)


def test_kills_never_leave_a_half_cache_that_passes_for_complete(complete, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "BATCH", 1)
    monkeypatch.setattr(cache_build, "SECONDS", 0.0)
    build, kills = new_build(folder, tmp_path / "killed"), 0
    fork = multiprocessing.get_context("fork")
    while not build.is_complete():
        process = fork.Process(target=build_slowly, args=(folder, tmp_path / "killed"), kwargs={"workers": kills % 2})
        process.start()
        while os.getpgid(process.pid) != process.pid:
            time.sleep(0.001)
        time.sleep(0.03 + 0.07 * kills % 0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        assert kills < 40
    assert kills > 1
    build.open("pil")
    assert contents(build) == complete


# Two builders


class Clock:
    """A clock that `sleep` advances; each look at it takes 0.001 seconds."""

    def __init__(self, at_sleep):
        self.now, self.at_sleep = 0.0, at_sleep

    def monotonic(self):
        self.now += 0.001
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.at_sleep(self)


def test_a_builder_without_progress_is_named(folder, tmp_path, monkeypatch):
    first, second = new_build(folder, tmp_path).build(), new_build(folder, tmp_path, timeout=100)
    next(first)
    monkeypatch.setattr(cache_build, "time", Clock(lambda clock: None))
    with pytest.raises(UserError, match=rf"train-\w+: process {os.getpid()} on .*added nothing for 90 seconds"):
        list(second.build())


def test_a_builder_with_progress_is_waited_for(folder, tmp_path, monkeypatch):
    first, second = new_build(folder, tmp_path).build(), new_build(folder, tmp_path, timeout=100)
    next(first)
    recorded = second.folder / SIZES

    def progress(clock):
        os.utime(recorded, (0, clock.now // 80))  # every 80 seconds
        if clock.now >= 500:
            first.close()

    clock = Clock(progress)
    monkeypatch.setattr(cache_build, "time", clock)
    first_message, *_ = second.build()
    assert first_message.endswith("another process builds this cache; waiting for it.")
    assert clock.now >= 500
    assert second.is_complete()
    assert list(second.wait()) == []


# Unreadable images


def test_unreadable_images_end_the_build_or_are_skipped(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    for split in ("train", "val"):
        (data / split / "a" / "2.png").write_text("no image")
    with pytest.raises(UserError, match=r"a/2\.png: cannot be read as an image"):
        splits(data, cache_dir=tmp_path / "cache")
    flags = ["--bad-images", "skip"]
    plain = splits(data, *flags)
    keys = [SampleKey(index) for index in range(3)]
    for kind in ("host", "device"):
        cached = splits(data, *flags, cache_dir=tmp_path / "cache", kind=kind)
        for name in ("training", "evaluation"):
            expected, batch = (getattr(opened, name).__getitems__(keys) for opened in (plain, cached))
            assert torch.equal(batch.indices, expected.indices)
            assert batch.unreadable == expected.unreadable
            assert len(batch.unreadable) == 1


def test_too_many_unreadable_images_end_the_build(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    (data / "train" / "a" / "0.png").write_text("no image")
    (data / "train" / "a" / "2.png").unlink()
    (data / "train" / "a" / "2.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"train: 2 unreadable images, more than --max-bad-images 1; .*: .*2\.png"):
        built(data, tmp_path, max_bad_images=1)
    assert list(new_build(data, tmp_path, max_bad_images=2).build())[-1].endswith("GB, 2 unreadable images skipped")
    for path in (data / "train").rglob("*.png"):
        path.unlink()
        path.write_text("no image")
    with pytest.raises(UserError, match="all 10 images are unreadable"):
        built(data, tmp_path, max_bad_images=10)


def test_an_image_that_was_unreadable_only_during_the_build(folder, tmp_path, monkeypatch):
    """It is not read from its file, and no other image's pixels take its place."""
    read = cache_build.read_image

    def fail_once(path, *how, **also):
        if path.name == "2.png":
            raise UserError(f"{path}: cannot be read as an image (Input/output error)")
        return read(path, *how, **also)

    monkeypatch.setattr(cache_build, "read_image", fail_once)
    for kind in ("host", "device"):
        cached = splits(folder, "--bad-images", "skip", cache_dir=tmp_path, kind=kind)
        batch = cached.training.__getitems__([SampleKey(1)])
        assert cached.training.targets[batch.indices.tolist()].tolist() == [0]
        assert batch.indices.tolist() != [1]
        assert batch.unreadable[0].startswith(f"{folder}/train/a/2.png: was unreadable when {tmp_path}/train-")
    assert cached.evaluation.__getitems__([SampleKey(1)]).indices.tolist() == [-1]


# Errors


def test_a_killed_worker_ends_the_build_with_a_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "read_image", lambda path, *how, **also: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"DataLoader worker .*give fewer --workers\. Started again, the build"):
        built(folder, tmp_path, workers=1)


def test_an_image_that_cannot_be_resized_is_named(folder, tmp_path):
    build = new_build(folder, tmp_path)
    build.resize = lambda image: bytearray(2**60)  # MemoryError
    with pytest.raises(UserError, match=r"a/0\.png: 36 x 40 pixels cannot be resized"):
        list(build.build())


def test_a_disk_that_is_too_small_or_full(folder, tmp_path, monkeypatch, in_small_steps):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
        with pytest.raises(UserError, match=r"has 0\.00 GB free, but the cache needs about 0\.00 GB more"):
            built(folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written there \(No space left on device\); free space"):
            built(folder, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/.*: the cache cannot be written there \(Not a directory\)"):
        built(folder, tmp_path / "file")
    assert built(folder, tmp_path).is_complete()
