"""ImageFolder, its batches, and random numbers that depend on the image only."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from tests.conftest import write_image
from utils.data.dataset import ImageFolder, batches, build_loader, decode_in_order
from utils.data.samplers import EvaluationSampler, SampleKey, TrainingSampler
from utils.data.transforms import training_transform
from utils.runtime.errors import UserError

TO_TENSOR = v2.Compose([v2.RGB(), v2.PILToTensor()])
CPU = torch.device("cpu")


def write_files(root: Path, *names: str) -> Path:
    """Images of noise at root/<name>, each with another seed."""
    for seed, name in enumerate(names):
        write_image(root / name, np.random.default_rng(seed).integers(0, 256, (20, 24)))
    return root


@pytest.fixture
def four(tmp_path):
    """A class of four images."""
    return write_files(tmp_path, *(f"a/{number}.png" for number in range(4)))


def augmented(folder: Path) -> ImageFolder:
    return ImageFolder(folder, training_transform(16, (0.3,), auto_augment="ra", random_erase=0.5))


# Items


def test_classes_and_paths_are_sorted_by_name(tmp_path):
    write_files(tmp_path, "b/2.png", "b/10.png", "b/3.jpg", "a/x.JPEG", "C/y.bmp")
    dataset = ImageFolder(tmp_path, TO_TENSOR)
    assert dataset.classes == ["C", "a", "b"]
    expected = ["C/y.bmp", "a/x.JPEG", "b/10.png", "b/2.png", "b/3.jpg"]
    assert [dataset.path(index) for index in range(len(dataset))] == [tmp_path / name for name in expected]
    assert dataset.targets.tolist() == [0, 1, 2, 2, 2]


def test_file_names_of_any_bytes_are_read(tmp_path):
    names = (b"with space.png", "gr\u00f6\u00dfe \u5927.png".encode(), b"\xff\xfe no text.png", b"line\nbreak.png")
    folder = os.fsencode(tmp_path) + b"/class \xff/"
    os.makedirs(folder)
    for level, name in enumerate(names):
        write_image(tmp_path / "image.png", np.full((1, 1), level))
        os.rename(tmp_path / "image.png", folder + name)
    dataset = ImageFolder(tmp_path, lambda image: image.getpixel((0, 0)))
    levels = {os.fsencode(dataset.path(index).name): dataset[SampleKey(index)][0] for index in range(len(dataset))}
    assert levels == {name: level for level, name in enumerate(names)}


# Determinism


def test_an_augmentation_depends_on_its_key_and_not_on_the_order(four):
    dataset = augmented(four)
    keys = [SampleKey(index, epoch, repeat) for index in range(4) for epoch in range(2) for repeat in range(2)]
    forwards = {key: dataset[key][0] for key in keys}
    torch.manual_seed(123)
    again = augmented(four)
    for key in reversed(keys):
        torch.rand(3)  # other code draws in between
        assert torch.equal(dataset[key][0], forwards[key])
        assert torch.equal(again[key][0], forwards[key])


def test_seed_epoch_index_and_repeat_each_change_the_augmentation(four):
    drawn = {
        tuple(ImageFolder(four, lambda _: torch.rand(4), seed)[SampleKey(index, epoch, repeat)][0].tolist())
        for seed in range(2)
        for epoch in range(2)
        for index in range(2)
        for repeat in range(2)
    }
    assert len(drawn) == 16


def images_by_key(folder: Path, workers: int, epochs: int, world_size: int = 1) -> dict[tuple[int, int], torch.Tensor]:
    """Images by (epoch, index) from the loaders of all ranks."""
    images = {}
    for rank in range(world_size):
        dataset = augmented(folder)
        sampler = TrainingSampler(len(dataset), 4 // world_size, rank, world_size)
        loader = build_loader(dataset, sampler, workers, pin_memory=False)
        for epoch in range(epochs):
            sampler.set_position(epoch)
            for batch in batches(loader, CPU):
                images |= {(epoch, i): image for i, image in zip(batch.indices.tolist(), batch.images, strict=True)}
    return images


@pytest.mark.parametrize(("workers", "world_size"), [(2, 1), (0, 2)])
def test_images_do_not_depend_on_the_numbers_of_workers_and_ranks(workers, world_size, four):
    alone = images_by_key(four, workers=0, epochs=2)
    assert len(alone) == 8
    assert not torch.equal(alone[0, 3], alone[1, 3])
    before = torch.get_rng_state()
    images = images_by_key(four, workers, 2, world_size)
    assert torch.equal(torch.get_rng_state(), before)
    assert images.keys() == alone.keys()
    assert all(torch.equal(images[key], alone[key]) for key in alone)


# Batches


def test_batches_are_uint8_images_with_their_targets_and_indices(tmp_path):
    folder = write_files(tmp_path, "a/0.png", "b/0.png", "b/1.png")
    dataset = ImageFolder(folder, TO_TENSOR)
    first, second = batches(build_loader(dataset, EvaluationSampler(3, 2), 0, pin_memory=False), CPU)
    assert first.images.dtype == torch.uint8
    assert first.images.shape == (2, 3, 20, 24)
    assert torch.equal(first.images[1], dataset[SampleKey(1)][0])
    assert first.targets.dtype == torch.int64
    assert [first.targets.tolist(), first.indices.tolist()] == [[0, 1], [0, 1]]
    assert [second.targets.tolist(), second.indices.tolist()] == [[1], [2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_decoded_in_order_from_any_position(workers):
    steps = list(decode_in_order(list, range(3, 10), 3, workers))
    assert steps == [[3, 4, 5], [6, 7, 8], [9]]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_surfaces_from_the_loader_as_one_sentence(four, workers):
    path = four / "a" / "2.png"
    path.write_text("no image")
    loader = build_loader(ImageFolder(four, TO_TENSOR), EvaluationSampler(4, 2), workers, pin_memory=False)
    indices, message = [], ""
    try:  # pytest.raises would keep the traceback, and the workers with it
        for batch in batches(loader, CPU):
            indices += batch.indices.tolist()
    except UserError as error:
        message = str(error)
    assert indices == [0, 1]
    assert message.startswith(f"{path}: cannot be read as an image")
    assert "Traceback" not in message
    assert "\n" not in message
