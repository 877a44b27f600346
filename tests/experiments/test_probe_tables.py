"""Stages with probes: their commands, the chain from training to table, and differences by hand."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments import paired_tables, probe_tables, run
from experiments.paired_tables import Row
from experiments.plan import PROBE, Arm, Plan, Stage, read_plan
from tests.conftest import ROOT, SMALL, write_image_folder
from tests.helpers.finished_runs import finish
from utils.runtime.errors import UserError

PLAN = """
from experiments.plan import Arm, Plan, Stage, Subset
STAGES = (
    Stage("others", "_normal", "{flags} --epochs 1", subset=Subset(without="us-*")),
    Stage("concept", "{probe}", "--shots 2 --draws 2", "others/model_best.pth",
          subset=Subset("us-*", shots=4, draw="seed", test="rest")),
)
PLAN = Plan("p", "Does it carry over?", (Arm("a", STAGES, 1, first_seed=3),), "a")
"""


def test_the_command_of_a_probe_has_those_flags_of_a_training_that_it_knows(tmp_path):
    stage = Stage("breast", PROBE, "--shots 5 10", "second/model_best.pth")
    flags = shlex.split("--workers 0 --print-freq 1000 --cache-dir CACHE --device cpu --amp --exclude LIST")
    (command,) = run.commands(stage, 7, Path("out/arm/seed7"), Path("DATA"), flags, ranks=8)
    assert shlex.join(command[1:]) == (
        "-m utils.probe out/arm/seed7/second/model_best.pth --data-path DATA --workers 0 --device cpu --exclude LIST "
        "--shots 5 10 --seed 7 --output-dir out/arm/seed7/breast --overwrite"
    )


@pytest.mark.slow
def test_a_plan_with_probes_runs_from_training_to_table(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", ("bright", "dark", "us-a", "us-b"))
    plan, out = tmp_path / "plan.py", tmp_path / "out"
    plan.write_text(PLAN.format(flags=shlex.join(SMALL[2:]), probe=PROBE))
    flags = "--device cpu --workers 0 --print-freq 1000"
    run.main([str(plan), "--data-path", str(data), "-o", str(out), "--flags", flags])
    folder = out / "a" / "seed3"
    kept = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert kept == {"finished.json", "others/log.jsonl", "others/run.json", "concept/probe.json"}
    content = json.loads((folder / "concept" / "probe.json").read_text())
    assert content["classes"] == ["us-a", "us-b"] and content["settings"]["seed"] == 3
    assert [content["data"][split]["images"] for split in ("train", "val", "test")] == [8, 14, 22]  # 2 x (12 + 3 - 4)
    table = tmp_path / "tables" / "probes.csv"
    probe_tables.main([str(plan), str(out), "-o", str(table)])
    few = [result["metrics"]["f1"] for result in content["results"] if result["probe"] == "knn" and result["shots"]]
    rows = paired_tables.read_rows(table, read_plan(plan), probe_tables.PARTS, probe_tables.REPORTED)
    assert len(rows) == 2 * 2
    assert rows[0].condition == ("concept", "kNN", "2") and rows[0].values["f1"] == pytest.approx(np.mean(few))
    text = table.with_suffix(".md").read_text()
    assert "| concept | logistic regression | all | " in text and text in capsys.readouterr().out


F1 = {("a", 0): (0.50, 0.60), ("a", 1): (0.55, 0.45), ("a", 2): (0.6, 0.6), ("b", 0): (0.7, 0.6), ("b", 1): (0.5, 0.62)}


@pytest.fixture
def results(tmp_path):
    """Runs of two arms with two draws each, as F1 says; "b" lacks the third seed."""
    for (arm, seed), draws in F1.items():
        folder = tmp_path / "out" / arm / f"seed{seed}"
        (folder / "breast").mkdir(parents=True)
        few = [{"probe": "knn", "shots": 5, "metrics": {"f1": f1, "balanced_accuracy": 0.5}} for f1 in draws]
        full = {"probe": "logistic", "shots": None, "metrics": {"f1": 0.5, "balanced_accuracy": 0.5}}
        (folder / "breast" / "probe.json").write_text(json.dumps({"results": [*few, full]}))
        finish(tmp_path / "out", arm, seed)
    return tmp_path / "out"


STAGES = (Stage("breast", PROBE, "", "x/model_best.pth"),)
ARMS = (Arm("a", STAGES, 3), Arm("b", STAGES, 3))


def test_the_table_of_probes_equals_numbers_by_hand(results):
    plan = Plan("p", "?", ARMS, "a")
    text = probe_tables.page(plan, probe_tables.read_probes(plan, results))
    differences = 100 * np.array([0.65 - 0.55, 0.56 - 0.5])
    low, high = stats.t.interval(0.95, 1, differences.mean(), stats.sem(differences))
    assert f"| breast | kNN | 5 | b | a | 2 | +8.00 ({low:+.2f} to {high:+.2f}) | +0.00 |" in text
    assert "| breast | logistic regression | all | b | a | 2 | +0.00 | +0.00 |" in text
    assert "| breast | kNN | 5 | 52.50 | 60.50 |" in text  # means of the two seeds that both have


def test_lower_losses_are_better_and_undefined_values_are_dashes():
    rows = [
        Row(arm, seed, ("t",), {"balanced_loss": loss})
        for arm, losses in {"a": (1.0, 1.25, 2.0), "b": (0.5, 1.0)}.items()
        for seed, loss in enumerate(losses)
    ]
    assert paired_tables.differences(rows, ("t",), "b", "a", "balanced_loss").tolist() == [0.5, 0.25]
    plan = Plan("p", "?", (*ARMS, Arm("c", STAGES, 1, control="b")), "a")
    rows.append(Row("c", 0, ("t",), {"balanced_loss": float("inf")}))
    text = paired_tables.differences_table(plan, rows, ("task",), ("balanced_loss",))
    assert "| t | c | b | 1 | \N{EN DASH} |" in text and "| t | b | a | 2 | +0.375 (" in text


def test_rows_of_a_file_are_read_back_and_another_plans_are_refused(tmp_path):
    path, plan = tmp_path / "rows.csv", Plan("p", "?", (Arm("=a,\n", STAGES, 2), Arm("b", STAGES, 2)), "b")
    rows = [Row(arm.name, seed, ("x", "5"), {"f1": 1 / 3 + seed}) for seed in range(2) for arm in plan.arms]
    paired_tables.write_rows(path, plan, ("part", "images"), reversed(rows))
    assert paired_tables.read_rows(path, plan, ("part", "images"), ("f1",)) == rows
    with pytest.raises(UserError, match="holds results of the plan 'p', not of 'q'"):
        paired_tables.read_rows(path, Plan("q", "?", ARMS, "a"), ("part", "images"), ("f1",))
    with pytest.raises(UserError, match="was not written by this command"):
        paired_tables.read_rows(path, plan, ("part", "shift"), ("f1",))


def test_bad_input_gets_a_sentence(results, tmp_path):
    plan = Plan("p", "?", ARMS, "a")
    with pytest.raises(UserError, match="no run of the plan 'p' has finished"):
        probe_tables.read_probes(plan, tmp_path)
    with pytest.raises(UserError, match="has no stage with probes"):
        probe_tables.read_probes(read_plan(ROOT / "experiments" / "plans" / "small.py"), results)
    for content in ("{}", "[]", '{"results": [1]}', '{"results": [{"probe": "x", "shots": 1, "metrics": {}}]}'):
        (results / "b" / "seed0" / "breast" / "probe.json").write_text(content)
        with pytest.raises(UserError, match=r"seed0/breast/probe\.json: missing or damaged"):
            probe_tables.read_probes(plan, results)
