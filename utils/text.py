"""Printable forms of arbitrary names, for a terminal and for the cells of a table."""

import argparse
import csv
import io
import sys
from collections.abc import Iterable
from typing import Any, NoReturn, TextIO

LONGEST = 2000  # characters of a line
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


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors show what was typed in a printable form."""

    def error(self, message: str) -> NoReturn:
        super().error(as_line(message))


def as_cell(value: Any) -> Any:
    """A cell of a CSV file; a text that a spreadsheet may take for a formula gets a leading apostrophe."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def csv_line(values: Iterable[Any]) -> str:
    """A line of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(values)  # which quotes a carriage return only if lines end in one
    return text.getvalue().removesuffix("\r\n") + "\n"


def from_cell(text: str) -> str:
    """The text that `as_cell` was given."""
    return text.removeprefix("'")
