"""Weight files as classifiers: what a file does not record must be given, and must not contradict the file."""

from pathlib import Path

import pytest
import torch

from tests.helpers.exports import random_model, write_bare, write_checkpoint
from utils import arguments
from utils.checkpoints import checkpoint
from utils.inference.classifier import Classifier, open_classifier, read_class_names
from utils.inference.flags import export_parser
from utils.runtime.errors import UserError

SIZES = ("--train-crop-size", 32, "--val-crop-size", 32, "--val-resize-size", 36)


def opened(path: Path, *flags: object) -> Classifier:
    given = arguments.parse_given(export_parser(), [str(path), *map(str, flags)])
    return open_classifier(given, torch.device("cpu"))


def test_a_bare_state_dict_needs_model_and_classes(tmp_path, capsys):
    source, names = write_bare(tmp_path / "bare.pth"), tmp_path / "names.txt"
    names.write_text("dark\nbright\nstriped\n")
    with pytest.raises(UserError, match=r"bare.pth: does not name its model; give --model NAME\.$"):
        opened(source, "--classes", names)
    with pytest.raises(UserError, match=r"names no classes. Give --classes FILE \(one name per line\) or --classes FO"):
        opened(source, "--model", "test_resnet")
    known = ("--model", "test_resnet", "--classes", names)
    classifier = opened(source, *known, "--mean", 0.25, *SIZES)
    message = "bare.pth: does not record how its images were prepared; assumed: --interpolation bilinear --no-gray "
    assert message in capsys.readouterr().err
    assert (classifier.classes, classifier.args.mean) == (["dark", "bright", "striped"], [0.25])
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(classifier.model(images), random_model()(images))
    names.write_text("bright\ndark\n")
    with pytest.raises(UserError, match=r"bare.pth: its head has 3 classes, but --classes .*names.txt gives 2\.$"):
        opened(source, *known, *SIZES)


def test_classes_must_fit_the_head_of_their_own_file(tmp_path):
    path = write_checkpoint(tmp_path / "model_0.pth")
    checkpoint.save(path, torch.load(path, weights_only=True) | {"classes": ["a", "b"]})
    with pytest.raises(UserError, match=r"model_0.pth: its head has 3 classes, but .*model_0.pth names 2\.$"):
        opened(path)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--model", "resnet18"), "^--model resnet18: .* was made with --model test_resnet; leave the flag out"),
        (("--mean", 0.1), "^--mean 0.1: .* was made with --mean 0.3162"),
        (("--classes", "names.txt"), "names.txt: .* names other classes; leave the flag out"),
    ],
)
def test_a_flag_that_contradicts_the_file_is_an_error(flags, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match=match):
        opened(write_checkpoint(tmp_path / "model_0.pth"), *flags)


def test_class_names_come_from_a_text_file_or_a_folder(tmp_path, image_folder):
    names = tmp_path / "names.txt"
    names.write_bytes(b"\xef\xbb\xbfbright\r\ndark\r\nstriped")
    assert read_class_names(names) == read_class_names(image_folder / "train") == ["bright", "dark", "striped"]
    with pytest.raises(UserError, match=r"--classes .*absent: cannot be read \(No such file or directory\)"):
        read_class_names(tmp_path / "absent")


@pytest.mark.parametrize("content", ["a\n\nb\n", "", "a\nb\na\n"])
def test_empty_and_repeated_class_names_are_errors(tmp_path, content):
    (tmp_path / "names.txt").write_text(content)
    with pytest.raises(UserError, match=r"names.txt: (is empty|names 'a' 2 times).*; expected one class name per line"):
        read_class_names(tmp_path / "names.txt")
