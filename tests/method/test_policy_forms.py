"""--mask-range, --mask-fade-epochs and --head-weight in whole runs, in files and as flags."""

import pytest
import torch

from _policy_gradient import gallery
from _policy_gradient import train as policy_gradient
from _policy_gradient.checks import check_flags
from tests.conftest import SMALL_POLICY
from tests.helpers.parsing import PARSERS, given, parse
from utils import arguments
from utils.checkpoints import checkpoint
from utils.results import figures
from utils.results.log import read_log
from utils.runtime.errors import UserError

PARSER = PARSERS["_policy_gradient"]


@pytest.fixture
def train(image_folder, tmp_path):
    """train(name, *flags): a run on the tiny set; returns its output folder."""

    def train(name, *flags):
        command = [*SMALL_POLICY, *map(str, flags), "--data-path", str(image_folder)]
        policy_gradient.main([*command, "--output-dir", str(tmp_path / name)])
        return tmp_path / name

    return train


@pytest.mark.slow
def test_range_and_fading_show_in_the_logged_masks(train):
    """Of uniform noise, drawn alike in each run: mean 1/2, and in the last two of five epochs 2/3 and 5/6."""
    uniform = ("--mask-policy", "uniform", "--lr", 0.001, "--batch-size", 36)  # one step an epoch
    plain = read_log(train("plain", *uniform, "--epochs", 5))
    assert [line["mask_mean"] for line in plain] == pytest.approx([0.5] * 5, abs=0.02)
    assert not any("mask_weight" in line for line in plain)
    faded = read_log(train("faded", *uniform, "--epochs", 5, "--mask-fade-epochs", 2))
    assert [line["mask_mean"] for line in faded] == pytest.approx([0.5, 0.5, 0.5, 2 / 3, 5 / 6], abs=0.02)
    assert [line["mask_weight"] for line in faded] == pytest.approx([1, 1, 1, 2 / 3, 1 / 3])
    for one, other in zip(plain, faded, strict=True):
        weight = other["mask_weight"]
        assert other["mask_mean"] == pytest.approx(1 + weight * (one["mask_mean"] - 1), abs=1e-6)
        assert other["mask_std"] == pytest.approx(weight * one["mask_std"], abs=1e-6)
    losses = [[line["train_cross_entropy"] for line in log] for log in (plain, faded)]
    assert losses[1][:3] == pytest.approx(losses[0][:3], rel=1e-3)  # the images are other ones only once they fade
    assert losses[1][3] != pytest.approx(losses[0][3], rel=1e-3)
    (line,) = read_log(train("ranged", *uniform, "--epochs", 1, "--mask-range", 0.5, 2))
    assert line["mask_mean"] == pytest.approx(0.5 + 1.5 * plain[0]["mask_mean"], abs=1e-6)
    assert line["mask_std"] == pytest.approx(1.5 * plain[0]["mask_std"], abs=1e-6)


def test_the_prior_follows_the_concentrations_of_its_step_not_those_after_the_update(train):
    """Shared concentrations are the parameters themselves, which the update changes in place; they begin at 0."""
    one_step = ("--epochs", 1, "--batch-size", 36)
    folder = train("run", "--mask-policy", "prior", "--policy-lr", 1000, *one_step)
    policy = checkpoint.read(folder / "checkpoint.pth")["policy_net"]
    assert policy["heads.log_alpha"].abs().max() > 0.5
    torch.testing.assert_close(policy["prior"], 0.99 * policy["initial_prior"])


def test_published_values_are_the_defaults():
    forms = ("--mask-range", 0, 1, "--mask-fade-epochs", 0, "--head-weight", 0.1)
    assert parse("_policy_gradient", *forms) == parse("_policy_gradient")


def test_the_head_weight_reaches_the_policy_and_what_is_logged_of_it(train):
    """Before the first step the heads' output is the same: masks differ between images as far as the heads weigh."""
    flags = ("--epochs", 1, "--batch-size", 36, "--lr", 1e-9)  # one step
    folders = [train(str(weight), *flags, "--head-weight", weight) for weight in (0.1, 0.2)]
    published, doubled = (read_log(folder)[0]["mask_std_between_images"] for folder in folders)
    assert published > 0
    assert doubled == pytest.approx(2 * published, rel=0.02)
    args, state = gallery.read_run(folders[1] / checkpoint.CHECKPOINT, None, "val")
    assert gallery.build_policy(args, state, None, torch.device("cpu")).head_weight == 0.2


@pytest.mark.slow
def test_the_gallery_takes_range_and_head_weight_from_the_file(train, tmp_path, monkeypatch):
    forms = ("--mask-range", 0.5, 2, "--head-weight", 0.5, "--mask-fade-epochs", 1)
    folder = train("run", "--epochs", 1, *forms)
    drawn = []
    monkeypatch.setattr(figures, "write_figure", lambda path, figure: drawn.append(figure))
    gallery.main([str(folder), "-o", str(tmp_path / "x.png")])
    titles = [axes.get_title() for axes in drawn[0].axes]
    masks = drawn[0].axes[titles.index("sampled mask")].images[0].get_array()
    assert 0.5 < masks.min() < 1 < masks.max() < 2  # not faded
    args, _ = gallery.read_run(folder / checkpoint.CHECKPOINT, None, "val")
    assert (args.mask_range, args.head_weight, args.mask_fade_epochs) == ([0.5, 2.0], 0.5, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mask-range", 1, 0), "--mask-range 1 0: expected two numbers of at least 0, the lower one first"),
        (("--mask-range", 0.5, 0.5), "--mask-range 0.5 0.5: expected two numbers"),
        (("--mask-range", -1, 1), ".-1.: expected a number of at least 0"),
        (("--mask-range", 0, "inf"), ".inf.: expected a number of at least 0"),
        (("--mask-range", 1), "--mask-range: expected 2 arguments"),
        (("--mask-fade-epochs", -1), ".-1.: expected a whole number of at least 0"),
        (("--mask-fade-epochs", 6, "--epochs", 5), "--mask-fade-epochs 6: more than --epochs 5; give at most 5"),
        (("--head-weight", 0), ".0.: expected a number above 0, at most 1"),
        (("--head-weight", 1.5), ".1.5.: expected a number above 0, at most 1"),
        (("--head-weight", "nan"), ".nan.: expected a number above 0, at most 1"),
    ],
)
def test_bad_values_are_one_sentence(flags, message):
    with pytest.raises(UserError, match=message) as caught:
        check_flags(parse("_policy_gradient", *flags), {}, None)
    assert "\n" not in str(caught.value)


def test_controls_without_a_use_for_them_say_so(capsys):
    flags = ("--mask-range", 1, 2, "--mask-fade-epochs", 99, "--head-weight", 0.5)
    for mask_policy, ignored in (
        ("none", "--head-weight --mask-range --mask-fade-epochs"),
        ("uniform", "--head-weight"),
        ("prior", None),
    ):
        words = (*flags, "--epochs", 100, "--mask-policy", mask_policy)
        check_flags(parse("_policy_gradient", *words), given("_policy_gradient", *words), None)
        expected = f"--mask-policy {mask_policy}: {ignored} without effect.\n" if ignored else ""
        assert capsys.readouterr().out == expected


def test_files_older_than_the_flags_count_as_published():
    saved = vars(parse("_policy_gradient"))
    for name in ("mask_range", "mask_fade_epochs", "head_weight"):
        del saved[name]
    found = [
        arguments.for_resume(PARSER, {}, saved, "f"),
        arguments.for_weights(PARSER, {"resume": "f"}, saved, "f", test_only=True),
    ]
    assert [(args.mask_range, args.mask_fade_epochs, args.head_weight) for args in found] == [([0, 1], 0, 0.1)] * 2
    for flags in (("--mask-range", "0", "2"), ("--mask-fade-epochs", "1"), ("--head-weight", "0.5")):
        with pytest.raises(UserError, match=f"{flags[0]} .*f was trained with {flags[0]} .* cannot change this"):
            arguments.for_resume(PARSER, given("_policy_gradient", *flags), saved, "f")


def test_weights_bring_the_masks_that_they_were_made_for():
    saved = vars(parse("_policy_gradient", "--mask-range", 0.5, 1, "--head-weight", 0.3, "--mask-fade-epochs", 2))
    args = arguments.for_weights(PARSER, {"resume": "f"}, saved, "f", test_only=True)
    assert (args.mask_range, args.head_weight, args.mask_fade_epochs) == ([0.5, 1], 0.3, 0)
    for flags in (("--mask-range", 0, 1), ("--head-weight", 0.1)):
        with pytest.raises(UserError, match=f"^{flags[0]} .*f was made with {flags[0]}"):
            arguments.for_weights(PARSER, given("_policy_gradient", *flags), saved, "f", test_only=True)


@pytest.mark.parametrize("value", [[0.5], [0, 1, 2], [], 0.5, "01", [0, -1], [0, "1"], None])
def test_a_range_in_a_file_that_no_flag_could_have_given(value):
    saved = vars(parse("_policy_gradient")) | {"mask_range": value}
    with pytest.raises(UserError, match=r"^--mask-range: f says .*, which this flag does not accept"):
        arguments.for_resume(PARSER, {}, saved, "f")
    assert arguments.for_weights(PARSER, {"resume": "f"}, saved, "f", test_only=True).mask_range == [0, 1]
