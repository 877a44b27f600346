"""Where numbers come from: run.json, which tells of each start of a run by what it was started, on what, and when."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import timm
import torch
import torchvision

from utils.arguments import AUTO
from utils.data.folders import ImageFiles
from utils.runtime import distributed
from utils.runtime.files import write_json
from utils.runtime.progress import Position, say
from utils.runtime.reading import read_json

RUN = "run.json"
ROOT = Path(__file__).resolve().parents[2]


def describe(script: str, argv: Sequence[str] | None, device: torch.device) -> dict[str, Any]:
    """The command of this start, the time, versions, hardware, number of processes, and this code's commit.

    argv: as `main` was given it; None: the process's own.
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
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Such as "1a2b3c4d5e6f", with "+changes" where files differ from it; None where git does not know this code."""
    with suppress(OSError, subprocess.SubprocessError):
        _git("ls-files", "--error-unmatch", __file__)  # a repository around this one may not hold this code
        return _git("rev-parse", "--short=12", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    return None


def _git(*command: str) -> str:
    """What git says, without waiting for its locks or taking any."""
    # Of no other repository than the code's own, whatever a hook or a script has set.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", ROOT, *command],
        env={**environment, "GIT_OPTIONAL_LOCKS": "0"},
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    return done.stdout.strip()


def image_counts(files: ImageFiles) -> dict[str, int]:
    """Images of each class of a split."""
    counts = np.bincount(files.targets, minlength=len(files.classes))
    return dict(zip(files.classes, counts.tolist(), strict=True))


def write_run(
    output_dir: Path, start: dict[str, Any], position: Position, resume: str | None, splits: dict[str, ImageFiles]
) -> None:
    """Write run.json: this start behind those of the run so far, and the images of each split and class.

    start: of `describe`; resume: --resume, which tells where the earlier starts are noted; `auto` where there is no
    checkpoint yet.
    """
    earlier = output_dir if resume == AUTO else Path(resume).parent if resume else None
    before = read_run(earlier).get("starts", []) if earlier else []
    start = {**start, "epoch": position.epoch, "step": position.step}
    content = {
        "starts": [*before, start],
        "data": {name: {"root": str(files.root), "images": image_counts(files)} for name, files in splits.items()},
    }
    write_json(output_dir / RUN, content)


def is_start(start: Any) -> bool:
    """Whether this is what `describe` gives."""
    texts = ("command", "time", "device", "machine")
    return (
        isinstance(start, dict)
        and all(isinstance(start.get(name), str) for name in texts)
        and type(start.get("processes")) is int
        and isinstance(start.get("commit", 0), (str, NoneType))
        and isinstance(start.get("versions"), dict)
        and all(isinstance(version, str) for version in start["versions"].values())
    )


def read_run(folder: Path) -> dict[str, Any]:
    """What a folder's run.json tells; nothing where there is none, or where it is damaged, and then that is said."""
    path = folder / RUN
    try:
        content = read_json(path)
        starts = content.get("starts") if isinstance(content, dict) else None
        if isinstance(starts, list) and all(map(is_start, starts)):
            return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        pass
    say(f"{path}: cannot be read, and is taken as if it were not there.")
    return {}
