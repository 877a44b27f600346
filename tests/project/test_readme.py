"""What the README says can be typed and is run: its command blocks, shortened, and other ways to start."""

import importlib
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch

from _normal import train as normal
from _policy_gradient import train as policy_gradient
from tests.conftest import ROOT, SMALL, SMALL_POLICY, run_script
from tests.helpers.markdown import command_lines
from tests.helpers.radimagenet import as_distributed
from tests.helpers.ranks import PATIENCE, run_torchrun, start_torchrun
from utils.phantoms import dataset as phantoms
from utils.results.log import read_log

README = (ROOT / "README.md").read_text()
MINI_RIN = ROOT.parent / "shared" / "data" / "mini-rin"


@pytest.fixture(scope="module")
def small_phantoms(tmp_path_factory):
    return phantoms.generate(tmp_path_factory.mktemp("phantoms") / "set", size=40, scale=0.03)


SMALL_IMAGES = "--device cpu --workers 0 --train-crop-size 32 --val-resize-size 36 --val-crop-size 32"


def blocks(data, source):
    """The README's two routes, shortened: one or two CPU processes, a tiny model, small images, 3 epochs, not 90."""
    replacements = {
        r"\bDATA\b": str(data),
        "--model resnet50": f"{SMALL_IMAGES} --model test_resnet",
        "--epochs (90|10)": "--epochs 3",
        "--batch-size (32|64)": "--batch-size 4",
        "--resume ([a-z_/]*model_best.pth)": r"--device cpu --workers 0 --resume \1",
        "model_8([789])": lambda match: f"model_{int(match[1]) - 7}",
    }
    own = {"--objective reinforce": "--objective reinforce --policy-model test_resnet --kernel 5 --sigma 2",
           "--finetune": f"{SMALL_IMAGES} --finetune"}  # fmt: skip
    radimagenet = {
        r"\bFOLDER\b": str(source),
        "--nproc_per_node=8": "--nproc_per_node=2",
        "--nproc_per_node=4": "--nproc_per_node=1",
        "--workers 16": "",
        "--grid 64 --kernel 13 --sigma 6": "--policy-model test_resnet --epochs 3 --grid 8 --kernel 5 --sigma 2",
    }
    pages = re.findall(r"<!-- The suite runs this block, shortened. -->\n(```bash\n.*?```)", README, re.DOTALL)
    for block, further in zip(pages, (own, radimagenet), strict=True):
        for pattern, replacement in (replacements | further).items():
            block, count = re.subn(pattern, replacement, block)
            assert count, f"the README's block no longer has {pattern}"
        yield block


def run_block(block, folder):
    """Run the commands of a block in `folder`: torchrun with its agent, the others in this process."""
    for words in (words for _, words in command_lines(block, folder) if words):
        if words[0] == "torchrun":
            script, output = words.index(next(word for word in words if word.endswith(".py"))), folder / "output.txt"
            launcher = start_torchrun(words[1:script], words[script], words[script + 1 :], output, output, folder)
            launcher.join(PATIENCE)
            assert launcher.exitcode == 0, output.read_text()
        else:
            assert words[0] == "python", words
            module = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
            command = importlib.import_module(module)
            if not hasattr(command, "main"):
                command = importlib.import_module(f"{module}.__main__")
            command.main(words[3 if words[1] == "-m" else 2 :])


@pytest.mark.slow
def test_the_routes_as_the_readme_types_them(small_phantoms, tmp_path, monkeypatch):
    own, radimagenet = tmp_path / "own", tmp_path / "radimagenet"
    source = as_distributed(small_phantoms, tmp_path / "source")
    blocks_of_readme = blocks("data", source)
    for folder, data, pretrained in ((own, small_phantoms, "heated"), (radimagenet, None, "gradp")):
        folder.mkdir()
        monkeypatch.chdir(folder)
        if data:
            (folder / "data").symlink_to(data)
        run_block(next(blocks_of_readme), folder)
        runs = folder / "runs"
        assert [line["epoch"] for line in read_log(runs / pretrained)] == [0, 1, 2]
        average = runs / "heated.pth" if data else folder / "_weights/resnet50_gradientp_RIN_64_64_k13_s6.pth"
        parts = [torch.load(runs / pretrained / f"model_{epoch}.pth", weights_only=True)["model"] for epoch in range(3)]
        expected = sum(part["fc.weight"].double() for part in parts) / 3
        averaged = torch.load(average, weights_only=True)["model"]["fc.weight"]
        torch.testing.assert_close(averaged, expected.float())
        tested = json.loads((runs / "finetuned" / "metrics.json").read_text())
        assert (tested["split"], Path(tested["weights"]).name) == ("test", "model_best.pth")
        assert tested["images"] == sum(1 for _ in (small_phantoms / "test").glob("*/*"))
    warm_up = [0.001 * (0.01 + 0.99 * epoch / 7) for epoch in range(3)]
    assert [line["lr_classifier"] for line in read_log(radimagenet / "runs" / "finetuned")] == pytest.approx(warm_up)


def test_the_readme_is_short():
    assert sum(1 for word in README.split() if re.search(r"\w", word)) <= 1200


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
