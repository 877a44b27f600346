"""Text: printable forms of arbitrary names, cells of CSV tables, and decoding of files that users wrote."""

import codecs
import csv
import io
import os
import sys
import unicodedata
from collections.abc import Collection, Iterable
from typing import Any, TextIO

LONGEST = 2000  # characters of a printed line
LONGEST_NAME = 60  # characters of a name in a list of names
# First characters of cells that a spreadsheet may run as a formula, and the apostrophe that marks such cells here.
FORMULA = tuple("=+-@\t\r\n'\uff1d\uff0b\uff0d\uff20")


def printable(text: str) -> str:
    """The text with escapes for control characters and for bytes that are not text."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def as_line(text: str) -> str:
    """One printable line, a very long one without its middle."""
    line = printable(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 4 :]}"


def print_line(text: object, file: TextIO | None = None) -> None:
    """Print one printable line, by default to stdout."""
    print(as_line(str(text)), file=file or sys.stdout, flush=True)


def as_cell(value: Any) -> Any:
    """A cell of a CSV file; text that a spreadsheet may run as a formula gets a leading apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def from_cell(text: str) -> str:
    """The text that `as_cell` was given."""
    return text.removeprefix("'")


def csv_line(values: Iterable[Any]) -> str:
    """A line of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)  # with its default line end, because it then quotes carriage returns
    return text.getvalue().removesuffix("\r\n") + "\n"


def csv_table(rows: Iterable[Iterable[Any]]) -> str:
    """A CSV table, one line per row, formulas marked as in `as_cell`."""
    return "".join(csv_line(map(as_cell, row)) for row in rows)


def list_names(names: Collection[str], shown: int = 5) -> str:
    """The first names, printable, shortened and separated by commas, and how many more there are."""
    first = [printable(name) for name in list(names)[:shown]]
    text = ", ".join(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name in first)
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"


def count(number: int, noun: str) -> str:
    """Such as "1 image", "2,000 images" and "3 classes"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def describe_seconds(seconds: float) -> str:
    """A duration in its two largest units, such as "45 s", "2 h 10 min" and "3 days 4 h"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "day" if days == 1 else "days"), (hours, "h"), (minutes, "min"), (seconds, "s"))
    first = next((place for place, (number, _) in enumerate(parts) if number), 3)
    shown = [f"{number} {unit}" for number, unit in parts[first : first + 2] if number]
    return " ".join(shown) or "0 s"


def canonical(name: str) -> str:
    """The name in Unicode's composed form (NFC), in which names that look the same are equal."""
    return unicodedata.normalize("NFC", name)


def explain_forms(names: Iterable[str], others: Iterable[str]) -> str:
    """A sentence about a name that equals another one except for its Unicode form; "" if there is no such pair."""
    by_form = {canonical(name): name for name in others}
    for name in names:
        twin = by_form.get(canonical(name), name)
        if twin != name:
            return (
                f" {name!a} and {twin!a} look the same but differ in their Unicode form (macOS writes NFD, "
                "other systems NFC): rename one as the other, for example with convmv --nfc."
            )
    return ""


def decode_text(data: bytes) -> str:
    """The text of a file that a user wrote: UTF-8, or UTF-16 or UTF-32 with a byte order mark. Drops the mark.

    Bytes that are not UTF-8 become surrogates, as in file names. Raises ValueError for UTF-16 without a mark.
    """
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # before UTF-16, whose mark it begins with
        return data.decode("utf-32")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise ValueError("it holds zero bytes, as UTF-16 does; save it as UTF-8")
    return os.fsdecode(data)
