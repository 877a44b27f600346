"""What a run leaves behind and says: its status, the batch of a bad loss, and the rehearsal that leaves no trace."""

import json
import math
import re
import shutil
from collections import namedtuple

import pytest
import torch

from _normal import train as normal
from tests.conftest import SMALL
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import RICH, SCRIPTS, assert_same_run, status_of
from utils.data.dataset import ImageFolder
from utils.data.samplers import TrainingSampler
from utils.runtime import progress
from utils.runtime.errors import UserError
from utils.training import rehearsal, run
from utils.training.saver import Saver
from utils.training.state import TrainingState

DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("_normal", RICH),
        ("_normal", ["--amp", "--amp-dtype", "fp16", "--clip-grad-norm", "1", "--freeze-backbone"]),
        ("_policy_gradient", ["--objective", "reinforce", "--model-ema", "--opt", "rmsprop", "--lr", "0.01"]),
        ("_policy_gradient", ["--mask-policy", "prior"]),
    ],
)
def test_the_rehearsal_leaves_no_trace(name, flags, image_folder, tmp_path, monkeypatch):
    """Not in weights, statistics, optimisers, random numbers or the log: a run without it is the same bit for bit."""
    script, small = SCRIPTS[name]
    command = [*small, *flags, "--epochs", "1", "--data-path", str(image_folder), "--output-dir"]
    script.main([*command, str(tmp_path / "with")])
    with monkeypatch.context() as patch:
        patch.setattr(run, "rehearse", lambda *_, **__: None)
        script.main([*command, str(tmp_path / "without")])
    assert_same_run(tmp_path / "with", tmp_path / "without")


def test_the_rehearsal_trains_evaluates_and_measures_the_room(image_folder, tmp_path, capsys):
    command = [*SMALL, "--opt", "adamw", "--data-path", str(image_folder), "--epochs", "1"]
    normal.main([*command, "--output-dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert "rehearsal, epoch 0 [1/1]" in said
    assert "rehearsal, evaluate [1/1]" in said
    assert "rank 0: cpu, " in said
    size = (tmp_path / "checkpoint.pth").stat().st_size  # with AdamW's averages, which the first step brings
    [measured] = re.findall(r"a checkpoint has ([\d.]+) MB", said)
    assert float(measured) == pytest.approx(size / 1e6, rel=0.02, abs=0.06)


def test_too_little_disk_space_is_reported_before_the_first_epoch(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(10**9, 10**9 - 10**7, 10**7))
    command = [*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path), "--epochs"]
    message = r"has 0.01 GB free, and the run will write 0.0\d GB \(checkpoints of 0.00 GB, 20 files of weights\)"
    with pytest.raises(UserError, match=message):
        normal.main([*command, "20"])
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "run.json", "status.json"}
    normal.main([*command, "1"])  # which needs less than that


def test_too_little_memory_is_reported_in_a_sentence(image_folder, tmp_path, monkeypatch):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(normal, "batch_accuracy", too_much)
    with pytest.raises(UserError, match="rank 0: cpu has too little memory for --batch-size 8; give a smaller one"):
        normal.main([*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path), "--epochs", "1"])
    assert status_of(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_loss_that_is_not_finite_names_the_images_of_its_batch(name, image_folder, tmp_path, monkeypatch):
    script, small = SCRIPTS[name]
    command = [*small, "--data-path", str(image_folder), "--output-dir", str(tmp_path), "--lr", "0.001", "--epochs"]
    script.main([*command, "1"])
    before = (tmp_path / "checkpoint.pth").read_bytes()
    poisoned = []
    cross_entropy = torch.nn.functional.cross_entropy

    def cross_entropy_of_a_bad_batch(logits, targets, **settings):
        loss = cross_entropy(logits, targets, **settings)
        poisoned.append(targets.tolist())
        return loss * float("nan") if len(poisoned) == 4 else loss  # the rehearsal's is the first

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", cross_entropy_of_a_bad_batch)
    with pytest.raises(UserError, match=r"not finite at epoch 1, step 2;"):
        script.main([*command, "2", "--resume", "auto"])
    [batch] = json.loads((tmp_path / "nonfinite_batch.json").read_text())
    assert (batch["rank"], batch["loss_is_finite"]) == (0, False)
    classes = sorted(folder.name for folder in (image_folder / "train").iterdir())
    found = [path.removeprefix(f"{image_folder}/train/").split("/")[0] for path in batch["images"]]
    assert found == [classes[target] for target in poisoned[3]]
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    status = status_of(tmp_path)
    assert (status["status"], status["epoch"]) == ("failed", 1)
    assert "not finite at epoch 1, step 2" in status["message"]


def test_weights_that_are_not_finite_are_not_saved(image_folder, tmp_path, monkeypatch):
    """A gradient that overflows leaves no trace in the loss of its step, and the checkpoint may be due right then."""
    command = [*SMALL, "--lr", "0.001", "--data-path", str(image_folder), "--output-dir", str(tmp_path), "--epochs"]
    normal.main([*command, "1"])
    before = (tmp_path / "checkpoint.pth").read_bytes()
    after_step = Saver.after_step

    def overflow(saver, position, guard):
        if saver.checkpoint_steps and position.step == 2:  # not in the rehearsal
            saver.training.modules["model"].fc.weight.data[0, 0] = float("inf")
        after_step(saver, position, guard)

    monkeypatch.setattr(Saver, "after_step", overflow)
    with pytest.raises(
        UserError, match=r"model\.fc\.weight is not finite after 2 steps of epoch 1, so nothing was saved"
    ):
        normal.main([*command, "2", "--resume", "auto", "--checkpoint-steps", "2"])
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    status = status_of(tmp_path)
    assert (status["status"], status["epoch"], status["step"]) == ("failed", 1, 0)


def test_the_first_tensor_that_is_not_finite_is_named_also_behind_empty_ones():
    network = torch.nn.Module()
    for name, value in (("empty", []), ("count", [1]), ("small", [1.0, -60000.0]), ("bad", [0.0, -math.inf, 1.0])):
        network.register_buffer(name, torch.tensor(value, dtype=torch.float16 if name == "small" else None))
    update = namedtuple("Update", "ema")(None)
    assert TrainingState({"model": network}, update, None).first_not_finite() == "model.bad"
    network.bad.zero_()
    assert TrainingState({"model": network}, update, None).first_not_finite() is None


@pytest.mark.slow
def test_the_status_keeps_the_reason_of_the_rank_that_failed(image_folder, tmp_path):
    """Rank 0 fails alone, and takes the store of the failures with it; rank 1 only loses contact."""
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    sampler = TrainingSampler(36, 8, 0, 2)
    victim = ImageFolder(data / "train", None).path(list(sampler)[1][0].index)
    victim.write_text("no image")
    flags = [*SMALL, "--data-path", data, "--output-dir", tmp_path / "run", "--epochs", 1]
    result = run_ranks("_normal/train.py", *flags, processes=2, check=False)
    assert result.returncode != 0
    status = status_of(tmp_path / "run")
    assert status["status"] == "failed"
    assert status["message"].startswith(f"{victim}: cannot be read as an image")


def test_an_estimate_after_so_many_steps(image_folder, tmp_path, monkeypatch, capsys):
    assert progress.STEPS_FOR_ESTIMATE == 50
    monkeypatch.setattr(progress, "STEPS_FOR_ESTIMATE", 3)
    monkeypatch.setattr(progress.time, "perf_counter", iter(range(0, 10**6, 3600)).__next__)  # an hour between looks
    normal.main([*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path), "--epochs", "2"])
    estimates = re.findall(r"after 3 steps: about (.*) of training are left", capsys.readouterr().out)
    assert len(estimates) == 2
    first, second = (int(text.split(":")[0]) for text in estimates)
    assert first > second > 0


def test_a_failure_of_the_code_itself_is_in_the_status_too(image_folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("of the test")

    monkeypatch.setattr(normal, "batch_accuracy", fail)
    with pytest.raises(ZeroDivisionError):
        normal.main([*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path), "--epochs", "1"])
    assert (status_of(tmp_path)["status"], status_of(tmp_path)["message"]) == ("failed", "of the test")


def test_an_output_folder_on_a_read_only_file_system(image_folder):
    with pytest.raises(UserError, match=r"/proc/run: cannot be created .* give another --output-dir"):
        normal.main([*SMALL, "--data-path", str(image_folder), "--output-dir", "/proc/run", "--epochs", "1"])


def test_room_is_asked_for_what_is_not_there_yet(tmp_path, monkeypatch):
    state = {"model": {"a": torch.zeros(250_000)}, "more": torch.zeros(250_000)}  # 1 MB of weights, a state of 2 MB
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(0, 0, free[0]))
    for there, room in (((), 2 * 2 + 4), (("checkpoint.pth",), 2 + 4), (("checkpoint.pth", "checkpoint_prev.pth"), 4)):
        for name in there:
            (tmp_path / name).write_bytes(b"")
        free[0] = int(1.01e6 * room)
        rehearsal.check_space(tmp_path, state, epochs_left=3)
        free[0] = int(0.99e6 * room)
        with pytest.raises(UserError, match="GB free, and the run will write"):
            rehearsal.check_space(tmp_path, state, epochs_left=3)
