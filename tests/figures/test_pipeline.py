"""The picture of the pipeline, drawn from a tiny run: what its pictures hold, and what is said of the run."""

import base64
import io
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur

from _policy_gradient import train
from figures import pipeline
from tests.conftest import SMALL_POLICY
from utils.phantoms.dataset import render
from utils.runtime.errors import UserError

MEAN = 0.25


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    flags = [*SMALL_POLICY, "--data-path", str(image_folder), "--epochs", "1", "--mean", str(MEAN), "--std", "0.3"]
    train.main([*flags, "--objective", "reinforce", "--output-dir", str(folder)])
    return folder


def pictures_of(path):
    """The embedded pictures as arrays (height, width, 3): image, cells, mask, image x mask, image."""
    elements = [element for element in ElementTree.parse(path).iter() if element.tag.endswith("}image")]
    files = [base64.b64decode(element.get("href").removeprefix("data:image/png;base64,")) for element in elements]
    return [np.asarray(Image.open(io.BytesIO(file))).astype(float) for file in files]


def shares_of(colours):
    """From colours (height, width, 3) back to the mask's values in [0, 1]."""
    dark, bright = pipeline.DARK, pipeline.BRIGHT
    return ((colours - dark) / (bright - dark))[..., 0]


def test_the_picture_holds_a_phantom_a_mask_for_it_and_their_product(run, tmp_path, capsys):
    output = tmp_path / "pipeline.svg"
    pipeline.main([str(run), "--phantom", "us-breast-cyst", "--seed", "3", "-o", str(output)])
    assert output.stat().st_size < 200_000
    image, cells, mask, masked, clean = pictures_of(output)
    phantom = render("us-breast-cyst", np.random.default_rng(3), 32)[..., None].astype(float)
    assert np.array_equal(image, phantom.repeat(3, axis=2))
    assert np.array_equal(clean, image)

    shares = shares_of(cells)
    assert shares.shape == (8, 8)
    assert np.std(shares) > 0.1  # sampled, no means
    pixels = F.interpolate(torch.tensor(shares)[None, None], 32, mode="nearest")
    np.testing.assert_allclose(shares_of(mask), gaussian_blur(pixels, 5, 2.0)[0, 0], atol=0.005)
    # Where the mask is 0, the normalised image becomes 0: the mean grey.
    share = shares_of(mask)[..., None]
    np.testing.assert_allclose(masked, image * share + 255 * MEAN * (1 - share), atol=1.5)

    (line,) = (run / "log.jsonl").read_text().splitlines()
    drift = json.loads(line)["prior_drift"]
    printed = capsys.readouterr().out
    assert "a generated phantom (us-breast-cyst, --seed 3)" in printed
    assert "(test_resnet, 8 x 8 cells) after 1 epoch of --objective reinforce" in printed
    assert f"prior_drift {drift:.3f} to {drift:.3f}" in printed
    (description,) = (element for element in ElementTree.parse(output).iter() if element.tag.endswith("}desc"))
    assert description.text.splitlines() == printed.splitlines()


def test_values_above_the_range_have_its_last_colour():
    assert np.array_equal(pipeline._in_colours(torch.tensor([[0.0, 1.4]]))[0], [pipeline.DARK, pipeline.BRIGHT])


def test_the_same_run_gives_the_same_file_and_replaces_none_unasked(run, tmp_path):
    output = tmp_path / "pipeline.svg"
    pipeline.main([str(run), "-o", str(output)])
    before = output.read_bytes()
    with pytest.raises(UserError, match="already exists"):
        pipeline.main([str(run), "-o", str(output)])
    pipeline.main([str(run / "checkpoint.pth"), "-o", str(output), "--overwrite"])
    assert output.read_bytes() == before
