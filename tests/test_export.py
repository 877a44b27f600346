"""Exported weights: timm reads the folder, ours reads the file, ONNX agrees, and nothing untrue is on the card."""

import hashlib
import importlib.util
import json
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from _normal import train as normal
from tests.conftest import SMALL
from tests.test_arguments import parse
from tests.test_checkpoint import assert_equal_states
from utils import checkpoint, export, model_card, models, onnx_file, wiring_data
from utils.checkpoint import read_weights
from utils.errors import UserError
from utils.transforms import Normalize

CLASSES = ["bright", "dark", "striped"]
MASKS = ("--grid", 8, "--kernel", 5, "--sigma", 2)
RIN = ("--data-path", "/secret/RIN")


def random_model(name: str = "test_resnet", classes: int = 3, size: int = 32, seed: int = 0) -> torch.nn.Module:
    """With statistics of BatchNorm other than fresh ones."""
    torch.manual_seed(seed)
    model = models.create_classifier(name, classes, size)
    model.train()(torch.randn(4, 3, size, size))
    return model.eval()


def write_checkpoint(path: Path, *flags: object, script: str = "_normal", classes: list[str] = CLASSES) -> Path:
    """A file of weights as a run with these flags saves it, of random weights."""
    args = parse(script, *SMALL, *RIN, *flags)
    model = random_model(args.model, len(classes), args.train_crop_size)
    checkpoint.save(path, checkpoint.weights_state(model, classes, vars(args)))
    return path


def run_export(source: Path, output: Path, *flags: object) -> Path:
    """The one folder that the export makes in a new folder."""
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


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


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


# Read by timm and by us


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_reads_the_folder_and_the_file_and_gives_the_same_logits(tmp_path, images, name, monkeypatch):
    source = write_checkpoint(tmp_path / "model_0.pth", "--model", name)
    folder = run_export(source, tmp_path / "out")
    expected = logits_of(source, images)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    by_name, by_folder = code.split("# or")
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(by_name, found)
    assert torch.equal(found["model"](images), expected)
    if timm.__version__ == "1.0.22":
        return  # of a folder it takes every file for a pickle
    monkeypatch.chdir(folder.parent)
    exec("import timm\n#" + by_folder, found := {})
    assert torch.equal(found["model"](images), expected)
    assert found["model"].pretrained_cfg["label_names"] == CLASSES


@pytest.mark.skipif(timm.__version__ == "1.0.22", reason="it takes any file that config.json names for a pickle")
def test_timm_reads_the_folder_from_the_hub(tmp_path, images, monkeypatch):
    source = write_checkpoint(tmp_path / "model_0.pth")
    folder = run_export(source, tmp_path / "out")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(folder / filename))
    model = timm.create_model("hf-hub:somebody/something", pretrained=True).eval()
    assert torch.equal(model(images), logits_of(source, images))


@pytest.mark.parametrize("flags", [(), ("--gray", "--interpolation", "bicubic"), ("--mean", 0.1, 0.2, 0.3)])
def test_timm_prepares_images_as_the_evaluation_does(tmp_path, flags):
    """Grey images: of colour ones --gray makes the luma, which timm does not (the card says so)."""
    source = write_checkpoint(tmp_path / "model_0.pth", *flags)
    config = json.loads((run_export(source, tmp_path / "out") / "config.json").read_text())
    pixels = np.random.default_rng(0).integers(0, 256, (50, 61), dtype=np.uint8)
    args = parse("_normal", *SMALL, *flags)
    ours = Image.fromarray(pixels) if args.gray else Image.fromarray(pixels).convert("RGB")
    expected = Normalize(args.mean, args.std)(wiring_data.transform_for_evaluation(args)(ours)[None])[0]
    data_config = timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
    found = timm.data.create_transform(**data_config)(Image.fromarray(pixels).convert("RGB"))
    assert torch.allclose(found, expected, atol=1e-6)


@given(st.integers(1, 1500).flatmap(lambda resize: st.tuples(st.just(resize), st.integers(1, resize))))
def test_timms_size_of_the_resize_is_ours(sizes):
    resize, crop = sizes
    share = export.crop_pct(resize, crop)
    assert math.floor(crop / share) == resize
    assert share == pytest.approx(crop / resize)


def test_the_file_alone_is_as_good_as_the_pth(tmp_path, image_folder):
    """Metrics of --test-only, without a flag that says model, crops, mean or std; and a fine-tuning from it."""
    flags = ("--mean", 0.5, "--std", 0.2, 0.3, 0.4, "--gray", "--interpolation", "nearest")
    source = write_checkpoint(tmp_path / "model_0.pth", *flags)
    exported = safetensors_of(run_export(source, tmp_path / "out"))
    ours, theirs = read_weights(source), read_weights(exported)
    assert_equal_states({key: theirs.model[key] for key in ours.model}, ours.model)
    assert theirs.classes == ours.classes == CLASSES
    common = ["--device", "cpu", "--workers", "0", "--data-path", str(image_folder)]
    found = {}
    for name, path in (("pth", source), ("safetensors", exported)):
        output = tmp_path / name
        normal.main([*common, "--resume", str(path), "--test-only", "--output-dir", str(output)])
        found[name] = json.loads((output / "metrics.json").read_text())["metrics"]
    assert found["pth"] == found["safetensors"]
    flags = ["--finetune", str(exported), "--epochs", "1", "--batch-size", "8", "--output-dir", str(tmp_path / "tuned")]
    normal.main([*common, *flags])
    args = read_weights(tmp_path / "tuned" / "model_0.pth").args
    assert (args["model"], args["std"], args["gray"]) == ("test_resnet", [0.2, 0.3, 0.4], True)
    with pytest.raises(UserError, match="holds weights but no full training state"):
        normal.main([*common, "--resume", str(exported)])


def test_the_same_bytes_each_time(tmp_path):
    source = write_checkpoint(tmp_path / "model_0.pth")
    first, again = (safetensors_of(run_export(source, tmp_path / name)).read_bytes() for name in "ab")
    assert first == again


def test_of_a_full_state_the_moving_average_is_exported(tmp_path, images):
    """Which was validated; integers that an averaging made floats are integers again."""
    source = write_checkpoint(tmp_path / "model_0.pth")
    state = torch.load(source, weights_only=True)
    average = {key: value.float() for key, value in random_model(seed=5).state_dict().items()}
    checkpoint.save(tmp_path / "checkpoint.pth", {**state, "model_ema": average})
    exported = safetensors_of(run_export(tmp_path / "checkpoint.pth", tmp_path / "out"))
    assert torch.equal(logits_of(exported, images), random_model(seed=5)(images))
    assert read_weights(exported).model["bn1.num_batches_tracked"].dtype == torch.int64


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


# Files of others


def write_bare(path: Path) -> Path:
    torch.save(random_model().state_dict(), path)
    return path


def test_a_file_that_says_nothing_needs_to_be_told(tmp_path, images, capsys):
    source = write_bare(tmp_path / "bare.pth")
    (tmp_path / "names.txt").write_text("dark\nbright\nstriped\n")
    told = ["--model", "test_resnet", "--classes", tmp_path / "names.txt", "--data-name", "RIN"]
    for missing, match in (
        (0, "bare.pth: does not say which model these weights are of; give --model NAME"),
        (2, r"bare.pth: names no classes; give --classes FILE \(one name a line\) or --classes FOLDER"),
        (4, "bare.pth: does not say what data it was trained on; give --data-name NAME"),
    ):
        with pytest.raises(UserError, match=match):
            run_export(source, tmp_path / "none", *told[:missing], *told[missing + 2 :])
    folder = run_export(source, tmp_path / "out", *told, "--mean", 0.25, "--val-crop-size", 32, "--val-resize-size", 36)
    assert folder.name == "test_resnet_RIN"
    assert "bare.pth does not say how its images were prepared; taken for it: --interpolation bilinear --no-gray " in (
        capsys.readouterr().err
    )
    found = read_weights(safetensors_of(folder))
    assert found.classes == ["dark", "bright", "striped"]
    assert (found.args["model"], found.args["mean"], found.args["val_crop_size"]) == ("test_resnet", [0.25], 32)
    assert torch.equal(logits_of(safetensors_of(folder), images), random_model()(images))
    heated = run_export(source, tmp_path / "heated", *told, *MASKS)
    assert heated.name == "test_resnet_gradientp_RIN_8_8_k5_s2"
    assert "pretrained on images of RIN multiplied by noise masks" in (heated / "README.md").read_text()


def test_a_flag_against_the_file_is_an_error(tmp_path):
    source = write_checkpoint(tmp_path / "model_0.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    for flags, match in (
        (("--model", "resnet18"), "^--model resnet18: .* was made with --model test_resnet; leave the flag out"),
        (("--mean", 0.1), "^--mean 0.1: .* was made with --mean 0.3162"),
        (("--classes", tmp_path / "names.txt"), "names.txt: .* names other classes; leave the flag out"),
        (("--grid", 8), "^--grid: a heated model has all of --grid, --kernel and --sigma"),
    ):
        with pytest.raises(UserError, match=match):
            run_export(source, tmp_path / "out", *flags)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content", ["a\n\nb\n", "", "a\nb\na\n"])
def test_names_of_classes_that_are_none(tmp_path, content):
    (tmp_path / "names.txt").write_text(content)
    with pytest.raises(UserError, match=r"names.txt: (is empty|names 'a' 2 times).*; expected one class name a line"):
        run_export(write_bare(tmp_path / "bare.pth"), tmp_path / "o", "--model=test_resnet", "--classes",
                   tmp_path / "names.txt")  # fmt: skip


def test_names_that_are_no_text(tmp_path):
    classes = [os.fsdecode(b"caf\xe9"), "`tick`|<b>", "line\nbreak"]
    source = write_checkpoint(tmp_path / "model_0.pth", classes=classes)
    folder = run_export(source, tmp_path / "out")
    assert read_weights(safetensors_of(folder)).classes == classes
    assert json.loads((folder / "config.json").read_text())["label_names"] == classes
    card = (folder / "README.md").read_text()
    assert "\n0. `caf\\udce9`\n1. `` `tick`|<b> ``\n2. `line\\nbreak`\n" in card


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


# Whole or not at all


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_replaced_only_when_asked(tmp_path):
    source = write_checkpoint(tmp_path / "model_0.pth")
    folder = run_export(source, tmp_path / "out")
    before = contents(folder)
    with pytest.raises(UserError, match="test_resnet_conventional_RIN: is there already; give another --output, or"):
        run_export(source, tmp_path / "out")
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds notes.txt, which no export has written; move it away"):
        run_export(source, tmp_path / "out", "--overwrite")
    (folder / "notes.txt").unlink()
    assert contents(folder) == before
    run_export(source, tmp_path / "out", "--overwrite", "--license", "mit")
    assert contents(folder).keys() == before.keys()
    assert front_matter(folder)["license"] == "mit"
    with pytest.raises(UserError, match=r"absent: no such folder"):
        export.main([str(source), "-o", str(tmp_path / "absent")])


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


# ONNX


def test_onnx_without_its_packages_is_said_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--onnx: needs onnx and onnxscript: pip install onnx onnxscript"):
        export.main([str(tmp_path / "absent.pth"), "--onnx"])


@pytest.mark.slow
def test_onnx_gives_torchs_logits_for_any_batch(tmp_path, images, monkeypatch, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="one of the optional packages in requirements-dev.txt is missing")
    import onnxruntime

    source = write_checkpoint(tmp_path / "model_0.pth")
    folder = run_export(source, tmp_path / "out", "--onnx")
    assert re.search(r"RIN.onnx: its logits equal torch's within \S+ of the largest", capsys.readouterr().out)
    path = folder / f"{folder.name}.onnx"
    assert path.name in (folder / "SHA256SUMS").read_text()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (found,) = session.run(["logits"], {"images": images[:batch].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits_of(source, images[:batch]), atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="the exported logits differ from torch's by"):
        onnx_file.check(random_model(seed=9), 32, path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert onnx_file.check(random_model(), 32, path).endswith("not checked, since onnxruntime is not installed")
