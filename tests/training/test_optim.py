"""Optimisers against torch's plain ones, schedules against formulas, and updates that are held back against none."""

import io
import math
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from utils.runtime.errors import UserError
from utils.runtime.signals import StopRequest
from utils.training.models import freeze_backbone
from utils.training.optim import OPTIMIZERS, build_optimizer, build_scheduler, parameter_groups
from utils.training.update import SMALLEST_SCALE, GuardedUpdate, StepGuard

CPU = torch.device("cpu")
MOMENTUM = 0.9


# Parameter groups


def names_by_decay(model: nn.Module, groups: list[dict]) -> dict[float, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def parameters_of_norms(model: nn.Module) -> set[str]:
    return {
        f"{name}.{of_norm}"
        for name, module in model.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))
        for of_norm, _ in module.named_parameters()
    }


def all_names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet_gn"])
def test_one_group_unless_asked_otherwise(name):
    model = timm.create_model(name, num_classes=3)
    assert names_by_decay(model, parameter_groups(model, 1e-4)) == {1e-4: all_names(model)}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_efficientnet_gn"])
def test_norm_decay_reaches_the_normalisation_layers_and_no_others(name):
    model = timm.create_model(name, num_classes=3)
    found = names_by_decay(model, parameter_groups(model, 1e-4, norm_weight_decay=0.0))
    norms = parameters_of_norms(model)
    assert len(norms) >= 10
    assert found == {1e-4: all_names(model) - norms, 0.0: norms}


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_bias_decay_reaches_all_biases(name):
    model = timm.create_model(name, num_classes=3)
    found = names_by_decay(model, parameter_groups(model, 1e-4, bias_weight_decay=0.0))
    biases = {name for name in all_names(model) if name.endswith(".bias")}
    assert found == {1e-4: all_names(model) - biases, 0.0: biases}


def test_embedding_decay_reaches_tokens_and_positions():
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    found = names_by_decay(model, parameter_groups(model, 1e-4, transformer_embedding_decay=0.0))
    assert found == {1e-4: all_names(model) - {"cls_token", "pos_embed"}, 0.0: {"cls_token", "pos_embed"}}


def test_all_decays_together_each_parameter_once():
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    decays = {"norm_weight_decay": 0.1, "bias_weight_decay": 0.2, "transformer_embedding_decay": 0.3}
    groups = parameter_groups(model, 0.4, **decays)
    given = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(given) == sorted(id(parameter) for parameter in model.parameters())
    found = names_by_decay(model, groups)
    assert found[0.3] == {"cls_token", "pos_embed"}
    assert found[0.2] == {name for name in all_names(model) if name.endswith(".bias")}  # those of norms too
    assert found[0.1] == {name for name in parameters_of_norms(model) if name.endswith(".weight")}


@pytest.mark.parametrize(("name", "head"), [("test_resnet", "fc"), ("test_vit", "head")])
def test_frozen_parameters_are_left_out(name, head):
    model = timm.create_model(name, num_classes=3)
    freeze_backbone(model)
    found = names_by_decay(model, parameter_groups(model, 1e-4, norm_weight_decay=0.0))
    assert found == {1e-4: {f"{head}.weight", f"{head}.bias"}}


# Optimisers


def small_network(seed: int = 0) -> nn.Sequential:
    """No bias before BatchNorm: its gradient would be rounding noise, which AdamW makes large."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator)


def loss_of(network: nn.Module, number: int) -> torch.Tensor:
    inputs, targets = batch(number)
    return nn.functional.cross_entropy(network(inputs), targets)


def decayed_groups(network: nn.Module) -> list[dict]:
    return parameter_groups(network, 0.05, norm_weight_decay=0.0)


def plain_optimizer(name: str, groups: list[dict], lr: float, momentum: float) -> torch.optim.Optimizer:
    plain = {"foreach": False, "fused": False}
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, **plain)
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=lr, alpha=0.9, eps=0.0316, momentum=momentum, foreach=False)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=name == "sgd_nesterov", **plain)


@pytest.mark.parametrize(
    ("name", "momentum"), [*((name, MOMENTUM) for name in OPTIMIZERS), ("sgd", 0.0), ("rmsprop", 0.0)]
)
def test_optimisers_step_like_torchs_plain_ones(name, momentum):
    ours, plain = small_network(), small_network()
    our_optimizer = build_optimizer(name, decayed_groups(ours), 0.05, momentum)
    plain_one = plain_optimizer(name, decayed_groups(plain), 0.05, momentum)
    for step in range(6):
        for network, optimizer in ((ours, our_optimizer), (plain, plain_one)):
            optimizer.zero_grad()
            loss_of(network, step).backward()
            optimizer.step()
    start = small_network().state_dict()
    for (key, value), expected in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        assert not torch.equal(value, start[key])


def test_fused_where_torch_can():
    fused = {
        name: build_optimizer(name, decayed_groups(small_network()), 0.1, 0.9).defaults.get("fused")
        for name in OPTIMIZERS
    }
    assert fused == {"sgd": True, "sgd_nesterov": True, "adamw": True, "rmsprop": None}


# Schedules


def schedule_and_optimizer(name: str, epochs: int, lr: float = 0.2, **settings):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    return build_scheduler(optimizer, name, epochs, **settings), optimizer


def rates(name: str, epochs: int, *, first_epoch: int = 0, **settings) -> list[float]:
    """The learning rate of each epoch from `first_epoch` on."""
    scheduler, optimizer = schedule_and_optimizer(name, epochs, first_epoch=first_epoch, **settings)
    found = []
    for _ in range(first_epoch, epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def step_rate(epoch: int) -> float:
    return 0.2 * 0.1 ** (epoch // 3)


def cosine_rate(epoch: int, epochs: int) -> float:
    return 0.01 + (0.2 - 0.01) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def exponential_rate(epoch: int) -> float:
    return 0.2 * 0.7**epoch


STEP, EXPONENTIAL, COSINE = {"step_size": 3, "gamma": 0.1}, {"gamma": 0.7}, {"lr_min": 0.01}


def test_schedules_by_formula():
    assert rates("steplr", 10, **STEP) == pytest.approx([step_rate(epoch) for epoch in range(10)])
    assert rates("exponentiallr", 10, **EXPONENTIAL) == pytest.approx([exponential_rate(epoch) for epoch in range(10)])
    assert rates("cosineannealinglr", 10, **COSINE) == pytest.approx([cosine_rate(epoch, 10) for epoch in range(10)])


def test_warm_up_by_formula():
    linear = [0.2 * (0.04 + 0.96 * epoch / 4) for epoch in range(4)]
    found = rates("steplr", 12, warmup_epochs=4, warmup_method="linear", warmup_decay=0.04, **STEP)
    assert found == pytest.approx(linear + [step_rate(epoch) for epoch in range(8)])
    found = rates("cosineannealinglr", 12, warmup_epochs=4, warmup_method="linear", warmup_decay=0.04, **COSINE)
    assert found == pytest.approx(linear + [cosine_rate(epoch, 8) for epoch in range(8)])
    found = rates("exponentiallr", 12, warmup_epochs=4, warmup_method="constant", warmup_decay=0.04, **EXPONENTIAL)
    assert found == pytest.approx([0.2 * 0.04] * 4 + [exponential_rate(epoch) for epoch in range(8)])


def test_the_published_recipe():
    found = rates("steplr", 90)  # step 30, gamma 0.1 by default
    assert found == pytest.approx([0.2] * 30 + [0.02] * 30 + [0.002] * 30)


@pytest.mark.parametrize("warmup", [{}, {"warmup_epochs": 3}, {"warmup_epochs": 3, "warmup_method": "linear"}])
@pytest.mark.parametrize(
    ("name", "settings"), [("steplr", STEP), ("cosineannealinglr", COSINE), ("exponentiallr", EXPONENTIAL)]
)
def test_a_schedule_brought_to_an_epoch_is_the_same_to_the_last_bit(name, settings, warmup):
    whole = rates(name, 9, **settings, **warmup)
    for first_epoch in range(10):
        assert rates(name, 9, first_epoch=first_epoch, **settings, **warmup) == whole[first_epoch:]


def test_a_schedule_built_anew_starts_from_the_initial_rates():
    scheduler, optimizer = schedule_and_optimizer("steplr", 9, **STEP)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    build_scheduler(optimizer, "cosineannealinglr", 20, first_epoch=7, **COSINE)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(cosine_rate(7, 20))
    assert optimizer.param_groups[0]["initial_lr"] == 0.2


def test_every_group_follows_the_schedule_without_a_warning():
    network = small_network()
    optimizer = build_optimizer("sgd", decayed_groups(network), 0.2, MOMENTUM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_scheduler(optimizer, "steplr", 9, first_epoch=4, warmup_epochs=1, **STEP)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([step_rate(3)] * 2)


def test_a_run_that_ends_within_the_warm_up():
    found = rates("cosineannealinglr", 3, warmup_epochs=5, warmup_method="linear", warmup_decay=0.5)
    assert found == pytest.approx([0.2 * (0.5 + 0.5 * epoch / 5) for epoch in range(3)])


# Updates that are held back


def guarded(network: nn.Module, name: str, lr: float = 0.05, **settings) -> GuardedUpdate:
    return GuardedUpdate({"classifier": build_optimizer(name, decayed_groups(network), lr, MOMENTUM)}, CPU, **settings)


def tensors_of(update: GuardedUpdate) -> dict[tuple, torch.Tensor]:
    """The parameters and buffers of the optimisers, copied, by (optimiser, number of the parameter, name)."""
    found = {}
    for name, optimizer in update.optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            found[name, number, "parameter"] = parameter.detach().clone()
            for key, value in optimizer.state[parameter].items():
                found[name, number, key] = value.clone() if torch.is_tensor(value) else torch.tensor(value)
    return found


def assert_equal_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key in found:
        assert torch.equal(found[key], expected[key]), key


@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])
@pytest.mark.parametrize("bad_value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_that_is_not_finite_changes_nothing(name, bad_step, bad_value, clip_grad_norm):
    network, undisturbed = small_network().eval(), small_network().eval()
    update = guarded(network, name, clip_grad_norm=clip_grad_norm)
    undisturbed_update = guarded(undisturbed, name, clip_grad_norm=clip_grad_norm)
    guard, indices = StepGuard(CPU, Path, StopRequest()), torch.arange(2)
    for step in range(6):
        loss = loss_of(network, step)
        if step != bad_step:
            update(loss, guard.check(loss, step, indices))
            undisturbed_update(loss_of(undisturbed, step), torch.tensor(False))
            continue
        loss = loss * bad_value
        before = tensors_of(update)
        hold_back = guard.check(loss, step, indices)
        assert hold_back.item() is True
        update(loss, hold_back)
        for key, value in tensors_of(update).items():  # buffers that were not there yet are as good as new
            assert torch.equal(value, before.get(key, torch.zeros_like(value))), key
    assert_equal_tensors(tensors_of(update), tensors_of(undisturbed_update))
    start = small_network().state_dict()
    assert not torch.equal(network[0].weight, start["0.weight"])


# Clipping


def weights_after_one_step(clip_grad_norm: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Two networks of two weights each, at 0, with gradients (3, 4) and (0.3, 0.4); plain SGD at a rate of 1."""
    large, small = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizers = {"large": build_optimizer("sgd", [{"params": [large]}], 1.0, 0.0)}
    optimizers["small"] = build_optimizer("sgd", [{"params": [small]}], 1.0, 0.0)
    update = GuardedUpdate(optimizers, CPU, clip_grad_norm=clip_grad_norm)
    gradient = torch.tensor([3.0, 4.0])
    update((large * gradient).sum() + (small * gradient / 10).sum(), torch.tensor(False))
    return large.detach(), small.detach()


def test_each_network_is_clipped_by_itself():
    large, small = weights_after_one_step(None)
    torch.testing.assert_close(large, torch.tensor([-3.0, -4.0]))
    torch.testing.assert_close(small, torch.tensor([-0.3, -0.4]))
    large, small = weights_after_one_step(1.0)
    torch.testing.assert_close(large, torch.tensor([-0.6, -0.8]))
    torch.testing.assert_close(small, torch.tensor([-0.3, -0.4]))
    large, small = weights_after_one_step(0.1)
    torch.testing.assert_close(large, torch.tensor([-0.06, -0.08]))
    torch.testing.assert_close(small, torch.tensor([-0.06, -0.08]))


def test_the_clipped_norm_is_over_all_groups_of_a_network():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameter], "weight_decay": 0.0} for parameter in parameters]
    update = GuardedUpdate({"one": build_optimizer("sgd", groups, 1.0, 0.0)}, CPU, clip_grad_norm=1.0)
    update(3 * parameters[0].sum() + 4 * parameters[1].sum(), torch.tensor(False))
    torch.testing.assert_close(torch.cat([*parameters]).detach(), torch.tensor([-0.6, -0.8]))


# Scaled gradients


def fp16_update(parameter: nn.Parameter, clip_grad_norm: float | None = None) -> GuardedUpdate:
    optimizer = build_optimizer("sgd", [{"params": [parameter]}], 1.0, 0.0)
    return GuardedUpdate({"classifier": optimizer}, CPU, fp16=True, clip_grad_norm=clip_grad_norm)


def test_fp16_scale_does_not_change_an_update():
    parameter = nn.Parameter(torch.zeros(2))
    update = fp16_update(parameter)
    update((parameter * torch.tensor([3.0, 4.0])).sum(), torch.tensor(False))
    assert parameter.tolist() == [-3.0, -4.0]  # the scale is a power of two
    assert update.read_skipped() == {"skipped_steps": 0}


def test_fp16_clips_the_unscaled_gradients():
    parameter = nn.Parameter(torch.zeros(2))
    fp16_update(parameter, clip_grad_norm=1.0)((parameter * torch.tensor([3.0, 4.0])).sum(), torch.tensor(False))
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.6, -0.8]))


@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_fp16_overflow_skips_the_step_counts_it_and_halves_the_scale(clip_grad_norm):
    parameter = nn.Parameter(torch.zeros(2))
    update = fp16_update(parameter, clip_grad_norm)
    scale = update.scaler.get_scale()
    for skipped in (1, 2):
        update((parameter * 1e36).sum(), torch.tensor(False))  # 1e36 times the scale of 65536 is beyond float32
        assert parameter.tolist() == [0.0, 0.0]
        assert update.scaler.get_scale() == scale / 2**skipped
    assert update.read_skipped() == {"skipped_steps": 2}
    update((parameter * torch.tensor([0.5, 0.25])).sum(), torch.tensor(False))
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.5, -0.25]))
    assert update.read_skipped() == {"skipped_steps": 2}  # since the run began


def test_fp16_overflow_of_one_of_two_networks_counts_one_step():
    sound, overflowing = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizers = {
        name: build_optimizer("sgd", [{"params": [parameter]}], 1.0, 0.0)
        for name, parameter in (("sound", sound), ("overflowing", overflowing))
    }
    update = GuardedUpdate(optimizers, CPU, fp16=True)
    update(sound.sum() + (overflowing * 1e36).sum(), torch.tensor(False))
    assert overflowing.item() == sound.item() == 0.0  # a skipped step moves nothing
    assert update.read_skipped() == {"skipped_steps": 1}


def test_fp16_collapse_is_an_error_below_2_to_the_minus_14():
    parameter = nn.Parameter(torch.zeros(1))
    update = fp16_update(parameter)
    while update.scaler.get_scale() > SMALLEST_SCALE:
        update((parameter * math.inf).sum(), torch.tensor(False))
        update.raise_if_collapsed()
    assert update.scaler.get_scale() == 2.0**-14
    assert update.read_skipped() == {"skipped_steps": 30}  # from 2^16
    update((parameter * math.inf).sum(), torch.tensor(False))
    with pytest.raises(UserError, match=r"below 2\^-14") as caught:
        update.raise_if_collapsed()
    assert caught.value.agreed


def test_without_fp16_nothing_is_scaled_or_counted():
    update = guarded(small_network(), "sgd")
    assert update.read_skipped() == {}
    update.raise_if_collapsed()
    assert not update.scaler.is_enabled()


# State


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def scheduled_update(network: nn.Module, name: str, lr: float = 0.05, first_epoch: int = 0, **settings):
    update = guarded(network, name, lr, **settings)
    build_scheduler(update.optimizers["classifier"], "steplr", 9, first_epoch=first_epoch, **STEP)
    return update


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_state_goes_on_bit_for_bit(name, fp16):
    network = small_network()
    update = scheduled_update(network, name, fp16=fp16)
    if fp16:
        update(loss_of(network, 0) * math.inf, torch.tensor(False))  # another scale than the initial one
    for step in range(3):
        update(loss_of(network, step), torch.tensor(False))
    state = through_a_file({"model": network.state_dict(), **update.state()})

    restored = small_network(seed=1)
    restored.load_state_dict(state["model"])
    restored_update = scheduled_update(restored, name, fp16=fp16)
    restored_update.load_state(state, "checkpoint.pth")
    assert_equal_tensors(tensors_of(restored_update), tensors_of(update))
    assert restored_update.scaler.get_scale() == update.scaler.get_scale()
    for step in range(3, 6):
        update(loss_of(network, step), torch.tensor(False))
        restored_update(loss_of(restored, step), torch.tensor(False))
    assert_equal_tensors(tensors_of(restored_update), tensors_of(update))


def test_a_restored_state_keeps_the_rates_of_the_rebuilt_schedule():
    update = scheduled_update(small_network(), "sgd", lr=0.05)
    restored = scheduled_update(small_network(), "sgd", lr=0.2, first_epoch=4)
    restored.load_state(through_a_file(update.state()), "checkpoint.pth")
    for group in restored.optimizers["classifier"].param_groups:
        assert group["lr"] == pytest.approx(step_rate(4))
        assert group["initial_lr"] == 0.2


def test_a_state_of_other_optimisers_or_parameters_is_refused():
    update = scheduled_update(small_network(), "sgd")
    state = update.state()
    with pytest.raises(UserError, match=r"other\.pth: its classifier optimiser's state does not fit"):
        update.load_state({"optimizers": {"policy": {}}, "scaler": {}}, "other.pth")
    smaller = nn.Linear(5, 3)
    with pytest.raises(UserError, match=r"other\.pth: its classifier optimiser's state does not fit"):
        scheduled_update(smaller, "sgd").load_state(state, "other.pth")


# Gradients that are not finite


def test_fp16_holds_back_a_loss_that_is_not_finite_though_its_gradient_is():
    """A target's logit of -inf: the loss is infinite, the gradient is not, and the scaler alone would step."""
    parameter = nn.Parameter(torch.zeros(2))
    update = fp16_update(parameter)
    loss = nn.functional.cross_entropy((parameter + torch.tensor([0.0, -math.inf]))[None], torch.tensor([1]))
    update(loss, ~loss.isfinite())
    assert parameter.grad.isfinite().all()
    assert parameter.tolist() == [0.0, 0.0]
    assert update.read_skipped() == {"skipped_steps": 1}
    update((parameter * torch.tensor([0.5, 0.25])).sum(), torch.tensor(False))
    assert parameter.tolist() == [-0.5, -0.25]


def test_clipping_holds_back_and_counts_a_gradient_that_is_not_finite():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer("sgd", [{"params": [parameter]}], 1.0, 0.9)
    update = GuardedUpdate({"classifier": optimizer}, CPU, clip_grad_norm=1.0)
    update(parameter.sqrt().sum(), torch.tensor(False))  # the root's slope at 0 is infinite
    assert parameter.tolist() == [0.0, 0.0]
    assert update.read_skipped() == {"skipped_steps": 1}
    update((parameter * torch.tensor([0.6, 0.8])).sum(), torch.tensor(False))
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.6, -0.8]))
    assert update.read_skipped() == {"skipped_steps": 1}  # since the run began
