"""Readers: text, JSON lines, JSON, tables, Parquet, HTML and WARC, plain or compressed, one
`Document` at a time.

What comes out is clean: valid Unicode, LF line ends, no control characters but tab and newline (see
`controls`), never empty. What was repaired, dropped or left out is counted in a `ReadReport`, with
the names of some.
"""

import dataclasses
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mtnlg_jax.data.read import charsets, html_warc, open_files, rows
from mtnlg_jax.data.read.controls import mend_controls
from mtnlg_jax.data.read.open_files import Damaged, File, Skipped

TEXT = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".adoc", ".tex")
LINES = (".jsonl", ".ndjson", ".jsonlines")
JSON = (".json",)
TABLE = (".csv", ".tsv")
PARQUET = (".parquet",)
_HTML = (".html", ".htm", ".xhtml")
_WARC = (".warc", ".wet")
READABLE = (
    " ".join(TEXT + LINES + JSON + TABLE + PARQUET + _HTML + _WARC)
    + " (each also with .gz, .zst, .bz2 or .xz behind it)"
)
MAX_DOCUMENT_BYTES = 256 << 20

# Bytes that are not UTF-8 arrive as U+DC80..U+DCFF ("surrogateescape"); the others come from JSON
# escapes.
_OTHER_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
# No damaged text reaches this share of repaired characters; text in another encoding does.
_SUSPICIOUS_SHARE = 0.05
NAMED = 5  # of each reason, names that a report gives
_REASONS = 1000  # that a report tells apart
_SHOWN = 12  # reasons that a summary gives, the most frequent ones
_PIECE = 8 << 20  # bytes of a long text that are read at once, where it is asked for in pieces
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """``source`` is the path below the folder read, with ``:number`` in files of many (line, item,
    row or record); never absolute. Of a pair, ``text`` is the answer alone and ``prompt`` what
    stands before it. ``continued``: the text goes on in the next `Document`, as of one that was
        asked for in pieces."""

    text: str
    source: str
    prompt: str | None = None
    continued: bool = False


@dataclass
class ReadReport:
    """What became of the input. Counts of documents where nothing else is said."""

    files: int = 0
    skipped_files: int = 0  # files of a folder with an unknown suffix
    left_out: int = (
        0  # of a folder besides: hidden names, links to what is read already or in a circle, pipes
    )
    files_without_text: int = 0  # gave no document, and nothing damaged
    documents: int = 0
    bytes: int = 0  # UTF-8 bytes of the documents that came out
    empty: int = 0  # dropped: nothing but white space, or a page without a main text
    damaged: int = 0  # dropped, with on_error="skip"
    repaired: int = 0  # held what is not UTF-8, or half a pair of surrogates, now U+FFFD
    control_characters: int = 0  # removed, or made a line end or a space (`controls`)
    skipped_records: int = 0  # records of WARC that hold no page: requests, pictures, errors
    # By reason: {"count": how often, "names": some of those it is said of}.
    notes: dict[str, dict] = field(default_factory=dict)

    def note(self, reason: str, name: str) -> None:
        reason = (
            reason if reason in self.notes or len(self.notes) < _REASONS else "for other reasons"
        )
        noted = self.notes.setdefault(reason, {"count": 0, "names": []})
        noted["count"] += 1
        if len(noted["names"]) < NAMED:
            noted["names"].append(name)

    def counts(self) -> dict[str, int]:
        """All but the notes."""
        return {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if each.name != "notes"
        }


def note_lines(notes: dict[str, dict]) -> list[str]:
    """``notes`` of a `ReadReport` for a person, a line for each reason: what was left out, dropped
    or repaired."""
    ordered = sorted(notes.items(), key=lambda item: (-item[1]["count"], item[0]))
    lines = []
    for reason, noted in ordered[:_SHOWN]:
        more = noted["count"] - len(noted["names"])
        named = ", ".join(noted["names"]) + (f" and {more:,} more" if more else "")
        lines.append(f"{noted['count']:,} {reason}: {named}")
    if rest := ordered[_SHOWN:]:
        lines.append(f"{sum(noted['count'] for _, noted in rest):,} for {len(rest)} other reasons")
    return lines


def read_documents(
    path: str | os.PathLike,
    text_key: str | Callable[[object], str] = "text",
    on_error: str = "raise",
    report: ReadReport | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    encoding: str = "",
    pieces: bool = False,
) -> Iterator[Document]:
    """Documents of a file, or of every readable file below a folder in the order of their relative
    paths: `list_files` and `read_file`, which see, in turn. Without a ``report`` its notes are
        logged as warnings.

    Raises FileNotFoundError at once, and ValueError for a file of unknown suffix that was named
    itself; later, unless ``on_error="skip"``, ValueError with the place of a damaged line or file.
    """
    _check(on_error, max_document_bytes, encoding)
    told = ReadReport() if report is None else report
    listed = list_files(path, told)

    def documents() -> Iterator[Document]:
        for file in listed:
            yield from read_file(
                file, text_key, on_error, told, max_document_bytes, encoding, pieces
            )
        if report is None:  # nobody else will tell
            for line in note_lines(told.notes):
                _log.warning("%s: %s", path, line)

    return documents()


def list_files(
    path: str | os.PathLike,
    report: ReadReport | None = None,
    hashed: bool = False,
    kinds: tuple[str, ...] | None = None,
) -> list[File]:
    """The file at a path or fsspec URL (gs://, s3://, memory://, file://), or every readable file
    below a folder, in the order of their relative paths. Links are followed (`open_files.find`).
    ``report`` counts what is left out: hidden names, unknown suffixes, links to what is read
        already. With ``hashed`` each ``stamp`` is the SHA-256 of the
    content, which is then read. ``kinds``: suffixes, where not all that is readable is wanted.

    Raises FileNotFoundError, and ValueError for a file of unknown suffix that was named itself or a
    URL that needs a package. The list of a folder without a readable file is empty.
    """
    wanted = (
        READABLE
        if kinds is None
        else " ".join(kinds) + " (each also with .gz, .zst, .bz2 or .xz behind it)"
    )
    found = open_files.find(path)
    if found is None:
        raise FileNotFoundError(
            f"{path} does not exist; give a file or a folder with any of {wanted}"
        )
    readable = [
        file
        for file in found.files
        if (kind := kind_of(file.name)) and (kinds is None or kind in kinds)
    ]
    if not found.is_folder and not readable:
        raise ValueError(
            f"{found.place} has the suffix {_suffix(found.place)}, which is not read; unpack an archive, "
            f"convert what is not text, rename what is text to .txt. Read is {wanted}"
        )
    if report is not None:
        chosen = {file.name for file in readable}
        for file in found.files:
            if file.name not in chosen:
                report.skipped_files += 1
                report.note(f"files with the suffix {_suffix(file.name)}, not read", file.name)
        for reason, name in found.left_out:
            report.left_out += 1
            report.note(f"left out, {reason}", name)
    if hashed:
        return [
            dataclasses.replace(file, stamp=open_files.content_stamp(file)) for file in readable
        ]
    return readable


def read_file(
    file: File,
    text_key: str | Callable[[object], str] = "text",
    on_error: str = "raise",
    report: ReadReport | None = None,
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    encoding: str = "",
    pieces: bool = False,
) -> Iterator[Document]:
    """The documents of one file of `list_files`; streaming, so that memory is bounded by
    ``max_document_bytes``.

    A text file or HTML page is one document; JSON lines, the values of .json (of a list its items),
    the rows of tables and Parquet and the pages of WARC are one each, the text of the former under
    ``text_key`` (a list of strings there is joined by newlines), or of "text|content" under the
    first that is there. "data.paragraphs.context" goes into objects and lists, which may hold
    several documents. An object of .json without the key, of which one list holds objects with it,
    stands for that list. A function for ``text_key``, as of `pairs.pair_maker`, makes the text of
    each JSON value or row of a table, or raises ValueError saying what is wrong with that.

    ``encoding`` is what the text is in that has no byte order mark, declares nothing and is not
    UTF-8 (`charsets`). With ``pieces`` a text file of more than some megabytes comes as several
    `Document`, all but the last ``continued``.

    What is damaged, binary, without text, not in its encoding or longer than ``max_document_bytes``
    raises ValueError with its place. With ``on_error="skip"`` it is passed over and counted; text
    of which less than 5 % is not in its encoding is kept, with U+FFFD for what is not, and counted.
    """
    _check(on_error, max_document_bytes, encoding)
    report = ReadReport() if report is None else report
    report.files += 1
    before = report.documents + report.damaged
    unit = {".json": "item", ".parquet": "row", ".warc": "record", ".wet": "record"}.get(
        kind_of(file.name), "line"
    )
    reader = _Reader(file, text_key, max_document_bytes, encoding, report)
    reader.whole = not (pieces and reader.is_long_text())
    if not reader.whole:
        yield from reader.pieces(on_error)
    if reader.whole:
        yield from _documents(reader, reader.items(), on_error, file.path, unit)
    if reader.recoded and reader.stream.raw.changed:
        report.note(f"files decoded from {reader.recoded}", file.name)
    if report.documents + report.damaged == before:
        report.files_without_text += 1
        report.note("files without text", file.name)


def _documents(
    reader: "_Reader", items: Iterable["_Item"], on_error: str, path: str, unit: str = "line"
) -> Iterator[Document]:
    report = reader.report
    name = reader.file.name.encode("utf-8", "replace").decode()
    for item in items:
        text = item.text
        source = f"{name}:{item.number}" if item.number else name
        place = f"{path}, {unit} {item.number}" if item.number else path
        prompt = getattr(text, "prompt", None)
        if isinstance(text, Skipped):
            report.skipped_records += 1
            report.note(text, source)
            continue
        if not isinstance(text, Damaged):
            if item.wrong and on_error == "raise":
                wrong = (
                    item.wrong
                    if not reader.encoding or reader.encoding in item.wrong
                    else f"not {reader.encoding}"
                )
                raise ValueError(f"{place}: {wrong}; {charsets.way_out(reader.encoding)}")
            prompt, text = _mended(text or "", prompt, item.wrong, source, report, reader.encoding)
        if isinstance(text, Damaged):
            if on_error == "raise":
                raise ValueError(
                    f"{place}: {text}; mend it, or drop what is damaged with on_error=skip"
                )
            report.damaged += 1
            report.note(_dropped(text), source)
            continue
        if item.how:
            report.note(item.how, source)
        if not text.strip():
            report.empty += 1
            continue
        report.documents += 1
        report.bytes += _size(text) + _size(prompt or "")
        yield Document(text, source, prompt)


def read_stream(
    stream: io.BufferedIOBase,
    name: str = "standard input",
    on_error: str = "raise",
    report: ReadReport | None = None,
    encoding: str = "",
) -> Iterator[Document]:
    """The one document of a stream of text, by the rules of `read_file` for text files."""
    _check(on_error, 1, encoding)
    report = ReadReport() if report is None else report
    report.files += 1
    reader = _Reader(File(name, name + ".txt", 0, ""), "text", MAX_DOCUMENT_BYTES, encoding, report)
    yield from _documents(
        reader, [reader.of_text(io.BufferedReader(io.BytesIO(stream.read())))], on_error, name
    )


def _check(on_error: str, max_document_bytes: int, encoding: str) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is not known; use 'raise' or 'skip'")
    if max_document_bytes < 1:
        raise ValueError(f"max_document_bytes={max_document_bytes} must be at least 1")
    charsets.check(encoding)


def kind_of(name: str) -> str | None:
    """The suffix that says how to read a file, or None; that of the compression does not count."""
    suffix = _suffix(name, packed=False)
    return suffix if suffix in TEXT + LINES + JSON + TABLE + PARQUET + _HTML + _WARC else None


def _suffix(name: str, packed: bool = True) -> str:
    """The suffix in lower case, "(none)" where there is none; with ``packed`` that of the
    compression behind it."""
    stem, suffix = os.path.splitext(os.path.basename(name.lower()))
    if suffix in open_files.PACKED:
        inner = os.path.splitext(stem)[1]
        return inner + suffix if packed else inner
    return suffix or "(none)"


def _mended(
    text: str, prompt: str | None, wrong: str | None, source: str, report: ReadReport, encoding: str
) -> tuple[str | None, str | Damaged]:
    """Prompt and text as they come out; counts what was not in its ``encoding``, "" for UTF-8."""
    repaired = report.repaired
    text, lost = _mend(text, report)
    if prompt is not None:
        prompt, more = _mend(prompt, report)
        lost += more
    if wrong and lost > _SUSPICIOUS_SHARE * (len(text) + len(prompt or "")):
        report.repaired = repaired
        return prompt, _much_of_it(encoding)
    report.repaired = repaired + bool(lost)
    if lost:
        report.note(f"documents with U+FFFD for what is not {encoding or 'UTF-8'}", source)
    return prompt, text


def _dropped(damage: Damaged) -> str:
    """The reason for a report: without what differs from place to place."""
    kind = re.sub(" on line [0-9,]+", "", damage.split(" (")[0].split(" among ")[0])
    return "damaged and dropped, " + re.sub(r"(?<![-\w])\d[\d,]*", "N", kind)[:150]


def _much_of_it(encoding: str) -> Damaged:
    return Damaged(
        f"much of it is not {encoding or 'UTF-8'}; name the right encoding, as in encoding=cp1252"
    )


def _mend(text: str, report: ReadReport) -> tuple[str, int]:
    """(valid text without control characters, how many characters U+FFFD now stands for); counts
    what it does."""
    lost = 0
    if not _is_valid(text):
        before = text.count("\ufffd")
        data = _OTHER_SURROGATES.sub("\ufffd", text).encode("utf-8", "surrogateescape")
        text = data.decode("utf-8", "replace")
        lost = text.count("\ufffd") - before
        report.repaired += 1
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text, mended = mend_controls(text)
    report.control_characters += mended
    return text, lost


def _is_valid(text: str) -> bool:
    """Whether it holds no surrogates; faster than to look for them."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _size(text: str) -> int:
    """In bytes of UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


class _Item(NamedTuple):
    """A document to be: its ``number`` in the file (0: the whole of it), its text, a `Damaged` or
    `Skipped` for it, or None where there is nothing; what is ``wrong`` with its bytes; ``how`` it
    was decoded, where that is to be told."""

    number: int | str
    text: str | None
    wrong: str | None = None
    how: str | None = None


class _Reader:
    """``encoding``: the one that the file is in, as the user or its mark names it, "" for UTF-8;
    ``recoded``: Python's name of it, where ``stream`` turns it into UTF-8. ``whole``: whether its
        text has to be read at once."""

    def __init__(
        self, file: File, text_key: str | Callable, limit: int, encoding: str, report: ReadReport
    ):
        self.file = file
        self.text_key = text_key
        self.limit = limit
        self.named = encoding
        self.report = report
        self.kind = kind_of(file.name)
        self.encoding = self.recoded = ""
        self.whole = True

    def items(self) -> Iterator[_Item]:
        kind = self.kind
        number = 0
        if callable(self.text_key) and kind not in LINES + JSON + TABLE:
            yield _Item(0, Damaged(f"pairs are read from {' '.join(LINES + JSON + TABLE)}"))
            return
        try:
            with open_files.open_file(self.file.path) as raw:
                if kind in PARQUET:
                    stream = (
                        io.BytesIO(raw.read())
                        if self.file.name.lower().endswith(open_files.PACKED)
                        else raw
                    )
                    for row in rows.parquet(stream, self._column):
                        number = row.place
                        yield self._of_parquet(row)
                elif kind in _HTML:
                    yield self._page(open_files.read_all(raw, self.limit))
                elif kind in _WARC:
                    for number, text, wrong, how in html_warc.read_records(
                        raw, self.limit, self.named
                    ):
                        yield _Item(number, text, wrong, how)
                else:
                    if kind in TEXT:
                        yield self.of_text(raw)
                        return
                    stream = self._as_utf8(raw)
                    if open_files.is_binary(stream.peek(1 << 12)):
                        yield _Item(0, _BINARY)
                    else:
                        for row in self._rows(stream):
                            number = row.place
                            yield from self._of_row(row)
        except open_files.COMPRESSION_ERRORS as error:
            yield _Item(number, Damaged(f"the compressed file is cut short or damaged ({error})"))
        except FileNotFoundError:
            if not self.file.linked:
                raise
            yield _Item(0, Damaged(f"a link to {self.file.real}, which does not exist"))

    def _rows(self, stream: io.BufferedReader) -> Iterator[rows.Row]:
        if self.kind in TABLE:
            return rows.table(stream, self.kind, self.limit)
        return (rows.json_values if self.kind in JSON else rows.json_lines)(stream, self.limit)

    def _of_row(self, row: rows.Row) -> Iterator[_Item]:
        value = row.value
        key = self.text_key
        if isinstance(value, Damaged):
            yield _Item(row.place, value)
        elif callable(key):
            try:
                yield _Item(row.place, key(value), row.wrong)
            except ValueError as error:
                yield _Item(row.place, Damaged(error))
        elif (
            isinstance(value, dict)
            and _key_in(key, value) is None
            and (inner := self._inside(value)) is not None
        ):
            for number, each in enumerate(inner, 1):
                yield _Item(f"{row.place}.{number}", _text_of(each, key), row.wrong)
        else:
            yield _Item(row.place, _text_of(value, key), row.wrong)

    def _inside(self, value: dict) -> list | None:
        """What an object holds deeper down that is documents, or None."""
        for key in self.text_key.split("|"):
            parts = key.split(".")
            if len(parts) > 1 and (found := _along(value, parts)):
                return found
        if self.kind not in JSON:
            return None
        lists = [
            each
            for each in value.values()
            if isinstance(each, list)
            and each
            and all(isinstance(item, dict) and _key_in(self.text_key, item) for item in each)
        ]
        return lists[0] if len(lists) == 1 else None

    def _column(self, names: list[str]) -> list[str] | Damaged:
        key = _key_in(self.text_key, names)
        return _no_text(self.text_key, names) if key is None else [key]

    def _of_parquet(self, row: rows.Row) -> _Item:
        if isinstance(row.value, Damaged):
            return _Item(row.place, row.value)
        (value,) = row.value.values()
        wrong = None
        if isinstance(value, bytes):
            if len(value) > self.limit:
                return _Item(row.place, open_files.too_long(self.limit))
            value, wrong = self._decode(value)
        return _Item(row.place, _text_of(value, self.text_key), wrong)

    def _decode(self, data: bytes) -> tuple[str, str | None]:
        """Of a cell that is not UTF-8, by the encoding that was named."""
        text, wrong = charsets.decode(data)
        if wrong and self.named:
            self.encoding = self.named
            try:
                return data.decode(charsets.known(self.named)), None
            except UnicodeDecodeError as error:
                wrong = f"byte 0x{data[error.start]:02x} at {error.start:,} is not {self.named}"
        return text, wrong

    def _as_utf8(self, raw: io.BufferedReader) -> io.BufferedReader:
        self.stream, self.recoded = charsets.as_utf8(raw, self.named)
        self.encoding = self.named if self.recoded == charsets.known(self.named) else self.recoded
        return self.stream

    def of_text(self, raw: io.BufferedReader) -> _Item:
        """A text as a whole."""
        data = open_files.read_all(self._as_utf8(raw), self.limit)
        if isinstance(data, Damaged):
            return _Item(0, data)
        if open_files.is_binary(data):
            return _Item(0, _BINARY)
        try:
            return _Item(0, data.decode())
        except UnicodeDecodeError as error:
            wrong = self._wrong(data, error.start, data.count(10, 0, error.start))
            return _Item(0, data.decode("utf-8", "surrogateescape"), wrong)

    def _wrong(self, data: bytes, start: int, lines: int) -> str:
        """Where a text is not in its encoding; ``lines`` lie before."""
        return f"line {lines + 1:,}: {f'not {self.encoding}' if self.recoded else charsets.wrong(data, start)}"

    def is_long_text(self) -> bool:
        """Whether it is text that is worth reading in pieces."""
        if self.kind not in TEXT or callable(self.text_key):
            return False
        if not self.file.name.lower().endswith(open_files.PACKED):
            return self.file.size > _PIECE
        try:
            with open_files.open_file(self.file.path) as stream:
                return isinstance(open_files.read_all(stream, _PIECE), Damaged)
        except (*open_files.COMPRESSION_ERRORS, FileNotFoundError):
            return False

    def pieces(self, on_error: str) -> Iterator[Document]:
        """As `items` would have it read, but twice: to see whether it is text at all, and then
        piece by piece. Nothing where it turns out that the text must be read as a ``whole``."""
        size = controls = characters = lost = lines = 0
        text = False
        wrong = None
        damage = None
        try:
            for data in self._cut():
                size += len(data)
                controls += open_files.controls(data)
                try:
                    piece = data.decode()
                except UnicodeDecodeError as error:
                    wrong = wrong or self._wrong(
                        data, error.start, lines + data.count(10, 0, error.start)
                    )
                    piece = data.decode("utf-8", "surrogateescape")
                lines += data.count(10)
                if _C1.search(piece):
                    self.whole = True
                    return
                piece, more = _mend(piece, ReadReport())
                lost += more
                characters += len(piece)
                text = text or bool(piece.strip())
                if size > self.limit:
                    damage = open_files.too_long(self.limit)
                    break
        except open_files.COMPRESSION_ERRORS as error:
            damage = Damaged(f"the compressed file is cut short or damaged ({error})")
        if damage is None and controls > max(8, 0.01 * size):
            damage = _BINARY
        source = self.file.name.encode("utf-8", "replace").decode()
        place = self.file.path
        if damage is None and wrong and on_error == "raise":
            raise ValueError(f"{place}: {wrong}; {charsets.way_out(self.encoding)}")
        if damage is None and lost > _SUSPICIOUS_SHARE * characters:
            damage = _much_of_it(self.encoding)
        if damage is not None:
            if on_error == "raise":
                raise ValueError(
                    f"{place}: {damage}; mend it, or drop what is damaged with on_error=skip"
                )
            self.report.damaged += 1
            self.report.note(_dropped(damage), source)
            return
        if not text:
            self.report.empty += 1
            return
        self.report.documents += 1
        if lost:
            self.report.note(
                f"documents with U+FFFD for what is not {self.encoding or 'UTF-8'}", source
            )
        repaired = self.report.repaired
        held = None
        for data in self._cut():
            piece, _ = _mend(data.decode("utf-8", "surrogateescape"), self.report)
            self.report.bytes += _size(piece)
            if not piece:  # nothing but what was removed
                continue
            if held:
                yield Document(held, source, continued=True)
            held = piece
        self.report.repaired = repaired + bool(lost)
        yield Document(held, source)

    def _cut(self) -> Iterator[bytes]:
        """The text as UTF-8 in pieces that end with a line where there are lines: what lies on both
        sides of an end says nothing about each other."""
        with open_files.open_file(self.file.path) as raw:
            stream = self._as_utf8(raw)
            rest = b""
            while data := stream.read(_PIECE):
                data = rest + data
                end = data.rfind(b"\n") + 1
                if not end:
                    # Never inside a character, nor between CR and LF.
                    end = len(data) - 1
                    while end > 1 and (data[end] & 0xC0 == 0x80 or data[end - 1] == 13):
                        end -= 1
                yield data[:end]
                rest = data[end:]
            if rest:
                yield rest

    def _page(self, data: bytes | Damaged) -> _Item:
        if isinstance(data, Damaged):
            return _Item(0, data)
        page = html_warc.decode_page(data, None, self.named)
        if page.text is None:
            return _Item(0, _BINARY)
        return _Item(0, html_warc.main_text(page.text), page.wrong, page.how)


# How these are read depends on what else stands in a text (`controls`).
_C1 = re.compile("[\x80-\x9f]")
_BINARY = Damaged(
    "binary data and not text (text in UTF-16 without a byte order mark needs its encoding named, as in "
    "encoding=utf-16-le)"
)


def _text_of(value, text_key: str) -> str | None:
    """The text of a JSON value or row: a string, or what an object holds under the key."""
    if isinstance(value, dict):
        key = _key_in(text_key, value)
        if key is None:
            return _no_text(text_key, value)
        value = value[key]
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if value is None or isinstance(value, str):
        return value
    return Damaged(f"{text_key!r} holds {type(value).__name__}, not text")


def _along(value, parts: list[str]) -> list:
    """What lies at the end of a path of keys, through the lists on the way."""
    if not parts:
        return [] if value is None else [value]
    if isinstance(value, list):
        return [found for each in value for found in _along(each, parts)]
    return (
        _along(value[parts[0]], parts[1:]) if isinstance(value, dict) and parts[0] in value else []
    )


def _key_in(text_key: str, names: Iterable[str]) -> str | None:
    return next((key for key in text_key.split("|") if key in names), None)


def _no_text(text_key: str, names: Iterable[str]) -> Damaged:
    return Damaged(
        f"no {text_key!r} among {', '.join(list(names)[:8])}; name the right one with text_key"
    )
