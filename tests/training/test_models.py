"""Classifiers from timm: names, heads, strict loading, freezing, and pretrained weights out of a local cache."""

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from utils.runtime.errors import UserError
from utils.training.models import (
    check_batch_norm,
    check_model_name,
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
    "test_vit": ["head"],
    "test_convnext": ["head.fc"],
    "test_byobnet": ["head.fc"],
    "deit_tiny_distilled_patch16_224": ["head", "head_dist"],
}


def classifier(name: str = "test_resnet", num_classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_classifier(name, num_classes, 32)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def split_by_head(state: dict, heads: list[str]) -> tuple[dict, dict]:
    """The entries of the heads, and those of the body."""
    of_head = {key: value for key, value in state.items() if key.rsplit(".", 1)[0] in heads}
    return of_head, {key: value for key, value in state.items() if key not in of_head}


def assert_equal_states(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


# Names and sizes


def test_an_unknown_model_gets_the_closest_names():
    with pytest.raises(UserError, match=r"--model resnet5: timm has no such model; did you mean .*resnet50"):
        check_model_name("resnet5")
    with pytest.raises(UserError, match=r"--policy-model test_resnets: .*did you mean test_resnet\b"):
        check_model_name("test_resnets", "--policy-model")
    with pytest.raises(UserError, match=r"--model \?\?\?: timm has no such model; timm\.list_models\(\) lists all"):
        create_classifier("???", 3, 32)
    check_model_name("test_resnet")


def test_an_unknown_tag_in_the_name_is_refused():
    with pytest.raises(UserError, match=r"--model test_resnet\.no_such_tag: .*no_such_tag"):
        create_classifier("test_resnet.no_such_tag", 3, 32)
    assert isinstance(create_classifier("test_resnet.r160_in1k", 3, 32), timm.models.ResNet)


@pytest.mark.parametrize("name", HEADS)
def test_a_classifier_has_the_classes_and_the_size_asked_for(name):
    model = classifier(name, num_classes=5)
    assert model.training
    with torch.no_grad():
        assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_a_size_that_the_model_refuses_is_an_error():
    with pytest.raises(UserError, match=r"33 pixels"):
        create_classifier("test_vit", 3, 33)  # its patches are of 16 pixels
    model = classifier("deit_tiny_distilled_patch16_224")
    with pytest.raises(UserError, match=r"refuses images of 48 pixels"):
        output_width(model, 48)
    output_width(model, 32)  # what it was built for
    assert model.training


def test_fresh_weights_follow_the_global_seed():
    assert_equal_states(classifier(seed=4).state_dict(), classifier(seed=4).state_dict())
    assert not torch.equal(classifier(seed=4).fc.weight, classifier(seed=5).fc.weight)


# Heads


@pytest.mark.parametrize("name", HEADS)
def test_heads_by_name_and_size(name):
    model = classifier(name, num_classes=5)
    assert head_names(model) == HEADS[name]
    assert head_size(model, classifier(name, num_classes=7).state_dict()) == 7
    assert head_size(model, {"other.weight": torch.zeros(7, 2)}) is None


def test_the_size_of_the_first_head_that_is_there():
    model = classifier("deit_tiny_distilled_patch16_224")
    assert head_size(model, {"head_dist.weight": torch.zeros(6, 192)}) == 6


# Loading


@pytest.mark.parametrize("name", HEADS)
def test_loaded_weights_are_the_same_to_the_last_bit(name):
    source, model = classifier(name, seed=1), classifier(name, seed=2)
    load_classifier(model, state_of(source), "source.pth")
    assert_equal_states(model.state_dict(), source.state_dict())


def test_integer_buffers_that_became_floats_are_integers_again():
    source, model = classifier(seed=1), classifier(seed=2)
    source(torch.rand(2, 3, 32, 32))
    floats = {key: value.float() for key, value in source.state_dict().items()}
    load_classifier(model, floats, "averaged.pth")
    assert_equal_states(model.state_dict(), source.state_dict())
    assert model.bn1.num_batches_tracked.dtype == torch.int64
    assert model.bn1.num_batches_tracked.item() == 1


def test_weights_that_do_not_fit_are_refused_with_their_keys():
    model = classifier()
    before = state_of(model)
    state = state_of(classifier(seed=1))
    del state["bn1.bias"]
    state["surplus.weight"] = torch.zeros(1)
    state["fc.weight"] = torch.zeros(4, 5)
    with pytest.raises(UserError) as caught:
        load_classifier(model, state, "other.pth")
    width = model.fc.in_features
    for part in (
        "other.pth: these weights do not fit the model",
        "missing bn1.bias",
        "unexpected surplus.weight",
        f"fc.weight is (4, 5), expected (3, {width})",
    ):
        assert part in str(caught.value)
    assert "more" not in str(caught.value)
    assert_equal_states(model.state_dict(), before)


def test_of_many_misfits_six_are_listed_and_the_rest_counted():
    model = classifier()
    with pytest.raises(UserError, match=rf"and {len(model.state_dict()) - 6} more\.") as caught:
        load_classifier(model, {}, "empty.pth")
    assert str(caught.value).count("missing ") == 6


@pytest.mark.parametrize("name", HEADS)
def test_a_renewed_head_is_fresh_and_the_body_is_loaded_to_the_last_bit(name):
    source, model = classifier(name, num_classes=7, seed=1), classifier(name, num_classes=3, seed=2)
    fresh_head, _ = split_by_head(state_of(model), HEADS[name])
    load_classifier(model, state_of(source), "source.pth", renew_head=True)
    found_head, found_body = split_by_head(model.state_dict(), HEADS[name])
    assert_equal_states(found_head, fresh_head)
    assert_equal_states(found_body, split_by_head(source.state_dict(), HEADS[name])[1])


def test_a_body_without_any_head_is_enough_where_the_head_is_renewed():
    source, model = classifier(seed=1), classifier(seed=2)
    _, body = split_by_head(state_of(source), ["fc"])
    load_classifier(model, body, "body.pth", renew_head=True)
    assert torch.equal(model.conv1[0].weight, source.conv1[0].weight)
    with pytest.raises(UserError, match=r"missing fc\.bias; missing fc\.weight\."):
        load_classifier(model, body, "body.pth")


def test_a_renewed_head_excuses_nothing_else():
    state = state_of(classifier(num_classes=7))
    del state["bn1.bias"]
    state["fc2.weight"] = torch.zeros(1)  # its name begins as the head's does
    with pytest.raises(UserError, match=r"missing bn1\.bias; unexpected fc2\.weight\."):
        load_classifier(classifier(), state, "other.pth", renew_head=True)


# Freezing


@pytest.mark.parametrize("name", HEADS)
def test_only_the_head_of_a_frozen_model_learns(name):
    model = classifier(name)
    freeze_backbone(model)
    set_training_mode(model, backbone_frozen=True)
    before = state_of(model)
    logits = model(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    of_head = {f"{head}.{kind}" for head in HEADS[name] for kind in ("weight", "bias")}
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == of_head
    # evaluated, the distilled model answers with the mean of both heads, so that each of them learns
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == of_head
    assert_equal_states(model.state_dict(), before)  # no BatchNorm statistic has moved


def test_the_modes_of_a_frozen_and_of_a_free_model():
    model = classifier()
    set_training_mode(model, backbone_frozen=True)
    assert {name for name, module in model.named_modules() if module.training} == {"fc"}
    set_training_mode(model)
    assert all(module.training for module in model.modules())
    before = state_of(model)
    model(torch.rand(4, 3, 32, 32))
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


# BatchNorm


def test_batch_norm_needs_two_images():
    with pytest.raises(UserError, match=r"--batch-size 1: --model has BatchNorm layers"):
        check_batch_norm(classifier("test_resnet"), 1, "--model")
    check_batch_norm(classifier("test_resnet"), 2, "--model")
    check_batch_norm(classifier("test_vit"), 1, "--model")
    check_batch_norm(classifier("test_efficientnet_gn"), 1, "--model")


def test_synchronised_batch_norm_keeps_weights_and_activations():
    """Converted for CUDA, but run here in evaluation, where SyncBatchNorm needs no other process."""
    model = classifier("test_efficientnet")  # its BatchNorm layers hold the activation
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


# Pretrained weights


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put_in_cache(hub_cache, repository: str, state: dict[str, torch.Tensor]) -> None:
    """As the hub's client leaves a download: refs/main names the snapshot that holds the file."""
    folder = hub_cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(state, snapshot / "model.safetensors")


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k"])
def test_a_pretrained_tag_gives_its_weights(hub_cache, name):
    pretrained = state_of(classifier(num_classes=1000, seed=7))
    put_in_cache(hub_cache, "timm/test_resnet.r160_in1k", pretrained)
    model = create_classifier(name, 1000, 32, weights="r160_in1k")
    assert_equal_states(model.state_dict(), pretrained)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_pretrained_body_gets_a_head_for_other_classes(hub_cache, name):
    pretrained = state_of(classifier(name, num_classes=1000, seed=7))
    put_in_cache(hub_cache, f"timm/{name}.r160_in1k", pretrained)
    model = create_classifier(name, 3, 32, weights="r160_in1k")
    head, body = split_by_head(model.state_dict(), HEADS[name])
    assert_equal_states(body, split_by_head(pretrained, HEADS[name])[1])
    assert head[f"{HEADS[name][0]}.weight"].shape[0] == 3


def test_an_unknown_tag_lists_the_tags_there_are():
    with pytest.raises(UserError, match=r"--weights no_such_tag: timm has for test_resnet the tags r160_in1k\."):
        create_classifier("test_resnet", 3, 32, weights="no_such_tag")
    with pytest.raises(UserError, match=r"--weights x: timm has for resnet50 the tags .*a1_in1k"):
        create_classifier("resnet50", 3, 32, weights="x")
    with pytest.raises(UserError, match=r"--weights x: timm has for test_mambaout the tags \(none\)\."):
        create_classifier("test_mambaout", 3, 32, weights="x")


def test_a_file_that_is_not_there_is_an_error(hub_cache):
    with pytest.raises(UserError, match=r"--weights r160_in1k: could not be fetched or loaded \(.+\)\.") as caught:
        create_classifier("test_resnet", 3, 32, weights="r160_in1k")
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_an_error(hub_cache):
    put_in_cache(hub_cache, "timm/test_resnet.r160_in1k", {"fc.weight": torch.zeros(1)})
    [path] = hub_cache.rglob("model.safetensors")
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"--weights r160_in1k: could not be fetched or loaded \(.+\)\."):
        create_classifier("test_resnet", 3, 32, weights="r160_in1k")
