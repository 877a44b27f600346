"""One training step: losses that are not finite, signals, clipping, fp16, and the state of the optimisers."""

import io
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.runs import assert_same
from tests.helpers.updates import CPU, batch_loss, guarded_update, optimizer_tensors, plain_update, small_network
from utils.choices import OPTIMIZERS
from utils.runtime import signals
from utils.runtime.errors import UserError
from utils.runtime.signals import SIGNALS, StopRequest
from utils.training.optim import build_optimizer
from utils.training.update import SMALLEST_SCALE, GuardedUpdate, NonFiniteLoss, StepGuard

STEP_FREELY, INDICES = torch.tensor(False), torch.tensor([0])


def make_guard(stop=None):
    return StepGuard(CPU, lambda index: Path(f"image_{index}.png"), stop or StopRequest())


def zeros(size=2):
    return nn.Parameter(torch.zeros(size))


def dot(parameter, *values):
    return (parameter * torch.tensor(values)).sum()


# --- Losses that are not finite


def test_the_guard_names_the_epoch_and_the_images_of_the_first_bad_step():
    guard = make_guard()
    for step, value in enumerate((1.0, -3e38, 0.0)):
        non_finite, _ = guard.exchange(torch.tensor(value), step, torch.tensor([step, 9]))
        assert not non_finite
    guard.raise_if_non_finite(7)
    for step, value in ((3, math.inf), (4, 1.0), (5, math.nan)):
        non_finite, _ = guard.exchange(torch.tensor(value), step, torch.tensor([step, 8]))
        assert non_finite.item() is not math.isfinite(value)
    with pytest.raises(NonFiniteLoss, match=r"not finite at epoch 7, step 3;") as caught:
        guard.raise_if_non_finite(7)
    assert caught.value.agreed
    assert caught.value.batch == [{"rank": 0, "loss_is_finite": False, "images": ["image_3.png", "image_8.png"]}]


def test_the_guard_sees_a_bad_step_0():
    guard = make_guard()
    guard.exchange(torch.tensor(math.nan), 0, INDICES)
    with pytest.raises(NonFiniteLoss, match=r"epoch 2, step 0;"):
        guard.raise_if_non_finite(2)


def test_the_guard_forgets_batches_once_they_are_known_to_be_good():
    guard = make_guard()
    for step in range(10):
        guard.exchange(torch.tensor(1.0), step, INDICES)
    assert len(guard.recent) == 10
    guard.raise_if_non_finite(0)
    assert not guard.recent


@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])
@pytest.mark.parametrize("bad_value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_that_is_not_finite_changes_nothing(name, bad_step, bad_value, clip_grad_norm):
    network, undisturbed = small_network().eval(), small_network().eval()
    update = guarded_update(network, name, clip_grad_norm=clip_grad_norm)
    undisturbed_update = guarded_update(undisturbed, name, clip_grad_norm=clip_grad_norm)
    guard = make_guard()
    for step in range(6):
        loss = batch_loss(network, step)
        if step != bad_step:
            update(loss, guard.exchange(loss, step, INDICES)[0])
            undisturbed_update(batch_loss(undisturbed, step), STEP_FREELY)
            continue
        loss = loss * bad_value
        before = optimizer_tensors(update)
        non_finite, _ = guard.exchange(loss, step, INDICES)
        assert non_finite.item() is True
        update(loss, non_finite)
        for key, value in optimizer_tensors(update).items():  # buffers that did not exist yet are as good as new
            assert torch.equal(value, before.get(key, torch.zeros_like(value))), key
    assert_same(optimizer_tensors(update), optimizer_tensors(undisturbed_update))
    assert not torch.equal(network[0].weight, small_network()[0].weight)


def test_fp16_holds_back_an_infinite_loss_with_a_finite_gradient():
    """A target's logit of -inf: the scaler alone would step."""
    parameter = zeros()
    update = plain_update(parameter, fp16=True)
    loss = nn.functional.cross_entropy((parameter + torch.tensor([0.0, -math.inf]))[None], torch.tensor([1]))
    update(loss, ~loss.isfinite())
    assert parameter.grad.isfinite().all()
    assert parameter.tolist() == [0.0, 0.0]
    assert update.read_skipped() == {"skipped_steps": 1}
    update(dot(parameter, 0.5, 0.25), STEP_FREELY)
    assert parameter.tolist() == [-0.5, -0.25]


def test_clipping_holds_back_and_counts_a_gradient_that_is_not_finite():
    parameter = zeros()
    update = plain_update(parameter, momentum=0.9, clip_grad_norm=1.0)
    update(parameter.sqrt().sum(), STEP_FREELY)  # the root's slope at 0 is infinite
    assert parameter.tolist() == [0.0, 0.0]
    assert update.read_skipped() == {"skipped_steps": 1}
    update(dot(parameter, 0.6, 0.8), STEP_FREELY)
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.6, -0.8]))
    assert update.read_skipped() == {"skipped_steps": 1}  # since the run began


# --- Clipping


@pytest.mark.parametrize(("limit", "factors"), [(None, (1, 1)), (1.0, (0.2, 1)), (0.1, (0.02, 0.2))])
def test_each_network_is_clipped_by_itself(limit, factors):
    large, small = zeros(), zeros()
    plain_update(large, small, clip_grad_norm=limit)(dot(large, 3.0, 4.0) + dot(small, 0.3, 0.4), STEP_FREELY)
    torch.testing.assert_close(large.detach(), -factors[0] * torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(small.detach(), -factors[1] * torch.tensor([0.3, 0.4]))


def test_the_clipped_norm_is_over_all_groups_of_a_network():
    parameters = [zeros(1), zeros(1)]
    groups = [{"params": [parameter], "weight_decay": 0.0} for parameter in parameters]
    update = GuardedUpdate({"one": build_optimizer("sgd", groups, 1.0, 0.0)}, CPU, clip_grad_norm=1.0)
    update(dot(parameters[0], 3.0) + dot(parameters[1], 4.0), STEP_FREELY)
    torch.testing.assert_close(torch.cat(parameters).detach(), torch.tensor([-0.6, -0.8]))


# --- Scaled gradients


@pytest.mark.parametrize(("limit", "expected"), [(None, [-3.0, -4.0]), (1.0, [-0.6, -0.8])])
def test_fp16_clips_and_steps_by_the_unscaled_gradients(limit, expected):
    parameter = zeros()
    update = plain_update(parameter, fp16=True, clip_grad_norm=limit)
    update(dot(parameter, 3.0, 4.0), STEP_FREELY)
    torch.testing.assert_close(parameter.detach(), torch.tensor(expected))
    assert update.read_skipped() == {"skipped_steps": 0}


@pytest.mark.parametrize("limit", [None, 1.0])
def test_fp16_overflow_skips_the_step_counts_it_and_halves_the_scale(limit):
    parameter = zeros()
    update = plain_update(parameter, fp16=True, clip_grad_norm=limit)
    scale = update.scaler.get_scale()
    for skipped in (1, 2):
        update((parameter * 1e36).sum(), STEP_FREELY)  # 1e36 times the scale of 65536 is beyond float32
        assert parameter.tolist() == [0.0, 0.0]
        assert update.scaler.get_scale() == scale / 2**skipped
    update(dot(parameter, 0.5, 0.25), STEP_FREELY)
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.5, -0.25]))
    assert update.read_skipped() == {"skipped_steps": 2}  # since the run began


def test_fp16_overflow_of_one_of_two_networks_skips_both_as_one_step():
    sound, overflowing = zeros(1), zeros(1)
    update = plain_update(sound, overflowing, fp16=True)
    update(sound.sum() + (overflowing * 1e36).sum(), STEP_FREELY)
    assert overflowing.item() == sound.item() == 0.0
    assert update.read_skipped() == {"skipped_steps": 1}


def test_fp16_collapse_is_an_error_below_2_to_the_minus_14():
    parameter = zeros(1)
    update = plain_update(parameter, fp16=True)
    while update.scaler.get_scale() > SMALLEST_SCALE:
        update((parameter * math.inf).sum(), STEP_FREELY)
        update.raise_if_collapsed()
    assert update.scaler.get_scale() == 2.0**-14
    assert update.read_skipped() == {"skipped_steps": 30}  # from 2^16
    update((parameter * math.inf).sum(), STEP_FREELY)
    with pytest.raises(UserError, match=r"below 2\^-14") as caught:
        update.raise_if_collapsed()
    assert caught.value.agreed


def test_without_fp16_nothing_is_scaled_or_counted():
    update = guarded_update(small_network(), "sgd")
    assert update.read_skipped() == {}
    update.raise_if_collapsed()
    assert not update.scaler.is_enabled()


# --- The state of the optimisers


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_continue_bit_for_bit_from_a_restored_state(name, fp16):
    network = small_network()
    update = guarded_update(network, name, first_epoch=0, fp16=fp16)
    if fp16:
        update(batch_loss(network, 0) * math.inf, STEP_FREELY)  # another scale than the initial one
    for step in range(3):
        update(batch_loss(network, step), STEP_FREELY)
    state = through_a_file({"model": network.state_dict(), **update.state()})

    restored = small_network(seed=1)
    restored.load_state_dict(state["model"])
    restored_update = guarded_update(restored, name, first_epoch=0, fp16=fp16)
    restored_update.load_state(state, "checkpoint.pth")
    assert_same(optimizer_tensors(restored_update), optimizer_tensors(update))
    assert restored_update.scaler.get_scale() == update.scaler.get_scale()
    for step in range(3, 6):
        update(batch_loss(network, step), STEP_FREELY)
        restored_update(batch_loss(restored, step), STEP_FREELY)
    assert_same(optimizer_tensors(restored_update), optimizer_tensors(update))


def test_a_restored_state_keeps_the_rates_of_the_rebuilt_schedule():
    update = guarded_update(small_network(), "sgd", lr=0.05, first_epoch=0)
    restored = guarded_update(small_network(), "sgd", lr=0.2, first_epoch=4)
    restored.load_state(through_a_file(update.state()), "checkpoint.pth")
    for group in restored.optimizers["classifier"].param_groups:
        assert group["lr"] == pytest.approx(0.02)  # 0.2, divided by 10 after three epochs
        assert group["initial_lr"] == 0.2


def test_a_state_of_other_optimisers_or_parameters_is_refused():
    update = guarded_update(small_network(), "sgd", first_epoch=0)
    other_optimizers = {"optimizers": {"policy": {}}, "scaler": {}}
    smaller_update = guarded_update(nn.Linear(5, 3), "sgd", first_epoch=0)
    for refusing, state in ((update, other_optimizers), (smaller_update, update.state())):
        with pytest.raises(UserError, match=r"other\.pth: its classifier optimiser's state does not fit"):
            refusing.load_state(state, "other.pth")


# --- Signals


@pytest.fixture
def hangup_is_not_ignored():
    """As without nohup, under which the tests may run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_agreed_on_at_the_end_of_its_step(number, hangup_is_not_ignored):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        guard = make_guard(stop)
        guard.exchange(torch.tensor(1.0), 0, INDICES)
        assert not guard.stop_agreed()
        os.kill(os.getpid(), number)
        guard.exchange(torch.tensor(1.0), 1, INDICES)
        assert guard.stop_agreed()
        assert stop.asked == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_ignored(hangup_is_not_ignored):
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
        stops = []
        for step in range(6):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            guard.exchange(torch.tensor(1.0), step, INDICES)
            stops.append(guard.stop_agreed())
    assert stops == [False, False, False, True, True, True]


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


@pytest.mark.slow
def test_a_loader_worker_that_nobody_ends_ends_by_itself(monkeypatch, request):
    monkeypatch.setattr(signals, "WORKER_SECONDS", 1)
    process, pipe = request.getfixturevalue("worker")
    assert pipe.recv() == "ready"
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == -signal.SIGALRM
