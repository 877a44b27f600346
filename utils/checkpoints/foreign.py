"""Weight files of other code: which of their state dicts and arguments are used."""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.runtime.errors import UserError
from utils.runtime.text import printable

# Where files keep their weights, the first one present is used: timm's load_checkpoint has this order; then DINO's.
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
    """The name of the state dict to use, and whether it is a moving average.

    use_ema: whether to take a moving average; None for the default, an average if the file holds one. The name is None
    if the file is a state dict itself or holds none. The second value is None if the file holds no average.
    Raises UserError if several state dicts could be meant, and if the requested one is missing.
    """
    containers = _containers(state)
    averages = [name for name in containers if name.endswith("_ema")]
    if averages and len(averages) < len(containers):
        use_ema = use_ema is not False
        return next(name for name in containers if (name in averages) == use_ema), use_ema
    if averages:
        if use_ema is False:
            raise UserError(f"--no-use-ema: {path} holds a moving average only; leave the flag out.")
        return containers[0], True
    if use_ema:
        raise UserError(f"--use-ema: {path} holds no moving average; leave the flag out.")
    if containers or "format_version" in state:  # files of this project use no other name
        return containers[0] if containers else None, None
    names = [name for name, value in state.items() if isinstance(name, str) and is_state_dict(value)]
    if len(names) > 1:
        raise UserError(
            f"{path}: holds several state dicts ({printable(', '.join(names[:4]))}); save the one to use on its own."
        )
    return names[0] if names else None, None


def _containers(state: dict[str, Any]) -> list[str]:
    """The names of the containers that are not empty."""
    return [name for name in CONTAINERS if isinstance(state.get(name), dict) and state[name]]


def describe_choice(path: str | Path, state: dict[str, Any], container: str | None) -> list[str]:
    """A sentence on the state dict that is used, if the file holds several or an unusual one."""
    unused = [name for name in _containers(state) if name != container]
    if container is None or (container == "model" and not unused):
        return []
    average = ", a moving average" if container.endswith("_ema") else ""
    if average and any(not name.endswith("_ema") for name in unused):
        average += " (--no-use-ema takes the trained weights)"
    without = f"; not used: {', '.join(unused)}" if unused else ""
    return [f"{path}: the weights are its '{printable(container)}'{average}{without}."]


def arguments_of(state: dict[str, Any], container: str | None) -> dict[str, Any]:
    """The training's arguments that are used. None next to a bare state dict.

    Next to 'model' they are torchvision's or the authors', whose flags mean the same as here. Next to other names they
    may mean something else (timm's `--mean` and `--interpolation`), so only the model's name is used.
    """
    args = state.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    if container in ("model", "model_ema"):
        return args
    names = (state.get("arch"), args.get("model"), args.get("arch"))
    return next(({"model": name} for name in names if isinstance(name, str)), {})
