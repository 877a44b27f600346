"""Tables of images that users wrote: CSV or TSV files with one image a row."""

import csv
import hashlib
import io
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from utils.runtime.command_line import closest
from utils.runtime.errors import UserError
from utils.runtime.reading import read_bytes
from utils.runtime.text import decode_text, list_names

# Usual column names, lower-case, without separators.
IMAGE_COLUMNS = {
    *("image", "img", "imagepath", "imgpath", "imagefile", "imagename", "imageid", "path", "file", "filename"),
    *("filepath", "dicom", "dicompath", "picture"),
}
MOST_BYTES = 2**30  # of a table
WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # first bytes of .xlsx or .ods, and of .xls


class Table:
    """The header of a table, and its rows one at a time.

    Encoding: UTF-8, or UTF-16 or UTF-32 with a byte order mark. The separator is a tab in .tsv and .tab files, else
    whichever of comma, semicolon and tab is most frequent in the header. Raises UserError for an unreadable or empty
    table.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            data = read_bytes(path, MOST_BYTES)
            if data.startswith(WORKBOOKS):
                raise UserError(f"{path}: is a workbook, not a CSV or TSV file; save its sheet as CSV UTF-8.")
            self._text = decode_text(data)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path}: cannot be read ({reason}); expected a CSV or TSV file.") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        first = next(io.StringIO(self._text), "")
        separators = ["\t"] if path.suffix.lower() in (".tsv", ".tab") else [",", ";", "\t"]
        self._separator = max(separators, key=first.count)
        self.columns = [name.strip() for name in next((cells for _, cells in self._lines()), [])]
        if not any(self.columns):
            reason = "its first line is empty" if self._text.strip() else "is empty"
            raise UserError(f"{path}: {reason}; expected a first line with the names of the columns.")

    def column(self, given: str | None, flag: str, usual: Collection[str], meaning: str) -> str:
        """The column that a flag names, or without one the only column with a usual name.

        meaning: what the column holds, for messages. Raises UserError if there is no such column, or more than one.
        """
        named = [name for name in self.columns if name == given]
        if given is None:
            named = [name for name in self.columns if re.sub(r"[\s_.-]", "", name).lower() in usual]
        columns = f"its columns are {list_names(self.columns, shown=30)}"
        if len(self.columns) == 1:
            separators = "tabs" if self.path.suffix.lower() in (".tsv", ".tab") else "commas, semicolons or tabs"
            columns = f"its only column is {list_names(self.columns)}; expected columns separated by {separators}"
        if len(named) == 1:
            return named[0]
        if given is not None:
            hint = "" if named else closest(given, self.columns)
            number = f"{len(named)} columns" if named else "no column"
            raise UserError(f"{self.path}: has {number} {given!r} ({flag}); {hint + ' ' if hint else ''}{columns}.")
        problem = f"no column has a usual name for {meaning}"
        if named:
            problem = f"several columns may hold {meaning} ({list_names(named)})"
        raise UserError(f"{self.path}: {problem}; give {flag} COLUMN; {columns}.")

    def cells(self, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        """Line number and the cells of these columns for each row; rows without any text are skipped.

        Raises UserError for a row with fewer or more cells than the header.
        """
        positions = [self.columns.index(name) for name in columns]
        lines = self._lines()
        next(lines)
        for line, cells in lines:
            if not any(cells):
                continue
            if len(cells) < len(self.columns) or any(cells[len(self.columns) :]):
                raise UserError(
                    f"{self.path}, line {line}: has {len(cells)} cells, where the header has {len(self.columns)}; put "
                    "cells that hold the separator in double quotes."
                )
            yield line, [cells[position] for position in positions]

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        rows = csv.reader(io.StringIO(self._text, newline=""), delimiter=self._separator, strict=True)
        try:
            for cells in rows:
                yield rows.line_num, cells
        except csv.Error as error:
            raise UserError(f"{self.path}, line {rows.line_num}: cannot be read ({error}); save it as CSV.") from None
