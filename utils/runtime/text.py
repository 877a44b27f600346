"""Names made printable, for a terminal and for the cells of a table, and texts that users wrote, decoded."""

import codecs
import csv
import io
import os
import sys
import unicodedata
from collections.abc import Collection, Iterable
from typing import Any, TextIO

LONGEST = 2000  # characters of a line
LONGEST_NAME = 60  # characters of a name in a list of names
MARKS = {  # the longer marks first: that of UTF-32 begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
FORMULA = tuple("=+-@\t\r\n'\uff1d\uff0b\uff0d\uff20")  # how a cell begins that a spreadsheet may run; ' marks them


def printable(text: str) -> str:
    """Control characters, and bytes of a name that is no text, as escapes."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def as_line(text: str) -> str:
    """One printable line, the middle of a very long one left out."""
    line = printable(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 4 :]}"


def print_line(text: object, file: TextIO | None = None) -> None:
    """Print one line, whatever the names in it hold."""
    print(as_line(str(text)), file=file or sys.stdout, flush=True)


def as_cell(value: Any) -> Any:
    """A cell of a CSV file; a text that a spreadsheet may take for a formula gets a leading apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def csv_line(values: Iterable[Any]) -> str:
    """A line of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)  # which quotes a carriage return only if lines end in one
    return text.getvalue().removesuffix("\r\n") + "\n"


def csv_table(rows: Iterable[Iterable[Any]]) -> str:
    """A CSV table, a line per row; texts that a spreadsheet may take for a formula get an apostrophe."""
    return "".join(csv_line(map(as_cell, row)) for row in rows)


def from_cell(text: str) -> str:
    """The text that `as_cell` was given."""
    return text.removeprefix("'")


def list_names(names: Collection[str], shown: int = 5) -> str:
    """The first names with commas between, printable and shortened, and the number of the others."""
    first = [printable(name) for name in list(names)[:shown]]
    text = ", ".join(name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name in first)
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"


def canonical(name: str) -> str:
    """The name in Unicode's composed form (NFC), in which names that look the same are equal."""
    return unicodedata.normalize("NFC", name)


def explain_forms(names: Iterable[str], others: Iterable[str]) -> str:
    """A sentence about a name that equals another one but for its Unicode form; "" where there is no such pair."""
    by_form = {canonical(name): name for name in others}
    for name in names:
        other = by_form.get(canonical(name), name)
        if other != name:
            return (
                f" {name!a} and {other!a} look the same but differ in their Unicode form (macOS writes NFD, "
                "other systems NFC): rename one as the other, for example with convmv --nfc."
            )
    return ""


def decode_text(data: bytes) -> str:
    """The text of a file that a user wrote: UTF-8, or with a byte order mark UTF-16 or UTF-32; without the mark.

    Bytes that are no UTF-8 become what they are in file names. Raises ValueError for bytes that are no such text.
    """
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding)
    data = data.removeprefix(codecs.BOM_UTF8)
    if b"\0" in data:
        raise ValueError("it holds zero bytes, as UTF-16 does; save it as UTF-8")
    return os.fsdecode(data)
