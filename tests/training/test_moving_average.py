"""--model-ema: the average against its formula, and what becomes of it in runs, files, and skipped steps."""

import copy
import json
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL
from utils.results import run_folder
from utils.results.log import read_log
from utils.training.optim import MovingAverage


class OneWeight(nn.Module):
    """A weight, a running statistic, a counter, and a table of indices, as relative positions have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("statistic", torch.zeros(()))
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.arange(200))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.statistic.fill_(10 * value)
            self.counter += 1


def averages(values: list[float], *, epoch_of=lambda step: 0, **settings) -> list[float]:
    """The averaged weight after each step, as the weight takes these values."""
    model = OneWeight()
    average = MovingAverage(model, **settings)
    found = []
    for step, value in enumerate(values):
        model.set(value)
        average.update(epoch_of(step), step)
        found.append(average.model.weight.item())
        assert average.model.statistic.item() == pytest.approx(10 * found[-1], rel=1e-5)
    return found


def expected_averages(values: list[float], adjusted: float) -> list[float]:
    """Update n takes a new value in with max(adjusted, (1 + n)^(-2/3)), the first one with 1."""
    found = [values[0]]
    for number, value in enumerate(values[1:], 1):
        found.append(found[-1] + max(adjusted, (1 + number) ** (-2 / 3)) * (value - found[-1]))
    return found


def test_moving_average_by_hand():
    values = [float(number % 7) for number in range(120)]
    # the adjusted weight of a new value: (1 - 0.9) * 4 * 1 / 8 = 0.05, which the warm-up reaches at update 89
    found = averages(values, decay=0.9, steps=1, epochs=8, global_batch=4)
    assert found == pytest.approx(expected_averages(values, 0.05), rel=1e-5)
    assert found[100:] != pytest.approx(expected_averages(values, 0.0)[100:], rel=1e-4)


def test_moving_average_every_second_step():
    found = averages([1.0, 9.0, 2.0, 9.0, 3.0], decay=0.9, steps=2, epochs=8, global_batch=4)
    first, second, third = expected_averages([1.0, 2.0, 3.0], 0.1)  # at the steps 0, 2 and 4
    assert found == pytest.approx([first, first, second, second, third])


def test_moving_average_of_a_short_run_is_the_model_itself():
    found = averages([1.0, 5.0, -2.0], decay=0.9, steps=1, epochs=2, global_batch=64)  # 0.1 * 64 / 2, but at most 1
    assert found == pytest.approx([1.0, 5.0, -2.0])


def test_moving_average_copies_during_the_warm_up_of_the_rate():
    settings = {"decay": 0.9, "steps": 1, "epochs": 8, "global_batch": 4, "warmup_epochs": 1}
    found = averages([1.0, 2.0, 3.0, 4.0, 5.0], epoch_of=lambda step: step // 2, **settings)
    # steps 0 and 1 are copies; so is step 2, with which the average begins
    assert found == pytest.approx([1.0, 2.0, *expected_averages([3.0, 4.0, 5.0], 0.05)])


def test_after_the_warm_up_it_is_torchs_average_bit_for_bit():
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3)
    average = MovingAverage(network, 0.5, 1, epochs=8, global_batch=8)  # a new value counts at least 0.5
    torchs = AveragedModel(network, multi_avg_fn=lambda old, new, _: torch._foreach_lerp_(old, new, 0.5))
    for step in range(6):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(0, step)
        if step == 1:  # 1 - 2^(-2/3) is below 0.5: the warm-up's last update
            torchs.module.load_state_dict(average.model.state_dict())
            torchs.n_averaged += 1
        elif step > 1:
            torchs.update_parameters(network)
    for (name, averaged), theirs in zip(average.model.named_parameters(), torchs.module.parameters(), strict=True):
        assert torch.equal(averaged, theirs), name


def test_moving_average_copies_integers():
    model = OneWeight()
    average = MovingAverage(model, 0.9, 1, epochs=8, global_batch=8)
    for step in range(5):
        model.set(step)
        average.update(0, step)
    assert average.model.counter.dtype == torch.int64
    assert average.model.counter.item() == 5
    assert torch.equal(average.model.table, torch.arange(200))


def test_moving_average_keeps_relative_positions():
    model = timm.create_model("vit_relpos_small_patch16_224", num_classes=3, img_size=80, depth=1)
    average = MovingAverage(model, 0.9, 1, epochs=8, global_batch=8)
    for step in range(3):
        average.update(0, step)
    for (name, buffer), averaged in zip(model.named_buffers(), average.model.buffers(), strict=True):
        if not buffer.is_floating_point():
            assert torch.equal(averaged, buffer), name


def test_moving_average_does_not_share_memory_with_the_model():
    model = OneWeight()
    average = MovingAverage(model, 0.9, 1, epochs=8, global_batch=4)
    model.set(3.0)
    assert average.model.weight.item() == 0.0


def test_moving_average_continues_from_its_state():
    settings = {"decay": 0.9, "steps": 1, "epochs": 8, "global_batch": 4}
    model = OneWeight()
    average = MovingAverage(model, **settings)
    for step in range(3):
        model.set(step)
        average.update(0, step)
    restored = MovingAverage(model, **settings)
    restored.load_state(copy.deepcopy(average.state()))
    for step in range(3, 5):
        model.set(step)
        average.update(0, step)
        restored.update(0, step)
    assert torch.equal(average.model.weight, restored.model.weight)
    assert average.model.weight.item() == pytest.approx(expected_averages([0.0, 1.0, 2.0, 3.0, 4.0], 0.05)[-1])


def test_a_skipped_step_moves_neither_the_average_nor_its_warm_up():
    model, undisturbed = OneWeight(), OneWeight()
    average, expected = (MovingAverage(one, 0.9, 1, epochs=8, global_batch=4) for one in (model, undisturbed))
    for step, value in enumerate([1.0, 2.0, 9.0, 3.0]):
        model.set(value)
        average.update(0, step, torch.tensor(value == 9.0))
        if value != 9.0:
            undisturbed.set(value)
            expected.update(0, step)
        assert average.model.weight.item() == expected.model.weight.item()
    assert average.updates == expected.updates == 3


@pytest.mark.slow
def test_it_follows_the_weights_of_a_small_set(train):
    """The adjusted decay alone would keep .998 of the first weights, whatever the number of epochs."""
    log = read_log(train(normal, "--epochs", 12, "--lr", 0.02, "--model-ema"))
    assert log[-1]["val_top1"] > 0.9
    assert log[-1]["val_ema_top1"] > 0.9
    assert log[-1]["val_ema_loss"] != log[-1]["val_loss"]


@pytest.mark.slow
def test_a_memory_longer_than_the_run_is_reported_with_figures(train, capsys):
    train(normal, "--epochs", 2, "--model-ema", "--model-ema-steps", 1)
    # adjusted: 1 - 0.00002 * 8 * 1 / 2, so 12,500 steps; at the last of the 8 updates 8^(2/3) = 4
    expected = "the average would reach back 12,500 steps, and the run has 8; its warm-up makes it 4 at the end"
    assert expected in capsys.readouterr().out
    train(normal, "--epochs", 2, "--model-ema", "--model-ema-steps", 1, "--model-ema-decay", 0.9, name="short")
    assert "would reach back" not in capsys.readouterr().out


@pytest.mark.parametrize(("epochs", "warmup", "updates"), [(20, 0, 20), (20, 15, 5), (3, 5, 0)])
def test_the_memory_counts_one_update_in_an_epoch_shorter_than_the_interval(epochs, warmup, updates):
    average = MovingAverage(OneWeight(), 0.99998, 32, epochs=epochs, global_batch=32, warmup_epochs=warmup)
    for epoch in range(epochs):
        for step in range(2):
            average.update(epoch, step)
    assert average.updates == updates
    last = 1 - average.average.get_decay(max(1, updates))
    set_memory, last_memory, steps = average.memory(steps_per_epoch=2, epochs=epochs)
    assert (set_memory, last_memory, steps) == pytest.approx((2 / (2e-5 * 32 * 32 / epochs), 2 / last, 2 * epochs))


@pytest.mark.slow
def test_files_hold_both_and_use_ema_chooses(train, image_folder):
    flags = ("--epochs", 2, "--model-ema", "--model-ema-steps", 1, "--model-ema-decay", 0.9)
    folder = train(normal, *flags)
    state, saved = (torch.load(folder / name, weights_only=True) for name in ("checkpoint.pth", "model_1.pth"))
    for name in ("model", "model_ema"):
        assert saved[name].keys() == state[name].keys()
        assert all(torch.equal(saved[name][key], value) for key, value in state[name].items())
    assert not torch.equal(saved["model_ema"]["fc.weight"], saved["model"]["fc.weight"])
    line = read_log(folder)[1]
    assert line["val_loss"] != line["val_ema_loss"]
    for file in ("checkpoint.pth", "model_1.pth"):
        for flag, name in (([], "val_ema"), (["--use-ema"], "val_ema"), (["--no-use-ema"], "val")):
            normal.main([*SMALL[:2], "--workers", "0", "--test-only", "--resume", str(folder / file), *flag,
                         "--data-path", str(image_folder), "--output-dir", str(folder / "test")])  # fmt: skip
            tested = json.loads((folder / "test" / "metrics.json").read_text())
            assert tested["metrics"]["clean"]["loss"] == pytest.approx(line[f"{name}_loss"], rel=1e-6, abs=1e-6)
            assert tested["averaged"] is (name == "val_ema")
            which = "moving average" if name == "val_ema" else "trained weights"
            assert f"weights {file}, {which}" in run_folder.describe_tested(tested, "clean")


def test_the_best_epoch_is_that_of_the_average(train):
    folder = train(normal, "--epochs", 4, "--lr", 0.05, "--model-ema", "--model-ema-steps", 1)
    best = max(read_log(folder), key=lambda line: line["val_ema_f1"])
    weights = [
        torch.load(folder / name, weights_only=True) for name in ("model_best.pth", f"model_{best['epoch']}.pth")
    ]
    assert torch.equal(weights[0]["model_ema"]["fc.weight"], weights[1]["model_ema"]["fc.weight"])
    assert torch.load(folder / "checkpoint.pth", weights_only=True)["best_f1"] == best["val_ema_f1"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [normal, policy_gradient])
def test_a_skipped_step_changes_nothing_but_the_scale(script, train, monkeypatch):
    """fp16 whose gradients overflow at every step: after an epoch all is as it was, BatchNorm's statistics too."""
    flags = ["--amp", "--amp-dtype", "fp16", "--model-ema", "--model-ema-steps", 1, "--momentum", 0.9, "--lr", 0.1]
    flags += ["--objective", "reinforce"] if script is policy_gradient else []
    states = []
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    for epochs in (1, 2):
        folder = train(script, "--epochs", epochs, *flags, name=f"epochs{epochs}")
        states.append(torch.load(folder / "checkpoint.pth", weights_only=True))
        assert read_log(folder)[-1]["skipped_steps"] == 4 * epochs
    first, second = states
    for name in ("model", "model_ema", *(["policy_net", "objective"] if script is policy_gradient else [])):
        for key, value in first[name].items():
            torch.testing.assert_close(second[name][key], value, rtol=0, atol=0, equal_nan=True, msg=f"{name}.{key}")
    assert first["model"]["bn1.num_batches_tracked"] == 0
    assert first["model_ema_updates"] == second["model_ema_updates"] == 0
    if script is policy_gradient:
        assert torch.equal(first["policy_net"]["prior"], first["policy_net"]["initial_prior"])
        assert first["objective"]["moving_baseline"].isnan()
