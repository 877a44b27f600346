"""Prepares RadImageNet for training: `python -m utils.radimagenet prepare --help`."""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from utils.choices import SPLITS
from utils.data.listing import IMAGE_ENDINGS
from utils.data.placing import KINDS, Tree
from utils.data.prepared import print_table
from utils.radimagenet.archive import Member, is_archive, read_archive
from utils.radimagenet.lists import ROOT, ImageLists, list_name
from utils.radimagenet.routes import Masks, place_archive, place_folder
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError
from utils.runtime.files import write_atomically
from utils.runtime.processes import run_script
from utils.runtime.reading import open_regular
from utils.runtime.text import csv_table, list_names, print_line

DESCRIPTION = """\
Make OUTPUT/{train,val,test}/<class>/<image> from RadImageNet as distributed: radiology_ai/{CT,MR}/<anatomy>/<label> and
radiology_ai/US/<label>, with the lists RadiologyAI_{train,val,test}.csv. Classes are named after their folders, such as
CT__abd__normal or US__liver. After a kill, the same command resumes. Existing files that this run would not make are
reported, never changed. Counts go to OUTPUT/summary.csv, listed images without a source to OUTPUT/missing.csv, images
listed more than once to OUTPUT/repeated.csv."""
TABLES = {  # columns by file name in OUTPUT
    "summary.csv": ("class", *SPLITS, "total"),
    "missing.csv": ("split", "filename"),
    "repeated.csv": ("filename", "lists"),
}


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
    """Make the tree and print its counts; source: the folder with radiology_ai, or radiology_ai; archive: a tar file.

    Raises UserError for bad input and, after everything else is done, for missing images.
    """
    _check_output(output)
    if archive is not None:
        members = read_archive(archive, (".csv", *IMAGE_ENDINGS), "unpack")
        lists = _lists_for_archive(archive, members, csv_dir)
    else:
        if source.name == ROOT and not (source / ROOT).is_dir():
            source = source.absolute().parent
        if not (source / ROOT).is_dir():
            raise UserError(f"{source}: holds no folder {ROOT}; give the folder with RadImageNet's unpacked archive.")
        if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source)):
            raise UserError(f"{output}: is inside the source, {source}; give an OUTPUT outside of it.")
        if csv_dir is None:
            with_lists = [folder for folder in (source, source / ROOT) if (folder / list_name("train")).is_file()]
            csv_dir = with_lists[0] if with_lists else source
        lists = _read_lists(csv_dir)
    masks = None if correction_masks is None else Masks(correction_masks)
    if masks and masks.in_archive and archive is not None:
        raise UserError(f"{masks.path}: images and masks cannot both be in archives; unpack one of the two.")
    totals = {split: sum(len(names[split]) for names in lists.names.values()) for split in SPLITS}
    counts = ", ".join(f"{split} {total}" for split, total in totals.items())
    print_line(f"The lists name {len(lists)} images of {len(lists.folders)} classes: {counts}.")
    if lists.hidden:
        print_line(f"The lists name {lists.hidden} hidden files, which are skipped.")
    tree = Tree(output, lists.names, "the lists")
    if archive is None:
        available = place_folder(tree, lists, source, link, masks)
    else:
        available = place_archive(tree, lists, members, masks)
    if masks:
        available = {
            name: {image for image in images if masks.allow(name, image)} for name, images in available.items()
        }
    tree.check_sources(available, "source or mask")
    if tree.passed_over.hidden:
        print_line(f"Hidden files or folders skipped in the source and in {output}: {tree.passed_over.hidden}.")
    _summarise(output, lists, available)
    kind = "listed images, or their masks, are missing" if masks else "listed images are missing"
    _report_missing(output, lists, available, kind, allow_missing)


def _check_output(output: Path) -> None:
    """Raise UserError if OUTPUT is a file, or holds a table that this command would replace and has not made."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give a new folder, or one to resume.")
    for name, columns in TABLES.items():
        path = output / name
        try:
            with open_regular(path) as file:
                ours = file.readline(100) == f"{','.join(columns)}\n".encode()
        except FileNotFoundError:
            continue
        except OSError:  # a folder, or an unreadable file
            ours = False
        if not ours:
            raise UserError(f"{path}: exists and was not made by this command; move it, or give another OUTPUT.")


def _read_lists(folder: Path) -> ImageLists:
    lists = ImageLists()
    for split in SPLITS:
        path = folder / list_name(split)
        try:
            with open_regular(path) as file:
                lists.read(split, file, path)
        except OSError as error:
            raise UserError(
                f"{path}: unreadable ({error.strerror}); give the folder of RadImageNet's three lists as --csv-dir."
            ) from None
    return lists


def _lists_for_archive(archive: Path, members: Iterator[Member], csv_dir: Path | None) -> ImageLists:
    """The lists in --csv-dir, next to the archive, or in the archive before its first image."""
    if csv_dir is not None or any((archive.parent / list_name(split)).is_file() for split in SPLITS):
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
        f"{archive}: has no {next(iter(wanted))} before its first image or next to it; put RadImageNet's three lists "
        "next to it (tar -xf can unpack them alone), or give their folder as --csv-dir."
    )


def _summarise(output: Path, lists: ImageLists, available: dict[str, set[str]]) -> None:
    """Print and write the counts of all classes, and warn of repeated images and empty classes."""
    table = []
    for name in sorted(lists.folders):
        counts = [len(lists.names[name][split] & available[name]) for split in SPLITS]
        table.append((name, *counts, sum(counts)))
    _write_table(output / "summary.csv", table)
    totals = [sum(row[column] for row in table) for column in range(1, len(SPLITS) + 2)]
    print_line("Images available:")
    print_table(TABLES["summary.csv"], [*table, ("all", *totals)])
    repeated = lists.repeated()
    _write_table(output / "repeated.csv", [(name, " ".join(splits)) for name, splits in repeated.items()])
    shared = sum(len(set(splits)) > 1 for splits in repeated.values())
    if shared:
        print_line(f"warning: {shared} images are in several splits (repeated.csv): training data leaks into the test.")
    if len(repeated) > shared:
        print_line(f"warning: {len(repeated) - shared} images are more than once in one list (repeated.csv).")
    for place, lacking in (
        ("train or val; training refuses the set", [name for name, train, val, *_ in table if not (train and val)]),
        ("test; its metrics are over the others", [name for name, _, _, test, _ in table if not test]),
    ):
        if lacking:
            print_line(f"warning: {len(lacking)} classes lack images in {place}: {list_names(lacking, shown=3)}.")


def _report_missing(
    output: Path, lists: ImageLists, available: dict[str, set[str]], kind: str, allow_missing: bool
) -> None:
    """Write missing.csv; raises UserError if it is not empty, unless allowed; kind: words for such images."""
    missing = [
        (split, f"{lists.folders[name]}/{image}")
        for split in SPLITS
        for name in sorted(lists.folders)
        for image in sorted(lists.names[name][split] - available[name])
    ]
    path = output / "missing.csv"
    _write_table(path, missing)
    if missing and not allow_missing:
        advice = "add them and run this again, or give --allow-missing"
        if len(missing) == len(lists):
            advice = f"give the --source or --archive that holds {missing[0][1]}"
        raise UserError(f"{path}: {len(missing)} of {len(lists)} {kind}; {advice}.")
    print_line(f"{output}: {len(lists) - len(missing)} images; {len(missing)} missing.")


def _write_table(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write one of TABLES atomically; file names that are not text keep their bytes."""
    text = csv_table([TABLES[path.name], *rows])
    write_atomically(path, text.encode(errors="surrogateescape"))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError for bad input and for missing images."""
    parser = Parser(__doc__, prog="python -m utils.radimagenet")
    command = parser.add_subparsers(required=True, metavar="prepare").add_parser(
        "prepare", description=DESCRIPTION, help="make OUTPUT/{train,val,test}/<class>/<image>"
    )
    add = command.add_argument
    add("output", type=expanded_path, metavar="OUTPUT", help="new folder, or one to resume")
    origin = command.add_mutually_exclusive_group(required=True)
    origin.add_argument("--source", type=expanded_path, metavar="FOLDER", help=f"folder with {ROOT} and its images")
    origin.add_argument("--archive", type=expanded_path, metavar="FILE", help=f"archive with {ROOT}: .tar or .tar.gz, "
                        "read in one pass")  # fmt: skip
    add("--csv-dir", type=expanded_path, metavar="FOLDER", help="folder of the three lists (default: --source or its "
        "radiology_ai; next to --archive, or in it before the images)")  # fmt: skip
    add("--link", choices=list(KINDS), help="how to put the images of --source in OUTPUT: relative links (default), "
        "for which the source must stay in place, relative to OUTPUT; hard links, on one file system; or copies. "
        "Images of --archive are always written")  # fmt: skip
    add("--correction-masks", type=expanded_path, metavar="PATH", help="the published ultrasound corrections, "
        "<image>.npy in a folder or (with --source) in a .tar.gz: added to the images at 224 x 224 pixels, which are "
        "written instead of linked; an image without a mask counts as missing")  # fmt: skip
    add("--allow-missing", action="store_true", help="exit with 0 although images are missing")
    options = parser.parse_args(argv)
    if options.archive is not None and options.link is not None:
        raise UserError("--link: applies to --source only; the images of an --archive are always written.")
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
