"""The analysis of a plan: tables against numbers by hand, runs that are missing or damaged, and the command itself."""

import json
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
from experiments.pictures import chains
from experiments.plan import Arm, Plan, Stage, as_written, read_plan
from experiments.results import read_runs, read_tasks
from tests.conftest import ROOT
from tests.helpers.finished_runs import finish, write_stage, write_test
from utils.runtime.errors import UserError

CLASSES = ["ct-lung", "mr-brain-normal", "us-breast-cyst"]
TARGETS = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
PLAN = """
from experiments.plan import Arm, Plan, Stage

def arm(name, pretraining):
    return Arm(name, (
        Stage("heated", pretraining, "--epochs 2"),
        Stage("finetuned", "_normal", "--epochs 1", "heated/average.pth", test="images"),
    ), seeds=SEEDS)

ARMS = (arm("plain", "_normal"), arm("learned", "_policy_gradient"))
PLAN = Plan("A plan", "Does it help?", ARMS, "plain", "learned")
"""


def write_plan(folder: Path, seeds: int) -> Path:
    path = folder / "plan.py"
    path.write_text(PLAN.replace("SEEDS", str(seeds)))
    return path


def guess(right: tuple[int, int, int]) -> torch.Tensor:
    """Logits of which so many of the four images of each class are right, and the others class 0, or 1 for class 0."""
    predictions = [
        number if image < right[number] else int(number == 0) for number in range(3) for image in range(4)
    ]  # fmt: skip
    return 3.0 * torch.eye(3)[predictions]


def write_run(results: Path, arm: str, seed: int, right: tuple[int, int, int], **start: object) -> None:
    folder = results / arm / f"seed{seed}"
    policy = {"policy_entropy": -0.25, "prior_drift": 0.5} if arm == "learned" else {}
    log = [{"val_f1": 0.25, "val_top1": 0.25, **policy}, {"val_f1": 0.5, "val_top1": 0.375 + 0.25 * seed, **policy}]
    write_stage(folder / "heated", log, **start)
    write_stage(folder / "finetuned", log[:1], **start)
    write_test(folder / "finetuned", guess(right), TARGETS, CLASSES, **start)
    finish(results, arm, seed)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of three seeds; "learned" gets 0, 1 and 2 images of us-breast-cyst more."""
    folder = tmp_path_factory.mktemp("finished")
    for seed in range(3):
        write_run(folder, "plain", seed, (4, 4, 1))
        write_run(folder, "learned", seed, (4, 4, 1 + seed))
    return folder


@pytest.fixture
def results(finished: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(finished, tmp_path / "runs")


def tables_of(path: Path, results: Path) -> str:
    """The page without the figures, which take longer."""
    plan = read_plan(path)
    runs = read_runs(plan, results)
    tasks = read_tasks(plan, runs)
    return analyse.page(plan, runs, tasks, compare(plan, tasks, 20), 20)


def cells(text: str, *beginning: str) -> list[str]:
    """The other cells of the only row of a table that begins with these."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if tuple(row[: len(beginning)]) == beginning]
    return row[len(beginning) :]


def test_a_run_of_other_stages_is_not_told_as_the_plans(finished, tmp_path):
    results = shutil.copytree(finished, tmp_path / "results")
    plan = read_plan(write_plan(tmp_path, 3))
    path = results / "plain" / "seed1" / "finished.json"
    path.write_text(json.dumps({"seconds": 1, "stages": as_written(plan.arms[0])}))
    assert len(read_runs(plan, results)) == 6
    path.write_text(json.dumps({"seconds": 1, "stages": as_written(plan.arms[1])}))
    with pytest.raises(UserError, match=r"plain/seed1/finished.json: is of other stages than the plan says now"):
        read_runs(plan, results)


def test_the_tables_by_hand(results, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    analyse.main([str(write_plan(tmp_path, 3)), str(results), "-o", str(out), "--resamples", "200"])
    assert sorted(path.name for path in out.iterdir()) == sorted([*analyse.FIGURES, "tables.md"])
    text = (out / "tables.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    # us-breast-cyst: recall r / 4, F1 2 r / (4 + r); ct-lung: F1 8 / (8 + 4 - r); mr-brain-normal: all right.
    f1s = [[8 / (12 - right), 1, 2 * right / (4 + right)] for right in (1, 2, 3)]
    hard = 100 * np.mean([of[1:] for of in f1s], axis=1)
    every = 100 * np.mean(f1s, axis=1)
    row = cells(text, "plain", "3")
    assert row[0] == "75.00 ± 0.00"  # 9 of 12
    assert [row[2], row[6]] == [f"{every[0]:.2f} ± 0.00", f"{hard[0]:.2f} ± 0.00"]
    assert row[4:6] == ["62.50 ± 0.00", "62.50 ± 0.00"]  # 5 of 8
    row = cells(text, "learned", "3")
    assert row[0] == f"83.33 ± {100 / 12:.2f}"  # 9, 10 and 11 of 12
    assert [row[2], row[6]] == [f"{of.mean():.2f} ± {of.std(ddof=1):.2f}" for of in (every, hard)]
    # One-vs-rest: every us-breast-cyst that is right is above all others, the rest are level with what is not.
    aurocs = [np.mean([1, right / 4 + (1 - right / 4) / 2]) for right in (1, 2, 3)]
    assert row[7] == f"{np.mean(aurocs):.4f} ± {np.std(aurocs, ddof=1):.4f}".replace("0.", ".")
    difference = hard - hard[0]
    row = cells(text, "hard: macro F1", "learned")
    assert row[:2] == ["3", f"{difference.mean():+.2f}"]
    half = 4.302653 * difference.std(ddof=1) / 3**0.5
    assert row[2] == f"{difference.mean() - half:+.2f} to {difference.mean() + half:+.2f}"
    assert row[4:] == [f"{difference.mean() / difference.std(ddof=1):+.2f}", row[5], "\N{EN DASH}"]
    assert cells(text, "top-1", "learned")[:2] == ["3", "+8.33"]
    assert "2^(1-n), 0.25 with 3" in text and "primary" not in text
    assert cells(text, "`policy_entropy`") == ["-0.2500 → -0.2500"]
    assert cells(text, "`val_top1`, last epoch") == ["0.6250"]
    assert cells(text, "`mask_mean`") == ["\N{EN DASH}"]
    for part in ("12 test images of 3 classes, 2 of them hard", "torch 2.14.1", "commit 0123456789ab", "2026-11-23",
                 "3.0 hours", "CPU (Linux x86_64, 2 CPU cores)", "6 of 6 planned runs have finished."):  # fmt: skip
        assert part in text
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in analyse.FIGURES)


def test_runs_that_are_not_finished_are_left_out_and_named(results, tmp_path):
    (results / "learned" / "seed2" / "finished.json").unlink()
    (results / "learned" / "seed2" / "finetuned" / "per_class.csv").unlink()
    (results / "plain" / "seed0" / "finished.json").unlink()
    text = tables_of(write_plan(tmp_path, 4), results)
    assert "4 of 8 planned runs have finished." in text
    assert "missing plain seed 0, learned seed 2, plain seed 3, learned seed 3." in text
    row = cells(text, "top-1", "learned")
    assert row[:3] == ["1", "+8.33", "\N{EN DASH}"]  # of seed 1 alone
    assert row[4:] == ["\N{EN DASH}"] * 3


def test_one_seed_has_no_spread(tmp_path):
    for arm, right in (("plain", (4, 2, 1)), ("learned", (4, 4, 1))):
        write_run(tmp_path / "runs", arm, 0, right)
    text = tables_of(write_plan(tmp_path, 1), tmp_path / "runs")
    assert cells(text, "learned", "1")[0] == "75.00 ± \N{EN DASH}"
    assert cells(text, "top-1", "learned")[:3] == ["1", "+16.67", "\N{EN DASH}"]
    assert not re.search(r"\bnan\b", text)


def test_p_values_only_of_eight_seeds_and_hard_f1(tmp_path):
    write_run(tmp_path / "runs", "plain", 0, (4, 4, 1))
    for seed in range(2):
        write_run(tmp_path / "runs", "learned", seed, (4, 4, 1 + seed))
    for seed in range(1, 8):
        (tmp_path / "runs" / "plain" / f"seed{seed}").symlink_to("seed0")
    for seed in range(2, 8):
        (tmp_path / "runs" / "learned" / f"seed{seed}").symlink_to("seed1")
    path = write_plan(tmp_path, 8)
    text = tables_of(path, tmp_path / "runs")
    assert cells(text, "hard: macro F1", "learned")[-1] == "0.016 (primary)"  # 7 equal ones, one 0: 4 of 256
    assert len(re.findall(r"\(primary\)|\(secondary\)", text)) == 1
    assert "Primary: learned in images" in text and "Secondary" not in text
    # The same, not named before the runs, in two arms: Holm's p of two tests.
    plan = read_plan(path)
    plan = Plan("", "", (*plan.arms, Arm("again", plan.arms[1].stages, 8)), "plain", None)
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs" / "learned")
    tasks = read_tasks(plan, read_runs(plan, tmp_path / "runs"))
    found = [one for one in compare(plan, tasks, 20) if one.p is not None]
    assert [(one.arm, one.metric, one.p, one.primary) for one in found] == [
        ("learned", "hard_f1", 2 * 4 / 256, False), ("again", "hard_f1", 2 * 4 / 256, False)
    ]  # fmt: skip


def test_the_figure_of_differences_shows_each_seed(results, tmp_path):
    plan = read_plan(write_plan(tmp_path, 3))
    tasks = read_tasks(plan, read_runs(plan, results))
    found = compare(plan, tasks, 5)
    (axes,) = pictures.differences(plan, tasks, found).axes
    hard_f1 = next(one for one in found if one.metric == "hard_f1")
    assert list(axes.collections[0].get_offsets()[:, 0]) == pytest.approx(list(100 * hard_f1.differences))
    interval, mean, zero = axes.lines
    assert interval.get_xdata() == pytest.approx([100 * end for end in hard_f1.t])
    assert mean.get_xdata() == pytest.approx(100 * hard_f1.differences.mean()) and list(zero.get_xdata()) == [0, 0]
    one_seed = [one._replace(seeds=[0], differences=one.differences[:1], t=None) for one in found]
    (axes,) = pictures.differences(plan, tasks, one_seed).axes
    assert len(axes.lines) == 2
    assert pictures.differences(plan, tasks, []) is None


def test_the_validation_is_laid_end_to_end(results, tmp_path):
    plan = read_plan(write_plan(tmp_path, 3))
    runs = read_runs(plan, results)
    (axes,) = pictures.validation(plan, read_tasks(plan, runs), runs).axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert lines == [([0, 1], [0.25, 0.5]), ([2], [0.25])] * 2  # two stages of two arms


def test_draws_of_a_task_are_averaged_and_a_task_of_hard_classes_has_one_set_of_columns(tmp_path):
    draws = tuple(Stage(f"draw{n}", "_normal", "--epochs 1", "heated/last.pth", test="few") for n in range(2))
    stages = (Stage("heated", "_normal", "--epochs 1"), *draws, Stage("other", "_normal", "--epochs 1", test="whole"))
    plan = Plan("", "", (Arm("a", stages, 1), Arm("b", stages, 1)), "a", hard="*brain*,us-*")
    for arm, rights in (("a", (1, 2)), ("b", (2, 4))):
        for stage, right in zip(stages[1:], (*rights, 0), strict=True):
            folder = tmp_path / arm / "seed0" / stage.name
            write_stage(folder, [{"val_f1": 0.5}])
            part = slice(4, None) if stage.test == "few" else slice(None)  # of the hard classes only
            write_test(folder, guess((4, 4, right))[part, :], TARGETS[part], CLASSES)
        write_stage(tmp_path / arm / "seed0" / "heated", [{"val_f1": 0.5}])
        finish(tmp_path, arm, 0)
    runs = read_runs(plan, tmp_path)
    few, whole = read_tasks(plan, runs)
    assert [few.runs[arm, 0].metrics["top1"] for arm in "ab"] == [(5 + 6) / 16, (6 + 8) / 16]
    assert whole.has_easy and few.runs["a", 0].predictions.shape == (2, 8)
    assert {one.metric: one.differences[0] for one in compare(plan, [few], 10)}["top1"] == pytest.approx(3 / 16)
    assert [[stage.name for stage in chain] for chain in chains(plan.arms[0], "few")] == [
        ["heated", "draw0"], ["heated", "draw1"]
    ]  # fmt: skip
    only_hard = Plan("", "", plan.arms, "a", hard="*")
    text = analyse.page(only_hard, runs, tasks := read_tasks(only_hard, runs), compare(only_hard, tasks, 10), 10)
    assert "hard:" not in text and "Each run is the mean of 2 draws" in text


def test_other_commits_and_versions_are_said(results, tmp_path):
    write_run(
        results, "learned", 2, (4, 4, 3), commit=None, versions={"torch": "2.11.0"}, time="2026-11-25T09:00:00+00:00"
    )
    plan = read_plan(write_plan(tmp_path, 3))
    text = analyse.provenance(read_runs(plan, results))
    assert "torch 2.14.1 and 2.11.0" in text and "commits 0123456789ab, unknown" in text
    assert "2026-11-23 to 2026-11-25" in text
    assert text.endswith("**The runs are of different commits and versions of torch.**")


def swap_two_images(results: Path) -> None:
    path = results / "learned" / "seed1" / "finetuned" / "predictions.csv"
    path.write_text(path.read_text().replace("ct-lung/0.png", "ct-lung/77.png"))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (swap_two_images, r"plain/seed0/finetuned and .*learned/seed1/finetuned: were tested on different images"),
        (lambda results: [path.unlink() for path in results.glob("plain/*/finished.json")], "baseline 'plain'"),
        (lambda results: [path.unlink() for path in results.glob("*/*/finished.json")], "no run of the plan 'A plan'"),
        (lambda results: (results / "plain/seed1/finished.json").write_text("[]"), "seed1/finished.json: expected"),
        (lambda results: (results / "plain/seed1/finetuned/metrics.json").unlink(), "seed1/finetuned: the run has"),
        (lambda results: (results / "plain/seed1/heated/log.jsonl").write_text("x\n"), "seed1/heated/log.jsonl: holds"),
        (lambda results: (results / "tables.md").write_text("my own"), "tables.md: is there and not of this command"),
    ],
)
def test_what_does_not_fit_is_named(break_it, message, results, tmp_path):
    break_it(results)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=message):
        analyse.main([str(write_plan(tmp_path, 3)), str(results), "--resamples", "5"])
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def test_patterns_that_fit_no_class_are_named(results, tmp_path):
    plan = read_plan(write_plan(tmp_path, 3))
    with pytest.raises(UserError, match="no class of any task is like hard='mr-liver'"):
        read_tasks(Plan("", "", plan.arms, "plain", hard="mr-liver"), read_runs(plan, results))


def test_the_command_starts_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
    for name in [name for name in sys.modules if name.split(".")[0] == "experiments"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["analyse.py", "no-plan.py", "runs"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "experiments" / "analyse.py"), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: no-plan.py: no such file")
