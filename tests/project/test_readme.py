"""What the README says can be typed and is run: its command block, shortened, the recipes, and other ways to start."""

import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time

import pytest
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import ROOT, SMALL, SMALL_POLICY, run_script
from tests.helpers.markdown import command_lines
from tests.helpers.ranks import PATIENCE, run_torchrun, start_torchrun
from utils.phantoms import dataset as phantoms
from utils.results.log import read_log

README, RECIPES = ((ROOT / name).read_text() for name in ("README.md", "RECIPES.md"))
MINI_RIN = ROOT.parent / "shared" / "data" / "mini-rin"


@pytest.fixture(scope="module")
def small_phantoms(tmp_path_factory):
    return phantoms.generate(tmp_path_factory.mktemp("phantoms") / "set", size=40, scale=0.03)


def shortened(block, data):
    """The README's block for one or two processes on the CPU: a tiny model, three epochs, not 90, small images."""
    small = "--device cpu --workers 0 --train-crop-size 32 --val-resize-size 36 --val-crop-size 32"
    replacements = {
        "--nproc_per_node=8": "--nproc_per_node=2",
        "--nproc_per_node=4": "--nproc_per_node=1",
        "DATA": str(data),
        "--workers 16 --model resnet50": f"{small} --model test_resnet --policy-model test_resnet --epochs 3",
        "--grid 64 --kernel 13 --sigma 6": "--grid 8 --kernel 5 --sigma 2",
        "--model resnet50 --epochs 10 --workers 16 --num-classes 165": f"{small} --epochs 3 --num-classes 12",
        "--batch-size (32|64)": "--batch-size 4",
        "--resume ([a-z_/]*checkpoint.pth)": r"--device cpu --workers 0 --resume \1",
        "model_8([789])": lambda match: f"model_{int(match[1]) - 7}",
    }
    for pattern, replacement in replacements.items():
        block, count = re.subn(pattern, replacement, block)
        assert count, f"the README's block no longer has {pattern}"
    return block


@pytest.mark.slow
def test_the_whole_route_as_the_readme_types_it(small_phantoms, tmp_path, monkeypatch):
    block = re.search(r"<!-- The suite runs this block, shortened. -->\n(```bash\n.*?```)", README, re.DOTALL)[1]
    pretrained, finetuned = tmp_path / "_policy_gradient" / "_gradp", tmp_path / "_normal"
    for folder in ("_policy_gradient", "_normal", "_weights"):
        (tmp_path / folder).mkdir()
    for folder, words in command_lines(shortened(block, small_phantoms), tmp_path):
        if words[:1] == ["torchrun"]:
            script = words.index("train.py")
            path, output = f"{folder.name}/train.py", tmp_path / "output.txt"
            launcher = start_torchrun(words[1:script], path, words[script + 1 :], output, output, folder)
            launcher.join()
            assert launcher.exitcode == 0, output.read_text()
        elif words[:2] == ["python", "-m"]:
            monkeypatch.chdir(folder)
            importlib.import_module(words[2]).main(words[3:])
        else:
            assert words[:1] in ([], ["cd"]), words
    assert [line["epoch"] for line in read_log(pretrained)] == [0, 1, 2]
    assert set(json.loads((pretrained / "metrics.json").read_text())["metrics"]) == {"clean", "masked"}
    averaged = torch.load(tmp_path / "_weights/resnet50_gradientp_RIN_64_64_k13_s6.pth", weights_only=True)
    parts = [torch.load(pretrained / f"model_{epoch}.pth", weights_only=True)["model"] for epoch in range(3)]
    expected = sum(part["fc.weight"].double() for part in parts) / 3
    torch.testing.assert_close(averaged["model"]["fc.weight"], expected.float())
    last = read_log(finetuned)[-1]
    found = json.loads((finetuned / "metrics.json").read_text())["metrics"]["clean"]
    assert found == pytest.approx({name: last[f"val_{name}"] for name in found}, abs=1e-6)
    assert [line["lr_classifier"] for line in read_log(finetuned)] == pytest.approx(
        [0.001 * (0.01 + 0.99 * epoch / 7) for epoch in range(3)]
    )


def test_every_logged_name_is_explained(image_folder, tmp_path):
    policy_gradient.main([*SMALL_POLICY, "--epochs", "1", "--amp", "--amp-dtype", "fp16", "--mask-fade-epochs", "1",
                          "--data-path", str(image_folder), "--output-dir", str(tmp_path)])  # fmt: skip
    table = README.split("## What is logged")[1].split("## Measured")[0]
    for name in read_log(tmp_path)[0]:
        if name.startswith("val_"):
            assert re.search(rf"\b{name.removeprefix('val_')}\b", table), name
        elif name != "epoch":
            assert f"`{name}`" in table, name


@pytest.mark.slow
@pytest.mark.parametrize(("run", "processes", "batch"), [(run_script, 1, 8), (run_torchrun, 3, 2)])
def test_from_the_root_with_any_number_of_processes(run, processes, batch, image_folder, tmp_path):
    """By the command torchrun, and warm."""
    flags = [*SMALL, "--batch-size", batch, "--epochs", 1, "--data-path", image_folder, "--output-dir", tmp_path]
    run("_normal/train.py", *flags, processes=processes)
    assert len(read_log(tmp_path)) == 1
    assert len(torch.load(tmp_path / "checkpoint.pth", weights_only=True)["rng"]) == processes


@pytest.mark.slow
def test_from_the_scripts_own_folder_on_the_default_data(small_phantoms, tmp_path):
    """`cd _policy_gradient && python train.py`, without --data-path: the phantoms, and a notice."""
    root = tmp_path / "policy-gradient-noise-masks" / f"phantoms-v{phantoms.VERSION}-seed-0"
    shutil.copytree(small_phantoms, root)
    result = run_script(
        *("train.py", *SMALL_POLICY, "--epochs", 1, "--output-dir", tmp_path / "run"),
        cwd=ROOT / "_policy_gradient",
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert f"No --data-path was given: using generated phantoms in {root}" in result.stdout
    assert len(read_log(tmp_path / "run")) == 1


@pytest.mark.slow
def test_two_nodes(image_folder, tmp_path):
    """Two torchrun agents on loopback, two processes each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--nnodes=2", "--nproc_per_node=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    flags = [*SMALL_POLICY, "--batch-size", 4, "--epochs", 1, "--data-path", image_folder, "--output-dir", tmp_path]
    output, flags = tmp_path / "output.txt", list(map(str, flags))
    agents = [
        start_torchrun([*options, "--rdzv-id=1"], "_policy_gradient/train.py", flags, output, output) for _ in range(2)
    ]
    for agent in agents:
        agent.join(PATIENCE)
    assert [agent.exitcode for agent in agents] == [0, 0], output.read_text()
    assert len(torch.load(tmp_path / "checkpoint.pth", weights_only=True)["rng"]) == 4
    assert len(read_log(tmp_path)) == 1


@pytest.mark.slow
@pytest.mark.skipif(not MINI_RIN.is_dir(), reason=f"the real images are not at {MINI_RIN}")
def test_the_route_learns_real_images(tmp_path):
    """Four classes of real images at 32 pixels: pretrained with masks, then fine-tuned to beat 60 % on val."""
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for name in ("ct-head-any", "mr-brain-pituitary", "us-breast-benign", "xr-hand-any"):
            (tmp_path / "data" / split / name).symlink_to(MINI_RIN / split / name)
    common = [
        *(*SMALL, "--batch-size", "32", "--data-path", str(tmp_path / "data"), "--gray", "--backend", "tensor"),
        *("--cache-dataset", "host", "--cache-dir", str(tmp_path / "cache")),
    ]
    masks = ["--policy-model", "test_resnet", "--grid", "16", "--kernel", "3", "--sigma", "1", "--lr", "0.01"]
    policy_gradient.main([*common, *masks, "--epochs", "2", "--output-dir", str(tmp_path / "heated")])
    heated = str(tmp_path / "heated" / "model_1.pth")
    normal.main(
        [*common, "--finetune", heated, "--epochs", "2", "--lr", "0.01", "--output-dir", str(tmp_path / "fine")]
    )
    assert read_log(tmp_path / "fine")[-1]["val_top1"] > 0.6


COMMANDS = {
    "scontrol": 'if [ "$1" = show ]; then echo node1; else echo "scontrol $*" >> "$TOLD"; fi',
    "srun": 'trap "echo TERM >> $TOLD; exit 1" TERM; echo "srun $*" >> "$TOLD"; touch "$TOLD.started"; '
    "while true; do sleep 0.05; done",
}


def test_the_slurm_job_ends_its_run_gently_and_queues_itself_again(tmp_path):
    """The recipe's batch file, with commands of our own in the place of Slurm's, under the signal that Slurm sends."""
    block = re.search(r"in the place of Slurm's. -->\n```bash\n(.*?)```", RECIPES, re.DOTALL)[1]
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    told = tmp_path / "told"
    environment = {
        **os.environ,
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(told)},
        **{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"},
    }
    job = subprocess.Popen(["bash", "-c", block], env=environment)
    while not (tmp_path / "told.started").exists():
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=60)
    started, ended, requeued = told.read_text().splitlines()
    assert started.startswith("srun torchrun --nnodes=2 --nproc_per_node=8")
    assert started.endswith("--resume auto --checkpoint-steps 1000")
    assert (ended, requeued) == ("TERM", "scontrol requeue 7")


def test_the_demo_runs_the_commands_of_the_example(tmp_path):
    """demo.sh, with commands in the place of the real ones that only write down how they were called."""
    for name in ("python", "torchrun", "cp"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$TOLD"\n')
        (tmp_path / name).chmod(0o755)
    told, output = tmp_path / "told", tmp_path / "demo"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(told)}
    subprocess.run(["bash", ROOT / "demo.sh", output], env=environment, check=True, capture_output=True)
    expected = re.findall(r"```bash\n(.*?)```", (ROOT / "EXAMPLE.md").read_text(), re.DOTALL)
    lines = "".join(expected).replace("\\\n", " ").splitlines()
    assert [line.split() for line in told.read_text().replace(str(output), "demo").splitlines()] == [
        line.split() for line in lines
    ]
    output.mkdir()
    again = subprocess.run(["bash", ROOT / "demo.sh", output], env=environment, capture_output=True, text=True)
    assert again.returncode == 2
    assert "already exists; remove it" in again.stderr
