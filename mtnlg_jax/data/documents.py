"""Readers: text, JSON lines, JSON lists, Parquet, HTML and WARC, plain or compressed, one `Document` at a time.

What comes out is clean: valid Unicode, LF line ends, no control characters but tab and newline (see `controls`), never
empty.
What was mended or dropped is counted in a `ReadReport`.
"""

import dataclasses
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from mtnlg_jax.data import files, web
from mtnlg_jax.data.controls import mend_controls
from mtnlg_jax.data.files import Damaged, File

_TEXT, _LINES, _JSON, _PARQUET = (".txt", ".md", ".text"), (".jsonl", ".ndjson"), (".json",), (".parquet",)
_HTML, _WARC = (".html", ".htm"), (".warc", ".wet")
READABLE = ".txt .md .text .jsonl .ndjson .json .html .htm .warc .wet (each also with .gz or .zst) .parquet"
MAX_DOCUMENT_BYTES = 256 << 20

_SURROGATES = re.compile("[\ud800-\udfff]")
# Bytes that are not UTF-8 arrive as U+DC80..U+DCFF ("surrogateescape"); the others come from JSON escapes.
_OTHER_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
# No damaged text reaches this share of repaired characters; text in another encoding does.
_SUSPICIOUS_SHARE = 0.05
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """``source`` is the path below the folder read, with ``:number`` in files of many (line, item, row or record);
    never absolute. Of a pair, ``text`` is the answer alone and ``prompt`` what stands before it."""

    text: str
    source: str
    prompt: str | None = None


@dataclass
class ReadReport:
    """What became of the input. Counts of documents where nothing else is said."""

    files: int = 0
    skipped_files: int = 0  # files of a folder with an unknown suffix
    documents: int = 0
    bytes: int = 0  # UTF-8 bytes of the documents that came out
    empty: int = 0  # dropped: nothing but white space, or a page without a main text
    damaged: int = 0  # dropped, with on_error="skip"
    repaired: int = 0  # held invalid UTF-8, now U+FFFD
    control_characters: int = 0  # removed, or made a line end or a space (`controls`)
    skipped_records: int = 0  # records of WARC that hold no page: requests, pictures, errors


def read_documents(path: str | os.PathLike, text_key: str | Callable[[object], str] = "text", on_error: str = "raise",
                   report: ReadReport | None = None,
                   max_document_bytes: int = MAX_DOCUMENT_BYTES) -> Iterator[Document]:
    """Documents of a file, or of every readable file below a folder in the order of their relative paths: `list_files`
    and `read_file`, which see, in turn.

    Raises FileNotFoundError at once, and ValueError for a file of unknown suffix that was named itself;
    later, unless ``on_error="skip"``, ValueError with the place of a damaged line or file.
    """
    _check(on_error, max_document_bytes)
    report = ReadReport() if report is None else report
    listed = list_files(path, report)
    return (document for file in listed for document in read_file(file, text_key, on_error, report, max_document_bytes))


def list_files(path: str | os.PathLike, report: ReadReport | None = None, hashed: bool = False) -> list[File]:
    """The file at a path or fsspec URL (gs://, s3://, memory://, file://), or every readable file below a folder, in
    the order of their relative paths; hidden ones are left out, others of unknown suffix counted in ``report``. With
    ``hashed`` each ``stamp`` is the SHA-256 of the content, which is then read.

    Raises FileNotFoundError, and ValueError for a file of unknown suffix that was named itself or a URL that needs a
    package. The list of a folder without a readable file is empty.
    """
    found = files.find(path)
    if found is None:
        raise FileNotFoundError(f"{path} does not exist; give a file or a folder with any of {READABLE}")
    place, is_folder, listed = found
    readable = [file for file in listed if _kind(file.name)]
    if not is_folder and not readable:
        raise ValueError(f"{place} has an unknown suffix; rename it to one of {READABLE}")
    if skipped := len(listed) - len(readable):
        if report is not None:
            report.skipped_files += skipped
        _log.warning("%s: skipped %d files; what is read is %s", place, skipped, READABLE)
    if hashed:
        return [dataclasses.replace(file, stamp=files.content_stamp(file)) for file in readable]
    return readable


def read_file(file: File, text_key: str | Callable[[object], str] = "text", on_error: str = "raise",
              report: ReadReport | None = None, max_document_bytes: int = MAX_DOCUMENT_BYTES) -> Iterator[Document]:
    """The documents of one file of `list_files`; streaming, so that memory is bounded by ``max_document_bytes``.

    A text file or HTML page is one document; JSON lines, the items of a JSON list, the rows of Parquet and the pages
    of WARC are one each, the text of the former under ``text_key`` (a list of strings there is joined by newlines),
    or of "text|content" under the first that is there.
    A function for ``text_key``, as of `pairs.pair_maker`, makes the text of each JSON value, or raises ValueError
    saying what is wrong with that.

    What is damaged, binary, without text or longer than ``max_document_bytes`` raises ValueError with its place, or
    with ``on_error="skip"`` is passed over and counted.
    """
    _check(on_error, max_document_bytes)
    report = ReadReport() if report is None else report
    report.files += 1
    unit = {".json": "item", ".parquet": "row", ".warc": "record", ".wet": "record"}.get(_kind(file.name), "line")
    for number, text in _read(file, text_key, max_document_bytes, report):
        if isinstance(text, Damaged):
            if on_error == "raise":
                place = f"{file.path}, {unit} {number}" if number else file.path
                raise ValueError(f"{place}: {text}; mend it, or drop what is damaged with on_error=skip")
            report.damaged += 1
            continue
        source = file.name.encode("utf-8", "replace").decode() + (f":{number}" if number else "")
        prompt, text = getattr(text, "prompt", None), _clean(text or "", source, report)
        if text and prompt is not None:
            prompt = _mend(prompt, source, report)
            report.bytes += len(prompt.encode())
        if text:
            yield Document(text, source, prompt)


def _check(on_error: str, max_document_bytes: int) -> None:
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is not known; use 'raise' or 'skip'")
    if max_document_bytes < 1:
        raise ValueError(f"max_document_bytes={max_document_bytes} must be at least 1")


def _kind(name: str) -> str | None:
    """The suffix that says how to read a file, or None; that of the compression does not count."""
    stem, suffix = os.path.splitext(name.lower())
    packed = suffix in (".gz", ".zst")
    suffix = os.path.splitext(stem)[1] if packed else suffix
    return suffix if suffix in _TEXT + _LINES + _JSON + _HTML + _WARC + (() if packed else _PARQUET) else None


def _clean(text: str, source: str, report: ReadReport) -> str:
    """Valid text without control characters, or "" where nothing is left; counts what it does."""
    text = _mend(text, source, report)
    if not text.strip():
        report.empty += 1
        return ""
    report.documents += 1
    report.bytes += len(text.encode())
    return text


def _mend(text: str, source: str, report: ReadReport) -> str:
    if _SURROGATES.search(text):
        before = text.count("\ufffd")
        data = _OTHER_SURROGATES.sub("\ufffd", text).encode("utf-8", "surrogateescape")
        text = data.decode("utf-8", "replace")
        report.repaired += 1
        if text.count("\ufffd") - before > _SUSPICIOUS_SHARE * len(text):
            _log.warning("%s: much of it is not UTF-8; if it is in another encoding, convert it first, "
                         "as in `iconv -f GB18030 -t UTF-8`", source)
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text, mended = mend_controls(text)
    report.control_characters += mended
    return text


def _read(file: File, text_key: str, limit: int, report: ReadReport) -> Iterator[tuple[int, str | None]]:
    """(number, text) of each document, number 0 for a whole file; `Damaged` where a text should be."""
    kind, number = _kind(file.name), 0
    if callable(text_key) and kind not in _LINES + _JSON:
        yield 0, Damaged("pairs are read from .jsonl, .ndjson and .json")
        return
    try:
        with files.open_file(file.path) as stream:
            if kind in _PARQUET:
                yield from _read_parquet(stream, text_key, limit)
            elif kind in _TEXT + _HTML:
                data = files.read_all(stream, limit)
                if not isinstance(data, Damaged):
                    data = web.page_text(data) if kind in _HTML else None if files.is_binary(data) else _decode(data)
                yield 0, _BINARY if data is None else data
            elif kind in _WARC:
                for number, text in web.read_records(stream, limit):
                    report.skipped_records += text is None
                    if text is not None:
                        yield number, text
            elif files.is_binary(stream.peek(1 << 12)):
                yield 0, _BINARY
            else:
                values = _read_json_list(stream, limit) if _is_json_list(kind, stream) else _read_lines(
                    stream, kind, limit)
                for number, value in values:
                    yield number, value if isinstance(value, Damaged) else _text_of(value, text_key)
    except files.COMPRESSION_ERRORS as error:
        yield number, Damaged(f"the compressed file is cut short or damaged ({error})")


_BINARY = Damaged("binary data and not text (if it is text in UTF-16, convert it, as in `iconv -f UTF-16 -t UTF-8`)")


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _text_of(value, text_key: str) -> str | None:
    """The text of a JSON value: a string, or what an object holds under the key."""
    if callable(text_key):
        try:
            return text_key(value)
        except ValueError as error:
            return Damaged(error)
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


def _key_in(text_key: str, names: Iterable[str]) -> str | None:
    return next((key for key in text_key.split("|") if key in names), None)


def _no_text(text_key: str, names: Iterable[str]) -> Damaged:
    return Damaged(f"no {text_key!r} among {', '.join(list(names)[:8])}; name the right one with text_key")


def _read_lines(stream: io.BufferedReader, kind: str, limit: int) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(files.bounded_lines(stream, limit), 1):
        if kind in _JSON and number == 1 and line.strip() in (b"{", b"\xef\xbb\xbf{"):
            rest = files.read_all(stream, limit)  # a .json file with one object, spread over lines
            line = rest if isinstance(rest, Damaged) else line + rest
        if isinstance(line, Damaged):
            yield number, line
        elif (line := line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip():
            try:
                # strict=False: control characters inside strings are no reason to refuse a text.
                yield number, json.loads(_decode(line), strict=False)
            except (ValueError, RecursionError) as error:
                yield number, Damaged(f"not valid JSON ({error})")


def _is_json_list(kind: str, stream: io.BufferedReader) -> bool:
    return kind in _JSON and stream.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _read_json_list(stream: io.BufferedReader, limit: int) -> Iterator[tuple[int, object]]:
    """The items of one list, without ever holding the list."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    decoder = json.JSONDecoder(strict=False)
    buffer, number, size = text.read(1 << 16).lstrip()[1:], 1, 1 << 16
    while True:
        buffer = buffer.lstrip(" \t\r\n,") if number > 1 else buffer.lstrip()
        if buffer.startswith("]"):
            return
        try:
            value, end = decoder.raw_decode(buffer)
        except (ValueError, RecursionError) as error:
            if len(buffer) > limit:
                yield number, Damaged(f"{files.too_long(limit)}. What follows it in the list is not read")
                return
            more = text.read(size)
            if not more:
                # Where one item is damaged, the start of the next cannot be told.
                yield number, Damaged(f"the list is cut short or damaged here ({error})")
                return
            # Twice as much each time: a long item stays linear.
            buffer, size = buffer + more, min(2 * size, limit)
            continue
        yield number, files.too_long(limit) if end > limit else value
        buffer, number, size = buffer[end:], number + 1, 1 << 16


def _read_parquet(stream: io.BufferedReader, text_key: str, limit: int) -> Iterator[tuple[int, str | None]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            key = _key_in(text_key, names)
            if key is None:
                yield 0, _no_text(text_key, names)
                return
            for batch in file.iter_batches(batch_size=64, columns=[key]):
                column = batch.column(0)
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                    # As strings, pyarrow would refuse invalid UTF-8 instead of letting us repair it.
                    column = column.cast(pyarrow.large_binary())
                for value in column.to_pylist():
                    number += 1
                    if isinstance(value, bytes):
                        value = files.too_long(limit) if len(value) > limit else _decode(value)
                    yield number, value if isinstance(value, Damaged) else _text_of(value, text_key)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's fault and not the file's
        yield number, Damaged(f"not a readable Parquet file ({str(error).splitlines()[0]})")
