"""experiments/run.py and gpu.sh: runs that end, fail, stop and resume. A stand-in replaces the training scripts."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest

from experiments import run
from experiments.plan import Stage
from tests.conftest import ROOT
from utils.runtime.errors import UserError

pytestmark = pytest.mark.slow  # each worker starts a warm process, which imports for five seconds

PLAN = """
from experiments.plan import Arm, Plan, Stage
PLAN = Plan("p", "?", ({arms}), "{baseline}")
"""
CHAIN = """Arm("chain", (
    Stage("first", "_normal", "--epochs 1"),
    Stage("second", "_normal", "--epochs 1 {flags}", start="first/model_best.pth", test="all"),
), 1),"""
# Records each start. With --fail it always fails, with --fail-once the first time; with --wait it first waits.
STAND_IN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--output-dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
test, first = "--test-only" in sys.argv, not (folder / "started").exists()
(folder / "started").touch()
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(75)))
with (folder.parents[2] / "starts.txt").open("a") as starts:
    starts.write(f"{folder.parents[1].name}/{folder.name}\\n")
if "--fail" in sys.argv or ("--fail-once" in sys.argv and first):
    sys.exit("error: broken.")
if "--wait" in sys.argv and (first or "RANK" in os.environ):
    time.sleep(60)
for name in ("metrics.json", "predictions.csv") if test else ("log.jsonl", "model_best.pth"):
    (folder / name).write_text("content")
(folder / "plots").mkdir(exist_ok=True)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for data and runs, where code/_normal/train.py stands in for the scripts."""
    script = tmp_path / "code" / "_normal" / "train.py"
    script.parent.mkdir(parents=True)
    script.write_text(STAND_IN)
    monkeypatch.setattr(run, "ROOT", script.parents[1])
    handlers = {number: signal.getsignal(number) for number in run.stopping_signals()}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_plan(folder, *options, **flags):
    """Run a plan whose arms have these flags, each with one stage."""
    arms = "".join(
        f"Arm({arm!r}, (Stage('only', '_normal', {words!r}, test='all'),), 1)," for arm, words in flags.items()
    )
    run_arms(folder, arms, next(iter(flags)), *options)


def run_arms(folder, arms, baseline, *options):
    plan = folder / "plan.py"
    plan.write_text(PLAN.format(arms=arms, baseline=baseline))
    run.main([str(plan), "--data-path", str(folder), "-o", str(folder / "out"), *options])


def starts(folder):
    path = folder / "out" / "starts.txt"
    return path.read_text().split() if path.exists() else []


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_finished_runs_are_kept_small_and_not_run_again(folder, capsys):
    run_plan(folder, "--jobs", "2", first="--epochs 1", second="--epochs 1")
    seed = folder / "out" / "first" / "seed0"
    assert names(seed / "only") == ["log.jsonl", "metrics.json", "predictions.csv"]
    assert names(seed) == ["finished.json", "only"]
    assert len(starts(folder)) == 4  # two runs, trained and tested
    run_plan(folder, first="--epochs 1", second="--epochs 1", third="--epochs 1")
    assert len(starts(folder)) == 6
    assert "p: 3 runs, 2 finished before" in capsys.readouterr().out


@pytest.mark.parametrize("before", ["--epochs 1", "--fail --epochs 1"])
def test_a_run_with_other_stages_is_refused(before, folder):
    """A finished one, and an unfinished one, whose checkpoint would bring its flags along."""
    with pytest.raises(UserError, match="1 runs failed") if "--fail" in before else nullcontext():
        run_plan(folder, first=before)
    count = len(starts(folder))
    with pytest.raises(UserError, match=r"seed0/\w+.json: the run has other stages than the plan"):
        run_plan(folder, first="--epochs 2")
    assert len(starts(folder)) == count


def test_a_run_that_fails_does_not_stop_the_others(folder, capsys):
    with pytest.raises(UserError, match=r"1 runs failed \(bad, seed 0\)"):
        run_plan(folder, bad="--fail --epochs 1", good="--epochs 1")
    assert (folder / "out" / "good" / "seed0" / "finished.json").exists()
    assert not (folder / "out" / "bad" / "seed0" / "finished.json").exists()
    assert "bad, seed 0: failed: only: exit code 1: error: broken. (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("epoch 0\nerror: broken.\n\nRoot Cause:\n=====\n", "error: broken."),
        ("Traceback\nValueError: broken\n \n", "ValueError: broken"),
        ("", "no output"),
    ],
)
def test_the_reason_of_a_failure_is_its_error_or_its_last_line(printed, reason):
    assert run.reason(printed) == reason


def terminate_after_starts(folder, count):
    """Send SIGTERM to this process once the stand-in was started this often."""

    def wait():
        while len(starts(folder)) < count:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def test_a_signal_stops_all_runs_and_they_resume_next_time(folder, capsys):
    terminate_after_starts(folder, 1)
    run_plan(folder, waits="--wait --epochs 1", other="--epochs 1")
    output = capsys.readouterr().out
    assert "waits, seed 0: interrupted" in output and "2 runs are not finished" in output
    assert starts(folder) == ["waits/only"]  # the other run was not started
    run_plan(folder, waits="--wait --epochs 1", other="--epochs 1")
    assert starts(folder) == ["waits/only"] * 3 + ["other/only"] * 2  # trained, tested


def test_torchrun_starts_trainings_and_tests_but_not_averaging(tmp_path):
    stage = Stage("first", "_normal", "--epochs 3", average=3, test="all")
    launchers = [" ".join(command[1:4]) for command in run.commands(stage, 0, tmp_path, tmp_path, [], ranks=8)]
    torchrun = "-m torch.distributed.run --standalone"
    assert launchers == [torchrun, f"-m utils.weight_averaging {tmp_path}/first/model_0.pth", torchrun]


def test_a_signal_reaches_all_processes_of_a_training(folder, capsys):
    terminate_after_starts(folder, 2)
    run_plan(folder, "--processes", "2", waits="--wait --epochs 1")
    assert "waits, seed 0: interrupted" in capsys.readouterr().out
    assert starts(folder) == ["waits/only"] * 2
    assert (folder / "out" / "waits" / "seed0" / "output.txt").read_text().count("saved") == 2


def test_the_deadline_stops_runs(folder, capsys):
    run_plan(folder, "--minutes", "0.005", waits="--wait --epochs 1")
    assert "1 runs are not finished" in capsys.readouterr().out


def test_a_run_resumes_at_the_stage_where_it_ended(folder):
    """Finished stages keep only the weights from which later ones start, and the seconds of both starts count."""
    with pytest.raises(UserError, match="1 runs failed"):
        run_arms(folder, CHAIN.format(flags="--fail-once"), "chain")
    seed = folder / "out" / "chain" / "seed0"
    assert names(seed / "first") == ["log.jsonl", "model_best.pth"]
    progress = json.loads((seed / "progress.json").read_text())
    assert progress["done"] == 1
    (seed / "progress.json").write_text(json.dumps({**progress, "seconds": 100}))
    run_arms(folder, CHAIN.format(flags="--fail-once"), "chain")
    assert starts(folder) == ["chain/first", "chain/second", "chain/second", "chain/second"]
    assert json.loads((seed / "finished.json").read_text())["seconds"] >= 100
    assert names(seed) == ["finished.json", "first", "second"]
    assert names(seed / "first") == ["log.jsonl"]


def test_a_stage_keeps_the_files_that_it_names(folder):
    stage = """Stage("only", "_normal", "--epochs 1", test="all", keep=("model_best.pth", "absent.pth"))"""
    run_arms(folder, f"""Arm("keeps", ({stage},), 1),""", "keeps")
    kept = ["log.jsonl", "metrics.json", "model_best.pth", "predictions.csv"]
    assert names(folder / "out" / "keeps" / "seed0" / "only") == kept


def test_a_run_of_another_process_is_left_to_it(folder, capsys):
    """A training outlives a killed run.py, and still holds the lock on its output."""
    seed = folder / "out" / "first" / "seed0"
    seed.mkdir(parents=True)
    with (seed / "output.txt").open("ab") as output:
        assert run.lock(output)
        training = subprocess.Popen(["sleep", "60"], stdout=output)
    run_plan(folder, first="--epochs 1")
    assert "first, seed 0: left to another process" in capsys.readouterr().out and not starts(folder)
    training.kill()
    training.wait()
    run_plan(folder, first="--epochs 1")
    assert "first, seed 0: finished" in capsys.readouterr().out


def test_a_process_that_starts_during_a_stop_is_stopped(tmp_path, monkeypatch):
    processes, command = run.Processes(1), run.fork_server.Command

    def start(*arguments):
        processes.stop()  # does not see the process yet
        return command(*arguments)

    monkeypatch.setattr(run.fork_server, "Command", start)
    script = tmp_path / "script.py"
    script.write_text("import time\ntime.sleep(60)")
    begin = time.monotonic()
    with (tmp_path / "output.txt").open("ab") as output:
        assert processes.execute([sys.executable, str(script)], output) == run.INTERRUPTED
    assert time.monotonic() - begin < 50
    assert not processes.running


@pytest.mark.parametrize(
    ("gpus", "visible", "ranks", "expected"),
    [
        *((1, "", 1, ["", ""]), (2, "", 1, ["0", "1"]), (2, "5,7", 1, ["5", "7"])),
        *((4, "", 2, ["0,1", "2,3"]), (5, "1,2,3,4,5", 2, ["1,2", "3,4"]), (3, "", 2, ["", ""]), (1, "", 2, ["", ""])),
    ],
)
def test_commands_see_their_gpus_and_the_users_modules(gpus, visible, ranks, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/modules")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: gpus)
    processes, script = run.Processes(2, ranks), tmp_path / "script.py"
    script.write_text("import os\nprint(os.environ['PYTHONPATH'], os.environ['CUDA_VISIBLE_DEVICES'], sep=':')")
    with (tmp_path / "output.txt").open("ab") as output:
        for _ in range(2):
            assert processes.execute([sys.executable, str(script)], output) == 0
    assert (tmp_path / "output.txt").read_text().split() == [f"{ROOT}:/modules:{gpu}" for gpu in expected]


def test_bad_input_gets_a_sentence(tmp_path, monkeypatch):
    plan = str(ROOT / "experiments" / "plans" / "classification.py")
    output = ["-o", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"none: no such folder\. Expected DATA/"):
        run.main([plan, "--data-path", str(tmp_path / "none"), *output])
    with pytest.raises(UserError, match="--jobs 0: expected 1 or more"):
        run.main([plan, "--data-path", str(tmp_path), "--jobs", "0", *output])
    with pytest.raises(UserError, match="--flags --lr '1: a quotation mark is missing"):
        run.main([plan, "--data-path", str(tmp_path), "--flags", "--lr '1", *output])
    with pytest.raises(UserError, match="--processes 0: expected 1 or more"):
        run.main([plan, "--data-path", str(tmp_path), "--processes", "0", *output])
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--processes 4: every process needs its own GPU, and this machine has 2"):
        run.main([plan, "--data-path", str(tmp_path), "--processes", "4", *output])
    assert not (tmp_path / "out").exists()


# gpu.sh, with a stand-in for Python


@pytest.fixture
def gpu_script(tmp_path):
    """start(*plans, **environment): a copy of gpu.sh, with a Python that records its command lines.

    FAILS: a plan for which run.py fails; WAITS: a plan for which it waits for SIGTERM.
    """
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
        defaults = {"PYTHON": str(python), "NOTES": str(tmp_path / "notes"), "FAILS": "none", "WAITS": "none"}
        command = ["bash", "root/experiments/gpu.sh", "data", *plans]
        return subprocess.Popen(command, cwd=tmp_path, env=os.environ | defaults | environment)

    return start


def recorded_commands(folder):
    return [line.split()[:2] for line in (folder / "notes").read_text().splitlines()]


def test_gpu_script_copies_whole_finished_runs_only(gpu_script, tmp_path):
    """$OUT is relative to the folder of the call. Unfinished runs, and runs finished in $OUT, are not mixed."""
    results, out = tmp_path / "root" / "experiments" / "results" / "a" / "arm", tmp_path / "out" / "a" / "arm"
    for folder, names in (
        (results, ("seed0/finished.json", "seed0/log.jsonl", "seed1/log.jsonl", "seed2/finished.json")),
        (out, ("seed0/log.jsonl", "seed0/checkpoint.pth", "seed2/finished.json")),
    ):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(folder.parts[-3])
    for _ in range(2):
        assert gpu_script("a", OUT="out").wait(30) == 0
    left = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert left == {"seed0/finished.json": "results", "seed0/log.jsonl": "results", "seed2/finished.json": "out"}
    assert f"-o {tmp_path}/out/a --jobs 6 --minutes 9 " in (tmp_path / "notes").read_text()


def test_gpu_script_runs_the_next_plan_when_one_fails(gpu_script, tmp_path):
    assert gpu_script("a", "b", FAILS="a").wait(30) == 1
    scripts = ("experiments/run.py", "experiments/analyse.py")
    expected = [[script, f"experiments/plans/{plan}.py"] for plan in "ab" for script in scripts]
    assert recorded_commands(tmp_path) == expected


def test_sigterm_to_gpu_script_reaches_its_runs_and_starts_no_plan(gpu_script, tmp_path):
    process = gpu_script("a", "b", WAITS="a")
    deadline = time.monotonic() + 30
    while not (tmp_path / "notes.waits").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert [plan for _, plan in recorded_commands(tmp_path)] == ["experiments/plans/a.py"] * 2
