"""Features of frozen backbones: one pass over each split, kept in files that later runs reuse."""

import argparse
import hashlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils import arguments
from utils.checkpoints.checkpoint import Weights, read_weights
from utils.data.dataset import BadImages, ImageFolder
from utils.data.fingerprint import fingerprint
from utils.data.folders import ImageFiles
from utils.data.samplers import seeded
from utils.data.splits import evaluation_loader, transform_for_evaluation
from utils.inference.classifier import args_of, print_to_stderr
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.progress import say
from utils.runtime.reading import open_regular
from utils.runtime.text import count
from utils.training import build, evaluation, models, weight_loading

RANDOM = "random"  # in place of a weight file: an untrained network
CLASSES = ["a", "b"]  # of the head, which is not used
PREPARATION = (*weight_loading.INPUT, "upper_8_bits")  # what the pixels depend on, besides the image files
LONGEST_STEM = 40  # characters of a weight file's name in that of its features


class Backbone(nn.Module):
    """A timm classifier up to its head."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, S, S) float32, normalised, to pooled features (B, F), the input of the classifier's head."""
        return self.classifier.forward_head(self.classifier.forward_features(images), pre_logits=True)


class Source(NamedTuple):
    """A backbone in evaluation mode on its device, and where it comes from."""

    name: str  # as typed
    backbone: Backbone
    args: argparse.Namespace  # the training's flags, those of this command line, and defaults
    weights: Weights | None  # None for an untrained network

    @property
    def preparation(self) -> dict[str, Any]:
        """The flags that turn an image file into the network's input, and their values."""
        return {name: getattr(self.args, name) for name in PREPARATION}


class Features(NamedTuple):
    """Features (N, F) float32 of the readable images of a split, their classes and places in it (N,) int64."""

    values: np.ndarray
    targets: np.ndarray
    indices: np.ndarray

    def subset(self, rows: np.ndarray) -> "Features":
        return Features(*(array[rows] for array in self))


def open_sources(names: list[str], given: dict[str, Any], seed: int, device: torch.device) -> list[Source]:
    """The backbones of weight files in the formats of `--finetune`; their heads are dropped.

    names: files, or `random` for an untrained network with the model and preparation of the first file. given: the
    flags of the model and its input as typed; --model, --mean and --std are for files that do not record them, the
    others also replace what a file says. seed: of `random`.

    Raises UserError for an unfit file, for a flag that contradicts the only file, and for an unknown model.
    """
    files = {name: _open_file(name, given, len(names) > 1, device) for name in names if name != RANDOM}
    first = next((vars(source.args) for source in files.values()), {})
    return [files[name] if name in files else _untrained(first, given, seed, device) for name in names]


def _open_file(name: str, given: dict[str, Any], is_compared: bool, device: torch.device) -> Source:
    weights = read_weights(name, given.get("use_ema"))
    for note in weights.notes:
        print_to_stderr(note)
    flags = dict(given)
    if is_compared and weights.classes is not None:  # a file of this project, which records all of them
        for flag in sorted(
            (flags.keys() & weights.args.keys() & set(arguments.MODEL_FLAGS)) - arguments.FREE_ON_FINETUNE
        ):
            if flags[flag] != weights.args[flag]:
                own, other = arguments.typed(flag, weights.args[flag]), arguments.typed(flag, flags.pop(flag))
                print_to_stderr(f"{name}: was made with {own}, which is used instead of {other}.")
    args = args_of(weights, flags, test_only=False)
    model = build.classifier(args, CLASSES, None, None, device)
    models.load_classifier(
        model, weight_loading.matching_state_dict(model, weights, print_to_stderr), name, reinitialise_head=True
    )
    return Source(name, Backbone(model).eval(), args, weights)


def _untrained(like: dict[str, Any], given: dict[str, Any], seed: int, device: torch.device) -> Source:
    """A network with random weights; like: the flags of a file to compare it with, or nothing."""
    saved = {name: value for name, value in like.items() if name in arguments.MODEL_FLAGS and name not in given}
    if "model" not in {**saved, **given}:
        raise UserError(f"{RANDOM}: give --model NAME, or also a weight file to compare with.")
    untrained = Weights({}, [], saved, None, RANDOM, full_state=False, averaged=None, notes=[])
    args = args_of(untrained, given, test_only=False)
    with seeded(seed):
        model = build.classifier(args, CLASSES, None, None, device)
    return Source(RANDOM, Backbone(model).eval(), args, None)


def digest_of(backbone: Backbone) -> str:
    """SHA-256 of the parameters and buffers below the head."""
    heads = models.head_names(backbone.classifier)
    digest = hashlib.sha256()
    for key, tensor in sorted(backbone.classifier.state_dict().items()):
        if not models.is_head_key(key, heads):
            values = tensor.cpu().contiguous().numpy()
            digest.update(f"{key} {values.dtype} {values.shape}\n".encode())
            digest.update(values.tobytes())
    return digest.hexdigest()


def load_features(
    source: Source, files: ImageFiles, folder: Path, bad_images: BadImages, device: torch.device
) -> Features:
    """The features of a split, from the folder's file for exactly these weights, images and preparation, or computed.

    The flags of the loader are those of `source.args`. Raises UserError for an unreadable image unless it may be
    skipped, for features that are not finite, and if the file system refuses the file.
    """
    parameters = {"backbone": digest_of(source.backbone), "model": source.args.model, **source.preparation}
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source.name).stem)[:LONGEST_STEM].strip("-.") or "weights"
    path = folder / f"{stem}-{files.root.name}-{fingerprint(files, parameters)}.npz"
    features = _read(path, files, source.backbone.classifier.head_hidden_size)
    if features is not None and (len(features.values) == len(files) or source.args.bad_images == "skip"):
        say(f"{source.name}: {files.root.name}: features reused from {path}")
        if skipped := len(files) - len(features.values):
            say(f"{source.name}: {files.root.name}: {count(skipped, 'unreadable image')} left out")
        return features
    features = compute_features(source, files, bad_images, device)
    content = io.BytesIO()
    np.savez(content, **features._asdict())
    write_atomically(path, content.getbuffer())
    return features


def compute_features(source: Source, files: ImageFiles, bad_images: BadImages, device: torch.device) -> Features:
    """One pass over the split, with the images prepared as in evaluation. Raises UserError as `load_features` does."""
    args = source.args
    dataset = ImageFolder(
        files.root,
        transform_for_evaluation(args),
        on_bad_image="blank" if args.bad_images == "skip" else "error",
        gray=args.gray,
        upper_8_bits=args.upper_8_bits,
        files=files,
    )
    values, targets, indices = evaluation.predict(  # of a network whose "logits" are features
        source.backbone,
        evaluation_loader(args, dataset, device),
        build.normalize(args, device),
        device,
        label=f"{source.name}: {files.root.name}",
        bad_images=bad_images,
        wait=build.wait(args),
    )
    if broken := int((~values.isfinite()).any(1).sum()):
        raise UserError(
            f"{source.name}: {count(broken, 'image')} of {files.root.name} give features that are not finite."
        )
    return Features(values.numpy(), targets.numpy(), indices.numpy())


def _read(path: Path, files: ImageFiles, width: int) -> Features | None:
    """The features (N, width) in a file of `load_features`; None if there is none, or if it is damaged."""
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as content:
            features = Features(*(content[name] for name in Features._fields))
        values, targets, indices = features
        is_valid = (
            (values.dtype, targets.dtype, indices.dtype) == (np.float32, np.int64, np.int64)
            and values.shape[1:] == (width,)
            and len(values) == len(targets) == len(indices) > 0
            and np.isfinite(values).all()
            and (np.diff(indices, prepend=-1) > 0).all()
            and np.array_equal(targets, files.targets[indices])
        )
    except FileNotFoundError:
        return None
    except Exception:  # numpy and zipfile raise nearly anything for unexpected bytes
        is_valid = False
    if not is_valid:
        say(f"{path}: is damaged; the features are computed again.")
    return features if is_valid else None
