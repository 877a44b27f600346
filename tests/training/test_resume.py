"""A resumed run equals the uninterrupted one bit for bit; what would change the trajectory is refused."""

import json
import os
import shutil
import signal

import pytest
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, SMALL_POLICY
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import RICH, SCRIPTS, assert_same, assert_same_run, state_of, status_of
from utils.checkpoints import checkpoint
from utils.results.log import read_log
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.runtime.signals import Interrupted
from utils.training.saver import Saver


@pytest.fixture
def stop_at(monkeypatch):
    """Where this process sends itself which signal: (epoch, steps done) in the training, (epoch, "evaluation")."""
    signals = {}
    after_step, stop_if_asked = Saver.after_step, Saver.stop_if_asked

    def send(place):
        if place in signals:
            os.kill(os.getpid(), signals.pop(place))

    def stop_after_step(saver, position, guard):
        if saver.stop.previous_handlers:  # not in a rehearsal, whose saver is never entered
            send((position.epoch, position.step))
        after_step(saver, position, guard)

    def stop_in_evaluation(saver):
        send((saver.position.epoch, "evaluation"))
        stop_if_asked(saver)

    monkeypatch.setattr(Saver, "after_step", stop_after_step)
    monkeypatch.setattr(Saver, "stop_if_asked", stop_in_evaluation)
    return signals


def reached(folder):
    status = status_of(folder)
    return status["status"], status["epoch"], status["step"]


REINFORCE = ["--objective", "reinforce", "--lr", "0.01", "--model-ema", "--model-ema-steps", "3", "--head-weight", ".5",
             "--mask-range", ".5", "1.5", "--mask-fade-epochs", "1"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("_normal", RICH),
        ("_normal", ["--amp", "--amp-dtype", "fp16", "--lr", "0.01"]),
        ("_policy_gradient", [*RICH, "--mask-policy", "uniform"]),
        ("_policy_gradient", REINFORCE),
        ("_policy_gradient", ["--objective", "pathwise", "--policy-sign", "adversarial", "--keep-mean", "--lr", "0.1"]),
    ],
)
def test_resumed_from_anywhere_equals_uninterrupted(name, flags, image_folder, tmp_path, stop_at):
    """Stopped within an epoch, after its last step, and in its evaluation; 4 steps an epoch, 2 epochs."""
    script, small = SCRIPTS[name]
    whole, part = tmp_path / "whole", tmp_path / "part"
    command = [*small, *flags, "--epochs", "2", "--data-path", str(image_folder), "--output-dir"]
    script.main([*command, str(whole)])
    # Where the signal comes, and after how many steps the run stops: at the next step's end, or, where a loader worker
    # has no batch ready, before that step.
    places = {
        (0, 2): (signal.SIGTERM, 3),
        (0, "evaluation"): (signal.SIGUSR1, 4),
        (1, 1): (signal.SIGINT, "[12]"),
        (1, 4): (signal.SIGTERM, 4),
    }
    for place, (number, steps) in places.items():
        stop_at[place] = number
        with pytest.raises(Interrupted, match=rf"{number.name}: stopped after {steps} steps of epoch {place[0]}"):
            script.main([*command, str(part), "--resume", "auto", "--workers", str(place[0])])
        state = torch.load(part / "checkpoint.pth", weights_only=True)
        assert reached(part) == ("interrupted", place[0], state["step"])
        assert (state["epoch"], state["images"]) == (place[0], 8 * state["step"])
    script.main([*command, str(part), "--resume", "auto"])
    assert reached(part) == ("finished", 2, 0)
    assert_same_run(whole, part)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_checkpoints_within_an_epoch_and_their_copies_resume_exactly(name, image_folder, tmp_path, monkeypatch):
    """Every third step; each checkpoint that is ever written is copied, and the run resumed from some of them."""
    script, small = SCRIPTS[name]
    copies = []

    def copy_too(output_dir, state):
        save_checkpoint(output_dir, state)
        copies.append(tmp_path / f"{state['epoch']}_{state['step']}")
        shutil.copytree(output_dir, copies[-1])

    save_checkpoint = checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", copy_too)
    whole = tmp_path / "whole"
    command = [*small, "--epochs", "2", "--data-path", str(image_folder), "--batch-size", "5"]
    script.main([*command, "--output-dir", str(whole), "--checkpoint-steps", "3"])
    assert [path.name for path in copies] == ["0_3", "0_6", "1_0", "1_3", "1_6", "2_0"]
    monkeypatch.setattr(checkpoint, "save_checkpoint", save_checkpoint)
    for part in (copies[0], copies[4]):
        script.main(["--resume", str(part / "checkpoint.pth"), "--device", "cpu", "--workers", "1"])
        assert_same_run(whole, part)


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


@pytest.mark.slow
def test_another_world_size_continues_from_the_same_image(image_folder, tmp_path, stop_at):
    """One process did 2 of 4 steps, 16 of 36 images; two processes have one global batch of 16 in the 20 left."""
    stop_at[(0, 1)] = signal.SIGTERM
    command = [*SMALL, "--data-path", str(image_folder), "--epochs", "2", "--output-dir", str(tmp_path)]
    with pytest.raises(Interrupted):
        normal.main([*command, "--resume", "auto"])
    result = run_ranks("_normal/train.py", *command, "--resume", "auto", processes=2)
    assert "processes: 1 (CPU) before, now 2 (CPU)" in result.stdout
    assert "the same position in the data" in result.stdout
    assert "epoch 0 [3/3]" in result.stdout
    assert "epoch 1 [2/2]" in result.stdout
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]


@pytest.mark.slow
def test_auto_takes_the_newest_valid_checkpoint(image_folder, tmp_path, capsys):
    command = [*SMALL, "--data-path", str(image_folder), "--resume", "auto", "--output-dir", str(tmp_path), "--epochs"]
    normal.main([*command, "1"])
    assert "rehearsal" in capsys.readouterr().out
    normal.main([*command, "1"])  # finished: nothing is left to do
    assert "rehearsal" not in capsys.readouterr().out
    normal.main([*command, "2"])
    newest, previous = tmp_path / "checkpoint.pth", tmp_path / "checkpoint_prev.pth"
    expected = state_of(tmp_path)
    assert torch.load(previous, weights_only=True)["epoch"] == 1

    newest.write_bytes(newest.read_bytes()[:1000])  # damaged: the one before is taken, and is not lost by the next save
    normal.main([*command, "2"])
    assert f"{newest}: not a checkpoint, or damaged" in (said := capsys.readouterr().out)
    assert f"Trying {previous}." in said
    assert_same(state_of(tmp_path), expected)
    assert torch.load(previous, weights_only=True)["epoch"] == 1

    assert (tmp_path / "checkpoint_damaged.pth").stat().st_size == 1000

    state = torch.load(newest, weights_only=True)
    checkpoint.save(newest, {**state, "format_version": 9})  # not damaged: not to be passed over
    with pytest.raises(UserError, match="newer version"):
        normal.main([*command, "2"])
    assert torch.load(newest, weights_only=True)["format_version"] == 9

    newest.unlink()
    normal.main([*command, "2"])
    assert_same(state_of(tmp_path), expected)

    newest.write_bytes(b"damaged")
    previous.write_bytes(b"damaged too")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"checkpoint_prev\.pth: not a checkpoint"):
        normal.main([*command, "2"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_auto_starts_afresh_where_there_is_no_checkpoint(image_folder, tmp_path, capsys):
    """After a kill within the first epoch, too: before its checkpoint the weights of that epoch may be there."""
    data = ["--data-path", str(image_folder), "--device", "cpu", "--workers", "0"]
    part, whole = tmp_path / "part", tmp_path / "whole"
    part.mkdir()
    (part / "model_0.pth").write_bytes(b"of a first epoch that was killed")
    (part / ".checkpoint.pth.99.tmp").write_bytes(b"half a checkpoint")
    normal.main([*SMALL, *data, "--epochs", "1", "--output-dir", str(whole)])
    normal.main([*SMALL, *data, "--epochs", "1", "--output-dir", str(part), "--resume", "auto"])
    assert not (part / ".checkpoint.pth.99.tmp").exists()
    assert_same_run(whole, part)
    with pytest.raises(UserError, match="--resume auto: no checkpoint to test in"):
        normal.main([*data, "--output-dir", str(tmp_path / "none"), "--resume", "auto", "--test-only"])
    tested = ["--output-dir", str(part), "--resume", "auto", "--test-only"]
    normal.main([*data, *tested])
    assert json.loads((part / "metrics.json").read_text())["weights"] == str(part / "checkpoint.pth")

    fine = tmp_path / "fine"
    command = [*SMALL, *data, "--finetune", str(whole / "model_0.pth"), "--resume", "auto", "--output-dir", str(fine)]
    normal.main([*command, "--epochs", "1"])  # the first start takes the weights of --finetune,
    normal.main([*command, "--epochs", "2"])  # and the second one goes on with the run
    assert [line["epoch"] for line in read_log(fine)] == [0, 1]
    with pytest.raises(UserError, match="--resume and --finetune"):
        normal.main([*command, "--test-only"])


def test_auto_leaves_the_run_that_it_fine_tunes_alone(image_folder, tmp_path, monkeypatch):
    """Without --output-dir a run is written to the current folder, not to that of its weights."""
    data = ["--data-path", str(image_folder), "--epochs", "1"]
    normal.main([*SMALL, *data, "--output-dir", str(tmp_path / "heated")])
    before = {path.name: path.read_bytes() for path in (tmp_path / "heated").iterdir()}
    (tmp_path / "fine").mkdir()
    monkeypatch.chdir(tmp_path / "fine")
    normal.main([*SMALL, *data, "--finetune", "../heated/model_0.pth", "--resume", "auto"])
    assert (tmp_path / "fine" / "checkpoint.pth").exists()
    assert {path.name: path.read_bytes() for path in (tmp_path / "heated").iterdir()} == before


def test_auto_writes_over_no_run_that_has_lost_its_checkpoint(image_folder, tmp_path):
    for name in ("model_0.pth", "model_1.pth", "log.jsonl", ".notes.tmp"):
        (tmp_path / name).write_bytes(b"precious")
    (tmp_path / ".cache.1.tmp").mkdir()
    command = [*SMALL, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(tmp_path)]
    with pytest.raises(UserError, match=r"model_1\.pth: another run is there"):
        normal.main([*command, "--resume", "auto"])
    assert (tmp_path / "log.jsonl").read_bytes() == b"precious"
    (tmp_path / "model_1.pth").unlink()
    normal.main([*command, "--resume", "auto"])
    assert (tmp_path / ".notes.tmp").read_bytes() == b"precious"


def test_a_run_moved_to_another_folder_is_there_from_its_first_moment(image_folder, tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    command = [*SMALL, "--data-path", str(image_folder), "--output-dir"]
    normal.main([*command, str(old), "--epochs", "1"])
    with monkeypatch.context() as patch:
        patch.setattr(Saver, "after_step", lambda *_: 1 / 0)  # fails before anything is saved
        with pytest.raises(ZeroDivisionError):
            normal.main(["--resume", str(old / "checkpoint.pth"), "--epochs", "2", "--output-dir", str(new)])
    normal.main([*command, str(new), "--epochs", "2", "--resume", "auto"])
    normal.main([*command, str(old), "--epochs", "2", "--resume", "auto"])
    assert_same_run(old, new, but={"model_0.pth"})  # which stays where it was written


def test_an_epoch_that_is_begun_counts(image_folder, tmp_path, stop_at):
    stop_at[(1, 1)] = signal.SIGTERM
    command = [*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path), "--resume", "auto", "--epochs"]
    with pytest.raises(Interrupted):
        normal.main([*command, "2"])
    with pytest.raises(UserError, match=r"--epochs 1: .* has already trained 1 epochs and 2 steps"):
        normal.main([*command, "1"])


def test_what_cannot_be_resumed_is_refused_and_unharmed(image_folder, tmp_path):
    folder = tmp_path / "run"
    policy_gradient.main(
        [*SMALL_POLICY, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(folder)]
    )
    checkpoint = str(folder / "checkpoint.pth")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    resume = ["--resume", checkpoint]
    refusals = {
        "is a checkpoint of _policy_gradient/train.py": (normal, resume),
        "holds weights but no full training state": (policy_gradient, ["--resume", str(folder / "model_0.pth")]),
        "--grid 4: .* cannot change this": (policy_gradient, [*resume, "--grid", "4"]),
        r"--mask-range 0.0 2.0: .* with --mask-range 0.0 1.0,": (policy_gradient, [*resume, "--mask-range", "0", "2"]),
        "--mask-fade-epochs 1: .* --mask-fade-epochs 0,": (policy_gradient, [*resume, "--mask-fade-epochs", "1"]),
        "--head-weight 0.2: .* with --head-weight 0.1,": (policy_gradient, [*resume, "--head-weight", "0.2"]),
        "another run is there": (policy_gradient, [*SMALL_POLICY, "--output-dir", str(folder)]),
        "--resume and --finetune": (normal, [*resume, "--finetune", checkpoint]),
        "no such file": (normal, ["--resume", str(folder / "checkpoint_9.pth")]),
    }
    for message, (script, flags) in refusals.items():
        with pytest.raises(UserError, match=message):
            script.main([*flags, "--data-path", str(image_folder), "--device", "cpu"])
    other = tmp_path / "other_classes"
    for split in ("train", "val"):
        shutil.copytree(image_folder / split, other / split)
        (other / split / "dark").rename(other / split / "other")
    again = ["--resume", checkpoint, "--epochs", "2", "--data-path", str(other), "--device", "cpu"]
    with pytest.raises(UserError, match="started with other classes"):
        policy_gradient.main(again)
    (other / "val" / "other").rename(other / "val" / "dark")
    (other / "train" / "other").rename(other / "train" / "dark")
    (other / "train" / "dark" / "0.png").unlink()
    with pytest.raises(UserError, match=r"started with 36 images in .*other_classes/train, which has 35 now"):
        policy_gradient.main(again)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_stopped_run_prints_it_once_and_exits_with_75(image_folder, tmp_path, stop_at, capsys):
    stop_at[(0, 1)] = signal.SIGUSR1
    command = [*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path), "--epochs", "1"]
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: normal.main(command))
    assert caught.value.code == 75
    last = capsys.readouterr().out.splitlines()[-1]
    path, advice = tmp_path / "checkpoint.pth", "the same command with --resume auto continues from there"
    assert last == f"SIGUSR1: stopped after 2 steps of epoch 0; {path} is saved; {advice}."


def test_ctrl_c_before_the_training_leaves_no_traceback():
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_script(interrupt)
    assert caught.value.code == 130
