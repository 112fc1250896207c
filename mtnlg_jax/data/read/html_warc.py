"""Extract the text of web pages: HTML by trafilatura, and records of WARC and WET by warcio."""

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
_RUN = 2.5  # mean length of runs of bytes beyond ASCII from which a script is not Latin
NO_PAGE = Skipped("records of WARC without a page (requests, metadata)")
NOT_HTML = Skipped("records of WARC that are not HTML")
NOT_FOUND = Skipped("records of WARC whose HTTP status is not 200")
_BEGINNINGS = re.compile(
    rb"\s*(<!--.{0,2000}?-->\s*|<\?xml[^>]{0,200}\?>\s*)*"
    rb"<(!doctype html|html|head|body|title|meta|script|style|div|p|h1|table|a|br)[\s>/]",
    re.IGNORECASE | re.DOTALL,
)
_HTML_TYPES = ("text/html", "application/xhtml+xml")


class Page(NamedTuple):
    """A page as ``text``, None if it is binary.

    ``wrong``: what is wrong with its bytes. ``how``: how it was decoded, if that is to be reported.
    """

    text: str | None
    wrong: str | None = None
    how: str | None = None


def decode_page(data: bytes, charset: str | None = None, encoding: str = "") -> Page:
    """Decode an HTML page.

    The encoding is that of the byte order mark, else ``charset`` (from the HTTP header), else what
    the page declares. If that fails or nothing is declared, it is UTF-8, else ``encoding``, else
    cp1252 or a guess of trafilatura. Bytes that cannot be decoded become U+FFFD.
    """
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
            byte = data[error.start]
            named = str(name).upper()
            wrong = wrong or f"byte 0x{byte:02x} at {error.start:,} is not {named}"
    if declared:
        return Page(data.decode(declared, "replace"), wrong)
    runs = _BEYOND_ASCII.findall(data)
    if sum(map(len, runs)) < _RUN * len(runs):
        # Single letters between ASCII: a Latin script, for which a guess is wrong more often than
        # the default of browsers.
        with contextlib.suppress(UnicodeDecodeError):
            return Page(data.decode("cp1252"), None, GUESSED)
    return Page(_trafilatura()[1](data), None, GUESSED)


def main_text(page: str) -> str:
    """Return the main text of an HTML page, or "": no menus, comments or scripts.

    Exponents, formulas and code are written out by `markup`.
    """
    extract, _, parse = _trafilatura()
    # The declared encoding no longer applies to a string, and lxml would refuse it.
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
        # Without favor_precision a page without text yields its menu.
        text = extract(content, include_comments=False, favor_precision=True) or ""
        return text if content is page else markup.restore(text)
    except RecursionError:  # elements nested too deeply
        return ""


@functools.cache
def _trafilatura():
    import trafilatura
    import trafilatura.utils

    # It logs an error for each page without text, which are counted instead.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    return trafilatura.extract, trafilatura.utils.decode_file, trafilatura.load_html


def _declared(name: str | None) -> str | None:
    found = charsets.known(name)
    # A page whose declaration can be read is not in UTF-16, whatever it declares, as in browsers.
    return "utf-8" if found in ("utf-16", "utf-16-le", "utf-16-be") else found


def read_records(
    stream: io.BufferedReader,
    limit: int,
    encoding: str = "",
) -> Iterator[tuple[int, str | None, str | None, str | None]]:
    """Yield (number from 1, text, what is wrong with its bytes, how it was decoded) of each record
    of a decompressed WARC or WET file.

    A conversion record of plain text is its own text. A response (HTTP 200) or resource that is
    HTML, by its type or else by its beginning, has its `main_text`. All other records are
    `Skipped`. A page of more than ``limit`` bytes or with a damaged compression is `Damaged`, and
    so is the rest of a file that is cut short or not WARC.
    """
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    if not stream.peek(5).startswith(b"WARC/"):
        yield 1, Damaged("not a WARC file: it does not begin with WARC/"), None, None
        return
    number = 0
    # With read1 the data before damage is still read.
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
        # Decompressed below: warcio supports some compressions, one at a time, and takes others for
        # text.
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
    """Decompressed data exceeds the limit."""


def _unpacked(data: bytes, coding: str, limit: int) -> bytes | Damaged:
    """Decompress ``data`` by its Content-Encoding, the last name first.

    Data that is already plain HTML stays: some crawlers decompress and keep the header.
    """
    for name in reversed([part.strip().lower() for part in coding.split(",")]):
        if name in ("", "identity", "utf-8", "none"):
            continue
        if name not in _UNPACKERS:
            return Damaged(f"its Content-Encoding {name!r} is unknown")
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
    """Decompress a format of zlib; a truncated stream raises zlib.error."""
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
        # Consecutive members of gzip are one stream; padding after them is ignored.
        data = unpacker.unused_data if unpacker.unused_data[:2] == b"\x1f\x8b" else b""
    return b"".join(pieces)


def _deflate(data: bytes, limit: int) -> bytes:
    try:
        return _unzip(data, limit, zlib.MAX_WBITS)
    except zlib.error:
        return _unzip(data, limit, -zlib.MAX_WBITS)  # without a header, as many servers send it


def _zstd(data: bytes, limit: int) -> bytes:
    unpacked = read_all(io.BufferedReader(ZstdFile(io.BytesIO(data))), limit)
    if isinstance(unpacked, Damaged):
        raise _TooLong
    return unpacked


def _brotli(data: bytes, limit: int) -> bytes:
    import brotli

    unpacked = brotli.decompress(data)  # all at once: the library has no limit
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
