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
from experiments.finished import read_runs, read_tasks
from experiments.plan import Arm, Plan, Stage, read_plan
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
    runs = read_runs(plan, results)
    tasks = read_tasks(plan, runs)
    return analyse.page(plan, runs, tasks, compare(plan, tasks, 20), 20)


def cells(text: str, *beginning: str) -> list[str]:
    """The remaining cells of the one table row that begins with these."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if tuple(row[: len(beginning)]) == beginning]
    return row[len(beginning) :]


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
    row = cells(text, "plain", "3")
    assert row[0] == "75.00 ± 0.00"  # 9 of 12
    assert [row[2], row[6]] == [f"{overall[0]:.2f} ± 0.00", f"{hard[0]:.2f} ± 0.00"]
    assert row[4:6] == ["62.50 ± 0.00", "62.50 ± 0.00"]  # 5 of 8
    row = cells(text, "learned", "3")
    assert row[0] == f"83.33 ± {100 / 12:.2f}"  # 9, 10 and 11 of 12
    assert [row[2], row[6]] == [f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" for values in (overall, hard)]
    # One-vs-rest: every recognised us-breast-cyst is above all other images, the rest are level with them.
    aurocs = [np.mean([1, right / 4 + (1 - right / 4) / 2]) for right in (1, 2, 3)]
    assert row[7] == f"{np.mean(aurocs):.4f} ± {np.std(aurocs, ddof=1):.4f}".replace("0.", ".")
    difference = hard - hard[0]
    mean, half = difference.mean(), 4.302653 * difference.std(ddof=1) / 3**0.5
    row = cells(text, "hard: macro F1", "learned")
    assert row[:3] == ["3", f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"]
    assert row[4] == f"{mean / difference.std(ddof=1):+.2f}" and row[6] == DASH
    assert cells(text, "top-1", "learned")[:2] == ["3", "+8.33"]
    assert "2^(1-n), 0.25 with 3" in text and "primary" not in text
    assert cells(text, "`policy_entropy`") == ["-0.2500 → -0.2500"]
    assert cells(text, "`val_top1`, last epoch") == ["0.6250"]
    assert cells(text, "`mask_mean`") == [DASH]
    assert "12 test images of 3 classes, 2 of them hard" in text and "6 of 6 planned runs have finished." in text
    assert "torch 2.14.1; CPU (Linux x86_64, 2 CPU cores); 2026-11-23; commit 0123456789ab; 3.0 hours" in text


def test_unfinished_runs_are_left_out_and_named(results, tmp_path):
    for name in ("learned/seed2/finished.json", "learned/seed2/finetuned/per_class.csv", "plain/seed0/finished.json"):
        (results / name).unlink()
    text = page_of(read_plan(write_plan(tmp_path, 4)), results)
    assert "4 of 8 planned runs have finished." in text
    assert "missing plain seed 0, learned seed 2, plain seed 3, learned seed 3." in text
    row = cells(text, "top-1", "learned")
    assert row[:3] == ["1", "+8.33", DASH]  # from seed 1 alone
    assert row[4:] == [DASH] * 3


def test_one_seed_has_no_spread(finished, tmp_path):
    text = page_of(read_plan(write_plan(tmp_path, 1)), finished)
    assert cells(text, "learned", "1")[0] == f"75.00 ± {DASH}"
    assert cells(text, "top-1", "learned")[:3] == ["1", "+0.00", DASH]
    assert not re.search(r"\bnan\b", text)


def test_p_values_need_eight_seeds_and_are_for_hard_f1_only(tmp_path):
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
    assert cells(text, "hard: macro F1", "learned")[-1] == "0.016 (primary)"  # 7 equal ones, one 0: 4 of 256
    assert len(re.findall(r"\(primary\)|\(secondary\)", text)) == 1
    assert "Primary: learned in images" in text and "Secondary" not in text
    # The same arm twice, without a primary test: Holm's p of two tests.
    (results / "again").symlink_to(results / "learned")
    plan = Plan("", "", (*plan.arms, Arm("again", plan.arms[1].stages, 8)), "plain")
    tested = [row for row in compare(plan, read_tasks(plan, read_runs(plan, results)), 20) if row.p is not None]
    expected = [(arm, "hard_f1", False, 2 * 4 / 256) for arm in ("learned", "again")]
    assert [(row.arm, row.metric, row.primary, row.p) for row in tested] == expected


def test_the_figure_of_differences_shows_each_seed(finished, plan):
    tasks = read_tasks(plan, read_runs(plan, finished))
    comparisons = compare(plan, tasks, 5)
    (axes,) = pictures.differences(plan, tasks, comparisons).axes
    hard_f1 = next(comparison for comparison in comparisons if comparison.metric == "hard_f1")
    assert list(axes.collections[0].get_offsets()[:, 0]) == pytest.approx(list(100 * hard_f1.differences))
    interval, mean, zero = axes.lines
    assert interval.get_xdata() == pytest.approx([100 * end for end in hard_f1.t])
    assert mean.get_xdata() == pytest.approx(100 * hard_f1.differences.mean()) and list(zero.get_xdata()) == [0, 0]
    assert pictures.differences(plan, tasks, []) is None


def test_the_validation_figure_concatenates_stages(finished, plan):
    runs = read_runs(plan, finished)
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
    few, whole = read_tasks(plan, read_runs(plan, tmp_path))
    assert [few.runs[arm, 0].metrics["top1"] for arm in "ab"] == [(5 + 6) / 16, (6 + 8) / 16]
    assert whole.has_easy and few.runs["a", 0].predictions.shape == (2, 8)
    differences = {comparison.metric: comparison.differences[0] for comparison in compare(plan, [few], 10)}
    assert differences["top1"] == pytest.approx(3 / 16)
    chains = pictures.chains(plan.arms[0], "few")
    assert [[stage.name for stage in chain] for chain in chains] == [["heated", "draw0"], ["heated", "draw1"]]
    text = page_of(Plan("", "", plan.arms, "a", hard="*"), tmp_path)
    assert "hard:" not in text and "Each run is the mean of 2 draws" in text


def test_different_commits_and_versions_are_reported(results, plan):
    origin = {"commit": None, "versions": {"torch": "2.11.0"}, "time": "2026-11-25T09:00:00+00:00"}
    write_run(results, "learned", 2, (4, 4, 3), **origin)
    text = analyse.provenance(read_runs(plan, results))
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
         r"plain/seed0/finetuned and .*learned/seed1/finetuned: were tested on different images"),
        ("plain/*/finished.json", None, "baseline 'plain'"),
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
