"""RadImageNet's lists, RadiologyAI_{train,val,test}.csv: class and split of each image."""

import codecs
import csv
import functools
import io
import itertools
from dataclasses import dataclass, field
from typing import BinaryIO

from utils.choices import SPLITS
from utils.data.listing import is_hidden, is_image
from utils.runtime.errors import UserError

ROOT = "radiology_ai"
DEPTHS = {"CT": 4, "MR": 4, "US": 3}  # parts of the path of a class folder, from ROOT, by modality
LAYOUT = f"{ROOT}/{{CT,MR}}/<anatomy>/<label>/<image>.png or {ROOT}/US/<label>/<image>.png"


def list_name(split: str) -> str:
    return f"RadiologyAI_{split}.csv"


@functools.cache
def _is_hidden_folder(folder: str) -> bool:
    return any(is_hidden(part) for part in folder.split("/") if part not in (".", ".."))


@dataclass
class ImageLists:
    """The content of the three lists."""

    folders: dict[str, str] = field(default_factory=dict)  # by class: radiology_ai/CT/abd/normal for CT__abd__normal
    names: dict[str, dict[str, set[str]]] = field(default_factory=dict)  # of images, by class and split
    repetitions: list[tuple[str, str]] = field(default_factory=list)  # split and file name of each further mention
    hidden: int = 0  # files, which are skipped

    def __len__(self) -> int:
        return sum(len(names) for splits in self.names.values() for names in splits.values())

    def listed(self, name: str) -> set[str]:
        """The images of a class in all splits."""
        return set().union(*self.names[name].values())

    def read(self, split: str, file: BinaryIO, shown: object) -> None:
        """Add the list of a split. Only its column `filename` is used, because the path names the class.

        shown: the name of the list in messages. Raises UserError for an empty or different table, for paths of another
        layout, and for two folders that would become one class.
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
                raise UserError(f"{shown}: its first line has no column 'filename'; expected a list of RadImageNet.")
            column = header.index("filename")
            for row in filter(None, rows):
                line = f"{shown}, line {rows.line_num}"
                if len(row) <= column:
                    raise UserError(f"{line}: has no column 'filename'; download the list again.")
                folder, _, name = row[column].rpartition("/")
                if is_hidden(name) or _is_hidden_folder(folder):
                    self.hidden += 1
                    continue
                if folder not in folders:
                    folders[folder] = self._add_folder(split, folder, line)
                if name in folders[folder]:
                    self.repetitions.append((split, row[column]))
                    continue
                if "\0" in name or not is_image(name):
                    raise UserError(f"{line}: {row[column]!r} is not an image; expected {LAYOUT}.")
                folders[folder].add(name)
        except (csv.Error, UnicodeError) as error:
            raise UserError(f"{shown}, line {rows.line_num}: unreadable ({error}); download the list again.") from None
        if not folders:
            raise UserError(f"{shown}: names no image; download the list again.")

    def _add_folder(self, split: str, folder: str, shown: str) -> set[str]:
        """The set of images of a folder in a split; raises UserError for a folder outside the layout."""
        parts = folder.split("/")
        known = parts[0] == ROOT and len(parts) > 1 and len(parts) == DEPTHS.get(parts[1])
        if not known or any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise UserError(f"{shown}: the folder {folder!r} does not fit the layout; expected {LAYOUT}.")
        name = "__".join(parts[1:])
        first = self.folders.setdefault(name, folder)
        if first != folder:
            raise UserError(f"{shown}: {folder} and {first} would both become the class {name}; rename one of them.")
        return self.names.setdefault(name, {split: set() for split in SPLITS})[split]

    def repeated(self) -> dict[str, list[str]]:
        """The lists that mention an image, once per mention, for each image with several mentions."""
        mentions: dict[str, list[str]] = {}
        for name, splits in self.names.items():
            for first, second in itertools.combinations(SPLITS, 2):
                for image in splits[first] & splits[second]:
                    filename = f"{self.folders[name]}/{image}"
                    mentions[filename] = [split for split in SPLITS if image in splits[split]]
        for split, filename in self.repetitions:
            mentions.setdefault(filename, [split]).append(split)
        return {filename: sorted(mentions[filename], key=SPLITS.index) for filename in sorted(mentions)}
