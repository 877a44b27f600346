"""The model card of an export: true statements only, for any metrics.json and any class names."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from _normal import train as normal
from tests.conftest import SMALL
from tests.helpers.exports import MASKS, run_export, safetensors_of, write_checkpoint
from utils.checkpoints.checkpoint import read_weights
from utils.inference.model_card import read_measured
from utils.results.metrics import METRIC_NAMES, METRIC_TITLES


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_of_unmeasured_weights(tmp_path):
    source = write_checkpoint(tmp_path / "model_0.pth", *MASKS, "--lr", 0.025, "--amp", script="_policy_gradient")
    card = (run_export(source, tmp_path / "out") / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "tags": ["timm", "image-classification", "medical", "radiology", "policy-gradient-noise-mask"],
        "license": "other",
        "license_name": "unknown",
    }
    flags = re.findall(r"^- `(--.*)`$", card, re.MULTILINE)
    assert {"--lr 0.025", "--amp", "--grid 8", "--sigma 2.0", "--batch-size 8"} <= set(flags)
    assert not [flag for flag in flags if flag.startswith(("--momentum", "--data-path", "--workers", "--device"))]
    for sentence in (
        "A policy network made the masks",
        "there was no run.json of this training",
        "Not measured.",
        "The licence of these weights is **unknown**",
        "Not a medical device",
    ):
        assert sentence in card


def test_the_metrics_are_those_measured_with_exactly_these_weights(tmp_path, image_folder):
    source = write_checkpoint(tmp_path / "model_0.pth")
    words = ["--device=cpu", "--workers=0", "--data-path", str(image_folder), "--resume", str(source), "--test-only"]
    normal.main(words)
    content = json.loads((tmp_path / "metrics.json").read_text())
    metrics, intervals = content["metrics"]["clean"], content["intervals"]["clean"]
    card = (run_export(source, tmp_path / "out", "--license", "cc-by-4.0") / "README.md").read_text()
    for name, title in METRIC_TITLES.items():
        interval = "not computed" if name == "auroc" else "{:.4f} to {:.4f}".format(*intervals[name])
        assert f"| {title} | {metrics[name]:.4f} | {interval} |\n" in card
    assert "on 21 images of a `val` split; whether the data set is that of the training is not recorded." in card
    assert front_matter(card)["license"] == "cc-by-4.0"
    assert read_measured(source).metrics == metrics
    os.utime(source, ns=(0, (tmp_path / "metrics.json").stat().st_mtime_ns + 1))  # written again since
    assert read_measured(source) is None


def test_the_card_of_a_run_says_what_it_was_trained_and_tested_on(tmp_path, image_folder):
    flags = [*SMALL, "--data-path", str(image_folder), "--output-dir", str(tmp_path / "run"), "--epochs", "1"]
    normal.main([*flags, "--grad-accum-steps", "2"])
    best = tmp_path / "run" / "model_best.pth"
    normal.main(["--device=cpu", "--workers=0", "--resume", str(best), "--test-only", "--data-path", str(image_folder)])
    origin = json.loads((tmp_path / "run" / "run.json").read_text())
    for processes in (8, 4):  # as if it had been resumed twice
        origin["starts"].append(origin["starts"][0] | {"processes": processes})
    (tmp_path / "run" / "run.json").write_text(json.dumps(origin))
    card = (run_export(best, tmp_path / "out") / "README.md").read_text()
    images = sum(origin["data"]["train"]["images"].values())
    assert f"trained on {images} images of the data set `{image_folder.name}`.\n" in card
    starts = re.findall(r"^- (\d+ process.*), python", card, re.MULTILINE)
    assert starts == [
        f"{count} on CPU, global batch {batch}"
        for count, batch in (("1 process", 16), ("8 processes", 128), ("4 processes", 64))
    ]
    assert "is unknown" not in card.split("## Classes")[0]
    assert "on 21 images of the `val` split of the same data set. The epoch was chosen by its results on this" in card
    copied = tmp_path / "run" / "model_9.pth"  # of other classes, in the folder of this run
    card = (run_export(write_checkpoint(copied, classes=["x", "y"]), tmp_path / "other") / "README.md").read_text()
    assert "The number of processes, which multiplies `--batch-size`, is unknown" in card
    assert "trained on images of the data set `RIN`." in card


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [("uniform", "no policy was trained"), ("prior", "one learned distribution for all images")],
)
def test_the_masks_of_a_control_are_described(tmp_path, policy, sentence):
    source = write_checkpoint(tmp_path / "m.pth", *MASKS, "--mask-policy", policy, script="_policy_gradient")
    card = (run_export(source, tmp_path / "out") / "README.md").read_text()
    assert sentence in card and "A policy network" not in card


def test_preprocessing_and_origin_are_described(tmp_path):
    flags = ("--interpolation", "nearest", "--gray", "--backend", "tensor", "--finetune", "/x/heated.pth")
    card = (run_export(write_checkpoint(tmp_path / "m.pth", *flags), tmp_path / "out") / "README.md").read_text()
    assert "resized to 36 pixels (nearest, by torch)" in card
    assert "converted to grey (the luma of colours), as three equal channels" in card
    assert "starting from the weights in `heated.pth`." in card


@pytest.fixture
def measured(tmp_path):
    """measured(**changes): the card's results for weights next to a metrics.json with these changes."""
    weights = tmp_path / "run" / "model_0.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"")
    metrics = {"clean": dict.fromkeys(METRIC_NAMES, 0.5)}
    content = {"split": "val", "images": 9, "weights": "../run/model_0.pth", "metrics": metrics}

    def read(averaged: bool | None = None, **changes: object):
        (weights.parent / "metrics.json").write_text(json.dumps(content | changes))
        return read_measured(weights, averaged)

    return read


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "elsewhere/model_1.pth"},
        {"weights": "/other/model_0.pth"},
        {"weights": 5},
        {"split": "|"},
        {"images": "9"},
        {"metrics": {"clean": dict.fromkeys(METRIC_NAMES, "1")}},
        {"metrics": {"clean": dict.fromkeys(METRIC_NAMES, float("nan"))}},
        {"metrics": [[]]},
        {"averaged": True},
    ],
    ids=str,
)
def test_metrics_of_other_weights_and_invalid_ones_are_ignored(measured, change):
    assert measured().metrics["top1"] == 0.5
    assert measured(**change) is None
    assert measured(averaged=False) is None


def test_class_names_need_not_be_text(tmp_path):
    classes = [os.fsdecode(b"caf\xe9"), "`tick`|<b>", "line\nbreak"]
    folder = run_export(write_checkpoint(tmp_path / "model_0.pth", classes=classes), tmp_path / "out")
    assert read_weights(safetensors_of(folder)).classes == classes
    assert json.loads((folder / "config.json").read_text())["label_names"] == classes
    card = Path(folder / "README.md").read_text()
    assert "\n0. `caf\\udce9`\n1. `` `tick`|<b> ``\n2. `line\\nbreak`\n" in card
