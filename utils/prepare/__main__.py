"""Makes class folders of the images that a table lists: `python -m utils.prepare TABLE DATA`.

TABLE is a CSV or TSV file with a row for each image: a column with its path and one with its label. DATA becomes
DATA/{train,val,test}/<class>/<image>, split by a column (--split), or at random by --val, --test and --seed: stratified
by class, and with --group never splitting a patient over two splits. --folds makes folders for cross-validation. Images
become links; with --window, 16-bit images and DICOM files become 8-bit PNG. DATA/images.csv lists what went where,
DATA/prepare.json how it was made. After a kill, the same command resumes. Existing files are never changed.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from utils.data.placing import KINDS
from utils.data.prepared import (
    IMAGES,
    IMAGES_HEAD,
    MISSING,
    MISSING_HEAD,
    RECORD,
    begin,
    check_output,
    class_folders,
    finish,
    print_counts,
    warn_of_lacking_classes,
    write_table,
)
from utils.data.tables import IMAGE_COLUMNS, Table
from utils.flags import fraction, natural, positive_fraction
from utils.prepare.pixels import DICOM, EIGHT_BITS, MORE_BITS, check_pydicom
from utils.prepare.placing import Placement
from utils.prepare.plan import SEED, TEST, VAL, divide_records, make_plan
from utils.prepare.records import LABEL_COLUMNS, name_files, read_records
from utils.results.git import commit_of
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.processes import run_script
from utils.runtime.text import count, list_names, print_line


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError for bad input and, after everything else is done, for missing images."""
    options = _parser().parse_args(argv)
    window = _window(options.window)
    plan = make_plan(options.split, options.val, options.test, options.seed, options.folds)
    table = Table(options.table)
    columns = _columns(table, options.image, options.label, options.group, options.split)
    print_line(f"{table.path}: " + "; ".join(f"{meaning}: column {name!r}" for meaning, name in columns.items()))
    root = os.path.abspath(options.root or table.path.parent)
    if not os.path.isdir(root):
        raise UserError(f"--root {root}: no such folder; give the folder that the paths of the images start from.")
    settings = {
        "table_sha256": table.sha256,
        "columns": columns,
        "suffix": options.suffix,
        "split": plan,
        "window": list(window) if isinstance(window, tuple) else window,
        "link": options.link,
    }
    resumed = check_output(options.output, settings)
    records, repeated = read_records(table, columns, root, options.suffix)
    repetitions = f"; {count(repeated, 'repeated row')}" if repeated else ""
    print_line(f"{count(len(records), 'image')}{repetitions}.")
    folders = class_folders(record.label for record in records)
    _warn_of_lost_letters(table, folders)
    for record in records:
        record.label = folders[record.label]
    parts, part = divide_records(records, plan, sorted(folders.values()), "group" in columns)
    placement = Placement(records, options.link, window if isinstance(window, tuple) else None)
    placement.inspect()
    _check_kinds(placement, window)
    name_files(records)
    begin(options.output, settings)
    destinations = _destinations(options.output, parts, part, options.folds)
    if options.folds:
        placement.convert_for_folds(options.output)
    for folder, splits in destinations.items():
        placement.place(folder, splits)
    for folder, splits in destinations.items():
        write_table(folder / IMAGES, IMAGES_HEAD, _rows(placement, splits))
    available = placement.available()
    members = {name: [records[n] for n in available if part[n] == p] for p, name in enumerate(parts)}
    counts = {name: Counter(record.label for record in inside) for name, inside in members.items()}
    groups = {name: len({record.group for record in inside}) for name, inside in members.items()}
    print_counts(counts, sorted(folders.values()), groups if "group" in columns else None)
    warn_of_lacking_classes(counts, folders.values())
    missing = [(parts[part[n]], records[n].image, reason) for n, reason in sorted(placement.reasons.items())]
    write_table(options.output / MISSING, MISSING_HEAD, missing)
    result = {
        "table": os.path.abspath(table.path),
        "root": root,
        "images": len(available),
        "repeated_rows": repeated,
        "missing": len(missing),
        "converted": len(placement.windows),
        "classes": {folder: label for label, folder in folders.items()},
        "counts": counts,
        **({"groups": groups} if "group" in columns else {}),
        "versions": {name: version(name) for name in ("numpy", "pillow", "scikit-learn")},
        "commit": commit_of(Path(__file__)),
    }
    finish(options.output, settings, result)
    if missing and not options.allow_missing:
        raise UserError(
            f"{options.output / MISSING}: {len(missing)} of {count(len(records), 'image')} are missing or unusable "
            f"({missing[0][2].rstrip('.')}); correct this and run the command again, or give --allow-missing."
        )
    if resumed and not placement.made:
        print_line(f"{options.output}: was complete; nothing was left to do.")
    else:
        print_line(f"{options.output}: {count(len(available), 'image')}; {len(missing)} missing; see {RECORD}.")


def _warn_of_lost_letters(table: Table, labels: Iterable[str]) -> None:
    """Print a warning if labels hold bytes that are not UTF-8."""
    if damaged := [label for label in labels if any("\udc80" <= letter <= "\udcff" for letter in label)]:
        print_line(
            f"warning: {table.path}: is not UTF-8, so {count(len(damaged), 'label')} lost letters: "
            f"{list_names(damaged)}; save it as UTF-8, in Excel as CSV UTF-8, and prepare a new folder."
        )


def _columns(
    table: Table, image: str | None, label: str | None, group: str | None, split: str | None
) -> dict[str, str]:
    """The column of each meaning; those of image and label are guessed if they are not given."""
    columns = {
        "image": table.column(image, "--image", IMAGE_COLUMNS, "the path of an image"),
        "label": table.column(label, "--label", LABEL_COLUMNS, "the label"),
    }
    for meaning, given in (("group", group), ("split", split)):
        if given is not None:
            columns[meaning] = table.column(given, f"--{meaning}", (), "")
    return columns


def _parser() -> Parser:
    parser = Parser(__doc__, prog="python -m utils.prepare")
    add = parser.add_argument
    add("table", type=expanded_path, metavar="TABLE", help="CSV or TSV file with a line of column names")
    add("output", type=expanded_path, metavar="DATA", help="new folder, or one to resume")
    add("--image", metavar="COLUMN", help="column with the paths (default: the only one named image, path, file, ...)")
    add("--label", metavar="COLUMN", help="column with the labels (default: the only one named label, class, ...)")
    add("--root", type=expanded_path, metavar="FOLDER", help="where relative paths start (default: folder of TABLE)")
    add("--suffix", default="", metavar="TEXT", help="put after each path, such as .jpg for tables without endings")
    add("--group", metavar="COLUMN", help="column with the patient, or another group that must stay in one split")
    add("--split", metavar="COLUMN", help="column with the split: train, val or test, also in usual other spellings")
    add("--val", type=positive_fraction, metavar="SHARE", help=f"share of val, above 0 (default: {VAL})")
    add("--test", type=fraction, metavar="SHARE", help=f"share of test; 0 for no test split (default: {TEST})")
    add("--seed", type=natural, help=f"seed of the random split (default: {SEED})")
    add("--folds", type=natural, metavar="K", help="make DATA/fold_0 to DATA/fold_<K-1>, each with train, val and the "
        "same test; val is another part in each")  # fmt: skip
    add("--window", nargs="+", metavar="LEVEL", help="LOW HIGH: these levels become black and white in 16-bit images, "
        "and in DICOM files after their rescaling (Hounsfield units); auto: the window of the DICOM file, else the "
        "0.5th and 99.5th percentile of each image. Images of 8 bits are linked unchanged. Write it after TABLE and "
        "DATA")  # fmt: skip
    add("--link", choices=list(KINDS), default="symlink", help="how to put 8-bit images in DATA: relative links "
        "(default), for which the source must stay in place, relative to DATA; hard links, on one file system; or "
        "copies")  # fmt: skip
    add("--allow-missing", action="store_true", help="exit with 0 although images are missing or cannot be used")
    return parser


def _window(words: list[str] | None) -> tuple[float, float] | str | None:
    if words is None or words == ["auto"]:
        return words and "auto"
    try:
        low, high = map(float, words)
        if -np.inf < low < high < np.inf:
            return low, high
    except ValueError:
        pass
    raise UserError(
        f"--window {' '.join(words)}: expected auto, or LOW HIGH with LOW below HIGH; write TABLE and DATA before it."
    )


def _check_kinds(placement: Placement, window: object) -> None:
    """Raise UserError for images that need --window or pydicom, or if there is no image at all."""
    records = placement.records
    if len(placement.reasons) == len(records):
        advice = "Give the folder that the paths start from as --root, and the ending that they lack as --suffix."
        if "\\" in records[0].image:
            advice = "Write the paths with / instead of \\, and without a drive such as C:."
        raise UserError(f"none of the images can be used; the first: {placement.reasons[0].rstrip('.')}. {advice}")
    kinds = Counter(record.kind for record in records)
    examples = {record.kind: record.path for record in reversed(records)}
    if window is None:
        for kind, noun in ((MORE_BITS, "image of more than 8 bits"), (DICOM, "DICOM file")):
            if kinds[kind]:
                files = f"{kinds[kind]:,} images of more than 8 bits" if kind == MORE_BITS else count(kinds[kind], noun)
                raise UserError(
                    f"{examples[kind]}: {files} need a window of levels to become 8-bit images; give "
                    "--window LOW HIGH, or --window auto."
                )
    if kinds[DICOM]:
        check_pydicom()
    if window is not None and kinds[EIGHT_BITS]:
        print_line(f"--window: {count(kinds[EIGHT_BITS], 'image')} of 8 bits already, linked unchanged.")


def _destinations(output: Path, parts: list[str], part: np.ndarray, folds: int | None) -> dict[Path, list[str]]:
    """The folders with {train,val,test} to make, and the split of each image in each."""
    if not folds:
        return {output: [parts[p] for p in part]}
    destinations = {}
    for fold in range(folds):
        names = ["test" if name == "test" else "val" if k == fold else "train" for k, name in enumerate(parts)]
        destinations[output / parts[fold]] = [names[p] for p in part]
    return destinations


def _rows(placement: Placement, splits: Sequence[str]) -> list[tuple[object, ...]]:
    rows = []
    for number in placement.available():
        record, split = placement.records[number], splits[number]
        window = placement.windows.get(number) or ("", "", "")
        rows.append((f"{split}/{record.label}/{record.name}", split, record.label, record.path, record.group, *window))
    return sorted(rows)


if __name__ == "__main__":
    run_script(main)
