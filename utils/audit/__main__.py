"""What is wrong with a set of images: duplicates and leaks, blank and unreadable ones, uneven classes.

`python -m utils.audit DATA` writes audit/report.txt, report.html, images.csv and duplicates.csv; DATA holds
{train,val,test}/<class>/<image>, or is one split, <class>/<image>. --exclude-list names what training is to leave out;
its rule stands in its head.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.arguments import check_limits
from utils.audit import outputs
from utils.audit.images import Measured, measure_all
from utils.audit.report import as_text, sections
from utils.audit.rule import Census, take_census
from utils.data.folders import LAYOUT, SPLITS, ImageFiles, find_classes
from utils.flags import natural, non_negative_float
from utils.runtime.command_line import Parser, expanded
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.text import print_line

BITS = 242  # of an image's two difference hashes
# Of 5,981 real radiology images 79 pairs are that near: each looks like one view, or like neighbouring
# slices. Brought to 32 x 32, 2 of them correlate below 0.95; with 4 bits 4 of 100 do, with 8 bits 19 of 232. Of 200
# images 98 % are found again as JPEG of quality 90, 94 % at half the size, 88 % a tenth brighter.
DISTANCE = 3


def main(argv: Sequence[str] | None = None) -> None:
    """The command; raises UserError for bad input and for output that is there already."""
    options = _parser().parse_args(argv)
    check_limits(vars(options))
    if options.distance > BITS:
        raise UserError(f"--distance {options.distance}: expected at most {BITS}, which is how many bits are compared.")
    root, output = Path(os.path.abspath(options.data)), Path(os.path.abspath(options.output))
    excluded = Path(os.path.abspath(options.exclude_list)) if options.exclude_list else None
    files = _open(root)
    _check_output(root, output, excluded, files, options.overwrite)
    measured = [measure_all(split, options.workers, options.upper_8_bits) for split in files]
    census = take_census(
        files, *_joined(measured), blank_below=options.blank, distance=None if options.exact else options.distance
    )
    searched = _searched(options)
    heading = f"{root}: {len(census.records)} images in {len(census.classes)} classes"
    content = sections(census, searched)
    text = as_text(heading, content)
    for name, data in (
        ("report.txt", text.encode()),
        ("report.html", outputs.page(heading, content, census, options.upper_8_bits)),
        ("images.csv", outputs.images_csv(census)),
        ("duplicates.csv", outputs.duplicates_csv(census)),
    ):
        write_atomically(output / name, data)
    if excluded is not None:
        write_atomically(excluded, outputs.exclude_list(census, searched))
    print(text)
    _say_written(census, output, excluded)


def _parser() -> Parser:
    parser = Parser(__doc__, prog="python -m utils.audit", show_defaults=True)
    add = parser.add_argument
    add(
        "data",
        type=expanded,
        metavar="DATA",
        help="folder with {train,val,test}/<class>/<image>, or with <class>/<image>",
    )
    add(
        "-o",
        "--output",
        type=expanded,
        default="audit",
        metavar="FOLDER",
        help="where the reports and tables are written",
    )
    add("--overwrite", action="store_true", help="write over reports and lists that are there already")
    add("--exclude-list", type=expanded, metavar="FILE", help="also write which images to leave out, for --exclude of "
        "the training")  # fmt: skip
    add("--distance", type=natural, default=DISTANCE, help="bits of the 242 of two difference hashes in which near "
        "copies may differ; more find more, and more that are none. The report's groups are chains of such steps, the "
        "list goes by direct copies only, and by near ones only across splits")  # fmt: skip
    add("--exact", action="store_true", help="only images of the very same pixels are duplicates")
    add("--blank", type=non_negative_float, default=2.0, metavar="LEVELS", help="an image is blank whose standard "
        "deviation, of levels 0 to 255, is below this in every channel")  # fmt: skip
    add("--upper-8-bits", action="store_true", help="of PNG and TIFF images of 12 or 16 bits a channel, keep the "
        "upper 8 bits, as the training's flag does; without it they are unreadable")  # fmt: skip
    add("-j", "--workers", type=natural, default=os.cpu_count(), help="processes that decode; 0: none beside this one")
    return parser


def _open(root: Path) -> list[ImageFiles]:
    """The splits of a folder: those named train, val and test, or it is one itself."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected {LAYOUT}.")
    splits = [root / name for name in SPLITS if (root / name).is_dir()]
    # As in the training, only test may hold a class folder without images.
    return [
        ImageFiles.find(split, classes=find_classes(split) if split.name == "test" else None)
        for split in splits or [root]
    ]


def _check_output(root: Path, output: Path, excluded: Path | None, files: list[ImageFiles], overwrite: bool) -> None:
    """Raise UserError for output that stands already or would be taken for images; make the folder."""
    if output.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{output}: lies within the images' folder {root}; give another --output.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UserError(f"{output}: already exists; give another --output, or --overwrite.")
    if excluded is not None:
        if files[0].root == root and root.name not in SPLITS:
            raise UserError(f"--exclude-list: {root} has no folder {', '.join(SPLITS)}, which the training would read.")
        if excluded.is_dir() or (excluded.exists() and not overwrite):
            raise UserError(f"{excluded}: already exists; give another --exclude-list, or --overwrite.")
        if not excluded.parent.is_dir() and excluded.parent != output:
            raise UserError(f"{excluded.parent}: no such folder.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be made ({error.strerror}); give another --output.") from None
    for folder in (output, excluded.parent if excluded else output):  # rather than after hours of decoding
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder}: cannot be written to; give another folder.")


def _joined(measured: list[Measured]) -> tuple[np.ndarray, dict[int, str]]:
    """Records and bad images of all splits, by position among all."""
    bad, first = {}, 0
    for records, bad_of_split in measured:
        bad |= {first + index: reason for index, reason in bad_of_split.items()}
        first += len(records)
    return np.concatenate([records for records, _ in measured]), bad


def _searched(options: argparse.Namespace) -> str:
    if options.exact:
        return "Copies are images of the same decoded pixels (--exact)."
    return (
        "Copies are images of the same decoded pixels, and those whose difference hashes of 242 bits differ in at most "
        f"{options.distance} (--distance); blank images are not compared."
    )


def _say_written(census: Census, output: Path, excluded: Path | None) -> None:
    print_line(f"{output}: report.txt, report.html, images.csv and duplicates.csv")
    if excluded is not None:
        unlisted = len(census.unlisted())
        listed = np.count_nonzero(census.reason) - unlisted
        print_line(f"{excluded}: leaves out {listed} of {len(census.records)} images")
        if unlisted:
            print_line(f"warning: {unlisted} more would be left out, but their names hold a line break; rename them.")


if __name__ == "__main__":
    run_script(main)
