"""--bad-images skip: which readable images stand in for a run of unreadable ones in training."""

from collections import Counter

import numpy as np
import pytest
import torch

from tests.conftest import write_image
from tests.helpers.caches import splits
from utils.data.dataset import BadImages, ImageFolder, batches, build_loader
from utils.data.samplers import SampleKey, TrainingSampler
from utils.data.transforms import training_transform

CPU = torch.device("cpu")
BAD = range(50, 80)  # stand together in the second of two classes of 40 and 70 images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    for split in ("train", "val"):
        for index in range(110):
            name = "ab"[index >= 40]
            write_image(root / split / name / f"{index:03}.png", np.full((12, 12), index))
            if split == "train" and index in BAD:
                (root / split / name / f"{index:03}.png").write_text("no image")
    return root


def stand_ins(dataset, *, epoch=0, workers=0, rank=0, world_size=1, first_step=0, repeats=1):
    """The image that was read for each key of an epoch's order."""
    sampler = TrainingSampler(len(dataset), 5, rank, world_size, seed=4, repeats=repeats)
    sampler.set_position(epoch, first_step)
    keys = [key for batch in sampler for key in batch]
    sampler.set_position(epoch, first_step)
    loader = build_loader(dataset, sampler, workers, pin_memory=False)
    found = [index for batch in batches(loader, CPU, BadImages(100)) for index in batch.indices.tolist()]
    return dict(zip(keys, found, strict=True))


def opened(folder, seed=4):
    return ImageFolder(folder / "train", training_transform(8, (0.3,)), seed, on_bad_image="replace")


def test_stand_ins_are_spread_over_the_class(folder):
    dataset = opened(folder)
    found = stand_ins(dataset)
    assert all(key.index == index for key, index in found.items() if key.index not in BAD)
    replaced = [index for key, index in found.items() if key.index in BAD]
    assert len(replaced) == 30
    assert set(dataset.targets[replaced]) == {1}
    assert not set(replaced) & set(BAD)
    counts = Counter(replaced)  # of 40 readable ones: 21 different ones are expected
    assert len(counts) >= 15
    assert max(counts.values()) <= 5


def test_stand_ins_bear_their_own_class_and_pixels(folder):
    dataset = opened(folder)
    batch = dataset.__getitems__([SampleKey(index) for index in BAD])
    assert batch.targets.tolist() == [1] * 30
    assert batch.images.float().mean((1, 2, 3)).tolist() == batch.indices.tolist()  # the level is the index


def test_stand_ins_depend_on_seed_epoch_index_and_repeat_only(folder):
    dataset = opened(folder)
    expected = stand_ins(dataset)
    assert stand_ins(opened(folder), workers=2) == expected
    assert stand_ins(dataset, first_step=9).items() <= expected.items()  # a resumed run
    ranks = [stand_ins(dataset, rank=rank, world_size=2) for rank in range(2)]
    assert ranks[0] | ranks[1] == expected
    keys = [SampleKey(index, epoch, repeat) for index in BAD for epoch, repeat in ((0, 0), (1, 0), (0, 1))]
    by_key = dataset.__getitems__(keys).indices.numpy().reshape(30, 3)
    other_seed = opened(folder, seed=5).__getitems__(keys[::3]).indices.numpy()
    for other in (by_key[:, 1], by_key[:, 2], other_seed):
        assert (by_key[:, 0] != other).mean() > 0.7


@pytest.mark.parametrize("kind", ["host", "device"])
def test_stand_ins_from_a_cache_are_those_of_the_files(kind, folder, tmp_path):
    flags = ["--bad-images", "skip", "--seed", "4"]
    plain = splits(folder, tmp_path, *flags).training
    cached = splits(folder, tmp_path, *flags, "--cache-dataset", kind).training
    assert stand_ins(cached) == stand_ins(plain) == stand_ins(opened(folder))
