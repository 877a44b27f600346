"""What is used of weight files that other code wrote: which of their state dicts, and which of their arguments."""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.runtime.errors import UserError
from utils.runtime.text import printable

# Where files keep their weights: the first that is there, in the order of timm's own load_checkpoint, then DINO's.
CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student")


def is_state_dict(value: Any) -> bool:
    """Whether this is a dictionary of tensors by name, and not empty."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def choose_container(
    path: str | Path, state: dict[str, Any], use_ema: bool | None = None
) -> tuple[str | None, bool | None]:
    """The name of the state dict to use, None if the file is one itself or holds none; and whether it is an average.

    use_ema: whether to take a moving average; None: if there is one. The second value is None where there is none.
    Raises UserError where several could be meant, and where what is asked for is not in the file.
    """
    named = _containers(state)
    averages = [name for name in named if name.endswith("_ema")]
    if averages and len(averages) < len(named):
        use_ema = use_ema is not False
        return next(name for name in named if (name in averages) == use_ema), use_ema
    if averages:
        if use_ema is False:
            raise UserError(f"--no-use-ema: {path} holds a moving average only; leave the flag out.")
        return named[0], True
    if use_ema:
        raise UserError(f"--use-ema: {path} holds no moving average; leave the flag out.")
    if named or "format_version" in state:  # a file of this project has no other name for it
        return named[0] if named else None, None
    others = [name for name, value in state.items() if isinstance(name, str) and is_state_dict(value)]
    if len(others) > 1:
        raise UserError(
            f"{path}: holds several state dicts ({printable(', '.join(others[:4]))}); save the one to use on its own."
        )
    return others[0] if others else None, None


def _containers(state: dict[str, Any]) -> list[str]:
    """The names of the containers that are not empty."""
    return [name for name in CONTAINERS if isinstance(state.get(name), dict) and state[name]]


def describe_choice(path: str | Path, state: dict[str, Any], container: str) -> list[str]:
    """A sentence on the state dict that is used, where a file has several or an unusual one."""
    others = [name for name in _containers(state) if name != container]
    if container == "model" and not others:
        return []
    average = ", a moving average" if container.endswith("_ema") else ""
    if average and any(not name.endswith("_ema") for name in others):
        average += " (--no-use-ema takes the trained weights)"
    without = f"; not used: {', '.join(others)}" if others else ""
    return [f"{path}: the weights are its '{printable(container)}'{average}{without}."]


def arguments_of(state: dict[str, Any], container: str) -> dict[str, Any]:
    """The arguments of the training that are used.

    Next to 'model' they are torchvision's and the authors', whose flags mean what those here mean. Next to other names
    (timm's `--mean` and `--interpolation`, say) they may mean something else: only the model's name is used.
    """
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    if container in ("model", "model_ema"):
        return args
    names = (state.get("arch"), args.get("model"), args.get("arch"))
    return next(({"model": name} for name in names if isinstance(name, str)), {})
