"""Predictions are those of the evaluation; bad images are named and harm no other; formats can be read back."""

import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import write_image
from tests.helpers.exports import CLASSES, random_model, write_checkpoint
from tests.helpers.parsing import parse
from utils import predict as command
from utils.checkpoints import checkpoint
from utils.data import splits as wiring_data
from utils.inference.classifier import open_classifier
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.training import build as wiring
from utils.training import evaluation

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


def probabilities(rows: list[dict[str, str]], classes: list[str] = CLASSES) -> torch.Tensor:
    return torch.tensor([[float(row[name]) for name in classes] for row in rows])


# As in evaluation


@pytest.mark.parametrize(
    "flags", [(), ("--gray", "--backend", "tensor", "--std", 0.1, 0.2, 0.3), ("--model=test_vit",)]
)
@pytest.mark.parametrize("workers", [0, 2])
def test_logits_are_those_of_the_evaluation_bit_for_bit(tmp_path, image_folder, flags, workers):
    path = write_checkpoint(tmp_path / "model_0.pth", *flags)
    weights = checkpoint.read_weights(path)
    args = parse("_normal", "--test-only", "--resume", path, "--data-path", image_folder, "--workers", 0)
    args.__dict__.update({name: weights.args[name] for name in weights.args if name in ("model", "gray", "backend",
        "std", "val_crop_size", "val_resize_size", "train_crop_size")}, batch_size=8)  # fmt: skip
    splits = wiring_data.open_splits(args)
    model = wiring.classifier(args, splits.classes, None, weights, CPU)
    loader = wiring_data.evaluation_loader(args, splits.evaluation, CPU)
    expected = evaluation.predict(model, loader, wiring.normalize(args, CPU), CPU).logits

    classifier = open_classifier({"file": str(path)}, CPU)
    paths = command.find_all([str(image_folder / "val")])
    assert [Path(path) for path in paths] == [splits.evaluation.path(index) for index in range(len(splits.evaluation))]
    images = command.build_image_loader(classifier, paths, 8, workers, False, CPU)
    places, logits = zip(*command.predict(classifier, images, CPU, pytest.fail), strict=True)
    assert torch.equal(torch.cat(places), torch.arange(len(paths)))
    assert torch.equal(torch.cat(logits), expected)


def test_all_formats_say_the_same(run, image_folder, weights, tmp_path):
    folder = image_folder / "test"
    rows = read_csv(run(folder, "--format", "csv"))
    classifier = open_classifier({"file": str(weights)}, CPU)
    loader = command.build_image_loader(classifier, [row["image"] for row in rows], 32, 0, False, CPU)
    [(_, logits)] = command.predict(classifier, loader, CPU, pytest.fail)
    expected = logits.double().softmax(1)
    assert [Path(row["image"]) for row in rows] == sorted(folder.rglob("*.png"))
    torch.testing.assert_close(probabilities(rows).double(), expected, atol=1e-6, rtol=1e-5)
    assert [row["prediction"] for row in rows] == [CLASSES[place] for place in logits.argmax(1)]
    assert all(row["probability"] == row[row["prediction"]] for row in rows)

    objects = [json.loads(line) for line in run(folder, "--format", "json").splitlines()]
    assert [one["image"] for one in objects] == [row["image"] for row in rows]
    for one, of_image in zip(objects, expected.tolist(), strict=True):
        assert one["probabilities"] == dict(zip(CLASSES, of_image, strict=True))
        assert list(one["probabilities"].values()) == sorted(of_image, reverse=True)
        assert (one["prediction"], one["probability"]) == next(iter(one["probabilities"].items()))

    lines = run(folder, "--top", 2).splitlines()
    for line, one in zip(lines, objects, strict=True):
        likeliest = list(one["probabilities"].items())[:2]
        assert line.split() == [one["image"], *(word for name, p in likeliest for word in (name, f"{p:.4f}"))]
    for row, one in zip(read_csv(run(folder, "--format", "csv", "--top", 2)), objects, strict=True):
        (first, p), (second, q) = list(one["probabilities"].items())[:2]
        assert list(row.items()) == [
            ("image", one["image"]),
            ("prediction", first),
            ("probability", f"{p:.6g}"),
            ("prediction_2", second),
            ("probability_2", f"{q:.6g}"),
        ]
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


def test_a_bad_image_harms_no_other(run, tmp_path, image_folder, capsys):
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
    assert sorted(os.listdir(tmp_path)) == ["all.csv", "images"]


def test_an_output_that_is_there_is_replaced_only_when_asked(run, tmp_path, image_folder):
    output, image = tmp_path / "out.csv", image_folder / "test" / "dark" / "0.png"
    output.write_text("precious")
    with pytest.raises(UserError, match=r"out.csv: already exists; give another --output, or --overwrite"):
        run(image, "-o", output)
    assert output.read_text() == "precious"
    assert run(image, "-o", output, "--overwrite") == ""
    assert output.read_text() == run(image)
    with pytest.raises(UserError, match=r"absent/out.csv: cannot be written \(No such file or directory\)"):
        run(image, "-o", tmp_path / "absent" / "out.csv")


def test_names_that_are_no_text(tmp_path, image_folder, capsys):
    path = write_checkpoint(tmp_path / "model_0.pth", classes=[os.fsdecode(b"caf\xe9"), "a,b", "c"])
    name = os.fsdecode(b"x\xff.png")
    shutil.copy(image_folder / "test" / "dark" / "0.png", tmp_path / name)
    (tmp_path / os.fsdecode(b"bad\xff.png")).write_text("none")
    words = [path, tmp_path, "--device", "cpu", "--format", "csv", "--workers", "0"]
    with pytest.raises(SystemExit) as caught:
        run_script(lambda: command.main(list(map(str, words))))
    assert caught.value.code == 2
    found = capsys.readouterr()
    header, row = csv.reader(io.StringIO(found.out))
    assert header == ["image", "prediction", "probability", r"caf\udce9", "a,b", "c"]
    assert row[0] == str(tmp_path / r"x\udcff.png")
    assert r"bad\udcff.png: cannot be read" in found.err


def test_a_table_has_an_aligned_line_for_each_image_whatever_its_name(run, tmp_path, image_folder):
    names = ["a\nb.png", os.fsdecode(b"c\xff.png"), "d.png", "longer name.png"]
    for name in names:
        shutil.copy(image_folder / "test" / "dark" / "0.png", tmp_path / name)
    lines = run(tmp_path).splitlines()
    shown = [f"{tmp_path}/{name}" for name in (r"a\nb.png", r"c\udcff.png", "d.png", "longer name.png")]
    width = max(map(len, shown))
    assert [line[:width] for line in lines] == [name.ljust(width) for name in shown]
    assert len({line[width:] for line in lines}) == 1  # they are one image


def test_no_bar_is_drawn_among_the_rows(tmp_path, image_folder, capsys, monkeypatch):
    words = [tmp_path / "weights.pth", image_folder / "test", "--workers", "0", "--device", "cpu"]
    write_checkpoint(words[0])
    for in_terminal in (True, False):
        monkeypatch.setattr("sys.stdout.isatty", lambda in_terminal=in_terminal: in_terminal)
        command.main(list(map(str, words)))
        assert ("images" in capsys.readouterr().err) != in_terminal


def test_where_no_image_can_be_read_none_is_predicted(run, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(UserError, match=r"^1 of 1 images cannot be read, see above; none is predicted\.$"):
        run(tmp_path)


# Files that do not say all


def test_a_file_that_names_no_classes_or_no_model(tmp_path, image_folder, capsys):
    path, image = tmp_path / "bare.pth", str(image_folder / "test" / "dark" / "0.png")
    torch.save({"model": random_model().state_dict()}, path)
    words = [str(path), image, "--device", "cpu", "--val-crop-size", "32", "--val-resize-size", "36"]
    with pytest.raises(UserError, match="does not say which model these weights are of; give --model NAME"):
        command.main(words)
    words += ["--model", "test_resnet"]
    with pytest.raises(UserError, match=r"names no classes; give --classes FILE \(one name a line\) or --classes FOLD"):
        command.main(words)
    names = tmp_path / "names.txt"
    names.write_bytes(b"\xef\xbb\xbfbright\r\ndark\r\nstriped")
    outputs = []
    for classes in (image_folder / "train", names):
        capsys.readouterr()
        command.main([*words, "--format", "csv", "--classes", str(classes)])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("image,prediction,probability,bright,dark,striped\n")
    names.write_text("bright\ndark\n")
    with pytest.raises(UserError, match=r"bare.pth: its head has 3 classes, and 2 are named by .*names.txt"):
        command.main([*words, "--classes", str(names)])
    with pytest.raises(UserError, match=r"--classes .*absent: cannot be read \(No such file or directory\)"):
        command.main([*words, "--classes", str(tmp_path / "absent")])


def test_classes_that_do_not_fit_the_head_of_their_own_file(tmp_path, image_folder):
    path = write_checkpoint(tmp_path / "model_0.pth")
    state = torch.load(path, weights_only=True)
    checkpoint.save(path, {**state, "classes": ["a", "b"]})
    with pytest.raises(UserError, match=r"model_0.pth: its head has 3 classes, and 2 are named\.$"):
        command.main([str(path), str(image_folder / "test"), "--device", "cpu"])


def test_a_heated_model_is_called_so(tmp_path, image_folder, capsys):
    masks = ("--grid", 8, "--kernel", 5, "--sigma", 2)
    for policy, said in (("learned", True), ("none", False)):
        flags = (*masks, "--mask-policy", policy)
        path = write_checkpoint(tmp_path / f"{policy}.pth", *flags, script="_policy_gradient")
        command.main([str(path), str(image_folder / "test"), "--device", "cpu", "--workers", "0"])
        assert ("a heated model, one to fine-tune" in capsys.readouterr().err) == said
