"""Runs of plans that end, fail, stop and go on: scripts stand in for the two, since theirs take seconds to start."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from experiments import run
from tests.conftest import ROOT
from utils.runtime.errors import UserError


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A _normal/train.py that notes each start, fails with `--fail`, and with `--wait` waits for SIGTERM, but once."""
    script = tmp_path / "code" / "_normal" / "train.py"
    script.parent.mkdir(parents=True)
    script.write_text(
        textwrap.dedent(
            """
            import pathlib, signal, sys, time
            folder = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            test = "--test-only" in sys.argv
            with (folder / "starts.txt").open("a") as file, (folder.parents[2] / "all.txt").open("a") as all_starts:
                file.write("test" if test else "train")
                all_starts.write(f"{folder}\\n")
            if "--fail" in sys.argv or ("--fail-once" in sys.argv and not (folder / "failed").exists()):
                (folder / "failed").touch()
                sys.exit("error: nothing to be had.")
            if "--wait" in sys.argv and not test and not (folder / "stopped").exists():
                signal.signal(signal.SIGTERM, lambda *_: ((folder / "stopped").touch(), sys.exit(75)))
                time.sleep(60)
            for name in ("metrics.json", "predictions.csv") if test else ("log.jsonl", "model_best.pth"):
                (folder / name).write_text("made")
            (folder / "plots").mkdir(exist_ok=True)
            """
        )
    )
    monkeypatch.setattr(run, "ROOT", script.parents[1])
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)  # which would outlast the test
    return tmp_path


def write_plan(folder, **flags):
    arms = ", ".join(f"Arm({name!r}, (Stage('only', '_normal', {of!r}, test='all'),), 1)" for name, of in flags.items())
    path = folder / "plan.py"
    path.write_text(
        f"from experiments.plan import Arm, Plan, Stage\nPLAN = Plan('p', '?', ({arms},), {next(iter(flags))!r})\n"
    )
    return path


def run_plan(folder, *more, **flags):
    run_written(folder, write_plan(folder, **flags), *more)


def run_written(folder, plan, *more):
    run.main([str(plan), "--data-path", str(folder), "-o", str(folder / "out"), *more])


def starts(folder):
    return (folder / "all.txt").read_text().split() if (folder / "all.txt").exists() else []


def test_a_finished_run_is_not_run_again_and_is_kept_small(stand_in, capsys):
    run_plan(stand_in, first="--epochs 1", second="--epochs 1")
    folder = stand_in / "out" / "first" / "seed0"
    assert sorted(path.name for path in (folder / "only").iterdir()) == ["log.jsonl", "metrics.json", "predictions.csv"]
    assert sorted(path.name for path in folder.iterdir()) == ["finished.json", "only"]
    assert len(starts(stand_in / "out")) == 4  # two runs, trained and tested
    run_plan(stand_in, first="--epochs 1", second="--epochs 1", third="--epochs 1")
    assert len(starts(stand_in / "out")) == 6
    assert "p: 3 runs, 2 finished before" in capsys.readouterr().out


def test_a_finished_run_of_another_plan_is_not_taken_for_this_one(stand_in):
    run_plan(stand_in, first="--epochs 1")
    with pytest.raises(
        UserError, match=r"seed0: was run with other stages than the plan says now; give another --output"
    ):
        run_plan(stand_in, first="--epochs 2")


def test_a_run_that_fails_does_not_stop_the_others(stand_in, capsys):
    with pytest.raises(UserError, match=r"1 runs failed \(bad, seed 0\)"):
        run_plan(stand_in, bad="--fail --epochs 1", good="--epochs 1")
    assert (stand_in / "out" / "good" / "seed0" / "finished.json").exists()
    assert not (stand_in / "out" / "bad" / "seed0" / "finished.json").exists()
    assert "bad, seed 0: failed in only with exit code 1: error: nothing to be had." in capsys.readouterr().out


def test_the_deadline_stops_runs_and_they_go_on_next_time(stand_in, capsys):
    """One waits when the deadline comes, one is not begun any more; both are done the next time."""
    run_plan(stand_in, "--minutes", "0.03", waits="--wait --epochs 1", other="--epochs 1")
    said = capsys.readouterr().out
    assert "waits, seed 0: interrupted; it goes on" in said and "other, seed 0: finished" not in said
    assert "2 runs are not finished" in said
    run_plan(stand_in, waits="--wait --epochs 1", other="--epochs 1")
    assert "other, seed 0: finished" in capsys.readouterr().out
    text = (stand_in / "out" / "all.txt").read_text()
    assert text.count("waits") == 3  # trained, stopped, trained, tested


def test_no_run_is_begun_that_would_not_be_done(stand_in, capsys, monkeypatch):
    run_plan(stand_in, first="--epochs 1")
    finished = stand_in / "out" / "first" / "seed0" / "finished.json"
    finished.write_text(json.dumps({**json.loads(finished.read_text()), "seconds": 600}))
    assert run.expected_seconds(stand_in / "out", "first") == 600
    asked = []
    monkeypatch.setattr(run.Machine, "has_time_for", lambda _, seconds: asked.append(seconds))
    run_plan(stand_in, first="--epochs 1", second="--epochs 1")
    assert "second, seed 0: left for another time" in capsys.readouterr().out and asked == [600]


def test_time_is_left_for_what_fits_it_and_for_what_never_would(monkeypatch):
    """With 10 minutes in all, of which 4 are left, the second kind would otherwise never be begun."""
    machine = run.Machine(1, 10)
    monkeypatch.setattr(run.time, "monotonic", lambda: machine.deadline - 240)
    assert [machine.has_time_for(seconds) for seconds in (0, 239, 241, 599, 601)] == [True, True, False, False, True]


CHAIN = """
from experiments.plan import Arm, Plan, Stage
stages = (
    Stage("first", "_normal", "--epochs 1"),
    Stage("second", "_normal", "--epochs 1 {flags}", start="first/model_best.pth", test="all"),
)
PLAN = Plan("p", "?", (Arm("chain", stages, 1),), "chain")
"""


def test_a_run_goes_on_at_the_stage_where_it_ended(stand_in):
    """What is done is not started again, and has already lost what nothing later needs; its seconds count."""
    plan = stand_in / "plan.py"
    plan.write_text(CHAIN.format(flags="--fail-once"))
    with pytest.raises(UserError, match="1 runs failed"):
        run_written(stand_in, plan)
    folder = stand_in / "out" / "chain" / "seed0"
    assert sorted(path.name for path in (folder / "first").iterdir()) == ["log.jsonl", "model_best.pth"]
    progress = json.loads((folder / "progress.json").read_text())
    assert progress["done"] == 1
    (folder / "progress.json").write_text(json.dumps({**progress, "seconds": 100}))
    run_written(stand_in, plan)
    assert [Path(start).name for start in starts(stand_in / "out")] == ["first", "second", "second", "second"]
    assert json.loads((folder / "finished.json").read_text())["seconds"] >= 100
    assert sorted(path.name for path in folder.iterdir()) == ["finished.json", "first", "second"]
    assert sorted(path.name for path in (folder / "first").iterdir()) == ["log.jsonl"]


def test_a_run_that_was_begun_with_other_stages_does_not_go_on(stand_in):
    """Its checkpoint would: a flag that the plan has lost is taken from there."""
    with pytest.raises(UserError, match="1 runs failed"):
        run_plan(stand_in, first="--fail --epochs 1")
    with pytest.raises(UserError, match="seed0: was begun with other stages than the plan says now"):
        run_plan(stand_in, first="--epochs 1")
    assert len(starts(stand_in / "out")) == 1


def test_a_run_that_another_process_runs_is_left_to_it(stand_in, capsys):
    """A training outlives a run.py that is killed, and holds the lock that it inherited with its output."""
    folder = stand_in / "out" / "first" / "seed0"
    folder.mkdir(parents=True)
    with (folder / "output.txt").open("ab") as output:
        assert run._lock(output)
        training = subprocess.Popen(["sleep", "60"], stdout=output)
    run_plan(stand_in, first="--epochs 1")
    assert "first, seed 0: left to another process" in capsys.readouterr().out and not starts(stand_in / "out")
    training.kill()
    training.wait()
    run_plan(stand_in, first="--epochs 1")
    assert "first, seed 0: finished" in capsys.readouterr().out


def test_a_process_that_starts_while_all_are_stopped_is_stopped_too(tmp_path, monkeypatch):
    machine = run.Machine(1, float("inf"))
    started = subprocess.Popen

    def start(*arguments, **more):
        machine.stop()  # which finds no process yet
        return started(*arguments, **more)

    monkeypatch.setattr(run.subprocess, "Popen", start)
    with (tmp_path / "output.txt").open("ab") as output:
        assert machine.execute(["sleep", "20"], output) == -signal.SIGTERM
        assert machine.execute(["sleep", "20"], output) == run.INTERRUPTED


def test_processes_see_the_modules_of_the_user_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/modules")
    with (tmp_path / "output.txt").open("ab") as output:
        assert run.Machine(1, float("inf")).execute(["sh", "-c", "echo $PYTHONPATH"], output) == 0
    assert (tmp_path / "output.txt").read_text() == f"{ROOT}:/modules\n"


def test_several_at_a_time_have_a_gpu_each(monkeypatch):
    """Of those that may be seen."""
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    for visible, expected in (("", ["0", "1", "0", "1"]), ("5,7", ["5", "7", "5", "7"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        slots = run.Machine(4, float("inf"))._slots
        assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == expected


def test_sigterm_to_the_command_stops_what_runs(stand_in):
    """The command as typed: its runs are told to stop, it ends by itself, and says what is left."""
    code = stand_in / "code"
    for package in ("experiments", "utils"):
        shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("results", "__pycache__"))
    plan = write_plan(stand_in, waits="--wait --epochs 1")
    command = [sys.executable, "experiments/run.py", plan, "--data-path", stand_in, "-o", stand_in / "out"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=code)
    deadline = time.monotonic() + 60
    while not starts(stand_in / "out") and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # for the handler of what was started
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert "waits, seed 0: interrupted" in said and process.returncode == 0
    assert (stand_in / "out" / "waits" / "seed0" / "only" / "stopped").exists()


def test_bad_input_gets_a_sentence(tmp_path):
    plan = str(ROOT / "experiments" / "plans" / "classification_small.py")
    output = ["-o", str(tmp_path / "out")]
    with pytest.raises(UserError, match="none: no such folder; expected DATA/"):
        run.main([plan, "--data-path", str(tmp_path / "none"), *output])
    with pytest.raises(UserError, match="--jobs 0: expected 1 or more"):
        run.main([plan, "--data-path", str(tmp_path), "--jobs", "0", *output])
    assert not (tmp_path / "out").exists()


# gpu.sh, with a Python that stands in


@pytest.fixture
def gpu_script(tmp_path):
    """A copy of it among two plans, with a Python that notes its command line, and fails or stops of a plan if told."""
    root = tmp_path / "root"
    (root / "experiments" / "plans").mkdir(parents=True)
    shutil.copy(ROOT / "experiments" / "gpu.sh", root / "experiments")
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> "$NOTES"\n'
        'case "$*" in *run.py*plans/$FAILS.py*) exit 2;; *run.py*plans/$WAITS.py*) '
        "trap 'exit 0' TERM; touch $NOTES.waits; sleep 60 & wait;; esac\n"
    )
    python.chmod(0o755)
    (tmp_path / "data").mkdir()

    def start(*plans, **environment):
        given = {"PYTHON": str(python), "NOTES": str(tmp_path / "notes"), "FAILS": "none", "WAITS": "none"}
        command = ["bash", "root/experiments/gpu.sh", "data", *plans]
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | given | environment)

    return start


def commands_noted(folder):
    return [line.split()[:2] for line in (folder / "notes").read_text().splitlines()]


def test_gpu_script_takes_finished_runs_along_and_whole(gpu_script, tmp_path):
    """$OUT is of the folder where it was typed. What is begun, or finished there, is not mixed with what is copied."""
    results, out = tmp_path / "root" / "experiments" / "results" / "a" / "arm", tmp_path / "out" / "a" / "arm"
    for folder, names in (
        (results / "seed0", ("finished.json", "log.jsonl")),
        (results / "seed1", ("log.jsonl",)),
        (results / "seed2", ("finished.json", "log.jsonl")),
        (out / "seed0", ("log.jsonl", "checkpoint.pth")),
        (out / "seed2", ("finished.json",)),
    ):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text(folder.parts[-4])
    for _ in range(2):
        assert gpu_script("a", OUT="out").wait(30) == 0
    left = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert left == {"seed0/finished.json": "results", "seed0/log.jsonl": "results", "seed2/finished.json": "out"}
    assert f"-o {tmp_path}/out/a --jobs 6 --minutes 9 " in (tmp_path / "notes").read_text()


def test_gpu_script_goes_on_with_the_next_plan_when_one_fails(gpu_script, tmp_path):
    assert gpu_script("a", "b", FAILS="a").wait(30) == 1
    run_py, analyse_py = "experiments/run.py", "experiments/analyse.py"
    plans = ("experiments/plans/a.py", "experiments/plans/b.py")
    assert commands_noted(tmp_path) == [[command, plan] for plan in plans for command in (run_py, analyse_py)]


def test_gpu_script_stops_when_it_is_told_to(gpu_script, tmp_path):
    """SIGTERM to the script alone reaches its runs, and no other plan is begun."""
    process = gpu_script("a", "b", WAITS="a")
    deadline = time.monotonic() + 30
    while not (tmp_path / "notes.waits").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert [plan for _, plan in commands_noted(tmp_path)] == ["experiments/plans/a.py"] * 2
