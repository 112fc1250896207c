"""Reading of one file by its kind: bytes in, items with text or damage out."""

import io
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

from mtnlg_jax.data.read import charsets, html_warc, json_rows, open_files, rows
from mtnlg_jax.data.read.kinds import HTML, JSON, LINES, PARQUET, TABLE, TEXT, WARC, kind_of
from mtnlg_jax.data.read.open_files import Damaged, File
from mtnlg_jax.data.read.repair import BINARY
from mtnlg_jax.data.read.text_keys import documents_inside, find_key, no_text, text_of

_WITH_KEYS = LINES + JSON + TABLE


class Item(NamedTuple):
    """A document that is not yet checked.

    ``number``: its number in the file, 0 for the whole file. ``text``: its text, a `Damaged` or
    `Skipped` in its place, or None for nothing. ``wrong``: what is wrong with its bytes. ``how``:
    how it was decoded, if that should be reported.
    """

    number: int | str
    text: str | None
    wrong: str | None = None
    how: str | None = None


class Reader:
    """Reads one file.

    ``encoding``: the encoding of the file as the user or a byte order mark names it, "" for UTF-8.
    ``recoded``: Python's name of it, if ``stream`` converts it to UTF-8.
    """

    stream: io.BufferedReader

    def __init__(
        self, file: File, text_key: str | Callable[[object], str], limit: int, encoding: str
    ):
        self.file = file
        self.make_text = text_key if callable(text_key) else None
        self.text_key = "" if callable(text_key) else text_key
        self.limit = limit
        self.named = encoding
        self.kind = kind_of(file.name) or ""
        self.encoding = ""
        self.recoded = ""
        self._number: int | str = 0  # of the last item

    @property
    def source(self) -> str:
        """The name of the file as valid Unicode."""
        return self.file.name.encode("utf-8", "replace").decode()

    @property
    def decoded_from(self) -> str:
        """The encoding from which the file was decoded; "" for UTF-8 and for ASCII alone."""
        raw = self.stream.raw if self.recoded else None
        return self.recoded if isinstance(raw, charsets.Recoded) and raw.changed else ""

    def items(self) -> Generator[Item]:
        """Yield the items of the file; damage takes the place of an item."""
        # A maker that names its columns reads Parquet as well.
        columns = getattr(self.make_text, "columns", None)
        if self.make_text and self.kind not in (_WITH_KEYS + PARQUET if columns else _WITH_KEYS):
            yield Item(0, Damaged(f"pairs and conversations are read from {' '.join(_WITH_KEYS)}"))
            return
        try:
            with open_files.open_file(self.file.path) as raw:
                yield from self._items(raw)
        except open_files.COMPRESSION_ERRORS as error:
            yield Item(
                self._number, Damaged(f"the compressed file is cut short or damaged ({error})")
            )
        except FileNotFoundError:
            if not self.file.linked:
                raise
            yield Item(0, Damaged(f"a link to {self.file.real}, which does not exist"))

    def _items(self, raw: io.BufferedReader) -> Iterator[Item]:
        if self.kind in TEXT:
            yield self.of_text(raw)
        elif self.kind in HTML:
            yield self._of_page(open_files.read_all(raw, self.limit))
        elif self.kind in WARC:
            for number, *rest in html_warc.read_records(raw, self.limit, self.named):
                self._number = number
                yield Item(number, *rest)
        elif self.kind in PARQUET:
            packed = self.file.name.lower().endswith(open_files.PACKED)
            stream = io.BytesIO(raw.read()) if packed else raw
            columns = getattr(self.make_text, "columns", None)
            decode = self._decode if columns else None
            for row in rows.parquet(stream, columns or self._column, decode):
                self._number = row.number
                yield from self._of_row(row) if columns else [self._of_parquet(row)]
        else:
            yield from self._of_rows(self.as_utf8(raw))

    def as_utf8(self, raw: io.BufferedReader) -> io.BufferedReader:
        """Return the stream converted to UTF-8, and set ``encoding`` and ``recoded``."""
        self.stream, self.recoded = charsets.as_utf8(raw, self.named)
        self.encoding = self.named if self.recoded == charsets.known(self.named) else self.recoded
        return self.stream

    def of_text(self, raw: io.BufferedReader) -> Item:
        """Return a text file as a whole."""
        data = open_files.read_all(self.as_utf8(raw), self.limit)
        if isinstance(data, Damaged):
            return Item(0, data)
        if open_files.is_binary(data):
            return Item(0, BINARY)
        try:
            return Item(0, data.decode())
        except UnicodeDecodeError as error:
            wrong = self.wrong_at(data, error.start, data.count(10, 0, error.start))
            return Item(0, data.decode("utf-8", "surrogateescape"), wrong)

    def wrong_at(self, data: bytes, start: int, lines: int) -> str:
        """Describe where a text is not in its encoding; ``lines`` end before that."""
        wrong = f"not {self.encoding}" if self.recoded else charsets.wrong(data, start)
        return f"line {lines + 1:,}: {wrong}"

    def _of_page(self, data: bytes | Damaged) -> Item:
        if isinstance(data, Damaged):
            return Item(0, data)
        page = html_warc.decode_page(data, None, self.named)
        if page.text is None:
            return Item(0, BINARY)
        return Item(0, html_warc.main_text(page.text), page.wrong, page.how)

    def _of_rows(self, stream: io.BufferedReader) -> Iterator[Item]:
        if open_files.is_binary(stream.peek(1 << 12)):
            yield Item(0, BINARY)
            return
        if self.kind in TABLE:
            found = rows.table(stream, self.kind, self.limit)
        elif self.kind in JSON:
            found = json_rows.json_values(stream, self.limit)
        else:
            found = json_rows.json_lines(stream, self.limit)
        for row in found:
            self._number = row.number
            yield from self._of_row(row)

    def _of_row(self, row: rows.Row) -> Iterator[Item]:
        if isinstance(row.value, Damaged):
            yield Item(row.number, row.value)
        elif self.make_text:
            try:
                yield Item(row.number, self.make_text(row.value), row.wrong)
            except ValueError as error:
                yield Item(row.number, Damaged(error))
        elif (inner := documents_inside(row.value, self.text_key, self.kind in JSON)) is not None:
            for number, each in enumerate(inner, 1):
                yield Item(f"{row.number}.{number}", text_of(each, self.text_key), row.wrong)
        else:
            yield Item(row.number, text_of(row.value, self.text_key), row.wrong)

    def _column(self, names: list[str]) -> list[str] | Damaged:
        key = find_key(self.text_key, names)
        return no_text(self.text_key, names) if key is None else [key]

    def _of_parquet(self, row: rows.Row) -> Item:
        if isinstance(row.value, Damaged):
            return Item(row.number, row.value)
        (value,) = row.value.values()
        wrong = None
        if isinstance(value, bytes):
            if len(value) > self.limit:
                return Item(row.number, open_files.too_long(self.limit))
            value, wrong = self._decode(value)
        return Item(row.number, text_of(value, self.text_key), wrong)

    def _decode(self, data: bytes) -> tuple[str, str | None]:
        """Decode a cell as UTF-8, else in the encoding that was named."""
        text, wrong = charsets.decode(data)
        named = charsets.known(self.named)
        if wrong and named:
            self.encoding = self.named
            try:
                return data.decode(named), None
            except UnicodeDecodeError as error:
                wrong = f"byte 0x{data[error.start]:02x} at {error.start:,} is not {self.named}"
        return text, wrong
