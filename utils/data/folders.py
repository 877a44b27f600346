"""The classes and images of a split in ImageFolder layout, found without opening an image."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

import numpy as np

from utils.choices import SPLITS
from utils.data.listing import IMAGE_ENDINGS, PassedOver, find_images, is_hidden, is_image
from utils.runtime.errors import UserError
from utils.runtime.reading import read_bytes
from utils.runtime.text import canonical, decode_text, explain_forms, list_names

LAYOUT = "DATA/{train,val,test}/<class>/<image>"
EXTENSIONS = ", ".join(IMAGE_ENDINGS)  # for messages


def find_classes(split: Path, passed_over: PassedOver | None = None) -> list[str]:
    """The sorted class folders of a split. Other entries are counted in `passed_over`.

    Raises UserError for a missing split, for one without class folders, for broken links, and for names that differ
    only in their Unicode form.
    """
    passed_over = PassedOver() if passed_over is None else passed_over
    if not split.is_dir():
        raise UserError(f"{split}: no such folder; expected {LAYOUT}.{_describe_folder(split.parent)}")
    try:
        entries = {entry.name: entry.is_dir() for entry in os.scandir(split)}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot read this folder ({error.strerror}).") from None
    visible = passed_over.keep_visible(sorted(entries))
    if broken := [name for name in visible if not os.path.exists(split / name)]:
        raise UserError(f"{split / broken[0]}: broken link; restore its target, or remove the link.")
    classes = [name for name in visible if entries[name]]
    for name in visible:
        if not entries[name] and is_image(name):
            passed_over.stray += 1
        elif not entries[name]:
            passed_over.add_file(name)
    if not classes:
        content = f" ({passed_over.describe()})" if passed_over.describe() else ""
        raise UserError(f"{split}: holds no class folders{content}; expected {LAYOUT}.")
    if explained := explain_forms(classes, classes):
        raise UserError(f"{split}: holds two folders of one class.{explained}")
    return classes


def _describe_folder(data: Path) -> str:
    """Sentences for errors: the folders in a folder, and a folder near it that holds splits; "" if unreadable."""
    data = Path(os.path.abspath(data))
    try:
        inside = sorted(entry.name for entry in os.scandir(data) if not is_hidden(entry.name) and entry.is_dir())
    except OSError:
        return ""
    content = f"the folders {list_names(inside)}" if inside else "no folders"
    return f" {data} holds {content}." + _suggest([*data.parents[:2], *(data / name for name in inside)])


def _suggest(places: list[Path]) -> str:
    """A sentence for errors: the first of these folders that holds splits; "" for none."""
    for place in places:
        if sum(os.path.isdir(place / split) for split in SPLITS) > 1:
            return f" Did you mean {place}?"
    return ""


def _refuse_nested(split: Path, names: dict[str, list[str]]) -> None:
    """Raise UserError for images in subfolders of class folders; names: images by class, relative to its folder."""
    subfolders = {
        os.path.join(class_name, os.path.dirname(image))
        for class_name, images in names.items()
        for image in images
        if os.sep in image
    }
    if not subfolders:
        return
    advice = f"move the content of {split / next(iter(names))} up into {split}" if len(names) == 1 else "move them up"
    raise UserError(
        f"{split}: images are in folders below class folders ({len(subfolders)}): {list_names(sorted(subfolders))}. "
        f"Expected them directly in the class folders, as {LAYOUT}; {advice}."
        f"{_suggest([split / name for name in names])}"
    )


def check_same_classes(root: Path, splits: dict[str, list[str]]) -> None:
    """Raise UserError for a class that is not in every split; splits: class names by split."""
    for name, other in itertools.permutations(splits, 2):
        if unknown := sorted(set(splits[name]) - set(splits[other])):
            rule = f"every split must hold the same classes: {LAYOUT}"
            raise _unknown_class(root / name, unknown, f"'{other}'", rule, splits[other])


def _unknown_class(split: Path, unknown: list[str], source: str, rule: str, known: Sequence[str]) -> UserError:
    """The error for classes of a split that are not among the `known` classes of `source`."""
    also = f" (also: {list_names(unknown[1:])})" if len(unknown) > 1 else ""
    return UserError(
        f"{split / unknown[0]}: this class is in '{split.name}' but not in {source}{also}; "
        f"{rule}.{explain_forms(unknown, known)}"
    )


def read_excluded(path: Path) -> dict[str, set[str]]:
    """Images by split, relative to its folder, from a list with lines `<split>/<class>/<image>`.

    Blank lines and lines that start with # are skipped; lines of other splits stand whole under "". Encoding: UTF-8,
    or UTF-16 or UTF-32 with a byte order mark. Raises UserError for an unreadable list.
    """
    try:
        lines = decode_text(read_bytes(path)).split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--exclude {path}: cannot be read ({reason}); give a text file.") from None
    excluded: dict[str, set[str]] = {split: set() for split in (*SPLITS, "")}
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            split, _, name = line.partition("/")
            excluded[split if split in SPLITS else ""].add(name if split in SPLITS else line)
    return excluded


def _remove_excluded(names: dict[str, list[str]], excluded: Set[str]) -> dict[str, list[str]]:
    """The images by class without the excluded paths <class>/<image>.

    A line that matches no path exactly removes the paths that differ from it only in their Unicode form.
    """

    def paths() -> Iterator[str]:
        return (os.path.join(name, image) for name, images in names.items() for image in images)

    removed = set(excluded).intersection(paths())
    if forms := {canonical(line) for line in excluded - removed if not line.isascii()}:
        removed |= {path for path in paths() if canonical(path) in forms}
    return {
        name: [image for image in images if os.path.join(name, image) not in removed] for name, images in names.items()
    }


class ImageFiles:
    """Paths and targets of one split, sorted by class and path, in three arrays: tens of megabytes for a million.

    Forked loader workers share arrays. Of Python objects, each worker would end up with its own copy.
    """

    def __init__(self, root: Path, names: dict[str, list[str]]) -> None:
        """names: the images of each class, relative to its folder, in order."""
        self.root, self.classes = root, list(names)
        self.targets = np.repeat(np.arange(len(names), dtype=np.int32), [len(images) for images in names.values()])
        encoded = [os.fsencode(image) for images in names.values() for image in images]
        self._text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        # Set by `find`:
        self.excluded = 0  # images left out
        self.passed_over = PassedOver()
        self.mostly_ignored: list[str] = []  # classes with more ignored files than images

    @classmethod
    def find(
        cls,
        root: Path,
        excluded: Set[str] = frozenset(),
        classes: Sequence[str] | None = None,
        trained_on: str = "'train'",
    ) -> "ImageFiles":
        """All images of a split's folder, without the excluded paths, which are relative to it.

        classes: the training's classes, which number the targets; the split may lack some of them. None: the split's
        own classes. trained_on: the source of `classes`, for messages. Raises UserError for a missing or empty folder,
        for images below class folders, for a class that is not in `classes`, and without `classes` for an empty class.
        """
        passed_over = PassedOver()
        class_folders = find_classes(root, passed_over)
        passed_by_class = {name: PassedOver() for name in class_folders}
        seen: dict[tuple[int, int], str] = {}  # two classes may not be the same folder
        names: dict[str, list[str]] = {}
        for name in class_folders:
            length = len(os.path.join(root / name, ""))
            names[name] = [path[length:] for path in find_images(root / name, passed_by_class[name], seen)]
        _refuse_nested(root, names)
        if classes is not None:
            if unknown := sorted(set(class_folders) - set(classes)):
                raise _unknown_class(root, unknown, trained_on, f"expected only {list_names(classes)}", classes)
            names = {name: names.get(name, []) for name in classes}
        elif empty := [name for name in names if not names[name]]:
            content = passed_by_class[empty[0]].describe()
            content = f" ({content})" if content else ""
            raise UserError(f"{root / empty[0]}: holds no image ({EXTENSIONS}){content}; expected {LAYOUT}.")
        kept = _remove_excluded(names, excluded) if excluded else names
        if classes is None and (empty := [name for name in kept if not kept[name]]):
            raise UserError(f"{root / empty[0]}: --exclude leaves this class no image; shorten the list.")
        files = cls(root, kept)
        if not len(files):
            raise UserError(f"{root}: no class has an image{' that --exclude leaves' if any(names.values()) else ''}.")
        files.excluded = sum(map(len, names.values())) - len(files)
        for passed in passed_by_class.values():
            passed_over.add(passed)
        files.passed_over = passed_over
        files.mostly_ignored = [
            name for name in class_folders if passed_by_class[name].endings.total() > len(names[name])
        ]
        return files

    def __len__(self) -> int:
        return len(self.targets)

    def empty_classes(self) -> list[str]:
        """The classes without images."""
        counts = np.bincount(self.targets, minlength=len(self.classes))
        return [self.classes[number] for number in np.flatnonzero(counts == 0)]

    def describe(self) -> str:
        """For example `val: 120 images in 4 classes; skipped: 1 hidden file or folder; ignored: 12 .dcm`."""
        filled = len(self.classes) - len(self.empty_classes())
        text = f"{self.root.name}: {len(self)} images in {filled} classes"
        return "; ".join(filter(None, (text, self.passed_over.describe())))

    def describe_ignored(self) -> str:
        """A warning about classes with more ignored files than images; "" for none."""
        if not self.mostly_ignored:
            return ""
        names = list_names([f"{self.root.name}/{name}" for name in self.mostly_ignored])
        return f"{names}: more files are ignored than read; convert them to one of {EXTENSIONS}, or remove them."

    def digest(self) -> str:
        """SHA-256 of all classes and names in order, to compare the images of two splits by name."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for array in (self.targets, self._ends, self._text):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def path(self, index: int) -> Path:
        return self.root / self.path_as_text(index)

    def path_as_text(self, index: int) -> str:
        """The path relative to the split's folder."""
        start = self._ends[index - 1] if index else 0
        name = os.fsdecode(self._text[start : self._ends[index]].tobytes())
        return os.path.join(self.classes[self.targets[index]], name)
