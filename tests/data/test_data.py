"""Folders of images, the samplers' arithmetic, and that no random number depends on who draws it."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from tests.conftest import write_image
from utils.data.dataset import ImageFolder, batches, build_loader, read_image
from utils.data.folders import ImageFiles, check_same_classes, find_classes, read_excluded
from utils.data.samplers import EvaluationSampler, SampleKey, TrainingSampler, derive_seed
from utils.data.transforms import training_transform
from utils.runtime.errors import UserError

TO_TENSOR = v2.PILToTensor()
CPU = torch.device("cpu")


def noise_image(seed: int, size: tuple[int, ...] = (20, 24)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def write_files(root: Path, *names: str) -> Path:
    """Images of noise at root/<name>, each of another seed."""
    for seed, name in enumerate(names):
        write_image(root / name, noise_image(seed))
    return root


def augmented(folder: Path, seed: int = 0) -> ImageFolder:
    transform = training_transform(16, (0.3,), auto_augment="ra", random_erase=0.5)
    return ImageFolder(folder, transform, seed)


# ImageFolder


def test_classes_and_paths_are_sorted_by_name(tmp_path):
    names = ("b/2.png", "b/10.png", "b/3.jpg", "a/x.JPEG", "C/y.bmp")
    write_files(tmp_path, *names)
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "stray.png").write_text("no class")
    dataset = ImageFolder(tmp_path, TO_TENSOR)
    assert dataset.classes == ["C", "a", "b"]
    expected = ["C/y.bmp", "a/x.JPEG", "b/10.png", "b/2.png", "b/3.jpg"]
    assert [dataset.path(index) for index in range(len(dataset))] == [tmp_path / name for name in expected]
    assert dataset.targets.tolist() == [0, 1, 2, 2, 2]
    assert find_classes(tmp_path) == dataset.classes


def test_item_is_the_rgb_image_its_class_and_its_position(tmp_path):
    grey, colour = noise_image(0), noise_image(1, (20, 24, 3))
    write_image(tmp_path / "a" / "grey.png", grey)
    write_image(tmp_path / "b" / "colour.png", colour)
    dataset = ImageFolder(tmp_path, TO_TENSOR)
    image, target, index = dataset[SampleKey(0)]
    assert (target, index) == (0, 0)
    assert torch.equal(image, torch.from_numpy(np.stack([grey] * 3)))
    image, target, index = dataset[SampleKey(1)]
    assert (target, index) == (1, 1)
    assert torch.equal(image, torch.from_numpy(colour.transpose(2, 0, 1)))


def test_names_that_are_no_utf8_are_read(tmp_path):
    write_files(tmp_path, "a/plain.png")
    odd = os.fsencode(tmp_path / "a") + b"/\xff\xfe.png"
    os.rename(tmp_path / "a" / "plain.png", odd)
    dataset = ImageFolder(tmp_path, TO_TENSOR)
    assert os.fsencode(dataset.path(0)) == odd
    assert dataset[SampleKey(0)][0].shape == (3, 20, 24)


# Determinism


def test_an_augmentation_depends_on_its_key_and_not_on_the_order(tmp_path):
    dataset = augmented(write_files(tmp_path, *(f"a/{number}.png" for number in range(4))))
    keys = [SampleKey(index, epoch, repeat) for index in range(4) for epoch in range(2) for repeat in range(2)]
    forwards = {key: dataset[key][0] for key in keys}
    torch.manual_seed(123)
    backwards = {}
    for key in reversed(keys):
        torch.rand(3)  # somebody else draws in between
        backwards[key] = dataset[key][0]
    assert all(torch.equal(forwards[key], backwards[key]) for key in keys)
    anew = augmented(tmp_path)
    assert all(torch.equal(forwards[key], anew[key][0]) for key in keys)


def test_seed_epoch_index_and_repeat_each_give_another_augmentation(tmp_path):
    write_files(tmp_path, "a/0.png", "a/1.png")

    def draw(_):
        return torch.rand(4)

    drawn = [
        ImageFolder(tmp_path, draw, seed)[SampleKey(index, epoch, repeat)][0]
        for seed in range(2)
        for epoch in range(2)
        for index in range(2)
        for repeat in range(2)
    ]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == 16


def test_the_global_generator_is_left_where_it_was(tmp_path):
    write_files(tmp_path, "a/0.png")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    augmented(tmp_path)[SampleKey(0)]
    assert torch.equal(torch.get_rng_state(), before)

    def fail(_):
        torch.rand(1)
        raise ValueError("a transform that fails")

    with pytest.raises(ValueError, match="a transform that fails"):
        ImageFolder(tmp_path, fail)[SampleKey(0)]
    assert torch.equal(torch.get_rng_state(), before)


def loaded(folder: Path, workers: int, epochs: int, world_size: int = 1) -> dict[tuple[int, int], torch.Tensor]:
    """Images by (epoch, index), as the loaders of all ranks give them."""
    images = {}
    for rank in range(world_size):
        dataset = augmented(folder)
        sampler = TrainingSampler(len(dataset), 4 // world_size, rank, world_size)
        loader = build_loader(dataset, sampler, workers, pin_memory=False)
        for epoch in range(epochs):
            sampler.set_position(epoch)
            for batch in batches(loader, CPU):
                for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
                    images[epoch, index] = image
    return images


def test_loader_gives_the_same_images_with_any_number_of_workers_and_ranks(tmp_path):
    folder = write_files(tmp_path, *(f"a/{number}.png" for number in range(8)))
    alone = loaded(folder, workers=0, epochs=2)
    assert len(alone) == 16
    assert not torch.equal(alone[0, 3], alone[1, 3])
    for other in (loaded(folder, workers=2, epochs=2), loaded(folder, workers=0, epochs=2, world_size=2)):
        assert other.keys() == alone.keys()
        assert all(torch.equal(other[key], alone[key]) for key in alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_does_not_touch_the_global_generator(tmp_path, workers):
    folder = write_files(tmp_path, *(f"a/{number}.png" for number in range(4)))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert len(loaded(folder, workers, epochs=1)) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_uint8_images_with_their_targets_and_indices(tmp_path):
    folder = write_files(tmp_path, "a/0.png", "b/0.png", "b/1.png")
    dataset = ImageFolder(folder, TO_TENSOR)
    first, second = batches(build_loader(dataset, EvaluationSampler(3, 2), 0, pin_memory=False), CPU)
    assert first.images.dtype == torch.uint8
    assert first.images.shape == (2, 3, 20, 24)
    assert torch.equal(first.images[1], dataset[SampleKey(1)][0])
    assert first.targets.dtype == torch.int64
    assert first.targets.tolist() == [0, 1]
    assert first.indices.tolist() == [0, 1]
    assert second.targets.tolist() == [1]
    assert second.indices.tolist() == [2]


def test_derived_seeds_keep_purposes_and_numbers_apart():
    arguments = [("order", 0, 1), ("order", 1, 0), ("order", 0), ("order", 0, 0, 1), ("mixing", 0, 1), ("order", 0, 2)]
    seeds = [derive_seed(*argument) for argument in arguments]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert derive_seed("order", 0, 1) == seeds[0]


# Reading errors


def write_text(path: Path) -> None:
    path.write_text("this is text, not an image\n")


def write_cut_short(path: Path) -> None:
    write_image(path, noise_image(0, (64, 64)))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("text.png", write_text),
        ("cut.jpg", write_cut_short),
        ("cut.png", write_cut_short),
        ("empty.png", write_nothing),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path, name, write):
    write(tmp_path / name)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}: cannot be read as an image")) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_an_image_that_went_away_is_named(tmp_path):
    write_files(tmp_path, "a/0.png")
    dataset = ImageFolder(tmp_path, TO_TENSOR)
    (tmp_path / "a" / "0.png").unlink()
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "a" / "0.png"))):
        dataset[SampleKey(0)]


def test_a_missing_split_is_named_with_the_layout(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'train'}: no such folder")) as caught:
        ImageFolder(tmp_path / "train", TO_TENSOR)
    assert "DATA/{train,val,test}/<class>/<image>" in str(caught.value)


def test_a_split_without_classes_is_named(tmp_path):
    write_files(tmp_path, "no_class.png")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: holds no class folders")):
        ImageFolder(tmp_path, TO_TENSOR)


def test_a_class_without_images_is_named(tmp_path):
    write_files(tmp_path, "full/0.png")
    (tmp_path / "hollow" / "deeper").mkdir(parents=True)
    (tmp_path / "hollow" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'hollow'}: holds no image")):
        ImageFolder(tmp_path, TO_TENSOR)


def test_a_list_leaves_out_images_whatever_their_names(tmp_path):
    odd = os.fsdecode(b"a/caf\xe9 1.png")
    write_files(tmp_path / "train", odd, "a/#2.png", "a/3.png", "b/4.png")
    listed = tmp_path / "list.txt"
    listed.write_bytes(
        b"# twins\n  train/a/caf\xe9 1.png \r\ntrain/a/#2.png\ntrain/b/absent.png\nval/b/4.png\nelse\n\n"
    )
    excluded = read_excluded(listed)
    assert excluded == {"train": {odd, "a/#2.png", "b/absent.png"}, "val": {"b/4.png"}, "test": set(), "": {"else"}}
    dataset = ImageFolder(tmp_path / "train", TO_TENSOR, files=ImageFiles.find(tmp_path / "train", excluded["train"]))
    assert [dataset.path(index) for index in range(2)] == [tmp_path / "train/a/3.png", tmp_path / "train/b/4.png"]
    assert dataset.targets.tolist() == [0, 1]
    assert (len(dataset), dataset.files.excluded) == (2, 2)
    with pytest.raises(UserError, match=f"^{tmp_path}/train/b: --exclude leaves this class no image"):
        ImageFiles.find(tmp_path / "train", {"b/4.png"})
    with pytest.raises(UserError, match=r"--exclude .*train: cannot be read \(Is a directory\)"):
        read_excluded(tmp_path / "train")


def test_a_class_in_one_split_only_is_named(tmp_path):
    check_same_classes(tmp_path, {"train": ["a", "b"], "val": ["a", "b"], "test": ["a", "b"]})
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "train" / "c"))) as caught:
        check_same_classes(tmp_path, {"train": ["a", "c", "d"], "val": ["a"]})
    assert "in 'train' but not in 'val' (2 such in all)" in str(caught.value)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "test" / "b"))) as caught:
        check_same_classes(tmp_path, {"train": ["a"], "val": ["a"], "test": ["a", "b"]})
    assert "in 'test' but not in 'train' (1 such in all)" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_surfaces_from_the_loader_as_one_clear_sentence(tmp_path, workers):
    write_files(tmp_path, *(f"a/{number}.png" for number in range(6)))
    bad = tmp_path / "a" / "4.png"
    write_text(bad)
    dataset = ImageFolder(tmp_path, TO_TENSOR)
    loader = build_loader(dataset, EvaluationSampler(6, 2), workers, pin_memory=False)
    good, message = [], ""
    try:  # pytest.raises would keep the traceback, and the workers with it
        for batch in batches(loader, CPU):
            good += batch.indices.tolist()
    except UserError as error:
        message = str(error)
    assert good == [0, 1, 2, 3]
    assert message.startswith(f"{bad}: cannot be read as an image")
    assert "Traceback" not in message
    assert "\n" not in message


# Samplers

shapes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 40))
seeds = st.integers(0, 2**32)
epochs = st.integers(0, 100)


def number_of_images(world_size: int, batch_size: int, steps: int, extra: int) -> int:
    """As many as `steps` global batches need, and a remainder below one more."""
    return world_size * batch_size * steps + extra % (world_size * batch_size)


def shares_of_ranks(num_images: int, batch_size: int, world_size: int, epoch: int, **settings: int):
    """The batches of each rank."""
    shares = []
    for rank in range(world_size):
        sampler = TrainingSampler(num_images, batch_size, rank, world_size, **settings)
        sampler.set_position(epoch)
        shares.append(list(sampler))
    return shares


def whole_order(num_images: int, seed: int, epoch: int) -> list[int]:
    """The permutation of an epoch, out of a sampler of one rank and batches of one image."""
    [share] = shares_of_ranks(num_images, 1, 1, epoch, seed=seed)
    return [key.index for [key] in share]


@settings(deadline=None)
@given(shapes, seeds, epochs)
def test_ranks_share_each_global_batch_of_the_permutation(shape, seed, epoch):
    world_size, batch_size, steps, extra = shape
    num_images = number_of_images(*shape)
    order = whole_order(num_images, seed, epoch)
    assert sorted(order) == list(range(num_images))
    shares = shares_of_ranks(num_images, batch_size, world_size, epoch, seed=seed)
    assert [len(share) for share in shares] == [steps] * world_size
    global_batch = world_size * batch_size
    for step in range(steps):
        of_ranks = [[key.index for key in share[step]] for share in shares]
        assert [len(indices) for indices in of_ranks] == [batch_size] * world_size
        together = [index for indices in of_ranks for index in indices]
        assert sorted(together) == sorted(order[step * global_batch : (step + 1) * global_batch])
    keys = [key for share in shares for batch in share for key in batch]
    assert {(key.epoch, key.repeat) for key in keys} == {(epoch, 0)}
    assert len({key.index for key in keys}) == len(keys) == num_images - extra % global_batch


@settings(deadline=None)
@given(shapes, seeds, epochs, st.data())
def test_a_resumed_position_gives_the_tail_of_the_whole(shape, seed, epoch, data):
    world_size, batch_size, steps, _ = shape
    num_images = number_of_images(*shape)
    first_step = data.draw(st.integers(0, steps))
    for rank, whole in enumerate(shares_of_ranks(num_images, batch_size, world_size, epoch, seed=seed)):
        sampler = TrainingSampler(num_images, batch_size, rank, world_size, seed)
        sampler.set_position(epoch, first_step)
        assert list(sampler) == whole[first_step:]
        assert len(sampler) == steps - first_step
        assert sampler.steps_per_epoch == steps


@settings(deadline=None)
@given(shapes, seeds, epochs, st.integers(2, 5))
def test_repeated_augmentation_repeats_each_image_in_a_row(shape, seed, epoch, repeats):
    world_size, batch_size, steps, _ = shape
    num_images = number_of_images(*shape)
    order = whole_order(num_images, seed, epoch)
    expected = [SampleKey(order[place // repeats], epoch, place % repeats) for place in range(num_images)]
    [alone] = shares_of_ranks(num_images, 1, 1, epoch, seed=seed, repeats=repeats)
    assert [key for [key] in alone] == expected
    shares = shares_of_ranks(num_images, batch_size, world_size, epoch, seed=seed, repeats=repeats)
    together = sorted(key for share in shares for batch in share for key in batch)
    assert together == sorted(expected[: steps * world_size * batch_size])
    for rank, share in enumerate(shares):  # copies of one image go to different ranks
        assert share[0] == expected[rank : world_size * batch_size : world_size]


def test_the_order_differs_between_epochs_and_between_seeds():
    orders = [whole_order(40, seed, epoch) for seed in range(2) for epoch in range(2)]
    assert len(set(map(tuple, orders))) == 4
    assert whole_order(40, 1, 1) == orders[3]


def test_the_order_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole_order(40, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_fewer_images_than_a_global_batch_are_refused():
    assert len(TrainingSampler(8, 4, 0, 2)) == 1
    with pytest.raises(UserError, match=r"holds 7 images, fewer than one global batch of 4 x 2 processes = 8"):
        TrainingSampler(7, 4, 0, 2)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 8))
def test_evaluation_gives_each_image_exactly_once(num_images, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        sampler = EvaluationSampler(num_images, batch_size, rank, world_size)
        share = list(sampler)
        assert len(share) == len(sampler)
        assert all(1 <= len(batch) <= batch_size for batch in share)
        seen += [key for batch in share for key in batch]
    assert sorted(seen) == [SampleKey(index) for index in range(num_images)]
