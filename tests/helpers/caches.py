"""Small data sets with a cache."""

from pathlib import Path

import numpy as np
import pytest
import torch

from _normal import train as normal
from tests.conftest import SMALL, write_image
from utils import arguments
from utils.data import splits as wiring_data
from utils.data.cache_build import CacheBuild
from utils.data.folders import ImageFiles
from utils.data.transforms import resize_transform

CPU = torch.device("cpu")
SIZES = [(40, 36), (36, 40), (20, 50), (90, 31), (36, 36)]  # pixels: height, width


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """DATA/{train,val}/{a,b}: colour images of several shapes."""
    root = tmp_path_factory.mktemp("colours")
    for split in ("train", "val"):
        for number, (height, width) in enumerate(SIZES * 2):
            rows, columns = np.mgrid[:height, :width]
            waves = [np.sin(rows / (3 + number + channel)) + np.cos(columns / (4 + channel)) for channel in range(3)]
            pixels = 127 + 60 * np.stack(waves, axis=2)  # (H, W, 3)
            write_image(root / split / "ab"[number % 2] / f"{number}.png", pixels)
    return root


def splits(folder, cache_dir, *flags):
    """The splits of `_normal/train.py` with these flags, read from the cache if they say so."""
    parser = normal.build_parser()
    flags = [*SMALL, "--data-path", folder, "--cache-dir", cache_dir, *flags]
    args = arguments.for_fresh_start(parser, arguments.parse_given(parser, list(map(str, flags))))
    opened = wiring_data.open_splits(args)
    wiring_data.use_cache(args, opened, CPU)
    return opened


def build_of(folder, cache_dir, *, workers=0, max_bad_images=None, gray=False, size=36):
    files = ImageFiles.find(folder / "train")
    resize = resize_transform(size)
    return CacheBuild(
        cache_dir,
        files,
        resize,
        gray=gray,
        parameters={"size": size},
        max_bad_images=max_bad_images,
        workers=workers,
    )
