"""Rows of tables (.csv, .tsv) and Parquet, one after another.

Each is a `Row`. Damage takes the place of a row, and reading continues after it if possible.
"""

import codecs
import collections
import csv
import io
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

from mtnlg_jax.data.read import charsets, open_files
from mtnlg_jax.data.read.open_files import Damaged

_JOINED_LINES = 1000  # most lines of one row of a .tsv


class Row(NamedTuple):
    """A value of a file of many.

    ``number``: that of its line, item or row, from 1. ``value``: a JSON value, a dict for a row of
    a table, or a `Damaged`. ``wrong``: what is not UTF-8 (`charsets.decode`), or None.
    """

    number: int
    value: Any
    wrong: str | None = None


# --- tables ---------------------------------------------------------------------------------------


def cells(stream: io.BufferedReader, kind: str, limit: int) -> Iterator[Row]:
    """Yield the rows of a .csv or .tsv, including the first, as lists of texts.

    ``number`` is that of the line on which a row begins. .csv follows RFC 4180; if a comma does not
    split the first line and ; or a tab does, that is the separator. .tsv is lines and tabs; quotes
    there are text, except around cells that hold a line end, a tab or doubled quotes.
    """
    lines = _Lines(stream, limit)
    if kind == ".tsv":
        return _Tabbed(lines, limit).rows()
    return _comma_separated(lines, stream, limit)


def table(stream: io.BufferedReader, kind: str, limit: int) -> Iterator[Row]:
    """Yield the rows of a .csv or .tsv as dicts by the names in its first line.

    A row of more cells is `Damaged`; the dict of a shorter one lacks the missing names.
    """
    names = None
    for row in cells(stream, kind, limit):
        if isinstance(row.value, Damaged):
            yield row
        elif names is None:
            names = [name.strip() for name in row.value]
        elif any(cell.strip() for cell in row.value[len(names) :]):
            damage = (
                f"{len(row.value)} cells, and the first line names {len(names)}; put quotes around "
                "a cell that contains a separator"
            )
            yield row._replace(value=Damaged(damage))
        else:
            yield row._replace(value=dict(zip(names, row.value, strict=False)))


class _LineDamage(Exception):
    """Carries the `Damaged` that takes the place of a line."""


class _Lines:
    """Lines as text with their ends, for `csv.reader`.

    ``number``: that of the last line. ``wrong``: what is not UTF-8 in the lines since `start`.
    """

    def __init__(self, stream: io.BufferedReader, limit: int):
        self._lines = open_files.bounded_lines(stream, limit)
        self.number = 0
        self.wrong: str | None = None

    def start(self) -> None:
        self.wrong = None

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if isinstance(line, Damaged):
            raise _LineDamage(line)
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        text, wrong = charsets.decode(line)
        self.wrong = self.wrong or wrong
        return text


def _comma_separated(lines: _Lines, stream: io.BufferedReader, limit: int) -> Iterator[Row]:
    csv.field_size_limit(min(limit, 2**31 - 1))  # the default of 131,072 is less than a document
    text = stream.peek(1 << 12)[: 1 << 12].decode("utf-8", "replace")
    head = text.split("\n", 1)[0].split("\r", 1)[0]
    counts = {mark: len(next(csv.reader([head], delimiter=mark), [])) for mark in ",;\t"}
    mark = "," if counts[","] > 1 else max(counts, key=counts.__getitem__)
    reader = csv.reader(lines, delimiter=mark, strict=True)
    while True:
        begins = lines.number + 1
        lines.start()
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield Row(begins, Damaged(f"not a row of a table ({error}), to line {lines.number}"))
        except _LineDamage as error:
            yield Row(lines.number, error.args[0])
        else:
            if row is None:
                return
            if row:
                yield Row(begins, row, lines.wrong)


class _Line(NamedTuple):
    number: int
    text: str
    wrong: str | None


class _Tabbed:
    """The rows of a .tsv.

    ``width``: cells of the first row. ``quoted``: whether all of its cells are in quotes.
    """

    def __init__(self, lines: _Lines, limit: int):
        self._lines = lines
        self._limit = limit
        self._waiting: collections.deque[_Line | Row] = collections.deque()
        self._width: int | None = None
        self._quoted = False

    def rows(self) -> Iterator[Row]:
        while (line := self._take()) is not None:
            if isinstance(line, Row):
                yield line
            elif line.text.strip():
                yield self._row(line)

    def _take(self) -> _Line | Row | None:
        """Return the next line, the `Row` of a damaged one, or None at the end."""
        if self._waiting:
            return self._waiting.popleft()
        self._lines.start()
        try:
            text = next(self._lines, None)
        except _LineDamage as error:
            return Row(self._lines.number, error.args[0])
        if text is None:
            return None
        return _Line(self._lines.number, text.rstrip("\r\n"), self._lines.wrong)

    def _row(self, line: _Line) -> Row:
        row = line.text.split("\t")
        if self._width is None:
            self._width = len(row)
            self._quoted = all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in row)
        uneven = len(row) != self._width or line.text.count('"') % 2
        if uneven and any(cell.startswith('"') for cell in row):
            found, more = self._join(line, len(row))
            if len(found) == self._width:
                wrong = next((part.wrong for part in more if part.wrong), line.wrong)
                return Row(line.number, found, wrong)
            self._waiting.extendleft(reversed(more))
        return Row(line.number, [_unquoted(cell, self._quoted) for cell in row], line.wrong)

    def _join(self, line: _Line, count: int) -> tuple[list[str], list[_Line | Row]]:
        """Return (cells of a row over several lines or [], the lines after the first).

        Quotes may enclose line ends or tabs; but a line that is a row by itself is not part of
        another, and neither is a damaged one.
        """
        more: list[_Line | Row] = []
        joined = line.text
        try:
            while joined.count('"') % 2 and len(more) < _JOINED_LINES and len(joined) < self._limit:
                following = self._take()
                if following is None:
                    return [], more
                more.append(following)
                if isinstance(following, Row):
                    return [], more
                if following.text.count("\t") + 1 == self._width and count == self._width:
                    return [], more
                joined = f"{joined}\n{following.text}"
            whole = io.StringIO(joined, newline="")
            return next(csv.reader(whole, delimiter="\t", strict=True), []), more
        except csv.Error:
            return [], more


def _unquoted(cell: str, always: bool) -> str:
    """Return a cell as its writer had it.

    Quotes are removed if quotes inside are doubled, or ``always``, because all cells are quoted.
    """
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or inner.replace('""', "").count('"'):
        return cell
    return inner.replace('""', '"') if always or '""' in inner else cell


# --- Parquet --------------------------------------------------------------------------------------


def parquet(
    stream: IO[bytes],
    choose: Callable[[list[str]], list[str] | Damaged],
    decode: Callable[[bytes], tuple[str, str | None]] | None = None,
) -> Iterator[Row]:
    """Yield the rows of a Parquet file as dicts of the columns that ``choose`` selects.

    ``choose`` gets the names of all columns; a `Damaged` result becomes the only row. Strings are
    bytes, because pyarrow refuses those that are not UTF-8; ``decode`` returns their (text, what is
    wrong with it).
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(stream) as file:
            columns = choose(file.schema_arrow.names)
            if isinstance(columns, Damaged):
                yield Row(0, columns)
                return
            for batch in file.iter_batches(batch_size=64, columns=columns):
                parts = [_column_values(column) for column in batch.columns]
                strings = [
                    name
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                    if decode and _is_string(column)
                ]
                for values in zip(*parts, strict=True):
                    number += 1
                    row = dict(zip(batch.schema.names, values, strict=True))
                    yield Row(number, row, _decoded(row, strings, decode) if decode else None)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # a fault of the disk, not of the file
        yield Row(number, Damaged(f"not a readable Parquet file ({str(error).splitlines()[0]})"))


def _column_values(column: Any) -> list:
    import pyarrow

    return (column.cast(pyarrow.large_binary()) if _is_string(column) else column).to_pylist()


def _is_string(column: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)


def _decoded(
    row: dict, names: list[str], decode: Callable[[bytes], tuple[str, str | None]]
) -> str | None:
    """Decode the values of a row under ``names``, and return what is wrong with the first one."""
    first = None
    for name in names:
        if row[name] is not None:
            row[name], wrong = decode(row[name])
            first = first or wrong
    return first
