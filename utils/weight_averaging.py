"""Average the weights of several files: `python -m utils.weight_averaging A.pth B.pth C.pth -o OUT.pth`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from utils.arguments import check_command_line
from utils.inference.flags import averaging_parser
from utils.runtime.processes import run_script

if __name__ == "__main__":
    check_command_line(averaging_parser(__doc__))  # --help and misspelt flags need none of the imports below

import torch

from utils import arguments
from utils.checkpoints.checkpoint import FORMAT_VERSION, StateDict, Weights, read_weights, save
from utils.checkpoints.verify import check_state_dict
from utils.runtime.errors import UserError
from utils.runtime.files import check_absent, make_parent
from utils.runtime.text import print_line, printable

LAST = 3  # epochs that the published recipe averages
EPOCH = re.compile(r"model_\d+\.pth")


def average(files: list[Weights]) -> StateDict:
    """The mean of each floating-point tensor, summed in float64; integer buffers are the last file's, as integers.

    The released code averages integers too, and turns them into floats. The files must pass `_check_fit`.
    """
    averaged = {}
    for key, value in files[-1].model.items():
        if value.is_floating_point():
            value = torch.stack([weights.model[key].double() for weights in files]).mean(0).to(value.dtype)
        averaged[key] = value
    return averaged


def _check_fit(files: list[Weights]) -> None:
    """Raise UserError for a file whose tensors or classes differ from the first one's."""
    first = files[0]
    for weights in files[1:]:
        missing = [key for key in first.model if key not in weights.model]
        differing = [
            key
            for key, value in weights.model.items()
            if key not in first.model or (first.model[key].shape, first.model[key].dtype) != (value.shape, value.dtype)
        ]
        if missing or differing:
            key = (missing + differing)[0]
            raise UserError(f"{weights.path}: does not fit {first.path}: {key} differs; average one model only.")
        if (weights.averaged is None) != (first.averaged is None):
            raise UserError(
                f"{weights.path}: only one of this and {first.path} has a moving average; average one run only."
            )
        if weights.classes != first.classes:
            raise UserError(f"{weights.path}: was trained on other classes than {first.path}; average one run only.")


def _check_epochs(files: list[Weights]) -> None:
    """Raise UserError for full states among weights, and for equal weights in two files; lists the usable files."""
    full_states = [weights.path for weights in files if weights.full_state]
    if len(full_states) == len(files):  # they may be averaged with each other
        full_states = []
    epochs = [weights for weights in files if weights.path not in full_states]
    repeated = _repeated(epochs)
    problems = [f"{path} is the full state of a run, not the weights of an epoch" for path in full_states]
    problems += [f"{path} holds the same weights as {kept}" for path, kept in repeated.items()]
    if problems:
        usable = [weights.path for weights in epochs if weights.path not in repeated]
        usable.sort(key=lambda path: (len(path), path))  # model_9.pth before model_10.pth
        message = f"{'; '.join(problems)}. Give the weights of the last epochs only: {' '.join(usable[-LAST:])}"
        raise UserError(printable(message))


def _check_one_run(files: list[Weights]) -> None:
    """Raise UserError for files that were trained with different flags of the model."""
    first = files[0]
    for weights in files[1:]:
        if first.is_heated != weights.is_heated:
            heated, plain = (first, weights) if first.is_heated else (weights, first)
            raise UserError(
                f"{heated.path}: was trained with masks, and {plain.path} without; average the files of one run only."
            )
        for name in arguments.MODEL_FLAGS:  # a file of older or other code may not record all of them
            if name in first.args and name in weights.args and first.args[name] != weights.args[name]:
                value, first_value = (arguments.typed(name, args[name]) for args in (weights.args, first.args))
                message = f"{weights.path}: was made with {value}, and {first.path} with {first_value}"
                raise UserError(printable(f"{message}; average the files of one run only."))


def _repeated(files: list[Weights]) -> dict[str, str]:
    """The files with the same weights as another one, by path, with the path of the one to keep: model_<epoch>.pth."""
    kept: list[Weights] = []
    repeated = {}
    for weights in sorted(files, key=lambda weights: EPOCH.fullmatch(Path(weights.path).name) is None):
        same = next((earlier for earlier in kept if _equal(earlier.model, weights.model)), None)
        if same is None:
            kept.append(weights)
        else:
            repeated[weights.path] = same.path
    return repeated


def _equal(first: StateDict, second: StateDict) -> bool:
    return all(torch.equal(value, second[key]) for key, value in first.items())


def main(argv: Sequence[str] | None = None) -> None:
    options = averaging_parser(__doc__).parse_args(argv)
    output = Path(options.output)
    check_absent(output, options.overwrite)
    make_parent(output)
    targets = [os.path.realpath(path) for path in options.files]
    for number, path in enumerate(options.files):
        if targets[number] in targets[:number]:  # also under another name
            raise UserError(f"{path}: is given twice; give each file once.")
    files = [read_weights(path, options.use_ema) for path in options.files]
    for weights in files:
        check_state_dict(weights.path, weights.model)
        for note in weights.notes:
            print_line(note)
    _check_fit(files)
    _check_epochs(files)
    _check_one_run(files)
    last = files[-1]
    state = {"model": average(files), "args": last.args}
    if last.classes is not None:  # the authors' files do not name them
        state |= {"format_version": FORMAT_VERSION, "classes": last.classes}
    save(output, state)
    print_line(f"{output}: the average of {len(files)} files")


if __name__ == "__main__":
    run_script(main)
