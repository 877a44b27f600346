"""Where each value of the command line comes from: given, the file, or the default."""

import os

import pytest

from tests.helpers.parsing import PARSERS, given, parse
from utils import arguments
from utils.runtime.errors import UserError


def test_defaults_are_the_published_recipe():
    args = parse("_policy_gradient")
    found = (args.model, args.policy_model, args.grid, args.kernel, args.sigma, args.batch_size, args.epochs, args.lr)
    assert found == ("resnet50", "resnet10t", 64, 13, 6.0, 32, 90, 0.1)
    assert (args.lr_scheduler, args.lr_step_size, args.lr_gamma, args.momentum) == ("steplr", 30, 0.1, 0.9)
    assert (args.weight_decay, args.objective, args.policy_sign) == (1e-4, "published", "cooperative")
    assert (args.mean, args.std, args.seed, args.split, args.mask_policy) == ([0.3162], [0.3213], 0, "val", "learned")


def test_a_resumed_run_cannot_change_its_training():
    parser = PARSERS["_normal"]
    began = ("--lr", 0.3, "--epochs", 7, "--workers", 2, "--data-path", "there", "--device", "cpu")
    saved = vars(parse("_normal", *began))
    args = arguments.for_resume(parser, given("_normal", "--resume", "run/checkpoint.pth"), saved, "run/checkpoint.pth")
    assert (args.lr, args.epochs, args.workers, args.data_path, args.output_dir) == (0.3, 7, 2, "there", "run")
    assert args.device is None  # chosen anew
    again = given("_normal", "--resume", "f", "--lr", 0.3, "--epochs", 9, "--workers", 0, "--data-path", "elsewhere")
    again |= given("_normal", "--num-classes", 3)  # only checked against the data
    args = arguments.for_resume(parser, again, saved, "f")
    assert (args.lr, args.epochs, args.workers, args.data_path) == (0.3, 9, 0, "elsewhere")
    for flag in (("--lr", 0.2), ("--seed", 1), ("--batch-size", 8), ("--amp",), ("--model", "resnet18")):
        with pytest.raises(UserError, match=f"^{flag[0]}.*f was trained with.*{flag[0]}.* cannot change this"):
            arguments.for_resume(parser, given("_normal", "--resume", "f", *flag), saved, "f")


def test_a_resumed_run_takes_what_each_start_decides_from_its_own_command():
    """What the processes wait for each other, say, is settled before the file is read."""
    saved = vars(parse("_normal", "--timeout", 7, "--split", "test", "--device", "cpu", "--output-dir", "there"))
    parser, again = PARSERS["_normal"], given("_normal", "--resume", "run/checkpoint.pth")
    args = arguments.for_resume(parser, again, saved, "run/checkpoint.pth")
    assert (args.timeout, args.split, args.device, args.output_dir) == (600, "val", None, "run")
    args = arguments.for_resume(parser, again | given("_normal", "--timeout", 9), saved, "run/checkpoint.pth")
    assert args.timeout == 9


def test_a_list_of_excluded_images_is_the_same_one_from_any_folder(tmp_path, monkeypatch):
    parser, saved = PARSERS["_normal"], vars(parse("_normal", "--exclude", "list.txt"))
    assert saved["exclude"] == os.path.abspath("list.txt")
    monkeypatch.chdir(tmp_path)
    again = given("_normal", "--resume", "f", "--exclude", saved["exclude"])
    assert arguments.for_resume(parser, again, saved, "f").exclude == saved["exclude"]
    moved = given("_normal", "--resume", "f", "--exclude", "list.txt")  # what it leaves out is compared, not its place
    assert arguments.for_resume(parser, moved, saved, "f").exclude == str(tmp_path / "list.txt")


def test_a_flag_that_is_younger_than_the_checkpoint_counts_as_its_default():
    parser, saved = PARSERS["_normal"], vars(parse("_normal"))
    for name in ("gray", "cache_dataset", "channels_last"):
        del saved[name]
    for flag, message in (
        (["--gray"], "--gray: f was trained without --gray,"),
        (["--cache-dataset", "host"], "--cache-dataset host: f was trained with --cache-dataset off,"),
        (["--no-channels-last"], "--no-channels-last: f was trained without --channels-last,"),
    ):
        with pytest.raises(UserError, match=message):
            arguments.for_resume(parser, given("_normal", "--resume", "f", *flag), saved, "f")
    assert not arguments.for_resume(parser, given("_normal", "--resume", "f", "--no-gray"), saved, "f").gray


def test_weights_bring_what_they_were_made_for():
    parser = PARSERS["_normal"]
    saved = vars(parse("_policy_gradient", "--model", "resnet18", "--train-crop-size", 64, "--mean", 0.5, "--lr", 9))
    tested = given("_normal", "--finetune", "f", "--test-only")
    args = arguments.for_weights(parser, tested, saved, "f", test_only=True)
    assert (args.model, args.train_crop_size, args.mean, args.lr) == ("resnet18", 64, [0.5], 0.1)
    for flag in (("--model", "resnet50"), ("--mean", 0.1), ("--std", 0.1, 0.2, 0.3), ("--train-crop-size", 32)):
        with pytest.raises(UserError, match=f"^{flag[0]} .*f was made with"):
            arguments.for_weights(parser, tested | given("_normal", *flag), saved, "f", test_only=True)
    finetuned = given("_normal", "--finetune", "f", "--train-crop-size", 32)
    assert arguments.for_weights(parser, finetuned, saved, "f", test_only=False).train_crop_size == 32
    with pytest.raises(UserError, match=r"^--model resnet50: f was made with --model resnet18"):
        arguments.for_weights(parser, finetuned | {"model": "resnet50"}, saved, "f", test_only=False)


def test_values_of_other_code_are_taken_only_if_they_fit():
    saved = {"model": "resnet18", "train_crop_size": "large", "interpolation": "lanczos", "mean": None, "grid": 64}
    args = arguments.for_weights(PARSERS["_normal"], {"finetune": "f"}, saved, "f", test_only=False)
    assert (args.model, args.train_crop_size, args.interpolation, args.mean) == ("resnet18", 224, "bilinear", [0.3162])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--modell", "x"), "unrecognized arguments: --modell x"),
        (("--epochs", "0"), "at least 1"),
        (("--lr", "-1"), "above 0"),
        (("--lr", "nan"), "above 0"),
        (("--momentum", "1"), "--momentum: .1.: expected a number of at least 0 and below 1"),
        (("--label-smoothing", "1"), "of at least 0 and below 1, at which all classes would be equally right"),
        (("--model-ema-decay", "1"), "of at least 0 and below 1, at which the average would never change"),
        (("--mean", "80.6"), "--mean: .80.6.: expected a number from 0 to 1, .* divide a mean of levels .* by 255"),
        (("--std", "81.9"), "--std: .81.9.: expected a number from 0.001 to 1, where .* by 255"),
        (("--std", "1e-9"), "a number from 0.001 to 1"),
        (("--mixup-alpha", "1e-320"), "expected 0 for none, or a number from 0.01 to 100"),
        (("--cutmix-alpha", "1e30"), "expected 0 for none, or a number from 0.01 to 100"),
        (("--lr", "1e-320"), "a number above 0 .from 1e-37 to 1e\\+37."),
        (("--lr", "1e300"), "a number above 0"),
        (("--wd", "1e-320"), "a number of at least 0"),
        (("--lr-warmup-decay", "2"), "above 0, at most 1"),
        (("--timeout", "1e300"), "a number of seconds from 0.001 to 1e7"),
        (("--seed", str(2**64)), r"a whole number from 0 to 2\^64 - 1"),
        (("--seed", "9" * 5000), r"--seed: .9+\.\.\.9+.: expected a whole number"),
        (("--epochs", "many"), "--epochs: .many.: expected a whole number of at least 1"),
        (("--mean", ".1", ".2"), "--mean: expected one value or three, got 2"),
        (("--val-crop-size", "300"), "larger than --val-resize-size 256"),
        (("--ra-magnitude", "31"), "--ra-magnitude 31: expected 0 to 30"),
        (("--augmix-severity", "11"), "--augmix-severity 11: expected 1 to 10"),
        (("--lr-gamma", "10"), "--lr-gamma: .10.: expected a number above 0 and at most 1; above 1 the learning rate"),
        (("--lr-scheduler", "cosineannealinglr", "--lr-min", "0.2"), "--lr-min 0.2: above --lr 0.1"),
        (("--wd", "100"), "--weight-decay 100.0: multiplied by --lr 0.1 it is 10, .* expected a product below 1"),
        (("--bias-weight-decay", "1e30"), "--bias-weight-decay 1e.30: multiplied by --lr 0.1"),
        (("--ra-reps", "10000000000"), "--ra-reps 10000000000: expected at most 1000"),
        (("--workers", "100000"), "--workers 100000: expected at most 1024"),
        (("--val-resize-size", "1000000"), "--val-resize-size 1000000: expected at most 8192"),
        (("--opt", "sgd_nesterov", "--momentum", "0"), "--momentum above 0"),
        (("--freeze-backbone", "--drop-rate", "0.2"), "--drop-rate 0.2: has no effect with --freeze-backbone"),
        (("--freeze-backbone", "--drop-path", "0.1"), "--drop-path 0.1: has no effect with --freeze-backbone"),
        (("--test-only",), "--test-only: name the weights"),
        (("--opt", "lamb"), "invalid choice: 'lamb'"),
    ],
)
def test_bad_values_are_one_sentence(words, expected):
    with pytest.raises(UserError, match=expected) as caught:
        parse("_normal", *words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("script", PARSERS)
def test_help_shows_every_flag_with_its_default(script):
    text = PARSERS[script].format_help()
    for action in PARSERS[script]._actions:
        assert action.help
        assert action.option_strings[-1] in text
    assert "(default: 0.3162" not in text  # a list is shown as a list
    assert "[0.3162]" in text
    assert "None: --lr / 10" in text or script == "_normal"
