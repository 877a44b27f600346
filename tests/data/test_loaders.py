"""Loader workers that are killed, stopped or refused: one sentence, and no process left behind."""

import errno
import multiprocessing
import os
import signal
import time
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from _normal import train as normal
from tests.conftest import SMALL
from tests.helpers.runs import assert_same
from utils.audit.images import measure_all
from utils.checkpoints import checkpoint
from utils.data import dataset, loaders
from utils.data.folders import ImageFiles
from utils.data.loaders import in_shared_memory, loaded
from utils.data.samplers import TrainingSampler
from utils.runtime import node_limits
from utils.runtime.errors import UserError
from utils.runtime.node_limits import explain, shared_memory_problem
from utils.runtime.processes import EXIT_CODE, run_script
from utils.runtime.signals import EXIT_CODE as INTERRUPTED
from utils.runtime.signals import ride_out_signals, wait_for


def send_oneself(number):
    os.kill(os.getpid(), number)


class Acting(Dataset):
    """Ten items; the fourth calls `act`."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 3:
            self.act()
        return torch.tensor([index])


def acting_loader(act, workers=1):
    return DataLoader(Acting(act), num_workers=workers, persistent_workers=True, worker_init_fn=ride_out_signals)


def daemons():
    return [process for process in multiprocessing.active_children() if process.daemon]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, r"^DataLoader worker .*the node's memory is used up; give fewer --workers\.$"),
        (signal.SIGSTOP, r"^no batch came from the loader's workers within 2 seconds: .*larger --timeout\.$"),
    ],
)
def test_a_worker_that_is_killed_or_stopped_ends_in_a_sentence(number, expected):
    with pytest.raises(UserError, match=expected):
        list(loaded(acting_loader(partial(send_oneself, number)), partial(wait_for, seconds=2)))
    assert daemons() == []


def test_a_death_that_is_reported_while_another_error_is_handled_ends_in_a_sentence(monkeypatch):
    """torch's SIGCHLD handler raises at any moment, also where the broken connection to the worker is handled."""
    end, calls = loaders.end_workers, []

    def interrupted():
        calls.append(0)
        if len(calls) == 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        end()

    def break_connection(_):
        raise EOFError

    monkeypatch.setattr(loaders, "end_workers", interrupted)
    with pytest.raises(UserError, match=r"^DataLoader worker \(pid 7\) is killed by signal: Killed: it was killed"):
        list(loaded(acting_loader(int), break_connection))
    assert daemons() == []


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_a_refused_fork_ends_in_a_sentence_and_leaves_no_worker(code, monkeypatch, capfd):
    fork, forks = os.fork, []

    def refuse_the_second():
        forks.append(0)
        if len(forks) == 2:
            raise OSError(code, os.strerror(code))
        return fork()

    monkeypatch.setattr(os, "fork", refuse_the_second)
    expected = "too many open files" if code == errno.EMFILE else rf"refuses to start another .*{os.strerror(code)}"
    with pytest.raises(UserError, match=expected):
        list(loaded(acting_loader(int, workers=2)))
    assert daemons() == []
    assert "Exception ignored" not in capfd.readouterr().err


def test_a_bug_is_not_turned_into_a_sentence():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as caught:
        list(loaded(acting_loader(fail)))
    assert not isinstance(caught.value, UserError)
    assert explain(KeyError("x")) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "/dev/shm is full (3 MB free)"),
        ("unable to allocate shared memory(shm) for file </t>: No space left on device (28)", "--shm-size"),
        ("unable to open shared memory object </t> in read-write mode: Too many open files (24)", "ulimit -n"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("can't start new thread", "refuses to start another process or thread (can't start new thread)"),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", "--workers 0"),
    ],
)
def test_errors_of_torch_become_advice(text, expected, monkeypatch):
    monkeypatch.setattr(node_limits, "free_shared_memory", lambda: 3_000_000)
    assert expected in explain(RuntimeError(text))
    nested = RuntimeError("over it")
    nested.__context__ = RuntimeError(text)
    assert explain(nested) == explain(RuntimeError(text))


# Shared memory


@pytest.mark.parametrize(
    ("free", "workers", "processes", "fitting"),
    [
        (64, 16, 1, 5),  # 33 batches of 5 MB; 11 fit
        (64, 2, 4, 1),  # 4 x 5 batches
        (9, 1, 1, 0),
    ],
)
def test_workers_that_exceed_shared_memory_get_a_number_that_fits(free, workers, processes, fitting, monkeypatch):
    monkeypatch.setattr(node_limits, "free_shared_memory", lambda: free * 1_000_000)
    problem = shared_memory_problem(5_000_000, 100, workers, processes)
    assert f"has {free} MB free" in problem
    assert f"{processes * (2 * workers + 1) * 5} MB of batches" in problem
    assert f"give --workers {fitting}, or" in problem
    assert shared_memory_problem(5_000_000, 100, fitting, processes) is None


@pytest.mark.parametrize(
    ("free", "batches", "workers"),
    [
        (165_000_000, 100, 16),
        (60_000_000, 11, 16),  # an epoch of 11 batches: at most 12
        (0, 100, 0),  # without workers nothing is shared
        (None, 100, 16),  # no limit
    ],
)
def test_workers_that_fit_shared_memory_are_accepted(free, batches, workers, monkeypatch):
    monkeypatch.setattr(node_limits, "free_shared_memory", lambda: free)
    assert shared_memory_problem(5_000_000, batches, workers, processes=1) is None


def run_to_its_end(arguments, capfd):
    """Run the script in this process; returns its exit code and its errors on stderr."""
    with pytest.raises(SystemExit) as exit_:
        run_script(lambda: normal.main(list(map(str, arguments))))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return exit_.value.code, *lines


@pytest.mark.parametrize("cache", [(), ("--cache-dataset", "host", "--cache-dir")])
def test_too_little_shared_memory_is_refused_at_the_start(image_folder, tmp_path, capfd, monkeypatch, cache):
    # Batches of 8 images of 3 x 32 x 32 bytes, at most 4 of them; the cache's of 16 images of 3 x 36 x 36.
    monkeypatch.setattr(node_limits, "free_shared_memory", lambda: 125_000 if cache else 80_000)
    folder = tmp_path / "run"
    cache = (*cache, tmp_path / "cache") if cache else ()
    flags = (*SMALL, "--workers", 2, "--data-path", image_folder, "--output-dir", folder, "--epochs", 1, *cache)
    code, error = run_to_its_end(flags, capfd)
    assert code == EXIT_CODE
    assert "/dev/shm has 0 MB free" in error
    assert not list(tmp_path.glob("run/*.pth"))
    assert ("to be built" in error) == bool(cache)


def test_a_batch_without_room_in_shared_memory_is_an_error(monkeypatch):
    def refuse(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    collate = lambda items: in_shared_memory(tuple(items))  # noqa: E731
    loader = DataLoader(Acting(int), batch_sampler=[[0], [1]], num_workers=1, collate_fn=collate)
    with pytest.raises(UserError, match=r"/dev/shm is full"):
        list(loaded(loader))


# The scripts and commands


def test_a_run_names_the_worker_that_was_killed(image_folder, tmp_path, capfd, monkeypatch):
    read = dataset.read_image

    def die_in_a_worker(*arguments, **also):
        if get_worker_info() is not None:
            send_oneself(signal.SIGKILL)
        return read(*arguments, **also)

    monkeypatch.setattr(dataset, "read_image", die_in_a_worker)
    flags = (*SMALL, "--workers", 1, "--data-path", image_folder, "--output-dir", tmp_path, "--epochs", 1)
    code, error = run_to_its_end(flags, capfd)
    assert code == EXIT_CODE
    assert "error: DataLoader worker " in error
    assert daemons() == []


def test_the_audit_names_the_worker_that_was_killed(image_folder, monkeypatch):
    monkeypatch.setattr("utils.audit.images.measure", lambda *_: send_oneself(signal.SIGKILL))
    with pytest.raises(UserError, match=r"val: DataLoader worker .*give fewer --workers"):
        measure_all(ImageFiles.find(image_folder / "val"), workers=1)


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = (*SMALL, "--batch-size", 6, "--data-path", image_folder, "--epochs", 2, "--output-dir", folder)
    normal.main(list(map(str, flags)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("epoch_of_stop", [0, 1])
def test_a_signal_during_a_wait_saves_the_last_step(
    epoch_of_stop, undisturbed, image_folder, tmp_path, capfd, monkeypatch
):
    """A worker stops within an epoch. The resumed run equals an undisturbed one."""
    common = (*SMALL, "--batch-size", 6, "--data-path", image_folder, "--epochs", 2, "--timeout", 60)
    item = dataset.ImageFolder.__getitem__

    def stop_at_the_third_step(split, key):
        if get_worker_info() is not None and key.epoch == epoch_of_stop and key.index == third[0]:
            time.sleep(0.5)  # until the training process waits for this batch
            os.kill(os.getppid(), signal.SIGTERM)
            send_oneself(signal.SIGSTOP)
        return item(split, key)

    sampler = TrainingSampler(36, 6)
    sampler.set_position(epoch_of_stop)
    third = [list(sampler)[2][0].index]
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(dataset.ImageFolder, "__getitem__", stop_at_the_third_step)
        result = run_to_its_end((*common, "--workers", 1, "--output-dir", folder), capfd)
    assert result == (INTERRUPTED,)
    state = checkpoint.read(folder / checkpoint.CHECKPOINT)
    assert (state["epoch"], state["step"]) == (epoch_of_stop, 2)
    assert daemons() == []
    normal.main(list(map(str, (*common, "--output-dir", folder, "--resume", "auto"))))
    assert_same(checkpoint.read(undisturbed / "model_1.pth")["model"], checkpoint.read(folder / "model_1.pth")["model"])
