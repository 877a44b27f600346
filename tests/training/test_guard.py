"""What ranks agree on at each step: losses that are not finite, and signals that ask for a stop."""

import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from utils.runtime import signals
from utils.runtime.signals import SIGNALS, StopRequest
from utils.training.update import NonFiniteLoss, StepGuard

CPU = torch.device("cpu")


def make_guard(stop=None):
    return StepGuard(CPU, lambda index: Path(f"image_{index}.png"), stop or StopRequest())


def test_guard_names_the_epoch_and_the_first_bad_step_with_its_images():
    guard = make_guard()
    found = [
        guard.check(torch.tensor(value), step, torch.tensor([step, 9])).item()
        for step, value in enumerate((1.0, -3e38, 0.0))
    ]
    assert found == [False] * 3
    guard.raise_if_non_finite(7)
    for step, value in ((3, math.inf), (4, 1.0), (5, math.nan)):
        assert guard.check(torch.tensor(value), step, torch.tensor([step, 8])).item() is not math.isfinite(value)
    with pytest.raises(NonFiniteLoss, match=r"not finite at epoch 7, step 3;") as caught:
        guard.raise_if_non_finite(7)
    assert caught.value.agreed
    assert caught.value.batch == [{"rank": 0, "loss_is_finite": False, "images": ["image_3.png", "image_8.png"]}]


def test_guard_sees_a_bad_step_0():
    guard = make_guard()
    guard.check(torch.tensor(math.nan), 0, torch.tensor([0]))
    with pytest.raises(NonFiniteLoss, match=r"epoch 2, step 0;"):
        guard.raise_if_non_finite(2)


def test_guard_remembers_no_more_batches_than_since_it_was_last_asked():
    guard = make_guard()
    for step in range(10):
        guard.check(torch.tensor(1.0), step, torch.tensor([0]))
    assert len(guard.recent) == 10
    guard.raise_if_non_finite(0)
    assert not guard.recent


@pytest.fixture(autouse=True)
def hangup_is_not_ignored():
    """As without nohup, under which the tests may run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_agreed_on_at_the_end_of_its_step(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        guard = make_guard(stop)
        guard.check(torch.tensor(1.0), 0, torch.tensor([0]))
        assert not guard.stop_agreed()
        os.kill(os.getpid(), number)
        guard.check(torch.tensor(1.0), 1, torch.tensor([0]))
        assert guard.stop_agreed()
        assert stop.asked == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.asked is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked == "SIGUSR1"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_on_a_device_that_runs_behind_the_stop_is_read_two_steps_later():
    """As on CUDA, where the host must not wait for the step that it has only just queued."""
    with StopRequest() as stop:
        guard = make_guard(stop)
        guard.lag = 2
        read = []
        for step in range(6):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            guard.check(torch.tensor(1.0), step, torch.tensor([0]))
            read.append(guard.stop_agreed())
    assert read == [False, False, False, True, True, True]


@pytest.fixture
def worker():
    """A process that rides out signals, as a loader worker does, with a pipe to it; it ends once the pipe is used."""
    context = multiprocessing.get_context("fork")
    pipe, own_end = context.Pipe()

    def work():
        pipe.close()
        signals.ride_out_signals(0)
        own_end.send("ready")
        own_end.send(own_end.recv())

    process = context.Process(target=work)
    process.start()
    own_end.close()
    yield process, pipe
    process.kill()
    process.join()


def test_a_loader_worker_survives_every_signal_sent_twice(worker):
    process, pipe = worker
    assert pipe.recv() == "ready"
    for number in SIGNALS * 2:
        os.kill(process.pid, number)
        time.sleep(0.02)
    pipe.send("still there")
    assert pipe.recv() == "still there"
    process.join()
    assert process.exitcode == 0


def test_a_loader_worker_that_nobody_ends_ends_by_itself(monkeypatch, request):
    monkeypatch.setattr(signals, "WORKER_SECONDS", 1)
    process, pipe = request.getfixturevalue("worker")
    assert pipe.recv() == "ready"
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == -signal.SIGALRM
