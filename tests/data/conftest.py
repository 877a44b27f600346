"""Images for the tests of the data package."""

import numpy as np
import pytest

from tests.conftest import write_image

SIZES = [(40, 36), (36, 40), (20, 50), (90, 31), (36, 36)]  # pixels: height, width


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """DATA/{train,val}/{a,b}: ten colour images of several shapes in each split."""
    root = tmp_path_factory.mktemp("colours")
    for split in ("train", "val"):
        for number, (height, width) in enumerate(SIZES * 2):
            rows, columns = np.mgrid[:height, :width]
            waves = [np.sin(rows / (3 + number + channel)) + np.cos(columns / (4 + channel)) for channel in range(3)]
            pixels = 127 + 60 * np.stack(waves, axis=2)  # (H, W, 3)
            write_image(root / split / "ab"[number % 2] / f"{number}.png", pixels)
    return root
