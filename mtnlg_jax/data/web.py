"""The text of web pages: HTML by trafilatura, and the records of WARC and WET by warcio."""

import codecs
import functools
import io
import logging
import re
import types
from collections.abc import Iterator

from mtnlg_jax.data import markup
from mtnlg_jax.data.files import Damaged, is_binary, read_all

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
# https://encoding.spec.whatwg.org: what browsers take these names for, since pages mean more than the names say.
_MEANT = {"gb2312": "gb18030", "gbk": "gb18030", "ascii": "cp1252", "iso8859-1": "cp1252", "shift_jis": "cp932",
          "euc_kr": "cp949", "big5": "big5hkscs", "utf-16": "utf-8", "utf-16-le": "utf-8", "utf-16-be": "utf-8"}
_CHARSET = re.compile(rb"<meta[^>]{0,400}?charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.IGNORECASE)
_HTML_TYPES = ("text/html", "application/xhtml+xml")


def page_text(data: bytes, charset: str | None = None) -> str | None:
    """The main text of an HTML page, "" where it has none: no menus, comments, scripts. None for binary data.
    Exponents, formulas and code are written out as `markup` says.

    Decoded by its byte order mark, else ``charset`` (of the HTTP header), else what the page declares, else UTF-8,
    else a guess of trafilatura's. What this cannot decode becomes U+FFFD.
    """
    extract, guess, parse = _trafilatura()
    marked = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if marked != "utf-16" and is_binary(data):
        return None
    declared = _CHARSET.search(data, 0, 4096)
    encoding = marked or _known(charset) or (_known(declared[1].decode()) if declared else None)
    if not encoding:
        try:
            page = data.decode()
        except UnicodeDecodeError:
            page = guess(data)
    else:
        page = data.decode(encoding, "replace")
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


def _known(charset: str | None) -> str | None:
    try:
        name = codecs.lookup(charset).name if charset else None
    except (LookupError, ValueError):
        return None
    return _MEANT.get(name, name)


def read_records(stream: io.BufferedReader, limit: int) -> Iterator[tuple[int, str | Damaged | None]]:
    """(number from 1, text) of each record of a WARC or WET file that is not compressed any more.

    The text of a conversion record of plain text is itself, that of a response (HTTP 200) or resource of HTML is
    `page_text`; None for all other records: requests, metadata, images, errors. `Damaged` stands for a page of more
    than ``limit`` bytes, and for the rest of a file that is cut short or not WARC at all.
    """
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    if not stream.peek(5).startswith(b"WARC/"):
        yield 1, Damaged("not a WARC file: it does not begin with WARC/")
        return
    number = 0
    # read1: what comes before a damaged place is still read.
    records = ArchiveIterator(types.SimpleNamespace(read=stream.read1))
    try:
        for number, record in enumerate(records, 1):  # noqa: B007
            text = _record_text(record, limit)
            records.read_to_end()
            if getattr(record.raw_stream, "limit", 0) > 0:
                text = Damaged("the file is cut short inside this record")
            yield number, text
    except (ArchiveLoadFailed, UnicodeError) as error:
        yield number + 1, Damaged(f"not a WARC record ({str(error).strip().splitlines()[0]})")


def _record_text(record, limit: int) -> str | Damaged | None:
    kind, _, parameters = (record.content_type or "").lower().partition(";")
    if record.http_headers:
        header = record.http_headers.get_header("Content-Type", "")
        kind, _, parameters = header.lower().partition(";")
        if record.http_headers.get_statuscode() != "200":
            return None
    if record.rec_type == "conversion" and kind.strip() == "text/plain":
        data = read_all(record.raw_stream, limit)
        return data if isinstance(data, Damaged) else data.decode("utf-8", "surrogateescape")
    if record.rec_type not in ("response", "resource") or kind.strip() not in _HTML_TYPES:
        return None
    data = read_all(record.content_stream(), limit)
    if isinstance(data, Damaged):
        return data
    charset = re.search(r"charset\s*=\s*[\"']?([\w.:-]+)", parameters)
    return page_text(data, charset and charset[1])
