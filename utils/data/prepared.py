"""Folders prepared for training: the record prepare.json, the table images.csv, and names of class folders."""

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from utils.data.listing import is_hidden
from utils.runtime.errors import UserError
from utils.runtime.files import make_folder, write_atomically, write_json
from utils.runtime.reading import read_json
from utils.runtime.text import canonical, count, csv_table, list_names, print_line, printable

RECORD, IMAGES = "prepare.json", "images.csv"
IMAGES_HEAD = ("image", "split", "class", "source", "group", "window_low", "window_high", "window_from")
MISSING, MISSING_HEAD = "missing.csv", ("split", "image", "reason")
LONGEST_NAME = 255  # bytes; of a file or folder


def check_output(output: Path, settings: dict[str, Any]) -> bool:
    """Return whether an earlier run of the same settings began this folder.

    settings: JSON values. Raises UserError for a folder with other content, and for one of other settings.
    """
    if not os.path.lexists(output):
        return False
    if not output.is_dir():
        raise UserError(f"{output}: is a file; give a new folder, or one to resume.")
    try:
        earlier = read_json(output / RECORD)["settings"]
    except FileNotFoundError:
        if content := [name for name in sorted(os.listdir(output)) if not is_hidden(name)]:
            raise UserError(
                f"{output}: holds {list_names(content)}, but no {RECORD} of this command; give a new folder."
            ) from None
        return False
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{output / RECORD}: was not written by this command; give a new folder.") from None
    if earlier == settings:
        return True
    if not isinstance(earlier, dict):
        earlier = {}
    changed = [name for name in settings | earlier if settings.get(name) != earlier.get(name)]
    pairs = [f"{name} was {earlier.get(name)!r} and is {settings.get(name)!r}" for name in changed]
    raise UserError(f"{output}: was made with other settings ({'; '.join(pairs)}); repeat them, or give a new folder.")


def begin(output: Path, settings: dict[str, Any]) -> None:
    """Create the folder and record the settings, before the first image. Raises UserError if that fails."""
    make_folder(output, "folder")
    write_json(output / RECORD, {"finished": False, "settings": settings})


def finish(output: Path, settings: dict[str, Any], result: dict[str, Any]) -> None:
    """Record what was made."""
    write_json(output / RECORD, {"finished": True, "settings": settings, **result})


def write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV table; file names that are not text keep their bytes."""
    write_atomically(path, csv_table([head, *rows]).encode(errors="surrogateescape"))


def class_folders(labels: Iterable[str]) -> dict[str, str]:
    """A folder name for each label: slashes and control characters become _, hidden names get a leading _.

    Prints the labels that change. Raises UserError for labels that would share a folder, for labels that differ only by
    case or Unicode form, for long ones, and for a single label.
    """
    folders: dict[str, str] = {}
    by_form: dict[str, str] = {}
    for label in sorted(set(labels)):
        name = "".join("_" if letter in "/\\" or printable(letter) != letter else letter for letter in label)
        name = f"_{name}" if is_hidden(name) else name
        folders[label] = name
        other = by_form.setdefault(canonical(name).casefold(), label)
        if other != label:
            raise UserError(
                f"the labels {other!r} and {label!r} would become the same folder, or folders that differ only by case "
                "or Unicode form; if they are one class, spell them alike, otherwise rename one."
            )
        if len(os.fsencode(name)) > LONGEST_NAME:
            raise UserError(f"the label {label[:40]!r}... is longer than the name of a folder can be; shorten it.")
    if len(folders) == 1:
        raise UserError(f"all images have the label {next(iter(folders))!r}; training needs at least two classes.")
    if renamed := [f"{label!r} becomes {name!r}" for label, name in folders.items() if label != name]:
        print_line(f"Labels that cannot be names of folders: {list_names(renamed)}.")
    return folders


def print_counts(counts: dict[str, Counter], classes: Sequence[str], groups: dict[str, int] | None = None) -> None:
    """Print the images of each class in each split, and maybe the groups; counts: by split and class."""
    rows = [(name, *(numbers[name] for numbers in counts.values())) for name in classes]
    rows.append(("all", *(numbers.total() for numbers in counts.values())))
    if groups is not None:
        rows.append(("groups", *groups.values()))
    print_table(("class", *counts, "total"), [(name, *numbers, sum(numbers)) for name, *numbers in rows])


def warn_of_lacking_classes(counts: dict[str, Counter], classes: Collection[str]) -> None:
    """Warn of classes whose images in a split or fold are all missing."""
    for name, numbers in counts.items():
        if name != "test" and (lacking := sorted(set(classes) - numbers.keys())):
            text = f"{count(len(lacking), 'class')} without available images in {name}: {list_names(lacking)}"
            print_line(f"warning: {text}; training needs every class in train and val.")


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table with a name and whole numbers in each row."""
    width = max(len(printable(row[0])) for row in (head, *rows))
    for name, *numbers in (head, *rows):
        print_line(f"{printable(name):{width}}" + "".join(f"{number:>10}" for number in numbers))
