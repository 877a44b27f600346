"""An exported folder: its name, its card with nothing untrue on it, its sums, and whole or not at all."""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from _normal import train as normal
from tests.helpers.exports import MASKS, run_export, safetensors_of, write_checkpoint
from utils import export
from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import read_weights
from utils.inference import model_card
from utils.runtime.errors import UserError

# Names


@pytest.mark.parametrize(
    ("script", "flags", "name"),
    [
        ("_policy_gradient", MASKS, "test_resnet_gradientp_RIN_8_8_k5_s2"),
        ("_policy_gradient", (*MASKS[:-1], 2.5), "test_resnet_gradientp_RIN_8_8_k5_s2.5"),
        ("_policy_gradient", (*MASKS, "--mask-policy", "prior"), "test_resnet_prior_RIN_8_8_k5_s2"),
        ("_policy_gradient", (*MASKS, "--mask-policy", "uniform"), "test_resnet_uniform_RIN_8_8_k5_s2"),
        ("_policy_gradient", (*MASKS, "--mask-policy", "none"), "test_resnet_conventional_RIN"),
        ("_normal", (), "test_resnet_conventional_RIN"),
        ("_normal", ("--finetune", "heated.pth"), "test_resnet_finetuned_RIN"),
        ("_normal", ("--weights", "r160_in1k"), "test_resnet_finetuned_RIN"),
        ("_normal", ("--data-path", "../My data, 2/"), "test_resnet_conventional_My-data-2"),
        ("_normal", ("--model", "test_resnet.r160_in1k"), "test_resnet_conventional_RIN"),
    ],
)
def test_names_tell_how_the_weights_came_about(tmp_path, script, flags, name):
    source = write_checkpoint(tmp_path / "model_0.pth", *flags, script=script)
    assert run_export(source, tmp_path / "out").name == name


def test_the_name_of_the_data(tmp_path):
    source = write_checkpoint(tmp_path / "model_0.pth")
    assert run_export(source, tmp_path / "a", "--data-name", "other-1").name == "test_resnet_conventional_other-1"
    for wrong in ("../up", "", ".", "a b", "-x-"):
        with pytest.raises(UserError, match=r"^--data-name .*: expected letters and digits"):
            export.main([str(source), f"--data-name={wrong}"])
    state = torch.load(source, weights_only=True)
    for path, name in ((None, "phantoms"), ("/", None), ("..", None)):
        checkpoint.save(source, {**state, "args": {**state["args"], "data_path": path}})
        if name is None:
            with pytest.raises(UserError, match="does not say what data it was trained on; give --data-name"):
                run_export(source, tmp_path / "b")
        else:
            assert run_export(source, tmp_path / "c").name == f"test_resnet_conventional_{name}"


# The card and the sums


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_the_card_of_unmeasured_weights(tmp_path):
    source = write_checkpoint(tmp_path / "model_0.pth", *MASKS, "--lr", 0.025, "--amp", script="_policy_gradient")
    folder = run_export(source, tmp_path / "out")
    card = (folder / "README.md").read_text()
    assert front_matter(folder) == {
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
        "The policy network that made the masks is not in these\nfiles",
        "Not measured.",
        "The licence of these weights is **unknown**",
        "Not a medical device",
    ):
        assert sentence in card


def test_metrics_are_those_measured_with_the_very_weights(tmp_path, image_folder):
    source = write_checkpoint(tmp_path / "model_0.pth")
    normal.main(
        ["--device=cpu", "--workers=0", "--data-path", str(image_folder), "--resume", str(source), "--test-only"]
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]["clean"]
    folder = run_export(source, tmp_path / "out", "--license", "cc-by-4.0")
    assert f"| {' | '.join(metrics)} |" in (folder / "README.md").read_text()
    assert f"| {' | '.join(f'{value:.4f}' for value in metrics.values())} |" in (folder / "README.md").read_text()
    assert "on 21 images of a `val` split" in (folder / "README.md").read_text()
    assert front_matter(folder)["license"] == "cc-by-4.0"
    assert model_card.read_measured(source).metrics == metrics
    os.utime(source, ns=(0, (tmp_path / "metrics.json").stat().st_mtime_ns + 1))  # written anew since
    assert model_card.read_measured(source) is None


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "elsewhere/model_1.pth"},
        {"weights": "/other/model_0.pth"},
        {"weights": 5},
        {"split": "|"},
        {"images": "9"},
        {"metrics": {}},
        {"metrics": {"clean": dict.fromkeys(model_card.METRICS, "1")}},
        {"metrics": {"clean": dict.fromkeys(model_card.METRICS, float("nan"))}},
        {"metrics": [[]]},
        {"averaged": True},
        {"averaged": "no"},
    ],
    ids=str,
)
def test_metrics_that_are_not_of_these_weights(tmp_path, change):
    weights = tmp_path / "run" / "model_0.pth"
    weights.parent.mkdir()
    weights.write_bytes(b"")
    whole = {
        "split": "val",
        "images": 9,
        "weights": "../run/model_0.pth",
        "metrics": {"clean": dict.fromkeys(model_card.METRICS, 0.5)},
    }
    path = weights.parent / "metrics.json"
    path.write_text(json.dumps(whole))
    assert model_card.read_measured(weights).metrics["top1"] == 0.5
    assert model_card.read_measured(weights, averaged=False) is None
    path.write_text(json.dumps({**whole, **change}))
    assert model_card.read_measured(weights) is None
    path.write_text("[" * 100_000)
    assert model_card.read_measured(weights) is None


def test_the_sums_are_right(tmp_path):
    folder = run_export(write_checkpoint(tmp_path / "model_0.pth"), tmp_path / "out")
    lines = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
    expected = {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    assert {name for _, name in lines} == expected
    for digest, name in lines:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_nothing_says_where_the_training_ran(tmp_path):
    flags = (
        "--output-dir",
        "/home/alice/secret",
        "--cache-dir",
        "/scratch/secret",
        "--finetune",
        "/home/alice/hot.pth",
    )
    source = write_checkpoint(tmp_path / "model_0.pth", *flags)
    folder = run_export(source, tmp_path / "out", "--data-name", "X")
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            content = content[: 8 + int.from_bytes(content[:8], "little")]  # the header, without the numbers
        for word in (b"secret", b"alice", b"scratch", b"RIN"):
            assert word not in content, path.name
    assert read_weights(safetensors_of(folder)).args["finetune"] == "hot.pth"


def test_names_that_are_no_text(tmp_path):
    classes = [os.fsdecode(b"caf\xe9"), "`tick`|<b>", "line\nbreak"]
    source = write_checkpoint(tmp_path / "model_0.pth", classes=classes)
    folder = run_export(source, tmp_path / "out")
    assert read_weights(safetensors_of(folder)).classes == classes
    assert json.loads((folder / "config.json").read_text())["label_names"] == classes
    card = (folder / "README.md").read_text()
    assert "\n0. `caf\\udce9`\n1. `` `tick`|<b> ``\n2. `line\\nbreak`\n" in card


# Whole or not at all


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_replaced_only_when_asked(tmp_path):
    source = write_checkpoint(tmp_path / "model_0.pth")
    folder = run_export(source, tmp_path / "out")
    before = contents(folder)
    with pytest.raises(UserError, match="test_resnet_conventional_RIN: already exists; give another --output, or"):
        run_export(source, tmp_path / "out")
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds notes.txt, which no export has written; move it away"):
        run_export(source, tmp_path / "out", "--overwrite")
    (folder / "notes.txt").unlink()
    assert contents(folder) == before
    run_export(source, tmp_path / "out", "--overwrite", "--license", "mit")
    assert contents(folder).keys() == before.keys()
    assert front_matter(folder)["license"] == "mit"
    with pytest.raises(UserError, match=r"absent: no such folder; make it first"):
        export.main([str(source), "-o", str(tmp_path / "absent")])
    with pytest.raises(UserError, match=r"model_0.pth: is a file; give the folder"):
        export.main([str(source), "-o", str(source)])


@pytest.mark.parametrize("name", ["", "mit\ntags: x", "cc by", "mit: x", "-mit"])
def test_a_license_is_a_plain_word(tmp_path, name):
    with pytest.raises(UserError, match=r"(?s)^--license .*expected letters and digits, with \. _ - between them\.$"):
        export.main([str(tmp_path / "unread.pth"), f"--license={name}"])


@pytest.mark.parametrize("function", ["write", "fsync", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, function, overwrite):
    source = write_checkpoint(tmp_path / "model_0.pth")
    if overwrite:
        run_export(source, tmp_path / "out", "--license", "mit")
    else:
        (tmp_path / "out").mkdir()
    before = contents(tmp_path / "out")
    real_rename = os.rename

    def refuse(first=None, *rest):
        if function != "rename" or Path(first).name == "draft":
            raise OSError(28, "No space left on device")
        return real_rename(first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        with pytest.raises(
            UserError, match=r"cannot be written \(No space left on device\); what was there is unharmed"
        ):
            export.main([str(source), "-o", str(tmp_path / "out"), "--overwrite"])
    assert contents(tmp_path / "out") == before
    assert len(list((tmp_path / "out").iterdir())) == overwrite
