"""Checkpoints: full states that a run resumes from, and weights in every accepted format.

No file can run code: all are read by `torch.load(weights_only=True)` or safetensors. The only class allowed besides
plain values is argparse.Namespace, which the authors' files hold.
"""

import argparse
import copy
import io
import json
import os
import re
from collections import OrderedDict
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from utils.checkpoints import foreign, verify
from utils.checkpoints.pickle_scan import ForeignObject, Refused
from utils.checkpoints.torch_files import checked_copy
from utils.runtime.errors import UserError, first_line
from utils.runtime.files import stream_atomically, temporary_path, write_atomically
from utils.runtime.reading import open_regular, parse_json, read_bytes

StateDict = dict[str, Tensor]

FORMAT_VERSION = 1
CHECKPOINT = "checkpoint.pth"
PREVIOUS = "checkpoint_prev.pth"
BEST = "model_best.pth"
HEATED = "Heated model: pretrained on masked images, not yet fine-tuned; it is no final classifier."
DAMAGED = "checkpoint_damaged.pth"
METADATA = "policy_gradient_noise_mask"  # our entry in a safetensors header: classes and args as JSON
MOST_BRACKETS = 100_000  # of the metadata
MOST_HEADER = 10_000_000  # bytes of a safetensors header
MOST_TENSORS = 20_000  # of a safetensors file
WRAPPERS = re.compile(r"((module|_orig_mod)\.)+")  # DistributedDataParallel's and torch.compile's prefixes of keys


class NotDamaged(UserError):
    """The file may be intact but cannot be used here (permissions, memory, version, wrong script)."""


def serialize(state: dict[str, Any]) -> memoryview:
    """Plain values and tensors as a zip; each record has a CRC-32, which `read` verifies."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getbuffer()


def stage(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of the state in host memory, independent of the live tensors; waits for the device.

    Tensors that are the same memory stay so. Copies of a GPU's tensors are pinned, which makes copying several times as
    fast; torch keeps the pinned memory for the next copies.
    """
    copies: dict[tuple, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = value.data_ptr(), value.dtype, value.shape, value.stride()
            if key not in copies:
                host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                copies[key] = host.copy_(value, non_blocking=True)
            return copies[key]
        if isinstance(value, dict):
            result = copy.copy(value)  # with the version that a state dict carries
            for key, item in value.items():
                result[key] = copied(item)
            return result
        if isinstance(value, (list, tuple)):
            return type(value)(map(copied, value))
        return value

    staged = copied(state)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return staged


def save(path: Path, state: dict[str, Any]) -> None:
    """Write plain values and tensors atomically, without a copy in memory; raises as `stream_atomically` does."""
    stream_atomically(path, lambda file: torch.save(state, file))


def save_checkpoint(output_dir: Path, state: dict[str, Any]) -> None:
    """Write `checkpoint.pth`; the previous one becomes `checkpoint_prev.pth`. One of them exists at every moment."""
    newest, previous = output_dir / CHECKPOINT, output_dir / PREVIOUS
    if newest.exists():
        link = temporary_path(previous)
        try:
            os.link(newest, link)
            os.replace(link, previous)
        except OSError:  # a file system without hard links, say
            write_atomically(previous, read_bytes(newest, most=None))
        finally:
            link.unlink(missing_ok=True)  # it still exists if link and previous were the same file
    save(newest, state)


def replace_damaged(output_dir: Path, script: str) -> None:
    """Replace an invalid checkpoint.pth by checkpoint_prev.pth, before a save would rotate it.

    The invalid file is kept as checkpoint_damaged.pth.
    """
    newest, previous = output_dir / CHECKPOINT, output_dir / PREVIOUS
    try:
        if newest.exists():
            read_checkpoint(newest, script)
    except UserError:
        os.replace(newest, output_dir / DAMAGED)
        write_atomically(newest, read_bytes(previous, most=None))


def read(path: str | Path) -> dict[str, Any]:
    """The verified dictionary in a .pth or .safetensors file: plain values, and tensors on the CPU.

    Raises UserError for a file that is missing, damaged, not a checkpoint, holds pickled code, or claims to be larger
    than it is.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = _read_safetensors(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(checked_copy(path), map_location="cpu", weights_only=True)
    except ForeignObject as foreign_object:
        raise UserError(
            f"{path}: holds pickled objects beyond tensors and plain values ({foreign_object}), which could run code "
            "when read; refused. Save a state dict, or convert the file to safetensors if you trust it."
        ) from None
    except Refused as refusal:
        raise UserError(f"{path}: {refusal}; refused.") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except PermissionError:
        raise NotDamaged(f"{path}: no permission to read this file.") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a checkpoint or weights.") from None
    except MemoryError:
        raise NotDamaged(f"{path}: too little memory to read this file.") from None
    except Exception as error:  # torch's readers raise nearly anything for unexpected bytes
        raise UserError(f"{path}: not a checkpoint, or damaged ({first_line(error)[:200]}).") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}; expected a dictionary of weights.")
    for value in (state, *state.values()):
        if isinstance(value, OrderedDict):
            vars(value).clear()  # torch's version metadata: unchecked, and not needed by any weights here
    return state


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors; for files of `safetensors_bytes` in a dictionary like that of a .pth, with the metadata."""
    with open_regular(path) as file:  # refuses pipes, which safetensors would wait for
        header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > MOST_HEADER:
        raise ValueError(f"its header claims {header_bytes} bytes, more than {MOST_HEADER}")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = (file.metadata() or {}).get(METADATA)
        if len(file.keys()) > MOST_TENSORS:
            raise ValueError(f"it holds {len(file.keys())} tensors, more than {MOST_TENSORS}")
    tensors = safetensors.torch.load_file(path)
    if metadata is None:
        return tensors
    if metadata.count("[") + metadata.count("{") > MOST_BRACKETS:
        raise ValueError(f"its '{METADATA}' has more than {MOST_BRACKETS} opening brackets")
    entries = parse_json(metadata)
    if not isinstance(entries, dict):
        raise ValueError(f"its '{METADATA}' is not a JSON object")
    return {"model": tensors} | {name: entries.get(name) for name in ("format_version", "classes", "args")}


def read_checkpoint(path: str | Path, script: str, advice: str | None = None) -> dict[str, Any]:
    """The full state that `script` (a folder name) saved. Raises UserError for any other file.

    advice: what to give instead of another file; None: what to do with it in a training.
    """
    state = read(path)
    if "format_version" not in state or "optimizers" not in state:
        problem = f"{path}: holds weights but no full training state"
        use = f"use {CHECKPOINT}, or start from these weights with _normal/train.py --finetune"
        raise UserError(f"{problem}; {advice}." if advice else f"{problem}, so a run cannot resume from it; {use}.")
    verify.check_types(path, state, script=str)
    version = state["format_version"]
    verify.require(path, "format_version", type(version) is int and version >= 1, "a number of 1 or more")
    if version > FORMAT_VERSION:
        raise NotDamaged(
            f"{path}: written by a newer version (format {version}, known up to {FORMAT_VERSION}); update this code."
        )
    if state["script"] != script:
        problem = f"{path}: is a checkpoint of {state['script']}/train.py"
        use = "to continue from its weights use _normal/train.py --finetune"
        raise NotDamaged(f"{problem}; {advice}." if advice else f"{problem}, and this is {script}/train.py; {use}.")
    verify.check_full_state(path, state)
    return state


class Weights(NamedTuple):
    """A classifier's weights from any accepted file, and the file's own information about them."""

    model: StateDict  # clean timm keys
    classes: list[str] | None
    args: dict[str, Any]  # values that a command line can give; empty if the file holds none
    policy_net: StateDict | None
    path: str
    full_state: bool  # whether the file is a checkpoint.pth, with optimisers
    averaged: bool | None  # whether these are the file's moving average; None if it holds none
    notes: list[str]  # sentences on the choice among several state dicts

    @property
    def is_heated(self) -> bool:
        """Whether the file says that the classifier was trained on masked images."""
        return self.args.get("grid") is not None and self.args.get("mask_policy", "learned") != "none"


def read_weights(path: str | Path, use_ema: bool | None = None) -> Weights:
    """Weights from a file of ours, the authors, timm, torchvision, Lightning, safetensors, or a bare state dict.

    use_ema: whether to take the moving average (`--model-ema`) or the trained weights of a file that holds both. None
    takes the average, which the best epoch was chosen by, and which timm takes too.
    Raises UserError as `read` does, for a file without a state dict, and if a requested average is missing. Weights of
    other code may still be NaN or infinite, because metrics keep such buffers among them: see `matching_state_dict`.
    """
    state = read(path)
    ours = "format_version" in state
    container, averaged = foreign.choose_container(path, state, use_ema)
    state_dict = state if container is None else state[container]
    if not foreign.is_state_dict(state_dict):
        raise UserError(f"{path}: holds no state dict: expected tensors by name, or a dictionary with such a 'model'.")
    model = clean_keys(state_dict)
    model.pop("n_averaged", None)  # torchvision keeps this counter among the averaged weights
    verify.check_state_dict(path, model, finite=ours)
    if ours:
        verify.check_classes(path, state)
        verify.check_types(path, state, args=dict)
        if "policy_net" in state:
            verify.check_types(path, state, policy_net=dict)
            verify.check_state_dict(path, state["policy_net"])
    args = state["args"] if ours else foreign.arguments_of(state, container)
    return Weights(
        model=model,
        classes=state["classes"] if ours else None,
        args={name: value for name, value in args.items() if _is_plain(value)},
        policy_net=state.get("policy_net") if ours else None,
        path=str(path),
        full_state="optimizers" in state,
        averaged=averaged,
        notes=foreign.describe_choice(path, state, container),
    )


def _is_plain(value: Any) -> bool:
    """Whether a command line can give this value."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, (str, int, float, NoneType)) for item in items)


def clean_keys(state_dict: StateDict) -> StateDict:
    """The state dict with keys stripped of wrapper prefixes, in any order and number."""
    return {key[match.end() if (match := WRAPPERS.match(key)) else 0 :]: value for key, value in state_dict.items()}


def weights_state(model: nn.Module, classes: list[str], args: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of weights without an average."""
    return weights_of({"model": model.state_dict(), "classes": classes, "args": args})


def weights_of(state: dict[str, Any]) -> dict[str, Any]:
    """The content of `model_<epoch>.pth` and `model_best.pth`: the trained weights, and their average if any.

    state: the full one.
    """
    weights = {
        name: {key: tensor.contiguous() for key, tensor in state[name].items()}  # also with --channels-last
        for name in ("model", "model_ema")
        if name in state
    }
    return {"format_version": FORMAT_VERSION, **weights, "classes": state["classes"], "args": state["args"]}


def safetensors_bytes(model: nn.Module, classes: list[str], args: dict[str, Any]) -> bytes:
    """A safetensors file with the content of `weights_state`; `read_weights` reads it like a .pth.

    The bytes are always the same: the metadata has one entry, because the order of several entries is random.
    """
    copies = {}  # safetensors refuses two names for one tensor, which tied weights have
    for key, tensor in model.state_dict().items():
        copies[key] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    entries = json.dumps({"format_version": FORMAT_VERSION, "classes": classes, "args": args})
    return safetensors.torch.save(copies, metadata={METADATA: entries})
