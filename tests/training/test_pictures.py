"""--plot-every: what is written when, that the training does not move, and that no picture can end it."""

import gc
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image

from _policy_gradient import gallery
from tests.helpers.events import as_scalars, images, number_files_from_zero, scalars
from tests.helpers.runs import SCRIPTS, assert_same_run, run_script
from utils.checkpoints import checkpoint
from utils.results import confusion as class_plots
from utils.results import curves, figures
from utils.results.curves import CURVES, HEALTH, learning_curves
from utils.results.log import read_log, write_log
from utils.training.evaluation import Predictions
from utils.training.monitor import Monitor

PICTURES = {"curves.png", "confusion_val.png", "recall_val.png"}
OF_POLICY = PICTURES | {"health.png"}


class Killed(Exception):
    """In the place of a SIGKILL."""


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Small pictures, which take less time."""
    number_files_from_zero(monkeypatch)
    monkeypatch.setattr(figures, "DOTS_PER_INCH", 30)
    monkeypatch.setattr(curves, "CURVES", CURVES[1:2])
    monkeypatch.setattr(curves, "HEALTH", HEALTH[:1])
    monkeypatch.setattr(gallery, "MOST_CLASSES", 1)


def pictures(folder, first_epoch=0, epochs=1, trackers=("tensorboard",)):
    return Monitor(folder, ["a", "b"], first_epoch=first_epoch, epochs=epochs, plot_every=1, trackers=trackers)


def show_one_epoch(folder):
    line = {"epoch": 0, "train_loss": 1.0, "val_f1": 0.5}
    write_log(folder, [line])
    pictures(folder).show(Predictions(torch.eye(2), torch.tensor([0, 1]), torch.arange(2)), line, no_wait)


def no_wait():
    pass


def kill(*_):
    raise Killed


def names_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_pictures_and_events_change_no_bit_of_the_run(name, image_folder, tmp_path, monkeypatch):
    """Whole against killed while the first epoch is shown, and resumed: that epoch is done, and told once."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    run_script(name, image_folder, whole, "--epochs", "2")
    flags = ["--epochs", "2", "--plot-every", "2", "--tensorboard", "--resume", "auto"]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Monitor, "show", kill)
        run_script(name, image_folder, part, *flags)
    assert checkpoint.read(part / "checkpoint.pth")["epoch"] == 1
    run_script(name, image_folder, part, *flags)
    assert_same_run(whole, part)
    assert not (whole / "plots").exists() and not (whole / "tensorboard").exists()
    masks = {"masks_before.png", "masks_1.png"}
    assert names_in(part / "plots") == (PICTURES if name == "_normal" else OF_POLICY | masks)
    assert scalars(part) == as_scalars(read_log(part))  # each epoch once
    assert images(part) == ([] if name == "_normal" else [1])


def test_the_events_of_a_killed_last_epoch_are_written_on_resume(tmp_path):
    write_log(tmp_path, [{"epoch": 0, "val_f1": 0.5}])
    first = pictures(tmp_path, epochs=2)
    first.trackers[0].catch_up()
    first.close(failed=False)
    (tmp_path / "plots").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "plots" / "masks_1.png")
    write_log(tmp_path, [{"epoch": 0, "val_f1": 0.5}, {"epoch": 1, "val_f1": 0.75}])
    for _ in range(2):
        pictures(tmp_path, first_epoch=2, epochs=2).begin(fresh=False)
        assert scalars(tmp_path) == {"val/f1": [(0, 0.5), (1, 0.75)]}
        assert images(tmp_path) == [1]


def test_going_back_to_an_earlier_checkpoint_takes_later_galleries_away(tmp_path):
    (tmp_path / "plots").mkdir()
    for name in ("masks_before.png", "masks_0.png", "masks_1.png", "masks_7.png", ".curves.png.12.tmp", "mine.txt"):
        (tmp_path / "plots" / name).write_bytes(b"")
    pictures(tmp_path, first_epoch=1, epochs=3, trackers=()).begin(fresh=False)
    assert names_in(tmp_path / "plots") == {"masks_before.png", "masks_0.png", "mine.txt"}


@pytest.mark.slow
def test_pictures_come_every_so_many_epochs_and_at_the_end(image_folder, tmp_path, monkeypatch):
    drawn = []
    functions = ((curves, "learning_curves"), (class_plots, "confusion_matrix"), (class_plots, "per_class_recall"))
    for module, function in functions:
        draw = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, draw=draw: drawn.append(args) or draw(*args))
    run_script("_normal", image_folder, tmp_path / "run", "--epochs", "3", "--plot-every", "2")
    for path in (tmp_path / "run" / "plots").iterdir():
        with Image.open(path) as picture:
            picture.load()
            assert min(picture.size) > 30
    log = read_log(tmp_path / "run")
    assert [len(args[0]["run"]) for args in drawn[::3]] == [2, 3]  # epochs in the log
    of_curves, confusion, recall = drawn[3:]
    assert of_curves == ({"run": log},)
    targets, predictions, classes, what, note = confusion
    assert note == ""  # not a heated model
    assert what == "val, after epoch 2"
    assert recall == confusion
    assert classes == ["bright", "dark", "striped"]
    assert np.array_equal(targets, np.arange(3).repeat(7))
    assert (targets == predictions).mean() == pytest.approx(log[-1]["val_top1"])


def test_pictures_of_a_run_with_masks_say_that_the_model_is_heated(tmp_path, monkeypatch):
    notes = []
    draw = class_plots.confusion_matrix
    monkeypatch.setattr(class_plots, "confusion_matrix", lambda *args: notes.append(args[-1]) or draw(*args))
    monitor = pictures(tmp_path, trackers=())
    monitor.draw_gallery = lambda epochs_done: 1 / 0
    line = {"epoch": 0, "train_loss": 1.0, "val_f1": 0.5}
    write_log(tmp_path, [line])
    monitor.show(Predictions(torch.eye(2), torch.tensor([0, 1]), torch.arange(2)), line, no_wait)
    assert notes == ["Heated model: pretrained on masked images, not yet fine-tuned; it is no final classifier."]


def test_without_a_validation_only_the_log_is_drawn(tmp_path, capsys):
    line = {"epoch": 0, "train_loss": 1.0}
    write_log(tmp_path, [line])
    pictures(tmp_path, trackers=()).show(None, line, no_wait)
    assert names_in(tmp_path / "plots") == {"curves.png"}
    assert capsys.readouterr().out == ""


def test_a_picture_that_fails_is_named_and_ends_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(curves, "learning_curves", fail)
    monkeypatch.setattr(class_plots, "shorten", lambda _: 1 / 0)
    show_one_epoch(tmp_path)
    said = capsys.readouterr().out
    assert (
        "warning: plots/curves.png could not be written ([Errno 28] No space left on device); the training continues."
        in said
    )
    assert "warning: plots/recall_val.png could not be written (division by zero); the training continues." in said
    assert said.count("warning:") == 3


def test_a_folder_that_cannot_be_made_ends_nothing(tmp_path, capsys):
    for name in ("plots", "tensorboard"):
        (tmp_path / name).write_text("in the way")
    show_one_epoch(tmp_path)
    said = capsys.readouterr().out
    assert said.count("warning: plots/") == 3
    assert said.count("warning: tensorboard could not be written") == 1


@pytest.mark.slow
def test_no_worker_outlives_a_run_with_pictures(image_folder, tmp_path, monkeypatch):
    """What matplotlib calls leaves exceptions in cycles; they must not hold main's frame, and with it the loaders."""
    draw = learning_curves

    def leave_frames(runs):
        try:
            raise ValueError
        except ValueError as error:
            error.itself = error
        return draw(runs)

    monkeypatch.setattr(curves, "learning_curves", leave_frames)
    gc.disable()  # nor does the interpreter's exit collect cycles before it waits for the workers
    try:
        run_script("_normal", image_folder, tmp_path, "--epochs", "1", "--plot-every", "1", "--workers", "1")
        assert multiprocessing.active_children() == []
    finally:
        gc.enable()
