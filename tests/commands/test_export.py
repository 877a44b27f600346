"""Exported weights: timm reads the folder, ours reads the file, ONNX agrees, and files of others need to be told."""

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from _normal import train as normal
from tests.conftest import SMALL
from tests.helpers.exports import CLASSES, MASKS, logits_of, random_model, run_export, safetensors_of, write_checkpoint
from tests.helpers.parsing import parse
from tests.helpers.states import assert_equal_states
from utils import export
from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import read_weights
from utils.data import splits as wiring_data
from utils.data.transforms import Normalize
from utils.inference import onnx as onnx_file
from utils.runtime.errors import UserError


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


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
    monkeypatch.chdir(folder.parent)
    exec("import timm\n#" + by_folder, found := {})
    assert torch.equal(found["model"](images), expected)
    assert found["model"].pretrained_cfg["label_names"] == CLASSES


@pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31),
    reason="1.0.26 reads a file that config.json names as a pickle",
)
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
    """Unless --no-use-ema asks for the trained weights; integers that an averaging made floats are integers again."""
    source = write_checkpoint(tmp_path / "model_0.pth")
    state = torch.load(source, weights_only=True)
    average = {key: value.float() for key, value in random_model(seed=5).state_dict().items()}
    checkpoint.save(tmp_path / "checkpoint.pth", {**state, "model_ema": average})
    exported = safetensors_of(run_export(tmp_path / "checkpoint.pth", tmp_path / "out"))
    assert torch.equal(logits_of(exported, images), random_model(seed=5)(images))
    assert read_weights(exported).model["bn1.num_batches_tracked"].dtype == torch.int64
    trained = safetensors_of(run_export(tmp_path / "checkpoint.pth", tmp_path / "trained", "--no-use-ema"))
    assert torch.equal(load_file(trained)["fc.weight"], state["model"]["fc.weight"])


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
