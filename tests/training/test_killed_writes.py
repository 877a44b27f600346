"""Kills at each system call of a write: the old or the new file is there, whole."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import CHECKPOINT, PREVIOUS, read, save_checkpoint
from utils.results.log import append_log, read_log, write_log
from utils.runtime.errors import UserError
from utils.runtime.files import remove_temporaries

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


@pytest.mark.slow
@pytest.mark.parametrize(("saved", "hard_links"), [(0, True), (1, True), (2, True), (2, False)])
def test_a_kill_at_any_system_call_leaves_a_complete_checkpoint(tmp_path, saved, hard_links):
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


@pytest.mark.slow
def test_a_kill_while_replacing_a_damaged_checkpoint_leaves_a_valid_one(tmp_path):
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


@pytest.mark.slow
def test_a_kill_at_any_system_call_leaves_the_log_with_or_without_its_new_line(tmp_path):
    before, folder = tmp_path / "before", tmp_path / "run"
    before.mkdir()
    lines = [{"epoch": epoch, "train_loss": 0.5} for epoch in range(3)]
    write_log(before, lines[:2])
    found = [read_log(folder) for _ in each_kill(before, folder, lambda: append_log(folder, lines[2]))]
    assert found[0] == lines[:2]
    assert found[-1] == lines
    assert all(log in (lines[:2], lines) for log in found)
