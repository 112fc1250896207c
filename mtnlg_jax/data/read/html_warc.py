"""The text of web pages: HTML by trafilatura, and the records of WARC and WET by warcio."""

import contextlib
import functools
import io
import logging
import re
import types
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from mtnlg_jax.data.read import charsets, markup
from mtnlg_jax.data.read.open_files import Damaged, Skipped, ZstdFile, is_binary, read_all, too_long

_CHARSET = re.compile(rb"<meta[^>]{0,400}?charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.IGNORECASE)
GUESSED = "pages that declare no encoding and are not UTF-8, read as cp1252 or by a guess"
_BEYOND_ASCII = re.compile(rb"[\x80-\xff]+")
_RUN = 2.5  # bytes beyond ASCII in a row, on an average, from which on a script is not Latin
NO_PAGE = Skipped("records of WARC that are no answer with a page (requests, metadata)")
NOT_HTML = Skipped("records of WARC that are not HTML")
NOT_FOUND = Skipped("records of WARC whose HTTP status is not 200")
_BEGINNINGS = re.compile(
    rb"\s*(<!--.{0,2000}?-->\s*|<\?xml[^>]{0,200}\?>\s*)*"
    rb"<(!doctype html|html|head|body|title|meta|script|style|div|p|h1|table|a|br)[\s>/]",
    re.IGNORECASE | re.DOTALL,
)
_HTML_TYPES = ("text/html", "application/xhtml+xml")


class Page(NamedTuple):
    """A page as text, None where it is binary; what is ``wrong`` with its bytes, and ``how`` it was
    decoded, where that is to be told."""

    text: str | None
    wrong: str | None = None
    how: str | None = None


def page_text(data: bytes, charset: str | None = None) -> str | None:
    """The `main_text` of `decode_page`; None for binary data."""
    page = decode_page(data, charset)
    return page.text if page.text is None else main_text(page.text)


def decode_page(data: bytes, charset: str | None = None, encoding: str = "") -> Page:
    """An HTML page as text: by its byte order mark, else ``charset`` (of the HTTP header), else
    what the page declares; where that fails or nothing is declared, as UTF-8, else in ``encoding``,
    else as cp1252 or by a guess of trafilatura's. What cannot be decoded becomes U+FFFD."""
    marked = charsets.marked(data)
    if (marked or "utf-8").startswith("utf-8") and is_binary(data):
        return Page(None)
    found = _CHARSET.search(data, 0, 4096)
    declared = marked or _declared(charset) or (_declared(found[1].decode()) if found else None)
    wrong = None
    for name in (
        declared,
        None if marked else "utf-8",
        charsets.known(encoding) if encoding else None,
    ):
        try:
            if name:
                return Page(data.decode(name))
        except UnicodeDecodeError as error:
            wrong = (
                wrong or f"byte 0x{data[error.start]:02x} at {error.start:,} is not {name.upper()}"
            )
    if declared:
        return Page(data.decode(declared, "replace"), wrong)
    runs = _BEYOND_ASCII.findall(data)
    if sum(map(len, runs)) < _RUN * len(runs):
        # Single letters between others: a Latin script, for which a guess is wrong more often than
        # what browsers take.
        with contextlib.suppress(UnicodeDecodeError):
            return Page(data.decode("cp1252"), None, GUESSED)
    return Page(_trafilatura()[1](data), None, GUESSED)


def main_text(page: str) -> str:
    """The main text of an HTML page, "" where it has none: no menus, comments, scripts. Exponents,
    formulas and code are written out as `markup` says."""
    extract, _, parse = _trafilatura()
    # Its declaration is no longer true of what is a string now, and lxml would refuse it.
    page = re.sub(r"^\s*<\?xml[^>]*\?>", "", page).replace("\0", "")
    if not page.strip():
        return ""
    try:
        content = page
        if markup.NEEDED.search(page):
            content = parse(page)
            if content is None:
                return ""
            markup.write_out(content)
        # Precision: otherwise it gives the menu of a page that has nothing else.
        text = extract(content, include_comments=False, favor_precision=True) or ""
        return text if content is page else markup.restore(text)
    except RecursionError:  # elements nested without end
        return ""


@functools.cache
def _trafilatura():
    import trafilatura
    import trafilatura.utils

    # It logs an error for each page without text; those are counted.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    return trafilatura.extract, trafilatura.utils.decode_file, trafilatura.load_html


def _declared(name: str | None) -> str | None:
    found = charsets.known(name)
    # A page whose declaration can be read is not in UTF-16, whatever it declares; so browsers have
    # it.
    return "utf-8" if found in ("utf-16", "utf-16-le", "utf-16-be") else found


def read_records(
    stream: io.BufferedReader,
    limit: int,
    encoding: str = "",
) -> Iterator[tuple[int, str | Damaged | Skipped, str | None, str | None]]:
    """(number from 1, text, what is wrong with its bytes, how it was decoded) of each record of a
    WARC or WET file that is not compressed any more.

    The text of a conversion record of plain text is itself, that of a response (HTTP 200) or
    resource of HTML, by its type or by how it begins where it has none, is its `main_text`;
    `Skipped` for all other records. `Damaged` stands for a page of more than ``limit`` bytes or in
    a compression that cannot be undone, and for the rest of a file that is cut short or not WARC at
    all.
    """
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    if not stream.peek(5).startswith(b"WARC/"):
        yield 1, Damaged("not a WARC file: it does not begin with WARC/"), None, None
        return
    number = 0
    # read1: what comes before a damaged place is still read.
    records = ArchiveIterator(types.SimpleNamespace(read=stream.read1))
    try:
        for number, record in enumerate(records, 1):  # noqa: B007
            text, wrong, how = _record_text(record, limit, encoding)
            records.read_to_end()
            if getattr(record.raw_stream, "limit", 0) > 0:
                text = Damaged("the file is cut short inside this record")
            yield number, text, wrong, how
    except (ArchiveLoadFailed, UnicodeError) as error:
        yield (
            number + 1,
            Damaged(f"not a WARC record ({str(error).strip().splitlines()[0]})"),
            None,
            None,
        )


def _record_text(record, limit: int, encoding: str) -> Page:
    kind, _, parameters = (record.content_type or "").lower().partition(";")
    coding = ""
    if record.http_headers:
        header = record.http_headers.get_header("Content-Type", "")
        kind, _, parameters = header.lower().partition(";")
        coding = record.http_headers.get_header("Content-Encoding", "")
        if (
            record.rec_type in ("response", "resource")
            and record.http_headers.get_statuscode() != "200"
        ):
            return Page(NOT_FOUND)
        # The compression is undone here: warcio knows some of them, one at a time, and takes others
        # for text.
        record.http_headers.remove_header("Content-Encoding")
    if record.rec_type == "conversion" and kind.strip() == "text/plain":
        data = read_all(record.raw_stream, limit)
        return Page(data) if isinstance(data, Damaged) else Page(*charsets.decode(data))
    if record.rec_type not in ("response", "resource"):
        return Page(NO_PAGE)
    if kind.strip() not in (
        *_HTML_TYPES,
        "",
        "application/octet-stream",
        "application/http",
        "unknown/unknown",
    ):
        return Page(NOT_HTML)
    data = read_all(record.content_stream(), limit)
    if not isinstance(data, Damaged):
        data = _unpacked(data, coding, limit)
    if isinstance(data, Damaged):
        return Page(data)
    if kind.strip() not in _HTML_TYPES and not _BEGINNINGS.match(
        data[:4096].removeprefix(b"\xef\xbb\xbf")
    ):
        return Page(NOT_HTML)
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", parameters)
    page = decode_page(data, charset and charset[1], encoding)
    return Page(NOT_HTML) if page.text is None else page._replace(text=main_text(page.text))


class _TooLong(Exception):
    """More than the limit comes out of a compression."""


def _unpacked(data: bytes, coding: str, limit: int) -> bytes | Damaged:
    """``data`` without what Content-Encoding names, the last one first. Data that is plain text
    already, as crawlers keep it that undo the compression and leave the header, stays."""
    for name in reversed([part.strip().lower() for part in coding.split(",")]):
        if name in ("", "identity", "utf-8", "none"):
            continue
        if name not in _UNPACKERS:
            return Damaged(f"its Content-Encoding {name!r} is not known")
        try:
            unpacked = _UNPACKERS[name](data, limit)
        except ImportError as error:
            return Damaged(
                f"its Content-Encoding {name!r} needs a package; pip install {error.name}"
            )
        except _TooLong:
            return too_long(limit)
        except Exception as error:  # each library has its own
            if not _BEGINNINGS.match(data[:4096]):
                return Damaged(f"its Content-Encoding {name!r} cannot be undone ({error})")
            unpacked = data
        data = unpacked
    return data


def _unzip(data: bytes, limit: int, bits: int) -> bytes:
    """Of zlib's formats; a stream that is cut short raises zlib.error."""
    pieces = []
    size = 0
    while data:
        unpacker = zlib.decompressobj(bits)
        pieces.append(unpacker.decompress(data, limit + 1 - size))
        size += len(pieces[-1])
        if size > limit:
            raise _TooLong
        if not unpacker.eof:
            raise zlib.error("it is cut short")
        # Members of gzip one after another are one; zeros and the like behind them are not.
        data = unpacker.unused_data if unpacker.unused_data[:2] == b"\x1f\x8b" else b""
    return b"".join(pieces)


def _deflate(data: bytes, limit: int) -> bytes:
    try:
        return _unzip(data, limit, zlib.MAX_WBITS)
    except zlib.error:
        return _unzip(data, limit, -zlib.MAX_WBITS)  # as many servers send it, without a header


def _zstd(data: bytes, limit: int) -> bytes:
    unpacked = read_all(io.BufferedReader(ZstdFile(io.BytesIO(data))), limit)
    if isinstance(unpacked, Damaged):
        raise _TooLong
    return unpacked


def _brotli(data: bytes, limit: int) -> bytes:
    import brotli

    unpacked = brotli.decompress(data)  # all at once: the library knows no limit
    if len(unpacked) > limit:
        raise _TooLong
    return unpacked


_UNPACKERS = {
    "gzip": lambda data, limit: _unzip(data, limit, 16 + zlib.MAX_WBITS),
    "deflate": _deflate,
    "zstd": _zstd,
    "br": _brotli,
}
_UNPACKERS["x-gzip"] = _UNPACKERS["gzip"]
