"""Parameter groups, optimisers against torch's plain ones, and schedules against formulas."""

import math
import warnings

import pytest
import timm
import torch
from torch import nn

from tests.helpers.updates import MOMENTUM, STEP, batch_loss, decayed_groups, small_network
from utils.choices import OPTIMIZERS
from utils.training.models import freeze_backbone
from utils.training.optim import build_optimizer, build_scheduler, parameter_groups

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
            batch_loss(network, step).backward()
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


EXPONENTIAL, COSINE = {"gamma": 0.7}, {"lr_min": 0.01}


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


def test_a_rebuilt_schedule_starts_from_the_initial_rates():
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
