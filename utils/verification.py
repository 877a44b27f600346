"""What a file of weights must be before anything is made of it: whole, as large as it claims, dense, finite."""

import argparse
import io
import math
import reprlib
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.errors import UserError

ZIP_START = b"PK\x03\x04"  # by which torch.load, too, tells its format from the old one
NUMBERS = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}
MOST_EPOCHS = 100_000  # a schedule is brought to its epoch step by step


def checked_archive(path: Path) -> BinaryIO | Path:
    """A copy in memory of the records of torch's zip format, checksums verified; the path itself for another format.

    A copy, since a zip can show one reader other records than the next. Raises ValueError before anything is unpacked
    if a record is compressed, which torch's are not, or if they claim more bytes than the file has.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            return path
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as verified:
        records = archive.infolist()
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its record {record.filename} is compressed, which torch.save never does")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records claim more bytes than the file has")
        for record in records:
            verified.writestr(record.filename, archive.read(record))
    copy.seek(0)
    return copy


def check_tensors(path: Path, state: dict[str, Any]) -> None:
    """Raise UserError for a tensor, however deep in the state, that is not dense or larger than the file.

    A few bytes can describe a tensor of any size, whose elements are all the same one.
    """
    size = path.stat().st_size
    pending: list[tuple[Any, Any]] = [("?", state)]
    seen = set()  # a pickle may hold itself, or the same thing very often
    while pending:
        name, value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not _is_dense(value):
                raise UserError(f"{path}: its '{name}' is no dense tensor (sparse, quantised or the like); refused.")
            if math.prod(value.shape) * value.element_size() > size:
                raise UserError(
                    f"{path}: its '{name}' claims the shape {tuple(value.shape)}, more than the file holds; refused."
                )
        elif isinstance(value, dict):
            pending += [(key if isinstance(key, str) else name, inner) for key, inner in value.items()]
        elif isinstance(value, (list, tuple, set)):
            pending += [(name, inner) for inner in value]
        elif isinstance(value, argparse.Namespace):
            pending.append((name, vars(value)))


def _is_dense(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and not (tensor.is_nested or tensor.is_quantized)
    return plain and tensor.layout == torch.strided and tensor.device.type == "cpu"


def check_state_dict(path: str | Path, state_dict: dict[str, Any], *, finite: bool = True) -> None:
    """Raise UserError, naming the key, unless all values are tensors of ordinary numbers, and finite as float32."""
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(f"{path}: holds no state dict: its {reprlib.repr(key)} is a {kind}, expected a tensor.")
        if value.dtype not in NUMBERS:
            raise UserError(f"{path}: its '{key}' is of {value.dtype}, expected floating-point numbers or integers.")
        if finite and value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(
                f"{path}: its '{key}' holds NaN or infinite values: the training had diverged; take an earlier file."
            )


def check_types(path: str | Path, state: dict[str, Any], **kinds: type) -> None:
    """Raise UserError for an entry that is missing or of another type."""
    for name, kind in kinds.items():
        _require(path, name, isinstance(state.get(name), kind), f"a {kind.__name__}")


def check_classes(path: str | Path, state: dict[str, Any]) -> None:
    classes = state.get("classes")
    whole = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    _require(path, "classes", whole, "a list of names")
    _require(path, "classes", len(set(classes)) == len(classes), "a list of different names")


def check_full_state(path: str | Path, state: dict[str, Any]) -> None:
    """Raise UserError for an entry of a full state that is missing or that no run could have saved."""
    check_types(path, state, seconds=float, best_f1=float, args=dict)
    if "image_files" in state:
        check_types(path, state, image_files=dict)
        _require(path, "image_files", state["image_files"].keys() == {"train", "val"}, "digests of train and val")
    check_types(path, state, rng=list, meters=dict, optimizers=dict, scaler=dict)
    check_classes(path, state)
    args = state["args"]
    averaged, fp16 = args.get("model_ema") is True, args.get("amp") is True and args.get("amp_dtype") == "fp16"
    counts = ["epoch", "step", "images", "train_images", "skipped_steps"] + ["model_ema_updates"] * averaged
    for name in counts:
        _require(path, name, _is_count(state.get(name)), "a whole number of at least 0")
    _require(path, "epoch", state["epoch"] <= MOST_EPOCHS, f"at most {MOST_EPOCHS}")
    _require(path, "images", state["images"] <= state["train_images"], "a place in the training split")
    _require(path, "seconds", 0 <= state["seconds"] < math.inf, "a number of at least 0")
    _require(path, "best_f1", -1 <= state["best_f1"] <= 1, "a macro F1")
    kept = {
        "model": True,
        "policy_net": args.get("mask_policy", "none") != "none",
        "objective": "objective" in args,
        "model_ema": averaged,
    }
    for name, needed in kept.items():
        if needed or name in state:
            check_types(path, state, **{name: dict})
            check_state_dict(path, state[name], finite=name != "objective")  # a baseline is NaN before its first step
    _check_meters(path, state["meters"])
    _check_optimizers(path, state["optimizers"])
    _check_scaler(path, state["scaler"], fp16)
    restores = len(state["rng"]) > 0 and all(map(_restores_generators, state["rng"]))
    _require(path, "rng", restores, "a list of torch's generator states")


def fitting_optimizer_state(source: str, name: str, optimizer: Optimizer, saved: Any) -> dict[str, Any]:
    """A saved state for this optimiser's `load_state_dict`, with the options that it has now.

    Raises UserError unless the tensors have the shapes of their parameters: the fused kernels do not look, and would
    write beyond a smaller one.
    """
    groups = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    fits = (
        saved is not None
        and [group["params"] for group in saved["param_groups"]] == [group["params"] for group in groups]
        and saved["state"].keys() <= set(range(len(parameters)))
        and all(_fits(of_parameter, parameters[number]) for number, of_parameter in saved["state"].items())
    )
    if not fits:
        raise UserError(f"{source}: its {name} optimiser's state does not fit this run.")
    return {"state": saved["state"], "param_groups": groups}


def _fits(of_parameter: dict[str, Any], parameter: Tensor) -> bool:
    return all(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.shape == (() if key == "step" else parameter.shape)
        for key, value in of_parameter.items()
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_count, values))


def _check_meters(path: str | Path, meters: dict[str, Any]) -> None:
    names, totals = meters.get("names"), meters.get("totals")
    whole = (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and _is_count(meters.get("count"))
        and isinstance(totals, Tensor)
        and totals.dtype == torch.float64
        and totals.ndim == 2  # (W, n)
        and len(totals) > 0
        and totals.shape[1] == len(names)
    )
    _require(path, "meters", whole, "the sums of an epoch")


def _check_optimizers(path: str | Path, optimizers: dict[str, Any]) -> None:
    for name, optimizer in optimizers.items():
        whole = (
            isinstance(optimizer, dict)
            and isinstance(optimizer.get("state"), dict)
            and all(isinstance(of_parameter, dict) for of_parameter in optimizer["state"].values())
            and isinstance(optimizer.get("param_groups"), list)
            and all(isinstance(group, dict) and _are_counts(group.get("params")) for group in optimizer["param_groups"])
        )
        _require(path, "optimizers", whole, f"the state of an optimiser ({reprlib.repr(name)})")


def _check_scaler(path: str | Path, scaler: dict[str, Any], fp16: bool) -> None:
    keys = torch.amp.GradScaler("cpu").state_dict().keys() if fp16 else set()
    numbers = all(type(value) in (int, float) and 0 <= value < math.inf for value in scaler.values())
    _require(path, "scaler", scaler.keys() == keys and numbers, "the state of a gradient scaler")


def _restores_generators(of_rank: Any) -> bool:
    """True if torch takes these states of its generators, by the kind of device."""
    if not isinstance(of_rank, dict) or "cpu" not in of_rank:
        return False
    devices = ("cpu", "cuda") if "cuda" in of_rank and torch.cuda.is_available() else ("cpu",)
    try:
        for device in devices:
            torch.Generator(device).set_state(of_rank[device])
    except (RuntimeError, TypeError):
        return False
    return True


def _require(path: str | Path, name: str, right: bool, expected: str) -> None:
    if not right:
        raise UserError(f"{path}: its '{name}' is not {expected}; this is no whole checkpoint of this project.")
