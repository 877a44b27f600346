"""Checks a set of images: duplicates, leaks between splits, blank and unreadable images, uneven classes.

`python -m utils.audit DATA` writes audit/report.txt, report.html, images.csv and duplicates.csv. DATA holds
{train,val,test}/<class>/<image>, or is a single split, <class>/<image>. --exclude-list writes a list of images for
--exclude of the training; the list begins with its rule.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from utils.arguments import check_command_line, check_limits
from utils.audit.flags import audit_parser
from utils.runtime.processes import run_script

if __name__ == "__main__":
    check_command_line(audit_parser(__doc__))  # --help and misspelt flags need none of the imports below

import numpy as np

from utils.audit import outputs
from utils.audit.duplicates import RECALL
from utils.audit.findings import findings
from utils.audit.groups import group_findings, group_section, read_groups
from utils.audit.images import measure_all
from utils.audit.report import as_text, sections
from utils.audit.rule import take_census
from utils.choices import SPLITS
from utils.data.folders import LAYOUT, ImageFiles, find_classes
from utils.runtime.errors import UserError
from utils.runtime.files import check_absent, make_folder, make_parent, write_atomically
from utils.runtime.text import print_line

LEAST_CORRELATION = 0.8  # below, most pairs are different images, and the search is slow


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raises UserError for bad input and for existing output."""
    options = audit_parser(__doc__).parse_args(argv)
    check_limits(vars(options))
    if not LEAST_CORRELATION <= options.correlation <= 1:
        raise UserError(f"--correlation {options.correlation:g}: expected a number from {LEAST_CORRELATION:g} to 1.")
    root, output = Path(os.path.abspath(options.data)), Path(os.path.abspath(options.output))
    list_path = Path(os.path.abspath(options.exclude_list)) if options.exclude_list else None
    files = open_files(root)
    groups = None if options.groups is None else read_groups(options.groups, options.group_column, files)
    _check_output(root, output, list_path, files, options.overwrite)
    measured = [measure_all(split, options.workers, options.upper_8_bits) for split in files]
    records = np.concatenate([split.records for split in measured])
    errors = [error for split in measured for error in split.errors]
    census = take_census(files, records, errors, options.blank, None if options.exact else options.correlation)
    search = "Copies are images with identical decoded pixels (--exact)."
    if not options.exact:
        search = (
            "Copies are images with identical decoded pixels, or near copies, whose gradients at low resolution "
            f"correlate by at least {options.correlation:g} (--correlation); blank images are not compared."
        )
    heading = f"{root}: {len(census.records)} images in {len(census.classes)} classes"
    content = sections(census, search if options.exact else f"{search} {RECALL}")
    if groups is not None:
        content.append(group_section(groups))
    listed = findings(census, [] if groups is None else group_findings(groups))
    text = as_text(heading, listed, content)
    write_atomically(output / "report.txt", text.encode())
    write_atomically(output / "report.html", outputs.page(heading, listed, content, census, options.upper_8_bits))
    write_atomically(output / "images.csv", outputs.images_csv(census))
    write_atomically(output / "duplicates.csv", outputs.duplicates_csv(census))
    print(text)
    print_line(f"{output}: report.txt, report.html, images.csv and duplicates.csv")
    if list_path is not None:
        write_atomically(list_path, outputs.exclude_list(census, search))
        unlisted = len(census.unlisted())
        listed = np.count_nonzero(census.reason) - unlisted
        print_line(f"{list_path}: leaves out {listed} of {len(census.records)} images")
        if unlisted:
            print_line(
                f"warning: {unlisted} more should be left out, but their names contain a line break; rename them."
            )


def open_files(root: Path) -> list[ImageFiles]:
    """The splits train, val and test of a folder, or the folder itself as the only split."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected {LAYOUT}.")
    splits = [root / name for name in SPLITS if (root / name).is_dir()] or [root]
    # As in training, only test may have a class folder without images.
    return [ImageFiles.find(split, classes=find_classes(split) if split.name == "test" else None) for split in splits]


def _check_output(root: Path, output: Path, list_path: Path | None, files: list[ImageFiles], overwrite: bool) -> None:
    """Create the output folder; raises UserError for existing output, or output that would be taken for images."""
    if output.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{output}: is inside the image folder {root}; give another --output.")
    if output.is_dir() and any(output.iterdir()):
        check_absent(output, overwrite)
    if list_path is not None:
        if files[0].root == root and root.name not in SPLITS:
            raise UserError(f"--exclude-list: {root} has no folder {', '.join(SPLITS)} for the training to read.")
        check_absent(list_path, overwrite and not list_path.is_dir(), "--exclude-list")
        make_parent(list_path, "--exclude-list")
    make_folder(output)


if __name__ == "__main__":
    run_script(main)
