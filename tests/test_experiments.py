"""Plans and their runs: the commands a stage stands for, subsets by links, and runs that end, fail, stop and go on."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from experiments import run
from experiments.plan import Arm, Plan, Stage, Subset, read_plan
from experiments.subsets import choose, link_subset
from tests.conftest import ROOT, SMALL, SMALL_POLICY
from utils import weight_averaging
from utils.arguments import parse_given
from utils.errors import UserError

PLANS = sorted(path for path in (ROOT / "experiments" / "plans").glob("*.py") if path.stem != "__init__")
SCRIPTS = {"_normal": normal, "_policy_gradient": policy_gradient}


def images_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


# Plans


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_flag_of_a_plan_is_one_of_its_script(path):
    plan = read_plan(path)
    assert plan.name == path.stem
    for arm in plan.arms:
        for stage in arm.stages:
            given = parse_given(SCRIPTS[stage.script].build_parser(), shlex.split(stage.flags))
            assert given["epochs"] == stage.epochs and stage.average <= stage.epochs
            before = {f"{earlier.name}/{'average' if earlier.average else 'model_best'}.pth" for earlier in arm.stages}
            assert stage.start is None or stage.start in before


@pytest.mark.parametrize("name", ["classification", "classification_small"])
def test_all_arms_take_equally_many_updates(name):
    """As many epochs in batches of one size: 16 of 32 on the CPU, 40 of 32 on a GPU."""
    expected = {"classification": (40, 32), "classification_small": (16, 32)}[name]
    for arm in read_plan(ROOT / "experiments" / "plans" / f"{name}.py").arms:
        given = [parse_given(SCRIPTS[stage.script].build_parser(), shlex.split(stage.flags)) for stage in arm.stages]
        assert sum(flags["epochs"] for flags in given) == expected[0], arm.name
        assert {flags["batch_size"] for flags in given} == {expected[1]}, arm.name


def test_all_arms_of_a_seed_come_before_the_next_seed():
    arms = (Arm("a", (), 3), Arm("b", (), 1))
    assert [(arm.name, seed) for arm, seed in Plan("p", "?", arms, "a").runs()] == [
        ("a", 0),
        ("b", 0),
        ("a", 1),
        ("a", 2),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "defines no PLAN"),
        ("PLAN = Plan('p', '?', (Arm('a', (), 1), Arm('a', (), 1)), 'a')", "two arms have one name"),
        ("PLAN = Plan('p', '?', (Arm('a', (), 1),), 'b')", "compares 'b', which is none of its arms"),
        ("PLAN = Plan('p', '?', (Arm('a', (), 1),), 'a', primary='c')", "compares 'c', which is none of its arms"),
    ],
)
def test_a_plan_that_is_none_is_refused(text, message, tmp_path):
    path = tmp_path / "plan.py"
    path.write_text(f"from experiments.plan import Arm, Plan\n{text}\n")
    with pytest.raises(UserError, match=message):
        read_plan(path)
    with pytest.raises(UserError, match="no such file"):
        read_plan(tmp_path / "other.py")


def test_commands_of_a_stage_are_as_typed(tmp_path):
    stage = Stage("second", "_normal", "--epochs 3 --lr 0.1", start="first/average.pth", average=2, test="all")
    train, average, test = run.commands(stage, 7, Path("out/arm/seed7"), Path("DATA"), ["--device", "cpu"])
    script = f"{ROOT}/_normal/train.py --data-path DATA --device cpu"
    folder = "out/arm/seed7/second"
    assert shlex.join(train[1:]) == (
        f"{script} --epochs 3 --lr 0.1 --finetune out/arm/seed7/first/average.pth --seed 7 --resume auto "
        f"--output-dir {folder}"
    )
    assert shlex.join(average[1:]) == (
        f"-m utils.weight_averaging {folder}/model_1.pth {folder}/model_2.pth -o {folder}/average.pth --overwrite"
    )
    assert shlex.join(test[1:]) == (
        f"{script} --test-only --split test --resume {folder}/model_best.pth --output-dir {folder}"
    )


def test_the_commands_of_a_heated_arm_work(image_folder, tmp_path):
    """In this process, on tiny data: what is left is what the analysis reads, with the seed in it."""
    flags = " ".join(SMALL[2:])
    mask = " ".join(SMALL_POLICY[len(SMALL) :])
    arm = Arm(
        "heated",
        (
            Stage("pretraining", "_policy_gradient", f"{flags} {mask} --epochs 2", average=2),
            Stage("fine-tuning", "_normal", f"{flags} --epochs 1", start="pretraining/average.pth", test="all"),
        ),
        1,
    )
    folder = tmp_path / "heated" / "seed3"
    for stage in arm.stages:
        for _, *command in run.commands(stage, 3, folder, image_folder, ["--device", "cpu", "--workers", "0"]):
            if command[0] == "-m":
                weight_averaging.main(command[2:])
            else:
                SCRIPTS[stage.script].main(command[1:])
    run.tidy(arm, folder)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    results = {"metrics.json", "per_class.csv", "predictions.csv"}
    assert left == {f"{stage.name}/{name}" for stage in arm.stages for name in ("log.jsonl", "run.json")} | {
        f"fine-tuning/{name}" for name in results
    }
    assert json.loads((folder / "fine-tuning" / "metrics.json").read_text())["split"] == "test"
    assert "--seed 3" in json.loads((folder / "pretraining" / "run.json").read_text())["starts"][0]["command"]


# Subsets


def test_more_images_of_a_draw_hold_fewer_ones_and_draws_differ():
    names = [f"{number:02}.png" for number in range(40)]
    few, more = choose(names, 5, draw=0), choose(reversed(names), 10, draw=0)
    assert len(few) == 5 and len(more) == 10 and set(few) < set(more)
    assert choose(names, 10, draw=1) != more
    assert choose(names, 100, draw=0) == names


def test_subset_links_to_the_chosen_images(image_folder, tmp_path):
    """Relative links, so that data and links may be moved together; `val` and `test` keep all images."""
    data = Path(shutil.copytree(image_folder, tmp_path / "old" / "data"))
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("train/dark/0.png\nval/bright/1.png\n")
    folder = tmp_path / "old" / "links" / "subset"
    link_subset(data, Subset("*r*", without="striped", shots=4), folder, exclude)
    moved = Path(shutil.move(tmp_path / "old", tmp_path / "new")) / "links" / "subset"
    train = choose(
        [name for name in images_of(data_of(moved) / "train") if name.startswith("dark") and "/0." not in name], 4, 0
    )
    assert [name for name in images_of(moved / "train") if name.startswith("dark")] == train
    assert sorted(os.listdir(moved / "train")) == ["bright", "dark"]
    assert images_of(moved / "val") == [
        f"{name}/{n}.png" for name in ("bright", "dark") for n in range(7) if (name, n) != ("bright", 1)
    ]
    one = moved / "test" / "dark" / "2.png"
    assert one.read_bytes() == (data_of(moved) / "test" / "dark" / "2.png").read_bytes()
    assert not Path(os.readlink(one)).is_absolute()


def data_of(links):
    return links.parents[1] / "data"


def test_subset_of_no_class_is_refused_and_leaves_nothing(image_folder, tmp_path):
    with pytest.raises(UserError, match="has no class like us-\\*"):
        link_subset(image_folder, Subset("us-*"), tmp_path / "subset")
    assert not (tmp_path / "subset").exists()


def test_names_of_subsets_differ():
    subsets = [Subset(), Subset("a*"), Subset(without="a*"), Subset("a*", shots=5), Subset("a*", shots=5, draw=1)]
    assert len({subset.name for subset in subsets}) == len(subsets)


# Runs, of scripts that stand in for the two, since theirs take seconds to start


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
            if "--fail" in sys.argv:
                sys.exit("error: nothing to be had.")
            if "--wait" in sys.argv and not test and not (folder / "stopped").exists():
                signal.signal(signal.SIGTERM, lambda *_: ((folder / "stopped").touch(), sys.exit(75)))
                time.sleep(60)
            for name in ("metrics.json", "predictions.csv") if test else ("log.jsonl", "model_best.pth"):
                (folder / name).write_text("made")
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
    plan = write_plan(folder, **flags)
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


def test_no_run_is_begun_that_would_not_be_done(stand_in, capsys):
    run_plan(stand_in, first="--epochs 1")
    finished = stand_in / "out" / "first" / "seed0" / "finished.json"
    finished.write_text(json.dumps({**json.loads(finished.read_text()), "seconds": 600}))
    assert run.expected_seconds(stand_in / "out", "first") == 600
    run_plan(stand_in, "--minutes", "9", first="--epochs 1", second="--epochs 1")
    assert "second, seed 0: left for another time" in capsys.readouterr().out
    run_plan(stand_in, "--minutes", "11", first="--epochs 1", second="--epochs 1")
    assert "second, seed 0: finished" in capsys.readouterr().out


def test_several_at_a_time_have_a_gpu_each(monkeypatch):
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    slots = run.Machine(4, float("inf"))._slots
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "1", "0", "1"]


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
