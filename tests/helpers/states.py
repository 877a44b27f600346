"""Small networks, their states as bytes, and comparisons of states."""

import io
from pathlib import Path

import torch
from torch import nn

from utils.runtime.progress import Position
from utils.training.meters import RunningMean
from utils.training.optim import build_optimizer, parameter_groups
from utils.training.saver import Saver
from utils.training.state import TrainingState
from utils.training.update import GuardedUpdate

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


def training_state(script: str = "_normal", **more: nn.Module) -> dict:
    """The state that a run's saver writes. more: further modules by the name of their entry."""
    model, device = network(), torch.device("cpu")
    update = GuardedUpdate({"classifier": build_optimizer("sgd", parameter_groups(model, 1e-4), 0.1, 0.9)}, device)
    training = TrainingState({"model": model, **more}, update, RunningMean(device))
    saver = Saver(
        Path(),
        training,
        origin={"script": script, "classes": CLASSES, "train_images": 50, "args": {"model": "small", "mean": (0.3,)}},
        start=Position(3, 5, 40, 1.5),
        best_f1=0.5,
        checkpoint_steps=None,
    )
    return saver._state()


def assert_equal_states(actual: dict, expected: dict) -> None:
    """Equal keys in equal order, dtypes and values."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key
