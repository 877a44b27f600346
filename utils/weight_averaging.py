"""Average the weights of several files: `python -m utils.weight_averaging A.pth B.pth C.pth -o OUT.pth`."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.checkpoint import FORMAT_VERSION, StateDict, Weights, read_weights, save
from utils.errors import UserError, run_script
from utils.text import CommandParser, print_line


def average(files: list[Weights]) -> StateDict:
    """The mean of each floating-point tensor, summed in float64; integer buffers are the last file's, as integers.

    The released code averages the integers too, and makes floats of them. Raises UserError if the files do not match.
    """
    first, last = files[0], files[-1]
    for other in files[1:]:
        differing = [key for key in first.model if key not in other.model] + [
            key
            for key, value in other.model.items()
            if key not in first.model or (first.model[key].shape, first.model[key].dtype) != (value.shape, value.dtype)
        ]
        if differing:
            raise UserError(f"{other.path}: does not fit {first.path}: {differing[0]} differs; average one model only.")
        if other.classes != first.classes:
            raise UserError(f"{other.path}: was trained on other classes than {first.path}; average one run only.")
    averaged = {}
    for key, value in last.model.items():
        if value.is_floating_point():
            value = torch.stack([weights.model[key].double() for weights in files]).mean(0).to(value.dtype)
        averaged[key] = value
    return averaged


def _check_different(paths: list[str]) -> None:
    """Raise UserError for a file that is given twice, under another name too, and would count twice."""
    seen = set()
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise UserError(f"{path}: is given twice; give each file once.")
        seen.add(real)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="python -m utils.weight_averaging", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="weights of one model, usually of its last epochs")
    parser.add_argument("-o", "--output", required=True, help="where to write; --finetune and --test-only read it")
    parser.add_argument("--overwrite", action="store_true", help="write over a file that is there already")
    options = parser.parse_args(argv)
    output = Path(options.output)
    if output.exists() and not options.overwrite:
        raise UserError(f"{output}: is there already; give another --output, or --overwrite.")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent}: no such folder.")
    _check_different(options.files)
    files = [read_weights(path) for path in options.files]
    last = files[-1]
    state = {"model": average(files), "args": last.args}
    if last.classes is not None:  # which the authors' files do not name
        state |= {"format_version": FORMAT_VERSION, "classes": last.classes}
    save(output, state)
    print_line(f"{output}: the average of {len(files)} files")


if __name__ == "__main__":
    run_script(main)
