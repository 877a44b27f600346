"""A test split that lacks classes of the training is evaluated with the training's classes."""

import csv
import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, precision_score, recall_score

from _normal import train as normal
from _policy_gradient import gallery
from _policy_gradient import train as policy_gradient
from tests.conftest import SMALL, SMALL_POLICY, write_image_folder
from tests.helpers.exports import run_export
from tests.helpers.ranks import run_ranks
from utils import plots, report
from utils.results.metrics import outcome_metrics
from utils.results.run_folder import describe_tested, read_run_folder, read_tested
from utils.runtime.errors import UserError


@pytest.fixture(scope="module")
def lacking(tmp_path_factory) -> Path:
    """A set whose test split lacks the class `bright`."""
    data = write_image_folder(tmp_path_factory.mktemp("data") / "lacking")
    shutil.rmtree(data / "test" / "bright")
    return data


@pytest.fixture(scope="module")
def trained(lacking, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    normal.main([*SMALL, "--data-path", str(lacking), "--output-dir", str(folder), "--epochs", "1"])
    return folder


def evaluate(weights: Path, data: Path, folder: Path, *flags: str, script=normal) -> dict:
    """metrics.json of an evaluation of the test split."""
    small = SMALL if script is normal else SMALL_POLICY
    flags = ("--data-path", str(data), "--output-dir", str(folder), "--test-only", "--split", "test", *flags)
    script.main([*small, *flags, "--resume", str(weights)])
    return json.loads((folder / "metrics.json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_bare(trained: Path, path: Path) -> Path:
    """The same weights without the names of their classes."""
    torch.save(torch.load(trained / "model_0.pth", weights_only=True)["model"], path)
    return path


def test_a_split_without_a_class_is_evaluated_with_the_classes_of_the_training(lacking, trained, tmp_path, capsys):
    found = evaluate(trained / "model_0.pth", lacking, tmp_path)
    said = capsys.readouterr().out
    assert "test: 6 images in 2 classes\n" in said
    assert (
        "test: no images of bright (1 of the training's 3 classes); macro metrics are over the other classes." in said
    )
    assert "test: macro metrics are over the 2 of 3 classes that have images here; without: bright." in said
    assert (found["images"], found["classes"], found["absent_classes"]) == (6, 3, ["bright"])
    table = rows_of(tmp_path / "per_class.csv")
    assert [(row["class"], row["images"]) for row in table] == [("bright", "0"), ("dark", "3"), ("striped", "3")]
    assert list(table[0].values())[2:] == ["", "", "", "", "12"]  # the last: training images
    rows = rows_of(tmp_path / "predictions.csv")
    truth, predicted = ([row[column] for row in rows] for column in ("target", "prediction"))
    assert truth == ["dark"] * 3 + ["striped"] * 3
    options = {"labels": ["dark", "striped"], "average": "macro", "zero_division": 0}
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert found["metrics"]["clean"][name] == pytest.approx(score(truth, predicted, **options))


def test_the_numbers_are_those_of_the_same_images_in_a_whole_split(lacking, trained, tmp_path, image_folder):
    evaluate(trained / "model_0.pth", image_folder, tmp_path / "whole")
    evaluate(trained / "model_0.pth", lacking, tmp_path / "part")
    whole, part = (rows_of(tmp_path / name / "predictions.csv") for name in ("whole", "part"))
    assert part == [row for row in whole if row["target"] != "bright"]


@pytest.mark.parametrize("way", ["an empty folder", "an excluded class"])
def test_a_class_that_is_emptied_counts_as_absent(way, image_folder, trained, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    flags = ()
    if way == "an empty folder":
        for path in (data / "test" / "bright").iterdir():
            path.unlink()
    else:
        (tmp_path / "list").write_text("".join(f"test/bright/{number}.png\n" for number in range(3)))
        flags = ("--exclude", str(tmp_path / "list"))
    found = evaluate(trained / "model_0.pth", data, tmp_path / "out", *flags)
    assert (found["images"], found["absent_classes"]) == (6, ["bright"])


def test_weights_without_classes_take_those_of_the_train_folder(lacking, trained, tmp_path):
    bare = write_bare(trained, tmp_path / "bare.pth")
    found = evaluate(bare, lacking, tmp_path / "bare", "--model", "test_resnet")
    named = evaluate(trained / "model_0.pth", lacking, tmp_path / "named")
    assert found["absent_classes"] == ["bright"]
    assert found["metrics"] == named["metrics"]
    (tmp_path / "alone").mkdir()
    shutil.copytree(lacking / "test", tmp_path / "alone" / "test")
    with pytest.raises(UserError, match="was trained on 3 classes instead of 2"):
        evaluate(bare, tmp_path / "alone", tmp_path / "alone_out", "--model", "test_resnet")


def test_a_class_that_the_training_lacks_is_named(image_folder, trained, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    shutil.copytree(data / "test" / "dark", data / "test" / "zebra")
    with pytest.raises(
        UserError, match=r"zebra: this class is in 'test' but not in .*model_0.pth, which was trained on"
    ):
        evaluate(trained / "model_0.pth", data, tmp_path / "out")
    with pytest.raises(UserError, match=r"test/zebra: this class is in 'test' but not in 'train'"):
        normal.main([*SMALL, "--data-path", str(data), "--output-dir", str(tmp_path / "run"), "--epochs", "1"])
    assert not (tmp_path / "run").exists()


def test_the_start_of_a_training_says_which_classes_the_test_split_lacks(image_folder, tmp_path, capsys):
    data = shutil.copytree(image_folder, tmp_path / "data")
    for path in (data / "test" / "bright").iterdir():
        path.unlink()
    flags = [*SMALL, "--data-path", str(data), "--output-dir", str(tmp_path / "run"), "--epochs", "1"]
    normal.main(flags)
    assert "test: no images of bright (1 of the training's 3 classes)" in capsys.readouterr().out
    shutil.rmtree(data / "val" / "bright")
    with pytest.raises(UserError, match=r"train/bright: this class is in 'train' but not in 'val'"):
        normal.main(flags)


def test_a_split_of_one_class_is_evaluated(lacking, trained, tmp_path):
    data = shutil.copytree(lacking, tmp_path / "data")
    shutil.rmtree(data / "test" / "dark")
    found = evaluate(trained / "model_0.pth", data, tmp_path / "out")
    assert found["absent_classes"] == ["bright", "dark"]
    assert found["metrics"]["clean"]["auroc"] is None
    assert found["metrics"]["clean"]["recall"] == found["metrics"]["clean"]["top1"]


def test_control_characters_of_class_names_are_printed_as_escapes(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", ("a\n\x1b[2J", "b"))
    normal.main([*SMALL, "--data-path", str(data), "--output-dir", str(tmp_path / "run"), "--epochs", "1"])
    evaluate(tmp_path / "run" / "model_0.pth", data, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "  a\\n\\x1b[2J       3 images" in printed


@pytest.mark.slow
def test_reports_and_plots_of_a_split_without_a_class(lacking, trained, tmp_path):
    evaluate(trained / "model_0.pth", lacking, tmp_path / "run")
    run = read_run_folder(tmp_path / "run")
    assert run.notes == []
    evaluation = run.evaluations["clean"]
    measured = outcome_metrics(evaluation.outcome)
    assert {name: evaluation.metrics[name] for name in measured} == pytest.approx(measured, rel=1e-5)
    for name in ("precision", "recall", "f1"):
        lower, upper = run.tested["intervals"]["clean"][name]
        assert lower <= evaluation.metrics[name] <= upper
    _, tested = read_tested(tmp_path / "run", "clean")
    assert describe_tested(tested, "clean").endswith("model_0.pth, without images of 1 of 3 classes")
    report.main([str(tmp_path / "run")])
    assert "without images of 1 of 3 classes" in (tmp_path / "run" / "report.html").read_text()
    for picture in ("confusion", "recall"):
        plots.main([picture, str(tmp_path / "run")])
        assert (tmp_path / "run" / "plots" / f"{picture}_test.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_policy_script_and_its_gallery_cope_with_a_missing_class(lacking, tmp_path):
    run = tmp_path / "run"
    flags = ["--data-path", str(lacking), "--output-dir", str(run)]
    policy_gradient.main([*SMALL_POLICY, *flags, "--epochs", "1"])
    found = evaluate(run / "checkpoint.pth", lacking, tmp_path / "tested", script=policy_gradient)
    assert found["absent_classes"] == ["bright"]
    assert rows_of(tmp_path / "tested" / "per_class_masked.csv")[0]["f1"] == ""
    gallery.main([str(run), "--data-path", str(lacking), "--split", "test", "-o", str(tmp_path / "masks.png")])
    with pytest.raises(UserError, match=r"test: has no image of the class bright\."):
        gallery.main([str(run), "--split", "test", "--classes", "bright", "-o", str(tmp_path / "other.png")])


def test_a_model_card_counts_the_absent_classes(lacking, trained, tmp_path):
    weights = shutil.copy(trained / "model_0.pth", tmp_path)
    evaluate(Path(weights), lacking, tmp_path)
    card = (run_export(Path(weights), tmp_path / "out") / "README.md").read_text()
    assert " No average includes the 1 class without images in this split.\n\n| metric" in card


def test_fine_tuning_onto_names_of_another_unicode_form_is_explained(tmp_path, capsys):
    names = [unicodedata.normalize(form, "Schädel") for form in ("NFC", "NFD")]
    sets = [
        write_image_folder(tmp_path / form, ("dark", name), images=8) for form, name in zip("CD", names, strict=True)
    ]
    flags = [*SMALL, "--epochs", "1", "--output-dir"]
    normal.main([*flags, str(tmp_path / "first"), "--data-path", str(sets[0])])
    weights = str(tmp_path / "first" / "model_0.pth")
    normal.main([*flags, str(tmp_path / "second"), "--data-path", str(sets[1]), "--finetune", weights])
    apart = "'Scha\\u0308del' and 'Sch\\xe4del' look the same but differ in their Unicode form"
    assert apart in capsys.readouterr().out
    with pytest.raises(UserError) as caught:
        evaluate(Path(weights), sets[1], tmp_path / "tested")
    assert apart in str(caught.value)


@pytest.mark.slow
def test_two_processes_give_the_same_as_one(lacking, trained, tmp_path):
    one = evaluate(trained / "model_0.pth", lacking, tmp_path / "one")
    flags = ("--data-path", lacking, "--output-dir", tmp_path / "two", "--test-only", "--split", "test")
    run_ranks("_normal/train.py", *SMALL, *flags, "--resume", trained / "model_0.pth", processes=2)
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["absent_classes"] == one["absent_classes"] == ["bright"]
    assert two["metrics"]["clean"] == pytest.approx(one["metrics"]["clean"], abs=1e-6)
    for name, interval in one["intervals"]["clean"].items():
        assert two["intervals"]["clean"][name] == pytest.approx(interval, abs=1e-6)
    assert (tmp_path / "two" / "per_class.csv").read_bytes() == (tmp_path / "one" / "per_class.csv").read_bytes()
    assert np.array_equal(
        *(read_run_folder(tmp_path / name).evaluations["clean"].outcome.targets for name in ("one", "two"))
    )
