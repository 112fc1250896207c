"""Values and rows of files of many, one after another: JSON lines, JSON, tables (.csv, .tsv) and
Parquet.

Each is a `Row`. What is damaged stands in its place, and reading goes on behind it where that can
be found.
"""

import codecs
import collections
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mtnlg_jax.data.read import charsets, open_files
from mtnlg_jax.data.read.open_files import Damaged

# strict=False: control characters inside strings are no reason to refuse a text.
_DECODER = json.JSONDecoder(strict=False)
_SEPARATORS = re.compile("[ \t\r\n,\x1e]*")  # U+001E begins the texts of a JSON sequence (RFC 7464)
_READ = 1 << 16  # bytes of JSON at first, and twice as many each time for a long value
_CUT = 16  # characters: an error as near to the end may come from what is not read yet
_SURROGATE = re.compile("[\udc80-\udcff]")
_JOINED_LINES = 1000  # of one row of a .tsv, at most


class Row(NamedTuple):
    """``number`` is that of a line, an item or a row, from 1 on; ``value`` what JSON gives, or
    a dict of a table's row. ``wrong`` says where it is not UTF-8 (`charsets.decode`), or is
    None."""

    number: int
    value: object
    wrong: str | None = None


def json_lines(stream: io.BufferedReader, limit: int) -> Iterator[Row]:
    """A value a line, or several; a line of more than ``limit`` bytes is `Damaged`. What begins
    with a line of one bracket is no JSON lines, whatever it is called, and is read by
    `json_values`."""
    if _first_line(stream) in (b"[", b"{"):
        yield from json_values(stream, limit)
        return
    for number, line in enumerate(open_files.bounded_lines(stream, limit), 1):
        if isinstance(line, Damaged):
            yield Row(number, line)
        elif (line := line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip():
            text, wrong = charsets.decode(line)
            try:
                yield Row(number, _DECODER.decode(text), wrong)
            except (ValueError, RecursionError) as error:
                values = _values_of(text)
                if values is None:
                    yield Row(number, Damaged(f"not valid JSON ({error})"))
                else:
                    yield from (Row(number, value, wrong) for value in values)


def _first_line(stream: io.BufferedReader) -> bytes:
    head = stream.peek(1 << 12)[: 1 << 12].removeprefix(codecs.BOM_UTF8)
    return head.lstrip().split(b"\n", 1)[0].strip()


def _values_of(line: str) -> list | None:
    """The values of a line that holds several, or None."""
    values = []
    start = _SEPARATORS.match(line).end()
    try:
        while start < len(line):
            value, start = _DECODER.raw_decode(line, start)
            values.append(value)
            start = _SEPARATORS.match(line, start).end()
    except (ValueError, RecursionError):
        return None
    return values


def json_values(stream: io.BufferedReader, limit: int) -> Iterator[Row]:
    """All values of a .json file, and for a list among them its items: one list or object, several
    after one another, JSON lines. Only the value that is read is held; one of more than ``limit``
    characters is `Damaged`."""
    return _JsonValues(stream, limit).rows()


class _JsonValues:
    def __init__(self, stream: io.BufferedReader, limit: int):
        self._stream = stream
        self._limit = limit
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""  # what was read, and where the next value is looked for
        self._at = 0
        self._ended = False
        self._error = None
        self._line = 1
        self._indent: str | None = (
            ""  # what stands before a value on its line; None where another value does
        )

    def rows(self) -> Iterator[Row]:
        decode = _DECODER.raw_decode
        inside = False
        number = 0
        size = _READ
        whole = True
        while self._skip_separators():
            first = self._text[self._at]
            if first in "[]" and inside == (first == "]"):
                inside = not inside
                self._indent = None
                self._at = self._at + 1
                continue
            number += 1
            while True:
                reason = None
                try:
                    value, end = decode(self._text, self._at)
                except RecursionError as error:
                    reason = error
                except ValueError as error:
                    reason = error
                    # A number of thousands of digits is a ValueError of another kind.
                    unfinished = isinstance(error, json.JSONDecodeError) and (
                        error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _CUT
                    )
                else:
                    unfinished = (
                        end == len(self._text) and first not in '{["'
                    )  # 12 may be the beginning of 123
                if isinstance(reason, RecursionError) or not unfinished or self._ended:
                    break
                if len(self._text) - self._at > self._limit:
                    reason = open_files.too_long(self._limit)
                    break
                # Twice as much each time: a long value stays linear.
                self._fill(size)
                size = min(2 * size, max(self._limit, _READ))
            size = _READ
            whole = reason is None
            if whole:
                raw = self._text[self._at : end]
                wrong = None
                if not raw.isascii() and (found := _SURROGATE.search(raw)):
                    wrong = charsets.wrong(bytes([ord(found[0]) - 0xDC00]), 0)
                    wrong = wrong.replace(
                        " at 0", f" on line {self._line + raw.count(chr(10), 0, found.start())}"
                    )
                yield Row(
                    number,
                    open_files.too_long(self._limit) if end - self._at > self._limit else value,
                    wrong,
                )
                self._line += raw.count("\n")
                self._at = end
                self._indent = None
                continue
            place = f"line {self._line}"
            lost, again = self._skip_damaged(inside)
            inside = inside and not again
            if not isinstance(reason, Damaged):
                told = str(reason).split(": line ")[0]  # its own place is one of what was held
                reason = (
                    f"not valid JSON on {place} ({told})"
                    if not self._ended or lost != "all"
                    else (f"cut short or damaged on {place} ({told})")
                )
            where = {
                "": "",
                "all": ". What follows it in the list is not read" if inside else "",
                "line": ". What follows it on its line is not read",
            }[lost]
            yield Row(number, Damaged(f"{reason}{where}"))
        if inside and whole:
            yield Row(
                number + 1,
                Damaged(f"the list is cut short: it does not end with ] on line {self._line}"),
            )
        if self._error:
            raise self._error

    def _fill(self, size: int) -> None:
        """Reads ``size`` bytes more, or what is left; what was used is let go."""
        parts = [self._text[self._at :]]
        while size > 0 and not self._ended:
            try:
                data = self._stream.read1(size)
            except open_files.COMPRESSION_ERRORS as error:
                # What came before it is whole, and is read first.
                data = b""
                self._error = error
            self._ended = not data
            parts.append(self._utf8.decode(data, final=self._ended))
            size -= len(data)
        self._text = "".join(parts)
        self._at = 0

    def _skip_separators(self) -> bool:
        """Goes to where the next value begins; False where there is none."""
        while True:
            match = _SEPARATORS.match(self._text, self._at)
            passed = match[0]
            if "\n" in passed:
                self._line += passed.count("\n")
                self._indent = passed[passed.rfind("\n") + 1 :]
            elif self._indent is not None:
                self._indent += passed
            self._at = match.end()
            if self._at < len(self._text):
                return True
            if self._ended:
                return False
            self._fill(_READ)

    def _skip_damaged(self, inside: bool) -> tuple[str, bool]:
        """Goes on to the next line that begins as this one did with a value. (what is lost besides:
        "", "line" or "all"; whether that line begins a list of its own)."""
        own_line = not inside or self._indent is not None
        indent = (self._indent or "") if inside else ""
        begins = re.compile(
            "\n" + re.escape(indent) + (r'(?=[\[{"\]])' if inside and own_line else r"(?=[\[{])")
        )
        while True:
            match = begins.search(self._text, self._at)
            if match:
                self._line += self._text.count("\n", self._at, match.end())
                self._at = match.end()
                self._indent = indent
                return ("" if own_line else "line"), not own_line and self._text[self._at] == "["
            kept = max(self._at, len(self._text) - len(indent) - 1)
            self._line += self._text.count("\n", self._at, kept)
            self._at = kept
            if self._ended:
                self._at = len(self._text)
                return "all", False
            self._fill(_READ)


# --- tables
# ---------------------------------------------------------------------------------------------------


def cells(stream: io.BufferedReader, kind: str, limit: int) -> Iterator[Row]:
    """The rows of a .csv or .tsv, the first one too: a list of texts each. ``number`` is the line
    where a row begins.

    .csv is as RFC 4180 says; where a comma does not divide the first line and ; or a tab does, it
    is that. .tsv is lines and tabs; quotes are text there, save around cells that hold a line end,
    a tab or doubled quotes."""
    lines = _Lines(stream, limit)
    return _tabbed(lines, limit) if kind == ".tsv" else _comma_separated(lines, stream, limit)


def table(stream: io.BufferedReader, kind: str, limit: int) -> Iterator[Row]:
    """The rows of a .csv or .tsv as dicts by the names of its first line. A row of more cells is
    `Damaged`; what a shorter one lacks, its dict lacks."""
    names = None
    for row in cells(stream, kind, limit):
        if isinstance(row.value, Damaged):
            yield row
        elif names is None:
            names = [name.strip() for name in row.value]
        elif any(cell.strip() for cell in row.value[len(names) :]):
            yield row._replace(
                value=Damaged(
                    f"{len(row.value)} cells, and the first line names {len(names)}; a "
                    "separator inside a cell needs quotes around that"
                )
            )
        else:
            yield row._replace(value=dict(zip(names, row.value, strict=False)))


class _LineDamage(Exception):
    """Carries the `Damaged` that stands for a line."""


class _Lines:
    """Lines as text with their ends, for `csv.reader`; ``number`` is that of the last one,
    ``wrong`` what the lines since the last `start` have that is not UTF-8."""

    def __init__(self, stream: io.BufferedReader, limit: int):
        self._lines = open_files.bounded_lines(stream, limit)
        self.number = 0
        self.wrong = None

    def start(self) -> None:
        self.wrong = None

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        if isinstance(line, Damaged):
            raise _LineDamage(line)
        text, wrong = charsets.decode(
            line.removeprefix(codecs.BOM_UTF8) if self.number == 1 else line
        )
        self.wrong = self.wrong or wrong
        return text


def _comma_separated(lines: _Lines, stream: io.BufferedReader, limit: int) -> Iterator[Row]:
    csv.field_size_limit(min(limit, 2**31 - 1))  # 131,072 otherwise, which a document may pass
    head = (
        stream.peek(1 << 12)[: 1 << 12]
        .decode("utf-8", "replace")
        .split("\n", 1)[0]
        .split("\r", 1)[0]
    )
    counts = {mark: len(next(csv.reader([head], delimiter=mark), [])) for mark in ",;\t"}
    mark = "," if counts[","] > 1 else max(counts, key=counts.get)
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


def _tabbed(lines: _Lines, limit: int) -> Iterator[Row]:
    waiting = collections.deque()
    width = None
    quoted = False

    def take() -> tuple[int, str, str | None] | None:
        if waiting:
            return waiting.popleft()
        lines.start()
        text = next(lines, None)
        return None if text is None else (lines.number, text.rstrip("\r\n"), lines.wrong)

    while True:
        try:
            line = take()
        except _LineDamage as error:
            yield Row(lines.number, error.args[0])
            continue
        if line is None:
            return
        number, text, wrong = line
        if not text.strip():
            continue
        row = text.split("\t")
        if width is None:
            width = len(row)
            quoted = all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in row)
        if any(cell.startswith('"') for cell in row) and (len(row) != width or text.count('"') % 2):
            # Line ends or tabs inside quotes, perhaps; but a line that is a row by itself is not
            # part of another.
            more = []
            joined = text
            size = len(text)
            found = []
            try:
                while joined.count('"') % 2 and len(more) < _JOINED_LINES and size < limit:
                    following = take()
                    if following is None:
                        break
                    more.append(following)
                    if following[1].count("\t") + 1 == width and len(row) == width:
                        break
                    joined = f"{joined}\n{following[1]}"
                    size += len(following[1]) + 1
                else:
                    found = next(
                        csv.reader(io.StringIO(joined, newline=""), delimiter="\t", strict=True), []
                    )
            except (csv.Error, _LineDamage):
                found = []
            if len(found) == width:
                yield Row(number, found, next((part[2] for part in more if part[2]), wrong))
                continue
            waiting.extendleft(reversed(more))
        yield Row(number, [_unquoted(cell, quoted) for cell in row], wrong)


def _unquoted(cell: str, always: bool) -> str:
    """A cell as its writer had it: one in quotes with doubled quotes inside, or any in quotes where
    all are."""
    inner = cell[1:-1]
    if len(cell) < 2 or cell[0] != '"' or cell[-1] != '"' or inner.replace('""', "").count('"'):
        return cell
    return inner.replace('""', '"') if always or '""' in inner else cell


# --- Parquet
# --------------------------------------------------------------------------------------------------


def parquet(stream, choose: Callable[[list[str]], list[str] | Damaged]) -> Iterator[Row]:
    """The rows of a Parquet file as dicts of the columns that ``choose`` takes of all names; its
    `Damaged` stands for
    the file. Texts come as bytes: as strings, pyarrow would refuse what is not UTF-8."""
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
                parts = []
                for column in batch.columns:
                    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(
                        column.type
                    ):
                        column = column.cast(pyarrow.large_binary())
                    parts.append(column.to_pylist())
                for values in zip(*parts, strict=True):
                    number += 1
                    yield Row(number, dict(zip(batch.schema.names, values, strict=True)))
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's fault and not the file's
        yield Row(number, Damaged(f"not a readable Parquet file ({str(error).splitlines()[0]})"))
