"""Faults on purpose: kills at any moment, a full disk, lost and hanging ranks, signals. Nothing is lost by any of them.

benchmarks/soak.py is the long form of the first of them.
"""

import fcntl
import itertools
import os
import random
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest

from _policy_gradient import train as policy_gradient
from benchmarks import soak
from benchmarks.soak import Aim, Tally, positions, survive, temporary_files, watch
from tests.conftest import SMALL_POLICY, write_image_folder
from tests.helpers.disks import full_disk
from tests.helpers.lives import TorchrunLife, WarmLife
from tests.helpers.ranks import PATIENCE
from tests.helpers.runs import status_of
from utils.checkpoints import checkpoint
from utils.runtime.processes import EXIT_CODE, run_script

STEPS, EPOCHS, CHECKPOINT_STEPS = 9, 2, 3  # steps of an epoch: 36 images, 2 in each of two processes
FLAGS = ("--batch-size", 2, "--epochs", EPOCHS)
AGAIN = (*FLAGS, "--resume", "auto", "--checkpoint-steps", CHECKPOINT_STEPS)


class Whole(NamedTuple):
    """The run that nothing disturbs, and its data."""

    data: Path
    folder: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    """Made once, also where pytest-xdist has several workers."""
    base = tmp_path_factory.getbasetemp()
    base = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "undisturbed"
    base.mkdir(exist_ok=True)
    found = Whole(base / "data", base / "run")
    with (base / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.data.exists():
            write_image_folder(found.data)
            life = WarmLife(soak.command(found.data, found.folder, 2, *FLAGS, "--workers", 0), base / "output.txt")
            assert life.exit_code() == 0, life.output.read_text()
            assert life.steps() == list(range(EPOCHS * STEPS))
    return found


def assert_equals(whole: Whole, folder: Path) -> None:
    tally = Tally()
    tally.compare(whole.folder, folder)
    assert tally.differences == []
    assert tally.files == EPOCHS + 2  # weights of each epoch, checkpoint, log
    assert status_of(folder)["status"] == "finished"


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(whole, tmp_path):
    rng, tally, folder = random.Random(0), Tally(), tmp_path / "run"
    # Some in a write; all within the run's 18 steps, whatever is done twice.
    aims = [Aim(steps=rng.randint(1, 3), at_write=at_write, delay=rng.uniform(0, 0.05)) for at_write in (0, 1, 0, 1)]

    def start(number: int) -> WarmLife:
        command = soak.command(whole.data, folder, 2, *AGAIN, "--workers", number % 2)
        return WarmLife(command, tmp_path / f"life_{number}.txt")

    survive(start, folder, iter(aims), tally)
    assert tally.kills.total() == 4
    assert tally.starts == 5
    assert tally.most_repeated <= CHECKPOINT_STEPS
    assert tally.steps_computed > EPOCHS * STEPS
    assert tally.damaged == 0
    assert_equals(whole, folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    done = start(9)
    assert done.exit_code() == 0, done.output.read_text()
    assert done.steps() == []
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth")} == before
    assert_equals(whole, folder)


@pytest.mark.slow
def test_torchrun_brings_all_back_after_a_rank_was_killed(whole, tmp_path):
    folder = tmp_path / "run"
    command = soak.command(whole.data, folder, 2, *AGAIN, "--workers", 0)
    life = TorchrunLife(command, tmp_path / "output.txt", "--max-restarts=2")
    try:
        assert watch(life, folder, Aim(steps=STEPS + CHECKPOINT_STEPS + 2)), life.output.read_text()
        os.kill(life.children()[1], signal.SIGKILL)
        assert life.exit_code() == 0, life.output.read_text()
    finally:
        life.kill()
    steps = life.steps()
    [(last, resumed)] = [pair for pair in itertools.pairwise(steps) if pair[1] != pair[0] + 1]
    saved = [epoch * STEPS + step for epoch in range(EPOCHS) for step in range(0, STEPS, CHECKPOINT_STEPS)]
    assert resumed in saved
    assert resumed > last - CHECKPOINT_STEPS  # from the last checkpoint, not from one before
    assert steps[-1] == EPOCHS * STEPS - 1
    assert_equals(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "options"),
    [(signal.SIGTERM, []), (signal.SIGHUP, []), (signal.SIGUSR1, ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"])],
)
def test_a_signal_to_torchrun_saves_a_checkpoint_within_the_epoch(whole, tmp_path, number, options):
    folder = tmp_path / "run"
    command = soak.command(whole.data, folder, 2, *AGAIN, "--workers", 1)
    life = TorchrunLife(command, tmp_path / "torchrun.txt", *options)
    try:
        assert watch(life, folder, Aim(steps=STEPS + 2)), life.output.read_text()
        os.kill(life.process.pid, number)
        assert life.exit_code()
    finally:
        life.kill()
    done = life.steps()[-1] + 1
    found = status_of(folder)
    assert found["status"] == "interrupted", (found, life.output.read_text())
    assert number.name in found["message"]
    assert (found["epoch"], found["step"]) == divmod(done, STEPS)  # no step was lost
    assert max(positions(folder)[0]) == (found["epoch"], found["step"])
    assert "Traceback" not in life.output.read_text().split(number.name)[0]
    again = WarmLife(command, tmp_path / "again.txt")
    assert again.exit_code() == 0, again.output.read_text()
    assert again.steps() == list(range(done, EPOCHS * STEPS))
    assert_equals(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_no_rank_waits_forever_for_another(whole, tmp_path, fault):
    folder = tmp_path / "run"
    command = soak.command(whole.data, folder, 2, *AGAIN, "--workers", 0, "--timeout", 8)
    life = WarmLife(command, tmp_path / "output.txt")
    try:
        assert watch(life, folder, Aim(steps=CHECKPOINT_STEPS + 1)), life.output.read_text()
        os.kill(life.ranks[1].pid, fault)
        life.ranks[0].join(PATIENCE)
        assert life.ranks[0].exitcode == EXIT_CODE
    finally:
        life.kill()
    said = life.output.read_text()
    assert "error: rank 0: another rank ended, or did not answer within --timeout" in said
    assert "Traceback" not in said
    assert status_of(folder)["status"] == "failed"
    found, damaged = positions(folder)
    assert max(found) >= (0, CHECKPOINT_STEPS)
    assert damaged == 0


def run_to_its_error(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Run the script in this process; returns its one sentence on stderr."""
    with pytest.raises(SystemExit) as exit_:
        run_script(lambda: policy_gradient.main(arguments))
    assert exit_.value.code == EXIT_CODE
    lines = [line for line in capsys.readouterr().err.splitlines() if "arning" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_full_disk_is_reported_before_the_first_step(image_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    with full_disk(1_000_000):
        arguments = [*SMALL_POLICY, "--data-path", image_folder, "--output-dir", folder, "--epochs", 2]
        said = run_to_its_error(list(map(str, arguments)), capsys)
    assert said.startswith(f"error: {folder}")
    assert "cannot be written" in said
    assert "(File too large)" in said
    assert not list(folder.glob("*.pth"))
    assert not temporary_files(folder)
    assert status_of(folder)["status"] == "failed"
    assert status_of(folder)["message"] in said
    assert (status_of(folder)["epoch"], status_of(folder)["step"]) == (0, 0)


@pytest.mark.slow
def test_a_disk_that_fills_up_harms_no_checkpoint(image_folder, tmp_path, capsys, monkeypatch):
    """The writes of 2 epochs of 4 steps: checkpoint, checkpoint, weights, checkpoint, checkpoint, ..."""

    def arguments(folder: Path, *flags: object) -> list[str]:
        paths = ("--data-path", image_folder, "--output-dir", folder)
        return list(map(str, [*SMALL_POLICY, *paths, "--epochs", 2, "--checkpoint-steps", 2, *flags]))

    def fill_up_at(write: int) -> Callable:
        writes, save = itertools.count(1), checkpoint.save

        def save_while_there_is_room(path: Path, state: dict) -> None:
            with full_disk(1_000_000) if next(writes) == write else nullcontext():
                save(path, state)

        return save_while_there_is_room

    whole = tmp_path / "whole"
    policy_gradient.main(arguments(whole))
    for write, position in ((3, (0, 4)), (5, (1, 0))):
        part = tmp_path / f"write_{write}"
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", fill_up_at(write))
            said = run_to_its_error(arguments(part), capsys)
        assert said.startswith(f"error: {part}")
        assert said.endswith("cannot be written (File too large); what was there is unharmed.")
        found, damaged = positions(part)
        assert max(found) == position
        assert damaged == 0
        assert not temporary_files(part)
        assert status_of(part)["status"] == "failed"
        assert status_of(part)["message"] in said
        policy_gradient.main(arguments(part, "--resume", "auto"))  # there is room again
        tally = Tally()
        tally.compare(whole, part)
        assert tally.differences == []
