"""Features: those of the network before its head, reused exactly while weights, images and preparation are the same."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import write_image_folder
from tests.helpers.exports import MASKS, random_model, write_bare, write_checkpoint
from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import safetensors_bytes
from utils.data.dataset import BadImages
from utils.data.folders import ImageFiles
from utils.inference.features import Features, Source, load_features, open_sources
from utils.runtime.errors import UserError

CPU = torch.device("cpu")
SIZES = {"train_crop_size": 32, "val_crop_size": 32, "val_resize_size": 36}


def opened(path: Path | str, **given: object) -> Source:
    [source] = open_sources([str(path)], given, 0, CPU)
    vars(source.args).update(batch_size=8, workers=0)
    return source


def features_of(source: Source, folder: Path, cache: Path, **reading: object) -> Features:
    vars(source.args).update(reading)
    cache.mkdir(exist_ok=True)
    return load_features(source, ImageFiles.find(folder), cache, BadImages(10), CPU)


@pytest.fixture
def weights(tmp_path):
    return write_checkpoint(tmp_path / "model_0.pth", "--mean", 0.4)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_the_head_makes_logits_of_the_features(name, tmp_path, image_folder):
    source = opened(write_checkpoint(tmp_path / "model_0.pth", "--model", name))
    features = features_of(source, image_folder / "val", tmp_path / "cache")
    model = random_model(name)
    images = [np.asarray(Image.open(path)) for path in sorted((image_folder / "val").rglob("*.png"))]
    resized = [Image.fromarray(image).convert("RGB").resize((36, 40), Image.Resampling.BILINEAR) for image in images]
    crops = np.stack([np.asarray(image)[4:36, 2:34] for image in resized])  # the shorter side has 36 pixels already
    inputs = (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - 0.3162) / 0.3213
    with torch.no_grad():
        expected = model(inputs)
        logits = model.get_classifier()(torch.from_numpy(features.values))
    assert (logits - expected).abs().max() < 1e-5
    assert features.targets.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert features.indices.tolist() == list(range(21))


def test_features_are_reused_until_weights_images_or_preparation_change(tmp_path, weights, capsys):
    data = write_image_folder(tmp_path / "data", images=2)
    cache = tmp_path / "cache"

    def is_reused(path: Path = weights, **given: object) -> bool:
        capsys.readouterr()
        features_of(opened(path, **given), data / "train", cache)
        return "features reused from" in capsys.readouterr().out

    first = features_of(opened(weights), data / "train", cache)
    assert is_reused()
    assert all(map(np.array_equal, features_of(opened(weights), data / "train", cache), first))
    assert is_reused(shutil.copy(weights, tmp_path / "model_0_copy.pth")) is False  # another name, another file
    other = checkpoint.weights_state(random_model(seed=1), ["a", "b", "c"], checkpoint.read(weights)["args"])
    assert not is_reused(val_crop_size=28)
    assert not is_reused(gray=True)
    image = data / "train" / "dark" / "1.png"
    image.write_bytes((data / "train" / "bright" / "0.png").read_bytes())
    assert not is_reused()
    assert is_reused()
    os.rename(image, image.with_name("2.png"))
    assert not is_reused()
    checkpoint.save(weights, other)
    assert not is_reused()
    assert len(list(cache.iterdir())) == 7


def test_a_damaged_file_is_computed_again(tmp_path, weights, image_folder, capsys):
    source = opened(weights)
    expected = features_of(source, image_folder / "test", tmp_path / "cache")
    [path] = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    pickled, unsorted = tmp_path / "pickled.npz", tmp_path / "unsorted.npz"
    np.savez(pickled, values=np.array([object()], dtype=object), targets=expected.targets, indices=expected.indices)
    np.savez(unsorted, values=expected.values, targets=expected.targets, indices=expected.indices[::-1])
    for content in (b"", whole[:-100], b"x" * 100, pickled.read_bytes(), unsorted.read_bytes()):
        path.write_bytes(content)
        capsys.readouterr()
        again = features_of(source, image_folder / "test", tmp_path / "cache")
        assert f"{path}: is damaged; the features are computed again." in capsys.readouterr().out
        assert np.array_equal(again.values, expected.values)
        assert path.read_bytes() == whole


def test_unreadable_images_are_left_out_only_with_skip(tmp_path, weights, capsys):
    data = write_image_folder(tmp_path / "data", images=2)
    (data / "train" / "dark" / "0.png").write_text("no image")
    skipped = features_of(opened(weights), data / "train", tmp_path / "cache", bad_images="skip")
    assert (skipped.indices.tolist(), skipped.targets.tolist()) == ([0, 1, 3, 4, 5], [0, 0, 1, 2, 2])
    features_of(opened(weights), data / "train", tmp_path / "cache", bad_images="skip")
    assert "train: 1 unreadable image left out" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"dark/0.png: cannot be read as an image"):
        features_of(opened(weights), data / "train", tmp_path / "cache")


def test_files_without_classes_or_head_are_read_as_by_finetune(tmp_path, weights, image_folder):
    """A bare state dict, one without a head, and safetensors give the features of the checkpoint."""
    bare = write_bare(tmp_path / "bare.pth")
    state = torch.load(bare, weights_only=True)
    headless = {f"encoder.{key}": value for key, value in state.items() if not key.startswith("fc.")}
    torch.save({"state_dict": headless}, tmp_path / "encoder.pth")
    args = {"model": "test_resnet", "mean": [0.4], **SIZES}
    (tmp_path / "export.safetensors").write_bytes(safetensors_bytes(random_model(), ["a", "b", "c"], args))
    expected = features_of(opened(weights), image_folder / "test", tmp_path / "cache").values
    for name in ("bare.pth", "encoder.pth"):
        source = opened(tmp_path / name, model="test_resnet", mean=[0.4], **SIZES)
        assert np.array_equal(features_of(source, image_folder / "test", tmp_path / "cache").values, expected)
    source = opened(tmp_path / "export.safetensors")
    assert np.array_equal(features_of(source, image_folder / "test", tmp_path / "cache").values, expected)
    with pytest.raises(UserError, match=r"bare.pth: does not name its model; give --model NAME"):
        opened(bare)
    with pytest.raises(UserError, match=r"these weights do not fit the model: .*Give the --model \(now test_vit\)"):
        opened(bare, model="test_vit", **SIZES)


def test_flags_contradict_an_only_file_and_yield_to_one_of_several(tmp_path, weights, capsys):
    with pytest.raises(UserError, match=r"^--mean 0.1: .*model_0.pth was made with --mean 0.4; leave the flag out"):
        opened(weights, mean=[0.1])
    bare = write_bare(tmp_path / "bare.pth")
    given = {"model": "test_resnet", "mean": [0.1], "val_crop_size": 28}
    first, second = open_sources([str(weights), str(bare)], given, 0, CPU)
    assert (first.args.mean, second.args.mean) == ([0.4], [0.1])
    assert first.args.val_crop_size == second.args.val_crop_size == 28
    message = f"{weights}: was made with --mean 0.4, which is used instead of --mean 0.1."
    assert message in capsys.readouterr().err


def test_random_is_an_untrained_network_like_the_first_file(tmp_path, weights):
    heated = write_checkpoint(tmp_path / "heated.pth", *MASKS, script="_policy_gradient")
    names = ["random", str(weights), str(heated)]
    first, second = (open_sources(names, {}, seed, CPU)[0] for seed in (3, 3))
    assert (first.args.model, first.args.mean, first.weights) == ("test_resnet", [0.4], None)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(first.backbone(images), second.backbone(images))
    [another] = open_sources(["random"], {"model": "test_resnet"}, 4, CPU)
    assert not torch.equal(first.backbone(images), another.backbone(images))
    with pytest.raises(UserError, match=r"^random: give --model NAME, or also a weight file to compare with"):
        open_sources(["random"], {}, 0, CPU)
