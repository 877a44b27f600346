"""Average the weights of several files: `python -m utils.weight_averaging A.pth B.pth C.pth -o OUT.pth`."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from utils import arguments
from utils.checkpoints import verify as verification
from utils.checkpoints.checkpoint import FORMAT_VERSION, StateDict, Weights, read_weights, save
from utils.flags import Switch
from utils.runtime.command_line import Parser, expanded
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.runtime.text import print_line, printable

LAST = 3  # epochs that the published recipe averages
EPOCH = re.compile(r"model_\d+\.pth")
MISSING = object()  # an argument that this file does not say: it is older than the flag, or of other code


def average(files: list[Weights]) -> StateDict:
    """The mean of each floating-point tensor, summed in float64; integer buffers are the last file's, as integers.

    The released code averages the integers too, and makes floats of them. The files must pass `_check_fit`.
    """
    averaged = {}
    for key, value in files[-1].model.items():
        if value.is_floating_point():
            value = torch.stack([weights.model[key].double() for weights in files]).mean(0).to(value.dtype)
        averaged[key] = value
    return averaged


def _check_fit(files: list[Weights]) -> None:
    """Raise UserError for files of other tensors or classes than the first one."""
    first = files[0]
    for other in files[1:]:
        differing = [key for key in first.model if key not in other.model] + [
            key
            for key, value in other.model.items()
            if key not in first.model or (first.model[key].shape, first.model[key].dtype) != (value.shape, value.dtype)
        ]
        if differing:
            raise UserError(f"{other.path}: does not fit {first.path}: {differing[0]} differs; average one model only.")
        if (other.averaged is None) != (first.averaged is None):
            raise UserError(
                f"{other.path}: only one of this and {first.path} holds a moving average; average one run only."
            )
        if other.classes != first.classes:
            raise UserError(f"{other.path}: was trained on other classes than {first.path}; average one run only.")


def _check_one_run(files: list[Weights]) -> None:
    """Raise UserError for full states among weights, for equal weights in two files, and for flags that differ."""
    full_states = [weights.path for weights in files if weights.full_state]
    full_states = full_states if len(full_states) < len(files) else []
    rest = [weights for weights in files if weights.path not in full_states]
    repeated = _repeated(rest)
    if full_states or repeated:
        problems = [f"{path} is the state of a run that goes on, not the weights of an epoch" for path in full_states]
        problems += [f"{path} holds the same weights as {other}" for path, other in repeated.items()]
        left = sorted((weights.path for weights in rest if weights.path not in repeated), key=_natural)
        raise UserError(
            f"{'; '.join(map(printable, problems))}. Give the last epochs' weights only: "
            f"{printable(' '.join(left[-LAST:]))}"
        )
    first = files[0]
    for other in files[1:]:
        if _is_heated(first) != _is_heated(other):
            heated, plain = (first, other) if _is_heated(first) else (other, first)
            raise UserError(
                f"{heated.path}: was trained with masks, and {plain.path} without; average the files of one run only."
            )
        for name in arguments.MODEL_FLAGS:
            values = [weights.args.get(name, MISSING) for weights in (first, other)]
            if MISSING not in values and values[0] != values[1]:
                ours, theirs = (arguments.typed(name, value) for value in values)
                raise UserError(
                    printable(
                        f"{other.path}: was made with {theirs}, and {first.path} with {ours}; average the files of one "
                        "run only."
                    )
                )


def _repeated(files: list[Weights]) -> dict[str, str]:
    """The path of each file whose weights another one holds too, with the other's; model_<epoch>.pth is kept."""
    by_content: dict[bytes, Weights] = {}
    repeated = {}
    for weights in sorted(files, key=lambda weights: EPOCH.fullmatch(Path(weights.path).name) is None):
        kept = by_content.setdefault(_digest(weights), weights)
        if kept is not weights:
            repeated[weights.path] = kept.path
    return repeated


def _digest(weights: Weights) -> bytes:
    digest = hashlib.sha256(repr(weights.classes).encode())
    for key in sorted(weights.model):
        tensor = weights.model[key].contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode(errors="surrogateescape"))
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.digest()


def _is_heated(weights: Weights) -> bool:
    return weights.args.get("grid") is not None and weights.args.get("mask_policy", "learned") != "none"


def _natural(path: str) -> list[tuple[int, str]]:
    """A key that sorts model_9.pth before model_10.pth."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path)]


def _check_different(paths: list[str]) -> None:
    """Raise UserError for a file that is given twice, under another name too, and would count twice."""
    seen = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise UserError(f"{path}: is given twice; give each file once.")
        seen.add(real)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m utils.weight_averaging")
    parser.add_argument(
        "files", nargs="+", type=expanded, metavar="FILE", help="weights of one model, usually of its last epochs"
    )
    parser.add_argument(
        "-o", "--output", type=expanded, required=True, help="where to write; --finetune and --test-only read it"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over a file that is there already")
    parser.add_argument("--use-ema", action=Switch, help="of files with a moving average: "
        "average those (the default), or the trained weights")  # fmt: skip
    options = parser.parse_args(argv)
    output = Path(options.output)
    if output.exists() and not options.overwrite:
        raise UserError(f"{output}: already exists; give another --output, or --overwrite.")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent}: no such folder.")
    _check_different(options.files)
    files = [read_weights(path, options.use_ema) for path in options.files]
    for weights in files:
        verification.check_state_dict(weights.path, weights.model)
        for note in weights.notes:
            print_line(note)
    _check_fit(files)
    _check_one_run(files)
    last = files[-1]
    state = {"model": average(files), "args": last.args}
    if last.classes is not None:  # which the authors' files do not name
        state |= {"format_version": FORMAT_VERSION, "classes": last.classes}
    save(output, state)
    print_line(f"{output}: the average of {len(files)} files")


if __name__ == "__main__":
    run_script(main)
