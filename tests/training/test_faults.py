"""Faults on purpose: kills at any moment, a full disk, lost and hanging ranks, signals. Nothing is lost by any of them.

benchmarks/soak.py is the long form of the first of them.
"""

import fcntl
import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _policy_gradient import train as policy_gradient
from benchmarks import soak
from benchmarks.soak import Aim, Life, Tally, positions, survive, temporary_files, watch
from tests.conftest import ROOT, SMALL_POLICY, write_image_folder
from tests.helpers.disks import full_disk
from tests.helpers.ranks import PATIENCE, start_ranks
from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import CHECKPOINT, PREVIOUS, read, save_checkpoint
from utils.data.samplers import SampleKey, TrainingSampler
from utils.results.log import append_log, read_log, write_log
from utils.runtime.errors import UserError
from utils.runtime.files import remove_temporaries
from utils.runtime.processes import EXIT_CODE, run_script

STEPS, EPOCHS, CHECKPOINT_STEPS = 9, 2, 3  # steps of an epoch: 36 images, 2 in each of two processes
FLAGS = ("--batch-size", 2, "--epochs", EPOCHS)
AGAIN = (*FLAGS, "--resume", "auto", "--checkpoint-steps", CHECKPOINT_STEPS)


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


class WarmLife(Life):
    """A run of two processes without torchrun."""

    def __init__(self, command: list[str], output: Path) -> None:
        self.output = output
        arguments = command[command.index(str(ROOT / soak.SCRIPT / "train.py")) + 1 :]
        self.ranks = start_ranks(f"{soak.SCRIPT}/train.py", arguments, 2, output, output)

    def has_ended(self) -> bool:
        return all(rank.exitcode is not None for rank in self.ranks)

    def kill(self) -> None:
        soak.kill_families({rank.pid for rank in self.ranks if rank.exitcode is None})

    def exit_code(self) -> int:
        for rank in self.ranks:
            rank.join(PATIENCE)
        return max(abs(rank.exitcode) for rank in self.ranks)


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
    assert tally.files == EPOCHS + 3  # weights of each epoch and of the best, checkpoint, log
    assert status(folder)["status"] == "finished"


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


def rank_1(life: Life) -> int:
    """The process id of a torchrun's second worker."""
    for pid in soak.families({life.process.pid}):
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError("rank 1 is not there")


@pytest.mark.slow
def test_torchrun_brings_all_back_after_a_rank_was_killed(whole, tmp_path):
    folder = tmp_path / "run"
    command = soak.command(whole.data, folder, 2, *AGAIN, "--workers", 0)
    command.insert(command.index("torch.distributed.run") + 1, "--max-restarts=2")
    life = Life(command, tmp_path / "output.txt")
    try:
        assert watch(life, folder, Aim(steps=STEPS + CHECKPOINT_STEPS + 2)), life.output.read_text()
        os.kill(rank_1(life), signal.SIGKILL)
        assert life.process.wait(PATIENCE) == 0, life.output.read_text()
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
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_torchrun_saves_a_checkpoint_within_the_epoch(whole, tmp_path, number):
    folder = tmp_path / "run"
    command = soak.command(whole.data, folder, 2, *AGAIN, "--workers", 1)
    life = Life(command, tmp_path / "torchrun.txt")
    try:
        assert watch(life, folder, Aim(steps=STEPS + 2)), life.output.read_text()
        life.process.send_signal(number)
        assert life.process.wait(PATIENCE) != 0
    finally:
        life.kill()
    done = life.steps()[-1] + 1
    found = status(folder)
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
def test_no_rank_waits_for_ever_for_another(whole, tmp_path, fault):
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
    assert status(folder)["status"] == "failed"
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


def test_a_disk_that_is_full_at_the_start_is_told_of_before_the_first_step(image_folder, tmp_path, capsys):
    folder = tmp_path / "run"
    with full_disk(1_000_000):
        arguments = [*SMALL_POLICY, "--data-path", image_folder, "--output-dir", folder, "--epochs", 2]
        said = run_to_its_error(list(map(str, arguments)), capsys)
    assert said.startswith(f"error: {folder}")
    assert "cannot be written" in said
    assert "(File too large)" in said
    assert not list(folder.glob("*.pth"))
    assert not temporary_files(folder)
    assert status(folder)["status"] == "failed"
    assert status(folder)["message"] in said
    assert (status(folder)["epoch"], status(folder)["step"]) == (0, 0)


def test_a_disk_that_fills_up_harms_no_checkpoint(image_folder, tmp_path, capsys, monkeypatch):
    """The writes of 2 epochs of 4 steps: checkpoint, checkpoint, weights, best weights, checkpoint, checkpoint, ..."""

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
    for write, position in ((3, (0, 4)), (6, (1, 0))):
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
        assert status(part)["status"] == "failed"
        assert status(part)["message"] in said
        policy_gradient.main(arguments(part, "--resume", "auto"))  # there is room again
        tally = Tally()
        tally.compare(whole, part)
        assert tally.differences == []


# A kill at each system call of a write


SYSTEM_CALLS = ("open", "fsync", "close", "replace", "rename", "link", "unlink", "sendfile")
KILLED = 9


def die_at(moment: int) -> None:
    """Let this process die at its moment-th chance: before and after each system call on files, and within writes."""
    chances, real_write = itertools.count(), os.write

    def chance(last_wish: Callable[[], object] = lambda: None) -> None:
        if next(chances) == moment:
            last_wish()
            os._exit(KILLED)

    def wrap(call: Callable) -> Callable:
        def wrapped(*arguments, **keywords):
            chance()
            result = call(*arguments, **keywords)
            chance()
            return result

        return wrapped

    def write(descriptor: int, data: memoryview) -> int:
        for size in (0, 1, len(data) // 2, len(data) - 1):
            chance(lambda size=size: real_write(descriptor, data[:size]))
        return real_write(descriptor, data)

    for name in SYSTEM_CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    os.write = write


def is_killed(moment: int, write: Callable[[], None]) -> bool:
    """Write in a child that dies at this moment; False if it ended before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            die_at(moment)
            write()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def each_kill(before: Path, folder: Path, write: Callable[[], None]) -> Iterator[int]:
    """Write into a copy of `before` again and again, killed at each moment in turn, at last to the end.

    Gives the moment, with the folder as it was left.
    """
    killed, moment = True, 0
    while killed:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        killed = is_killed(moment, write)
        yield moment
        moment += 1
    assert moment > 10


def state_of_epoch(epoch: int) -> dict:
    return {"epoch": epoch, "weights": torch.full((100,), float(epoch))}


def epochs_of(folder: Path) -> dict[str, int]:
    """The epoch of each checkpoint that is there; raises UserError for a damaged one."""
    return {name: read(folder / name)["epoch"] for name in (CHECKPOINT, PREVIOUS) if (folder / name).exists()}


def without_hard_links(write: Callable[[], None]) -> None:
    def refuse(*_: object) -> None:
        raise OSError

    os.link = refuse
    write()


@pytest.mark.parametrize(("saved", "hard_links"), [(0, True), (1, True), (2, True), (2, False)])
def test_a_kill_at_any_system_call_of_a_save_leaves_the_old_or_the_new_checkpoint(tmp_path, saved, hard_links):
    before, folder = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    for epoch in range(saved):
        save_checkpoint(before, state_of_epoch(epoch))
    old = max(epochs_of(before).values(), default=None)

    def save() -> None:
        save_checkpoint(folder, state_of_epoch(saved))

    for _ in each_kill(before, folder, save if hard_links else lambda: without_hard_links(save)):
        found = epochs_of(folder)
        newest = max(found.values(), default=None)
        assert newest in (old, saved)
        assert found.get(CHECKPOINT) == newest
        if old is not None:
            assert min(found.values()) >= old - 1
        remove_temporaries(folder)
        save_checkpoint(folder, state_of_epoch(9))
        assert epochs_of(folder) == {CHECKPOINT: 9} | ({} if newest is None else {PREVIOUS: newest})
        assert {path.name for path in folder.iterdir()} == epochs_of(folder).keys()
    assert newest == saved


def test_a_kill_at_any_system_call_after_a_damage_leaves_the_valid_checkpoint_or_the_new_one(tmp_path):
    before, folder = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    for epoch in range(2):
        save_checkpoint(before, state_of_epoch(epoch))
    os.truncate(before / CHECKPOINT, 100)

    def go_on() -> None:
        checkpoint.replace_damaged(folder, "_normal")
        save_checkpoint(folder, state_of_epoch(1))

    for _ in each_kill(before, folder, go_on):
        valid = []
        for name in (CHECKPOINT, PREVIOUS):
            with suppress(UserError):
                valid.append(read(folder / name)["epoch"])
        assert max(valid) in (0, 1)
    assert epochs_of(folder) == {CHECKPOINT: 1, PREVIOUS: 0}


def test_a_kill_at_any_system_call_leaves_the_log_with_or_without_its_new_line(tmp_path):
    before, folder = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    lines = [{"epoch": epoch, "train_loss": 0.5} for epoch in range(3)]
    write_log(before, lines[:2])
    found = [read_log(folder) for _ in each_kill(before, folder, lambda: append_log(folder, lines[2]))]
    assert found[0] == lines[:2]
    assert found[-1] == lines
    assert all(log in (lines[:2], lines) for log in found)


# The sampler's position, taken over by other numbers of processes


@settings(deadline=None)
@given(
    st.integers(60, 200),
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 10), st.integers(0, 20)), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(0, 2**32),
    st.integers(0, 100),
)
def test_a_position_goes_over_to_any_number_of_processes(num_images, batch_size, starts, repeats, seed, epoch):
    """starts: (world size, steps until the next start). No image of the epoch's order is lost, none comes twice."""
    whole = TrainingSampler(num_images, 1, seed=seed, repeats=repeats)
    whole.set_position(epoch)
    order = [key for [key] in whole]  # of the whole epoch
    assert len(order) == len(set(order)) == num_images
    seen: list[SampleKey] = []
    first_step = 0
    for world_size, steps in starts:
        samplers = [
            TrainingSampler(num_images, batch_size, rank, world_size, seed, repeats) for rank in range(world_size)
        ]
        for sampler in samplers:
            sampler.set_position(epoch, first_step, first_image=len(seen))
        shares = [list(sampler) for sampler in samplers]
        global_batch = world_size * batch_size
        left = (num_images - len(seen)) // global_batch
        assert [len(share) for share in shares] == [len(sampler) for sampler in samplers] == [left] * world_size
        assert {sampler.steps_per_epoch for sampler in samplers} == {first_step + left}
        for rank, share in enumerate(shares):
            tail = order[len(seen) :][: left * global_batch]
            assert [key for batch in share for key in batch] == tail[rank::world_size]
            assert all(len(batch) == batch_size for batch in share)
        steps = min(steps, left)
        seen += order[len(seen) :][: steps * global_batch]
        first_step += steps
        assert {sampler.images_before(first_step) for sampler in samplers} == {len(seen)}


@settings(deadline=None)
@given(st.integers(24, 100), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.data())
def test_a_position_without_images_is_that_of_the_same_number_of_processes(num_images, batch_size, world, rank, data):
    samplers = [TrainingSampler(num_images, batch_size, rank % world, world) for _ in range(2)]
    step = data.draw(st.integers(0, samplers[0].steps_per_epoch))
    samplers[0].set_position(3, step)
    samplers[1].set_position(3, step, step * batch_size * world)
    assert list(samplers[0]) == list(samplers[1])
    for sampler in samplers:  # and a new epoch begins at its beginning
        sampler.set_position(4)
        assert len(sampler) == sampler.steps_per_epoch == num_images // (batch_size * world)
    assert list(samplers[0]) == list(samplers[1])
