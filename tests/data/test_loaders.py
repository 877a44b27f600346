"""Loader workers that are killed, stopped or refused end in a sentence, and leave no process behind."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from _normal import train as normal
from tests.conftest import SMALL
from utils.audit.images import measure_all
from utils.checkpoints import checkpoint
from utils.data import cache_build
from utils.data import dataset as data
from utils.data.cache_build import CacheBuild
from utils.data.folders import ImageFiles
from utils.data.loaders import in_shared_memory, loaded
from utils.data.samplers import TrainingSampler
from utils.runtime import node_limits
from utils.runtime.errors import UserError
from utils.runtime.node_limits import explain, shared_memory_problem
from utils.runtime.processes import EXIT_CODE, run_script
from utils.runtime.signals import EXIT_CODE as INTERRUPTED
from utils.runtime.signals import ride_out_signals, wait_for

CPU = torch.device("cpu")


def in_worker(act):
    """A replacement of read_image that acts in a loader worker, and reads in the training process."""
    read = data.read_image

    def read_or_act(path, *how):
        if get_worker_info() is not None:
            act()
        return read(path, *how)

    return read_or_act


def send_oneself(number):
    os.kill(os.getpid(), number)


class Acting(Dataset):
    """Ten items; the fourth is fetched by `act`."""

    def __init__(self, act):
        self.act = act

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 3:
            self.act()
        return torch.tensor([index])


def acting_loader(act, workers=1):
    return DataLoader(
        Acting(act),
        num_workers=workers,
        persistent_workers=True,
        worker_init_fn=ride_out_signals,
    )


def daemons():
    return [process for process in multiprocessing.active_children() if process.daemon]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, r"^DataLoader worker .*the node's memory is used up; give fewer --workers\.$"),
        (signal.SIGSTOP, r"^no batch came from the loader's workers within 5 seconds: .*larger --timeout\.$"),
    ],
)
def test_a_worker_that_is_killed_or_stopped_ends_in_a_sentence(number, expected):
    with pytest.raises(UserError, match=expected):
        list(loaded(acting_loader(partial(send_oneself, number)), partial(wait_for, seconds=5)))
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


def test_a_refused_thread_ends_in_a_sentence(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    loader = acting_loader(int)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(UserError, match=r"refuses to start another process or thread \(can't start new thread\)"):
        list(loaded(loader))


def test_an_error_of_the_program_itself_is_not_turned_into_a_sentence():
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
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", "--workers 0"),
    ],
)
def test_torchs_own_words_become_advice(text, expected, monkeypatch):
    monkeypatch.setattr(node_limits, "free_shared_memory", lambda: 3_000_000)
    assert expected in explain(RuntimeError(text))
    nested = RuntimeError("over it")
    nested.__context__ = RuntimeError(text)
    assert explain(nested) == explain(RuntimeError(text))


# Shared memory


@pytest.mark.parametrize(
    ("free", "batches", "workers", "processes", "fitting"),
    [
        (64, 100, 16, 1, 5),  # 33 batches of 5 MB; 11 fit
        (165, 100, 16, 1, None),
        (164, 100, 16, 1, 15),
        (64, 11, 16, 1, None),  # an epoch of 11 batches: 12 at most
        (64, 100, 2, 4, 1),  # 4 x 5 batches
        (9, 100, 1, 1, 0),
        (0, 100, 0, 1, None),  # without workers nothing is shared
        (None, 100, 16, 1, None),  # no limit
    ],
)
def test_the_workers_that_fit_shared_memory(free, batches, workers, processes, fitting, monkeypatch):
    free = None if free is None else free * 1_000_000 if batches != 11 else 60_000_000
    monkeypatch.setattr(node_limits, "free_shared_memory", lambda: free)
    problem = shared_memory_problem(5_000_000, batches, workers, processes)
    if fitting is None:
        assert problem is None
    else:
        assert f"has {free / 1e6:.0f} MB free" in problem
        assert f"{processes * (2 * workers + 1) * 5} MB of batches" in problem
        assert f"give --workers {fitting}, or" in problem
        assert shared_memory_problem(5_000_000, batches, fitting, processes) is None


def run_to_its_end(arguments, capfd):
    """Run the script in this process; returns its exit code and its sentence on stderr, if there is one."""
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
    code, said = run_to_its_end(flags, capfd)
    assert code == EXIT_CODE
    assert "/dev/shm has 0 MB free" in said
    assert not list(tmp_path.glob("run/*.pth"))
    assert ("to be built" in said) == bool(cache)


def test_a_batch_that_shared_memory_cannot_take_ends_at_once(monkeypatch):
    def refuse(_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    collate = lambda items: in_shared_memory(tuple(items))  # noqa: E731
    loader = DataLoader(Acting(int), batch_sampler=[[0], [1]], num_workers=1, collate_fn=collate)
    with pytest.raises(UserError, match=r"/dev/shm is full"):
        list(loaded(loader))


# The scripts and commands


def test_a_run_names_the_worker_that_was_killed(image_folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(data, "read_image", in_worker(partial(send_oneself, signal.SIGKILL)))
    flags = (*SMALL, "--workers", 1, "--data-path", image_folder, "--output-dir", tmp_path, "--epochs", 1)
    code, said = run_to_its_end(flags, capfd)
    assert code == EXIT_CODE
    assert "error: DataLoader worker " in said
    assert daemons() == []


def test_the_audit_names_the_worker_that_was_killed(image_folder, monkeypatch):
    monkeypatch.setattr("utils.audit.images.measure", lambda *_: send_oneself(signal.SIGKILL))
    with pytest.raises(UserError, match=r"val: DataLoader worker .*give fewer --workers"):
        measure_all(ImageFiles.find(image_folder / "val"), workers=1)


@pytest.mark.parametrize("epoch_of_stop", [0, 1])
def test_a_signal_during_a_wait_saves_the_last_step(image_folder, tmp_path, capfd, monkeypatch, epoch_of_stop):
    """A worker that stops in the middle of an epoch; the run resumed from the checkpoint equals one undisturbed."""
    common = (*SMALL, "--batch-size", 6, "--data-path", image_folder, "--epochs", 2, "--timeout", 60)
    normal.main(list(map(str, (*common, "--output-dir", tmp_path / "whole"))))
    item = data.ImageFolder.__getitem__

    def stop_at_the_third_step(split, key):
        if get_worker_info() is not None and key.epoch == epoch_of_stop and key.index == third[0]:
            time.sleep(1)  # until the training process waits for this batch
            os.kill(os.getppid(), signal.SIGTERM)
            send_oneself(signal.SIGSTOP)
        return item(split, key)

    sampler = TrainingSampler(36, 6)
    sampler.set_position(epoch_of_stop)
    third = [list(sampler)[2][0].index]
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(data.ImageFolder, "__getitem__", stop_at_the_third_step)
        code, *said = run_to_its_end((*common, "--workers", 1, "--output-dir", folder), capfd)
    assert (code, said) == (INTERRUPTED, [])
    state = checkpoint.read(folder / checkpoint.CHECKPOINT)
    assert (state["epoch"], state["step"]) == (epoch_of_stop, 2)
    assert daemons() == []
    normal.main(list(map(str, (*common, "--output-dir", folder, "--resume", "auto"))))
    whole, again = (checkpoint.read(path / "model_1.pth")["model"] for path in (tmp_path / "whole", folder))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


# A cache that another process builds


class Clock:
    """Time that passes only by `sleep`, which does more besides."""

    def __init__(self, at_sleep):
        self.now, self.at_sleep = 0.0, at_sleep  # 0.001 seconds pass by a look at it

    def monotonic(self):
        self.now += 0.001
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.at_sleep(self)


def build_beside_another(folder, cache_dir, monkeypatch, at_sleep):
    """A build (timeout 100 s) of a locked folder: messages, build, clock. at_sleep: gets clock, build and lock."""
    build = CacheBuild(
        cache_dir,
        ImageFiles.find(folder / "val"),
        lambda image: torch.zeros(1, 2, 2, dtype=torch.uint8),
        gray=True,
        parameters={},
        max_bad_images=None,
        workers=0,
        timeout=100,
    )
    build.folder.mkdir(parents=True)
    with open(build.folder / "lock", "a+") as lock:
        assert cache_build._acquire(lock)
        cache_build._name_holder(lock)
        clock = Clock(lambda clock: at_sleep(clock, build, lock))
        monkeypatch.setattr(cache_build, "time", clock)
        return list(build.build()), build, clock


def test_a_builder_that_makes_no_progress_is_named(image_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=rf"val-\w+: process {os.getpid()} on .*added nothing for 90 seconds"):
        build_beside_another(image_folder, tmp_path, monkeypatch, lambda *_: None)


def test_a_builder_that_makes_progress_is_waited_for(image_folder, tmp_path, monkeypatch):
    def go_on(clock, build, lock):
        with open(build.folder / cache_build.SIZES, "ab") as sizes:
            sizes.write(b"\0" * 8 * (int(clock.now) // 2 % 40 == 0))
        if clock.now >= 500:
            lock.close()

    said, build, clock = build_beside_another(image_folder, tmp_path, monkeypatch, go_on)
    assert clock.now >= 500
    assert build.is_whole()
    assert said[0].endswith("another process builds this cache; waiting for it.")
