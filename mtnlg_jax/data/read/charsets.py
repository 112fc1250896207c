"""In which encoding bytes are text: one rule for files, lines, cells, pages and test sets alike.

1. A byte order mark is certain: UTF-8, UTF-16 or UTF-32.
2. A page is in what its HTTP header or itself declares, as browsers take those names.
3. Bytes that are valid UTF-8 are UTF-8; where an encoding is named, they must hold enough beyond
ASCII to tell.
4. Then comes the encoding that the user names (``--encoding``), if one is named.
5. A page that declares nothing is read as cp1252, as browsers have it, or by a guess in another
script; both are
   counted. Nothing else is guessed.

What is invalid then is damage: an error with its place, or U+FFFD, which is counted.
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
# https://encoding.spec.whatwg.org: what browsers take these names for, since texts mean more than the names say.
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
_CERTAIN = (
    8  # characters of several bytes, from which on valid UTF-8 is not another encoding by chance
)

# What an encoding cannot decode becomes a byte that no UTF-8 has, and so is found by whoever reads
# that.
codecs.register_error(_HANDLER, lambda error: ("\udcff", error.end))


def marked(head: bytes) -> str | None:
    """The encoding that a byte order mark names, or None."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)


def known(name: str | None) -> str | None:
    """Python's name of an encoding of text as browsers understand it; None where there is no such
    encoding."""
    try:
        found = codecs.lookup(name) if name else None
        codecs.getincrementaldecoder(found.name if found else "")
    except (LookupError, ValueError):
        return None
    if found.name == "undefined":  # a codec that raises at every text; scripts write the word
        return None
    # Codecs that are not of text, such as base64, must not run over what was read.
    return _MEANT.get(found.name, found.name) if getattr(found, "_is_text_encoding", True) else None


def check(encoding: str) -> None:
    """Raises ValueError where ``encoding`` ("" for none) is not the name of one."""
    if encoding and (known(encoding) or "undefined").replace("-", "_") in _NOT_OF_FILES:
        raise ValueError(
            f"encoding={encoding!r} is not known; name one such as {_EXAMPLES}, or leave it out for UTF-8"
        )


def way_out(encoding: str = "") -> str:
    """The end of a message about text that is not in UTF-8, or not in the ``encoding`` that was
    named or marked."""
    if encoding.lower() in ("utf-16", "utf-32"):
        return "mend the file, or give on_error=skip, which puts U+FFFD there and counts it"
    if encoding:
        return (
            f"name the right encoding instead of encoding={encoding}, or give on_error=skip, which puts U+FFFD "
            "there and counts it"
        )
    return (
        f"name its encoding, as in encoding=cp1252 ({_EXAMPLES}), or give on_error=skip, which puts U+FFFD there "
        "and counts it"
    )


def decode(data: bytes) -> tuple[str, str | None]:
    """(text of UTF-8, what is wrong with it or None); bytes that are not UTF-8 become U+DC80 to
    U+DCFF."""
    try:
        return data.decode(), None
    except UnicodeDecodeError as error:
        return data.decode("utf-8", "surrogateescape"), wrong(data, error.start)


def wrong(data: bytes, start: int) -> str:
    return f"byte 0x{data[start]:02x} at {start:,} is not UTF-8"


def as_utf8(stream: io.BufferedReader, encoding: str = "") -> tuple[io.BufferedReader, str]:
    """(the stream as UTF-8, the encoding that it was in or "" for UTF-8), by rules 1, 3 and 4 for
    what begins it."""
    head = stream.peek(1 << 16)[: 1 << 16]
    found = marked(head)
    if found is None:
        # The head alone is looked at: what follows may be of any size.
        found = known(encoding) if encoding and not _is_utf8(head, known(encoding)) else "utf-8"
    if found.startswith("utf-8"):
        return stream, ""
    return io.BufferedReader(Recoded(stream, found), 1 << 17), found


def _is_utf8(head: bytes, encoding: str) -> bool:
    """Whether valid UTF-8 says more than that it can be read as that, too."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode()
    if head.isascii() and b"\0" not in head and len("a".encode(encoding)) > 1:
        return True  # not a text of two or four bytes a character
    beyond = len(head) - len(text)
    # In an encoding of one byte a character, a letter and a sign after it are not text: one such
    # pair is enough.
    single = len(bytes(range(256)).decode(encoding, "replace")) == 256
    return beyond >= (1 if single else _CERTAIN)


class Recoded(PieceStream):
    """UTF-8 of what is in another encoding; a byte 0xff stands for what that cannot decode.
    ``changed``: whether it was not ASCII, which is the same in most."""

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
