"""Proof that a refactoring changes no bit: SHA-256 digests of what fixed seeds train.

    python -m tests.helpers.digests --against COMMIT

checks COMMIT out into a temporary worktree, trains the runs below there and here on the same images, and compares the
digests of every part of the final state (weights, prior, optimisers, average, random generators) and of log.jsonl
without timings. Exits with 1 if any differs. Digests depend on the processor and on torch's version, so both sides
are computed on one machine, in one go.
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
    *("--device", "cpu", "--model", "test_resnet", "--workers", "1", "--batch-size", "8", "--epochs", "2"),
    *("--train-crop-size", "32", "--val-resize-size", "36", "--val-crop-size", "32", "--lr", ".05"),
)
NORMAL = ("_normal/train.py", *COMMON)
POLICY = (
    *("_policy_gradient/train.py", *COMMON, "--policy-model", "test_resnet"),
    *("--grid", "8", "--kernel", "5", "--sigma", "2"),
)
LEAVE_ONE_OUT = ("--objective", "reinforce", "--baseline", "loo", "--masks-per-image", "2", "--entropy-weight", ".01")
# {CACHE} and {OUTPUT} stand for folders. A run of several stages resumes or fine-tunes the stage before.
RUNS: dict[str, tuple[int, list[tuple[str, ...]]]] = {
    "normal": (1, [NORMAL]),
    "normal, two processes, mixup, average": (
        2,
        [(*NORMAL, "--mixup-alpha", ".2", "--model-ema", "--model-ema-steps", "1", "--lr-warmup-epochs", "1")],
    ),
    "normal, augmented, cutmix, adamw, clipped, cache": (
        1,
        [
            (
                *(*NORMAL, "--auto-augment", "ta_wide", "--random-erase", ".3", "--cutmix-alpha", "1"),
                *("--opt", "adamw", "--clip-grad-norm", "1", "--cache-dataset", "host", "--cache-dir", "{CACHE}"),
            )
        ],
    ),
    "published": (1, [POLICY]),
    "published, two processes": (2, [POLICY]),
    "published, resumed": (
        1,
        [(*POLICY, "--epochs", "1"), (*POLICY, "--resume", "{OUTPUT}/checkpoint.pth")],
    ),
    "published, adversarial, fading, mixup, average": (
        1,
        [
            (
                *(*POLICY, "--objective", "published-unscaled", "--policy-sign", "adversarial"),
                *("--mask-fade-epochs", "1", "--mixup-alpha", ".2", "--model-ema"),
            )
        ],
    ),
    "reinforce, leave-one-out": (1, [(*POLICY, *LEAVE_ONE_OUT)]),
    "reinforce, leave-one-out, two processes, cache": (
        2,
        [(*POLICY, *LEAVE_ONE_OUT, "--cache-dataset", "host", "--cache-dir", "{CACHE}")],
    ),
    "reinforce, moving average": (1, [(*POLICY, "--objective", "reinforce", "--baseline", "ema")]),
    "uniform masks, cache on the device": (
        1,
        [(*POLICY, "--mask-policy", "uniform", "--cache-dataset", "device", "--cache-dir", "{CACHE}")],
    ),
    "prior": (1, [(*POLICY, "--mask-policy", "prior", "--objective", "reinforce", "--baseline", "ema")]),
    "no masks, then fine-tuned": (
        1,
        [
            (*POLICY, "--mask-policy", "none", "--epochs", "1"),
            (*NORMAL, "--finetune", "{OUTPUT}/model_0.pth", "--freeze-backbone", "--output-dir", "{OUTPUT}/tuned"),
        ],
    ),
}
TIMINGS = {"images_per_second"}


def digest(value: Any) -> str:
    """SHA-256 of nested dicts, lists, tensors and plain values."""
    sha = hashlib.sha256()

    def update(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                sha.update(repr(key).encode())
                update(item)
        elif isinstance(value, list | tuple):
            for item in value:
                update(item)
        else:
            sha.update(repr(value).encode())

    update(value)
    return sha.hexdigest()


def digests_of_run(folder: Path) -> dict[str, str]:
    """Digests by the entry of the final checkpoint, and of the log without timings."""
    state = torch.load(folder / "checkpoint.pth", weights_only=True)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    state["log"] = [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]
    del state["args"]  # holds the paths of this run
    state.pop("seconds", None)
    return {name: digest(value) for name, value in state.items()}


def train_all(root: Path, data: Path, scratch: Path) -> dict[str, dict[str, str]]:
    """Train every run with the scripts of the checkout `root`; returns the digests by run and entry."""
    results = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for number, (name, (processes, stages)) in enumerate(RUNS.items()):
        output = scratch / str(number)
        folder = output
        for stage in stages:
            places = {"{CACHE}": str(scratch / "cache"), "{OUTPUT}": str(output)}
            arguments = list(stage)
            for placeholder, path in places.items():
                arguments = [argument.replace(placeholder, path) for argument in arguments]
            if "--output-dir" in arguments:
                folder = Path(arguments[arguments.index("--output-dir") + 1])
            else:
                arguments += ["--output-dir", str(output)]
            launcher = [sys.executable]
            if processes > 1:
                launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
            command = [*launcher, *arguments, "--data-path", str(data)]
            result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
            if result.returncode != 0:
                sys.exit(f"{name}: {' '.join(command)} failed in {root}\n{result.stdout}{result.stderr}")
        results[name] = digests_of_run(folder)
        print(f"{root.name}: {name}: {digest(results[name])[:16]}", flush=True)
    return results


def compare(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """One line for each entry of a run whose digests differ."""
    differences = []
    for name in before:
        for entry in before[name].keys() | after[name].keys():
            if before[name].get(entry) != after[name].get(entry):
                differences.append(f"{name}: {entry} differs")
    return sorted(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="COMMIT", help="the commit to compare with")
    commit = parser.parse_args().against
    with TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        reference = scratch / "reference"
        subprocess.run(["git", "worktree", "add", "--detach", reference, commit], cwd=ROOT, check=True)
        try:
            data = scratch / "data"  # by the old generator, for both
            make = [sys.executable, "-m", "utils.phantoms", str(data), "--scale", ".1"]
            subprocess.run(make, cwd=reference, check=True)
            before = train_all(reference, data, scratch / "before")
            after = train_all(ROOT, data, scratch / "after")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", reference], cwd=ROOT, check=True)
    differences = compare(before, after)
    for line in differences:
        print(line)
    entries = sum(map(len, before.values()))
    print(f"{len(before)} runs, {entries} digests, {len(differences)} differ from {commit}")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
