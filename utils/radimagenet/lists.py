"""RadImageNet's lists, RadiologyAI_{train,val,test}.csv: which image belongs to which class and split."""

import codecs
import csv
import functools
import io
import itertools
from typing import BinaryIO

from utils.data.listing import is_hidden, is_image
from utils.runtime.errors import UserError

SPLITS = ("train", "val", "test")
ROOT = "radiology_ai"
DEPTHS = {"CT": 4, "MR": 4, "US": 3}  # names in the path of a label's folder, of ROOT and the modality on
LAYOUT = f"{ROOT}/{{CT,MR}}/<anatomy>/<label>/<image>.png or {ROOT}/US/<label>/<image>.png"


@functools.cache
def _lies_hidden(folder: str) -> bool:
    return any(is_hidden(part) for part in folder.split("/") if part not in (".", ".."))


def list_name(split: str) -> str:
    return f"RadiologyAI_{split}.csv"


class ImageLists:
    """What the lists name.

    `folders`: for each class, such as CT__abd__normal, the folder of its images, radiology_ai/CT/abd/normal;
    `names[class][split]`: the names of its images; `again`: (split, filename) of what a list names once more;
    `hidden`: how many hidden files they name, which are skipped.
    """

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}
        self.names: dict[str, dict[str, set[str]]] = {}
        self.again: list[tuple[str, str]] = []
        self.hidden = 0

    def __len__(self) -> int:
        return sum(len(names) for of_class in self.names.values() for names in of_class.values())

    def listed(self, name: str) -> set[str]:
        """The images of a class in all splits."""
        return set().union(*self.names[name].values())

    def read(self, split: str, file: BinaryIO, shown: object) -> None:
        """Add a split's list: of its columns only `filename` counts, since the class is in the path.

        shown: the list's name in messages. Raises UserError for a list that is empty or no such table, for paths of
        another layout, and for two folders that would become one class.
        """
        is_utf16 = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        file.seek(0)
        encoding = "utf-16" if is_utf16 else "utf-8-sig"
        text = io.TextIOWrapper(file, encoding=encoding, errors="surrogateescape", newline="")
        rows = csv.reader(text)
        folders: dict[str, set[str]] = {}
        try:
            header = next(rows, [])
            if "filename" not in header:
                raise UserError(f"{shown}: its first line has no column 'filename'; expected RadImageNet's own list.")
            column = header.index("filename")
            for row in filter(None, rows):
                if len(row) <= column:
                    raise UserError(f"{shown}, line {rows.line_num}: has no column 'filename'; get the list again.")
                folder, _, name = row[column].rpartition("/")
                if is_hidden(name) or _lies_hidden(folder):
                    self.hidden += 1
                    continue
                names = folders.get(folder)
                if names is None:
                    names = folders[folder] = self._add_folder(split, folder, f"{shown}, line {rows.line_num}")
                if name in names:
                    self.again.append((split, row[column]))
                    continue
                if "\0" in name or not is_image(name):
                    raise UserError(f"{shown}, line {rows.line_num}: {row[column]!r} is no image; expected {LAYOUT}.")
                names.add(name)
        except (csv.Error, UnicodeError) as error:
            raise UserError(f"{shown}, line {rows.line_num}: cannot be read ({error}); get the list again.") from None
        if not folders:
            raise UserError(f"{shown}: names no image; get the list again.")

    def _add_folder(self, split: str, folder: str, shown: str) -> set[str]:
        """The set of a folder's images in a split; raises UserError for a folder of no known kind."""
        parts = folder.split("/")
        known = parts[0] == ROOT and len(parts) > 1 and len(parts) == DEPTHS.get(parts[1])
        if not known or any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise UserError(f"{shown}: {folder!r} is no folder of the layout expected, {LAYOUT}.")
        name = "__".join(parts[1:])
        other = self.folders.setdefault(name, folder)
        if other != folder:
            raise UserError(f"{shown}: {folder} and {other} would both become the class {name}; rename one of them.")
        return self.names.setdefault(name, {of: set() for of in SPLITS})[split]

    def repeated(self) -> dict[str, list[str]]:
        """For each image that stands in several lists, or several times in one: the lists, once for each mention."""
        found: dict[str, list[str]] = {}
        for name, splits in self.names.items():
            for first, second in itertools.combinations(SPLITS, 2):
                for image in splits[first] & splits[second]:
                    filename = f"{self.folders[name]}/{image}"
                    found[filename] = [split for split in SPLITS if image in splits[split]]
        for split, filename in self.again:
            found.setdefault(filename, [split]).append(split)
        return {filename: sorted(found[filename], key=SPLITS.index) for filename in sorted(found)}
