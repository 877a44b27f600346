"""Checks of weight files and full states: finite numbers, the expected entries, nothing foreign."""

import math
import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer, RMSprop

from utils.checkpoints.pickle_scan import is_count
from utils.runtime.errors import UserError

NUMBERS = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
}  # fmt: skip
MOST_EPOCHS = 100_000  # a resumed schedule steps through all epochs before
MOST_CLASSES = 100_000  # each has a row in the classifier's head
ENTRIES = {
    "format_version", "script", "classes", "args", "train_images", "image_files", "epoch", "step", "images", "seconds",
    "best_f1", "rng", "meters", "optimizers", "scaler", "skipped_steps", "model", "model_ema", "model_ema_updates",
    "policy_net", "objective",
}  # fmt: skip
METERS = {
    "_normal": {"train_loss", "train_top1"},
    "_policy_gradient": {"train_loss", "train_top1", "train_cross_entropy"},
}
POLICY_METERS = {
    "mask_mean", "mask_std", "mask_std_between_images", "policy_entropy", "policy_log_density", "advantage_std",
    "prior_drift", "concentrations_at_bounds",
}  # fmt: skip
BUFFERS = {SGD: set(), AdamW: {"step", "exp_avg", "exp_avg_sq"}, RMSprop: {"step", "square_avg"}}
LARGEST_SCALE = 2.0**127  # of the fp16 gradient scaler, a float32


def require(path: str | Path, name: str, right: bool, expected: str) -> None:
    """Raise UserError unless the entry of this name is right."""
    if not right:
        raise UserError(f"{path}: its '{name}' is not {expected}; this is not a complete checkpoint of this project.")


def check_state_dict(path: str | Path, state_dict: dict[str, Any], *, finite: bool = True) -> None:
    """Raise UserError, with the key, unless all values are dense tensors of numbers, and finite in float32.

    finite: False accepts NaN and infinite values.
    """
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise UserError(f"{path}: holds no state dict: its {reprlib.repr(key)} is a {kind}, expected a tensor.")
        if value.dtype not in NUMBERS:
            raise UserError(
                f"{path}: its '{key}' has the type {value.dtype}, expected floating-point numbers or integers."
            )
        if finite and value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(
                f"{path}: its '{key}' holds NaN or infinite values: the training had diverged; use an earlier file."
            )


def check_types(path: str | Path, state: dict[str, Any], **kinds: type) -> None:
    """Raise UserError for an entry that is missing or has another type."""
    for name, kind in kinds.items():
        require(path, name, isinstance(state.get(name), kind), f"a {kind.__name__}")


def check_classes(path: str | Path, state: dict[str, Any]) -> None:
    """Raise UserError unless 'classes' is a list of different names."""
    classes = state.get("classes")
    whole = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    require(path, "classes", whole, "a list of names")
    require(path, "classes", len(classes) <= MOST_CLASSES, f"a list of at most {MOST_CLASSES} names")
    require(path, "classes", len(set(classes)) == len(classes), "a list of different names")


def check_full_state(path: str | Path, state: dict[str, Any]) -> None:
    """Raise UserError for an entry of a full state that is missing, or that no run could have saved."""
    foreign = sorted(map(reprlib.repr, state.keys() - ENTRIES))
    if foreign:
        raise UserError(f"{path}: holds {foreign[0]}, which no run saves; this is not a checkpoint of this project.")
    check_types(path, state, seconds=float, best_f1=float, rng=list)
    check_types(path, state, args=dict, meters=dict, optimizers=dict, scaler=dict)
    if "image_files" in state:
        check_types(path, state, image_files=dict)
        digests = state["image_files"]
        whole = digests.keys() == {"train", "val"} and all(isinstance(digest, str) for digest in digests.values())
        require(path, "image_files", whole, "digests of train and val")
    check_classes(path, state)
    args = state["args"]
    averaged, fp16 = args.get("model_ema") is True, args.get("amp") is True and args.get("amp_dtype") == "fp16"
    counts = ["epoch", "step", "images", "train_images", "skipped_steps"] + ["model_ema_updates"] * averaged
    for name in counts:
        require(path, name, is_count(state.get(name)), "a whole number of at least 0")
    require(path, "epoch", state["epoch"] <= MOST_EPOCHS, f"at most {MOST_EPOCHS}")
    require(path, "images", state["images"] <= state["train_images"], "a position in the training split")
    fits = state["step"] <= state["images"] and (state["step"] > 0) == (state["images"] > 0)
    require(path, "step", fits, "a number of steps that fits its images")
    require(path, "seconds", 0 <= state["seconds"] < math.inf, "a number of at least 0")
    require(path, "best_f1", -1 <= state["best_f1"] <= 1, "a macro F1")
    masks = args.get("mask_policy", "none") != "none"
    networks = {"model": True, "policy_net": masks, "objective": "objective" in args, "model_ema": averaged}
    for name, needed in networks.items():
        if needed or name in state:
            check_types(path, state, **{name: dict})
            check_state_dict(path, state[name], finite=name != "objective")  # a baseline is NaN before its first step
    _check_meters(path, state["meters"], METERS.get(state["script"], set()) | (POLICY_METERS if masks else set()))
    _check_optimizers(path, state["optimizers"])
    _check_scaler(path, state["scaler"], fp16)
    restores = len(state["rng"]) > 0 and all(map(_restores_generators, state["rng"]))
    require(path, "rng", restores, "a list of torch's generator states")


def fitting_optimizer_state(source: str, name: str, optimizer: Optimizer, saved: Any) -> dict[str, Any]:
    """A saved state for this optimiser's `load_state_dict`, with the optimiser's current options.

    Raises UserError unless the tensors have the shapes of their parameters: the fused kernels do not check, and would
    write beyond a smaller tensor.
    """
    current = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    has_momentum = optimizer.defaults.get("momentum", 0) > 0
    buffers = BUFFERS[type(optimizer)] | ({"momentum_buffer"} if has_momentum else set())
    numbers = set(range(len(parameters)))
    needed = numbers if isinstance(optimizer, SGD) and has_momentum else set()  # its kernel takes all buffers or none
    fits = (
        saved is not None
        and [group["params"] for group in saved["param_groups"]]
        == [group["params"] for group in current["param_groups"]]
        and needed <= saved["state"].keys() <= numbers
        and all(_fits(buffered, parameters[number], buffers) for number, buffered in saved["state"].items())
    )
    if not fits:
        raise UserError(f"{source}: its {name} optimiser's state does not fit this run.")
    return {"state": saved["state"], "param_groups": current["param_groups"]}


def _fits(buffered: dict[str, Any], parameter: Tensor, buffers: set[str]) -> bool:
    """Whether these tensors, by buffer name, are an optimiser's state of this parameter."""
    return buffered.keys() == buffers and all(
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.shape == (() if key == "step" else parameter.shape)
        and (key != "step" or 0 <= value.item() < math.inf)
        for key, value in buffered.items()
    )


def _check_meters(path: str | Path, meters: dict[str, Any], expected: set[str]) -> None:
    """expected: the names of a run's means after its first step; before it there are none."""
    names, totals, count = meters.get("names"), meters.get("totals"), meters.get("count")
    whole = (
        meters.keys() == {"names", "totals", "count"}
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and is_count(count)
        and len(set(names)) == len(names)
        and set(names) == (expected if count else set())
        and isinstance(totals, Tensor)
        and totals.dtype == torch.float64
        and totals.ndim == 2  # (W, n)
        and len(totals) > 0
        and totals.shape[1] == len(names)
    )
    require(path, "meters", whole, "the sums of an epoch")


def _check_optimizers(path: str | Path, optimizers: dict[str, Any]) -> None:
    for name, optimizer in optimizers.items():
        whole = (
            name in ("classifier", "policy")
            and isinstance(optimizer, dict)
            and optimizer.keys() == {"state", "param_groups"}
            and isinstance(optimizer["state"], dict)
            and all(isinstance(buffered, dict) for buffered in optimizer["state"].values())
            and isinstance(optimizer["param_groups"], list)
            and all(
                isinstance(group, dict)
                and isinstance(group.get("params"), list)
                and all(map(is_count, group["params"]))
                for group in optimizer["param_groups"]
            )
        )
        require(path, "optimizers", whole, f"the state of an optimiser ({reprlib.repr(name)})")


def _check_scaler(path: str | Path, scaler: dict[str, Any], fp16: bool) -> None:
    like = torch.amp.GradScaler("cpu").state_dict() if fp16 else {}
    whole = scaler.keys() == like.keys() and all(
        type(value) is type(like[name]) and 0 <= value < (2**31 if type(value) is int else LARGEST_SCALE)
        for name, value in scaler.items()
    )
    require(path, "scaler", whole and scaler.get("scale", 1) > 0, "the state of a gradient scaler")


def _restores_generators(states: Any) -> bool:
    """Whether torch accepts these generator states of a rank, by device type."""
    if not isinstance(states, dict) or states.keys() not in ({"cpu"}, {"cpu", "cuda"}):
        return False
    if not all(isinstance(state, Tensor) and state.dtype == torch.uint8 for state in states.values()):
        return False
    devices = ("cpu", "cuda") if "cuda" in states and torch.cuda.is_available() else ("cpu",)
    try:
        for device in devices:
            torch.Generator(device).set_state(states[device])
    except (RuntimeError, TypeError):
        return False
    return True
