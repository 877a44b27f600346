"""--val-every: which epochs are validated, and that nothing else depends on it."""

import pytest

from tests.helpers.runs import RICH, SCRIPTS, assert_same, assert_same_run, log_of, run_script, state_of, status_of
from utils.checkpoints import checkpoint
from utils.results.log import read_log
from utils.runtime.progress import Position
from utils.runtime.signals import Interrupted
from utils.training import evaluation
from utils.training.monitor import Monitor
from utils.training.saver import Saver
from utils.training.update import StepGuard


class Killed(Exception):
    """In the place of a SIGKILL."""


def kill(*_):
    raise Killed


def validated(folder):
    """The epochs of the log with a value of the validation, and with the AUROC."""
    lines = read_log(folder)
    return [
        [line["epoch"] for line in lines if any(name.startswith(start) for name in line)]
        for start in ("val_", "val_auroc")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["_policy_gradient"])  # validation is shared; the other main has the same lines
def test_skipped_validations_change_no_weight_and_resume_exactly(name, image_folder, tmp_path, monkeypatch):
    """Three epochs of 4 steps, validated after each one and every second one, without and with interruptions."""
    each, whole, part = (tmp_path / folder for folder in ("each", "whole", "part"))
    flags = [*RICH, "--epochs", "3"]
    run_script(name, image_folder, each, *flags)
    run_script(name, image_folder, whole, *flags, "--val-every", "2")
    assert [validated(folder) for folder in (each, whole)] == [[[0, 1, 2], [2]], [[1, 2], [2]]]
    first, *later = log_of(each)
    unvalidated = {key: value for key, value in first.items() if not key.startswith("val_")}
    assert log_of(whole) == [unvalidated, *later]
    for file in ("model_0.pth", "model_1.pth", "model_2.pth", "checkpoint.pth"):
        states = [state_of(folder, file) for folder in (each, whole)]
        assert [state["args"].pop("val_every") for state in states] == [1, 2]
        for state in states:
            state.pop("best_f1", None)
        assert_same(*states, file)

    def save_unless_killed(output_dir, state):
        if Position.of(state)[:2] == killed_at:
            raise Killed
        save(output_dir, state)

    save = checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", save_unless_killed)
    for killed_at in ((1, 0), (3, 0)):  # after the files of an unvalidated epoch, and of the last one
        with pytest.raises(Killed):
            run_script(name, image_folder, part, *flags, *("--val-every", "2", "--resume", "auto"),
                       *("--checkpoint-steps", "3"))  # fmt: skip
        status = status_of(part)
        assert (status["epoch"], status["step"]) == (killed_at[0] - 1, 3)
    killed_at = None
    run_script(name, image_folder, part, *flags, "--val-every", "2", "--resume", "auto")
    assert_same_run(whole, part)


def test_the_best_epoch_is_a_validated_one(train, monkeypatch, capsys):
    measured = iter((0.4, 0.6, 0.5))
    monkeypatch.setattr(evaluation, "measure", lambda *_: {"f1": next(measured), "loss": 1.0})
    folder = train(SCRIPTS["_normal"][0], "--epochs", 5, "--val-every", 2)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch") and "[" not in line]
    assert [line.split(": ")[0] for line in printed] == [
        "epoch 0", "epoch 1, val", "epoch 2", "epoch 3, val", "epoch 4, val"
    ]  # fmt: skip
    assert printed[0] == "epoch 0: not validated"
    assert [number for number, line in enumerate(printed) if line.endswith("  (best)")] == [1, 3]
    assert [line.get("val_f1") for line in read_log(folder)] == [None, 0.4, None, 0.6, 0.5]
    assert_same(state_of(folder, "model_best.pth"), state_of(folder, "model_3.pth"))
    assert state_of(folder)["best_f1"] == 0.6


def test_a_signal_after_the_last_step_stops_an_epoch_without_validation(image_folder, tmp_path, monkeypatch):
    """The guard reads nothing, as on a GPU in the last two steps."""

    def ask(saver, position, guard):
        saver.stop.asked = "SIGTERM" if position.step == 4 else None
        after_step(saver, position, guard)

    after_step = Saver.after_step
    monkeypatch.setattr(Saver, "after_step", ask)
    monkeypatch.setattr(StepGuard, "stop_agreed", lambda _: False)
    with pytest.raises(Interrupted, match="SIGTERM: stopped after 4 steps of epoch 0"):
        run_script("_normal", image_folder, tmp_path, "--epochs", "2", "--val-every", "2")
    assert not (tmp_path / "model_0.pth").exists()  # the resumed run writes it


@pytest.mark.slow
def test_a_resumed_run_may_change_it(image_folder, tmp_path, monkeypatch, capsys):
    """More than --epochs: only the last epoch is validated, and on resume that may turn out to be past."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Monitor, "show", kill)
        run_script("_normal", image_folder, tmp_path, "--epochs", "3", "--val-every", "9")
    run_script("_normal", image_folder, tmp_path, "--epochs", "1", "--resume", "auto")
    assert "No epoch was validated, so there is no model_best.pth." in capsys.readouterr().out
    run_script("_normal", image_folder, tmp_path, "--epochs", "2", "--resume", "auto")
    assert validated(tmp_path) == [[1], [1]]
    run_script("_normal", image_folder, tmp_path, "--epochs", "4", "--val-every", "1", "--resume", "auto")
    assert validated(tmp_path) == [[1, 2, 3], [1, 3]]
    assert (tmp_path / "model_best.pth").exists()
