"""--cache-dataset: the same pixels as from the files, built once, whatever kills the builders, and told apart."""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import ROOT, SMALL, SMALL_POLICY
from tests.helpers.caches import CPU, build_of, splits
from tests.helpers.events import scalars
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import assert_same, state_of
from utils import arguments
from utils.data import cache_build
from utils.data import splits as wiring_data
from utils.data.cache import INDEX, PIXELS, ImageCache
from utils.data.cache_build import SIZES as NOTED
from utils.data.dataset import batches, build_loader
from utils.data.device_crops import DeviceImages, _to_device
from utils.data.folders import ImageFiles
from utils.data.samplers import SampleKey
from utils.data.transforms import evaluation_transform, resize_transform, training_transform
from utils.results.log import read_log
from utils.runtime.errors import UserError


def contents(build):
    return (build.folder / PIXELS).read_bytes(), (build.folder / INDEX).read_bytes()


# --- The same pixels


@pytest.mark.parametrize("flags", [[], ["--gray"], ["--backend", "tensor"], ["--gray", "--interpolation", "bicubic"]])
def test_evaluation_from_the_cache_has_the_pixels_of_the_files(flags, folder, tmp_path):
    plain = splits(folder, tmp_path, *flags).evaluation
    cached = splits(folder, tmp_path, *flags, "--cache-dataset", "host").evaluation
    for index in range(len(plain)):
        one, other = plain[SampleKey(index)], cached[SampleKey(index)]
        assert torch.equal(one[0], other[0])
        assert one[1:] == other[1:]
    assert one[0].shape == (1 if "--gray" in flags else 3, 32, 32)


@pytest.mark.parametrize("backend", ["pil", "tensor"])
def test_training_from_the_cache_is_training_on_the_resized_images(backend, folder, tmp_path):
    flags = ["--backend", backend, "--auto-augment", "ta_wide", "--random-erase", "0.5"]
    cached = splits(folder, tmp_path / "cache", *flags, "--cache-dataset", "host").training
    resize = resize_transform(36, backend=backend)
    for index in range(len(cached)):
        source = cached.path(index)
        path = tmp_path / "resized" / source.relative_to(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        F.to_pil_image(resize(Image.open(source))).save(path)
    resized = splits(
        tmp_path / "resized", tmp_path, *flags, "--split", "train", "--test-only", "--resume", "-"
    ).evaluation
    resized.transform = cached.transform
    for index in range(len(cached)):
        for epoch in range(3):
            key = SampleKey(index, epoch)
            assert torch.equal(cached[key][0], resized[key][0])


@pytest.mark.parametrize("flags", [[], ["--gray"], ["--interpolation", "bicubic"]])
def test_crops_on_the_device_are_those_of_the_host(flags, folder, tmp_path):
    """The same draws for each image, and the same pixels but for rounding."""
    host = splits(folder, tmp_path, *flags, "--backend", "tensor", "--cache-dataset", "host").training
    device = splits(folder, tmp_path, *flags, "--backend", "tensor", "--cache-dataset", "device").training
    for epoch in range(20):
        keys = [SampleKey(index, epoch) for index in range(len(host))]
        expected, drawn = host.__getitems__(keys), device.__getitems__(keys)
        assert drawn.images.shape == (10, 5)
        images = device.on_device(drawn.indices, drawn.images)
        assert (images.dtype, images.shape) == (torch.uint8, expected.images.shape)
        difference = (images.int() - expected.images.int()).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.3
        assert torch.equal(drawn.targets, expected.targets)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop", [(0, 0, 36, 36, 0), (3, 5, 7, 30, 0), (0, 8, 36, 4, 1), (35, 0, 1, 1, 0)])
def test_a_crop_on_the_device_is_torchvisions(crop, interpolation, folder, tmp_path):
    build = build_of(folder, tmp_path)
    list(build.build())
    images = build.open("tensor")
    index = next(i for i in range(len(images)) if images[i].shape == (3, 36, 36))
    made = DeviceImages(images, 24, interpolation, CPU)(torch.tensor([index]), torch.tensor([crop]))
    top, left, height, width, flip = crop
    mode = InterpolationMode(interpolation)
    if interpolation == "bilinear":  # but for rounding at the end
        image, tolerance = images[index].float(), 0.51
    else:  # whose overshoots torch cuts off in each direction where it resizes bytes
        image, tolerance = images[index], 1
    expected = F.resized_crop(image, top, left, height, width, [24, 24], mode, antialias=True)
    expected = F.horizontal_flip(expected) if flip else expected
    torch.testing.assert_close(made[0].float(), expected.float(), rtol=0, atol=tolerance)


def test_the_loader_makes_the_images_on_the_device(folder, tmp_path):
    training = splits(folder, tmp_path, "--cache-dataset", "device").training
    keys = [[SampleKey(index) for index in range(4)], [SampleKey(index) for index in range(4, 10)]]
    loaders = [build_loader(training, keys, workers, pin_memory=False) for workers in (0, 2)]
    for one, other in zip(*(batches(loader, CPU) for loader in loaders), strict=True):
        assert one.images.shape[1:] == (3, 32, 32)
        assert torch.equal(one.images, other.images)


# --- Built once, and whole


def test_pixels_lie_one_image_after_another(folder, tmp_path):
    build = build_of(folder, tmp_path)
    assert not build.is_whole()
    words = [word for word in build.build() if word]
    assert words[-1].endswith("whole, 0.00 GB")
    images = build.open("pil")
    assert len(images) == 10
    offsets = [0]
    for index in range(10):
        expected = F.resize(Image.open(build.files.path(index)), [36])
        assert np.array_equal(np.asarray(images[index]), np.asarray(expected))
        assert images.index[index].tolist() == [offsets[-1], expected.height, expected.width]
        offsets.append(offsets[-1] + 3 * expected.height * expected.width)
    assert (build.folder / PIXELS).stat().st_size == offsets[-1]
    assert list(build_of(folder, tmp_path).build()) == []  # nothing is left to do


@pytest.fixture
def cut_off(folder, tmp_path, monkeypatch):
    """A build in tmp_path / "cut" that ended when six of its ten images were noted."""
    monkeypatch.setattr(cache_build, "BATCH", 3)
    monkeypatch.setattr(cache_build, "SECONDS", 0.0)
    build = build_of(folder, tmp_path / "cut")
    work = build.build()
    next(work), next(work)
    work.close()
    return build


def test_a_build_goes_on_where_it_was_cut_off(cut_off, folder, tmp_path, monkeypatch):
    whole, build = build_of(folder, tmp_path / "whole"), cut_off
    list(whole.build())
    decoded = []
    read = cache_build.read_image
    monkeypatch.setattr(cache_build, "read_image", lambda path, *how: decoded.append(path) or read(path, *how))
    with open(build.folder / PIXELS, "ab") as pixels, open(build.folder / NOTED, "ab") as sizes:
        pixels.write(b"not noted yet")
        sizes.write(b"12345")
    again = build_of(folder, tmp_path / "cut")
    assert not again.is_whole()
    list(again.build())
    assert decoded == [build.files.path(index) for index in range(6, 10)]
    assert contents(again) == contents(whole)
    assert sorted(os.listdir(again.folder)) == ["cache.json", "index.npy", "lock", "pixels.u8"]


def test_pixels_lost_with_the_power_are_decoded_again(cut_off, folder, tmp_path):
    os.truncate(cut_off.folder / PIXELS, 100)
    list(build_of(folder, tmp_path / "cut").build())
    list(build_of(folder, tmp_path / "whole").build())
    assert contents(cut_off) == contents(build_of(folder, tmp_path / "whole"))


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.test_cache import build_of
from utils import cache_build
cache_build.BATCH, cache_build.SECONDS = 1, 0.0
print("imported", flush=True)
for _ in build_of(Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3])).build():
    time.sleep(0.02)
"""


@pytest.mark.slow
def test_kills_leave_no_half_cache_that_is_taken_for_a_whole_one(folder, tmp_path):
    list(build_of(folder, tmp_path / "whole").build())
    expected = contents(build_of(folder, tmp_path / "whole"))
    build, kills = build_of(folder, tmp_path / "killed"), 0
    while not build.is_whole():
        command = [sys.executable, "-c", KILLED.format(root=str(ROOT)), folder, tmp_path / "killed", str(kills % 2)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        process.stdout.readline()
        time.sleep(0.05 + 0.07 * kills % 0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
        assert kills < 40
    assert kills > 1
    build.open("pil")
    assert contents(build) == expected


def test_another_process_that_builds_is_waited_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "SECONDS", 0.0)
    first, second = build_of(folder, tmp_path).build(), build_of(folder, tmp_path)
    next(first)
    waiting = second.build()
    assert next(waiting).endswith("another process builds this cache; waiting for it.")
    assert next(waiting) == ""
    list(first)
    assert list(waiting) == []
    assert second.is_whole()
    assert list(build_of(folder, tmp_path).wait()) == []


def test_a_lock_that_ends_with_its_process_is_taken_over(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "SECONDS", 0.0)
    monkeypatch.setattr(cache_build, "BATCH", 3)
    first, second = build_of(folder, tmp_path).build(), build_of(folder, tmp_path).build()
    next(first), next(second)
    first.close()
    assert [word for word in second if word][-1].endswith("whole, 0.00 GB")


# --- Told apart


def test_a_changed_image_is_read_anew(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    flags = ["--cache-dataset", "host"]
    before = splits(data, tmp_path / "cache", *flags).evaluation[SampleKey(0)][0]
    Image.new("RGB", (40, 40), (9, 9, 9)).save(data / "val" / "a" / "0.png")
    after = splits(data, tmp_path / "cache", *flags).evaluation[SampleKey(0)][0]
    assert after.eq(9).all()
    assert not torch.equal(before, after)
    assert len(list((tmp_path / "cache").glob("val-*"))) == 2


def test_a_cache_among_the_images_is_refused(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    for place in ("train", "val/caches"):
        with pytest.raises(UserError, match=f"{place}: lies among the images of --data-path; give another folder"):
            splits(data, data / place, "--cache-dataset", "host")
    splits(data, data / "caches", "--cache-dataset", "host")


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: os.truncate(path, 50), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", [PIXELS, INDEX])
def test_a_damaged_cache_is_named(name, spoil, folder, tmp_path):
    build = build_of(folder, tmp_path)
    list(build.build())
    spoil(build.folder / name)
    with pytest.raises(UserError, match=r"this cache is damaged; remove the folder, and it will be built again\."):
        build.open("pil")


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index[:, 0],
        lambda index: index[::-1],
        lambda index: index + np.array([1, 0, 0]),
        lambda index: index.astype(np.float32),
    ],
)
def test_an_index_that_does_not_fit_is_damage(change, folder, tmp_path):
    build = build_of(folder, tmp_path)
    list(build.build())
    np.save(build.folder / INDEX, change(np.load(build.folder / INDEX)))
    with pytest.raises(UserError, match="this cache is damaged"):
        build.open("pil")


def test_a_cache_may_be_larger_than_the_memory(folder, tmp_path, monkeypatch):
    """Mapped for reading, it counts as no memory; 10 TB of a file that takes no room."""
    build = build_of(folder, tmp_path, gray=True)
    list(build.build())
    monkeypatch.setattr(build, "_compare_with_files", lambda cache: None)  # these images are in no file
    side = 1_000_000
    np.save(build.folder / INDEX, np.array([[number * side**2, side, side] for number in range(10)]))
    try:
        os.truncate(build.folder / PIXELS, 10 * side**2)
    except OSError:
        pytest.skip("this file system holds no such file")
    assert build.open("size")[9].shape == (1, side, side)


# --- What goes wrong


def test_bad_images_end_the_build_or_are_noted(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    for split in ("train", "val"):
        (data / split / "a" / "2.png").write_text("no image")
    with pytest.raises(UserError, match=r"a/2\.png: cannot be read as an image"):
        splits(data, tmp_path / "cache", "--cache-dataset", "host")
    flags = ["--bad-images", "skip"]
    files = splits(data, tmp_path / "cache", *flags)
    for kind in ("host", "device"):
        cached = splits(data, tmp_path / "cache", *flags, "--cache-dataset", kind)
        for one, other in zip(files[:2], cached[:2], strict=True):
            keys = [SampleKey(index) for index in range(3)]
            plain, found = one.__getitems__(keys), other.__getitems__(keys)
            assert torch.equal(plain.indices, found.indices)
            assert plain.bad == found.bad
            assert len(plain.bad) == 1


def test_more_bad_images_than_may_be_end_the_build(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    for number in (0, 2, 4):
        (data / "train" / "a" / f"{number}.png").write_text("no image")
    (data / "train" / "a" / "6.png").unlink()
    (data / "train" / "a" / "6.png").symlink_to("nowhere")
    with pytest.raises(
        UserError, match=r"train: 4 images cannot be read, more than --max-bad-images 3; the last: .*6\.png"
    ):
        list(build_of(data, tmp_path, max_bad_images=3).build())
    assert list(build_of(data, tmp_path, max_bad_images=4).build())[-1].endswith("GB, 4 images could not be read")


def test_bad_images_that_were_noted_are_tried_again_where_none_may_be(cut_off, folder, tmp_path):
    """Zeros at the end of what was noted, by a power failure too, are taken for no image."""
    with open(cut_off.folder / NOTED, "ab") as noted:
        noted.write(bytes(16))
    list(build_of(folder, tmp_path / "cut").build())
    list(build_of(folder, tmp_path / "whole").build())
    assert contents(cut_off) == contents(build_of(folder, tmp_path / "whole"))


def test_an_image_that_was_bad_only_when_the_cache_was_built(folder, tmp_path, monkeypatch):
    """Its pixels are not there: never is it read from its file, nor another image's pixels in its place."""
    read = cache_build.read_image

    def fails_once(path, *how):
        if path.name == "2.png":
            raise UserError(f"{path}: cannot be read as an image (Input/output error)")
        return read(path, *how)

    monkeypatch.setattr(cache_build, "read_image", fails_once)
    for kind in ("host", "device"):
        cached = splits(folder, tmp_path, "--cache-dataset", kind, "--bad-images", "skip")
        batch = cached.training.__getitems__([SampleKey(1)])
        assert cached.training.targets[batch.indices.tolist()].tolist() == [0]
        assert batch.indices.tolist() != [1]
        assert batch.bad[0].startswith(f"{folder}/train/a/2.png: could not be read when {tmp_path}/train-")
    assert cached.evaluation.__getitems__([SampleKey(1)]).indices.tolist() == [-1]


def test_a_worker_that_is_killed_ends_the_build_with_a_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "read_image", lambda path, *how: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"DataLoader worker .*give fewer --workers\. Started again, the build"):
        list(build_of(folder, tmp_path, workers=1).build())


def test_an_image_that_cannot_be_resized_is_a_bad_one(folder, tmp_path, monkeypatch):
    def too_long(image):
        raise MemoryError

    build = build_of(folder, tmp_path)
    monkeypatch.setattr(build.decoder, "resize", too_long)
    with pytest.raises(UserError, match=r"a/0\.png: 36 x 40 pixels cannot be resized"):
        list(build.build())


def test_a_split_of_bad_images_only(tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_text("no image")
    with pytest.raises(UserError, match="none of its 2 images can be read"):
        list(build_of(tmp_path, tmp_path / "cache", max_bad_images=9).build())


def test_a_disk_that_is_too_small_or_full(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_build, "BATCH", 3)
    monkeypatch.setattr(cache_build, "SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
        with pytest.raises(UserError, match=r"has 0\.00 GB free, and the cache needs about 0\.00 GB more"):
            list(build_of(folder, tmp_path).build())
    with monkeypatch.context() as patch:

        def full(file):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(cache_build, "_flush_to_disk", full)
        with pytest.raises(UserError, match=r"cannot be written there \(No space left on device\); free space"):
            list(build_of(folder, tmp_path).build())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/.*: the cache cannot be written there \(Not a directory\)"):
        list(build_of(folder, tmp_path / "file").build())
    list(build_of(folder, tmp_path).build())
    assert build_of(folder, tmp_path).is_whole()


def test_too_little_memory_on_the_device(folder, tmp_path, monkeypatch):
    build = build_of(folder, tmp_path)
    list(build.build())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20_000, 40_000))
    with pytest.raises(UserError, match=r"the training images take 0\.0 GB, and cuda:0 has 0\.0 GB free; give host"):
        _to_device(torch.from_numpy(build.open("size").pixels), torch.device("cuda:0"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache-dataset", "host"], "--cache-dataset host: give --cache-dir a folder"),
        (
            ["--cache-dataset", "device", "--auto-augment", "ra"],
            "does not support --auto-augment; give --cache-dataset host",
        ),
        (["--cache-dataset", "device", "--random-erase", "0.1"], "does not support --random-erase; give"),
        (["--cache-dataset", "device", "--interpolation", "nearest"], "does not support --interpolation nearest; give"),
    ],
)
def test_flags_that_cannot_be_followed(flags, message, folder, tmp_path):
    cache_dir = ["--cache-dir", tmp_path] if "device" in flags else []
    parser = normal.build_parser()
    given = arguments.parse_given(parser, list(map(str, [*SMALL, "--data-path", folder, *cache_dir, *flags])))
    with pytest.raises(UserError, match=message):
        wiring_data.open_splits(arguments.for_fresh_start(parser, given))


# --- Cheap to hold, and to hand over


def test_a_cache_is_handed_over_by_its_name(folder, tmp_path):
    build = build_of(folder, tmp_path)
    list(build.build())
    images = build.open("tensor")
    handed = pickle.dumps(images)
    assert len(handed) < 1000
    again = pickle.loads(handed)
    assert isinstance(again, ImageCache)
    assert all(torch.equal(again[index], images[index]) for index in range(len(images)))
    assert build.open("size")[0].shape == images[0].shape


def test_file_names_take_their_own_length_and_few_bytes_more():
    names = {f"class {number}": [f"{index:08d}.png" for index in range(1000)] for number in range(10)}
    files = ImageFiles(Path("/data/train"), names)
    assert files.path(1002) == Path("/data/train/class 1/00000002.png")
    assert files.path(0) == Path("/data/train/class 0/00000000.png")
    assert len(pickle.dumps(files)) < 10_000 * (len("00000000.png") + 4 + 8) + 2000


def test_workers_that_are_started_afresh_read_the_same(folder, tmp_path):
    """As Python 3.14 starts them, and other systems than Linux: the dataset is pickled."""
    for kind in ("host", "device"):
        training = splits(folder, tmp_path, "--cache-dataset", kind).training
        keys = [[SampleKey(index) for index in range(10)]]
        loader = DataLoader(
            training, batch_sampler=keys, num_workers=1, collate_fn=as_it_is, multiprocessing_context="forkserver"
        )
        (batch,) = loader
        assert torch.equal(batch.images, training.__getitems__(keys[0]).images)


def as_it_is(batch):
    return batch


# --- In a run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("_normal", "device"), ("_policy_gradient", "host")])
def test_two_processes_build_one_cache_and_resume_exactly(name, kind, image_folder, tmp_path):
    small = SMALL if name == "_normal" else SMALL_POLICY
    flags = [*small, "--gray", "--data-path", image_folder, "--cache-dataset", kind, "--cache-dir", tmp_path / "cache"]
    flags += ["--model-ema", "--model-ema-steps", "2"]
    whole = run_ranks(f"{name}/train.py", *flags, "--epochs", "2", "--output-dir", tmp_path / "whole", processes=2)
    assert whole.stdout.count(": whole, ") == 2  # train and val, each by one process
    shown = ["--plot-every", "1", "--tensorboard"] if name == "_policy_gradient" else []  # when resumed, too
    run_ranks(f"{name}/train.py", *flags, *shown, "--epochs", "1", "--output-dir", tmp_path / "part", processes=2)
    more = ["--data-path", image_folder, "--epochs", "2", "--resume", tmp_path / "part" / "checkpoint.pth"]
    resumed = run_ranks(f"{name}/train.py", *more, "--workers", "1", "--device", "cpu", processes=2)
    assert ": whole" not in resumed.stdout
    logs = [read_log(tmp_path / folder) for folder in ("whole", "part")]
    for line in (line for log in logs for line in log):
        del line["images_per_second"]
        for name in ("val_auroc", "val_ema_auroc"):  # after the last of the epochs asked for
            line.pop(name, None)
    assert logs[0] == logs[1]
    for file in ("checkpoint.pth", "model_1.pth"):
        assert_same(state_of(tmp_path / "whole", file), state_of(tmp_path / "part", file), file)
    if shown:
        assert (tmp_path / "part" / "plots" / "masks_1.png").exists()
        assert [step for step, _ in scalars(tmp_path / "part")["val/f1"]] == [0, 1]


def test_a_run_evaluates_alike_with_and_without_a_cache(image_folder, tmp_path):
    script, found = policy_gradient, []
    flags = [*SMALL_POLICY, "--epochs", "1", "--lr", "1e-9", "--data-path", str(image_folder)]
    for kind in ("off", "host", "device"):
        folder = tmp_path / kind
        script.main([*flags, "--cache-dataset", kind, "--cache-dir", str(tmp_path), "--output-dir", str(folder)])
        found.append(read_log(folder)[0]["val_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)  # the batch statistics are of other crops
    assert found[2] == pytest.approx(found[0], rel=1e-3)


def test_a_full_run_stops_with_a_sentence_on_all_ranks(image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    (data / "train" / "dark" / "3.png").write_text("no image")
    flags = [*SMALL, "--data-path", data, "--cache-dataset", "host", "--cache-dir", tmp_path / "cache"]
    result = run_ranks("_normal/train.py", *flags, "--output-dir", tmp_path, processes=2, check=False)
    assert result.returncode == 2
    assert result.stderr.count("3.png: cannot be read as an image") == 1
    assert "Traceback" not in result.stderr


def test_files_and_cache_share_their_transforms(folder, tmp_path):
    """What the layout of the cache rests on: a resize to the size that an image has keeps its pixels."""
    image = F.resize(Image.open(folder / "val" / "a" / "0.png"), [36])
    for backend in ("pil", "tensor"):
        transform = evaluation_transform(36, 32, backend=backend)
        assert torch.equal(transform(image), F.center_crop(F.pil_to_tensor(image), [32, 32]))
    assert training_transform(16, (0.3,), gray=True, random_erase=1.0)(image.convert("L")).shape == (1, 16, 16)


def test_nothing_is_built_for_a_run_that_cannot_begin(image_folder, tmp_path, capsys):
    (tmp_path / "model_3.pth").touch()
    flags = [*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path)]
    with pytest.raises(UserError, match="another run is there"):
        normal.main([*flags, "--cache-dataset", "host", "--cache-dir", str(tmp_path / "cache")])
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="another run is there"):
        normal.main([*flags, "--cache-dir", str(tmp_path / "cache")])
    assert "--cache-dir: without effect, since --cache-dataset is off." in capsys.readouterr().out
