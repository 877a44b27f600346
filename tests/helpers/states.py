"""Small networks and comparisons of their states."""

import torch
from torch import nn

CLASSES = ["bright", "dark"]


def network(seed: int = 0) -> nn.Sequential:
    """A model with an integer buffer, after one step, so that its buffers are not the initial ones."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model(torch.randn(5, 3))
    return model


def assert_equal_states(actual: dict, expected: dict) -> None:
    """Equal keys in equal order, dtypes and values."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key
