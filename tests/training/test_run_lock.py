"""One run per --output-dir: who holds the lock, who is refused, and what a kill leaves."""

import errno
import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from _normal import train as normal
from tests.conftest import SMALL
from tests.helpers.finished_runs import write_run
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import SCRIPTS
from utils import report
from utils.results.run_folder import read_run_folder
from utils.runtime.errors import UserError
from utils.training import run_lock
from utils.training.run_lock import LOCK, Lock
from utils.training.saver import Saver


def in_child(work: Callable[[], object]) -> int:
    """The id of a forked process that ends with exit code 0 if the work raises nothing."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ask_child(question: Callable[[], object]) -> str:
    """What another process answers, as text."""
    read, write = os.pipe()
    child = in_child(lambda: os.write(write, str(question()).encode()))
    assert exit_code(child) == 0
    os.close(write)
    with os.fdopen(read) as answer:
        return answer.read()


@contextmanager
def holder(folder: Path) -> Iterator[int]:
    """Another process that holds the folder's lock until it is killed at the end; gives its id."""
    folder.mkdir(exist_ok=True)
    read, write = os.pipe()

    def hold() -> None:
        run_lock.acquire(folder)
        os.write(write, b"held")
        signal.pause()

    child = in_child(hold)
    assert os.read(read, 4) == b"held"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def status_of(folder: Path) -> str:
    """What the report says of a run."""
    return report.describe_state(read_run_folder(folder), datetime.now().astimezone())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(image_folder, tmp_path_factory):
    """Folders of finished runs by script, and the command that makes them."""
    folders, commands = {}, {}
    for name, (script, small) in SCRIPTS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        commands[name] = [*small, "--data-path", str(image_folder), "--epochs", "1"]
        script.main([*commands[name], "--output-dir", str(folders[name])])
    return folders, commands


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("start", ["fresh", "auto", "checkpoint", "from its folder"])
def test_a_second_start_ends_with_the_holders_name(name, start, finished, monkeypatch):
    """And before it reads or changes anything."""
    folder, command = finished[0][name], finished[1][name]
    checkpoint = str(folder / "checkpoint.pth")
    flags = {"fresh": [], "auto": ["--resume", "auto"], "checkpoint": ["--resume", checkpoint]}.get(start)
    if flags is None:
        monkeypatch.chdir(folder)
        flags = ["--resume", "checkpoint.pth"]
    else:
        flags += ["--output-dir", str(folder)]
    with holder(folder) as process:
        before = contents(folder)
        monkeypatch.setattr("utils.checkpoints.checkpoint.read", lambda _: pytest.fail("a checkpoint was read"))
        with pytest.raises(UserError) as refused:
            SCRIPTS[name][0].main([*command, *flags])
        assert contents(folder) == before
        assert ask_child(lambda: run_lock.look_at(folder).held) == "True"
    assert f"another run is writing there: process {process} on {socket.gethostname()}, since 20" in str(refused.value)
    (folder / LOCK).unlink()


@pytest.mark.slow
def test_all_ranks_of_a_second_start_end_with_one_sentence(image_folder, tmp_path):
    with holder(tmp_path / "run") as process:
        flags = ("--data-path", image_folder, "--output-dir", tmp_path / "run")
        done = run_ranks("_normal/train.py", *SMALL, *flags, processes=2, check=False)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert f"process {process} on " in line
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_claimed_during_the_start_is_refused(image_folder, tmp_path, monkeypatch):
    """It did not exist when the second start looked first."""
    folder, script = tmp_path / "run", normal
    command = [*SMALL, "--data-path", str(image_folder), "--output-dir", str(folder)]
    with pytest.raises(UserError, match="another run is writing there"):
        look, held = script.models.check_batch_norm, holder(folder)
        monkeypatch.setattr(script.models, "check_batch_norm", lambda *given: (look(*given), held.__enter__()))
        try:
            script.main(command)
        finally:
            assert list(contents(folder)) == [LOCK]
            held.__exit__(None, None, None)


def test_a_live_runs_weights_can_be_tested_in_its_folder(finished, capsys):
    folder, command = finished[0]["_normal"], finished[1]["_normal"]
    weights = ["--resume", str(folder / "model_best.pth")]
    with holder(folder) as process:
        normal.main([*command[:-2], *weights, "--test-only", "--output-dir", str(folder)])
        assert (folder / "metrics.json").exists()
        assert f"Running (process {process} on" in status_of(folder)
        assert ask_child(lambda: run_lock.look_at(folder).held) == "True"
    (folder / LOCK).unlink()


def test_a_live_run_is_not_continued_in_another_folder(finished, tmp_path):
    folder, command = finished[0]["_normal"], finished[1]["_normal"]
    resumed = [*command, "--resume", str(folder / "checkpoint.pth"), "--output-dir", str(tmp_path / "other")]
    with holder(folder) as process, pytest.raises(UserError, match=rf"is still running \(process {process} on"):
        normal.main(resumed)
    assert not (tmp_path / "other").exists()
    (folder / LOCK).unlink()
    normal.main(resumed)
    assert (tmp_path / "other" / "checkpoint.pth").exists()


def test_a_killed_holder_leaves_no_lock_though_its_worker_lives(tmp_path):
    read, write = os.pipe()

    def hold_with_a_worker() -> None:
        run_lock.acquire(tmp_path)
        worker = in_child(signal.pause)
        os.write(write, str(worker).encode())
        signal.pause()

    child = in_child(hold_with_a_worker)
    worker = int(os.read(read, 20))
    try:
        assert run_lock.look_at(tmp_path).held is True
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.kill(worker, 0)  # it lives
        lock = run_lock.look_at(tmp_path)
        assert (lock.held, lock.holder.process) == (False, child)
        with run_lock.released_at_end():
            run_lock.acquire(tmp_path)
            assert run_lock.look_at(tmp_path).holder.process == os.getpid()
    finally:
        os.kill(worker, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stale", [False, True])
def test_of_starts_at_the_same_moment_one_wins(tmp_path, stale):
    """Also where others end and remove the file meanwhile: never do two hold the lock at once."""
    if stale:
        (tmp_path / LOCK).write_text('{"host": "gone", "process": 1, "time": "2026"}' + " " * 500)
    wins = tmp_path / "wins"
    wins.touch()

    def take_again_and_again() -> None:
        for _ in range(100):
            try:
                run_lock.acquire(tmp_path)
            except UserError:
                continue
            descriptor = os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL)
            with wins.open("a") as file:
                file.write("1")
            os.unlink(tmp_path / "inside")
            os.close(descriptor)
            run_lock.release()

    children = [in_child(take_again_and_again) for _ in range(6)]
    assert [exit_code(child) for child in children] == [0] * 6
    assert len(wins.read_text()) >= 100
    assert not (tmp_path / LOCK).exists()


def test_testing_the_lock_neither_takes_nor_drops_it(tmp_path):
    assert run_lock.look_at(tmp_path) == Lock(False, None)
    with run_lock.released_at_end():
        run_lock.acquire(tmp_path)
        run_lock.acquire(tmp_path)
        own = run_lock.look_at(tmp_path)
        assert own.held is True
        assert (own.holder.host, own.holder.process) == (socket.gethostname(), os.getpid())
        assert ask_child(lambda: run_lock.look_at(tmp_path).held) == "True"
    assert run_lock.look_at(tmp_path) == Lock(False, None)
    assert list(tmp_path.iterdir()) == []


def test_an_error_releases_the_lock(image_folder, tmp_path):
    command = [*SMALL, "--data-path", str(image_folder), "--epochs", "1", "--output-dir", str(tmp_path)]
    with pytest.raises(UserError, match="--num-classes 7"):
        normal.main([*command, "--num-classes", "7"])
    assert list(tmp_path.iterdir()) == []
    normal.main(command)
    assert ask_child(lambda: run_lock.look_at(tmp_path).held) == "False"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_gets_a_warning(number, tmp_path, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    folder = write_run(tmp_path / "run", tested=False)
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"status": "running"}))
    with run_lock.released_at_end():
        run_lock.acquire(folder)
        assert "its file system has no locks" in capsys.readouterr().out
        assert ask_child(lambda: run_lock.look_at(folder).held) == "None"
        run_lock._held.clear()  # as another process sees it
        assert f"Running, or killed (process {os.getpid()} on " in status_of(folder)


@pytest.mark.parametrize("kind", ["text", "link", "hard link", "fifo", "folder"])
def test_a_file_of_that_name_that_is_no_lock_is_refused_unchanged(kind, tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    other.write_text("mine")
    path = folder / LOCK
    {
        "text": lambda: path.write_text("mine"),
        "link": lambda: path.symlink_to(other),
        "hard link": lambda: path.hardlink_to(other),
        "fifo": lambda: os.mkfifo(path),
        "folder": lambda: path.mkdir(),
    }[kind]()
    with pytest.raises(UserError, match=LOCK):
        run_lock.acquire(folder)
    assert run_lock.look_at(folder).holder is None
    assert other.read_text() == "mine"
    assert path.exists()
    assert kind != "text" or path.read_text() == "mine"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"host": 1, "process": 2, "time": 3}', b"[" * 4096, b"\xff"])
def test_a_holder_whose_name_cannot_be_read_is_still_a_holder(content, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    with holder(tmp_path):
        (tmp_path / LOCK).write_bytes(content)
        assert run_lock.look_at(tmp_path) == Lock(True, None)
        with pytest.raises(UserError, match=r"unknown process|is not the lock file of a run"):
            run_lock.acquire(tmp_path)


def test_a_rank_that_lost_contact_leaves_the_status_of_the_next_start_alone(tmp_path):
    saver = Saver(tmp_path, SimpleNamespace(meters=None), origin={}, start=(), best_f1=0.0, checkpoint_steps=None)
    (tmp_path / "status.json").write_text('{"status": "running"}')
    (tmp_path / LOCK).write_text(json.dumps({"host": "here", "process": 1, "time": "2026"}))
    saver.lock_holder = run_lock.look_at(tmp_path).holder
    assert saver._is_running()
    with holder(tmp_path):
        assert not saver._is_running()


@pytest.mark.parametrize("told", ["running", "finished", None])
def test_the_lock_decides_whether_a_run_is_running(told, tmp_path):
    folder = write_run(tmp_path / "run", tested=False)
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"status": told}))
    with holder(folder) as process:
        assert f"Running (process {process} on {socket.gethostname()}, since 20" in status_of(folder)
    said = status_of(folder)
    assert "Running" not in said
    assert (f"Killed (process {process} on {socket.gethostname()}" in said) == (told == "running")
