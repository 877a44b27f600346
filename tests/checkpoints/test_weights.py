"""Weights are read from every accepted format."""

import argparse
import os
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.helpers.states import CLASSES, as_bytes, assert_equal_states, network, training_state
from utils.checkpoints.checkpoint import CHECKPOINT, read_weights, safetensors_bytes, save, weights_state
from utils.runtime.errors import UserError
from utils.training.optim import MovingAverage

FILES = {
    "ours": lambda: weights_state(network(), CLASSES, {"model": "small"}),
    "a full state with an average": lambda: {
        **training_state(), **MovingAverage(network(), 0.9, 1, epochs=1, global_batch=1).state(),
        "model": network(1).state_dict(),
    },
    "a state dict": lambda: dict(network().state_dict()),
    "an ordered state dict": lambda: OrderedDict(network().state_dict()),
    "torchvision's average": lambda: authors_state(
        model_ema={"n_averaged": torch.tensor(5), **{f"module.{key}": v for key, v in network().state_dict().items()}},
        model=network(1).state_dict(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("old_format", [False, True])
def test_weights_are_read_from_every_file(tmp_path, kind, old_format):
    path = tmp_path / "weights.pth"
    path.write_bytes(as_bytes(FILES[kind](), old_format))
    found = read_weights(path)
    assert_equal_states(found.model, network().state_dict())
    assert (found.classes is None, found.args == {}) == ("state dict" in kind or "torchvision" in kind, "dict" in kind)
    assert (found.policy_net, found.path) == (None, str(path))


def test_weights_of_a_full_state_with_a_policy(tmp_path):
    save(tmp_path / CHECKPOINT, training_state("_policy_gradient", policy_net=network(1)))
    found = read_weights(tmp_path / CHECKPOINT)
    assert_equal_states(found.model, network().state_dict())
    assert_equal_states(found.policy_net, network(1).state_dict())


def authors_state(prefix: str = "_orig_mod.", **more) -> dict:
    """A file of the authors: prefixed keys, integer buffers averaged to floats, args as a Namespace."""
    model = {
        f"{prefix}{key}": value if value.is_floating_point() else value.float()
        for key, value in network().state_dict().items()
    }
    args = argparse.Namespace(model="resnet50", num_classes=2, lr=0.1, device="cuda", weights=None)
    return {"model": model, "optimizer": {"state": {}}, "epoch": 89, "args": args, **more}


@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
def test_weights_of_the_authors_files(tmp_path, prefix):
    torch.save(authors_state(prefix), tmp_path / "RIN.pth")
    found = read_weights(tmp_path / "RIN.pth")
    assert found.args == {"model": "resnet50", "num_classes": 2, "lr": 0.1, "device": "cuda", "weights": None}
    assert (found.classes, found.policy_net) == (None, None)
    assert list(found.model) == list(network().state_dict())


def test_weights_of_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(network().state_dict(), path)
    found = read_weights(path)
    assert_equal_states({key: found.model[key] for key in network().state_dict()}, network().state_dict())
    assert (found.classes, found.args) == (None, {})
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(UserError, match=r"model\.safetensors: not a checkpoint, or damaged \("):
        read_weights(path)


def test_our_safetensors_hold_the_same_as_a_pth(tmp_path):
    """Shared tensors are written twice, and the memory layout of a tensor does not matter."""
    model = network()
    model.tied = model[0]
    model[2].weight = nn.Parameter(torch.randn(4, 2).t())
    args = {"model": "small", "mean": [0.3], "lr": 0.1, "gray": True, "weights": None}
    classes = ["\udce9", "dark"]
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(model, classes, args))
    found = read_weights(tmp_path / "a.safetensors")
    assert_equal_states({key: found.model[key] for key in model.state_dict()}, model.state_dict())
    assert (found.classes, found.args, found.policy_net) == (classes, args, None)
    assert safetensors.torch.load_file(tmp_path / "a.safetensors").keys() == model.state_dict().keys()


def test_metadata_of_other_safetensors_is_ignored(tmp_path):
    for metadata in ({"format": "pt"}, {"classes": "[1]", "args": "{"}):
        safetensors.torch.save_file(network().state_dict(), tmp_path / "b.safetensors", metadata)
        found = read_weights(tmp_path / "b.safetensors")
        assert (found.classes, found.args) == (None, {})


@pytest.mark.parametrize(
    "state", [{}, {"model": {}}, {"model": {"a": 1}}, {"epoch": 3}, {"a": torch.zeros(1), "b": "text"}]
)
def test_a_dictionary_without_weights_is_refused(tmp_path, state):
    torch.save(state, tmp_path / "none.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        read_weights(tmp_path / "none.pth")


def test_prefixes_of_wrappers_are_stripped_at_the_front_of_keys_only(tmp_path):
    keys = ["module.a", "_orig_mod.a.b", "module._orig_mod.module.c", "body.module.d", "modules.e"]
    torch.save(dict.fromkeys(keys, torch.zeros(1)), tmp_path / "keys.pth")
    assert list(read_weights(tmp_path / "keys.pth").model) == ["a", "a.b", "c", "body.module.d", "modules.e"]
