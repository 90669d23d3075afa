"""CSV files of numbers to Arrow tables, with the place of whatever spoils them."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv as pacsv

from fmtune.errors import DataError
from fmtune.files import File

_BLOCK_BYTES = 2**20
"""Text that pyarrow takes in at a time."""
_CELL_BYTES = 8
"""Characters of a value at most, but for a label's: pixels have three, a comma, and perhaps spaces or quotes."""


@dataclass(frozen=True)
class Csv:
    """A CSV file of images, as its first line shows it.

    Attributes:
        file: the file.
        header: names of the columns, None where the first line is already data.
        width: number of columns.
        label: position of the label's column, None if there is none.
        ignores_labels: whether that column is left out of the tables, whatever it holds.
    """

    file: File
    header: list[str] | None
    width: int
    label: int | None
    ignores_labels: bool = False

    @property
    def kept_label(self) -> int | None:
        """Position of the label's column in the tables."""
        return None if self.ignores_labels else self.label

    def parse(self, stream: Any, *, has_header: bool) -> pa.Table:
        """A table of the file's columns, pixels uint8 and labels int64, from a stream of some of its lines.

        Without the labels where they are ignored.

        Args:
            stream: what pyarrow reads, of whole lines.
            has_header: the first line is that of the names, if the file has one.

        Raises:
            DataError: a cell is not as it must be, or there is no row; the place is counted in the whole file.
        """
        names = [f"c{i}" for i in range(self.width)]
        types = {name: pa.int64() if position == self.label else pa.uint8() for position, name in enumerate(names)}
        if self.label is not None and self.ignores_labels:
            del types[names[self.label]]
        skipped = 1 if has_header and self.header is not None else 0
        try:
            table = pacsv.read_csv(
                stream,
                # A row must fit into a block of what is read at a time.
                read_options=pacsv.ReadOptions(
                    column_names=names, skip_rows=skipped, block_size=max(_BLOCK_BYTES, _CELL_BYTES * self.width)
                ),
                convert_options=pacsv.ConvertOptions(column_types=types, include_columns=list(types)),
            )
        except pa.ArrowInvalid as error:
            raise self._find_error(str(error)) from None
        if any(column.null_count for column in table.columns) and table.num_rows:
            raise self._find_error("a value is missing")
        if table.num_rows == 0:
            raise DataError(f"{self.file.place}: no rows below the header; expected one image a row")
        return table

    def _find_error(self, reason: str) -> DataError:
        """The first cell that spoils the file; the fast parser names neither its line nor its column for sure."""
        line = 0
        with self.file.open() as stream:
            for line, row in enumerate(_rows(stream, self.file.place), start=1):
                problem = None if line == 1 and self.header is not None else self._find_row_error(row)
                if problem is not None:
                    return DataError(f"{self.file.place}:{line}: {problem}")
        if line == 1 and self.header is not None:
            return DataError(f"{self.file.place}: no rows below the header; expected one image a row")
        return DataError(f"{self.file.place}: {reason}")

    def _find_row_error(self, row: list[str]) -> str | None:
        if not row:
            return None
        if len(row) != self.width:
            return f"{len(row)} values; expected {self.width}, as in the first line"
        for position, value in enumerate(row):
            if position == self.label and self.ignores_labels:
                continue
            column = f"column {position}" if self.header is None else f"column {self.header[position]}"
            if not _is_integer(value):
                return f"{column}: {value!r}; expected an integer"
            if position == self.label and abs(int(value)) >= 2**63:
                return f"{column}: {value}; expected an integer of 64 bits"
            if position != self.label and not 0 <= int(value) <= 255:
                return f"{column}: {value}; expected a pixel from 0 to 255"
        return None


def read_header(file: File) -> tuple[list[str] | None, int]:
    """The names of the columns, or None where the first line is already data; and the number of columns.

    Raises:
        DataError: the file is empty, or has one column.
    """
    with file.open() as stream:
        first = next(_rows(stream, file.place), None)
    if first is None:
        raise DataError(f"{file.place}: the file is empty; expected a line of column names or of numbers")
    if len(first) < 2:
        raise DataError(f"{file.place}:1: one column only; expected a label and pixels, separated by commas")
    if len(set(first)) < len(first) and not any(map(_is_number, first)):
        double = next(name for name in first if first.count(name) > 1)
        raise DataError(f"{file.place}:1: two columns are called {double!r}; expected names that differ")
    # Names of columns differ from one another; a row of numbers with a word among them is a spoiled row. pandas numbers
    # columns that have no names.
    is_named = not all(map(_is_integer, first)) and len(set(first)) == len(first)
    is_header = is_named or (len(first) > 2 and first == [str(position) for position in range(len(first))])
    return (first if is_header else None), len(first)


def _rows(stream: IO[bytes], place: str) -> Iterator[list[str]]:
    lines = (
        line.decode("utf-8-sig" if number == 0 else "utf-8", "replace") for number, line in enumerate(_lines(stream))
    )
    try:
        yield from csv.reader(lines)
    except csv.Error as error:
        raise DataError(f"{place}: no CSV ({error}); expected lines that end in LF, of values with commas") from None


def _lines(stream: Any) -> Iterator[bytes]:
    """Lines of a pyarrow stream, which cannot be iterated over by itself."""
    rest = b""
    while block := stream.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _is_integer(value: str) -> bool:
    """Whether Arrow reads it as one: no plus sign, no underscores."""
    return re.fullmatch(r"\s*-?\d+\s*", value, re.ASCII) is not None
