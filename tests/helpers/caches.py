"""Splits opened as by the scripts, and caches of small data sets."""

from pathlib import Path

import torch

from tests.conftest import SMALL
from tests.helpers.parsing import parse
from utils.data.cache_build import CacheBuild
from utils.data.folders import ImageFiles
from utils.data.splits import Splits, open_splits, use_cache
from utils.data.transforms import evaluation_transform

CPU = torch.device("cpu")
TEST_TRAIN = ("--test-only", "--resume", "-", "--split", "train")  # evaluates the images of train
COMPLETE = "complete, 0.00 GB"  # at the end of a build's last message


def splits(data: Path, *flags: object, cache_dir: Path | None = None, kind: str = "host") -> Splits:
    """The splits of `_normal/train.py` with these flags, read from a cache if `cache_dir` is given."""
    if cache_dir is not None:
        flags = (*flags, "--cache-dataset", kind, "--cache-dir", cache_dir)
    args = parse("_normal", *SMALL, "--data-path", data, *flags)
    opened = open_splits(args)
    use_cache(args, opened, CPU)
    return opened


def new_build(data: Path, cache_dir: Path, *, workers=0, max_bad_images=None, gray=False, timeout=600.0) -> CacheBuild:
    """The unbuilt cache of the train split: shorter sides of 36 pixels."""
    return CacheBuild(
        cache_dir,
        ImageFiles.find(data / "train"),
        evaluation_transform(36, None, gray=gray),
        gray=gray,
        parameters={"size": 36},
        max_bad_images=max_bad_images,
        workers=workers,
        timeout=timeout,
    )


def built(data: Path, cache_dir: Path, **settings) -> CacheBuild:
    """The cache of the train split, complete."""
    build = new_build(data, cache_dir, **settings)
    list(build.build())
    return build
