"""A walk over every declared flag, which shows what each one changes."""

import argparse

import pytest
import torch
from timm.layers import DropPath
from torchvision.transforms.v2 import AutoAugmentPolicy

from tests.conftest import SMALL
from tests.helpers.data_flags import DATA_EFFECTS, changes_the_training_image, first_image
from tests.helpers.parsing import declared, is_test, parse
from utils import choices, predict
from utils.runtime.distributed import resolve_device
from utils.runtime.errors import UserError
from utils.training import build, trackers
from utils.training.update import GuardedUpdate

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def parsed(image_folder):
    """parsed(*flags): the final arguments of _normal/train.py on the tiny data set with these flags."""

    def parsed(*flags: object) -> argparse.Namespace:
        return parse("_normal", *SMALL, "--data-path", image_folder, *flags)

    return parsed


# --- What each flag changes: checks that are given `parsed`


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
    return lambda parsed: assert_close(rates(parsed(*flags), len(expected)), expected)


def assert_close(found, expected):
    assert found == pytest.approx(expected, rel=1e-9)


def optimizer_of(args, model=None):
    return build.optimizer(args, model or torch.nn.Linear(2, 2), args.lr)


def gives_decay(value, count, model_name, *flags):
    """Some parameters of the model get this weight decay, and the others keep 1e-4."""

    def check(parsed):
        args = parsed("--model", model_name, *flags)
        model = build.classifier(args, ["a", "b"], None, None, CPU)
        groups = {group["weight_decay"]: len(group["params"]) for group in optimizer_of(args, model).param_groups}
        assert groups == {1e-4: len(list(model.parameters())) - count, value: count}

    return check


def check_clip_grad_norm(parsed):
    assert parsed().clip_grad_norm is None
    model = torch.nn.Linear(1, 1, bias=False)
    args = parsed("--clip-grad-norm", 0.5, "--lr", 1, "--momentum", 0, "--wd", 0)
    before = model.weight.item()
    update = GuardedUpdate({"classifier": optimizer_of(args, model)}, CPU, False, args.clip_grad_norm)
    update(model.weight.sum() * 100, torch.tensor(False))
    assert before - model.weight.item() == pytest.approx(0.5, abs=1e-5)


def check_amp(parsed):
    for flags, dtype in (((), None), (("--amp",), torch.bfloat16), (("--amp", "--amp-dtype", "fp16"), torch.float16)):
        args = parsed(*flags)
        assert build.autocast_dtype(args) == dtype
        assert build.uses_fp16(args) == (dtype == torch.float16)
    assert not build.uses_fp16(parsed("--amp-dtype", "fp16"))


def check_model_ema(parsed):
    model = torch.nn.Linear(1, 1, bias=False)
    assert build.moving_average(parsed(), model) is None
    ema = build.moving_average(parsed("--model-ema", "--model-ema-steps", 3), model)
    for step in range(7):
        ema.update(epoch=0, step=step)
    assert ema.updates == 3  # at steps 0, 3 and 6
    flags = ("--model-ema", "--model-ema-steps", 1, "--epochs", 8)
    # Adjusted by batch size 8 x 1 step / 8 epochs; at least 2^(-2/3) = .63 at the second update, by the warm-up.
    for decay, weight_of_new in ((0.25, 0.75), (0.1, 0.9)):
        torch.nn.init.constant_(model.weight, 0.0)
        ema = build.moving_average(parsed(*flags, "--model-ema-decay", decay), model)
        ema.update(0, 0)
        torch.nn.init.constant_(model.weight, 1.0)
        ema.update(0, 1)
        assert ema.model.weight.item() == pytest.approx(weight_of_new)
    ema = build.moving_average(parsed(*flags, "--model-ema-decay", 0.8, "--grad-accum-steps", 2), model)
    assert ema.average.decay == pytest.approx(1 - 0.2 * 2)  # an update has 16 images


def check_seed(parsed):
    def first_weights(seed):
        args = parsed("--seed", seed)
        build.seed_everything(args)
        return build.classifier(args, ["a", "b"], None, None, CPU).fc.weight

    assert torch.equal(first_weights(3), first_weights(3))
    assert not torch.equal(first_weights(3), first_weights(4))
    assert not torch.equal(first_image(parsed("--seed", 3)), first_image(parsed("--seed", 4)))


def check_deterministic(parsed):
    try:
        build.seed_everything(parsed("--use-deterministic-algorithms"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        build.seed_everything(parsed())
    assert not torch.are_deterministic_algorithms_enabled()


def check_model(parsed):
    assert type(build.classifier(parsed("--model", "test_vit"), ["a"], None, None, CPU)).__name__ == "VisionTransformer"


def check_weights(parsed):
    with pytest.raises(UserError, match=r"--weights no_such_tag: timm's tags for test_resnet are r160_in1k"):
        build.classifier(parsed("--weights", "no_such_tag"), ["a"], None, None, CPU)


def first_classifier(args):
    build.seed_everything(args)
    return build.classifier(args, ["a", "b"], None, None, CPU)


def check_drop_path(parsed):
    """Rates that rise to the given one, from block to block; none in evaluation."""
    flags = ("--model", "test_vit", "--train-crop-size", 64)
    plain, model = first_classifier(parsed(*flags)), first_classifier(parsed(*flags, "--drop-path", 0.5))
    assert not [module for module in plain.modules() if isinstance(module, DropPath)]
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5])
    images = torch.rand(4, 3, 64, 64)
    assert torch.equal(plain.eval()(images), model.eval()(images))
    assert not torch.equal(model.train()(images), model(images))
    with pytest.raises(UserError, match=r"--drop-path: densenet121 does not take it; leave the flag out"):
        first_classifier(parsed("--model", "densenet121", "--drop-path", 0.2))


def check_drop_rate(parsed):
    """Of the features before the head, about a quarter is dropped, and the others are enlarged."""
    model = first_classifier(parsed("--drop-rate", 0.25))
    features = torch.ones(100, model.num_features, 1, 1)
    kept = []
    model.fc.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model.train().forward_head(features)
    assert kept[0].unique().tolist() == pytest.approx([0, 4 / 3])
    assert (kept[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert first_classifier(parsed()).drop_rate == 0


def check_sync_bn(parsed, capsys):
    build.classifier(parsed(), ["a", "b"], None, None, CPU)
    assert "SyncBatchNorm" not in capsys.readouterr().out
    build.classifier(parsed("--sync-bn"), ["a", "b"], None, None, CPU)
    assert "each process keeps its own statistics" in capsys.readouterr().out


def check_device(parsed):
    assert resolve_device(parsed("--device", "cpu").device) == CPU
    with pytest.raises(UserError, match="--device tpu"):
        resolve_device(parsed("--device", "tpu").device)


def check_opt(parsed):
    kinds = {"sgd": "SGD", "sgd_nesterov": "SGD", "rmsprop": "RMSprop", "adamw": "AdamW"}
    for name, kind in kinds.items():
        optimizer = optimizer_of(parsed("--opt", name))
        assert type(optimizer).__name__ == kind
        assert optimizer.defaults.get("nesterov", False) == (name == "sgd_nesterov")


def sets_in_optimizer(option, *flags, expected):
    return lambda parsed: assert_close(optimizer_of(parsed(*flags)).param_groups[0][option], expected)


# Flags that only a whole run shows to work, by the test that does.
RUNS = {
    "test_scripts.py::test_fine_tuning_from_a_heated_model_onto_other_classes": "finetune",
    "test_scripts.py::test_freeze_backbone_trains_the_head_only": "freeze_backbone",
    "test_scripts.py::test_test_only_repeats_the_last_validation": "test_only output_dir",
    "test_scripts.py::test_print_freq_sets_the_number_of_lines": "print_freq",
    "test_compiling.py::test_compile_reaches_each_network": "compile",
    "test_scripts.py::test_flags_of_the_loss_change_the_first_loss": "label_smoothing",
    "test_loss.py::test_a_run_with_class_weights": "class_weights",
    "test_accumulation.py::test_parts_equal_one_large_batch": "grad_accum_steps",
    "test_scripts.py::test_every_mask_policy_and_objective": "mask_policy objective policy_sign baseline "
    "masks_per_image entropy_weight keep_mean",
    "test_scripts.py::test_policy_flags_reach_the_policy": "policy_lr policy_model grid kernel sigma",
    "test_policy_forms.py::test_the_head_weight_reaches_the_policy_and_what_is_logged_of_it": "head_weight",
    "test_policy_forms.py::test_range_and_fading_show_in_the_logged_masks": "mask_range mask_fade_epochs",
    "test_val_every.py::test_skipped_validations_change_no_weight_and_resume_exactly": "val_every",
    "test_resume.py::test_resumed_from_anywhere_equals_uninterrupted": "resume",
    "test_resume.py::test_checkpoints_within_an_epoch_and_their_copies_resume_exactly": "checkpoint_steps",
    "test_pictures.py::test_pictures_come_every_so_many_epochs_and_at_the_end": "plot_every",
    "test_tensorboard.py::test_a_resume_with_the_flag_writes_the_log_so_far": "tensorboard",
    "test_trackers.py::test_a_stopped_and_killed_run_is_one_run_in_each_tracker": "tracker",
    "test_faults.py::test_no_rank_waits_forever_for_another": "timeout",
    "test_moving_average.py::test_files_hold_both_and_use_ema_chooses": "use_ema",
}
EFFECTS = DATA_EFFECTS | {
    "model": check_model,
    "weights": check_weights,
    "drop_path": check_drop_path,
    "drop_rate": check_drop_rate,
    "sync_bn": check_sync_bn,
    "model_ema": check_model_ema,
    "model_ema_steps": check_model_ema,
    "model_ema_decay": check_model_ema,
    "epochs": gives_rates("--lr-scheduler", "cosineannealinglr", "--epochs", 2, "--lr", 1, expected=[1.0, 0.5]),
    "opt": check_opt,
    "lr": gives_rates("--lr", 0.3, expected=[0.3]),
    "momentum": sets_in_optimizer("momentum", "--momentum", 0.7, expected=0.7),
    "weight_decay": sets_in_optimizer("weight_decay", "--wd", 0.02, expected=0.02),
    "norm_weight_decay": gives_decay(0.0, 30, "test_resnet", "--norm-weight-decay", 0),
    "bias_weight_decay": gives_decay(0.5, 16, "test_resnet", "--bias-weight-decay", 0.5),
    "transformer_embedding_decay": gives_decay(
        0.5, 2, "test_vit", "--transformer-embedding-decay", 0.5, "--train-crop-size", 160
    ),
    "clip_grad_norm": check_clip_grad_norm,
    "amp": check_amp,
    "amp_dtype": check_amp,
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
    "device": check_device,
    "seed": check_seed,
    "use_deterministic_algorithms": check_deterministic,
}


def test_the_choices_of_flags_are_the_names_of_what_is_implemented():
    assert tuple(trackers.TRACKERS) == choices.TRACKER_NAMES
    assert tuple(predict.FORMATS) == choices.FORMATS
    assert {policy.value for policy in AutoAugmentPolicy} | {"ra", "ta_wide", "augmix"} == set(choices.AUTO_AUGMENTS)


def test_every_declared_flag_is_shown_to_work():
    assert declared() == EFFECTS.keys() | set(" ".join(RUNS.values()).split())
    for name in RUNS:
        assert is_test(*name.split("::"))


@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_flag(name, parsed, request):
    more = [request.getfixturevalue("capsys")] if name in ("exclude", "sync_bn") else []
    EFFECTS[name](parsed, *more)


@pytest.mark.parametrize("augmentation", ["ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn"])
def test_every_auto_augment(augmentation, parsed, image_folder):
    changes_the_training_image("--auto-augment", augmentation)(parsed)
