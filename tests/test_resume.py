"""A resumed run equals the uninterrupted one bit for bit; what would change the trajectory is refused."""

import shutil

import pytest
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, SMALL_POLICY, run_script
from utils.errors import UserError
from utils.progress import read_log

SCRIPTS = {"_normal": (normal, SMALL), "_policy_gradient": (policy_gradient, SMALL_POLICY)}
RICH = ["--model-ema", "--model-ema-steps", "2", "--mixup-alpha", "0.2", "--auto-augment", "ta_wide", "--ra-sampler",
        "--opt", "adamw", "--lr", "0.01", "--lr-scheduler", "cosineannealinglr", "--lr-warmup-epochs", "1"]  # fmt: skip


def assert_same(one, other, where=""):
    """Equal bit for bit: tensors, numbers, and what holds them."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        same = (one == other) | (one.isnan() & other.isnan()) if one.is_floating_point() else one == other
        assert same.all(), where
    else:
        assert one == other, where


def state_of(folder, name="checkpoint.pth"):
    """A file's content without what may differ: folders and workers."""
    state = torch.load(folder / name, weights_only=True)
    for free in ("output_dir", "resume", "workers"):
        state["args"].pop(free)
    return state


def log_of(folder):
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in read_log(folder)]


def cut_off_before_the_last_epoch(whole, part):
    """The folder of a run that was killed in its last epoch: its newest checkpoint is the one before the last."""
    shutil.copytree(whole, part)
    (part / "checkpoint.pth").unlink()
    (part / "checkpoint_prev.pth").rename(part / "checkpoint.pth")
    return part / "checkpoint.pth"


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("_normal", []),
        ("_normal", RICH),
        ("_normal", ["--amp", "--amp-dtype", "fp16", "--lr", "0.01"]),
        ("_policy_gradient", []),
        ("_policy_gradient", RICH),
        ("_policy_gradient", ["--objective", "reinforce", "--lr", "0.01"]),
        ("_policy_gradient", ["--mask-policy", "uniform"]),
    ],
)
def test_resumed_equals_uninterrupted(name, flags, image_folder, tmp_path):
    script, small = SCRIPTS[name]
    whole, part = tmp_path / "whole", tmp_path / "part"
    script.main([*small, *flags, "--epochs", "3", "--data-path", str(image_folder), "--output-dir", str(whole)])
    checkpoint = cut_off_before_the_last_epoch(whole, part)
    script.main(["--resume", str(checkpoint), "--workers", "1", "--device", "cpu"])
    assert_same(state_of(whole), state_of(part))
    assert_same(state_of(whole, "model_2.pth"), state_of(part, "model_2.pth"))
    assert_same(log_of(whole), log_of(part))
    best = [state_of(folder, "model_best.pth")["model"] for folder in (whole, part)]
    assert_same(*best)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_two_processes(image_folder, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    flags = [*SMALL_POLICY, "--epochs", "3", "--data-path", image_folder, "--output-dir", whole]
    run_script("_policy_gradient/train.py", *flags, processes=2)
    checkpoint = cut_off_before_the_last_epoch(whole, part)
    run_script("_policy_gradient/train.py", "--resume", checkpoint, "--workers", 1, "--device", "cpu", processes=2)
    assert len(state_of(part)["rng"]) == 2
    assert_same(state_of(whole), state_of(part))
    assert_same(log_of(whole), log_of(part))


def test_more_epochs_rebuild_the_schedule(image_folder, tmp_path):
    data = ["--data-path", str(image_folder)]
    cosine = ["--lr-scheduler", "cosineannealinglr", "--lr", "0.1"]
    normal.main([*SMALL, *data, *cosine, "--epochs", "1", "--output-dir", str(tmp_path)])
    normal.main(["--resume", str(tmp_path / "checkpoint.pth"), "--epochs", "4", "--device", "cpu"])
    assert [line["lr_classifier"] for line in read_log(tmp_path)] == pytest.approx(
        [0.1, 0.1 * 0.85355339, 0.05, 0.1 * 0.14644661]
    )
    normal.main(["--resume", str(tmp_path / "checkpoint.pth"), "--device", "cpu"])  # nothing is left to do
    assert len(read_log(tmp_path)) == 4


def test_the_log_is_cut_back_to_the_checkpoint(image_folder, tmp_path):
    folder = tmp_path / "run"
    normal.main([*SMALL, "--data-path", str(image_folder), "--epochs", "2", "--output-dir", str(folder)])
    first, last = read_log(folder)
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"epoch": 7}\n{"epoch": 8, "cut sh')
    normal.main(["--resume", str(folder / "checkpoint.pth"), "--epochs", "3", "--device", "cpu"])
    lines = read_log(folder)
    assert lines[:2] == [first, last]
    assert [line["epoch"] for line in lines] == [0, 1, 2]


def test_a_run_resumed_into_another_folder_takes_its_log_and_best_model_along(image_folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    normal.main([*SMALL, "--data-path", str(image_folder), "--epochs", "2", "--output-dir", str(first)])
    resume = ["--resume", str(first / "checkpoint.pth"), "--epochs", "3", "--device", "cpu", "--output-dir"]
    normal.main([*resume, str(second)])
    assert [line["epoch"] for line in read_log(second)] == [0, 1, 2]
    assert (second / "model_best.pth").exists()
    assert [line["epoch"] for line in read_log(first)] == [0, 1]
    with pytest.raises(UserError, match="another run is there"):
        normal.main([*resume, str(second)])


def test_another_world_size_goes_on_and_says_so(image_folder, tmp_path):
    normal.main([*SMALL, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(tmp_path)])
    resume = ["--resume", tmp_path / "checkpoint.pth", "--epochs", 2, "--device", "cpu"]
    result = run_script("_normal/train.py", *resume, processes=2)
    assert "The checkpoint is of 1 processes, and now there are 2" in result.stdout
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]


def test_what_cannot_be_resumed_is_refused_and_unharmed(image_folder, tmp_path):
    folder = tmp_path / "run"
    policy_gradient.main(
        [*SMALL_POLICY, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(folder)]
    )
    checkpoint = str(folder / "checkpoint.pth")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refusals = {
        "is a checkpoint of _policy_gradient/train.py": (normal, ["--resume", checkpoint]),
        "holds weights but no full training state": (policy_gradient, ["--resume", str(folder / "model_0.pth")]),
        "must go on as it began": (policy_gradient, ["--resume", checkpoint, "--grid", "4"]),
        "--lr 0.5: ": (policy_gradient, ["--resume", checkpoint, "--lr", "0.5"]),
        "another run is there": (policy_gradient, [*SMALL_POLICY, "--output-dir", str(folder)]),
        "--resume and --finetune": (normal, ["--resume", checkpoint, "--finetune", checkpoint]),
        "no such file": (normal, ["--resume", str(folder / "checkpoint_9.pth")]),
    }
    for message, (script, flags) in refusals.items():
        with pytest.raises(UserError, match=message):
            script.main([*flags, "--data-path", str(image_folder), "--device", "cpu"])
    other = tmp_path / "other_classes"
    for split in ("train", "val"):
        shutil.copytree(image_folder / split, other / split)
        (other / split / "dark").rename(other / split / "other")
    with pytest.raises(UserError, match="began with other classes"):
        policy_gradient.main(["--resume", checkpoint, "--epochs", "2", "--data-path", str(other), "--device", "cpu"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
