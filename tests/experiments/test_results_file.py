"""The file of collected runs: the same tables as from the folders, its size and bytes, and what it refuses."""

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import analyse, collect
from experiments.differences import compare
from experiments.plan import Arm, Plan, Stage, Subset, read_plan
from experiments.results_file import pack, read_collected
from experiments.run_results import read_folders
from experiments.tasks import read_tasks
from tests.helpers.finished_runs import finish, write_stage, write_test
from utils.runtime.errors import UserError

CLASSES = ["mr-brain", "us-breast", "xr-hand"]
PLAN = """
from experiments.plan import Arm, Plan, Stage, Subset

SUBSET = Subset(shots=2, draw="seed", test="rest")

def arm(name, flags=""):
    stages = (
        Stage("heated", "_policy_gradient", f"--epochs 4 {flags}", average=1, subset=SUBSET),
        Stage("finetuned", "_normal", "--epochs 3", "heated/average.pth", test="rest", subset=SUBSET),
    )
    return Arm(name, stages, SEEDS, 3)

ARMS = (arm("plain"), arm("masked", "--lr 0.1"))
PLAN = Plan("drawn", "Does it help?", ARMS, "plain", outcome="balanced_loss", hard="*")
"""


def write_plan(folder: Path) -> Path:
    path = folder / "plan.py"
    path.write_text(PLAN.replace("SEEDS", "3"))
    return path


def write_run(results: Path, arm: str, seed: int, gain: float) -> None:
    """A run on 30 + seed images of its seed; the logits of the true class grow by `gain`."""
    folder, generator = results / arm / f"seed{seed}", torch.Generator().manual_seed(seed)
    log = [{"val_f1": 0.25 * n, "mask_mean": 1 / 3, "policy_entropy": -0.5} for n in range(4)]
    write_stage(folder / "heated", log)
    write_stage(folder / "finetuned", log[:3])
    targets = torch.arange(30 + seed) % 3
    logits = torch.randn(len(targets), 3, generator=generator)
    logits[torch.arange(len(targets)), targets] += gain
    write_test(folder / "finetuned", logits, targets, CLASSES)
    finish(results, arm, seed)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in range(3, 6):
        write_run(folder, "plain", seed, 1.0)
        write_run(folder, "masked", seed, 1.25)
    return folder


@pytest.fixture(scope="module")
def collected(results: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The content of the file."""
    plan = read_plan(write_plan(tmp_path_factory.mktemp("plan")))
    return pack(plan, read_folders(plan, results))


@pytest.mark.slow
def test_the_file_gives_the_tables_of_the_folders(results, collected, tmp_path, capsys):
    plan, file = str(write_plan(tmp_path)), tmp_path / "new" / "runs.npz"
    collect.main([plan, str(results), "-o", str(file)])
    assert "6 of 6 runs of drawn" in capsys.readouterr().out
    analyse.main([plan, str(results), "-o", str(tmp_path / "of folders")])
    analyse.main([plan, str(file)])
    first, second = ((folder / "tables.md").read_text() for folder in (tmp_path / "of folders", file.parent))
    number = r"\d*\.\d+"
    assert re.sub(number, "", first) == re.sub(number, "", second)
    values = ([float(value) for value in re.findall(number, text)] for text in (first, second))
    np.testing.assert_allclose(*values, rtol=1e-3, atol=0.011)  # float16, and rounding of what is printed
    assert (
        "33 to 35 test images, other ones for each seed, of 3 classes. The test images of two seeds overlap" in first
        and "bootstrap" not in first
    )
    # Losses are float16, classes exact; a second file has the same bytes.
    assert collected == file.read_bytes()
    drawn = read_plan(tmp_path / "plan.py")
    original = read_tasks(drawn, read_folders(drawn, results).runs)[0].runs
    stored = read_tasks(drawn, read_collected(drawn, file).runs)[0].runs
    for key, tested in original.items():
        assert (stored[key].predictions == tested.predictions).all()
        np.testing.assert_allclose(stored[key].losses, tested.losses, rtol=2**-11)
        assert stored[key].metrics == pytest.approx(tested.metrics, rel=2**-11, abs=1e-3)


def test_the_differences_are_within_each_seed(results, tmp_path):
    """Without a bootstrap over images, which are other ones for each seed."""
    plan = read_plan(write_plan(tmp_path))
    tasks = read_tasks(plan, read_folders(plan, results).runs)
    row = compare(plan, tasks, 10)[0]
    assert (row.outcome, row.interval, row.better[0]) == ("balanced_loss", None, 1)
    expected = []
    for seed in range(3, 6):
        losses = []
        for gain in (1.25, 1.0):
            targets = torch.arange(30 + seed) % 3
            logits = torch.randn(len(targets), 3, generator=torch.Generator().manual_seed(seed))
            logits[torch.arange(len(targets)), targets] += gain
            weights = 1 / targets.bincount().double()
            losses.append(torch.nn.functional.cross_entropy(logits.double(), targets, weights).item())
        expected.append(losses[1] - losses[0])
    assert row.differences == pytest.approx(expected, abs=2e-6)  # six decimals in predictions.csv


def test_arms_of_a_seed_must_have_seen_the_same_images(results, tmp_path):
    plan = str(write_plan(tmp_path))
    results = Path(shutil.copytree(results, tmp_path / "runs"))
    path = results / "masked" / "seed4" / "finetuned" / "predictions.csv"
    path.write_text(path.read_text().replace("/0.png", "/other.png"))
    with pytest.raises(UserError, match="plain, seed 4 and masked, seed 4: were tested on different images"):
        collect.main([plan, str(results), "-o", str(tmp_path / "runs.npz")])
    assert not (tmp_path / "runs.npz").exists()


def test_logs_keep_what_tables_and_figures_need(results, tmp_path):
    plan = read_plan(write_plan(tmp_path))
    log = read_folders(plan, results).runs["plain", 3].logs["heated"]
    assert [line.get("mask_mean") for line in log] == [1 / 3, None, None, 1 / 3]
    assert [(line["epoch"], line["val_f1"]) for line in log] == [(0, 0), (1, 0.25), (2, 0.5), (3, 0.75)]


def rewrite(path: Path, **changes: object) -> None:
    """Change values of the metadata, or arrays."""
    with np.load(path) as archive:
        arrays = dict(archive)
    metadata = json.loads(arrays["metadata"].tobytes())
    for name, value in changes.items():
        if name in arrays:
            arrays[name] = value
        else:
            metadata[name] = value
    arrays["metadata"] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "not a file of experiments/collect.py, or damaged"),
        (lambda path: path.write_bytes(b""), "not a file of experiments/collect.py, or damaged"),
        (lambda path: np.savez(path, a=np.array([{}], object)), "not a file of experiments/collect.py, or damaged"),
        (lambda path: rewrite(path, predictions=np.zeros(3, np.uint8)), "or damaged"),
        (lambda path: rewrite(path, losses=np.zeros(3, np.float16)), "or damaged"),
        (lambda path: rewrite(path, confidences=np.zeros(3, np.float16)), "or damaged"),
        (lambda path: rewrite(path, predictions=np.full(204, 3, np.uint8)), "or damaged"),
        (lambda path: rewrite(path, runs=[{}]), "or damaged"),
        (lambda path: rewrite(path, runs=[]), "or damaged"),
        (lambda path: rewrite(path, format=2), "has format 2; this version reads format 1"),
        (lambda path: rewrite(path, stages={"plain": []}), "the runs of 'plain' have other stages than the plan"),
    ],
)
def test_a_damaged_file_or_one_of_another_plan_is_refused(change, message, collected, tmp_path):
    plan, file = write_plan(tmp_path), tmp_path / "runs.npz"
    file.write_bytes(collected)
    change(file)
    with pytest.raises(UserError, match=message):
        read_collected(read_plan(plan), file)


def test_a_file_without_runs_of_the_plan_is_refused(collected, tmp_path):
    plan, file = read_plan(write_plan(tmp_path)), tmp_path / "runs.npz"
    file.write_bytes(collected)
    later = replace(plan, arms=tuple(replace(arm, first_seed=9) for arm in plan.arms))
    with pytest.raises(UserError, match="holds no run of the plan 'drawn'"):
        read_collected(later, file)


def test_an_existing_file_is_kept(results, tmp_path):
    file = tmp_path / "runs.npz"
    file.write_text("mine")
    with pytest.raises(UserError, match=r"runs\.npz"):
        collect.main([str(write_plan(tmp_path)), str(results), "-o", str(file)])
    assert file.read_text() == "mine"
    collect.main([str(write_plan(tmp_path)), str(results), "-o", str(file), "--overwrite"])
    assert np.load(io.BytesIO(file.read_bytes()))["losses"].dtype == np.float16


def test_a_shared_test_set_must_be_shared_by_all_seeds(results, tmp_path):
    """As in plans whose runs are all tested on the images of `test`."""
    stages = (
        Stage("heated", "_policy_gradient", "--epochs 4"),
        Stage("finetuned", "_normal", "--epochs 3", test="rest", subset=Subset(test="rest")),
    )
    plan = Plan("", "", (Arm("plain", stages, 3, 3),), "plain")
    with pytest.raises(UserError, match="plain, seed 3 and plain, seed 4: were tested on different images"):
        read_tasks(plan, read_folders(plan, results).runs)


@pytest.mark.slow
def test_all_arms_can_be_compared_with_another(results, tmp_path):
    plan = read_plan(write_plan(tmp_path))
    tasks = read_tasks(plan.against("masked"), read_folders(plan, results).runs)
    usual, turned = (compare(with_control, tasks, 10) for with_control in (plan, plan.against("masked")))
    assert {(found.arm, found.control) for found in turned} == {("plain", "masked")}
    for found, original in zip(turned, usual, strict=True):
        np.testing.assert_array_equal(found.differences, -original.differences)
    with pytest.raises(UserError, match="--against x: expected one of plain, masked"):
        plan.against("x")
    with pytest.raises(UserError, match="--against: needs -o"):
        analyse.main([str(tmp_path / "plan.py"), str(results), "--against", "masked"])
