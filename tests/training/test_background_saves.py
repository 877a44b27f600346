"""Saves in a thread: training goes on meanwhile, one write at a time, and an error or a signal loses nothing."""

import concurrent.futures
import os
import shutil
import signal
import threading

import pytest

from _normal import train as normal
from tests.conftest import SMALL
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import assert_same_run, state_of, status_of
from utils.checkpoints import checkpoint
from utils.runtime import distributed
from utils.runtime.errors import UserError
from utils.runtime.files import write_json
from utils.runtime.progress import Position
from utils.runtime.signals import Interrupted
from utils.training.background import BackgroundWrite
from utils.training.saver import Saver

SECONDS = 60  # no wait takes as long, unless the test fails


def run(image_folder, folder, *flags):
    """2 epochs of 4 steps."""
    common = [*SMALL, "--lr", "0.01", "--epochs", "2", "--data-path", str(image_folder)]
    normal.main([*common, "--output-dir", str(folder), *flags])


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(image_folder, folder)
    return folder


def at_each_write(monkeypatch, act):
    """Call `act` in the thread, with the position (epoch, step) of each checkpoint, before it is written."""
    save = checkpoint.save_checkpoint

    def act_and_save(output_dir, state):
        act(Position.of(state)[:2])
        save(output_dir, state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", act_and_save)


class Steps:
    """The positions (epoch, step) whose `after_step` has returned."""

    def __init__(self, monkeypatch):
        self.done, self.changed, after_step = [], threading.Condition(), Saver.after_step

        def watched(saver, position, guard):
            after_step(saver, position, guard)
            if saver.stop.previous_handlers:  # not in the rehearsal
                with self.changed:
                    self.done.append(position[:2])
                    self.changed.notify_all()

        monkeypatch.setattr(Saver, "after_step", watched)

    def wait_for(self, position):
        with self.changed:
            assert self.changed.wait_for(lambda: position in self.done, SECONDS)


def test_steps_go_on_during_a_write_which_holds_the_state_of_its_own(whole, image_folder, tmp_path, monkeypatch):
    steps, save = Steps(monkeypatch), checkpoint.save_checkpoint

    def save_late(output_dir, state):
        if Position.of(state)[:2] == (0, 2):
            steps.wait_for((0, 3))
        save(output_dir, state)
        if Position.of(state)[:2] == (0, 2):
            shutil.copytree(output_dir, tmp_path / "early")

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_late)
    run(image_folder, tmp_path / "run", "--checkpoint-steps", "2")
    assert_same_run(whole, tmp_path / "run")
    assert state_of(tmp_path / "early")["step"] == 2
    run(image_folder, tmp_path / "early", "--resume", "auto")
    assert_same_run(whole, tmp_path / "early")


def test_there_is_one_write_at_a_time(image_folder, tmp_path, monkeypatch):
    steps, writes = Steps(monkeypatch), []

    def act(position):
        writes.append((position, list(steps.done)))
        if position == (0, 1):
            threading.Event().wait(0.3)  # time enough for a step, if training did not wait
            assert (0, 2) not in steps.done

    at_each_write(monkeypatch, act)
    run(image_folder, tmp_path, "--checkpoint-steps", "1")
    assert [position for position, _ in writes] == [
        *((0, 1), (0, 2), (0, 3), (0, 4), (1, 0)),
        *((1, 1), (1, 2), (1, 3), (1, 4), (2, 0)),
    ]
    assert status_of(tmp_path)["status"] == "finished"


@pytest.mark.parametrize(
    ("failing", "kept", "last_step"), [((0, 2), None, (0, 2)), ((1, 0), (0, 4), (0, 4)), ((2, 0), (1, 4), (1, 4))]
)
def test_a_write_that_fails_stops_the_run_at_the_next_step(
    failing, kept, last_step, whole, image_folder, tmp_path, monkeypatch
):
    def fail(position):
        if position == failing:
            raise UserError("the disk is full")

    start = BackgroundWrite.start

    def start_and_end(writing, write):  # so that the failure is known before the next step
        start(writing, write)
        concurrent.futures.wait([writing._pending], SECONDS)

    with monkeypatch.context() as patch:
        steps = Steps(patch)
        at_each_write(patch, fail)
        patch.setattr(BackgroundWrite, "start", start_and_end)
        with pytest.raises(UserError, match=r"^the disk is full$"):
            run(image_folder, tmp_path, "--checkpoint-steps", "2")
    assert steps.done[-1] == last_step
    status = status_of(tmp_path)
    assert (status["status"], status["message"]) == ("failed", "the disk is full")
    assert (status["epoch"], status["step"]) == (kept or (0, 0))
    if kept is None:
        assert not (tmp_path / "checkpoint.pth").exists()
    else:
        assert Position.of(state_of(tmp_path))[:2] == kept
        run(image_folder, tmp_path, "--resume", "auto")
        assert_same_run(whole, tmp_path)


@pytest.mark.slow
def test_a_write_that_fails_stops_all_ranks_with_one_sentence(image_folder, tmp_path):
    result = run_ranks("tests/helpers/worker.py", "full_disk", tmp_path, image_folder, processes=2, check=False)
    assert result.returncode == 2
    assert [line for line in result.stderr.splitlines() if "arning" not in line] == ["error: the disk is full"]
    assert status_of(tmp_path)["message"] == "the disk is full"


@pytest.mark.slow
def test_a_signal_waits_for_the_write_and_saves_after_it(whole, image_folder, tmp_path, monkeypatch):
    steps = Steps(monkeypatch)

    def ask_to_stop(position):
        if position == (0, 1):
            steps.wait_for((0, 1))
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(0.3)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="SIGTERM: stopped after"):
        at_each_write(patch, ask_to_stop)
        run(image_folder, tmp_path, "--checkpoint-steps", "1")
    assert status_of(tmp_path)["status"] == "interrupted"
    newest, previous = (Position.of(state_of(tmp_path, name)) for name in ("checkpoint.pth", "checkpoint_prev.pth"))
    assert previous[:2] == (0, 1)
    assert newest[:2] > (0, 1)
    run(image_folder, tmp_path, "--resume", "auto")
    assert_same_run(whole, tmp_path)


def test_a_crash_waits_for_the_write_and_is_the_status_that_stays(image_folder, tmp_path, monkeypatch):
    crashed, calls, accuracy = threading.Event(), [], normal.batch_accuracy

    def crash(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # the rehearsal's is the first
            crashed.set()
            raise ZeroDivisionError("of the test")
        return accuracy(*arguments)

    monkeypatch.setattr(normal, "batch_accuracy", crash)
    at_each_write(monkeypatch, lambda _: crashed.wait(SECONDS))
    with pytest.raises(ZeroDivisionError):
        run(image_folder, tmp_path, "--checkpoint-steps", "2")
    assert state_of(tmp_path)["step"] == 2
    status = status_of(tmp_path)
    assert (status["status"], status["message"], status["step"]) == ("failed", "of the test", 2)


def test_a_rank_other_than_0_that_fails_keeps_the_recorded_position(image_folder, tmp_path, monkeypatch):
    accuracy, steps = normal.batch_accuracy, []

    def crash_as_another_rank(*arguments):
        steps.append(arguments)
        if len(steps) == 4:  # the rehearsal's is the first
            monkeypatch.setattr(distributed, "is_main_process", lambda: False)
            raise ZeroDivisionError("of the test")
        return accuracy(*arguments)

    def record(saver, error):
        saver.writing.wait()
        saver.saved = Position()  # as on a rank that has saved nothing itself
        recorded_end(saver, error)

    recorded_end = Saver._record_end
    monkeypatch.setattr(Saver, "_record_end", record)
    monkeypatch.setattr(normal, "batch_accuracy", crash_as_another_rank)
    with pytest.raises(ZeroDivisionError):
        run(image_folder, tmp_path, "--checkpoint-steps", "2")
    status = status_of(tmp_path)
    assert (status["status"], status["message"], status["step"]) == ("failed", "of the test", 2)


def test_a_write_keeps_the_reason_of_a_rank_that_fails_meanwhile(image_folder, tmp_path, monkeypatch):
    def fail_elsewhere(position):
        if position == (0, 2):
            write_json(tmp_path / "status.json", {"status": "failed", "message": "rank 1: of the test"})

    accuracy, calls = normal.batch_accuracy, []

    def lose_contact(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # the rehearsal's is the first
            raise RuntimeError("gloo: connection closed by peer")
        return accuracy(*arguments)

    monkeypatch.setattr(normal, "batch_accuracy", lose_contact)
    monkeypatch.setattr(distributed, "failure_posted", lambda: True)
    at_each_write(monkeypatch, fail_elsewhere)
    with pytest.raises(RuntimeError, match="gloo"):
        run(image_folder, tmp_path, "--checkpoint-steps", "2")
    status = status_of(tmp_path)
    assert (status["status"], status["message"], status["step"]) == ("failed", "rank 1: of the test", 2)
    assert state_of(tmp_path)["step"] == 2
