"""Predict the classes of images, with probabilities: `python -m utils.predict WEIGHTS IMAGE_OR_FOLDER...`.

Images are prepared as in `--test-only`, so the probabilities are the same. Rows are written as they are computed. An
unreadable image is named on stderr, and the exit code is then 2 (see --bad-images).
"""

import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from utils.arguments import check_command_line
from utils.inference.flags import predict_parser
from utils.runtime.processes import run_script

if __name__ == "__main__":
    check_command_line(predict_parser(), prints_result=True)  # --help and misspelt flags need none of the imports below

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import arguments
from utils.checkpoints.checkpoint import HEATED
from utils.data.dataset import ImageFolder, batches, build_loader
from utils.data.folders import ImageFiles
from utils.data.listing import PassedOver, find_images
from utils.data.samplers import EvaluationSampler
from utils.data.splits import transform_for_evaluation
from utils.inference.classifier import Classifier, open_classifier, print_to_stderr
from utils.runtime.distributed import resolve_device
from utils.runtime.errors import UserError
from utils.runtime.files import check_absent, make_parent, opened_atomically
from utils.runtime.node_limits import shared_memory_problem
from utils.runtime.text import csv_table, printable
from utils.training import build
from utils.training.evaluation import logits_of_batches

TABLE_TOP = 3
Row = tuple[str, list[str], list[float]]  # path of an image, most likely classes first, their probabilities


def find_all(names: list[str]) -> list[str]:
    """The given files, and all images below the given folders except hidden ones; prints what it skips to stderr.

    Raises UserError for a missing file or folder, and for a folder without images.
    """
    paths: list[str] = []
    passed_over = PassedOver()
    for name in names:
        if not os.path.exists(name):
            raise UserError(f"{name}: no such file or folder; expected an image, or a folder of images.")
        inside = PassedOver()
        images = find_images(Path(name), inside) if os.path.isdir(name) else [name]
        if not images:
            content = inside.describe()
            raise UserError(f"{name}: no image in this folder or below it{f' ({content})' if content else ''}.")
        paths += images
        passed_over.add(inside)
    if content := passed_over.describe():
        print_to_stderr(f"{len(paths)} images; {content}")
    return paths


def build_image_loader(
    classifier: Classifier, paths: list[str], batch_size: int, workers: int, stop_at_bad: bool, device: torch.device
) -> DataLoader:
    """A loader of the images as in evaluation, in the order of `paths`; its targets have no meaning."""
    dataset = ImageFolder(
        ".",
        transform_for_evaluation(classifier.args),
        on_bad_image="error" if stop_at_bad else "blank",
        gray=classifier.args.gray,
        upper_8_bits=classifier.args.upper_8_bits,
        files=ImageFiles(Path(), {"": paths}),
    )
    sampler = EvaluationSampler(len(paths), batch_size)
    workers = min(workers, len(sampler) - 1)
    batch_bytes = batch_size * (1 if classifier.args.gray else 3) * classifier.args.val_crop_size**2
    problem = shared_memory_problem(batch_bytes, len(sampler), workers, processes=1)
    if problem is not None:
        raise UserError(problem)
    return build_loader(dataset, sampler, workers, pin_memory=device.type == "cuda")


def predict(
    classifier: Classifier, loader: DataLoader, device: torch.device, report: Callable[[str], None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch the indices of its readable images in the loader's order, (n,) int64, and logits (n, C) float32.

    report: called with a message for each unreadable image. Raises UserError at the first if the loader stops there.
    """
    normalize = build.normalize(classifier.args, device)
    for batch, logits in logits_of_batches(classifier.model, batches(loader, device), normalize, device):
        for message in batch.unreadable:
            report(message)
        is_readable = batch.indices >= 0
        yield batch.indices[is_readable], logits.cpu()[is_readable]


def predicted_rows(
    classifier: Classifier,
    loader: DataLoader,
    paths: list[str],
    top: int,
    device: torch.device,
    report: Callable[[str], None],
    show_bar: bool,
) -> Iterator[Row]:
    """A row for each readable image, with the `top` most likely classes. The bar is drawn on stderr."""
    seconds = 1 if sys.stderr.isatty() else 30  # between two updates of the bar; in a log each takes a line
    with tqdm(total=len(paths), unit=" images", disable=not show_bar, mininterval=seconds) as bar:
        for indices, logits in predict(classifier, loader, device, report):
            probabilities, order = logits.double().softmax(1).sort(dim=1, descending=True, stable=True)
            for index, ranking, values in zip(indices.tolist(), order.tolist(), probabilities.tolist(), strict=True):
                yield paths[index], [classifier.classes[place] for place in ranking[:top]], values[:top]
            bar.update(min(loader.batch_sampler.batch_size, len(paths) - bar.n))


def as_table(rows: Iterator[Row], classes: list[str], top: int, width: int) -> Iterator[str]:
    """Aligned columns, one printable line per image. width: of the longest path, in characters."""
    widest = max(len(printable(name)) for name in classes)
    for path, names, probabilities in rows:
        columns = [f"{printable(name):<{widest}} {p:.4f}" for name, p in zip(names, probabilities, strict=True)]
        yield f"{printable(path):<{width}}  {'  '.join(columns)}\n"


def as_csv(rows: Iterator[Row], classes: list[str], top: int, width: int) -> Iterator[str]:
    """image, prediction, probability; then one column per class, or with a smaller `top` two per further class."""
    all_classes = top == len(classes)
    further = [f"{column}_{rank}" for rank in range(2, top + 1) for column in ("prediction", "probability")]
    yield csv_table([["image", "prediction", "probability", *(classes if all_classes else further)]])
    for path, names, probabilities in rows:
        ranking = {name: f"{value:.6g}" for name, value in zip(names, probabilities, strict=True)}
        first, *others = ranking.items()
        cells = [ranking[name] for name in classes] if all_classes else [cell for pair in others for cell in pair]
        yield csv_table([[path, *first, *cells]])


def as_json(rows: Iterator[Row], classes: list[str], top: int, width: int) -> Iterator[str]:
    """One object per line; `probabilities` starts with the most likely class."""
    for path, names, probabilities in rows:
        by_name = dict(zip(names, probabilities, strict=True))
        row = {"image": path, "prediction": names[0], "probability": probabilities[0], "probabilities": by_name}
        yield json.dumps(row) + "\n"


FORMATS = {"table": as_table, "csv": as_csv, "json": as_json}


def is_file(stream: TextIO) -> bool:
    """Whether the stream goes to a file other than that of stderr. A pipe may end in the terminal, next to stderr."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        status = os.fstat(stream.fileno())
        return stat.S_ISREG(status.st_mode) and not os.path.samestat(status, os.fstat(sys.stderr.fileno()))
    return False


def write_lines(lines: Iterator[str], output: Path | None) -> None:
    """Write to the file, completely or not at all, or to stdout line by line; a closed pipe (head) ends the command."""
    if output is not None:
        with opened_atomically(output) as file:
            file.writelines(lines)
        return
    for line in lines:
        with _needed_stdout():
            sys.stdout.write(f"{printable(line[:-1])}\n" if sys.stdout.isatty() else line)
    with _needed_stdout():
        sys.stdout.flush()


@contextmanager
def _needed_stdout() -> Iterator[None]:
    """End the command if the block cannot write to stdout, without a message if it is a closed pipe."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it closes stdout
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        raise UserError(f"stdout: cannot be written ({error.strerror}); free space, or give --output FILE.") from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = predict_parser()
    given = arguments.parse_given(parser, argv)
    options: dict[str, Any] = arguments.defaults(parser) | given
    output = None if options["output"] is None else Path(options["output"])
    if output is not None:
        check_absent(output, options["overwrite"])
        make_parent(output)
    elif sys.stdout is None:
        raise UserError("stdout is closed: open it, or give --output FILE.")
    device = resolve_device(options["device"])
    paths = find_all(options["images"])
    classifier = open_classifier(given, device)
    if classifier.is_heated:
        print_to_stderr(f"{options['file']}: {HEATED}")
    stop_at_bad = options["bad_images"] == "error"
    loader = build_image_loader(classifier, paths, options["batch_size"], options["workers"], stop_at_bad, device)
    unreadable: list[str] = []

    def report(message: str) -> None:
        unreadable.append(message)
        print_to_stderr(message)

    classes = classifier.classes
    top = min(options["top"] or (TABLE_TOP if options["format"] == "table" else len(classes)), len(classes))
    show_bar = output is not None or is_file(sys.stdout)
    rows = predicted_rows(classifier, loader, paths, top, device, report, show_bar)
    width = max(len(printable(path)) for path in paths)
    write_lines(FORMATS[options["format"]](rows, classes, top, width), output)
    if unreadable and options["bad_images"] == "report":
        rest = len(paths) - len(unreadable)
        others = f"the other {rest} are predicted" if rest else "none is predicted"
        raise UserError(f"{len(unreadable)} of {len(paths)} images cannot be read, see above; {others}.")


if __name__ == "__main__":
    run_script(main, prints_result=True)
