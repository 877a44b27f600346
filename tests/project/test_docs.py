"""The pages of docs/: lists that are those of the code, messages that exist, commands that work."""

import os
import re
import shlex
import subprocess

import pytest
from torch.distributed.run import parse_args

from _policy_gradient import train as policy_gradient
from tests.conftest import ROOT, SMALL_POLICY
from tests.helpers.parsing import PARSERS, declared, is_test
from utils import arguments
from utils.results.log import read_log
from utils.results.metrics import CALIBRATION_NAMES, METRIC_NAMES

DOCS = ROOT / "docs"
PACKAGES = ("_normal", "_policy_gradient", "utils")
FLAGS, RUNS = ((DOCS / name).read_text() for name in ("flags.md", "runs.md"))
# Strings of other programs in the troubleshooting.
FOREIGN = ("DataLoader worker is killed by signal: ", "Address already in use", "ChildFailedError", "italics")


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", text))


# All flags of torchvision's references/classification/train.py.
TORCHVISION = {"-b", "-j"} | flags_in(
    "--data-path --model --device --batch-size --epochs --workers --opt --lr --momentum --wd --weight-decay "
    "--norm-weight-decay --bias-weight-decay --transformer-embedding-decay --label-smoothing --mixup-alpha "
    "--cutmix-alpha --lr-scheduler --lr-warmup-epochs --lr-warmup-method --lr-warmup-decay --lr-step-size --lr-gamma "
    "--lr-min --print-freq --output-dir --resume --start-epoch --cache-dataset --sync-bn --test-only --auto-augment "
    "--ra-magnitude --augmix-severity --random-erase --amp --world-size --dist-url --model-ema --model-ema-steps "
    "--model-ema-decay --use-deterministic-algorithms --interpolation --val-resize-size --val-crop-size "
    "--train-crop-size --clip-grad-norm --ra-sampler --ra-reps --weights --backend --use-v2"
)


def test_each_promise_names_a_test_that_exists():
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", (DOCS / "guarantees.md").read_text())
    assert len(named) >= 30
    for file, function in named:
        assert is_test(file, function), (file, function)


def test_the_messages_of_the_troubleshooting_are_those_of_the_code():
    sources = [path.read_text() for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # strings over several lines, joined
    page = " ".join((DOCS / "troubleshooting.md").read_text().split())
    messages = re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", page)
    assert len(messages) >= 12
    assert [message for message in messages if not message.startswith(FOREIGN) and message not in code] == []


def test_every_flag_is_listed():
    flags = flags_in(FLAGS.split("\n## All flags\n")[1].split("\n### ")[0].replace("/--", " --"))
    assert flags - {"--wd"} == {arguments.flag(name) for name in declared()}


def test_the_flags_of_torchvision_that_are_absent_are_listed():
    for parser in PARSERS.values():
        ours = {option for action in parser._actions for option in action.option_strings}
        absent = {flag for flag in TORCHVISION if flag not in ours}
        assert absent == flags_in(FLAGS.split("Not there:")[1].split("\n\n")[0])


def test_what_a_resumed_run_takes_from_its_file_is_listed():
    begins = ("Never taken from it:", "unless given again:")
    listed = {begin: flags_in(RUNS.split(begin)[1].split(".")[0]) for begin in begins}
    expected = arguments.OF_EACH_START - {"resume"}
    assert listed["Never taken from it:"] == {arguments.flag(name) for name in expected}
    expected = arguments.FREE_ON_RESUME - arguments.OF_EACH_START - {"finetune"}  # refused with --resume
    assert listed["unless given again:"] == {arguments.flag(name) for name in expected}


@pytest.mark.slow
def test_every_logged_name_is_explained(image_folder, tmp_path):
    policy_gradient.main([*SMALL_POLICY, "--epochs", "1", "--amp", "--amp-dtype", "fp16", "--mask-fade-epochs", "1",
                          "--data-path", str(image_folder), "--output-dir", str(tmp_path)])  # fmt: skip
    page = (DOCS / "logging.md").read_text()
    for name in read_log(tmp_path)[0].keys() - {"epoch"}:
        assert f"`{name}`" in page, name


def test_every_metric_of_a_test_is_explained():
    page = (DOCS / "logging.md").read_text()
    names = (*(f"val_{name}" for name in METRIC_NAMES), *CALIBRATION_NAMES, "intervals", "reliability")
    assert [name for name in names if f"`{name}`" not in page] == []


def write_command(folder, name, body):
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("status", "requeued"), [("interrupted", ["scontrol requeue 7"]), ("finished", []), ("", [])])
def test_the_slurm_job_is_queued_again_if_the_run_was_interrupted(status, requeued, tmp_path):
    """With commands of our own in the place of Slurm's. That torchrun passes USR1 on is tested in test_faults.py.

    The status "" is a start that fails before it writes status.json, after an earlier one that was interrupted.
    """
    block = re.search(
        r"in the place of Slurm's. -->\n```bash\n(.*?)```", (DOCS / "clusters.md").read_text(), re.DOTALL
    )[1]
    calls = tmp_path / "calls"
    folder = "runs/heated"
    written = f"""echo '  "status": "{status}",' > {folder}/status.json; exit 1""" if status else "exit 1"
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "status.json").write_text('  "status": "interrupted",\n')
    os.utime(tmp_path / folder / "status.json", (1_700_000_000, 1_700_000_000))
    write_command(tmp_path, "srun", f'echo "$*" >> {calls}; {written}')
    write_command(tmp_path, "scontrol", f'if [ "$1" = show ]; then echo node1; else echo "scontrol $*" >> {calls}; fi')
    environment = {
        **os.environ,
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"},
    }
    job = subprocess.run(["bash", "-c", block], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (job.returncode, job.stderr) == (0, "")
    run, *further = calls.read_text().splitlines()
    assert further == requeued
    torchrun = parse_args(shlex.split(run)[1:])
    assert (torchrun.nnodes, torchrun.nproc_per_node, torchrun.rdzv_endpoint) == ("2", "8", "node1:29500")
    assert re.search("#SBATCH.* --signal=USR1@", block)
    assert torchrun.signals_to_handle == "SIGTERM,SIGINT,SIGUSR1"
    assert torchrun.training_script == "_policy_gradient/train.py"
    output_dir = torchrun.training_script_args[torchrun.training_script_args.index("--output-dir") + 1]
    assert output_dir == folder


def test_the_demo_runs_the_commands_of_the_example(tmp_path):
    """demo.sh, with commands in the place of the real ones that only write down how they were called."""
    for name in ("python", "torchrun", "cp"):
        write_command(tmp_path, name, f'echo "{name} $*" >> "$CALLS"')
    calls, output = tmp_path / "calls", tmp_path / "demo"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    subprocess.run(["bash", ROOT / "demo.sh", output], env=environment, check=True, capture_output=True)
    expected = re.findall(r"```bash\n(.*?)```", (DOCS / "example.md").read_text(), re.DOTALL)
    lines = "".join(expected).replace("\\\n", " ").splitlines()
    assert [line.split() for line in calls.read_text().replace(str(output), "demo").splitlines()] == [
        line.split() for line in lines
    ]
    output.mkdir()
    again = subprocess.run(["bash", ROOT / "demo.sh", output], env=environment, capture_output=True, text=True)
    assert again.returncode == 2
    assert "already exists; remove it" in again.stderr
