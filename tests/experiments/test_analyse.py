"""The analysis of a plan: tables compared with numbers by hand, missing and damaged runs, and the command."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import analyse, pictures
from experiments.differences import compare
from experiments.plan import Arm, Contrast, Plan, Stage, read_plan
from experiments.run_results import read_folders
from experiments.tasks import Task, read_tasks
from tests.conftest import ROOT
from tests.helpers.finished_runs import finish, write_stage, write_test
from utils.runtime.errors import UserError

CLASSES = ["ct-lung", "mr-brain-normal", "us-breast-cyst"]
TARGETS = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
PLAN = """
from experiments.plan import Arm, Contrast, Plan, Stage

def arm(name, pretraining):
    return Arm(name, (
        Stage("heated", pretraining, "--epochs 2"),
        Stage("finetuned", "_normal", "--epochs 1", "heated/average.pth", test="images"),
    ), seeds=SEEDS)

ARMS = (arm("plain", "_normal"), arm("learned", "_policy_gradient"))
PLAN = Plan("A plan", "Does it help?", ARMS, "plain", (Contrast("x", "learned", "plain"),))
"""
DASH = "\N{EN DASH}"


def write_plan(folder: Path, seeds: int) -> Path:
    path = folder / "plan.py"
    path.write_text(PLAN.replace("SEEDS", str(seeds)))
    return path


def logits(right: tuple[int, int, int]) -> torch.Tensor:
    """(12, 3): of the four images of each class, `right` are recognised; the others get class 0, or 1 for class 0."""
    predictions = []
    for number, count in enumerate(right):
        predictions += [number] * count + [int(number == 0)] * (4 - count)
    return 3.0 * torch.eye(3)[predictions]


def write_run(results: Path, arm: str, seed: int, right: tuple[int, int, int], **start: object) -> None:
    folder = results / arm / f"seed{seed}"
    policy = {"policy_entropy": -0.25, "prior_drift": 0.5} if arm == "learned" else {}
    log = [{"val_f1": 0.25, "val_top1": 0.25, **policy}, {"val_f1": 0.5, "val_top1": 0.375 + 0.25 * seed, **policy}]
    write_stage(folder / "heated", log, **start)
    write_stage(folder / "finetuned", log[:1], **start)
    write_test(folder / "finetuned", logits(right), TARGETS, CLASSES, **start)
    finish(results, arm, seed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms with three seeds; "learned" recognises 0, 1 and 2 more images of us-breast-cyst."""
    folder = tmp_path_factory.mktemp("finished")
    for seed in range(3):
        write_run(folder, "plain", seed, (4, 4, 1))
        write_run(folder, "learned", seed, (4, 4, 1 + seed))
    return folder


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "runs")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return read_plan(write_plan(tmp_path, 3))


def page_of(plan: Plan, results: Path) -> str:
    """tables.md, with few resamples and without the figures, which take longer."""
    found = read_folders(plan, results)
    tasks = read_tasks(plan, found.runs)
    return analyse.page(plan, found, tasks, compare(plan, tasks, 20), 20)


def tasks_of(plan: Plan, results: Path) -> list[Task]:
    return read_tasks(plan, read_folders(plan, results).runs)


def cells(text: str, *beginning: str) -> list[str]:
    """The remaining cells of the one table row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if tuple(row[: len(beginning)]) == beginning]
    return row[len(beginning) :]


def results_of(text: str, arm: str) -> dict[str, str]:
    """The row of an arm in the table of results, by column."""
    lines = iter(text.splitlines())
    header = next(line for line in lines if line.startswith("| arm | seeds |"))
    row = next(line for line in lines if line.startswith(f"| {arm} |"))
    return dict(zip(header.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))


def test_the_tables_equal_numbers_by_hand(finished, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    analyse.main([str(write_plan(tmp_path, 3)), str(finished), "-o", str(out), "--resamples", "200"])
    assert {path.name for path in out.iterdir()} == {*analyse.FIGURES, "tables.md"}
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in analyse.FIGURES)
    text = (out / "tables.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    # us-breast-cyst: recall r / 4, F1 2 r / (4 + r); ct-lung: F1 8 / (8 + 4 - r); mr-brain-normal: all right.
    f1s = np.array([[8 / (12 - right), 1, 2 * right / (4 + right)] for right in (1, 2, 3)])
    overall, hard = 100 * f1s.mean(1), 100 * f1s[:, 1:].mean(1)
    row = results_of(text, "plain")
    assert row["top-1"] == "75.00 ± 0.00"  # 9 of 12
    assert [row["macro F1"], row["hard: macro F1"]] == [f"{overall[0]:.2f} ± 0.00", f"{hard[0]:.2f} ± 0.00"]
    assert row["hard: balanced accuracy"] == row["hard: top-1"] == "62.50 ± 0.00"  # 5 of 8
    # The largest logit is 3, two are 0.
    right, wrong = np.log(1 + 2 / np.e**3), np.log(np.e**3 + 2)
    assert row["balanced cross-entropy"] == f"{(2 * right + (right + 3 * wrong) / 4) / 3:.4f} ± .0000"[1:]
    confidence = np.e**3 / (np.e**3 + 2)
    assert row["calibration error (ECE)"] == f"{100 * (confidence - 0.75):.2f} ± 0.00"  # all in one bin
    row = results_of(text, "learned")
    assert row["top-1"] == f"83.33 ± {100 / 12:.2f}"  # 9, 10 and 11 of 12
    assert [row["macro F1"], row["hard: macro F1"]] == [
        f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" for values in (overall, hard)
    ]
    # One-vs-rest: every recognised us-breast-cyst is above all other images, the rest are level with them.
    aurocs = [np.mean([1, right / 4 + (1 - right / 4) / 2]) for right in (1, 2, 3)]
    assert row["hard: AUROC"] == f"{np.mean(aurocs):.4f} ± {np.std(aurocs, ddof=1):.4f}".replace("0.", ".")
    difference = hard - hard[0]
    mean, half = difference.mean(), 4.302653 * difference.std(ddof=1) / 3**0.5
    row = cells(text, "x", "hard: macro F1 (points)", "learned", "plain")
    assert row[:3] == ["3", f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"]
    assert row[3] == f"{mean / difference.std(ddof=1):+.2f}" and row[7] == DASH
    assert row[4:6] == [".83", ".31 to .98"]  # two of three are better, one is equal
    assert cells(text, "top-1 (points)", "learned", "plain")[:2] == ["3", "+8.33"]
    loss = cells(text, "balanced cross-entropy (nats)", "learned", "plain")
    assert loss[1] == "+0.2500" and loss[5] == ".83"  # (0 + 1 + 2) / 3 images of 12 are right: 3 nats less each
    assert "2^(1-n), 0.25 with 3" in text
    # Without a difference one half; with one and two more images 1 / 4 and 1 / 8 (Beta(2, 1), Beta(3, 1)).
    assert cells(text, "learned", "plain") == [".750", "2 of 3", ".25", "0 of 3", "0 of 0"]
    assert cells(text, "learned", "-0.2500 → -0.2500") == ["0.5000 → 0.5000", "0.6250", "0.5000"]
    assert "12 test images of 3 classes, 2 of them hard" in text and "6 of 6 planned runs have finished." in text
    assert "torch 2.14.1; CPU (Linux x86_64, 2 CPU cores); 2026-11-23; commit 0123456789ab; 3.0 hours" in text


def test_unfinished_runs_are_left_out_and_named(results, tmp_path):
    for name in ("learned/seed2/finished.json", "learned/seed2/finetuned/per_class.csv", "plain/seed0/finished.json"):
        (results / name).unlink()
    text = page_of(read_plan(write_plan(tmp_path, 4)), results)
    assert "4 of 8 planned runs have finished." in text
    assert "missing plain seed 0, learned seed 2, plain seed 3, learned seed 3." in text
    row = cells(text, "top-1 (points)", "learned", "plain")
    assert row[:3] == ["1", "+8.33", DASH]  # from seed 1 alone
    assert row[4] == row[7] == DASH


def test_an_arm_without_its_control_has_results_but_no_differences(results, plan):
    for path in results.glob("plain/*/finished.json"):
        path.unlink()
    text = page_of(plan, results)
    assert "No differences: no arm has a seed in common with its control." in text and "## Primary" not in text
    assert results_of(text, "learned")["top-1"] == f"83.33 ± {100 / 12:.2f}"
    assert pictures.differences(plan, tasks_of(plan, results), []) is None


def test_means_are_over_the_seeds_that_all_arms_have(results, plan):
    """Of 75, 83.33 and 91.67 % in the seeds 0 to 2, the last two."""
    (results / "plain" / "seed0" / "finished.json").unlink()
    row = results_of(page_of(plan, results), "learned")
    assert (row["seeds"], row["top-1"]) == ("2", f"87.50 ± {100 / 12 / 2**0.5:.2f}")


def test_one_seed_has_no_spread(finished, tmp_path):
    text = page_of(read_plan(write_plan(tmp_path, 1)), finished)
    assert results_of(text, "learned")["top-1"] == f"75.00 ± {DASH}"
    assert cells(text, "top-1 (points)", "learned", "plain")[:3] == ["1", "+0.00", DASH]
    assert not re.search(r"\bnan\b", text)


def test_p_values_need_eight_seeds_and_are_for_primary_contrasts_only(tmp_path):
    results = tmp_path / "runs"
    write_run(results, "plain", 0, (4, 4, 1))
    for seed in range(2):
        write_run(results, "learned", seed, (4, 4, 1 + seed))
    for seed in range(1, 8):
        (results / "plain" / f"seed{seed}").symlink_to("seed0")
    for seed in range(2, 8):
        (results / "learned" / f"seed{seed}").symlink_to("seed1")
    plan = read_plan(write_plan(tmp_path, 8))
    text = page_of(plan, results)
    assert cells(text, "x", "hard: macro F1 (points)")[-1] == "0.016"  # 7 equal ones, one 0: 4 of 256
    assert "adjusted for the number of questions (Holm)" in text and "no p is given" not in text
    # A second question, of the same arm with a control of its own: Holm's p of two tests, in another outcome.
    arms = (*plan.arms, Arm("again", plan.arms[1].stages, 8, control="learned"))
    plan = Plan("", "", arms, "plain", (*plan.primary, Contrast("y", "again", "plain")), outcome="balanced_loss")
    rows = compare(plan, tasks_of(plan, results), 20)
    assert [row.p for row in rows if row.p is not None] == [2 * 4 / 256]  # also before the second has any seed
    (results / "again").symlink_to(results / "learned")
    rows = compare(plan, tasks_of(plan, results), 20)
    tested = [(row.question, row.arm, row.outcome, row.p) for row in rows if row.p is not None]
    assert tested == [(*key, "balanced_loss", 2 * 4 / 256) for key in (("x", "learned"), ("y", "again"))]
    exploratory = [row for row in rows if (row.arm, row.control) == ("again", "learned")]
    assert len(exploratory) == 6 and not any(row.differences.any() or row.question for row in exploratory)


def test_the_figure_of_differences_shows_each_seed(finished, plan):
    tasks = tasks_of(plan, finished)
    comparisons = compare(plan, tasks, 5)
    axes, accuracy, calibration = pictures.differences(plan, tasks, comparisons).axes
    assert [other.get_title() for other in (accuracy, calibration)] == ["balanced accuracy", "calibration error (ECE)"]
    assert [other.get_xlabel() for other in (axes, calibration)] == ["improvement, points"] * 2
    hard_f1 = next(comparison for comparison in comparisons if comparison.outcome == "hard_f1")
    assert list(axes.collections[0].get_offsets()[:, 0]) == pytest.approx(list(100 * hard_f1.differences))
    interval, mean, zero = axes.lines
    assert interval.get_xdata() == pytest.approx([100 * end for end in hard_f1.t])
    assert mean.get_xdata() == pytest.approx(100 * hard_f1.differences.mean()) and list(zero.get_xdata()) == [0, 0]


def test_the_validation_figure_concatenates_stages(finished, plan):
    runs = read_folders(plan, finished).runs
    (axes,) = pictures.validation(plan, read_tasks(plan, runs), runs).axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert lines == [([0, 1], [0.25, 0.5]), ([2], [0.25])] * 2  # two stages of two arms


def test_draws_are_averaged_and_all_hard_tasks_have_one_set_of_columns(tmp_path):
    draws = tuple(Stage(f"draw{n}", "_normal", "--epochs 1", "heated/last.pth", test="few") for n in range(2))
    stages = (Stage("heated", "_normal", "--epochs 1"), *draws, Stage("other", "_normal", "--epochs 1", test="whole"))
    plan = Plan("", "", (Arm("a", stages, 1), Arm("b", stages, 1)), "a", hard="*brain*,us-*")
    for arm, rights in (("a", (1, 2)), ("b", (2, 4))):
        write_stage(tmp_path / arm / "seed0" / "heated", [{"val_f1": 0.5}])
        for stage, right in zip(stages[1:], (*rights, 0), strict=True):
            folder = tmp_path / arm / "seed0" / stage.name
            write_stage(folder, [{"val_f1": 0.5}])
            part = slice(4, None) if stage.test == "few" else slice(None)  # hard classes only
            write_test(folder, logits((4, 4, right))[part, :], TARGETS[part], CLASSES)
        finish(tmp_path, arm, 0)
    few, whole = tasks_of(plan, tmp_path)
    assert [few.runs[arm, 0].metrics["top1"] for arm in "ab"] == [(5 + 6) / 16, (6 + 8) / 16]
    assert whole.has_easy and few.runs["a", 0].predictions.shape == (2, 8)
    differences = {comparison.outcome: comparison.differences[0] for comparison in compare(plan, [few], 10)}
    assert differences["top1"] == pytest.approx(3 / 16)
    chains = pictures.chains(plan.arms[0], "few")
    assert [[stage.name for stage in chain] for chain in chains] == [["heated", "draw0"], ["heated", "draw1"]]
    text = page_of(Plan("", "", plan.arms, "a", hard="*"), tmp_path)
    assert "hard:" not in text and "Each run is the mean of 2 draws" in text


def test_different_commits_and_versions_are_reported(results, plan):
    origin = {"commit": None, "versions": {"torch": "2.11.0"}, "time": "2026-11-25T09:00:00+00:00"}
    write_run(results, "learned", 2, (4, 4, 3), **origin)
    found = read_folders(plan, results)
    text = analyse.provenance(found.runs, found.origin)
    assert "torch 2.14.1 and 2.11.0" in text and "commits 0123456789ab, unknown" in text
    assert "2026-11-23 to 2026-11-25" in text
    assert text.endswith("**The runs are of different commits and versions of torch.**")


OTHER_IMAGES = "image,target,prediction,true_rank,loss\n" + "".join(
    f"{number}.png,{CLASSES[target]},ct-lung,1,0.1\n" for number, target in enumerate(TARGETS.tolist())
)
OTHER_HARD = PLAN.replace("SEEDS", "3") + "PLAN = Plan('', '', ARMS, 'plain', hard='mr-liver')"


@pytest.mark.parametrize(
    ("pattern", "content", "message"),
    [
        ("learned/seed1/finetuned/predictions.csv", OTHER_IMAGES,
         r"plain, seed 0 and learned, seed 1: were tested on different images"),
        ("*/*/finished.json", None, "no run of the plan 'A plan'"),
        ("plain/seed1/finished.json", "[]", "seed1/finished.json: damaged"),
        ("plain/seed1/finished.json", '{"seconds": 1, "stages": []}', "seed1/finished.json: the run has other stages"),
        ("plain/seed1/finetuned/metrics.json", None, "seed1/finetuned: the run has"),
        ("plain/seed1/heated/log.jsonl", "x\n", "seed1/heated/log.jsonl: holds"),
        ("tables.md", "my own", "tables.md: exists, and was not written by this command"),
        ("plan.py", OTHER_HARD, "hard='mr-liver' matches no class of any task"),
    ],
)  # fmt: skip
def test_errors_name_the_file_and_nothing_is_written(pattern, content, message, results):
    """content: written to the files; None: they are removed."""
    write_plan(results, 3)
    (results / "tables.md").write_text(analyse.MARK)
    for path in results.glob(pattern):
        path.unlink() if content is None else path.write_text(content)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        analyse.main([str(results / "plan.py"), str(results), "--resamples", "5"])
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def test_the_command_starts_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["analyse.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / "experiments" / "analyse.py"), run_name="__main__")
