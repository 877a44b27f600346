"""Pictures of logs and predictions: their lines, bars and labels, and the commands that draw them."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import recall_score

from utils import plots
from utils.checkpoints.checkpoint import HEATED
from utils.results import curves, figures
from utils.results.confusion import confusion_matrix, count_pairs, per_class_recall
from utils.results.curves import CURVES, braced, learning_curves, policy_health
from utils.results.figures import as_png, as_svg, as_text, shorten
from utils.results.provenance import same_but_seed
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script

NORMAL = [
    {"epoch": 0, "lr_classifier": 0.1, "train_loss": 1.5, "train_top1": 0.25, "val_loss": 1.25, "val_top1": 0.5,
     "val_f1": 0.4, "val_balanced_accuracy": 0.45, "images_per_second": 100.0},
    {"epoch": 1, "lr_classifier": 0.01, "train_loss": 1.0, "train_top1": 0.5, "val_loss": 1.0, "val_top1": 0.6,
     "val_f1": 0.5, "val_balanced_accuracy": 0.55, "images_per_second": 90.0, "val_auroc": None},
]  # fmt: skip
POLICY = [
    line | {"train_cross_entropy": 2.0, "lr_policy": 0.01, "mask_mean": 0.5, "prior_drift": 0.1 * line["epoch"]}
    for line in NORMAL
]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def panel(figure, title):
    return figure.axes[titles(figure).index(title)]


def points(line):
    return list(map(tuple, line.get_xydata().tolist()))


def test_learning_curves_hold_the_values_of_the_log():
    figure = learning_curves({"_normal/run": NORMAL})
    keys = {*NORMAL[0], "train_cross_entropy"} - {"train_loss"}  # without masks the loss is a cross-entropy
    assert titles(figure) == [panel.title for panel in CURVES if panel.key in keys]
    assert points(*panel(figure, "Training cross-entropy").lines) == [(0, 1.5), (1, 1.0)]
    (line,) = panel(figure, "Validation macro F1").lines
    assert points(line) == [(0, 0.4), (1, 0.5)]
    assert figure.get_suptitle() == "Learning curves: _normal/run"
    assert panel(figure, "Validation cross-entropy").get_ylabel() == "nats"
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch, from 0"}
    assert panel(figure, "Learning rate of the classifier").get_yscale() == "log"
    assert panel(figure, "Validation macro F1").get_yscale() == "linear"


def test_several_runs_share_panels_with_distinct_lines():
    runs = {"_normal": NORMAL, "$a$": POLICY, "empty": [{"epoch": 0}]}
    figure = learning_curves(runs)
    first, second = panel(figure, "Training cross-entropy").lines
    for attribute in ("get_color", "get_linestyle", "get_marker"):
        assert getattr(first, attribute)() != getattr(second, attribute)()
    assert points(second) == [(0, 2.0), (1, 2.0)]
    (only,) = panel(figure, "Training objective").lines  # the first run has no objective but its cross-entropy
    assert points(only) == [(0, 1.5), (1, 1.0)]
    assert only.get_color() == second.get_color()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [" _normal", r"\$a\$"]


def test_a_single_epoch_has_a_marker_and_missing_values_are_skipped():
    (line,) = panel(learning_curves({"run": NORMAL[:1]}), "Training cross-entropy").lines
    assert (points(line), line.get_marker(), line.get_markevery()) == ([(0, 1.5)], "o", 1)
    lines = [{"epoch": epoch, "val_loss": value} for epoch, value in enumerate((1.0, None, float("nan"), 2.0))]
    (line,) = panel(learning_curves({"run": lines}), "Validation cross-entropy").lines
    assert points(line) == [(0, 1.0), (3, 2.0)]


@pytest.mark.parametrize(
    ("values", "scale", "ticks"),
    [
        ((0.5, 4.9), "linear", None),
        ((0.5, 5.0), "log", ["0.5", "1", "2", "5"]),
        ((0.05, 6.0), "log", ["0.1", "1"]),
        ((0.0, 5.0), "linear", None),
    ],
)
def test_widely_spread_losses_have_a_logarithmic_axis(values, scale, ticks):
    lines = [{"epoch": epoch, "val_loss": value} for epoch, value in enumerate(values)]
    axes = panel(learning_curves({"run": lines}), "Validation cross-entropy")
    assert axes.get_yscale() == scale
    if ticks:
        low, high = axes.get_ylim()
        places = [place for place in axes.yaxis.get_majorticklocs() if low <= place <= high]
        labels = axes.yaxis.get_major_formatter().format_ticks(places)
        assert labels == ticks
    assert panel(learning_curves({"run": [{"epoch": n, "val_f1": f1} for n, f1 in enumerate((0.01, 0.9))]}),
                 "Validation macro F1").get_yscale() == "linear"  # fmt: skip


@pytest.mark.parametrize(
    ("key", "values", "limits", "good"),
    [
        ("mask_mean", (0.5, 0.45), (0, 1), (0.2, 0.8)),
        ("mask_mean", (1.0, 0.9), (0, 1.1), (0.2, 0.8)),  # with another --mask-range
        ("mask_std_between_images", (0.011, 0.01), (0, 0.03), (0.02, 0.03)),
        ("mask_std_between_images", (0.1, 0.2), (0, 0.22), (0.02, 0.22)),
        ("advantage_std", (0.0, 0.0), (0, 1), None),
    ],
)
def test_quantities_that_cannot_be_negative_are_drawn_from_0(key, values, limits, good):
    lines = [{"epoch": epoch, key: value} for epoch, value in enumerate(values)]
    (axes,) = policy_health({"run": lines}).axes
    assert axes.get_ylim() == pytest.approx(limits)
    shades = [(shade.get_y(), shade.get_y() + shade.get_height()) for shade in axes.patches]
    assert shades == ([pytest.approx(good)] if good else [])


def test_health_shows_what_to_compare_with_and_whole_lines():
    lines = [{"epoch": epoch, "policy_entropy": value} for epoch, value in enumerate((-0.5, -0.2))]
    (axes,) = policy_health({"run": lines}).axes
    curve, uniform = axes.lines
    assert points(curve) == [(0, -0.5), (1, -0.2)] and not curve.get_clip_on()
    assert list(uniform.get_ydata()) == [0, 0]
    assert axes.get_ylim()[0] < -0.5 and axes.get_ylim()[1] > 0
    assert axes.texts[0].get_text() == "line: uniform noise; below: more certain"


def test_seeds_share_a_line_with_a_band():
    runs = {
        f"run/seed{seed}/fit": [{"epoch": epoch, "val_f1": value} for epoch, value in enumerate(values)]
        for seed, values in enumerate(((0.1, 0.3, 0.5), (0.3, 0.7), (0.2, 0.2, 0.4)))
    }
    figure = learning_curves({"alone": NORMAL, **runs}, groups=[list(runs)])
    alone, mean = panel(figure, "Validation macro F1").lines
    assert points(alone) == [(0, 0.4), (1, 0.5)]
    assert points(mean) == [(0, pytest.approx(0.2)), (1, pytest.approx(0.4))]  # at the epochs that all have
    (band,) = panel(figure, "Validation macro F1").collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(0, 0.1), (0, 0.3), (1, 0.2), (1, 0.7)}
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["alone", "run/seed{0,1,2}/fit: mean and range of 3 seeds"]
    figure = learning_curves(runs, groups=[list(runs)])
    assert figure.get_suptitle() == f"Learning curves: {names[1]}"


def test_names_that_differ_in_one_place_are_braced():
    assert braced(["a/seed1/x", "a/seed10/x"]) == "a/seed{1,10}/x"
    assert braced(["seed10", "seed20"]) == "seed{10,20}"
    assert braced(["x/a", "x/ab"]) == "x/a{,b}"
    assert braced(["a", "b"]) == "{a,b}"


def test_policy_health_shows_the_quantities_of_the_log():
    figure = policy_health({"run": POLICY})
    assert titles(figure) == ["Mean of the masks", "Drift of the prior"]
    assert points(panel(figure, "Drift of the prior").lines[0]) == [(0, 0), (1, 0.1)]
    with pytest.raises(UserError, match="Health of the policy: the log of _normal/run holds none of these quantities"):
        policy_health({"_normal/run": NORMAL})


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=30))
def test_counts_of_pairs_are_scikit_learns(pairs):
    targets, predictions = [target for target, _ in pairs], [prediction for _, prediction in pairs]
    expected = sklearn_confusion(targets, predictions, labels=range(5)) if pairs else np.zeros((5, 5))
    assert np.array_equal(count_pairs(targets, predictions, 5), expected)


def test_the_confusion_matrix_is_normalised_by_row():
    figure = confusion_matrix([0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0], ["dark", "bright", "none"])
    axes = figure.axes[0]
    shares = axes.images[0].get_array()
    assert shares.filled(0).tolist() == [[0.5, 0.5, 0], [0.25, 0.75, 0], [0, 0, 0]]
    assert shares.mask.tolist() == [[False, False, True], [False, False, True], [True, True, True]]  # empty
    assert axes.images[0].cmap.get_bad()[3] == 0  # transparent
    (grey,) = axes.patches  # the row of the class without images
    assert (grey.get_y(), grey.get_height()) == (1.5, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dark (2)", "bright (4)", "none (0)"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["dark", "bright", "none"]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): ".50", (1, 0): ".50", (0, 1): ".25", (1, 1): ".75"
    }  # fmt: skip


def test_many_classes_are_all_named_without_numbers_in_cells():
    classes, each = [f"class {number}" for number in range(60)], np.arange(60).repeat(2)
    axes = confusion_matrix(each, each[::-1], classes).axes[0]
    assert np.array_equal(axes.images[0].get_array().filled(0), np.eye(60)[::-1])
    assert (len(axes.texts), len(axes.get_xticklabels()), len(axes.get_yticklabels())) == (0, 60, 60)
    figure = per_class_recall(each, each, classes)
    assert len(figure.axes[0].patches) == 60
    inches_per_class = figure.get_figheight() / 60
    assert figure.axes[0].get_yticklabels()[0].get_fontsize() / 72 < inches_per_class  # labels do not overlap


def test_recall_is_scikit_learns_sorted_with_the_number_of_images():
    targets, predictions = [0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 0]
    axes = per_class_recall(targets, predictions, ["a", "b", "c", "d"]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1, 0.5, 0, 0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b (3)", "a (2)", "c (1)", "d (0)"]
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.50", "0.00", "no images"]
    (mean,) = axes.lines
    assert mean.get_xdata()[0] == pytest.approx(recall_score(targets, predictions, average="macro"))


def test_names_are_drawn_literally_and_long_ones_shortened():
    assert as_text("a_$b$\udcff\n") == r"a_\$b\$\udcff\n"
    assert shorten("x" * 48) == "x" * 48
    assert shorten("a" * 50 + "b" * 50) == "a" * 23 + "…" + "b" * 23
    figure = confusion_matrix([0], [0], ["$\\frac \udcff"])
    assert Image.open(io.BytesIO(as_png(figure))).format == "PNG"


def test_files_are_reproducible_and_hold_no_date():
    first, second = (per_class_recall([0, 1], [0, 0], ["a", "b"]) for _ in range(2))
    assert as_png(first) == as_png(second)
    assert as_svg(first) == as_svg(second)
    assert not Image.open(io.BytesIO(as_png(first))).text
    assert b"<dc:date>" not in as_svg(first)


# Commands


@pytest.fixture
def run(tmp_path):
    """The folder of a run with two epochs and the tables of --test-only."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in POLICY))
    for suffix, predictions in (("", "abb"), ("_masked", "aba")):
        rows = [f"{target},{prediction},1,0.1\n" for target, prediction in zip("aab", predictions, strict=True)]
        (folder / f"predictions{suffix}.csv").write_text("target,prediction,true_rank,loss\n" + "".join(rows))
        (folder / f"per_class{suffix}.csv").write_text("class,images,precision,recall,f1\nb,1,0,0,0\na,2,0,0,0\n")
    write_metrics(folder, metrics={"clean": {"top1": 0.5}, "masked": {}})
    return folder


def write_metrics(folder, **changes):
    content = {"metrics": {"clean": {"top1": 0.5}}, "split": "val", "weights": "run/model_best.pth"}
    (folder / "metrics.json").write_text(json.dumps(content | changes))


def test_every_command_writes_its_picture(run, capsys, monkeypatch):
    monkeypatch.setattr(figures, "DOTS_PER_INCH", 40)
    monkeypatch.setattr(curves, "CURVES", CURVES[1:2])
    for name in ("curves", "health", "confusion_val", "recall_val", "confusion_val_masked"):
        plots.main([name.split("_")[0], str(run), *(["--masked"] if name.endswith("masked") else [])])
        path = run / "plots" / f"{name}.png"
        assert capsys.readouterr().out == f"{path}\n"
        assert Image.open(path).width > 80
    plots.main(["curves", str(run)])  # pictures in the run's own folder are replaced
    two = ["curves", str(run), f"{run}/.", "-o", str(run / "two.svg")]
    plots.main(two)
    with pytest.raises(UserError, match=r"two.svg: already exists; give another --output, or --overwrite"):
        plots.main(two)
    plots.main([*two, "--overwrite"])
    assert (run / "two.svg").read_bytes().startswith(b"<?xml")


def test_pictures_name_split_and_weights_and_never_substitute_them(run, monkeypatch):
    drawn = []
    monkeypatch.setitem(plots.CLASS_PICTURES, "confusion", lambda *args: drawn.append(args) or confusion_matrix(*args))
    write_metrics(run, heated=True)
    plots.main(["confusion", str(run)])
    write_metrics(run, split="test")
    plots.main(["confusion", str(run)])
    assert {path.name for path in (run / "plots").iterdir()} == {"confusion_val.png", "confusion_test.png"}
    what = "val, without masks, weights model_best.pth (chosen on this split)"
    assert [(*args[2:], args[0].tolist()) for args in drawn] == [
        (["b", "a"], what, HEATED, [1, 1, 0]),
        (["b", "a"], "test, without masks, weights model_best.pth", "", [1, 1, 0]),
    ]
    title = confusion_matrix(*drawn[0]).axes[0].get_title()
    assert title.split("\n")[:2] == ["Confusion, 3 images", what]
    assert title.split("\n", 2)[2].replace("\n", " ") == HEATED
    with pytest.raises(UserError, match="holds no result with mean masks; run --test-only again"):
        plots.main(["confusion", str(run), "--masked"])
    write_metrics(run, split="../x")
    with pytest.raises(UserError, match=r"metrics.json: does not hold what --test-only writes there"):
        plots.main(["confusion", str(run)])


def write_start(folder, command):
    folder.mkdir(parents=True)
    start = {
        "command": command,
        "time": "",
        "device": "CPU",
        "machine": "",
        "processes": 1,
        "versions": {},
        "commit": None,
    }
    (folder / "run.json").write_text(json.dumps({"starts": [start]}))
    return str(folder)


def test_runs_that_differ_only_in_their_seed_are_grouped(tmp_path):
    commands = {
        "a0": "_normal/train.py --lr 0.1 --output-dir a0 --finetune x/seed0/w10.pth",
        "a1": "_normal/train.py --seed 1 -j 4 --finetune=x/seed1/w10.pth --lr 0.1 --resume auto --output-dir a1",
        "b0": "_normal/train.py --lr 0.1 --seed 0 --output-dir b0 --finetune y/seed0/w10.pth",
        "c1": "_normal/train.py --lr 0.2 --seed 1 --finetune x/seed1/w10.pth",
        "d1": "_policy_gradient/train.py --lr 0.2 --mean -0.5 --seed 1",
        "d2": "_policy_gradient/train.py --mean -0.5 --lr 0.2 --seed 2",
        "e1": "_normal/train.py --seed 1",
        "e2": "_normal/train.py --seed 2",
        "e2again": "_normal/train.py --seed 2 --output-dir e2again",  # the same seed twice is no band over seeds
        "damaged": "_normal/train.py 'open",
    }
    folders = {name: write_start(tmp_path / name, command) for name, command in commands.items()}
    (tmp_path / "none").mkdir()
    found = same_but_seed([*folders.values(), str(tmp_path / "none")])
    assert found == [[folders["a0"], folders["a1"]], [folders["d1"], folders["d2"]]]


@pytest.mark.parametrize(
    ("name", "content", "command", "message"),
    [
        ("log.jsonl", b"", "curves", "has no log.jsonl with a finished epoch"),
        ("log.jsonl", b"{}\n", "curves", "holds a line that is not the JSON of an epoch"),
        ("predictions.csv", None, "confusion", "predictions.csv: no such file; --test-only"),
        ("predictions.csv", b"\xff\x00", "recall", "cannot be read as a table"),
        ("per_class.csv", b"class\na\n", "confusion", "expected rows with class, images"),
        ("plots", b"", "curves", "plots: cannot be created"),
    ],
)
def test_damaged_files_end_a_command_with_one_sentence(run, name, content, command, message):
    (run / name).unlink(missing_ok=True)
    if content is not None:
        (run / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        plots.main([command, str(run)])
    assert not (run / "plots").is_dir()


def test_a_bad_output_ends_with_exit_code_2(run, capsys):
    for output, message in (("a.jpg", "expected a name that ends in"), ("log.jsonl/a.png", "cannot be created")):
        with pytest.raises(SystemExit) as end:
            run_script(lambda path=run / output: plots.main(["curves", str(run), "-o", str(path)]))
        assert end.value.code == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
    plots.main(["curves", str(run), "-o", str(run / "new" / "folder" / "a.png")])  # folders are made
