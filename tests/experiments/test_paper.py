"""The paper by one command: its plan, all steps on a made-up RadImageNet, and the published figures in the table."""

import builtins
import importlib
import json
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from experiments import paper, published, run
from experiments.plan import folder_of_run, read_plan
from tests.conftest import ROOT, write_image_folder
from tests.helpers.finished_runs import finish
from tests.helpers.radimagenet import as_distributed, pack
from utils.arguments import for_fresh_start, parse_given
from utils.runtime.errors import UserError

PAPER, TRIAL = (ROOT / "experiments" / "plans" / name for name in ("paper.py", "paper_trial.py"))
SCRIPTS = {"_normal": normal, "_policy_gradient": policy_gradient}
CLASSES = ("ct-abd-normal", "mr-knee-acl", "us-liver")


# The plan


def values_of(stage):
    parser = SCRIPTS[stage.script].build_parser()
    return for_fresh_start(parser, parse_given(parser, shlex.split(stage.flags)))


def test_the_recipe_is_the_published_one():
    """Of all stages, with the defaults of the scripts; the batch for 8 processes."""
    plan = read_plan(PAPER)
    assert [arm.name for arm in plan.arms] == [
        f"{model}-{variant}"
        for model in ("resnet50", "resnet18", "resnet10t")
        for variant in ("conventional", "published", "reinforce", "uniform")
    ]
    for arm in plan.arms:
        first, second = map(values_of, arm.stages)
        for values in (first, second):
            assert arm.name.startswith(f"{values.model}-") and values.sync_bn
            assert (values.opt, values.momentum, values.weight_decay) == ("sgd", 0.9, 1e-4)
            assert values.batch_size * paper.PROCESSES == 256
            assert (values.train_crop_size, values.val_resize_size, values.val_crop_size) == (224, 256, 224)
        assert (first.epochs, first.lr, first.lr_warmup_epochs) == (90, 0.1, 0)
        assert (first.lr_scheduler, first.lr_step_size, first.lr_gamma) == ("steplr", 30, 0.1)
        assert (second.epochs, second.lr) == (10, 0.001)
        assert (second.lr_warmup_epochs, second.lr_warmup_method) == (7, "linear")
        assert arm.stages[0].average == 3 and arm.stages[1].start == f"{arm.stages[0].name}/average.pth"
        if "conventional" not in arm.name:
            assert (first.policy_model, first.grid, first.kernel, first.sigma) == ("resnet10t", 64, 13, 6.0)
            assert first.policy_lr is None  # a tenth of --lr
    assert {stage.test for arm in plan.arms for stage in arm.stages[:1]} == {"RadImageNet", None}


# The steps


def call(words):
    """What `python WORDS` does, in this process."""
    if words[0] == "-m":
        name, arguments = words[1], words[2:]
    else:
        name, arguments = ".".join(Path(os.path.relpath(words[0], ROOT)).with_suffix("").parts), words[1:]
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")
    module.main(arguments)


def write_medmnist(path):
    random, content = np.random.default_rng(0), {}
    for split, images in (("train", 12), ("val", 6), ("test", 6)):
        content[f"{split}_images"] = random.integers(0, 256, (images, 28, 28), dtype=np.uint8)
        content[f"{split}_labels"] = np.arange(images)[:, None] % 2
    np.savez(path, **content)
    return path


@pytest.mark.slow
def test_from_the_archive_to_the_table(tmp_path, monkeypatch, capsys):
    """210 images; two arms with a tiny classifier, in this process, without accumulation: the others only take time."""
    images = write_image_folder(tmp_path / "made", CLASSES, images=44)
    archive = pack(as_distributed(images, tmp_path / "source"), tmp_path / "radimagenet.tar.gz")
    transfer = write_medmnist(tmp_path / "breastmnist.npz")
    monkeypatch.setitem(sys.modules, "medmnist", None)
    monkeypatch.setattr(paper, "execute", call)
    monkeypatch.setattr(run.Processes, "execute", lambda _, command, __: call(command[1:]) or 0)
    monkeypatch.setattr(run, "ThreadPoolExecutor", lambda _: nullcontext(builtins))  # whose `map` runs here
    data, output = tmp_path / "data", tmp_path / "out"
    handlers = {number: signal.getsignal(number) for number in run.stopping_signals()}
    paper.main([str(data), "--source", str(archive), "--transfer", str(transfer), "-o", str(output),
                "--plan", str(TRIAL), "--device", "cpu", "--processes", "1", "--arms", "*-conventional,*-uniform",
                "--flags", "--workers 0 --grad-accum-steps 1"])  # fmt: skip
    for number, handler in handlers.items():
        signal.signal(number, handler)

    assert (output / "audit" / "report.html").exists() and (output / "tables.md").exists()
    plan = read_plan(TRIAL)
    table = (output / "published.md").read_text()
    assert table in capsys.readouterr().out
    arms = [arm for arm in plan.arms if arm.name.endswith(("conventional", "uniform"))]
    for arm in arms:
        stage = folder_of_run(output, arm.name, 0) / published.titles(plan, arm)[arm.name]
        tested = json.loads((stage / "metrics.json").read_text())
        assert (tested["split"], tested["images"]) == ("test", 9)
        clean = tested["metrics"]["clean"]
        cells = " | ".join(f"{clean[name]:.4f}" for name in ("precision", "balanced_accuracy", "f1", "auroc"))
        assert f"| {arm.name} | here, 1 seed | {cells} |" in table
        assert (stage / "model_best.pth").exists()
    heated = folder_of_run(output, "test_resnet-uniform", 0)
    assert sorted(path.name for path in heated.iterdir()) == ["fine-tuning", "finished.json", "pretraining"]
    average = torch.load(heated / "pretraining" / "average.pth", weights_only=True)
    assert average["classes"] == ["CT__abd__normal", "MR__knee__acl", "US__liver"]
    probe = json.loads((output / "transfer" / "breastmnist-test_resnet-conventional-seed0" / "probe.json").read_text())
    places = [Path(weights["name"]).relative_to(output).parts[0] for weights in probe["weights"]]
    assert places == [arm.name for arm in arms]
    assert probe["data"]["test"]["images"] == 6


@pytest.fixture
def commands(monkeypatch):
    """The commands that paper.py would execute."""
    executed = []
    monkeypatch.setattr(paper, "execute", executed.append)
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 0)
    return executed


def names_of(commands):
    return [words[1] if words[0] == "-m" else Path(words[0]).name for words in commands]


@pytest.mark.parametrize(
    ("processes", "flags", "expected"),
    [
        ("8", "", ""),
        ("2", "--amp --compile", "--grad-accum-steps 4 --amp --compile"),
        ("1", "--cache-dir 'a b'", "--grad-accum-steps 8 --cache-dir 'a b'"),
    ],
)
def test_an_update_sees_256_images(processes, flags, expected, commands, image_folder, tmp_path):
    paper.main([str(image_folder), "-o", str(tmp_path), "--processes", processes, "--flags", flags])
    (words,) = (words for words in commands if words[0].endswith("run.py"))
    options = run.build_parser().parse_args(words[1:])
    assert (options.processes, options.flags) == (int(processes), expected)
    assert options.plan.samefile(PAPER)


def test_steps_that_are_done_or_not_wanted_are_left_out(commands, image_folder, tmp_path):
    paper.main([str(image_folder), "-o", str(tmp_path)])
    assert names_of(commands) == ["utils.audit", "run.py", "analyse.py", "published.py"]
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "duplicates.csv").touch()
    for arm in ("resnet18-published", "resnet18-uniform"):
        folder_of_run(tmp_path, arm, 0).mkdir(parents=True)
        finish(tmp_path, arm, 0)
    commands.clear()
    paper.main([str(image_folder), "-o", str(tmp_path), "--transfer", str(image_folder)])
    assert names_of(commands) == ["run.py", "analyse.py", "published.py", "utils.probe"]
    runs = [f"{tmp_path}/resnet18-{name}/seed0/fine-tuning/model_best.pth" for name in ("published", "uniform")]
    results = f"{tmp_path}/transfer/{image_folder.name}-resnet18-conventional-seed0"
    assert commands[-1][2:] == [*runs, "--data-path", str(image_folder), "-o", results, "--overwrite"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none: no such folder. Expected DATA/"),
        (["data", "--source", "none"], "--source none: no such folder or archive"),
        (["data", "--transfer", "none.npz"], "--transfer none.npz: no such file"),
        (["data", "--transfer", "a/set", "b/set"], "--transfer: two sets have the name 'set'"),
        (["data", "--arms", "resnet51-*"], "--arms resnet51-*: matches none of resnet50-conventional"),
        (["data", "--processes", "3"], "--processes: invalid choice: 3"),
        (["data", "--flags", "--workers '0"], "--flags --workers '0: a quotation mark is missing"),
    ],
)
def test_bad_input_gets_a_sentence_before_anything_runs(arguments, message, commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "a/set", "b/set"):
        Path(folder).mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        paper.main(arguments)
    assert message in str(caught.value)
    assert not commands


def test_a_step_that_fails_ends_the_command(capfd):
    with pytest.raises(UserError, match=r"python -c 'exit\(3\)': exit code 3"):
        paper.execute(["-c", "exit(3)"])
    assert "$ python -c 'exit(3)'" in capfd.readouterr().out


def test_a_signal_reaches_the_step_and_ends_the_command(tmp_path, capfd):
    """Also if the step then ends as if nothing had happened, as run.py does."""
    handler = signal.getsignal(signal.SIGTERM)
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit()))\n"
        f"pathlib.Path({str(tmp_path / 'started')!r}).touch()\ntime.sleep(60)"
    )

    def stop():
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        paper.execute(["-c", code])
    assert stopped.value.code == 75
    output = capfd.readouterr().out
    assert "saved" in output and "Stopped. Run the same command again to resume." in output
    assert signal.getsignal(signal.SIGTERM) == handler


# The published figures


def write_result(output, arm, seed, values, stage="fine-tuning"):
    folder = folder_of_run(output, arm, seed) / stage
    folder.mkdir(parents=True)
    metrics = dict(zip(("precision", "recall", "f1", "auroc"), values, strict=True))
    metrics["balanced_accuracy"] = metrics.pop("recall")
    (folder / "metrics.json").write_text(json.dumps({"metrics": {"clean": metrics}}))
    finish(output, arm, seed)


def test_published_figures_stand_next_to_the_measured_ones(tmp_path, capsys):
    write_result(tmp_path, "resnet50-conventional", 0, (0.5, 0.5, 0.5, 0.9), "training")
    write_result(tmp_path, "resnet50-conventional", 0, (0.55, 0.6, 0.5, None))
    write_result(tmp_path, "resnet50-published", 0, (0.625, 0.5, 0.0, 0.95))
    published.main([str(PAPER), str(tmp_path)])
    text = capsys.readouterr().out
    assert (tmp_path / "published.md").read_text() == text
    assert text.split("\n\n")[1].split("\n")[2:] == [
        "| resnet50-conventional | published, 1 run | 0.5929 | 0.5014 | 0.5226 | 0.9884 |",
        "| resnet50-conventional | here, 1 seed | 0.5000 | 0.5000 | 0.5000 | 0.9000 |",
        "| resnet50-conventional + fine-tuning | here, 1 seed | 0.5500 | 0.6000 | 0.5000 | undefined |",
        "| resnet50-published | published, 1 run | 0.6034 | 0.5211 | 0.5468 | 0.9900 |",
        "| resnet50-published | here, 1 seed | 0.6250 | 0.5000 | 0.0000 | 0.9500 |",
    ]
    pair = "| resnet50-published minus resnet50-conventional"
    assert text.split("\n\n")[3].split("\n")[2:] == [
        f"{pair} | published, 1 run | +0.0105 | +0.0197 | +0.0242 | +0.0016 |",
        f"{pair} | here, 1 seed | +0.1250 | +0.0000 | -0.5000 | +0.0500 |",
        f"{pair} + fine-tuning | here, 1 seed | +0.0750 | -0.1000 | -0.5000 | undefined |",
    ]


def test_means_over_seeds_and_differences_over_common_seeds(tmp_path):
    plan = read_plan(PAPER)
    scores = {
        "resnet18-conventional": {0: dict.fromkeys(published.METRICS, 0.25), 1: dict.fromkeys(published.METRICS, 0.5)},
        "resnet18-uniform": {1: dict.fromkeys(published.METRICS, 0.75), 2: dict.fromkeys(published.METRICS, 0.5)},
    }
    text = published.table(plan, scores)
    assert "| resnet18-conventional | here, 2 seeds | 0.3750 ± 0.1768 |" in text
    assert "| resnet18-uniform minus resnet18-conventional | here, 1 seed | +0.2500 |" in text


def test_without_results_or_with_damaged_ones_there_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no run of the plan 'paper' has finished yet"):
        published.main([str(PAPER), str(tmp_path)])
    write_result(tmp_path, "resnet50-published", 0, (0.625, 0.5, 0.5, 0.95))
    for content in ("{", '{"metrics": {"clean": {"f1": 1}}}', "[]"):
        (tmp_path / "resnet50-published" / "seed0" / "fine-tuning" / "metrics.json").write_text(content)
        with pytest.raises(UserError, match=r"metrics\.json: missing or damaged"):
            published.main([str(PAPER), str(tmp_path)])


def test_the_page_has_the_published_figures_and_costs_that_follow_from_the_benchmarks():
    page, benchmarks = ((ROOT / name).read_text() for name in ("experiments/PAPER.md", "benchmarks/README.md"))
    for values in published.PUBLISHED.values():
        assert " | ".join(f"{value:.4f}"[1:] for value in values.values()) in page
    for speed, images_per_second, epochs, hours in (
        ("9.83", 32 / 9.83e-3, 90, "10.4 h"),
        ("5.61", 32 / 5.61e-3, 90, "5.9 h"),
        ("2782", 2782, 90, "12.1 h"),
        ("2782", 2782, 10, "1.3 h"),
        ("13650", 13650, 90, "2.5 h"),
    ):
        assert f"| {speed} |" in benchmarks
        assert f"{epochs * 1.35e6 / images_per_second / 3600:.1f} h" == hours
        assert f", {epochs} epochs | {hours} |" in page
