"""The reliability diagram and the recall by frequency: points, intervals, lines, their commands, and the report."""

import csv
import json
from datetime import datetime

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.finished_runs import undrawn, write_run  # noqa: F401
from utils import plots, report
from utils.results import figures
from utils.results.confusion import recall_by_frequency
from utils.results.figures import as_png, as_svg
from utils.results.intervals import wilson_intervals
from utils.results.metrics import Outcome, outcome_of
from utils.results.reliability import reliability_diagram
from utils.runtime.errors import UserError


def bars(collection) -> list[tuple[float, float, float]]:
    """Position and both ends of each vertical line."""
    return [(x, *sorted((low, high))) for (x, low), (_, high) in np.array(collection.get_segments()).tolist()]


def test_the_reliability_diagram_shows_accuracy_over_confidence():
    right, confidences = np.array([1, 0, 1, 1, 0]), np.array([0.61, 0.65, 0.98, 0.98, 0.4])
    outcome = Outcome(np.zeros(5, int), 1 - right, 2 - right, np.zeros(5), 2, confidences)
    figure = reliability_diagram(outcome, "test", "A note.")
    upper, lower = figure.axes
    diagonal, curve = upper.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert curve.get_xydata() == pytest.approx(np.array([[0.4, 0], [0.63, 0.5], [0.98, 1]]))
    assert curve.get_label() == f"accuracy of a bin; calibration error {(0.4 + 0.26 + 0.04) / 5:.3f}"
    ends = zip(*wilson_intervals(np.array([0, 1, 2]), np.array([1, 2, 2])), strict=True)
    expected = [(x, *pair) for x, pair in zip((0.4, 0.63, 0.98), ends, strict=True)]
    assert bars(upper.collections[0]) == [pytest.approx(line) for line in expected]
    assert [bar.get_height() for bar in lower.patches] == [0] * 5 + [0.2] + [0] * 3 + [0.4] + [0] * 4 + [0.4]
    assert lower.patches[9].get_x() == pytest.approx(9 / 15)
    assert upper.get_title() == "Reliability, 5 images\ntest\nA note."
    assert upper.get_xlim() == lower.get_xlim() == (0, 1)


def test_the_reliability_of_one_image_can_be_drawn_and_that_of_nan_cannot():
    outcome = outcome_of(torch.tensor([[99.0, 0.0]]), torch.tensor([0]), calibration=True)
    assert as_svg(reliability_diagram(outcome)) == as_svg(reliability_diagram(outcome))
    for bad in (outcome._replace(confidences=None), outcome._replace(confidences=np.array([np.nan]))):
        with pytest.raises(UserError, match="Reliability: the probabilities of this evaluation are missing or not"):
            reliability_diagram(bad)


def test_recall_is_drawn_over_the_training_images():
    targets, predictions = [0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 0]
    axes = recall_by_frequency(targets, predictions, [40, 7, 300, 9], "test").axes[0]  # class 3 has no images
    points, intervals = axes.collections
    assert points.get_offsets().tolist() == [[40, 0.5], [7, 1], [300, 0]]
    ends = zip(*wilson_intervals(np.array([1, 3, 0]), np.array([2, 3, 1])), strict=True)
    expected = [(x, *pair) for x, pair in zip((40, 7, 300), ends, strict=True)]
    assert bars(intervals) == [pytest.approx(line) for line in expected]
    assert axes.get_xscale() == "log" and axes.get_ylim() == (0, 1)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a class", "its 95 % interval"]
    assert axes.get_title() == "Recall by class frequency, 6 images\ntest"


def test_thirds_of_the_classes_have_their_mean_recall():
    each = np.arange(7)
    predictions = np.where(each < 4, each, 0)  # classes 0 to 3 are recognised
    axes = recall_by_frequency(each, predictions, [1000, 2, 30, 40, 500, 70, 80]).axes[0]
    # By frequency: classes 1, 2, 3, then 5 and 6, then 4 and 0.
    expected = [[[2 / 1.02, 1], [40 * 1.02, 1]], [[70 / 1.02, 0], [80 * 1.02, 0]], [[500 / 1.02, 0.5], [1020, 0.5]]]
    assert axes.collections[2].get_segments() == [pytest.approx(np.array(line)) for line in expected]
    assert axes.get_legend().get_texts()[2].get_text() == "mean recall of a third of the classes: 1.00, 0.00, 0.50"
    tied = recall_by_frequency(each, predictions, [50, 50, 50, 50, 50, 9, 60]).axes[0]  # no middle third
    assert tied.get_legend().get_texts()[2].get_text() == f"mean recall of a third of the classes: {4 / 6:.2f}, 0.00"
    even = recall_by_frequency(each, predictions, [50] * 7)
    assert len(even.axes[0].collections) == 2  # classes of one size have no thirds
    assert as_png(even) == as_png(recall_by_frequency(each, predictions, [50] * 7))


def test_classes_without_training_images_are_left_out():
    axes = recall_by_frequency([0, 1], [0, 1], [0, 5]).axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[5, 1]]
    as_png(recall_by_frequency([0, 1], [0, 1], [0, 0]))


# Commands and the report


def without_columns(folder, file: str, *names: str) -> None:
    """Write a table as an older version did."""
    with (folder / file).open(newline="") as table:
        rows = [{key: cell for key, cell in row.items() if key not in names} for row in csv.DictReader(table)]
    with (folder / file).open("w", newline="") as table:
        writer = csv.DictWriter(table, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_the_commands_write_their_pictures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "DOTS_PER_INCH", 40)
    folder = write_run(tmp_path / "run")
    for name in ("frequency", "reliability"):
        plots.main([name, str(folder)])
        path = folder / "plots" / f"{name}_test.png"
        assert capsys.readouterr().out == f"{path}\n"
        assert Image.open(path).width > 80
    without_columns(folder, "per_class.csv", "train_images")
    with pytest.raises(UserError, match=r"the numbers of training images are missing\. --test-only takes them from"):
        plots.main(["frequency", str(folder)])
    without_columns(folder, "predictions.csv", "probability", "brier")
    with pytest.raises(UserError, match="Reliability: the probabilities of this evaluation are missing"):
        plots.main(["reliability", str(folder)])


@pytest.mark.parametrize(
    ("file", "column", "value", "message"),
    [
        ("predictions.csv", "probability", "1.5", "a probability is not in 0 to 1"),
        ("predictions.csv", "brier", "-1", "a brier is not in 0 to 2"),
        ("predictions.csv", "brier", "high", "could not convert string to float"),
        ("per_class.csv", "train_images", "-3", "a number of training images is not in 0 to 1,000,000,000,000"),
        ("per_class.csv", "train_images", "9" * 40, "a number of training images is not in 0 to 1,000,000,000,000"),
        ("per_class.csv", "train_images", "many", "invalid literal for int"),
    ],
)
def test_edited_tables_are_refused(tmp_path, file, column, value, message):
    folder = write_run(tmp_path / "run")
    with (folder / file).open(newline="") as table:
        rows = list(csv.DictReader(table))
    rows[0][column] = value
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (folder / file).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        plots.main(["reliability", str(folder)])


@pytest.mark.usefixtures("undrawn")
def test_the_report_shows_calibration_and_frequency(tmp_path):
    folder = write_run(tmp_path / "run")
    run = report.read_run_folder(folder)
    (evaluation,) = report.describe_run("run", run, datetime.now().astimezone())["evaluations"]
    metrics, intervals = (json.loads((folder / "metrics.json").read_text())[name] for name in ("metrics", "intervals"))
    for name in ("ece", "brier"):
        expected = {"value": metrics["clean"][name], "interval": intervals["clean"][name]}
        assert evaluation["metrics"][name] == expected
    assert [shown["title"] for shown in evaluation["pictures"]][2:] == [
        "Recall by class frequency, without masks", "Reliability, without masks"
    ]  # fmt: skip
    assert [row["train_images"] for row in evaluation["table"]] == ["10", "20", "30"]
    page = report.page([run]).decode()
    assert "Calibration error (ECE)" in page and '<th class="number">Training images</th>' in page


@pytest.mark.usefixtures("undrawn")
def test_the_report_of_an_older_version_leaves_them_out(tmp_path):
    new, old = write_run(tmp_path / "new"), write_run(tmp_path / "old")
    without_columns(old, "per_class.csv", "train_images")
    without_columns(old, "predictions.csv", "brier")
    content = json.loads((old / "metrics.json").read_text())
    for values in (content["metrics"]["clean"], content["intervals"]["clean"]):
        del values["ece"], values["brier"]
    (old / "metrics.json").write_text(json.dumps(content))
    run = report.read_run_folder(old)
    assert run.notes == []
    page = report.page([run]).decode()
    for text in ("Calibration", "Brier", "Training images", "class frequency"):
        assert text not in page
    assert "Reliability, without masks" in page  # older versions wrote the probabilities
    both = report.page([report.read_run_folder(folder) for folder in (new, old)]).decode()
    assert both.count("Brier score</th>") == 1
