"""Makes class folders of a MedMNIST file: `python -m utils.medmnist prepare FILE.npz DATA`."""

import io
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.choices import SPLITS
from utils.data.placing import Tree, in_threads, is_written, put_one, write
from utils.data.prepared import (
    IMAGES,
    IMAGES_HEAD,
    RECORD,
    begin,
    check_output,
    class_folders,
    finish,
    print_counts,
    warn_of_lacking_classes,
    write_table,
)
from utils.results.git import commit_of
from utils.runtime.command_line import Parser, expanded_path
from utils.runtime.errors import UserError, first_line
from utils.runtime.processes import run_script
from utils.runtime.reading import open_regular
from utils.runtime.text import count, list_names, print_line

DESCRIPTION = """\
Make DATA/{train,val,test}/<class>/<number>.png of a 2-D file of MedMNIST, such as pathmnist.npz or pathmnist_224.npz,
pixel for pixel. The number counts the images of a split as in the file. Classes get their names from the package
medmnist if it is installed and knows the file, else their numbers. After a kill, the same command resumes. Existing
files are never changed. DATA/images.csv lists the images, DATA/prepare.json how they were made."""
MOST_LABELS = 100_000_000  # in a split; a larger claim is a damaged file
MOST_BYTES = 2**26  # of an image


class Split:
    """A split of a file: shape of the images (N, H, W) or (N, H, W, 3), uint8; labels (N,) int64."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        """Raises UserError for arrays that are not one class per 2-D image."""
        self.archive, self.name = archive, name
        labels = _read_labels(archive, f"{name}_labels.npy")
        with archive.open(f"{name}_images.npy") as file:
            self.shape, dtype = _read_header(file, f"{name}_images")
        if dtype != np.uint8 or len(self.shape) not in (3, 4) or self.shape[3:] in ((1,), (2,), (4,)):
            raise UserError(
                f"{name}_images: {dtype} of the shape {self.shape}; expected uint8 of (N, H, W) or (N, H, W, 3)."
            )
        if len(self.shape) == 4 and self.shape[3] != 3:
            raise UserError(f"{name}_images: volumes, of the shape {self.shape}; only MedMNIST's 2-D sets work.")
        if labels.ndim == 2 and labels.shape[1] > 1:
            raise UserError(
                f"{name}_labels: {labels.shape[1]} labels for each image; only sets with one class per image work."
            )
        self.labels = labels.reshape(-1).astype(np.int64)
        if len(self.labels) != self.shape[0]:
            raise UserError(f"{name}: {self.shape[0]} images and {len(self.labels)} labels; download the file again.")
        if (self.labels < 0).any():
            raise UserError(f"{name}_labels: {self.labels.min()} is below 0; download the file again.")

    def images(self) -> Iterator[np.ndarray]:
        """The images in order, (H, W) or (H, W, 3), uint8, read one at a time."""
        size = int(np.prod(self.shape[1:]))
        with self.archive.open(f"{self.name}_images.npy") as file:
            _read_header(file, self.name)
            for _ in range(self.shape[0]):
                data = file.read(size)
                if len(data) < size:
                    raise UserError(f"{self.name}_images: truncated; download the file again.")
                yield np.frombuffer(data, np.uint8).reshape(self.shape[1:])
            file.read(1)  # up to the checksum


def _read_labels(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as file:
        shape, dtype = _read_header(file, member)
        if dtype.kind not in "iu" or len(shape) not in (1, 2) or np.prod(shape) > MOST_LABELS:
            raise UserError(f"{member}: {dtype} of the shape {shape}; expected whole numbers, one for each image.")
        size = int(np.prod(shape)) * dtype.itemsize
        data = file.read(size)
        if len(data) < size:
            raise UserError(f"{member}: truncated; download the file again.")
        file.read(1)  # up to the checksum
        return np.frombuffer(data, dtype).reshape(shape)


def _read_header(file: BinaryIO, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a .npy file, which is left at its data. Nothing is unpickled."""
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        shape, fortran_order, dtype = read[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError) as error:
        raise UserError(f"{name}: not a readable array ({first_line(error)}); download the file again.") from None
    if fortran_order or dtype.hasobject or any(length < 1 for length in shape) or np.prod(shape[1:]) > MOST_BYTES:
        raise UserError(f"{name}: an array of {dtype} of the shape {shape}; expected images or labels of MedMNIST.")
    return shape, dtype


def prepare(path: Path, output: Path, name: str | None = None) -> None:
    """Make the folders and print their counts; name: of the set in the package medmnist, else that of the file.

    Raises UserError for files that are damaged, of volumes, or of several labels for each image.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            _prepare(path, output, name, archive, os.fstat(file.fileno()).st_mtime)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: not a readable .npz file, or damaged ({reason}); download it again.") from None
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}.") from None


def _prepare(path: Path, output: Path, name: str | None, archive: zipfile.ZipFile, changed: float) -> None:
    members = {info.filename: info.CRC for info in archive.infolist()}
    missing = [f"{split}_{part}" for split in SPLITS for part in ("images", "labels")]
    if missing := [member for member in missing if f"{member}.npy" not in members]:
        raise UserError(f"{path}: lacks {list_names(missing, shown=6)}; expected a file of MedMNIST.")
    try:
        splits = {split: Split(archive, split) for split in SPLITS}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    numbers = sorted({int(label) for split in splits.values() for label in np.unique(split.labels)})
    names, origin = _class_names(name or path.stem.split("_")[0], numbers, named=name is not None)
    print_line(f"{path}: {count(len(numbers), 'class')}; {origin}.")
    settings = {"file_crc32": members, "classes": {str(number): label for number, label in names.items()}}
    resumed = check_output(output, settings)
    folders = class_folders(names.values())
    folder_of = {number: folders[label] for number, label in names.items()}
    begin(output, settings)
    files: dict[str, dict[str, set[str]]] = {folder: {split: set() for split in SPLITS} for folder in folders.values()}
    for split, content in splits.items():
        for index, label in enumerate(content.labels.tolist()):
            files[folder_of[label]][split].add(_file_name(index))
    tree = Tree(output, files, str(path))
    made = sum(_place(path, tree, split, folder_of, changed) for split in splits.values())
    rows = (
        (f"{split}/{folder_of[label]}/{_file_name(index)}", split, folder_of[label], f"{split}_images[{index}]")
        for split, content in splits.items()
        for index, label in enumerate(content.labels.tolist())
    )
    write_table(output / IMAGES, IMAGES_HEAD, ((*row, "", "", "", "") for row in sorted(rows)))
    counts = {
        split: Counter(folder_of[label] for label in content.labels.tolist()) for split, content in splits.items()
    }
    print_counts(counts, list(folder_of.values()))
    warn_of_lacking_classes(counts, folder_of.values())
    total = sum(len(content.labels) for content in splits.values())
    result = {"file": os.path.abspath(path), "images": total, "counts": counts, "commit": commit_of(Path(__file__))}
    finish(output, settings, result)
    if resumed and not made:
        print_line(f"{output}: was complete; nothing was left to do.")
    else:
        print_line(f"{output}: {count(total, 'image')}; see {RECORD}.")


def _class_names(name: str, numbers: Sequence[int], named: bool) -> tuple[dict[int, str], str]:
    """The name of each class, and a sentence part that says where the names come from; named: whether by --name.

    Raises UserError for a --name that the package does not know, or that has other classes.
    """
    width = len(str(max(numbers)))
    padded = {number: f"{number:0{width}}" for number in numbers}  # so that they sort like numbers
    known: dict[str, Any] | None = None
    try:
        from medmnist import INFO

        known = INFO.get(name)
    except ImportError:
        if named:
            raise UserError(f"--name {name}: needs the package medmnist; pip install medmnist.") from None
        return padded, "named by number, because the package medmnist is not installed"
    if known is None:
        if named:
            raise UserError(f"--name {name}: unknown to the package medmnist; it knows {list_names(list(INFO), 20)}.")
        return padded, f"named by number, because the package medmnist knows no set {name!r} (--name gives another)"
    labels = {int(number): str(label) for number, label in known["label"].items()}
    if unknown := [number for number in numbers if number not in labels]:
        raise UserError(
            f"{name}: the package medmnist has no name for its class {unknown[0]}; give the --name of the set."
        )
    return {number: labels[number] for number in numbers}, f"named as {name} in the package medmnist"


def _file_name(index: int) -> str:
    return f"{index:06}.png"


def _place(path: Path, tree: Tree, split: Split, folder_of: dict[int, str], changed: float) -> int:
    """Write the images of a split as PNG files, and return the number of new ones."""
    existing = {folder: tree.existing.get((folder, split.name), set()) for folder in folder_of.values()}
    targets = [
        (tree.folder(folder_of[label], split.name) + _file_name(index), _file_name(index) in existing[folder_of[label]])
        for index, label in enumerate(split.labels.tolist())
    ]
    for target, exists in targets:
        if exists:
            put_one(f"{path}: {split.name}", target, True, lambda _, target, __: is_written(target, changed))

    def put(item: tuple[tuple[str, bool], np.ndarray]) -> None:
        (target, exists), pixels = item
        if exists:
            return
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        put_one(f"{path}: {split.name}", target, False, lambda *_: write(target, png.getvalue(), changed) is None)

    new = sum(not exists for _, exists in targets)
    if new:
        items = zip(targets, split.images(), strict=True)
        try:
            for _ in tqdm(in_threads(put, items), total=len(targets), desc=split.name, unit=" images", disable=None):
                pass
        except (zipfile.BadZipFile, zlib.error, EOFError):
            # The checksum stands at the end, so any image may be wrong; a resumed run would keep those that exist.
            for target, _ in targets:
                Path(target).unlink(missing_ok=True)
            raise
    return new


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command. Raises UserError for bad input."""
    parser = Parser(__doc__, prog="python -m utils.medmnist")
    command = parser.add_subparsers(required=True, metavar="prepare").add_parser(
        "prepare", description=DESCRIPTION, help="make DATA/{train,val,test}/<class>/<number>.png"
    )
    add = command.add_argument
    add("file", type=expanded_path, metavar="FILE.npz", help="file of a 2-D set with one label per image")
    add("output", type=expanded_path, metavar="DATA", help="new folder, or one to resume")
    add("--name", metavar="SET", help="name of the set in the package medmnist, such as pathmnist (default: that of "
        "the file)")  # fmt: skip
    options = parser.parse_args(argv)
    prepare(options.file, options.output, options.name)


if __name__ == "__main__":
    run_script(main)
