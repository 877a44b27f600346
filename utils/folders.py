"""One folder a class: the classes and images of a split, without opening an image."""

import hashlib
import itertools
import json
import os
from collections.abc import Set
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.errors import UserError
from utils.reading import read_bytes

LAYOUT = "DATA/{train,val,test}/<class>/<image>"
SPLITS = ("train", "val", "test")


def find_classes(split: Path) -> list[str]:
    """The sorted class folders of a split; raises UserError where there is none."""
    if not split.is_dir():
        raise UserError(f"{split}: no such folder; expected {LAYOUT}.")
    try:
        classes = sorted(entry.name for entry in os.scandir(split) if entry.is_dir())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot read this folder ({error.strerror}).") from None
    if not classes:
        raise UserError(f"{split}: holds no class folders; expected {LAYOUT}.")
    return classes


def list_images(class_folder: Path) -> list[str]:
    """The sorted paths of all images below a class folder; raises UserError if there is none, and as `find_images`."""
    paths = find_images(class_folder)
    if not paths:
        kinds = ", ".join(IMG_EXTENSIONS)
        raise UserError(f"{class_folder}: holds no image ({kinds}); expected {LAYOUT}.")
    return paths


def find_images(root: Path) -> list[str]:
    """The sorted paths of all images below a folder, by their ending.

    Raises UserError for a folder that cannot be read, and for links by which one holds itself, or another one twice.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot read this folder ({error.strerror}).")

    paths: list[str] = []
    seen: dict[tuple[int, int], str] = {}
    for folder, _, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(folder)
        other = seen.setdefault((status.st_dev, status.st_ino), folder)
        if other != folder:
            raise UserError(f"{folder}: a link makes this the same folder as {other}; remove the link.")
        paths += [os.path.join(folder, name) for name in names if name.lower().endswith(IMG_EXTENSIONS)]
    return sorted(paths)


def check_same_classes(root: Path, splits: dict[str, list[str]]) -> None:
    """Raise UserError if a class stands in one split and not in another; `splits`: class names by split."""
    for here, there in itertools.permutations(splits, 2):
        missing = sorted(set(splits[here]) - set(splits[there]))
        if missing:
            raise UserError(
                f"{root / here / missing[0]}: this class is in '{here}' but not in '{there}' ({len(missing)} such in "
                f"all); every split must hold the same classes: {LAYOUT}."
            )


def read_excluded(path: Path) -> dict[str, set[str]]:
    """By split the images, relative to its folder, that a list of lines `<split>/<class>/<image>` names.

    Blank lines and those that begin with # say nothing; lines of no split stand whole under "". Raises UserError if
    the list cannot be read.
    """
    try:
        lines = os.fsdecode(read_bytes(path)).split("\n")  # names may be no text
    except OSError as error:
        raise UserError(f"--exclude {path}: cannot be read ({error.strerror}); give a text file.") from None
    excluded: dict[str, set[str]] = {split: set() for split in (*SPLITS, "")}
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            split, _, name = line.partition("/")
            excluded[split if split in SPLITS else ""].add(name if split in SPLITS else line)
    return excluded


class ImageFiles:
    """Paths and targets of one split, sorted by class and path, in three arrays: a million take some tens of megabytes.

    Processes that a loader forks share arrays, while of Python objects each would come to hold a copy of its own.
    """

    excluded = 0  # images that `find` left out

    def __init__(self, root: Path, names: dict[str, list[str]]) -> None:
        """names: for each class, in order, the images' paths relative to its folder."""
        self.root, self.classes = root, list(names)
        self.targets = np.repeat(np.arange(len(names), dtype=np.int32), [len(of_class) for of_class in names.values()])
        texts = [[os.fsencode(name) for name in of_class] for of_class in names.values()]
        self._text = np.frombuffer(b"".join(map(b"".join, texts)), dtype=np.uint8)
        self._ends = np.cumsum([len(text) for of_class in texts for text in of_class], dtype=np.int64)

    @classmethod
    def find(cls, root: Path, excluded: Set[str] = frozenset()) -> "ImageFiles":
        """All images of a split's folder but those excluded, which are paths relative to it.

        Raises UserError for a missing or empty folder, and for a class without images.
        """
        names = {name: _relative_names(root / name) for name in find_classes(root)}
        if not excluded:
            return cls(root, names)
        kept = {
            name: [one for one in of_class if os.path.join(name, one) not in excluded]
            for name, of_class in names.items()
        }
        for name, of_class in kept.items():
            if not of_class:
                raise UserError(f"{root / name}: --exclude leaves this class no image; shorten the list.")
        files = cls(root, kept)
        files.excluded = sum(map(len, names.values())) - len(files)
        return files

    def __len__(self) -> int:
        return len(self.targets)

    def digest(self) -> str:
        """SHA-256 of all classes and names in their order: whether two splits hold the same images, as names tell."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for array in (self.targets, self._ends, self._text):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def path(self, index: int) -> Path:
        return self.root / self.path_as_text(index)

    def path_as_text(self, index: int) -> str:
        """Relative to the split's folder."""
        start = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._text[start : self._ends[index]].tobytes())
        return os.path.join(self.classes[self.targets[index]], name)


def _relative_names(class_folder: Path) -> list[str]:
    length = len(os.path.join(class_folder, ""))
    return [path[length:] for path in list_images(class_folder)]
