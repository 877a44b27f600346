"""utils.probe: results that are those of scikit-learn on the stored features, paired draws, refused input."""

import csv
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler

from tests.conftest import write_image
from tests.helpers.exports import random_model, write_checkpoint
from utils import probe as command
from utils.checkpoints import checkpoint
from utils.inference.probes import few_shots
from utils.runtime.errors import UserError

CLASSES = ("first", "second", "third")
SHOTS, DRAWS = (2, 5), 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three classes that are hard to tell apart: noise of slightly different levels."""
    root = tmp_path_factory.mktemp("hard")
    for split, images in (("train", 9), ("val", 7), ("test", 12)):
        for level, name in enumerate(CLASSES):
            for number in range(images):
                noise = np.random.default_rng([images, level, number]).normal(100 + 2 * level, 20, (12, 12))
                write_image(root / split / name / f"{number}.png", noise.clip(0, 255))
    return root


def probe(output: Path, data: Path, *words: object) -> None:
    command.main(["--data-path", str(data), "-o", str(output), "--device", "cpu", "-j", "0", *map(str, words)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two weight files of random networks."""
    folder = tmp_path_factory.mktemp("weights")
    first = write_checkpoint(folder / "first.pth")
    state = checkpoint.weights_state(random_model(seed=1), ["a", "b", "c"], checkpoint.read(first)["args"])
    checkpoint.save(folder / "second.pth", state)
    return [first, folder / "second.pth"]


@pytest.fixture(scope="module")
def output(tmp_path_factory, weights, data):
    folder = tmp_path_factory.mktemp("probe") / "output"
    probe(folder, data, *weights, "--shots", *SHOTS, "--draws", DRAWS)
    return folder


@pytest.fixture(scope="module")
def content(output):
    return json.loads((output / "probe.json").read_text())


def stored(output: Path, name: str, split: str) -> dict[str, np.ndarray]:
    [path] = (output / "features").glob(f"{name}-{split}-*.npz")
    with np.load(path) as arrays:
        return dict(arrays)


def test_results_are_those_of_scikit_learn_on_the_stored_features(output, content, weights):
    checked = 0
    for result in content["results"]:
        if result["probe"] != "logistic":
            continue
        train, val, test = (stored(output, Path(result["weights"]).stem, name) for name in ("train", "val", "test"))
        if result["shots"] is not None:
            for split, name in ((train, "train"), (val, "val")):
                rows = few_shots(split["targets"], 3, result["shots"], result["draw"], 0, name)
                split |= {key: array[rows] for key, array in split.items()}
        scaler = StandardScaler().fit(train["values"])
        model = LogisticRegression(C=result["parameter"], max_iter=1000)
        model.fit(scaler.transform(train["values"]), train["targets"])
        for split, value in ((val, result["val_f1"]), (test, result["metrics"]["f1"])):
            predictions = model.predict(scaler.transform(split["values"]))
            assert value == pytest.approx(f1_score(split["targets"], predictions, average="macro"))
        checked += 1
    assert checked == len(weights) * (1 + len(SHOTS) * DRAWS)


def test_the_json_records_weights_data_and_settings(content, weights, data):
    first, second = content["weights"]
    assert [entry["name"] for entry in content["weights"]] == list(map(str, weights))
    assert second["sha256"] == hashlib.sha256(weights[1].read_bytes()).hexdigest()
    assert (first["model"], first["heated"], first["features"]) == ("test_resnet", False, 96)
    assert first["preparation"]["val_resize_size"] == 36
    assert content["classes"] == list(CLASSES)
    assert content["data"]["test"] == {"root": str(data / "test"), "images": 36, "read": 36}
    assert content["settings"]["shots"] == list(SHOTS)
    assert "scikit-learn" in content["origin"]["versions"]
    assert content["origin"]["command"].startswith("python -m utils.probe --data-path ")


def test_the_table_has_a_line_per_result_and_metric(output, content):
    rows = list(csv.DictReader((output / "probe.csv").read_text().splitlines()))
    expected = [
        (result["weights"], result["probe"], str(result["shots"] or "all"), metric, pytest.approx(value, abs=1e-6))
        for result in content["results"]
        for metric, value in result["metrics"].items()
    ]
    assert [(r["weights"], r["probe"], r["shots"], r["metric"], float(r["value"])) for r in rows] == expected
    assert {row["draw"] for row in rows if row["shots"] == "2"} == {"0", "1"}


def test_differences_are_paired_by_draw(content, weights):
    def values(name, shots):
        found = [r for r in content["results"] if (r["weights"], r["probe"], r["shots"]) == (str(name), "knn", shots)]
        return np.array([result["metrics"]["top1"] for result in found])

    assert len(content["differences"]) == 2 * (1 + len(SHOTS)) * 3  # probes, shots, metrics
    for difference in content["differences"]:
        if (difference["probe"], difference["metric"]) == ("knn", "top1"):
            expected = values(weights[1], difference["shots"]) - values(weights[0], difference["shots"])
            assert difference["mean"] == pytest.approx(expected.mean())
            low, high = difference["interval"] or [0, 0]
            assert low <= difference["mean"] <= high


def test_the_picture_is_as_wide_as_its_panels(output):
    with Image.open(output / "probe.png") as picture:
        assert 900 < picture.width < 1300
        assert 400 < picture.height < 800


@pytest.mark.slow
def test_a_second_run_gives_the_same_from_the_stored_features(output, content, weights, data, capsys):
    before = {name: (output / name).read_bytes() for name in ("probe.csv", "probe.png")}
    with pytest.raises(UserError, match=r"probe.json: already exists; give another --output-dir, or --overwrite"):
        probe(output, data, weights[0])
    words = (*weights, "--shots", *SHOTS, "--draws", DRAWS, "--overwrite")
    probe(output, data, *words)
    printed = capsys.readouterr().out
    assert printed.count("features reused from") == 6
    assert {name: (output / name).read_bytes() for name in before} == before
    again = json.loads((output / "probe.json").read_text())
    assert (again["results"], again["differences"]) == (content["results"], content["differences"])
    lines = [line for line in printed.splitlines() if line.startswith(f"{weights[1]}  ")]
    assert len(lines) == 2 * 2 * (1 + len(SHOTS))  # results and differences of both probes


def test_without_shots_an_old_picture_does_not_stay(tmp_path, weights, data, capsys):
    (tmp_path / "probe.png").write_bytes(b"old")
    probe(tmp_path, data, weights[0], "random", "--overwrite")
    assert sorted(os.listdir(tmp_path)) == ["features", "probe.csv", "probe.json"]
    assert json.loads((tmp_path / "probe.json").read_text())["weights"][1]["sha256"] is None
    assert "minus the first weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{0}", "{0}"), "first.pth: is given twice; give each file once"),
        (("{0}", "--draws", 3), "--draws: has no effect without --shots"),
        (("{0}", "--shots", 9), "--shots 9: the largest class has 9 training images; give a smaller number"),
        (("{0}", "--shots", 2, "--draws", 10_001), "--draws 10001: expected at most 10000"),
        (("absent.pth",), "absent.pth: no such file"),
        (("{0}", "--data-path", "nowhere"), "--data-path nowhere: no such folder; expected DATA/"),
        (("{0}", "-o", "{data}/train/x"), "x: lies among the images of --data-path; give another folder"),
        (("{0}", "--model", "resnet18"), "--model resnet18: .* was made with --model test_resnet"),
        (("{0}", "--exclude", "absent.txt"), "--exclude absent.txt: cannot be read"),
        (("{0}", "--device", "tpu"), "tpu"),
    ],
)
def test_bad_input_is_one_sentence(words, message, tmp_path, weights, data):
    with pytest.raises(UserError, match=message):
        probe(tmp_path, data, *(str(word).format(*weights, data=data) for word in words))
    assert not (tmp_path / "probe.json").exists()


def test_excluded_and_unreadable_images_are_left_out(tmp_path, weights, capsys):
    root = tmp_path / "data"
    for split, images in (("train", 5), ("val", 3), ("test", 3)):
        for level, name in enumerate(("a\nb", "=c")):
            for number in range(images):
                write_image(root / split / name / f"{number}.png", np.full((8, 8), 80 * level + number))
    (root / "train" / "=c" / "0.png").write_text("none")
    (tmp_path / "list.txt").write_text("train/=c/1.png\ntest/=c/2.png\n")
    words = ("--exclude", tmp_path / "list.txt", "--shots", 4)
    with pytest.raises(UserError, match=r"0.png: cannot be read as an image"):
        probe(tmp_path / "output", root, weights[0], *words)
    probe(tmp_path / "output", root, weights[0], *words, "--bad-images", "skip", "--draws", 1)
    content = json.loads((tmp_path / "output" / "probe.json").read_text())
    counts = {name: (split["images"], split["read"]) for name, split in content["data"].items()}
    assert counts == {"train": (9, 8), "val": (6, 6), "test": (5, 5)}
    printed = capsys.readouterr().out
    assert "1 unreadable images were skipped" in printed
    assert "leaves out 1 of train, 0 of val, 1 of test; lines that name no image: 0" in printed


def test_features_of_another_width_are_computed_again(tmp_path, weights, data, capsys):
    probe(tmp_path, data, weights[0])
    table = (tmp_path / "probe.csv").read_bytes()
    [path] = (tmp_path / "features").glob("first-train-*.npz")
    arrays = stored(tmp_path, "first", "train")
    np.savez(path, **{**arrays, "values": arrays["values"][:, :5]})
    probe(tmp_path, data, weights[0], "--overwrite")
    assert f"{path}: is damaged; the features are computed again." in capsys.readouterr().out
    assert (tmp_path / "probe.csv").read_bytes() == table
