"""A tiny RadImageNet as folder and archive, and the tree that `prepare` must make of it."""

import csv
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import write_image
from utils.radimagenet.__main__ import main
from utils.runtime.errors import UserError

FOLDERS = {"CT__abd__normal": "CT/abd/normal", "MR__knee__acl": "MR/knee/acl", "US__liver": "US/liver"}
COUNTS = {"train": (4, 3, 2), "val": (1, 2, 1), "test": (2, 1, 1)}
SUMMARY = """\
class,train,val,test,total
CT__abd__normal,4,1,2,7
MR__knee__acl,3,2,1,6
US__liver,2,1,1,4
"""


def write_lists(folder: Path, names: dict[str, list[str]]) -> None:
    for split, filenames in names.items():
        rows = "".join(f"{filename},label\n" for filename in filenames)
        path = folder / f"RadiologyAI_{split}.csv"
        path.write_text(f"filename,label\n{rows}", encoding="utf-8", errors="surrogateescape")


def filenames_of(split: str) -> list[str]:
    return [
        f"radiology_ai/{folder}/{split}{number}.png"
        for folder, count in zip(FOLDERS.values(), COUNTS[split], strict=True)
        for number in range(count)
    ]


def write_source(root: Path) -> Path:
    """A tiny RadImageNet: 17 images of 3 classes and several sizes, with old modification times."""
    names = {split: filenames_of(split) for split in COUNTS}
    for number, filename in enumerate(name for filenames in names.values() for name in filenames):
        write_image(root / filename, np.random.default_rng(number).integers(0, 256, (8 + number, 9)))
        os.utime(root / filename, (1_500_000_000 + number, 1_500_000_000 + number))
    write_lists(root, names)
    return root


def as_distributed(data: Path, root: Path) -> Path:
    """The images of data/<split>/<modality>-<anatomy>-<label>, laid out and listed like RadImageNet in `root`."""
    names: dict[str, list[str]] = {split: [] for split in COUNTS}
    for split, filenames in names.items():
        for image in sorted((data / split).glob("*/*")):
            modality, rest = image.parent.name.split("-", 1)
            folder = f"US/{rest}" if modality == "us" else f"{modality.upper()}/{rest.replace('-', '/')}"
            filename = f"radiology_ai/{folder}/{split}{image.name}"
            filenames.append(filename)
            (root / filename).parent.mkdir(parents=True, exist_ok=True)
            os.link(image, root / filename)
    write_lists(root, names)
    return root


def contents(root: Path) -> dict[str, bytes]:
    """All files of the three splits by relative path, hidden ones included."""
    return {
        os.path.relpath(os.path.join(folder, name), root): Path(folder, name).read_bytes()
        for split in COUNTS
        for folder, _, names in os.walk(root / split)
        for name in names
    }


def expected(source: Path) -> dict[str, bytes]:
    return {
        f"{split}/{name}/{Path(filename).name}": (source / filename).read_bytes()
        for split in COUNTS
        for name, folder in FOLDERS.items()
        for filename in filenames_of(split)
        if filename.startswith(f"radiology_ai/{folder}/")
    }


def pack(source: Path, archive: Path, folder: str = ".", lists: str = "first") -> Path:
    """A tar archive of the source; lists: first, last, or absent."""
    names = sorted(path.name for path in source.iterdir())  # the lists before the images
    if lists == "last":
        names.reverse()
    with tarfile.open(archive, "w:gz" if archive.suffix == ".gz" else "w") as tar:
        for name in names:
            if lists != "absent" or not name.endswith(".csv"):
                tar.add(source / name, f"{folder}/{name}")
    return archive


def origin(way: str, source: Path) -> dict[str, object]:
    """Arguments of `prepare` for a way: symlink, hardlink, copy, or archive."""
    if way == "archive":
        return {"archive": pack(source, source.parent / "images.tar.gz")}
    return {"source": source, "link": way}


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))[1:]


def fails(*arguments: object) -> str:
    """The one-sentence error of a command that fails."""
    with pytest.raises(UserError) as caught:
        main(["prepare", *map(str, arguments)])
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message
