"""Proof that a refactoring changes no bit: SHA-256 digests of what fixed seeds train.

    python -m tests.helpers.digests --against COMMIT

checks COMMIT out into a temporary worktree, trains the runs below there and here on the same images, and compares the
digests of every entry of the final checkpoint (weights, prior, optimisers, average, random generators) and of log.jsonl
without timings. Exits with 1 if any differs. Digests depend on the processor and on torch's version, so both sides are
computed on one machine.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
COMMON = (
    "--device cpu --model test_resnet --workers 1 --batch-size 8 --epochs 2 --lr .05 "
    "--train-crop-size 32 --val-resize-size 36 --val-crop-size 32"
)
NORMAL = f"_normal/train.py {COMMON}"
POLICY = f"_policy_gradient/train.py {COMMON} --policy-model test_resnet --grid 8 --kernel 5 --sigma 2"
LEAVE_ONE_OUT = "--objective reinforce --baseline loo --masks-per-image 2 --entropy-weight .01"
MOVING_BASELINE = "--objective reinforce --baseline ema"
# Number of processes, then the commands, of which later ones continue from the first.
RUNS: dict[str, tuple[int, *tuple[str, ...]]] = {
    "normal": (1, NORMAL),
    "normal, two processes, mixup, average": (
        2,
        f"{NORMAL} --mixup-alpha .2 --model-ema --model-ema-steps 1 --lr-warmup-epochs 1",
    ),
    "normal, augmented, cutmix, adamw, clipped, cache": (
        1,
        f"{NORMAL} --auto-augment ta_wide --random-erase .3 --cutmix-alpha 1 --opt adamw --clip-grad-norm 1 "
        "--cache-dataset host --cache-dir {CACHE}",
    ),
    "published": (1, POLICY),
    "published, two processes": (2, POLICY),
    "published, resumed": (1, f"{POLICY} --epochs 1", f"{POLICY} --resume {{OUTPUT}}/checkpoint.pth"),
    "published, adversarial, fading, mixup, average": (
        1,
        f"{POLICY} --objective published-unscaled --policy-sign adversarial --mask-fade-epochs 1 --mixup-alpha .2 "
        "--model-ema",
    ),
    "reinforce, leave-one-out": (1, f"{POLICY} {LEAVE_ONE_OUT}"),
    "reinforce, leave-one-out, two processes, cache": (
        2,
        f"{POLICY} {LEAVE_ONE_OUT} --cache-dataset host --cache-dir {{CACHE}}",
    ),
    "reinforce, moving average": (1, f"{POLICY} {MOVING_BASELINE}"),
    "uniform masks, cache on the device": (
        1,
        f"{POLICY} --mask-policy uniform --cache-dataset device --cache-dir {{CACHE}}",
    ),
    "prior": (1, f"{POLICY} --mask-policy prior {MOVING_BASELINE}"),
    "no masks, then fine-tuned": (
        1,
        f"{POLICY} --mask-policy none --epochs 1",
        f"{NORMAL} --finetune {{OUTPUT}}/model_0.pth --freeze-backbone --output-dir {{OUTPUT}}/tuned",
    ),
}


def digest(value: Any) -> str:
    """SHA-256 of nested dicts, lists, tensors and plain values."""
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + content).hexdigest()
    if isinstance(value, dict):
        value = [(key, digest(item)) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        value = [digest(item) for item in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()


def digests_of_run(folder: Path) -> dict[str, str]:
    """Digests by the entry of the final checkpoint, and of the log without timings."""
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    state["log"] = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in state["log"]:
        del line["images_per_second"]
    del state["args"], state["seconds"]  # hold paths and timings
    return {name: digest(value) for name, value in state.items()}


def train_all(root: Path, data: Path, scratch: Path) -> dict[str, dict[str, str]]:
    """Train every run with the scripts of the checkout `root`; returns the digests by run and entry."""
    results = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for number, (name, (processes, *commands)) in enumerate(RUNS.items()):
        output = folder = scratch / str(number)
        for command in commands:
            arguments = command.format(CACHE=scratch / "cache", OUTPUT=output).split()
            if "--output-dir" in arguments:
                folder = Path(arguments[-1])
            launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
            arguments = [*(launcher if processes > 1 else []), arguments[0], "--output-dir", output, *arguments[1:]]
            arguments += ["--data-path", data]
            subprocess.run(
                [sys.executable, *arguments], cwd=root, env=environment, stdout=subprocess.DEVNULL, check=True
            )
        results[name] = digests_of_run(folder)
        print(f"{root.name}: {name}: {digest(results[name])[:16]}", flush=True)
    return results


def compare(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """The runs and entries with different digests."""
    pairs = [(name, entry) for name in before for entry in sorted(before[name].keys() | after[name].keys())]
    return [f"{name}: {entry}" for name, entry in pairs if before[name].get(entry) != after[name].get(entry)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT", help="the commit to compare with")
    commit = parser.parse_args().against
    with TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        reference, data = scratch / "reference", scratch / "data"
        subprocess.run(["git", "worktree", "add", "--detach", reference, commit], cwd=ROOT, check=True)
        try:
            # One set of images for both sides: the generator may change.
            make = [sys.executable, "-m", "utils.phantoms", data, "--scale", ".1"]
            subprocess.run(make, cwd=reference, check=True, stdout=subprocess.DEVNULL)
            before = train_all(reference, data, scratch / "before")
            after = train_all(ROOT, data, scratch / "after")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", reference], cwd=ROOT, check=True)
    differences = compare(before, after)
    for line in differences:
        print(f"differs: {line}")
    print(f"{len(before)} runs, {sum(map(len, before.values()))} digests, {len(differences)} differ from {commit}")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
