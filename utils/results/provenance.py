"""run.json: the command, versions, hardware and time of every start of a run, and the images it was trained on."""

import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torchvision

from utils.arguments import AUTO
from utils.data.folders import ImageFiles
from utils.results.git import commit_of
from utils.results.validation import has_starts, is_origin, read_checked
from utils.runtime import distributed
from utils.runtime.files import write_json
from utils.runtime.progress import Position, say

RUN = "run.json"
# Flags of a training that neither affect it nor tell runs apart.
NOT_COMPARED = {
    "--seed", "--output-dir", "--resume", "-j", "--workers", "--print-freq", "--plot-every", "--checkpoint-steps",
    "--tensorboard", "--no-tensorboard", "--timeout", "--tracker",
}  # fmt: skip


class Trained(NamedTuple):
    """How weights were trained, according to the run.json next to them."""

    root: Path  # folder of the training images
    images: dict[str, int]  # number of training images of each class
    starts: list[dict[str, Any]]  # as `describe` returns them


def describe(script: str, argv: Sequence[str] | None, device: torch.device) -> dict[str, Any]:
    """The command of this start, the time, versions, hardware, number of processes and the commit of this code.

    argv: the arguments of `main`; None: those of the process.
    """
    return {
        "command": shlex.join([f"{script}/train.py", *(sys.argv[1:] if argv is None else argv)]),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "processes": distributed.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, torchvision, timm, np)},
        },
        "commit": commit_of(Path(__file__)),
    }


def write_run(
    output_dir: Path, start: dict[str, Any], position: Position, resume: str | None, splits: dict[str, ImageFiles]
) -> None:
    """Write run.json: the earlier starts of the run and this one, and the number of images of each split and class.

    start: from `describe`; resume: --resume, in the folder of which the earlier starts are recorded, or `auto` if
    there is no checkpoint yet.
    """
    earlier = []
    if resume:
        earlier = read_starts(output_dir if resume == AUTO else Path(resume).parent)
    data = {}
    for name, files in splits.items():
        counts = np.bincount(files.targets, minlength=len(files.classes)).tolist()
        data[name] = {"root": str(files.root), "images": dict(zip(files.classes, counts, strict=True))}
    start = {**start, "epoch": position.epoch, "step": position.step}
    write_json(output_dir / RUN, {"starts": [*earlier, start], "data": data})


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts in a folder's run.json. Without the file none; a damaged file is ignored with a message."""
    content = read_checked(folder / RUN, has_starts)
    if content is None:
        say(f"{folder / RUN}: cannot be read and is ignored.")
    return content["starts"] if content else []


def read_trained(weights: Path, classes: Sequence[str], heated: bool) -> Trained | None:
    """The training in the run.json next to the weights, if it is one of these classes and of the right script.

    None otherwise: the weights may have been copied to the folder of another run.
    """
    content = read_checked(weights.parent / RUN, is_origin)
    if not content or not content["starts"] or "train" not in content["data"]:
        return None
    data, script = content["data"]["train"], "_policy_gradient/" if heated else ""
    if sorted(data["images"]) != sorted(classes) or not content["starts"][0]["command"].startswith(script):
        return None
    return Trained(Path(data["root"]), data["images"], content["starts"])


def same_but_seed(folders: Sequence[str]) -> list[list[str]]:
    """Groups of two or more runs that were started with the same flags and different seeds, according to run.json."""
    seeds_by_flags: dict[tuple, dict[str, str]] = {}
    for folder in folders:
        if seed_and_flags := _seed_and_flags(Path(folder)):
            seed, flags = seed_and_flags
            seeds_by_flags.setdefault(flags, {})[folder] = seed
    return [list(seeds) for seeds in seeds_by_flags.values() if len(seeds) == len(set(seeds.values())) > 1]


def _seed_and_flags(folder: Path) -> tuple[str, tuple[str, ...]] | None:
    """The seed of a run's first start, and the script and flags to compare; None without a valid run.json.

    A --finetune file in a folder that is named after the seed counts as the same file.
    """
    content = read_checked(folder / RUN, has_starts)
    try:
        script, *words = shlex.split(content["starts"][0]["command"])
    except (TypeError, LookupError, ValueError):
        return None
    flags: list[list[str]] = []
    for word in words:
        if re.match("-[-a-z]", word):
            flags.append(word.split("=", 1))
        elif flags:
            flags[-1].append(word)
    seed = next((values[0] for name, *values in flags if name == "--seed" and values), "0")
    for flag in flags:
        if flag[0] == "--finetune":
            flag[1:] = [re.sub(rf"(?<!\d){re.escape(seed)}(?!\d)", "SEED", value) for value in flag[1:]]
    return seed, (script, *sorted(" ".join(flag) for flag in flags if flag[0] not in NOT_COMPARED))
