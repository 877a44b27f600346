"""Classifiers from timm: names, heads, strict loading, freezing, BatchNorm."""

import re

import pytest
import torch
from torch import nn

from tests.helpers.states import assert_equal_states
from utils.runtime.errors import UserError
from utils.training.models import (
    check_batch_norm,
    create_classifier,
    freeze_backbone,
    head_names,
    head_size,
    load_classifier,
    output_width,
    set_training_mode,
    synchronize_batch_norm,
)

CPU = torch.device("cpu")
HEADS = {
    "test_resnet": ["fc"],
    "test_efficientnet": ["classifier"],
    "test_convnext": ["head.fc"],
    "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
}


def classifier(name: str = "test_resnet", num_classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_classifier(name, num_classes, 32)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def split_by_head(state: dict, heads: list[str]) -> tuple[dict, dict]:
    """The entries of the heads, and those of the body."""
    head = {key: value for key, value in state.items() if key.rsplit(".", 1)[0] in heads}
    return head, {key: value for key, value in state.items() if key not in head}


# Names and sizes


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("resnet5", "timm has no such model; did you mean .*resnet50"),
        ("???", r"timm has no such model; timm\.list_models\(\) lists all"),
        ("org/net", r"timm has no such model; for a model on the hub give hf-hub:org/net\."),
        ("test_resnet.no_such_tag", ".*no_such_tag"),
    ],
)
def test_an_unknown_model_or_tag_gets_a_hint(name, match):
    with pytest.raises(UserError, match=f"^--policy-model {re.escape(name)}: {match}"):
        create_classifier(name, 3, 32, flag="--policy-model")


def test_a_size_that_the_model_refuses_is_an_error():
    with pytest.raises(UserError, match=r"33 pixels"):
        create_classifier("test_vit", 3, 33)  # its patches are of 16 pixels
    model = classifier("deit_tiny_distilled_patch16_224")
    with pytest.raises(UserError, match=r"refuses images of 48 pixels"):
        output_width(model, 48)
    output_width(model, 32)  # the size it was built for
    assert model.training


# Heads


@pytest.mark.parametrize("name", HEADS)
def test_heads_by_name_and_size(name):
    model = classifier(name, num_classes=5)
    assert model.training
    with torch.no_grad():
        assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    assert head_names(model) == HEADS[name]
    heads, _ = split_by_head(model.state_dict(), HEADS[name])
    for key in (f"{head}.weight" for head in HEADS[name]):  # a file may hold any of the heads
        assert head_size(model, {key: torch.cat([heads[key], heads[key][:2]])}) == 7
    assert head_size(model, {"other.weight": torch.zeros(7, 2)}) is None


# Loading


@pytest.mark.parametrize("as_floats", [False, True])
def test_loaded_weights_are_equal_bit_for_bit_even_from_floats(as_floats):
    source, model = classifier(seed=1), classifier(seed=2)
    source(torch.rand(2, 3, 32, 32))
    state = {key: value.float() if as_floats else value for key, value in source.state_dict().items()}
    load_classifier(model, state, "source.pth")
    assert_equal_states(model.state_dict(), source.state_dict())  # integer buffers are integers again


def test_the_error_for_weights_that_do_not_fit_lists_the_keys():
    model = classifier()
    before = state_of(model)
    state = state_of(classifier(seed=1))
    del state["bn1.bias"]
    state["surplus.weight"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(4, 5)
    with pytest.raises(UserError) as caught:
        load_classifier(model, state, "other.pth")
    width = model.fc.in_features
    assert str(caught.value).startswith(
        f"other.pth: these weights do not fit the model: fc.weight is (4, 5), expected (3, {width}); missing bn1.bias; "
        "unexpected surplus.weight. Give the --model (now test_resnet) and"
    )
    assert_equal_states(model.state_dict(), before)
    with pytest.raises(UserError, match=rf"(missing [^;]+; ){{6}}and {len(before) - 6} more\."):
        load_classifier(model, {}, "empty.pth")


@pytest.mark.parametrize("name", HEADS)
def test_a_reinitialised_head_is_new_and_the_body_equals_the_file(name):
    source, model = classifier(name, num_classes=7, seed=1), classifier(name, num_classes=3, seed=2)
    initial_head, _ = split_by_head(state_of(model), HEADS[name])
    load_classifier(model, state_of(source), "source.pth", reinitialise_head=True)
    head, body = split_by_head(model.state_dict(), HEADS[name])
    assert_equal_states(head, initial_head)
    assert_equal_states(body, split_by_head(source.state_dict(), HEADS[name])[1])


def test_only_a_reinitialised_head_may_be_missing_or_differ():
    state = state_of(classifier(num_classes=7, seed=1))
    _, body = split_by_head(state, ["fc"])
    load_classifier(classifier(), body, "body.pth", reinitialise_head=True)
    with pytest.raises(UserError, match=r"missing fc\.bias; missing fc\.weight\."):
        load_classifier(classifier(), body, "body.pth")
    del state["bn1.bias"]
    state["fc2.weight"] = torch.zeros(1)  # starts like the head's name
    with pytest.raises(UserError, match=r"missing bn1\.bias; unexpected fc2\.weight\."):
        load_classifier(classifier(), state, "other.pth", reinitialise_head=True)


# Freezing


@pytest.mark.parametrize("name", HEADS)
def test_only_the_head_of_a_frozen_model_is_trained(name):
    model = classifier(name)
    freeze_backbone(model)
    set_training_mode(model, backbone_frozen=True)
    before = state_of(model)
    logits = model(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    head = {f"{name}.{kind}" for name in HEADS[name] for kind in ("weight", "bias")}
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == head
    # in evaluation mode the distilled model returns the mean of both heads, so both get gradients
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == head
    assert_equal_states(model.state_dict(), before)  # BatchNorm statistics are unchanged


def test_a_frozen_backbone_is_in_evaluation_mode():
    model = classifier()
    set_training_mode(model, backbone_frozen=True)
    assert {name for name, module in model.named_modules() if module.training} == {"fc"}
    set_training_mode(model)
    assert all(module.training for module in model.modules())
    before = state_of(model)
    model(torch.rand(4, 3, 32, 32))
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


# BatchNorm


def test_batch_norm_needs_at_least_two_images():
    with pytest.raises(UserError, match=r"--batch-size 1: --model has BatchNorm layers"):
        check_batch_norm(classifier("test_resnet"), 1, "--model")
    check_batch_norm(classifier("test_resnet"), 2, "--model")
    check_batch_norm(classifier("test_vit"), 1, "--model")
    check_batch_norm(classifier("test_efficientnet_gn"), 1, "--model")


def test_synchronised_batch_norm_keeps_weights_and_activations():
    """Converted for CUDA, but run in evaluation mode, in which SyncBatchNorm needs no other process."""
    model = classifier("test_efficientnet")  # its BatchNorm layers contain the activation
    model(torch.rand(4, 3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.eval()(images)
    assert synchronize_batch_norm(model, CPU) is model
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    before, layers = state_of(model), sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    converted = synchronize_batch_norm(model, torch.device("cuda"))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == layers > 0
    assert_equal_states(converted.state_dict(), before)
    with torch.no_grad():
        torch.testing.assert_close(converted.eval()(images), expected)
