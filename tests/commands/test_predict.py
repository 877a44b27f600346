"""utils.predict: the evaluation's logits, every format readable, unreadable images reported without harm to others."""

import csv
import io
import json
import os
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import ROOT, write_image
from tests.helpers.exports import CLASSES, MASKS, write_checkpoint
from tests.helpers.markdown import blocks_and_text
from tests.helpers.parsing import parse
from utils import predict as command
from utils.checkpoints import checkpoint
from utils.data import splits
from utils.data.folders import ImageFiles
from utils.inference.classifier import open_classifier
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.training import build, evaluation

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "model_0.pth", "--gray", "--mean", 0.4)


@pytest.fixture
def run(weights, capsys):
    """run(*words): stdout of the command with the module's weights."""

    def run(*words: object) -> str:
        capsys.readouterr()
        command.main([str(weights), "--workers", "0", "--device", "cpu", *map(str, words)])
        return capsys.readouterr().out

    return run


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# Logits and formats


@pytest.mark.parametrize(
    ("flags", "workers"),
    [((), 0), (("--gray", "--backend", "tensor", "--std", 0.1, 0.2, 0.3), 2), (("--model=test_vit",), 0)],
)
def test_logits_are_those_of_the_evaluation_bit_for_bit(tmp_path, image_folder, flags, workers):
    path = write_checkpoint(tmp_path / "model_0.pth", *flags)
    weights = checkpoint.read_weights(path)
    args = parse("_normal", "--test-only", "--resume", path, "--data-path", image_folder, "--workers", 0)
    model_flags = ("model", "gray", "backend", "std", "val_crop_size", "val_resize_size", "train_crop_size")
    args.__dict__.update({name: weights.args[name] for name in model_flags}, batch_size=8)
    data = splits.open_splits(args)
    model = build.classifier(args, data.classes, None, weights, CPU)
    loader = splits.evaluation_loader(args, data.evaluation, CPU)
    expected = evaluation.predict(model, loader, build.normalize(args, CPU), CPU).logits

    classifier = open_classifier({"file": str(path)}, CPU)
    paths = command.find_all([str(image_folder / "val")])
    images = command.build_image_loader(classifier, paths, 8, workers, False, CPU)
    indices, logits = zip(*command.predict(classifier, images, CPU, pytest.fail), strict=True)
    assert torch.equal(torch.cat(indices), torch.arange(len(paths)))
    assert torch.equal(torch.cat(logits), expected)


def test_all_formats_give_the_same_probabilities(run, image_folder, weights):
    paths = [str(path) for path in sorted((image_folder / "test").rglob("*.png"))]
    classifier = open_classifier({"file": str(weights)}, CPU)
    loader = command.build_image_loader(classifier, paths, 32, 0, False, CPU)
    [(_, logits)] = command.predict(classifier, loader, CPU, pytest.fail)
    probabilities = logits.double().softmax(1).tolist()
    rankings = [sorted(zip(CLASSES, row, strict=True), key=lambda item: -item[1]) for row in probabilities]

    objects = [json.loads(line) for line in run(image_folder / "test", "--format", "json").splitlines()]
    for item, path, ranking in zip(objects, paths, rankings, strict=True):
        name, probability = ranking[0]
        assert list(item.values()) == [path, name, probability, dict(ranking)]
        assert list(item["probabilities"].items()) == ranking

    rows = read_csv(run(image_folder / "test", "--format", "csv"))
    for row, path, ranking in zip(rows, paths, rankings, strict=True):
        name, probability = ranking[0]
        by_class = {name: f"{value:.6g}" for name, value in ranking}
        assert row == {"image": path, "prediction": name, "probability": f"{probability:.6g}", **by_class}


def test_the_listing_of_the_page_fits_a_temperature(run, image_folder, weights, tmp_path, monkeypatch):
    blocks, _, _ = blocks_and_text((ROOT / "docs" / "commands.md").read_text())
    (listing,) = (content for _, content in blocks if "minimize_scalar" in content)
    monkeypatch.chdir(tmp_path)
    run(image_folder / "val", "--format", "csv", "-o", "runs/val.csv")
    found = {}
    exec(listing, found)

    classifier = open_classifier({"file": str(weights)}, CPU)
    files = ImageFiles.find(image_folder / "val", classes=CLASSES)
    paths = [str(files.root / files.path_as_text(index)) for index in range(len(files))]
    loader = command.build_image_loader(classifier, paths, 32, 0, False, CPU)
    [(_, logits)] = command.predict(classifier, loader, CPU, pytest.fail)
    losses = {t: F.cross_entropy(logits.double() / t, torch.from_numpy(files.targets).long()).item()
              for t in np.geomspace(0.05, 20, 200)}  # fmt: skip
    for temperature, loss in losses.items():
        assert found["cross_entropy"](temperature) == pytest.approx(loss, rel=1e-4)
    assert found["cross_entropy"](found["temperature"]) <= min(losses.values()) + 1e-5


def test_top_limits_the_classes_in_every_format(run, image_folder):
    folder = image_folder / "test"
    objects = [json.loads(line) for line in run(folder, "--format", "json").splitlines()]
    lines = run(folder, "--top", 2).splitlines()
    rows = read_csv(run(folder, "--format", "csv", "--top", 2))
    for item, line, row in zip(objects, lines, rows, strict=True):
        (first, p), (second, q) = list(item["probabilities"].items())[:2]
        assert line.split() == [item["image"], first, f"{p:.4f}", second, f"{q:.4f}"]
        assert list(row) == ["image", "prediction", "probability", "prediction_2", "probability_2"]
        assert list(row.values()) == [item["image"], first, f"{p:.6g}", second, f"{q:.6g}"]
    assert len(json.loads(run(folder, "--format", "json", "--top", 1).splitlines()[0])["probabilities"]) == 1


# Which images


def test_files_and_folders_in_the_order_given(tmp_path):
    for name in ("b/2.png", "b/deep/1.PNG", "a.png"):
        write_image(tmp_path / name, np.zeros((8, 8)))
    (tmp_path / "b" / "notes.txt").write_text("no image")
    names = [str(tmp_path / name) for name in ("b", "a.png", "a.png")]
    expected = ["b/2.png", "b/deep/1.PNG", "a.png", "a.png"]
    assert command.find_all(names) == [str(tmp_path / name) for name in expected]
    (tmp_path / "empty").mkdir()
    for name, match in (("empty", "no image in this folder or below it"), ("absent.png", "no such file or folder")):
        with pytest.raises(UserError, match=f"{name}: {match}"):
            command.find_all([str(tmp_path / "b"), str(tmp_path / name)])


def test_an_unreadable_image_does_not_affect_others(run, tmp_path, image_folder, capsys):
    shutil.copytree(image_folder / "test" / "dark", tmp_path / "images")
    expected = read_csv(run(tmp_path / "images", "--format", "csv"))
    (tmp_path / "images" / "00.png").write_text("no image")
    (tmp_path / "images" / "1b.png").write_bytes((tmp_path / "images" / "1.png").read_bytes()[:100])
    words = [tmp_path / "images", "--format", "csv", "--batch-size", 2]
    assert read_csv(run(*words, "--bad-images", "skip")) == expected
    with pytest.raises(UserError, match=r"^2 of 5 images cannot be read, see above; the other 3 are predicted"):
        run(*words, "-o", tmp_path / "all.csv")
    errors = capsys.readouterr().err
    assert "00.png: cannot be read as an image" in errors
    assert "1b.png: cannot be read as an image" in errors
    assert read_csv((tmp_path / "all.csv").read_text()) == expected
    with pytest.raises(UserError, match=r"00.png: cannot be read as an image"):
        run(*words, "-o", tmp_path / "none.csv", "--bad-images", "error")
    with pytest.raises(UserError, match=r"^1 of 1 images cannot be read, see above; none is predicted\.$"):
        run(tmp_path / "images" / "00.png")
    assert sorted(os.listdir(tmp_path)) == ["all.csv", "images"]


def test_an_existing_output_is_replaced_only_with_overwrite(run, tmp_path, image_folder):
    output, image = tmp_path / "out.csv", image_folder / "test" / "dark" / "0.png"
    output.write_text("precious")
    with pytest.raises(UserError, match=r"out.csv: already exists; give another --output, or --overwrite"):
        run(image, "-o", output)
    assert output.read_text() == "precious"
    assert run(image, "-o", output, "--overwrite") == ""
    assert output.read_text() == run(image)
    run(image, "-o", tmp_path / "new" / "out.csv")
    assert (tmp_path / "new" / "out.csv").read_text() == output.read_text()
    with pytest.raises(UserError, match=r"out.csv: cannot be created \(File exists\); give another --output"):
        run(image, "-o", output / "out.csv")


def test_names_need_not_be_text(tmp_path, image_folder, capsys):
    path = write_checkpoint(tmp_path / "model_0.pth", classes=[os.fsdecode(b"caf\xe9"), "a,b", "c"])
    shutil.copy(image_folder / "test" / "dark" / "0.png", tmp_path / os.fsdecode(b"x\xff.png"))
    (tmp_path / os.fsdecode(b"bad\xff.png")).write_text("none")
    words = [path, tmp_path, "--device", "cpu", "--format", "csv", "--workers", "0"]
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: command.main(list(map(str, words))))
    assert caught.value.code == 2
    printed = capsys.readouterr()
    header, row = csv.reader(io.StringIO(printed.out))
    assert header == ["image", "prediction", "probability", r"caf\udce9", "a,b", "c"]
    assert row[0] == str(tmp_path / r"x\udcff.png")
    assert r"bad\udcff.png: cannot be read" in printed.err


def test_a_table_has_an_aligned_line_per_image_for_any_name(run, tmp_path, image_folder):
    names = ["a\nb.png", os.fsdecode(b"c\xff.png"), "d.png", "longer name.png"]
    for name in names:
        shutil.copy(image_folder / "test" / "dark" / "0.png", tmp_path / name)
    lines = run(tmp_path).splitlines()
    shown = [f"{tmp_path}/{name}" for name in (r"a\nb.png", r"c\udcff.png", "d.png", "longer name.png")]
    width = max(map(len, shown))
    assert [line[:width] for line in lines] == [name.ljust(width) for name in shown]
    assert len({line[width:] for line in lines}) == 1  # all are the same image


@pytest.mark.parametrize(("stdout", "stderr", "has_bar"), [("pipe", "file", False), ("file", "other file", True),
    ("file", "file", False)])  # fmt: skip
def test_no_bar_is_drawn_among_rows(weights, image_folder, tmp_path, monkeypatch, stdout, stderr, has_bar):
    """A pipe may lead back to the terminal of stderr, and 2>&1 into one file."""
    with ExitStack() as stack:
        streams = {}
        for name in (stdout, stderr):
            path = tmp_path / name
            if name == "pipe":
                reading, writing = os.pipe()
                streams[name] = stack.enter_context(os.fdopen(writing, "w"))
                stack.callback(os.close, reading)
            else:
                streams[name] = stack.enter_context(path.open("a"))
        monkeypatch.setattr("sys.stdout", streams[stdout])
        monkeypatch.setattr("sys.stderr", streams[stderr])
        command.main([str(weights), str(image_folder / "test"), "--workers", "0", "--device", "cpu"])
    assert ("images/s" in (tmp_path / stderr).read_text()) == has_bar


@pytest.mark.parametrize(("policy", "is_heated"), [("learned", True), ("none", False)])
def test_a_heated_model_is_reported(tmp_path, image_folder, capsys, policy, is_heated):
    flags = (*MASKS, "--mask-policy", policy)
    path = write_checkpoint(tmp_path / "model_0.pth", *flags, script="_policy_gradient")
    image = image_folder / "test" / "dark" / "0.png"
    command.main([str(path), str(image), "--device", "cpu", "--workers", "0"])
    assert ("Heated model: pretrained on masked images" in capsys.readouterr().err) == is_heated
