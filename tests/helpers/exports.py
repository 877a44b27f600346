"""Weight files with random weights, as a run saves them, and what the export makes of them."""

from functools import cache
from pathlib import Path

import torch

from tests.conftest import SMALL
from tests.helpers.parsing import parse
from utils import export
from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import read_weights
from utils.training import models

CLASSES = ["bright", "dark", "striped"]
MASKS = ("--grid", 8, "--kernel", 5, "--sigma", 2)
RIN = ("--data-path", "/secret/RIN")


@cache
def random_model(name: str = "test_resnet", classes: int = 3, size: int = 32, seed: int = 0) -> torch.nn.Module:
    """A model after one step, so that its BatchNorm statistics are not the initial ones. Shared: do not change it."""
    torch.manual_seed(seed)
    model = models.create_classifier(name, classes, size)
    model.train()(torch.randn(4, 3, size, size))
    return model.eval()


def write_checkpoint(path: Path, *flags: object, script: str = "_normal", classes: list[str] = CLASSES) -> Path:
    """A weight file as a run with these flags saves it, with random weights."""
    args = parse(script, *SMALL, *RIN, *flags)
    model = random_model(args.model, len(classes), args.train_crop_size)
    checkpoint.save(path, checkpoint.weights_state(model, classes, vars(args)))
    return path


def write_bare(path: Path) -> Path:
    """A state dict alone, which names neither model nor classes."""
    torch.save(random_model().state_dict(), path)
    return path


def run_export(source: Path, output: Path, *flags: object) -> Path:
    """The only folder that the export creates in a new folder."""
    output.mkdir(exist_ok=True)
    export.main([str(source), "-o", str(output), *map(str, flags)])
    [folder] = output.iterdir()
    return folder


def safetensors_of(folder: Path) -> Path:
    return folder / f"{folder.name}.safetensors"


def logits_of(path: Path, images: torch.Tensor) -> torch.Tensor:
    weights = read_weights(path)
    model = models.create_classifier(weights.args["model"], len(weights.classes), weights.args["train_crop_size"])
    model.load_state_dict(weights.model)
    return model.eval()(images)
