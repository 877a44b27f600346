"""--tensorboard: the events are the log, each epoch once, whatever became of the run in between."""

import json
import shutil
import sys

import pytest
import torch

from tests.helpers.events import as_scalars, number_files_from_zero, scalars
from tests.helpers.runs import run_script
from utils.results.log import read_log, write_log
from utils.runtime.errors import UserError
from utils.training.trackers import TensorBoard, tag


@pytest.fixture(autouse=True)
def numbered(monkeypatch):
    number_files_from_zero(monkeypatch)


def test_tags():
    assert [tag(name) for name in ("train_loss", "val_balanced_accuracy", "lr_policy", "images_per_second")] == [
        *("train/loss", "val/balanced_accuracy", "lr/policy", "run/images_per_second")
    ]
    assert [tag(name) for name in ("policy_entropy", "mask_std_between_images", "prior_drift", "skipped_steps")] == [
        *("policy/entropy", "policy/mask_std_between_images", "policy/prior_drift", "run/skipped_steps")
    ]


@pytest.mark.slow
def test_a_run_that_goes_to_a_new_folder_takes_its_events_along(image_folder, tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    run_script("_normal", image_folder, first, "--epochs", "1", "--tensorboard")
    assert scalars(first) == as_scalars(read_log(first))
    assert len(scalars(first)) == len(read_log(first)[0]) - 1
    run_script("_normal", image_folder, moved, "--epochs", "2", "--resume", str(first / "checkpoint.pth"))
    assert scalars(moved) == as_scalars(read_log(moved))
    assert [step for step, _ in scalars(moved)["train/loss"]] == [0, 1]
    run_script("_normal", image_folder, moved, "--epochs", "3", "--resume", "auto", "--no-tensorboard")
    assert [step for step, _ in scalars(moved)["train/loss"]] == [0, 1]


@pytest.mark.slow
def test_a_checkpoint_copied_alone_goes_on_with_events_and_a_new_best_model(image_folder, tmp_path, capsys):
    first, copy = tmp_path / "first", tmp_path / "copy"
    run_script("_normal", image_folder, first, "--epochs", "2")
    copy.mkdir()
    shutil.copy(first / "checkpoint.pth", copy)
    capsys.readouterr()
    run_script("_normal", image_folder, copy, "--epochs", "4", "--resume", "auto", "--tensorboard")
    assert [step for step, _ in scalars(copy)["train/loss"]] == [2, 3]
    assert f"{copy / 'model_best.pth'}: is missing, so the best epoch is chosen" in capsys.readouterr().out
    best = max(read_log(copy), key=lambda line: line["val_f1"])["epoch"]
    files = (torch.load(copy / f"model_{name}.pth", weights_only=True)["model"] for name in ("best", best))
    torch.testing.assert_close(*files, rtol=0, atol=0)


@pytest.mark.slow
def test_a_resume_with_the_flag_writes_the_log_so_far(image_folder, tmp_path):
    run_script("_normal", image_folder, tmp_path, "--epochs", "1")
    assert not (tmp_path / "tensorboard").exists()
    flags = ["--epochs", "2", "--resume", "auto"]
    run_script("_normal", image_folder, tmp_path, *flags, "--tensorboard")
    assert scalars(tmp_path) == as_scalars(read_log(tmp_path))


@pytest.fixture
def without_tensorboard(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)


MISSING = "--tensorboard: the package tensorboard cannot be imported .*Install it with pip install tensorboard"


@pytest.mark.parametrize("script", ["_normal", "_policy_gradient"])
def test_without_the_package_a_run_ends_before_it_begins(script, image_folder, tmp_path, without_tensorboard):
    with pytest.raises(UserError, match=MISSING):
        run_script(script, image_folder, tmp_path / "run", "--epochs", "1", "--tensorboard")
    assert not (tmp_path / "run").exists()


def test_without_the_package_what_writes_no_events_works(image_folder, tmp_path, request):
    """Also of a run that was begun with the flag."""
    run_script("_normal", image_folder, tmp_path, "--epochs", "1", "--tensorboard")
    request.getfixturevalue("without_tensorboard")
    resumed = ["--epochs", "2", "--resume", "auto"]
    with pytest.raises(UserError, match=MISSING):
        run_script("_normal", image_folder, tmp_path, *resumed)
    with pytest.raises(UserError, match=MISSING):
        weights = ["--finetune", str(tmp_path / "model_0.pth")]
        run_script("_normal", image_folder, tmp_path / "tuned", "--epochs", "1", "--tensorboard", *weights)
    assert [line["epoch"] for line in read_log(tmp_path)] == [0]
    tested = ["--resume", str(tmp_path / "checkpoint.pth"), "--test-only", "--tensorboard"]
    run_script("_normal", image_folder, tmp_path / "tested", *tested)
    assert (tmp_path / "tested" / "metrics.json").exists()
    run_script("_normal", image_folder, tmp_path, *resumed, "--no-tensorboard")
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]


def test_a_broken_package_ends_a_run_before_it_begins(image_folder, tmp_path, monkeypatch):
    (tmp_path / "tensorboard.py").write_text("raise TypeError('made for\\nother versions')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"] + ["torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=r"^--tensorboard: the package tensorboard cannot be imported \(made for\)\."):
        run_script("_normal", image_folder, tmp_path / "run", "--epochs", "1", "--tensorboard")
    assert not (tmp_path / "run").exists()


def line(epoch, value):
    return {"epoch": epoch, "train_loss": value, "val_auroc": None}


def test_what_could_not_be_written_is_written_by_the_next_epoch(tmp_path, monkeypatch):
    told = TensorBoard(tmp_path, 0)
    write_log(tmp_path, [line(0, 1.0)])
    told.catch_up()
    write_log(tmp_path, [line(0, 1.0), line(1, 2.0)])
    monkeypatch.setattr(told.writer, "flush", lambda: json.loads("fails"))
    with pytest.raises(ValueError):
        told.catch_up()
    write_log(tmp_path, [line(0, 1.0), line(1, 2.0), line(2, 3.0)])
    told.catch_up()
    told.close(failed=False)
    assert scalars(tmp_path) == {"train/loss": [(0, 1.0), (1, 2.0), (2, 3.0)]}


def test_a_run_that_goes_back_to_an_earlier_checkpoint_takes_its_events_back(tmp_path):
    write_log(tmp_path, [line(0, 1.0), line(1, 2.0)])
    first = TensorBoard(tmp_path, 0)
    first.catch_up()
    first.close(failed=False)
    write_log(tmp_path, [line(0, 1.0), line(1, 5.0)])
    again = TensorBoard(tmp_path, 1)
    again.catch_up()
    again.close(failed=False)
    assert scalars(tmp_path) == {"train/loss": [(0, 1.0), (1, 5.0)]}
