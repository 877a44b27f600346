"""What each flag changes about images, splits and batches: checks that are given `parsed`, final arguments by flags."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from utils.data import splits as data_splits
from utils.data.samplers import SampleKey
from utils.data.transforms import Normalize
from utils.runtime.errors import UserError
from utils.training import build

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def first_image(args, index=0, epoch=0):
    return data_splits.open_splits(args).training[SampleKey(index, epoch, 0)][0]


def changes_the_training_image(*flags, base=()):
    def check(parsed):
        plain = [first_image(parsed(*base), epoch=epoch) for epoch in range(5)]
        changed = [first_image(parsed(*base, *flags), epoch=epoch) for epoch in range(5)]
        assert any(not torch.equal(one, other) for one, other in zip(plain, changed, strict=True))

    return check


def changes_the_evaluated_image(*flags):
    def check(parsed):
        plain, changed = (
            data_splits.open_splits(args).evaluation[SampleKey(0)][0] for args in (parsed(), parsed(*flags))
        )
        assert plain.shape != changed.shape or not torch.equal(plain, changed)

    return check


def normalises_white_to(*flags, expected):
    def check(parsed):
        args = parsed(*flags)
        white = Normalize(args.mean, args.std)(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
        assert white.flatten().tolist() == pytest.approx(expected)

    return check


def check_mixing(*flags):
    def check(parsed):
        images, targets = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
        assert build.batch_mixing(parsed(), 3)(images, targets, 0, 0)[1].shape == (4,)
        mixed_images, mixed = build.batch_mixing(parsed(*flags), 3)(images, targets, 0, 0)
        assert mixed.shape == (4, 3)
        assert not torch.equal(mixed_images, images)

    return check


def check_ra_sampler(parsed):
    def repeats(*flags):
        args = parsed(*flags)
        loader = data_splits.training_loader(args, data_splits.open_splits(args).training, CPU)
        return {key.repeat for batch in loader.batch_sampler for key in batch}

    assert repeats() == {0}
    assert repeats("--ra-sampler") == {0, 1, 2}
    assert repeats("--ra-sampler", "--ra-reps", 2) == {0, 1}


def check_batch_size(parsed):
    args = parsed("--batch-size", 5)
    assert len(next(iter(data_splits.training_loader(args, data_splits.open_splits(args).training, CPU))).targets) == 5
    assert parsed("--batch_size", 6).batch_size == parsed("-b", 6).batch_size == 6


def check_workers(parsed):
    args = parsed("-j", 3)
    assert data_splits.training_loader(args, data_splits.open_splits(args).training, CPU).num_workers == 3


def check_data_path(parsed):
    assert len(data_splits.open_splits(parsed()).training) == 36


def check_num_classes(parsed):
    assert len(data_splits.open_splits(parsed("--num-classes", 3)).classes) == 3
    with pytest.raises(UserError, match=r"--num-classes 4: .* has 3 classes"):
        data_splits.open_splits(parsed("--num-classes", 4))


def check_exclude(parsed, capsys):
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder, "list.txt")
        lines = ["# twins", "", "train/dark/3.png\r", "train/dark/3.png", "val/bright/0.png", "test/dark/0.png"]
        listed.write_text("\n".join([*lines, "train/dark/99.png", "dark", "bright"]))
        splits = data_splits.open_splits(parsed("--exclude", listed))
        assert (len(splits.training), len(splits.evaluation)) == (35, 20)
        words = f"--exclude {listed}: leaves out 1 of train, 1 of val; lines that name no image: 3.\n"
        assert words in capsys.readouterr().out
        paths = {splits.training.files.path_as_text(index) for index in range(35)}
        assert "dark/2.png" in paths
        assert "dark/3.png" not in paths
        args = parsed("--exclude", listed, "--test-only", "--resume", "unread.pth", "--split", "test")
        assert len(data_splits.open_splits(args).evaluation) == 8


def check_bad_images(parsed):
    def first_two(*flags):
        """Images 0 and 1 of train and of val, where image 0 is none."""
        with tempfile.TemporaryDirectory() as folder:
            data = shutil.copytree(parsed().data_path, f"{folder}/data")
            for split in ("train", "val"):
                Path(data, split, "bright", "0.png").write_text("no image")
            splits = data_splits.open_splits(parsed("--data-path", data, *flags))
            found = [split.__getitems__([SampleKey(0), SampleKey(1)]) for split in (splits.training, splits.evaluation)]
            return [one if isinstance(one, UserError) else one.indices.tolist() for one in found]

    assert all("cannot be read as an image" in str(error) for error in first_two())
    (stand_in, second), evaluated = first_two("--bad-images", "skip")
    assert 1 <= stand_in < 12 and second == 1  # another image of the class "bright"
    assert evaluated == [-1, 1]
    for flags, limit in (
        ((), None),
        (("--bad-images", "skip"), 100),
        (("--bad-images", "skip", "--max-bad-images", 7), 7),
    ):
        assert build.bad_images(parsed(*flags)).limit == limit
    assert data_splits.open_splits(parsed(*flags)).training.max_bad_images == 7


def check_split(parsed):
    for split, images in (("train", 36), ("val", 21), ("test", 9)):
        args = parsed("--test-only", "--resume", "unread.pth", "--split", split)
        assert len(data_splits.open_splits(args).evaluation) == images


def check_gray(parsed):
    assert first_image(parsed()).shape == (3, 32, 32)
    assert torch.equal(first_image(parsed("--gray")), first_image(parsed())[:1])  # of a grey image
    assert first_image(parsed("--gray", "--no-gray")).shape == (3, 32, 32)


def check_upper_8_bits(parsed):
    for flags, expected in (([], False), (["--upper-8-bits"], True), (["--upper-8-bits", "--no-upper-8-bits"], False)):
        opened = data_splits.open_splits(parsed(*flags))
        assert opened.training.upper_8_bits == opened.evaluation.upper_8_bits == expected


def check_channels_last(parsed):
    white = torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)
    for flags, device, expected in (([], CPU, False), (["--channels-last"], CPU, True), ([], CUDA, True)):
        args = parsed(*flags)
        if device == CUDA:  # only which format is chosen can be seen without one
            assert build.memory_format(args, device) == torch.channels_last
            assert build.memory_format(parsed("--no-channels-last"), device) == torch.contiguous_format
            continue
        weight = build.classifier(args, ["a", "b"], None, None, device).conv1[0].weight
        images = build.normalize(args, device)(white)
        assert images.shape == (2, 3, 4, 4)
        assert [one.is_contiguous(memory_format=torch.channels_last) for one in (weight, images)] == [expected] * 2


def check_cache_dataset(parsed):
    with tempfile.TemporaryDirectory() as folder:
        args = parsed("--cache-dataset", "host", "--cache-dir", folder)
        splits = data_splits.open_splits(args)
        data_splits.use_cache(args, splits, CPU)
        assert len(splits.training.cache) == len(splits.training)
        assert len(list(Path(folder).iterdir())) == 2
    splits = data_splits.open_splits(parsed())
    data_splits.use_cache(parsed(), splits, CPU)
    assert splits.training.cache is None


DATA_EFFECTS = {
    "data_path": check_data_path,
    "exclude": check_exclude,
    "num_classes": check_num_classes,
    "bad_images": check_bad_images,
    "max_bad_images": check_bad_images,
    "split": check_split,
    "batch_size": check_batch_size,
    "workers": check_workers,
    "mean": normalises_white_to("--mean", 0.1, 0.2, 0.3, "--std", 1, expected=[0.9, 0.8, 0.7]),
    "std": normalises_white_to("--mean", 0, "--std", 0.25, expected=[4, 4, 4]),
    "train_crop_size": changes_the_training_image("--train-crop-size", 16),
    "val_resize_size": changes_the_evaluated_image("--val-resize-size", 48),
    "val_crop_size": changes_the_evaluated_image("--val-crop-size", 24),
    "gray": check_gray,
    "upper_8_bits": check_upper_8_bits,
    "channels_last": check_channels_last,
    "cache_dataset": check_cache_dataset,
    "cache_dir": check_cache_dataset,
    "interpolation": changes_the_evaluated_image("--interpolation", "nearest", "--val-resize-size", 48),
    "backend": changes_the_evaluated_image("--backend", "TENSOR", "--val-resize-size", 50),
    "auto_augment": changes_the_training_image("--auto-augment", "ta_wide"),
    "ra_magnitude": changes_the_training_image("--ra-magnitude", 30, base=("--auto-augment", "ra")),
    "augmix_severity": changes_the_training_image("--augmix-severity", 10, base=("--auto-augment", "augmix")),
    "random_erase": changes_the_training_image("--random-erase", 1),
    "mixup_alpha": check_mixing("--mixup-alpha", 0.4),
    "cutmix_alpha": check_mixing("--cutmix-alpha", 1),
    "ra_sampler": check_ra_sampler,
    "ra_reps": check_ra_sampler,
}
