"""Classes of images, with probabilities: `python -m utils.predict WEIGHTS IMAGE_OR_FOLDER...`.

The images go the way they go in `--test-only`, so the probabilities are the same. Rows are written as they come. An
image that cannot be read is named on stderr, and the exit code is then 2 (see --bad-images).
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils import arguments
from utils.data import splits as wiring_data
from utils.data.dataset import ImageFolder, batches, build_loader
from utils.data.folders import ImageFiles
from utils.data.listing import PassedOver, find_images
from utils.data.samplers import EvaluationSampler
from utils.flags import natural, positive_int
from utils.inference.classifier import Classifier, add_weights_flags, is_heated, open_classifier
from utils.runtime.command_line import expanded
from utils.runtime.distributed import resolve_device
from utils.runtime.errors import UserError
from utils.runtime.files import opened_atomically
from utils.runtime.node_limits import shared_memory_problem
from utils.runtime.processes import run_script
from utils.runtime.text import as_cell, as_line, csv_line, printable
from utils.training import build as wiring
from utils.training.evaluation import logits_of_batches

TABLE_TOP = 3
Row = tuple[str, list[str], list[float]]  # an image's path, the classes from likely to unlikely, their probabilities


def build_parser() -> arguments.Parser:
    parser = arguments.Parser(
        "Classes of images, with probabilities.", prog="python -m utils.predict", show_defaults=True
    )
    add_weights_flags(parser)
    add = parser.add_argument
    add(
        "images",
        type=expanded,
        metavar="IMAGE_OR_FOLDER",
        nargs="+",
        help="of a folder all images below it, sorted by path",
    )
    add("--format", default="table", choices=FORMATS, help="table: to read; csv: a column for each class; json: one "
        "object a line")  # fmt: skip
    add("--top", type=positive_int, metavar="K", help="only the K likeliest classes; None: 3 in a table, else all")
    add("-o", "--output", type=expanded, metavar="FILE", help="where to write, whole or not at all; None: stdout")
    add("--overwrite", action="store_true", help="write over a file that is there already")
    add("-b", "--batch-size", type=positive_int, default=32, help="images at a time")
    add("-j", "--workers", type=natural, default=min(16, os.cpu_count() or 1), help="processes that read images")
    add("--device", help="cuda or cpu; None: cuda where there is one")
    add("--bad-images", default="report", choices=("report", "skip", "error"), help="unreadable images: named on "
        "stderr, the others predicted, and exit code 2; the same and exit code 0; or stop at the first")  # fmt: skip
    return parser


def find_all(names: list[str]) -> list[str]:
    """The files as they are, of folders all images below without hidden ones; says on stderr what is passed over.

    Raises UserError for what is not there or holds no image.
    """
    paths: list[str] = []
    passed_over = PassedOver()
    for name in names:
        if not os.path.exists(name):
            raise UserError(f"{name}: no such file or folder; expected an image, or a folder of images.")
        inside = PassedOver()
        found = find_images(Path(name), inside) if os.path.isdir(name) else [name]
        if not found:
            content = inside.describe()
            raise UserError(f"{name}: no image in this folder or below it{f' ({content})' if content else ''}.")
        paths += found
        passed_over.add(inside)
    if content := passed_over.describe():
        _say(f"{len(paths)} images; {content}")
    return paths


def build_image_loader(
    classifier: Classifier, paths: list[str], batch_size: int, workers: int, stop_at_bad: bool, device: torch.device
) -> DataLoader:
    """The images as in evaluation, in the order of `paths`; their targets mean nothing."""
    dataset = ImageFolder(
        ".",
        wiring_data.transform_for_evaluation(classifier.args),
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
    """Of each batch the places of its readable images in the loader's order, (n,) int64, and logits (n, C) float32.

    report: is told of each image that cannot be read. Raises UserError at the first where the loader skips none.
    """
    normalize = wiring.normalize(classifier.args, device)
    for batch, logits in logits_of_batches(classifier.model, batches(loader, device), normalize, device):
        for message in batch.bad:
            report(message)
        readable = batch.indices >= 0
        yield batch.indices[readable], logits.cpu()[readable]


def ranked(path: str, logits: Tensor, classes: list[str], top: int) -> Row:
    """logits: (C,) float32; the softmax is taken in float64."""
    probabilities, order = logits.double().softmax(0).sort(descending=True, stable=True)
    return path, [classes[place] for place in order[:top].tolist()], probabilities[:top].tolist()


def as_table(rows: Iterator[Row], classes: list[str], top: int, width: int) -> Iterator[str]:
    """Aligned columns, a line an image whatever its name holds; width: of the longest path, printable."""
    widest = max(len(printable(name)) for name in classes)
    for path, names, probabilities in rows:
        columns = (f"{printable(name):<{widest}} {p:.4f}" for name, p in zip(names, probabilities, strict=True))
        yield f"{printable(path):<{width}}  {'  '.join(columns)}\n"


def as_csv(rows: Iterator[Row], classes: list[str], top: int, width: int) -> Iterator[str]:
    """image, prediction, probability; then a column for each class, or with a `top` below all pairs of columns."""
    if top == len(classes):
        more = classes
    else:
        more = [f"{name}_{place}" for place in range(2, top + 1) for name in ("prediction", "probability")]
    yield csv_line(map(as_cell, ["image", "prediction", "probability", *more]))
    for path, names, probabilities in rows:
        texts = [f"{value:.6g}" for value in probabilities]
        if top == len(classes):
            by_name = dict(zip(names, texts, strict=True))
            more = [by_name[name] for name in classes]
        else:
            more = [text for pair in zip(names[1:], texts[1:], strict=True) for text in pair]
        yield csv_line(map(as_cell, [path, names[0], texts[0], *more]))


def as_json(rows: Iterator[Row], classes: list[str], top: int, width: int) -> Iterator[str]:
    """An object a line; `probabilities` from the likeliest class on."""
    for path, names, probabilities in rows:
        by_name = dict(zip(names, probabilities, strict=True))
        row = {"image": path, "prediction": names[0], "probability": probabilities[0], "probabilities": by_name}
        yield json.dumps(row) + "\n"


FORMATS = {"table": as_table, "csv": as_csv, "json": as_json}


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    given = arguments.parse_given(parser, argv)
    options: dict[str, Any] = arguments.defaults(parser) | given
    output = None if options["output"] is None else Path(options["output"])
    if output is not None and os.path.lexists(output) and not options["overwrite"]:
        raise UserError(f"{output}: already exists; give another --output, or --overwrite.")
    if output is None and sys.stdout is None:
        raise UserError("stdout is closed: open it, or give --output FILE.")
    try:
        device = resolve_device(options["device"])
    except ValueError as error:
        raise UserError(str(error)) from None
    paths = find_all(options["images"])
    classifier = open_classifier(given, device)
    if is_heated(classifier.args):
        _say(f"{options['file']}: a heated model, one to fine-tune; it is no classifier of clean images yet.")
    stop_at_bad = options["bad_images"] == "error"
    loader = build_image_loader(classifier, paths, options["batch_size"], options["workers"], stop_at_bad, device)
    bad: list[str] = []
    all_classes = len(classifier.classes)
    top = min(options["top"] or (TABLE_TOP if options["format"] == "table" else all_classes), all_classes)
    rows = predicted_rows(classifier, loader, paths, top, device, bad, show_bar=output or not sys.stdout.isatty())
    lines = FORMATS[options["format"]](rows, classifier.classes, top, max(len(printable(path)) for path in paths))
    write_lines(lines, output)
    if bad and options["bad_images"] == "report":
        rest = len(paths) - len(bad)
        others = f"the other {rest} are predicted" if rest else "none is predicted"
        raise UserError(f"{len(bad)} of {len(paths)} images cannot be read, see above; {others}.")


def predicted_rows(
    classifier: Classifier,
    loader: DataLoader,
    paths: list[str],
    top: int,
    device: torch.device,
    bad: list[str],
    show_bar: bool,
) -> Iterator[Row]:
    """A row for each readable image, and a bar on stderr; why an image cannot be read is said and added to `bad`."""

    def report(message: str) -> None:
        bad.append(message)
        _say(message)

    seldom = 1 if sys.stderr.isatty() else 30  # seconds between two lines of a log
    with tqdm(total=len(paths), unit=" images", disable=not show_bar, mininterval=seldom) as bar:
        for places, logits in predict(classifier, loader, device, report):
            for place, of_image in zip(places.tolist(), logits, strict=True):
                yield ranked(paths[place], of_image, classifier.classes, top)
            bar.update(min(loader.batch_sampler.batch_size, len(paths) - bar.n))


def write_lines(lines: Iterator[str], output: Path | None) -> None:
    """To the file, whole or not at all, or to stdout as they come; where a pipe is closed early (head), the end."""
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
    """End the command where its result cannot be written: at a closed pipe without a word."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it closes stdout
        if isinstance(error, BrokenPipeError):
            sys.exit(128 + signal.SIGPIPE)
        raise UserError(f"stdout: cannot be written ({error.strerror}); free space, or give --output FILE.") from None


def _say(message: str) -> None:
    """A line on stderr, without breaking the bar."""
    tqdm.write(as_line(message), file=sys.stderr)


if __name__ == "__main__":
    run_script(main, prints_result=True)
