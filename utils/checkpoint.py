"""Checkpoints: full states that a run resumes from, and weights in every format that is accepted.

Nothing is ever unpickled: `torch.load(weights_only=True)`, with argparse.Namespace (which the authors' files hold) as
the only class allowed, or safetensors.
"""

import argparse
import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from utils import distributed
from utils.errors import UserError
from utils.files import write_atomically
from utils.models import StateDict
from utils.optim import GuardedUpdate, MovingAverage

FORMAT_VERSION = 1
CHECKPOINT = "checkpoint.pth"
PREVIOUS = "checkpoint_prev.pth"
BEST = "model_best.pth"
FOLDER = 0x10  # a zip record's attribute, which torch never sets; torch.load gives uninitialised memory for such a one
KEY_PREFIXES = ("module.", "_orig_mod.")  # left in keys by DistributedDataParallel and torch.compile


def save(path: Path, state: dict[str, Any]) -> None:
    """Write plain values and tensors; the zip format carries a CRC-32 of each record, which `read` verifies."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getbuffer())


def save_checkpoint(output_dir: Path, state: dict[str, Any]) -> None:
    """Write `checkpoint.pth`; the one before becomes `checkpoint_prev.pth`. At no moment is there none."""
    newest, previous = output_dir / CHECKPOINT, output_dir / PREVIOUS
    if newest.exists():
        link = output_dir / f".{PREVIOUS}.{os.getpid()}.tmp"
        try:
            link.unlink(missing_ok=True)
            try:
                os.link(newest, link)
            except OSError:  # a file system without hard links
                shutil.copyfile(newest, link)
            os.replace(link, previous)
        except OSError as error:
            raise UserError(f"{previous}: cannot be written ({error.strerror}); {newest} is unharmed.") from None
        finally:
            link.unlink(missing_ok=True)  # it is still there where link and previous were one file already
    save(newest, state)


def read(path: str | Path) -> dict[str, Any]:
    """The dictionary in a .pth file, tensors on the CPU, verified and never unpickled beyond plain values.

    Raises UserError for a file that is missing, damaged, no checkpoint, or holds pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        _verify_records(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise UserError(
                f"{path}: holds pickled objects beyond tensors and plain values, which could run code when read; "
                "refused. Save a state dict, or convert the file to safetensors where you trust it."
            ) from None
        raise UserError(f"{path}: is no checkpoint that torch can read, or is damaged.") from None
    except Exception as error:  # torch's readers raise nearly anything at bytes that they do not expect
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is no checkpoint, or is damaged ({reason}).") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}; expected a dictionary of weights.")
    return state


def _verify_records(path: Path) -> None:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            folders = [record.filename for record in archive.infolist() if record.external_attr & FOLDER]
        if damaged is not None:
            raise ValueError(f"the checksum of its record {damaged} is wrong")
        if folders:
            raise ValueError(f"its record {folders[0]} is marked as a folder")


def read_checkpoint(path: str | Path, script: str) -> dict[str, Any]:
    """The full state that `script` (its folder's name) saved; raises UserError for any other file."""
    state = read(path)
    if "format_version" not in state or "optimizers" not in state:
        raise UserError(
            f"{path}: holds weights but no full training state, so a run cannot resume from it; "
            f"use {CHECKPOINT}, or start from these weights with _normal/train.py --finetune."
        )
    _check_types(path, state, script=str, epoch=int, best_f1=float, classes=list, args=dict, model=dict, rng=list)
    if state["format_version"] > FORMAT_VERSION:
        raise UserError(f"{path}: was written by a newer version (format {state['format_version']}); update this code.")
    if state["script"] != script:
        raise UserError(
            f"{path}: is a checkpoint of {state['script']}/train.py, and this is {script}/train.py; "
            "to go on from its weights use _normal/train.py --finetune."
        )
    return state


def _check_types(path: str | Path, state: dict[str, Any], **kinds: type) -> None:
    """Raise UserError for an entry that is missing or of another type."""
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise UserError(
                f"{path}: its '{name}' is not a {kind.__name__}; this is no whole checkpoint of this project."
            )


class Weights(NamedTuple):
    """A classifier's weights out of any accepted file, with what the file says of itself."""

    model: StateDict  # clean timm keys
    classes: list[str] | None
    args: dict[str, Any]  # empty if the file holds none
    policy_net: StateDict | None
    path: str


def read_weights(path: str | Path) -> Weights:
    """Weights from our files, the authors' checkpoints, a bare state dict or safetensors.

    From a full state with a moving average (`--model-ema`) these are the averaged weights, which were validated.
    Raises UserError as `read` does, and for a file without a state dict.
    """
    state = read(path)
    wrapped = isinstance(state.get("model"), dict)
    model = clean_keys((state.get("model_ema") or state["model"]) if wrapped else state)
    model.pop("n_averaged", None)  # in torchvision's state of a moving average, beside the weights
    if not model or not all(isinstance(value, Tensor) for value in model.values()):
        raise UserError(f"{path}: holds no state dict: expected tensors by name, or a dictionary with such a 'model'.")
    args = state.get("args", {}) if wrapped else {}
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    ours = "format_version" in state
    if ours:
        _check_types(path, state, classes=list, args=dict)
    return Weights(
        model=model,
        classes=state.get("classes") if ours else None,
        args=dict(args) if isinstance(args, dict) else {},
        policy_net=state.get("policy_net") if ours else None,
        path=str(path),
    )


def clean_keys(state_dict: StateDict) -> StateDict:
    """Keys without the prefixes that wrappers left, in any order and number."""

    def clean(key: str) -> str:
        while key.startswith(KEY_PREFIXES):
            key = key.split(".", 1)[1]
        return key

    return {clean(key): value for key, value in state_dict.items()}


def full_state(
    script: str,
    *,
    next_epoch: int,
    best_f1: float,
    classes: list[str],
    args: dict[str, Any],
    model: nn.Module,
    update: GuardedUpdate,
    ema: MovingAverage | None,
    **more: StateDict,
) -> dict[str, Any]:
    """All that a run goes on from, at the start of epoch `next_epoch`; every rank must call it.

    The schedules are not in it: they follow from the arguments and the epoch.
    """
    return {
        "format_version": FORMAT_VERSION,
        "script": script,
        "epoch": next_epoch,
        "step": 0,
        "best_f1": best_f1,
        "rng": rng_states(),
        "classes": classes,
        "args": args,
        "model": model.state_dict(),
        **update.state(),
        **(ema.state() if ema else {}),
        **more,
    }


def weights_state(model: nn.Module, classes: list[str], args: dict[str, Any]) -> dict[str, Any]:
    """What `model_<epoch>.pth` and `model_best.pth` hold."""
    return {"format_version": FORMAT_VERSION, "model": model.state_dict(), "classes": classes, "args": args}


def rng_states() -> list[dict[str, Tensor]]:
    """The state of the global generators, CPU and CUDA, of each rank."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return distributed.all_gather_object(state)


def restore_rng_state(state: dict[str, Tensor]) -> None:
    """Put this process's generators back to one rank's state."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
