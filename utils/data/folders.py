"""One folder a class: the classes and images of a split, without opening an image."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.data.listing import PassedOver, find_images, is_hidden, is_image
from utils.runtime.errors import UserError
from utils.runtime.reading import read_bytes
from utils.runtime.text import canonical, decode_text, explain_forms, list_names

LAYOUT = "DATA/{train,val,test}/<class>/<image>"
SPLITS = ("train", "val", "test")


def find_classes(split: Path, passed_over: PassedOver | None = None) -> list[str]:
    """The sorted class folders of a split; what else it holds is added to `passed_over`.

    Raises UserError where there is none, for links that lead nowhere, and for names that differ in their Unicode form
    only.
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
        raise UserError(f"{split / broken[0]}: this link leads nowhere; restore what it led to, or remove it.")
    classes = [name for name in visible if entries[name]]
    for name in visible:
        if not entries[name] and is_image(name):
            passed_over.stray += 1
        elif not entries[name]:
            passed_over.add_file(name)
    if not classes:
        content = passed_over.describe()
        raise UserError(f"{split}: holds no class folders{f' ({content})' if content else ''}; expected {LAYOUT}.")
    if explained := explain_forms(classes, classes):
        raise UserError(f"{split}: holds two folders of one class.{explained}")
    return classes


def check_several_classes(split: Path, classes: Sequence[str]) -> None:
    """Raise UserError for a split with a single class."""
    if len(classes) == 1:
        raise UserError(
            f"{split}: its only class folder is {list_names(classes)}, and a classifier needs two classes or more; "
            f"expected {LAYOUT}."
        )


def _describe_folder(data: Path) -> str:
    """For an error: the folders in a folder, and which one near it has splits and may be meant instead."""
    data = Path(os.path.abspath(data))
    inside = _visible_folders(data)
    if inside is None:
        return ""
    text = f" {data} holds {f'the folders {list_names(inside)}' if inside else 'no folders'}."
    return text + _suggest([*data.parents[:2], *(data / name for name in inside)])


def _visible_folders(folder: Path) -> list[str] | None:
    """None if it cannot be read."""
    try:
        return sorted(entry.name for entry in os.scandir(folder) if not is_hidden(entry.name) and entry.is_dir())
    except OSError:
        return None


def _suggest(places: list[Path]) -> str:
    """For an error: the first of these folders that holds splits."""
    for place in places:
        if sum(os.path.isdir(place / split) for split in SPLITS) > 1:
            return f" Did you mean {place}?"
    return ""


def list_images(class_folder: Path) -> list[str]:
    """The sorted paths of all images in a class folder.

    Raises UserError if there is none, for images in folders below it, and as `find_images`.
    """
    passed_over = PassedOver()
    names = _relative_names(class_folder, passed_over)
    _refuse_nested(class_folder.parent, {class_folder.name: names})
    if not names:
        raise _without_images(class_folder, passed_over)
    return [os.path.join(class_folder, name) for name in names]


def _without_images(class_folder: Path, passed_over: PassedOver) -> UserError:
    content = passed_over.describe()
    kinds = ", ".join(IMG_EXTENSIONS)
    return UserError(
        f"{class_folder}: holds no image ({kinds}){f' ({content})' if content else ''}; expected {LAYOUT}."
    )


def _refuse_nested(split: Path, names: dict[str, list[str]]) -> None:
    """Raise UserError for images in folders below class folders; names: for each class, relative to its folder."""
    folders = sorted(
        {os.path.join(of, os.path.dirname(name)) for of, names in names.items() for name in names if os.sep in name}
    )
    if not folders:
        return
    advice = f"move what is in {split / next(iter(names))} up into {split}" if len(names) == 1 else "move them up"
    raise UserError(
        f"{split}: images lie in folders below class folders ({len(folders)}): {list_names(folders)}. Expected them "
        f"directly in the class folders, as {LAYOUT}; {advice}.{_suggest([split / name for name in names])}"
    )


def check_same_classes(root: Path, splits: dict[str, list[str]]) -> None:
    """Raise UserError if a class stands in one split and not in another; `splits`: class names by split."""
    for here, there in itertools.permutations(splits, 2):
        missing = sorted(set(splits[here]) - set(splits[there]))
        if missing:
            raise UserError(
                f"{root / here / missing[0]}: this class is in '{here}' but not in '{there}' ({len(missing)} such in "
                f"all); every split must hold the same classes: {LAYOUT}.{explain_forms(missing, splits[there])}"
            )


def read_excluded(path: Path) -> dict[str, set[str]]:
    """By split the images, relative to its folder, that a list of lines `<split>/<class>/<image>` names.

    Blank lines and those that begin with # say nothing; lines of no split stand whole under "". UTF-8, or UTF-16 with
    a byte order mark. Raises UserError if the list cannot be read.
    """
    try:
        lines = decode_text(read_bytes(path)).split("\n")  # names may be no text
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--exclude {path}: cannot be read ({reason}); give a text file.") from None
    excluded: dict[str, set[str]] = {split: set() for split in (*SPLITS, "")}
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            split, _, name = line.partition("/")
            excluded[split if split in SPLITS else ""].add(name if split in SPLITS else line)
    return excluded


def _excluded_names(names: dict[str, list[str]], excluded: Set[str]) -> Set[str]:
    """The paths <class>/<image> that a list names; a line that is no path counts for those that only look the same."""

    def paths() -> Iterator[str]:
        return (os.path.join(name, image) for name, images in names.items() for image in images)

    exact = excluded.intersection(paths())
    forms = {canonical(line) for line in excluded - exact if not line.isascii()}
    return exact | {path for path in paths() if canonical(path) in forms} if forms else exact


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
        self.passed_over = PassedOver()  # by `find`
        self.mostly_ignored: list[str] = []  # classes of which `find` ignored more files than it read

    @classmethod
    def find(
        cls,
        root: Path,
        excluded: Set[str] = frozenset(),
        classes: Sequence[str] | None = None,
        trained_on: str = "'train'",
    ) -> "ImageFiles":
        """All images of a split's folder but those excluded, which are paths relative to it.

        classes: those of the training, by which targets are numbered and of which the split may lack some; trained_on:
        where they are from, for messages. None: the split's own. Raises UserError for a missing or empty folder, for
        images below class folders, for a class that the training lacks, and without `classes` for one without images.
        """
        passed_over = PassedOver()
        found = find_classes(root, passed_over)
        passed_by_class = {name: PassedOver() for name in found}
        seen: dict[tuple[int, int], str] = {}  # two classes may not be the same folder
        names = {name: _relative_names(root / name, passed_by_class[name], seen) for name in found}
        _refuse_nested(root, names)
        if classes is not None:
            _refuse_unknown(root, found, classes, trained_on)
            names = {name: names.get(name, []) for name in classes}
        elif empty := [name for name in names if not names[name]]:
            raise _without_images(root / empty[0], passed_by_class[empty[0]])
        kept = names
        if excluded:
            left_out = _excluded_names(names, frozenset(excluded))
            kept = {
                name: [image for image in images if os.path.join(name, image) not in left_out]
                for name, images in names.items()
            }
            if classes is None and (emptied := [name for name in kept if not kept[name]]):
                raise UserError(f"{root / emptied[0]}: --exclude leaves this class no image; shorten the list.")
        files = cls(root, kept)
        if not len(files):
            raise UserError(f"{root}: no class has an image{' that --exclude leaves' if any(names.values()) else ''}.")
        files.excluded = sum(map(len, names.values())) - len(files)
        for of_class in passed_by_class.values():
            passed_over.add(of_class)
        files.passed_over = passed_over
        files.mostly_ignored = [name for name in found if passed_by_class[name].endings.total() > len(names[name])]
        return files

    def __len__(self) -> int:
        return len(self.targets)

    def empty_classes(self) -> list[str]:
        """The classes without an image."""
        counts = np.bincount(self.targets, minlength=len(self.classes))
        return [self.classes[number] for number in np.flatnonzero(counts == 0)]

    def describe(self) -> str:
        """Such as `val: 120 images in 4 classes; skipped: 1 hidden file or folder; ignored: 12 .dcm`."""
        filled = len(self.classes) - len(self.empty_classes())
        text = f"{self.root.name}: {len(self)} images in {filled} classes"
        return "; ".join(filter(None, (text, self.passed_over.describe())))

    def describe_ignored(self) -> str:
        """A sentence on the classes of which more files were ignored than read; "" if there is none."""
        if not self.mostly_ignored:
            return ""
        names = list_names([f"{self.root.name}/{name}" for name in self.mostly_ignored])
        kinds = ", ".join(IMG_EXTENSIONS)
        return f"{names}: more files are ignored than read. Only {kinds} are read: convert the others, or remove them."

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


def _refuse_unknown(root: Path, found: list[str], classes: Sequence[str], trained_on: str) -> None:
    """Raise UserError for a class that the training lacks."""
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise UserError(
            f"{root / unknown[0]}: this class is in '{root.name}' but not in {trained_on} ({len(unknown)} such in "
            f"all); expected no other classes than {list_names(classes)}.{explain_forms(unknown, classes)}"
        )


def _relative_names(
    class_folder: Path, passed_over: PassedOver, seen: dict[tuple[int, int], str] | None = None
) -> list[str]:
    """The images below a class folder, relative to it; seen: as of `find_images`."""
    length = len(os.path.join(class_folder, ""))
    return [path[length:] for path in find_images(class_folder, passed_over, seen)]
