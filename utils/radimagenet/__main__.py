"""RadImageNet as it is handed out, made the folders to train on: `python -m utils.radimagenet prepare --help`."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.radimagenet.archive import Member, is_archive, read_archive
from utils.radimagenet.lists import ROOT, SPLITS, ImageLists, list_name
from utils.radimagenet.routes import KINDS, Masks, Tree, place_archive, place_folder
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.reading import open_regular
from utils.runtime.text import csv_table, list_names, print_line

DESCRIPTION = """\
Make OUTPUT/{train,val,test}/<class>/<image> of RadImageNet as it is handed out: radiology_ai/{CT,MR}/<anatomy>/<label>
and radiology_ai/US/<label>, with the lists RadiologyAI_{train,val,test}.csv. A class is named after its folders, such
as CT__abd__normal or US__liver. Killed and started again with the same arguments, it goes on; what is there and is not
what this run would make is never touched, but named. Counts go to OUTPUT/summary.csv, what the lists name and the
source lacks to OUTPUT/missing.csv, what they name more than once to OUTPUT/repeated.csv."""
TABLES = {  # by their names in OUTPUT: their heads
    "summary.csv": ("class", *SPLITS, "total"),
    "missing.csv": ("split", "filename"),
    "repeated.csv": ("filename", "lists"),
}
NAMES_SHOWN = 3  # in a warning


def prepare(
    output: Path,
    source: Path | None = None,
    archive: Path | None = None,
    *,
    csv_dir: Path | None = None,
    link: str = "symlink",
    correction_masks: Path | None = None,
    allow_missing: bool = False,
) -> None:
    """Make the tree of the folder `source` or of the tar file `archive`, and say what is in it.

    Raises UserError for bad input and, when all the rest is done, for images that are missing.
    """
    _check_output(output)
    if archive is not None:
        members = read_archive(archive, (".csv", *IMG_EXTENSIONS), "unpack")
        lists = _lists_for_archive(archive, members, csv_dir)
    else:
        source = _find_root(source)
        _check_outside(output, source)
        lists = _lists_for_folder(source, csv_dir)
    masks = None if correction_masks is None else Masks(correction_masks)
    if masks and masks.in_archive and archive is not None:
        raise UserError(f"{masks.path}: an archive of masks fits no archive of images; unpack one of the two.")
    _say_lists(lists)
    tree = Tree(output, lists)
    found = place_folder(tree, source, link, masks) if archive is None else place_archive(tree, members, masks)
    if masks:
        found = {name: {image for image in images if masks.has(name, image)} for name, images in found.items()}
    tree.check_all_made(found)
    if tree.passed_over.hidden:
        print_line(f"Hidden files or folders skipped in the source and in {output}: {tree.passed_over.hidden}.")
    _summarise(output, lists, found)
    what = "images that the lists name are missing" + (", or their masks" if masks else "")
    _report_missing(output, lists, found, what, allow_missing)


def _check_output(output: Path) -> None:
    """Raise UserError where OUTPUT is a file, or holds a table that this command would write over and has not made."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder to make, or to go on with.")
    for name, head in TABLES.items():
        path = output / name
        try:
            with open_regular(path) as file:
                ours = file.readline(100) == f"{','.join(head)}\n".encode()
        except FileNotFoundError:
            continue
        except OSError:  # a folder, or one that cannot be read
            ours = False
        if not ours:
            raise UserError(f"{path}: is there and was not made by this command; move it, or give another OUTPUT.")


def _find_root(source: Path) -> Path:
    """The folder that holds radiology_ai, which may be named itself."""
    for folder in (source, source.absolute().parent):
        if (folder / ROOT).is_dir() and (folder == source or source.name == ROOT):
            return folder
    raise UserError(f"{source}: holds no folder {ROOT}; give the folder that RadImageNet's archive was unpacked in.")


def _check_outside(output: Path, source: Path) -> None:
    inner, outer = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    if inner == outer or outer in inner.parents:
        raise UserError(f"{output}: is inside the source, {source}; give an OUTPUT outside of it.")


def _lists_for_folder(source: Path, csv_dir: Path | None) -> ImageLists:
    if csv_dir is None:
        places = [folder for folder in (source, source / ROOT) if (folder / list_name("train")).is_file()]
        csv_dir = places[0] if places else source
    return _read_lists(csv_dir)


def _read_lists(folder: Path) -> ImageLists:
    lists = ImageLists()
    for split in SPLITS:
        path = folder / list_name(split)
        try:
            with open_regular(path) as file:
                lists.read(split, file, path)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}); give the folder of RadImageNet's three lists as --csv-dir."
            ) from None
    return lists


def _lists_for_archive(archive: Path, members: Iterator[Member], csv_dir: Path | None) -> ImageLists:
    """The lists in --csv-dir, beside the archive, or in it, if they come before the images there."""
    beside = any((archive.parent / list_name(split)).is_file() for split in SPLITS)
    if csv_dir is not None or beside:
        return _read_lists(csv_dir or archive.parent)
    lists, wanted = ImageLists(), {list_name(split): split for split in SPLITS}
    for member in members:
        split = wanted.pop(os.path.basename(member.name), None)
        if split is not None:
            lists.read(split, io.BytesIO(member.data), f"{archive}: {member.name}")
        elif not member.name.endswith(".csv"):
            break
        if not wanted:
            return lists
    raise UserError(
        f"{archive}: has no {next(iter(wanted))} before its first image, nor beside it; put RadImageNet's three lists "
        "beside it (tar -xf can unpack them alone), or give their folder as --csv-dir."
    )


def _say_lists(lists: ImageLists) -> None:
    totals = {split: sum(len(names[split]) for names in lists.names.values()) for split in SPLITS}
    counts = ", ".join(f"{split} {total}" for split, total in totals.items())
    print_line(f"The lists name {len(lists)} images of {len(lists.folders)} classes: {counts}.")
    if lists.hidden:
        print_line(f"The lists name {lists.hidden} hidden files, which are skipped.")


def _summarise(output: Path, lists: ImageLists, found: dict[str, set[str]]) -> None:
    """Print and write the counts of all classes, and what is wrong with the lists."""
    rows = [
        (name, *(len(lists.names[name][split] & found[name]) for split in SPLITS)) for name in sorted(lists.folders)
    ]
    table = [(*row, sum(row[1:])) for row in rows]
    _write_table(output / "summary.csv", table)
    totals = [sum(column) for column in zip(*(row[1:] for row in table), strict=True)]
    width = max(len("class"), *(len(row[0]) for row in table))
    print_line("Images found:")
    for name, *numbers in [TABLES["summary.csv"], *table, ("all", *totals)]:
        print_line(f"{name:{width}}" + "".join(f"{number:>10}" for number in numbers))
    repeated = lists.repeated()
    _write_table(output / "repeated.csv", [(name, " ".join(of)) for name, of in repeated.items()])
    shared = sum(len(set(of)) > 1 for of in repeated.values())
    if shared:
        print_line(
            f"warning: {shared} images stand in several splits (repeated.csv): what is learned from is tested on."
        )
    if len(repeated) > shared:
        print_line(f"warning: {len(repeated) - shared} images are named more than once in one list (repeated.csv).")
    for where, lacking in (
        ("train or val, where training refuses the set", [name for name, *numbers in rows if not all(numbers[:2])]),
        ("test, whose metrics are over the others", [name for name, *_, in_test in rows if not in_test]),
    ):
        if lacking:
            print_line(f"warning: {len(lacking)} classes lack images in {where}: {list_names(lacking, NAMES_SHOWN)}.")


def _report_missing(
    output: Path, lists: ImageLists, found: dict[str, set[str]], what: str, allow_missing: bool
) -> None:
    """Write missing.csv; raises UserError if it is not empty, and may not be so; what: such images, in words."""
    missing = [
        (split, f"{lists.folders[name]}/{image}")
        for split in SPLITS
        for name in sorted(lists.folders)
        for image in sorted(lists.names[name][split] - found[name])
    ]
    path = output / "missing.csv"
    _write_table(path, missing)
    if missing and not allow_missing:
        raise UserError(
            f"{path}: {len(missing)} {what}, of {len(lists)}; get them and run this again, or --allow-missing."
        )
    print_line(f"{output}: {len(lists) - len(missing)} images; {len(missing)} missing.")


def _write_table(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write one of TABLES whole or not at all; file names that are no text keep their bytes."""
    text = csv_table([TABLES[path.name], *rows])
    write_atomically(path, text.encode("utf-8", "surrogateescape"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m utils.radimagenet")
    command = parser.add_subparsers(required=True, metavar="prepare").add_parser(
        "prepare",
        description=DESCRIPTION,
        help="make OUTPUT/{train,val,test}/<class>/<image>",
    )
    command.add_argument("output", type=expanded_path, metavar="OUTPUT", help="folder to make, or to go on with")
    origin = command.add_mutually_exclusive_group(required=True)
    origin.add_argument("--source", type=expanded_path, metavar="FOLDER", help=f"holds {ROOT}, with the images")
    origin.add_argument(
        "--archive", type=expanded_path, metavar="FILE", help=f"holds {ROOT}: .tar or .tar.gz, read in one pass"
    )
    command.add_argument(
        "--csv-dir",
        type=expanded_path,
        metavar="FOLDER",
        help="holds the three lists (default: --source or its radiology_ai; beside --archive, or first in it)",
    )
    command.add_argument(
        "--link",
        choices=list(KINDS),
        help="how --source's images are put in OUTPUT: relative links (the default) need it where it is, seen from "
        "OUTPUT; hard links need one file system; --archive's are always written",
    )
    command.add_argument(
        "--correction-masks",
        type=expanded_path,
        metavar="PATH",
        help="the published ultrasound corrections, <image>.npy in a folder or (with --source) in a .tar.gz: added to "
        "the images at 224 x 224 pixels, which are then written, not linked; an image without a mask counts as missing",
    )
    command.add_argument("--allow-missing", action="store_true", help="exit with 0 although images are missing")
    options = parser.parse_args(argv)
    if options.archive is not None and options.link is not None:
        raise UserError("--link: is for --source; the images of an --archive are always written.")
    if options.archive is not None and not is_archive(options.archive):
        raise UserError(f"{options.archive}: no such archive; expected a file named .tar, .tar.gz or .tgz.")
    prepare(
        options.output,
        options.source,
        options.archive,
        csv_dir=options.csv_dir,
        link=options.link or "symlink",
        correction_masks=options.correction_masks,
        allow_missing=options.allow_missing,
    )


if __name__ == "__main__":
    run_script(main)
