"""experiments/shifts.py: changed images by hand, values that are those of the runs' own tests, and resumed files."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss, recall_score
from sklearn.utils.class_weight import compute_sample_weight

from _normal import train as normal
from experiments import image_changes, paired_tables, shifts
from experiments.plan import read_plan
from experiments.subsets import link_subset
from tests.conftest import SMALL
from tests.helpers.exports import random_model
from tests.helpers.finished_runs import finish
from tests.helpers.parsing import parse
from utils.checkpoints import checkpoint
from utils.runtime.errors import UserError

CLASSES = ["bright", "dark", "striped"]
PLAN = """
from experiments.plan import Arm, Contrast, Plan, Stage, Subset

SUBSET = Subset(shots=4, draw="seed", test="rest")
def arm(name, keep=("model_best.pth",)):
    return Arm(name, (Stage("training", "_normal", "--epochs 1", test="three", subset=SUBSET, keep=keep),), 2)

PLAN = Plan("shifts", "?", (arm("plain"), arm("masked"), arm("other")), "plain", (Contrast("x", "masked", "plain"),))
"""


def images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_name(images, noise=None):
    return dict(image_changes.shifted(images, torch.zeros(images.shape) if noise is None else noise))


def test_changes_of_levels_equal_those_by_hand():
    x = images(3, 1, 24, 24)
    changed, levels = by_name(x), x.double()
    mean = levels.mean((1, 2, 3), keepdim=True)
    expected = {
        "contrast x 0.7": mean + 0.7 * (levels - mean),
        "contrast x 1.4": mean + 1.4 * (levels - mean),
        "gamma 0.7": 255 * (levels / 255) ** 0.7,
        "gamma 1.4": 255 * (levels / 255) ** 1.4,
    }
    for name, values in expected.items():
        assert changed[name].dtype == torch.uint8
        assert (changed[name] - values.clamp(0, 255)).abs().max() <= 1.01, name  # torchvision truncates
    assert changed["clean"] is x


def test_noise_has_the_stated_strength_and_depends_on_the_place_only():
    x = torch.full((2, 1, 128, 128), 100, dtype=torch.uint8)
    changed = by_name(x, image_changes.image_noise([5, 9], (1, 128, 128)))
    for name, deviation in (("noise 0.05", 12.75), ("noise 0.1", 25.5), ("speckle 0.2", 20), ("speckle 0.4", 40)):
        assert changed[name].double().std().item() == pytest.approx(deviation, rel=0.03), name
    again = image_changes.image_noise([9], (1, 128, 128))
    assert torch.equal(again[0], image_changes.image_noise([5, 9], (1, 128, 128))[1])
    assert abs(np.corrcoef(again.flatten(), image_changes.image_noise([5], (1, 128, 128)).flatten())[0, 1]) < 0.03
    unchanged = by_name(x)
    assert all(torch.equal(unchanged[name], x) for name in ("noise 0.05", "noise 0.1", "speckle 0.2", "speckle 0.4"))


def test_blur_resolution_and_border_at_48_pixels():
    point = torch.zeros(1, 1, 48, 48, dtype=torch.uint8)
    point[0, 0, 24, 24] = 255
    changed = by_name(point)
    for name, sigma in (("blur S / 48", 1), ("blur S / 24", 2)):  # a point becomes the Gaussian's centre
        assert changed[name].max().item() == pytest.approx(255 / (2 * np.pi * sigma**2), abs=1.5)
    rows = (torch.arange(48) % 2 * 200).to(torch.uint8).expand(1, 1, 48, 48)  # stripes, lost at half the resolution
    assert (by_name(rows)["resolution S / 2"][..., 8:-8].int() - 100).abs().max() <= 30
    white = by_name(torch.full((1, 3, 48, 48), 255, dtype=torch.uint8))
    for name, width in (("border S / 24", 2), ("border S / 12", 4)):
        assert white[name].sum() == 3 * 255 * (48 - 2 * width) ** 2
        assert white[name][..., width:-width, width:-width].min() == 255
    for name in ("blur S / 24", "resolution S / 4", "contrast x 1.4"):
        assert (white[name] == 255).all()


@pytest.mark.parametrize("size", [16, 33])
def test_small_and_odd_images_can_be_changed(size):
    assert {changed.shape for changed in by_name(images(2, 3, size, size)).values()} == {(2, 3, size, size)}


def test_outcomes_equal_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(60, 4, generator=generator), torch.randint(0, 3, (60,), generator=generator)
    values = shifts.outcomes_of(logits, targets)
    balanced = compute_sample_weight("balanced", targets)  # class 3 does not occur
    predictions = logits.argmax(1)
    loss = log_loss(targets, logits.double().softmax(1), sample_weight=balanced, labels=range(4))
    assert values["balanced_loss"] == pytest.approx(loss)
    assert values["balanced_accuracy"] == pytest.approx(
        recall_score(targets, predictions, average="macro", labels=range(3))
    )
    assert values["f1"] == pytest.approx(f1_score(targets, predictions, average="macro", labels=range(3)))


def test_the_temperature_has_the_lowest_class_balanced_loss():
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(300, 3, generator=generator)
    targets = torch.multinomial((logits / 2).softmax(1) * torch.tensor([8.0, 1, 1]), 1, generator=generator).flatten()
    balanced = compute_sample_weight("balanced", targets)

    def loss(temperature):
        return log_loss(targets, (logits.double() / temperature).softmax(1), sample_weight=balanced)

    found = shifts.best_temperature(logits, targets)
    assert found == pytest.approx(min(np.arange(0.5, 5, 0.01), key=loss), abs=0.01)
    assert shifts.best_temperature(4 * logits, targets) == pytest.approx(4 * found, rel=1e-3)


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """A folder with the plan, and finished runs of its arms with random weights; "other" has one seed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "plan.py").write_text(PLAN)
    plan = read_plan(folder / "plan.py")
    for number, (arm, seed) in enumerate(plan.runs()):
        if (arm.name, seed) == ("other", 1):
            continue
        (stage,) = arm.stages
        subset = stage.subset.of_seed(seed)
        data, run = folder / "out" / "data" / subset.name, folder / "out" / arm.name / f"seed{seed}"
        link_subset(image_folder, subset, data)
        run.mkdir(parents=True)
        state = checkpoint.weights_state(random_model(seed=number), CLASSES, vars(parse("_normal", *SMALL)))
        (run / "training").mkdir()
        checkpoint.save(run / "training" / "model_best.pth", state)
        test = ["--test-only", "--split", "test", "--resume", str(run / "training" / "model_best.pth")]
        normal.main([*SMALL, "--data-path", str(data), *test, "--output-dir", str(run / "training")])
        finish(folder / "out", arm.name, seed)
    return folder


@pytest.fixture
def copied(runs, tmp_path):
    """A copy that a test may change, without earlier results and without links to the images."""
    return shutil.copytree(runs, tmp_path / "copy", ignore=shutil.ignore_patterns("s", "data"))


def table_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def call(folder, image_folder, *words, results=True):
    found = [str(folder / "out"), "--data-path", str(image_folder)] if results else []
    shifts.main([str(folder / "plan.py"), *found, "-o", str(folder / "s" / "shifts.csv"), "--device", "cpu", *words])
    return table_of(folder / "s" / "shifts.csv")


@pytest.mark.slow
def test_clean_rows_equal_the_runs_own_tests_and_only_missing_runs_are_added(runs, image_folder, capsys):
    rows = call(runs, image_folder)
    output = capsys.readouterr().out
    assert "seed 0: 2 models" in output and "seed 1: 2 models" in output
    assert len(rows) == 4 * 16 and {row["arm"] for row in rows} == {"plain", "masked"}  # those of the contrast
    table = runs / "s" / "shifts.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(line for line in lines if not ("plain,0" in line and shifts.SCALED in line)))
    assert len(call(runs, image_folder)) == 4 * 16 and "seed 0: 1 model," in capsys.readouterr().out
    rows = call(runs, image_folder, "--arms", "*")
    assert len(rows) == 5 * 16 and "seed 0: 1 model," in capsys.readouterr().out
    own = {(row["arm"], row["seed"]): float(row["balanced_loss"]) for row in rows if row["shift"] == "clean"}
    capsys.readouterr()
    before = (runs / "s" / "shifts.md").read_bytes()
    call(runs, image_folder, "--against", "other", results=False)
    gain = own["other", "0"] - own["plain", "0"]
    assert f"| three | clean | plain | other | 1 | {gain:+.3f} |" in capsys.readouterr().out
    assert (runs / "s" / "shifts.md").read_bytes() == before
    with pytest.raises(UserError, match="--against x: expected one of plain, masked, other"):
        call(runs, image_folder, "--against", "x", results=False)
    cells = " | ".join(f"{own[arm, '0']:.3f}" for arm in ("plain", "masked", "other"))  # "other" has only seed 0
    assert f"| three | clean | {cells} |" in (runs / "s" / "shifts.md").read_text()
    for row in rows:
        if row["shift"] == "clean":
            folder = runs / "out" / row["arm"] / f"seed{row['seed']}" / "training"
            own = json.loads((folder / "metrics.json").read_text())["metrics"]["clean"]
            for name in ("balanced_accuracy", "f1", "ece"):
                assert float(row[name]) == pytest.approx(own[name], abs=1e-5)
            images = table_of(folder / "predictions.csv")
            losses = [[float(image["loss"]) for image in images if image["target"] == name] for name in CLASSES]
            assert float(row["balanced_loss"]) == pytest.approx(np.mean(list(map(np.mean, losses))), abs=1e-5)
    clean, scaled = ([row for row in rows if row["shift"] == name] for name in (image_changes.CLEAN, shifts.SCALED))
    assert [row["f1"] for row in clean] == [row["f1"] for row in scaled]
    assert all(row["balanced_loss"] != other["balanced_loss"] for row, other in zip(clean, scaled, strict=True))
    assert len({row["balanced_loss"] for row in rows}) > 60  # the changes change something


@pytest.mark.slow
def test_the_page_and_the_picture_show_differences_that_are_positive_where_the_arm_is_better(runs, image_folder):
    rows = call(runs, image_folder)
    text = (runs / "s" / "shifts.md").read_text()
    value = {(row["arm"], row["seed"]): float(row["balanced_loss"]) for row in rows if row["shift"] == "gamma 1.4"}
    differences = np.array([value["plain", seed] - value["masked", seed] for seed in "01"])
    half = 12.706205 * differences.std(ddof=1) / 2**0.5
    mean = differences.mean()
    cell = f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"
    assert f"| three | gamma 1.4 | masked | plain | 2 | {cell} |" in text
    plan = read_plan(runs / "plan.py")
    read = paired_tables.read_rows(runs / "s" / "shifts.csv", plan, shifts.PARTS, shifts.REPORTED)
    (axes,) = shifts.picture(plan, read).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    place = labels.index("gamma 1.4")
    (point,) = [line for line in axes.lines if line.get_marker() == "o" and list(line.get_ydata()) == [place]]
    assert point.get_xdata() == pytest.approx([mean], abs=1e-6)
    assert labels[0] == "clean" and axes.yaxis_inverted()


@pytest.mark.slow
def test_without_results_the_page_is_made_from_the_file_alone(runs, image_folder, tmp_path):
    call(runs, image_folder)
    shutil.copytree(runs / "s", tmp_path / "s", ignore=shutil.ignore_patterns("*.md"))
    shutil.copy(runs / "plan.py", tmp_path)
    call(tmp_path, image_folder, results=False)
    assert (tmp_path / "s" / "shifts.md").read_text() == (runs / "s" / "shifts.md").read_text()


@pytest.mark.slow
def test_lost_links_are_made_again_and_other_images_are_refused(copied, image_folder, tmp_path):
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("test/dark/1.png\n")
    with pytest.raises(UserError, match=r"test: not the images that .*seed0/training was tested on"):
        call(copied, image_folder, "--exclude", str(exclude), "--arms", "plain")
    shutil.rmtree(copied / "out" / "data")
    assert len(call(copied, image_folder, "--arms", "plain")) == 2 * 16


@pytest.mark.slow
def test_bad_input_gets_a_sentence_and_nothing_is_written(copied, image_folder):
    plan, out = str(copied / "plan.py"), str(copied / "out")
    target = ["-o", str(copied / "new.csv")]
    for words, message in (
        ([plan, out, *target], "--data-path: is missing"),
        ([plan, *target], r"new\.csv: no such file\. Give RESULTS"),
        ([plan, out, "-o", str(copied / "new.txt")], "expected a name that ends in .csv"),
        (
            [plan, out, "--data-path", str(image_folder), "--arms", "x", *target],
            "--arms x: matches none of plain, masked",
        ),
        ([plan, str(copied), "--data-path", str(image_folder), *target], "no run of these arms has finished"),
        ([plan, out, "--data-path", str(image_folder), "--device", "tpu", *target], "tpu"),
    ):
        with pytest.raises(UserError, match=message):
            shifts.main(words)
    (copied / "new.csv").write_text("my,own\n1,2\n")
    with pytest.raises(UserError, match="was not written by this command"):
        shifts.main([plan, out, "--data-path", str(image_folder), *target])
    assert (copied / "new.csv").read_text() == "my,own\n1,2\n"
    (copied / "new.csv").unlink()
    (copied / "new.md").write_text("my own")
    with pytest.raises(UserError, match=r"new\.md: exists, and new\.csv does not"):
        shifts.main([plan, out, "--data-path", str(image_folder), *target])
    (copied / "new.md").unlink()
    (copied / "plan.py").write_text(PLAN.replace('keep=("model_best.pth",)', "keep=()"))
    with pytest.raises(UserError, match="no tested stage keeps its weights"):
        shifts.main([plan, out, "--data-path", str(image_folder), *target])
    assert not (copied / "new.csv").exists()
