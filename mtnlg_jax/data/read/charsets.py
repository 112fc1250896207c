"""Find the encoding of text: one rule for files, lines, cells, pages and test sets.

1. A byte order mark is certain: UTF-8, UTF-16 or UTF-32.
2. A page has the encoding that its HTTP header or the page itself declares, as browsers read those
   names.
3. Valid UTF-8 is UTF-8; if an encoding is named, the bytes must have enough beyond ASCII to be
   sure.
4. Otherwise text has the encoding that the user names (``--encoding``), if any.
5. A page that declares nothing is read as cp1252, as in browsers, or by a guess for another script;
   both are counted. Nothing else is guessed.

Bytes that are invalid then are damage: an error with its position, or U+FFFD, which is counted.
"""

import codecs
import io

from mtnlg_jax.data.read.open_files import PieceStream

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Browsers read these names as larger encodings: https://encoding.spec.whatwg.org
_MEANT = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
}
_EXAMPLES = "cp1252, gb18030, big5, shift_jis, euc_kr or utf-16-le"
_NOT_OF_FILES = ("undefined", "unicode_escape", "raw_unicode_escape", "idna", "punycode")
_HANDLER = "mtnlg_jax.damaged"
# Continuation bytes from which on valid UTF-8 is not another encoding by chance.
_CERTAIN = 8


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Replace bytes that an encoding cannot decode by one that UTF-8 never has, to find later."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udcff", error.end


codecs.register_error(_HANDLER, _replace)


def marked(head: bytes) -> str | None:
    """Return the encoding that a byte order mark names, or None."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)


def known(name: str | None) -> str | None:
    """Return Python's name of a text encoding as browsers understand it; None if there is none."""
    if not name:
        return None
    try:
        found = codecs.lookup(name)
        codecs.getincrementaldecoder(found.name)
    except (LookupError, ValueError):
        return None
    if found.name == "undefined":  # raises for every text, and pages do declare it
        return None
    # Codecs that do not decode text, such as base64, must not run over the input.
    return _MEANT.get(found.name, found.name) if getattr(found, "_is_text_encoding", True) else None


def check(encoding: str) -> None:
    """Raise ValueError if ``encoding`` ("" for none) is unknown."""
    if encoding and (known(encoding) or "undefined").replace("-", "_") in _NOT_OF_FILES:
        raise ValueError(
            f"unknown value encoding={encoding!r}; name one such as {_EXAMPLES}, or leave it out "
            "for UTF-8"
        )


def way_out(encoding: str = "") -> str:
    """Return the end of a message about text that is not in UTF-8 or in the ``encoding`` given."""
    if encoding.lower() in ("utf-16", "utf-32"):
        return "repair the file, or give on_error=skip, which puts U+FFFD there and counts it"
    if encoding:
        return (
            f"name the right encoding instead of encoding={encoding}, or give on_error=skip, "
            "which puts U+FFFD there and counts it"
        )
    return (
        f"name its encoding, as in encoding=cp1252 ({_EXAMPLES}), or give on_error=skip, which "
        "puts U+FFFD there and counts it"
    )


def decode(data: bytes) -> tuple[str, str | None]:
    """Return (text of UTF-8, what is wrong or None); other bytes become U+DC80 to U+DCFF."""
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        return data.decode("utf-8", "surrogateescape"), wrong(data, error.start)


def wrong(data: bytes, start: int) -> str:
    """Describe the byte at ``start``, which is not UTF-8."""
    return f"byte 0x{data[start]:02x} at {start:,} is not UTF-8"


def as_utf8(stream: io.BufferedReader, encoding: str = "") -> tuple[io.BufferedReader, str]:
    """Return (the stream as UTF-8, its encoding or "" for UTF-8), by rules 1, 3 and 4."""
    # Only the head is examined; the rest may have any size.
    head = stream.peek(1 << 16)[: 1 << 16]
    named = known(encoding)
    found = marked(head)
    if found is None:
        found = named if named and not _is_utf8(head, named) else "utf-8"
    if found.startswith("utf-8"):
        return stream, ""
    return io.BufferedReader(Recoded(stream, found), 1 << 17), found


def _is_utf8(head: bytes, encoding: str) -> bool:
    """Whether the head of a text is UTF-8 rather than ``encoding``."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode()
    if head.isascii() and b"\0" not in head and len("a".encode(encoding)) > 1:
        return True  # an encoding of two or four bytes a character is ruled out
    beyond = len(head) - len(text)
    # In an encoding of one byte a character, a character of UTF-8 reads as a letter and a sign,
    # which is not text: one is enough.
    single = len(bytes(range(256)).decode(encoding, "replace")) == 256
    return beyond >= (1 if single else _CERTAIN)


class Recoded(PieceStream):
    """A stream in another encoding as UTF-8; a byte 0xff replaces what cannot be decoded.

    ``changed``: whether it was not only ASCII, which is the same in most encodings.
    """

    def __init__(self, stream: io.BufferedReader, encoding: str):
        super().__init__(stream)
        self._decoder = codecs.getincrementaldecoder(encoding)(_HANDLER)
        self._ended = False
        self.changed = False

    def _more(self) -> bytes | None:
        if self._ended:
            return None
        data = self._below.read1(1 << 16)
        self._ended = not data
        self.changed = self.changed or not data.isascii()
        return self._decoder.decode(data, final=self._ended).encode("utf-8", "surrogateescape")
