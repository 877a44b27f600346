"""A walk over every declared flag, which shows what each one changes."""

import argparse
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from tests.conftest import SMALL
from tests.helpers.parsing import declared, parse
from utils.data import splits as data_splits
from utils.data.samplers import SampleKey
from utils.data.transforms import Normalize
from utils.runtime.distributed import resolve_device
from utils.runtime.errors import UserError
from utils.training import build
from utils.training.update import GuardedUpdate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def parsed(image_folder):
    """parsed(*flags): the final arguments of _normal/train.py on the tiny data set with these flags."""

    def parsed(*flags: object) -> argparse.Namespace:
        return parse("_normal", *SMALL, "--data-path", image_folder, *flags)

    return parsed


# --- What each flag changes: a function of (parsed, image_folder) for each flag, asserting a value with and without it.


def first_image(args, index=0, epoch=0):
    return data_splits.open_splits(args).training[SampleKey(index, epoch, 0)][0]


def changes_the_training_image(*flags, base=()):
    def check(parsed, image_folder):
        plain = [first_image(parsed(*base), epoch=epoch) for epoch in range(5)]
        changed = [first_image(parsed(*base, *flags), epoch=epoch) for epoch in range(5)]
        assert any(not torch.equal(one, other) for one, other in zip(plain, changed, strict=True))

    return check


def changes_the_evaluated_image(*flags):
    def check(parsed, image_folder):
        plain, changed = (
            data_splits.open_splits(args).evaluation[SampleKey(0)][0] for args in (parsed(), parsed(*flags))
        )
        assert plain.shape != changed.shape or not torch.equal(plain, changed)

    return check


def normalises_white_to(*flags, expected):
    def check(parsed, image_folder):
        args = parsed(*flags)
        white = Normalize(args.mean, args.std)(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8))
        assert white.flatten().tolist() == pytest.approx(expected)

    return check


def rates(args, epochs=6):
    """The classifier's learning rate in each epoch."""
    model = torch.nn.Linear(2, 2)
    optimizer = build.optimizer(args, model, args.lr)
    scheduler = build.scheduler(args, optimizer, first_epoch=0)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def gives_rates(*flags, expected):
    return lambda parsed, image_folder: assert_close(rates(parsed(*flags), len(expected)), expected)


def assert_close(found, expected):
    assert found == pytest.approx(expected, rel=1e-9)


def optimizer_of(args, model=None):
    return build.optimizer(args, model or torch.nn.Linear(2, 2), args.lr)


def decays(model_name, *flags):
    """{weight decay: number of parameters} of a model."""

    def found(parsed):
        args = parsed("--model", model_name, *flags)
        model = build.classifier(args, ["a", "b"], None, None, CPU)
        return {group["weight_decay"]: len(group["params"]) for group in optimizer_of(args, model).param_groups}

    return found


def check_norm_weight_decay(parsed, image_folder):
    # test_resnet: every convolution is followed by a BatchNorm of two parameters.
    plain, changed = decays("test_resnet")(parsed), decays("test_resnet", "--norm-weight-decay", 0)(parsed)
    assert plain.keys() == {1e-4}
    assert changed.keys() == {1e-4, 0.0}
    assert sum(changed.values()) == plain[1e-4]


def check_bias_weight_decay(parsed, image_folder):
    assert decays("test_resnet", "--bias-weight-decay", 0.5)(parsed)[0.5] > 1


def check_embedding_decay(parsed, image_folder):
    found = decays("test_vit", "--transformer-embedding-decay", 0.5, "--train-crop-size", 160)(parsed)
    assert found[0.5] == 2  # cls_token and pos_embed


def check_clip_grad_norm(parsed, image_folder):
    assert parsed().clip_grad_norm is None
    model = torch.nn.Linear(1, 1, bias=False)
    args = parsed("--clip-grad-norm", 0.5, "--lr", 1, "--momentum", 0, "--wd", 0)
    before = model.weight.item()
    update = GuardedUpdate({"classifier": optimizer_of(args, model)}, CPU, False, args.clip_grad_norm)
    update(model.weight.sum() * 100, torch.tensor(False))
    assert before - model.weight.item() == pytest.approx(0.5, abs=1e-5)


def check_amp(parsed, image_folder):
    assert build.autocast_dtype(parsed()) is None
    assert build.autocast_dtype(parsed("--amp")) == torch.bfloat16


def check_amp_dtype(parsed, image_folder):
    args = parsed("--amp", "--amp-dtype", "fp16")
    assert build.autocast_dtype(args) == torch.float16
    assert build.uses_fp16(args)
    assert not build.uses_fp16(parsed("--amp"))
    assert not build.uses_fp16(parsed("--amp-dtype", "fp16"))


def check_model_ema(parsed, image_folder):
    model = torch.nn.Linear(1, 1, bias=False)
    assert build.moving_average(parsed(), model) is None
    ema = build.moving_average(parsed("--model-ema", "--model-ema-steps", 1, "--model-ema-decay", 0.5), model)
    assert ema.model is not model


def check_model_ema_steps(parsed, image_folder):
    model = torch.nn.Linear(1, 1, bias=False)
    ema = build.moving_average(parsed("--model-ema", "--model-ema-steps", 3), model)
    for step in range(7):
        ema.update(epoch=0, step=step)
    assert ema.updates == 3  # at steps 0, 3 and 6


def check_model_ema_decay(parsed, image_folder):
    model = torch.nn.Linear(1, 1, bias=False)
    flags = ("--model-ema", "--model-ema-steps", 1, "--epochs", 8)
    # Adjusted by batch size 8 x 1 step / 8 epochs; at least 2^(-2/3) = .63 at the second update, by the warm-up.
    for decay, weight_of_new in ((0.25, 0.75), (0.1, 0.9)):
        torch.nn.init.constant_(model.weight, 0.0)
        ema = build.moving_average(parsed(*flags, "--model-ema-decay", decay), model)
        ema.update(0, 0)
        torch.nn.init.constant_(model.weight, 1.0)
        ema.update(0, 1)
        assert ema.model.weight.item() == pytest.approx(weight_of_new)


def check_mixing(*flags):
    def check(parsed, image_folder):
        images, targets = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
        assert build.batch_mixing(parsed(), 3)(images, targets, 0, 0)[1].shape == (4,)
        mixed_images, mixed = build.batch_mixing(parsed(*flags), 3)(images, targets, 0, 0)
        assert mixed.shape == (4, 3)
        assert not torch.equal(mixed_images, images)

    return check


def check_ra_sampler(parsed, image_folder):
    def repeats(*flags):
        args = parsed(*flags)
        loader = data_splits.training_loader(args, data_splits.open_splits(args).training, CPU)
        return {key.repeat for batch in loader.batch_sampler for key in batch}

    assert repeats() == {0}
    assert repeats("--ra-sampler") == {0, 1, 2}
    assert repeats("--ra-sampler", "--ra-reps", 2) == {0, 1}


def check_batch_size(parsed, image_folder):
    args = parsed("--batch-size", 5)
    assert len(next(iter(data_splits.training_loader(args, data_splits.open_splits(args).training, CPU))).targets) == 5
    assert parsed("--batch_size", 6).batch_size == parsed("-b", 6).batch_size == 6


def check_workers(parsed, image_folder):
    args = parsed("-j", 3)
    assert data_splits.training_loader(args, data_splits.open_splits(args).training, CPU).num_workers == 3


def check_num_classes(parsed, image_folder):
    assert len(data_splits.open_splits(parsed("--num-classes", 3)).classes) == 3
    with pytest.raises(UserError, match=r"--num-classes 4: .* has 3 classes"):
        data_splits.open_splits(parsed("--num-classes", 4))


def check_exclude(parsed, image_folder, capsys):
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


def check_bad_images(parsed, image_folder):
    def first_two(*flags):
        """Images 0 and 1 of train and of val, where image 0 is none."""
        with tempfile.TemporaryDirectory() as folder:
            data = shutil.copytree(image_folder, f"{folder}/data")
            for split in ("train", "val"):
                Path(data, split, "bright", "0.png").write_text("no image")
            splits = data_splits.open_splits(parsed("--data-path", data, *flags))
            found = [split.__getitems__([SampleKey(0), SampleKey(1)]) for split in (splits.training, splits.evaluation)]
            return [one if isinstance(one, UserError) else one.indices.tolist() for one in found]

    assert all("cannot be read as an image" in str(error) for error in first_two())
    (stand_in, second), evaluated = first_two("--bad-images", "skip")
    assert 1 <= stand_in < 12 and second == 1  # another image of the class "bright"
    assert evaluated == [-1, 1]
    assert build.bad_images(parsed()).limit is None


def check_max_bad_images(parsed, image_folder):
    assert build.bad_images(parsed("--bad-images", "skip")).limit == 100
    args = parsed("--bad-images", "skip", "--max-bad-images", 7)
    assert build.bad_images(args).limit == data_splits.open_splits(args).training.max_bad_images == 7


def check_split(parsed, image_folder):
    for split, images in (("train", 36), ("val", 21), ("test", 9)):
        args = parsed("--test-only", "--resume", "unread.pth", "--split", split)
        assert len(data_splits.open_splits(args).evaluation) == images


def check_seed(parsed, image_folder):
    def first_weights(seed):
        args = parsed("--seed", seed)
        build.seed_everything(args)
        return build.classifier(args, ["a", "b"], None, None, CPU).fc.weight

    assert torch.equal(first_weights(3), first_weights(3))
    assert not torch.equal(first_weights(3), first_weights(4))
    assert not torch.equal(first_image(parsed("--seed", 3)), first_image(parsed("--seed", 4)))


def check_deterministic(parsed, image_folder):
    try:
        build.seed_everything(parsed("--use-deterministic-algorithms"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        build.seed_everything(parsed())
    assert not torch.are_deterministic_algorithms_enabled()


def check_model(parsed, image_folder):
    assert type(build.classifier(parsed("--model", "test_vit"), ["a"], None, None, CPU)).__name__ == "VisionTransformer"


def check_weights(parsed, image_folder):
    with pytest.raises(UserError, match=r"--weights no_such_tag: timm's tags for test_resnet are r160_in1k"):
        build.classifier(parsed("--weights", "no_such_tag"), ["a"], None, None, CPU)


def check_sync_bn(parsed, image_folder, capsys):
    build.classifier(parsed(), ["a", "b"], None, None, CPU)
    assert "SyncBatchNorm" not in capsys.readouterr().out
    build.classifier(parsed("--sync-bn"), ["a", "b"], None, None, CPU)
    assert "each process keeps its own statistics" in capsys.readouterr().out


def check_device(parsed, image_folder):
    assert resolve_device(parsed("--device", "cpu").device) == CPU
    with pytest.raises(ValueError, match="--device tpu"):
        resolve_device(parsed("--device", "tpu").device)


def check_opt(parsed, image_folder):
    kinds = {"sgd": "SGD", "sgd_nesterov": "SGD", "rmsprop": "RMSprop", "adamw": "AdamW"}
    for name, kind in kinds.items():
        optimizer = optimizer_of(parsed("--opt", name))
        assert type(optimizer).__name__ == kind
        assert optimizer.defaults.get("nesterov", False) == (name == "sgd_nesterov")


def sets_in_optimizer(option, *flags, expected):
    return lambda parsed, image_folder: assert_close(optimizer_of(parsed(*flags)).param_groups[0][option], expected)


def check_gray(parsed, image_folder):
    assert first_image(parsed()).shape == (3, 32, 32)
    assert torch.equal(first_image(parsed("--gray")), first_image(parsed())[:1])  # of a grey image
    assert first_image(parsed("--gray", "--no-gray")).shape == (3, 32, 32)


def check_upper_8_bits(parsed, image_folder):
    for flags, expected in (([], False), (["--upper-8-bits"], True), (["--upper-8-bits", "--no-upper-8-bits"], False)):
        opened = data_splits.open_splits(parsed(*flags))
        assert opened.training.upper_8_bits == opened.evaluation.upper_8_bits == expected


def check_channels_last(parsed, image_folder):
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


def check_cache_dataset(parsed, image_folder):
    with tempfile.TemporaryDirectory() as folder:
        args = parsed("--cache-dataset", "host", "--cache-dir", folder)
        splits = data_splits.open_splits(args)
        data_splits.use_cache(args, splits, CPU)
        assert len(splits.training.cache) == len(splits.training)
        assert len(list(Path(folder).iterdir())) == 2
    splits = data_splits.open_splits(parsed())
    data_splits.use_cache(parsed(), splits, CPU)
    assert splits.training.cache is None


# Flags whose effect only a whole run shows are exercised by the scripts' own tests, named here.
RUNS = {
    "finetune": "test_scripts.py::test_fine_tuning_from_a_heated_model_onto_other_classes",
    "freeze_backbone": "test_scripts.py::test_freeze_backbone_trains_the_head_only",
    "resume": "test_resume.py",
    "checkpoint_steps": "test_resume.py::test_checkpoints_within_an_epoch_and_their_copies_resume_exactly",
    "plot_every": "test_pictures.py::test_pictures_come_every_so_many_epochs_and_at_the_end",
    "tensorboard": "test_tensorboard.py::test_resumed_with_the_flag_for_the_first_time_the_log_so_far_is_told_too",
    "timeout": "test_faults.py",
    "use_ema": "test_moving_average.py::test_files_hold_both_and_use_ema_chooses",
    "test_only": "test_scripts.py::test_test_only_repeats_the_last_validation",
    "output_dir": "test_scripts.py",
    "print_freq": "test_scripts.py::test_print_freq_sets_the_number_of_lines",
    "compile": "test_scripts.py::test_compile_reaches_each_network",
    "label_smoothing": "test_scripts.py::test_flags_of_the_loss_change_the_first_loss",
    "mask_policy": "test_scripts.py::test_every_mask_policy_and_objective",
    "objective": "test_scripts.py::test_every_mask_policy_and_objective",
    "policy_sign": "test_scripts.py::test_every_mask_policy_and_objective",
    "baseline": "test_scripts.py::test_every_mask_policy_and_objective",
    "masks_per_image": "test_scripts.py::test_every_mask_policy_and_objective",
    "entropy_weight": "test_scripts.py::test_every_mask_policy_and_objective",
    "policy_lr": "test_scripts.py::test_policy_flags_reach_the_policy",
    "policy_model": "test_scripts.py::test_policy_flags_reach_the_policy",
    "grid": "test_scripts.py::test_policy_flags_reach_the_policy",
    "kernel": "test_scripts.py::test_policy_flags_reach_the_policy",
    "sigma": "test_scripts.py::test_policy_flags_reach_the_policy",
    "head_weight": "test_policy_forms.py::test_the_head_weight_reaches_the_policy_and_what_is_logged_of_it",
    "mask_range": "test_policy_forms.py::test_range_and_fading_show_in_the_logged_masks",
    "mask_fade_epochs": "test_policy_forms.py::test_range_and_fading_show_in_the_logged_masks",
}
EFFECTS = {
    "data_path": lambda parsed, image_folder: assert_close(len(data_splits.open_splits(parsed()).training), 36),
    "exclude": check_exclude,
    "num_classes": check_num_classes,
    "bad_images": check_bad_images,
    "max_bad_images": check_max_bad_images,
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
    "model": check_model,
    "weights": check_weights,
    "sync_bn": check_sync_bn,
    "model_ema": check_model_ema,
    "model_ema_steps": check_model_ema_steps,
    "model_ema_decay": check_model_ema_decay,
    "epochs": gives_rates("--lr-scheduler", "cosineannealinglr", "--epochs", 2, "--lr", 1, expected=[1.0, 0.5]),
    "opt": check_opt,
    "lr": gives_rates("--lr", 0.3, expected=[0.3]),
    "momentum": sets_in_optimizer("momentum", "--momentum", 0.7, expected=0.7),
    "weight_decay": sets_in_optimizer("weight_decay", "--wd", 0.02, expected=0.02),
    "norm_weight_decay": check_norm_weight_decay,
    "bias_weight_decay": check_bias_weight_decay,
    "transformer_embedding_decay": check_embedding_decay,
    "clip_grad_norm": check_clip_grad_norm,
    "amp": check_amp,
    "amp_dtype": check_amp_dtype,
    "lr_scheduler": gives_rates("--lr-scheduler", "exponentiallr", "--lr", 1, expected=[1, 0.1, 0.01]),
    "lr_step_size": gives_rates("--lr-step-size", 2, "--lr", 1, expected=[1, 1, 0.1, 0.1, 0.01]),
    "lr_gamma": gives_rates("--lr-step-size", 1, "--lr-gamma", 0.5, "--lr", 1, expected=[1, 0.5, 0.25]),
    "lr_min": gives_rates(
        *("--lr-scheduler", "cosineannealinglr", "--epochs", 2, "--lr", 1, "--lr-min", 0.5), expected=[1.0, 0.75, 0.5]
    ),
    "lr_warmup_epochs": gives_rates("--lr-warmup-epochs", 2, "--lr", 1, expected=[0.01, 0.01, 1]),
    "lr_warmup_method": gives_rates(
        *("--lr-warmup-epochs", 2, "--lr-warmup-method", "linear", "--lr", 1), expected=[0.01, 0.505, 1]
    ),
    "lr_warmup_decay": gives_rates("--lr-warmup-epochs", 1, "--lr-warmup-decay", 0.5, "--lr", 1, expected=[0.5, 1]),
    "auto_augment": changes_the_training_image("--auto-augment", "ta_wide"),
    "ra_magnitude": changes_the_training_image("--ra-magnitude", 30, base=("--auto-augment", "ra")),
    "augmix_severity": changes_the_training_image("--augmix-severity", 10, base=("--auto-augment", "augmix")),
    "random_erase": changes_the_training_image("--random-erase", 1),
    "mixup_alpha": check_mixing("--mixup-alpha", 0.4),
    "cutmix_alpha": check_mixing("--cutmix-alpha", 1),
    "ra_sampler": check_ra_sampler,
    "ra_reps": check_ra_sampler,
    "device": check_device,
    "seed": check_seed,
    "use_deterministic_algorithms": check_deterministic,
}


def test_every_declared_flag_is_shown_to_work():
    assert declared() == EFFECTS.keys() | RUNS.keys()


@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_flag(name, parsed, image_folder, request):
    more = [request.getfixturevalue("capsys")] if name in ("exclude", "sync_bn") else []
    EFFECTS[name](parsed, image_folder, *more)


@pytest.mark.parametrize("augmentation", ["ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn"])
def test_every_auto_augment(augmentation, parsed, image_folder):
    changes_the_training_image("--auto-augment", augmentation)(parsed, image_folder)
