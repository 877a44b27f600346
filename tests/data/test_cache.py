"""--cache-dataset: the same pixels as from the files, damage and wrong flags refused, and runs that use a cache."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from _normal import train as normal
from tests.conftest import SMALL, SMALL_POLICY
from tests.helpers.caches import CPU, TEST_TRAIN, built, splits
from tests.helpers.events import scalars
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import assert_same, state_of
from utils.data import cache_build
from utils.data.cache import INDEX, PIXELS
from utils.data.dataset import batches, build_loader
from utils.data.samplers import SampleKey
from utils.data.transforms import evaluation_transform
from utils.results.log import read_log
from utils.runtime.errors import UserError

# Pixels


@pytest.mark.parametrize("flags", [[], ["--gray"], ["--backend", "tensor"], ["--gray", "--interpolation", "bicubic"]])
def test_evaluation_from_the_cache_has_the_pixels_of_the_files(flags, folder, tmp_path):
    plain = splits(folder, *flags).evaluation
    cached = splits(folder, *flags, cache_dir=tmp_path).evaluation
    assert plain[SampleKey(0)][0].shape == (1 if "--gray" in flags else 3, 32, 32)
    for key in map(SampleKey, range(len(plain))):
        assert_same(plain[key], cached[key])


@pytest.mark.parametrize("backend", ["pil", "tensor"])
def test_training_from_the_cache_is_training_on_the_resized_images(backend, folder, tmp_path):
    flags = ["--backend", backend, "--auto-augment", "ta_wide", "--random-erase", "0.5"]
    cached = splits(folder, *flags, cache_dir=tmp_path / "cache").training
    resize = evaluation_transform(36, None, backend=backend)
    for index in range(len(cached)):
        path = tmp_path / "resized" / cached.path(index).relative_to(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        F.to_pil_image(resize(Image.open(cached.path(index)))).save(path)
    resized = splits(tmp_path / "resized", *flags, *TEST_TRAIN).evaluation
    resized.transform = cached.transform
    for index in range(len(cached)):
        for epoch in range(3):
            assert_same(cached[SampleKey(index, epoch)], resized[SampleKey(index, epoch)])


def test_the_loader_makes_images_on_the_device(folder, tmp_path):
    training = splits(folder, cache_dir=tmp_path, kind="device").training
    keys = [[SampleKey(index) for index in range(4)], [SampleKey(index) for index in range(4, 10)]]
    loaders = [build_loader(training, keys, workers, pin_memory=False) for workers in (0, 2)]
    for batch, from_workers in zip(*(batches(loader, CPU) for loader in loaders), strict=True):
        assert batch.images.shape[1:] == (3, 32, 32)
        assert torch.equal(batch.images, from_workers.images)


@pytest.mark.parametrize("kind", ["host", "device"])
def test_workers_that_do_not_fork_read_the_same(kind, folder, tmp_path):
    """As Python 3.14 and other systems than Linux start them: the dataset is pickled."""
    training = splits(folder, cache_dir=tmp_path, kind=kind).training
    keys = [SampleKey(index) for index in range(10)]
    loaded = pickle.loads(pickle.dumps(training)).__getitems__(keys)
    assert torch.equal(loaded.images, training.__getitems__(keys).images)
    assert len(pickle.dumps(training.cache)) < 1000  # without the pixels


# Which caches are opened


def test_a_damaged_cache_is_named(folder, tmp_path):
    build = built(folder, tmp_path)
    for name in (PIXELS, INDEX):
        path = build.folder / name
        whole = path.read_bytes()
        for spoil in (Path.unlink, lambda path: os.truncate(path, 50), lambda path: path.write_bytes(b"")):
            spoil(path)
            with pytest.raises(
                UserError, match=r"this cache is damaged; remove the folder, and it will be built again\."
            ):
                build.open("pil")
            path.write_bytes(whole)
    index = np.load(build.folder / INDEX)
    for changed in (index[:, 0], index[::-1], index + np.array([1, 0, 0]), index.astype(np.float32)):
        np.save(build.folder / INDEX, changed)
        with pytest.raises(UserError, match="this cache is damaged"):
            build.open("pil")


def test_a_cache_may_be_larger_than_the_memory(folder, tmp_path, monkeypatch):
    """A read-only map does not count as memory; 10 TB of a sparse file."""
    build = built(folder, tmp_path, gray=True)
    monkeypatch.setattr(cache_build, "CHECKED", 0)  # these images are in no file
    side = 1_000_000
    np.save(build.folder / INDEX, np.array([[number * side**2, side, side] for number in range(10)]))
    try:
        os.truncate(build.folder / PIXELS, 10 * side**2)
    except OSError:
        pytest.skip("this file system has no files of this size")
    assert build.open("size")[9].shape == (1, side, side)


# Flags


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("host", [], "--cache-dataset host: give --cache-dir a folder"),
        ("device", ["--auto-augment", "ra"], "does not support --auto-augment; give --cache-dataset host"),
        ("device", ["--random-erase", "0.1"], "does not support --random-erase; give"),
        ("device", ["--interpolation", "nearest"], "does not support --interpolation nearest; give"),
        ("device", ["--interpolation", "bicubic"], "bicubic with --backend pil, whose .*; give --backend tensor, --"),
    ],
)
def test_flags_that_a_cache_cannot_follow_are_refused(kind, flags, message, folder, tmp_path):
    cache_dir = ["--cache-dir", tmp_path] if kind == "device" else []
    with pytest.raises(UserError, match=message):
        splits(folder, "--cache-dataset", kind, *cache_dir, *flags)


@pytest.mark.parametrize(("kind", "flags"), [("host", []), ("device", ["--backend", "tensor"]), ("device", TEST_TRAIN)])
def test_bicubic_is_accepted_where_a_cache_can_follow(kind, flags, folder, tmp_path):
    splits(folder, "--interpolation", "bicubic", *flags, cache_dir=tmp_path, kind=kind)


def test_a_cache_among_the_images_is_refused(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    for place in ("train", "val/caches"):
        with pytest.raises(UserError, match=f"{place}: lies among the images of --data-path; give another folder"):
            splits(data, cache_dir=data / place)
    splits(data, cache_dir=data / "caches")


def test_nothing_is_built_for_a_run_that_cannot_start(image_folder, tmp_path, capsys):
    (tmp_path / "model_3.pth").touch()
    flags = [*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path)]
    for cache in (["--cache-dataset", "host"], []):
        with pytest.raises(UserError, match="another run is there"):
            normal.main([*flags, *cache, "--cache-dir", str(tmp_path / "cache")])
    assert not (tmp_path / "cache").exists()
    assert "--cache-dir: without effect, since --cache-dataset is off." in capsys.readouterr().out


# Runs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("_normal", "device"), ("_policy_gradient", "host")])
def test_two_processes_build_one_cache_and_resume_exactly(name, kind, image_folder, tmp_path):
    small = SMALL if name == "_normal" else SMALL_POLICY
    flags = [*small, "--gray", "--data-path", image_folder, "--cache-dataset", kind, "--cache-dir", tmp_path / "cache"]
    flags += ["--model-ema", "--model-ema-steps", "2"]
    whole = run_ranks(f"{name}/train.py", *flags, "--epochs", "2", "--output-dir", tmp_path / "whole", processes=2)
    assert whole.stdout.count(": complete, ") == 2  # train and val, each by one process
    plots = ["--plot-every", "1", "--tensorboard"] if name == "_policy_gradient" else []  # also after resuming
    run_ranks(f"{name}/train.py", *flags, *plots, "--epochs", "1", "--output-dir", tmp_path / "part", processes=2)
    more = ["--data-path", image_folder, "--epochs", "2", "--resume", tmp_path / "part" / "checkpoint.pth"]
    resumed = run_ranks(f"{name}/train.py", *more, "--workers", "1", "--device", "cpu", processes=2)
    assert ": complete" not in resumed.stdout
    logs = [read_log(tmp_path / folder) for folder in ("whole", "part")]
    for line in (line for log in logs for line in log):
        del line["images_per_second"]
        for metric in ("val_auroc", "val_ema_auroc"):  # only after the last of --epochs
            line.pop(metric, None)
    assert logs[0] == logs[1]
    for file in ("checkpoint.pth", "model_1.pth"):
        assert_same(state_of(tmp_path / "whole", file), state_of(tmp_path / "part", file), file)
    if plots:
        assert (tmp_path / "part" / "plots" / "masks_1.png").exists()
        assert [step for step, _ in scalars(tmp_path / "part")["val/f1"]] == [0, 1]


@pytest.mark.slow
def test_an_unreadable_image_stops_all_ranks_with_one_sentence(image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    (data / "train" / "dark" / "3.png").write_text("no image")
    flags = [*SMALL, "--data-path", data, "--cache-dataset", "host", "--cache-dir", tmp_path / "cache"]
    result = run_ranks("_normal/train.py", *flags, "--output-dir", tmp_path, processes=2, check=False)
    assert result.returncode == 2
    assert result.stderr.count("3.png: cannot be read as an image") == 1
    assert "Traceback" not in result.stderr
