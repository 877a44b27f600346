"""Small networks, their states as bytes, and comparisons of states."""

import io

import torch
from torch import nn

CLASSES = ["bright", "dark"]


def network(seed: int = 0) -> nn.Sequential:
    """A model with an integer buffer, after one step, so that its buffers are not the initial ones."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model(torch.randn(5, 3))
    return model


def as_bytes(state: object, old_format: bool = False) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not old_format)
    return buffer.getvalue()


def assert_equal_states(actual: dict, expected: dict) -> None:
    """Equal keys in equal order, dtypes and values."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key
