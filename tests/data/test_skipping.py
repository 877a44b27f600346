"""--bad-images skip: replacements in training, blanks in evaluation, and what a run reports."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from _normal import train as normal
from tests.conftest import SMALL, write_image, write_image_folder
from tests.helpers.caches import CPU, splits
from tests.helpers.runs import assert_same
from utils.data.dataset import BadImages, Batch, ImageFolder, batches, build_loader
from utils.data.samplers import EvaluationSampler, SampleKey, TrainingSampler
from utils.data.transforms import Normalize, evaluation_transform, training_transform
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.training.evaluation import measure, predict
from utils.training.models import create_classifier

UNREADABLE = range(50, 80)  # in a row, in the second of two classes of 40 and 70 images
TRAIN, VAL = (0, 5, 6, 35), (0, 5, 6, 20)  # unreadable in `spoilt`


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """Images whose level is their index; those of UNREADABLE are no images."""
    root = tmp_path_factory.mktemp("unreadable")
    for split in ("train", "val"):
        for index in range(110):
            path = root / split / "ab"[index >= 40] / f"{index:03}.png"
            write_image(path, np.full((12, 12), index))
            if split == "train" and index in UNREADABLE:
                path.write_text("no image")
    return root


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """The tiny set with unreadable images in train and val: at 0, at 5 and 6, and at their ends."""
    root = write_image_folder(tmp_path_factory.mktemp("spoilt"))
    for split, indices in (("train", TRAIN), ("val", VAL)):
        dataset = ImageFolder(root / split, None)
        for index in indices:
            dataset.path(index).write_text("no image")
    return root


def opened(root, seed=4):
    return ImageFolder(root / "train", training_transform(8, (0.3,)), seed, on_bad_image="replace")


def evaluation(root, on_bad_image="blank", **settings):
    return ImageFolder(root / "val", evaluation_transform(36, 32), on_bad_image=on_bad_image, **settings)


# Training


def replacements(dataset, *, workers=0, rank=0, world_size=1, first_step=0):
    """The image that was read for each key of an epoch."""
    sampler = TrainingSampler(len(dataset), 5, rank, world_size, seed=4)
    sampler.set_position(0, first_step)
    keys = [key for batch in sampler for key in batch]
    loader = build_loader(dataset, sampler, workers, pin_memory=False)
    indices = [index for batch in batches(loader, CPU, BadImages(100)) for index in batch.indices.tolist()]
    return dict(zip(keys, indices, strict=True))


def test_replacements_are_spread_over_the_class(two_classes):
    dataset = opened(two_classes)
    by_key = replacements(dataset)
    assert all(key.index == index for key, index in by_key.items() if key.index not in UNREADABLE)
    replaced = [index for key, index in by_key.items() if key.index in UNREADABLE]
    assert len(replaced) == 30
    assert set(dataset.targets[replaced]) == {1}
    assert not set(replaced) & set(UNREADABLE)
    counts = Counter(replaced)  # of 40 readable images: 21 different ones are expected
    assert len(counts) >= 15
    assert max(counts.values()) <= 5


def test_replacements_have_their_own_indices_pixels_and_messages(two_classes):
    dataset = opened(two_classes)
    batch = dataset.__getitems__([SampleKey(index, 1, 2) for index in (12, *UNREADABLE)])
    assert batch.targets.tolist() == [0] + [1] * 30
    assert batch.images.float().mean((1, 2, 3)).tolist() == batch.indices.tolist()  # the level is the index
    assert batch.indices[0] == 12
    assert {message.split(": ")[0] for message in batch.unreadable} >= {
        str(dataset.path(index)) for index in UNREADABLE
    }


def test_replacements_depend_on_seed_epoch_index_and_repeat_only(two_classes):
    dataset = opened(two_classes)
    expected = replacements(dataset)
    assert replacements(opened(two_classes), workers=2) == expected
    assert replacements(dataset, first_step=9).items() <= expected.items()  # a resumed run
    ranks = [replacements(dataset, rank=rank, world_size=2) for rank in range(2)]
    assert ranks[0] | ranks[1] == expected
    keys = [SampleKey(index, epoch, repeat) for index in UNREADABLE for epoch, repeat in ((0, 0), (1, 0), (0, 1))]
    by_key = dataset.__getitems__(keys).indices.numpy().reshape(30, 3)
    other_seed = opened(two_classes, seed=5).__getitems__(keys[::3]).indices.numpy()
    for changed in (by_key[:, 1], by_key[:, 2], other_seed):
        assert (by_key[:, 0] != changed).mean() > 0.7


@pytest.mark.parametrize("kind", ["host", "device"])
def test_replacements_from_a_cache_are_those_of_the_files(kind, two_classes, tmp_path):
    flags = ["--bad-images", "skip", "--seed", "4"]
    plain = splits(two_classes, *flags).training
    cached = splits(two_classes, *flags, cache_dir=tmp_path, kind=kind).training
    assert replacements(cached) == replacements(plain) == replacements(opened(two_classes))


@pytest.mark.parametrize(
    ("limit", "problem"), [(6, "all 7 images are unreadable"), (0, "1 unreadable images, more than --max-bad-images 0")]
)
def test_a_class_without_a_readable_image_is_an_error(limit, problem, tmp_path):
    folder = write_image_folder(tmp_path) / "val" / "dark"
    for name in os.listdir(folder):
        (folder / name).write_text("no image")
    error = evaluation(tmp_path, "replace", max_bad_images=limit).__getitems__([SampleKey(1), SampleKey(7 + 2)])
    assert isinstance(error, UserError)
    assert str(error).startswith(f"{folder}: {problem}; replace or remove them; the last: {folder}")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_from_any_worker(spoilt, workers):
    loader = build_loader(opened(spoilt), TrainingSampler(36, 6), workers, pin_memory=False)
    bad_images, indices = BadImages(4), []
    for batch in batches(loader, CPU, bad_images):
        indices += batch.indices.tolist()
    bad_images.share()
    assert bad_images.count == 4
    assert set(indices) == set(range(36)) - set(TRAIN)
    assert len(indices) == 36


# Evaluation


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_unreadable_images_out(workers, tmp_path, spoilt, capsys):
    torch.manual_seed(0)
    model = create_classifier("test_resnet", 3, 32)

    def evaluate(root, on_bad_image, bad_images):
        dataset = evaluation(root, on_bad_image)
        loader = build_loader(dataset, EvaluationSampler(len(dataset), 4), workers, pin_memory=False)
        return predict(model, loader, Normalize([0.3], [0.3]), CPU, bad_images=bad_images)

    bad_images = BadImages(100)
    skipped = evaluate(spoilt, "blank", bad_images)
    assert bad_images.count == 4
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--bad-images skip: ")]
    assert [line.split(": ")[1] for line in lines] == [str(evaluation(spoilt).path(index)) for index in VAL]
    with pytest.raises(UserError, match="cannot be read as an image"):
        evaluate(spoilt, "error", None)
    readable = write_image_folder(tmp_path)
    for path in [evaluation(readable).path(index) for index in VAL]:
        path.unlink()
    without = evaluate(readable, "error", None)
    assert torch.equal(skipped.targets, without.targets)
    torch.testing.assert_close(skipped.logits, without.logits)
    assert measure(skipped) == pytest.approx(measure(without), abs=1e-6)


def test_an_evaluation_without_a_readable_image_is_an_error(tmp_path):
    root = write_image_folder(tmp_path, images=4)
    for path in (root / "val").rglob("*.png"):
        path.write_text("no image")
    dataset = evaluation(root)
    loader = build_loader(dataset, EvaluationSampler(len(dataset), 4), 0, pin_memory=False)
    model = create_classifier("test_resnet", 3, 32)
    with pytest.raises(UserError, match=f"^{root / 'val'}: .* of the 9 images evaluated"):
        predict(model, loader, Normalize([0.3], [0.3]), CPU, bad_images=BadImages(100))


# Runs


def run(data: Path, folder: Path, *more: object) -> None:
    flags = [*SMALL, "--epochs", "2", "--data-path", data, "--output-dir", folder, "--bad-images", "skip", *more]
    normal.main([str(flag) for flag in flags])


def test_a_run_reports_what_it_skips_and_resumes_exactly(spoilt, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(spoilt, whole)
    lines = capsys.readouterr().out.splitlines()
    reported = [line.split(": ")[1] for line in lines if line.startswith("--bad-images skip")]
    unreadable = {str(path) for path in spoilt.rglob("*.png") if path.read_bytes() == b"no image"}
    assert len(reported) == len(set(reported)) >= 7  # an epoch drops a few images
    assert set(reported) <= unreadable
    normal.main(["--resume", str(whole / "checkpoint_prev.pth"), "--output-dir", str(part), "--device", "cpu"])
    assert_same(*(torch.load(folder / "model_1.pth", weights_only=True)["model"] for folder in (part, whole)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-bad-images", 3, "--batch-size", 36), r"^4 unreadable images, more than --max-bad-images 3"),
        (("--bad-images", "error"), "cannot be read as an image"),
    ],
)
def test_a_run_stops_at_too_many_unreadable_images(flags, message, spoilt, tmp_path):
    with pytest.raises(UserError, match=message):
        run(spoilt, tmp_path, *flags)


def test_ranks_share_their_unreadable_images(monkeypatch, capsys):
    other_rank = [{"c", "b"}, {"b", "d"}]  # at each call
    monkeypatch.setattr(distributed, "all_gather_object", lambda local: [local, other_rank.pop(0)])
    bad_images = BadImages(3)
    bad_images.record(["b"])
    bad_images.record(("a", "b"))
    bad_images.share()
    assert bad_images.count == 3
    assert capsys.readouterr().out.splitlines() == [f"--bad-images skip: {name}" for name in "abc"]
    bad_images.record(["a"])
    with pytest.raises(UserError, match=r"^4 unreadable images, more than --max-bad-images 3; ") as caught:
        bad_images.share()
    assert caught.value.agreed
    assert capsys.readouterr().out.splitlines() == ["--bad-images skip: d"]


def test_a_batch_keeps_its_messages_when_it_is_pinned(monkeypatch):
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
    pinned = pin_memory(Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), ("a", "b")))
    assert isinstance(pinned, Batch)
    assert list(pinned.unreadable) == ["a", "b"]
