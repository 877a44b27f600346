"""utils.export: timm and this code read the folder alike; names, checksums, and replacing as a whole or not at all."""

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
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from _normal import train as normal
from tests.conftest import SMALL
from tests.helpers.exports import (
    CLASSES,
    MASKS,
    logits_of,
    random_model,
    run_export,
    safetensors_of,
    write_bare,
    write_checkpoint,
)
from tests.helpers.parsing import parse
from tests.helpers.states import assert_equal_states
from utils import export
from utils.checkpoints import checkpoint
from utils.checkpoints.checkpoint import read_weights
from utils.data.splits import transform_for_evaluation
from utils.data.transforms import Normalize
from utils.inference.classifier import Classifier
from utils.runtime.errors import UserError


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def source(tmp_path):
    return write_checkpoint(tmp_path / "model_0.pth")


# Reading an export


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_reads_the_folder_and_the_file_and_gives_the_same_logits(tmp_path, images, name, monkeypatch):
    source = write_checkpoint(tmp_path / "model_0.pth", "--model", name)
    folder = run_export(source, tmp_path / "out")
    expected = logits_of(source, images)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    by_file, by_folder = code.split("# or")
    variables: dict = {}
    monkeypatch.chdir(folder)
    exec(by_file, variables)
    assert torch.equal(variables["model"](images), expected)
    monkeypatch.chdir(folder.parent)
    exec("import timm\n#" + by_folder, variables := {})
    assert torch.equal(variables["model"](images), expected)
    assert variables["model"].pretrained_cfg["label_names"] == CLASSES


@pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31),
    reason="1.0.26 reads a file that config.json names as a pickle",
)
def test_timm_reads_the_folder_from_the_hub(tmp_path, source, images, monkeypatch):
    folder = run_export(source, tmp_path / "out")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: str(folder / filename))
    model = timm.create_model("hf-hub:somebody/something", pretrained=True).eval()
    assert torch.equal(model(images), logits_of(source, images))


@pytest.mark.parametrize("flags", [(), ("--gray", "--interpolation", "bicubic"), ("--mean", 0.1, 0.2, 0.3)])
def test_timm_prepares_gray_images_as_the_evaluation_does(tmp_path, flags):
    """Not colour images with --gray: it makes their luma, timm does not (the card says so)."""
    source = write_checkpoint(tmp_path / "model_0.pth", *flags)
    config = json.loads((run_export(source, tmp_path / "out") / "config.json").read_text())
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 61), dtype=np.uint8))
    args = parse("_normal", *SMALL, *flags)
    pixels = transform_for_evaluation(args)(image if args.gray else image.convert("RGB"))
    data_config = timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"])
    actual = timm.data.create_transform(**data_config)(image.convert("RGB"))
    assert torch.allclose(actual, Normalize(args.mean, args.std)(pixels[None])[0], atol=1e-6)


@given(st.integers(1, 1500).flatmap(lambda resize: st.tuples(st.just(resize), st.integers(1, resize))))
def test_timm_computes_the_same_resize_size(sizes):
    resize, crop = sizes
    ratio = export.crop_pct(resize, crop)
    assert math.floor(crop / ratio) == resize
    assert ratio == pytest.approx(crop / resize)


def test_the_file_alone_is_as_good_as_the_pth(tmp_path, image_folder):
    """--test-only gives the same metrics without flags for model, crops, mean or std; --finetune works too."""
    flags = ("--mean", 0.5, "--std", 0.2, 0.3, 0.4, "--gray", "--interpolation", "nearest")
    source = write_checkpoint(tmp_path / "model_0.pth", *flags)
    exported = safetensors_of(run_export(source, tmp_path / "out"))
    pth, safetensors = read_weights(source), read_weights(exported)
    assert_equal_states({key: safetensors.model[key] for key in pth.model}, pth.model)
    assert safetensors.classes == pth.classes == CLASSES
    common = ["--device", "cpu", "--workers", "0", "--data-path", str(image_folder)]
    metrics = {}
    for path in (source, exported):
        output = tmp_path / f"tested{path.suffix}"
        normal.main([*common, "--resume", str(path), "--test-only", "--output-dir", str(output)])
        metrics[path] = json.loads((output / "metrics.json").read_text())["metrics"]
    assert metrics[source] == metrics[exported]
    flags = ["--finetune", str(exported), "--epochs", "1", "--batch-size", "8", "--output-dir", str(tmp_path / "tuned")]
    normal.main([*common, *flags])
    args = read_weights(tmp_path / "tuned" / "model_0.pth").args
    assert (args["model"], args["std"], args["gray"]) == ("test_resnet", [0.2, 0.3, 0.4], True)
    with pytest.raises(UserError, match="holds weights but no full training state"):
        normal.main([*common, "--resume", str(exported)])


def test_the_moving_average_is_exported_unless_no_use_ema(tmp_path, source, images):
    """Integers that averaging turned into floats are integers again."""
    state = torch.load(source, weights_only=True)
    average = {key: value.float() for key, value in random_model(seed=5).state_dict().items()}
    checkpoint.save(tmp_path / "checkpoint.pth", {**state, "model_ema": average})
    exported = safetensors_of(run_export(tmp_path / "checkpoint.pth", tmp_path / "out"))
    assert torch.equal(logits_of(exported, images), random_model(seed=5)(images))
    assert read_weights(exported).model["bn1.num_batches_tracked"].dtype == torch.int64
    trained = safetensors_of(run_export(tmp_path / "checkpoint.pth", tmp_path / "trained", "--no-use-ema"))
    assert torch.equal(load_file(trained)["fc.weight"], state["model"]["fc.weight"])


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
def test_the_name_tells_how_the_weights_were_trained(tmp_path, script, flags, name):
    weights = read_weights(write_checkpoint(tmp_path / "model_0.pth", *flags, script=script))
    args = parse(script, *SMALL, *flags)
    args.__dict__.update({key: getattr(args, key, None) for key in ("grid", "kernel", "sigma", "mask_policy")})
    classifier = Classifier(None, [], args, weights)
    assert export.export_name(classifier, export.choose_data_name(None, weights)) == name


def test_weights_of_other_code_need_a_data_name(tmp_path):
    source, names = write_bare(tmp_path / "bare.pth"), tmp_path / "names.txt"
    names.write_text("dark\nbright\nstriped\n")
    known = ("--model", "test_resnet", "--classes", names, "--train-crop-size", 32)
    with pytest.raises(UserError, match=r"bare.pth: does not record its training data; give --data-name NAME"):
        run_export(source, tmp_path / "none", *known)
    folder = run_export(source, tmp_path / "out", *known, "--data-name", "RIN")
    assert folder.name == "test_resnet_RIN"
    exported = read_weights(safetensors_of(folder))
    assert (exported.classes, exported.args["model"]) == (["dark", "bright", "striped"], "test_resnet")
    heated = run_export(source, tmp_path / "heated", *known, "--data-name", "RIN", *MASKS)
    assert heated.name == "test_resnet_gradientp_RIN_8_8_k5_s2"
    assert (
        "pretrained on images of the data set `RIN`, multiplied\nby noise masks" in (heated / "README.md").read_text()
    )
    with pytest.raises(UserError, match=r"^--grid: a heated model has .*; give all three\."):
        run_export(source, tmp_path / "none", *known, "--grid", 8)


def test_a_folder_name_that_says_nothing_is_pointed_out(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "model_0.pth", "--data-path", "/scratch/Data")
    run_export(source, tmp_path / "out")
    assert "the data set is called Data, after its folder; --data-name NAME gives a better" in capsys.readouterr().out
    run_export(source, tmp_path / "named", "--data-name", "RIN")
    assert "after its folder" not in capsys.readouterr().out


def test_the_data_name_comes_from_the_flag_or_the_data_path(source):
    weights = read_weights(source)
    assert export.choose_data_name("other-1", weights) == "other-1"
    assert export.choose_data_name(None, weights._replace(args={"data_path": None})) == "phantoms"
    for path in ("/", ".."):
        with pytest.raises(UserError, match="does not record its training data; give --data-name"):
            export.choose_data_name(None, weights._replace(args={"data_path": path}))


@pytest.mark.parametrize("value", ["", "mit\ntags: x", "cc by", "-mit", "../up"])
def test_licenses_and_data_names_are_plain_words(source, value):
    for flag in ("--license", "--data-name"):
        message = rf"(?s)^{flag} .*expected letters and digits, with \. _ - between them\.$"
        with pytest.raises(UserError, match=message):
            export.main([str(source), f"{flag}={value}"])


# The folder


def test_checksums_are_right_and_bytes_are_the_same_each_time(tmp_path, source):
    folder, again = run_export(source, tmp_path / "a"), run_export(source, tmp_path / "b")
    assert contents(folder) == contents(again)
    names = [line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    assert set(names) == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_no_file_tells_where_the_training_ran(tmp_path):
    flags = [
        "--output-dir",
        "/home/alice/secret",
        "--cache-dir",
        "/scratch/secret",
        "--finetune",
        "/home/alice/hot.pth",
    ]
    folder = run_export(write_checkpoint(tmp_path / "model_0.pth", *flags), tmp_path / "out", "--data-name", "X")
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            content = content[: 8 + int.from_bytes(content[:8], "little")]  # the header, without the numbers
        for word in (b"secret", b"alice", b"scratch", b"RIN"):
            assert word not in content, path.name
    assert read_weights(safetensors_of(folder)).args["finetune"] == "hot.pth"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_is_replaced_only_with_overwrite(tmp_path, source):
    folder = run_export(source, tmp_path / "out")
    before = contents(folder)
    with pytest.raises(UserError, match="test_resnet_conventional_RIN: already exists; give another --output, or"):
        run_export(source, tmp_path / "out")
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"contains notes.txt, which no export wrote; move it away"):
        run_export(source, tmp_path / "out", "--overwrite")
    (folder / "notes.txt").unlink()
    assert contents(folder) == before
    run_export(source, tmp_path / "out", "--overwrite", "--license", "mit")
    assert contents(folder).keys() == before.keys()
    assert "license: mit\n" in (folder / "README.md").read_text()


def test_missing_folders_of_the_output_are_created(tmp_path, source):
    export.main([str(source), "-o", str(tmp_path / "new" / "folder")])
    assert safetensors_of(tmp_path / "new" / "folder" / "test_resnet_conventional_RIN").exists()
    for output, problem in ((source, "File exists"), (source / "folder", "Not a directory")):
        with pytest.raises(UserError, match=rf"{output}: cannot be created \({problem}\); give another --output\."):
            export.main([str(source), "-o", str(output)])


@pytest.mark.parametrize("function", ["write", "fsync", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_the_previous_state(tmp_path, source, monkeypatch, function, overwrite):
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

    message = r"cannot be written \(No space left on device\); what was there is unharmed"
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        with pytest.raises(UserError, match=message):
            export.main([str(source), "-o", str(tmp_path / "out"), "--overwrite"])
    assert contents(tmp_path / "out") == before
    assert len(list((tmp_path / "out").iterdir())) == overwrite
