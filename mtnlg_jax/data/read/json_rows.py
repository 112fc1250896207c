"""Values of JSON lines and of .json files, one after another.

Each is a `Row`. Damage takes the place of a value, and reading continues after it if possible.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator

from mtnlg_jax.data.read import charsets, open_files
from mtnlg_jax.data.read.open_files import Damaged
from mtnlg_jax.data.read.rows import Row

# strict=False: control characters inside strings are not a reason to refuse a text.
_DECODER = json.JSONDecoder(strict=False)
_SEPARATORS = re.compile("[ \t\r\n,\x1e]*")  # U+001E begins the texts of a JSON sequence (RFC 7464)
_READ = 1 << 16  # bytes read at first; doubled each time while a long value lasts
_CUT = 16  # characters: an error this near to the end may come from data not yet read
_SURROGATE = re.compile("[\udc80-\udcff]")


def json_lines(stream: io.BufferedReader, limit: int) -> Iterator[Row]:
    """Yield the value of each line, or several; a line of more than ``limit`` bytes is `Damaged`.

    A file whose first line is a single bracket is not JSON lines, whatever its name, and is read by
    `json_values`.
    """
    if _first_line(stream) in (b"[", b"{"):
        yield from json_values(stream, limit)
        return
    for number, line in enumerate(open_files.bounded_lines(stream, limit), 1):
        if isinstance(line, Damaged):
            yield Row(number, line)
            continue
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            yield from _of_line(number, line)


def _of_line(number: int, line: bytes) -> Iterator[Row]:
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
    """Return the values of a line that holds several, or None."""
    values = []
    start = _after_separators(line, 0)
    try:
        while start < len(line):
            value, start = _DECODER.raw_decode(line, start)
            values.append(value)
            start = _after_separators(line, start)
    except (ValueError, RecursionError):
        return None
    return values


def _after_separators(text: str, start: int) -> int:
    match = _SEPARATORS.match(text, start)
    return match.end() if match else start


def json_values(stream: io.BufferedReader, limit: int) -> Iterator[Row]:
    """Yield all values of a .json file; of a list among them, its items.

    The file is one list or object, several one after another, or JSON lines. Only the current value
    is held; one of more than ``limit`` characters is `Damaged`.
    """
    return _JsonValues(stream, limit).rows()


class _JsonValues:
    """The state of `json_values`: a window of the text, and the position in it."""

    def __init__(self, stream: io.BufferedReader, limit: int):
        self._stream = stream
        self._limit = limit
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""  # the window
        self._at = 0  # where in it the next value is looked for
        self._ended = False
        self._error: Exception | None = None
        self._line = 1
        # The white space before a value on its line; None if another value precedes it there.
        self._indent: str | None = ""

    def rows(self) -> Iterator[Row]:
        inside = False  # in a list whose items are rows
        number = 0
        whole = True
        while self._skip_separators():
            first = self._text[self._at]
            if first in "[]" and inside == (first == "]"):
                inside = not inside
                self._indent = None
                self._at += 1
                continue
            number += 1
            value, end, reason = self._decode()
            whole = reason is None
            if reason is None:
                if end - self._at > self._limit:
                    value = open_files.too_long(self._limit)
                yield Row(number, value, self._wrong(end))
                self._line += self._text.count("\n", self._at, end)
                self._at = end
                self._indent = None
                continue
            line = self._line
            lost, again = self._skip_damaged(inside)
            inside = inside and not again
            yield Row(number, self._damage(reason, line, lost, inside))
        if inside and whole:
            yield Row(
                number + 1,
                Damaged(f"the list is cut short: it does not end with ] on line {self._line}"),
            )
        if self._error:
            raise self._error

    def _decode(self) -> tuple[object, int, Exception | Damaged | None]:
        """Return (the next value, its end in the window, None), or the reason as the third."""
        size = _READ
        while True:
            reason = None
            value = None
            end = 0
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                # 12 may be the beginning of 123.
                unfinished = end == len(self._text) and self._text[self._at] not in '{["'
            except RecursionError as error:
                return None, 0, error
            except ValueError as error:
                reason = error
                # A number of thousands of digits raises a ValueError of another kind.
                unfinished = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _CUT
                )
            if not unfinished or self._ended:
                return value, end, reason
            if len(self._text) - self._at > self._limit:
                return None, 0, open_files.too_long(self._limit)
            # Doubling keeps a long value linear in time.
            self._fill(size)
            size = min(2 * size, max(self._limit, _READ))

    def _wrong(self, end: int) -> str | None:
        """Describe bytes before ``end`` that are not UTF-8, or return None."""
        raw = self._text[self._at : end]
        found = None if raw.isascii() else _SURROGATE.search(raw)
        if found is None:
            return None
        wrong = charsets.wrong(bytes([ord(found[0]) - 0xDC00]), 0)
        line = self._line + raw.count("\n", 0, found.start())
        return wrong.replace(" at 0", f" on line {line}")

    def _damage(self, reason: Exception | Damaged, line: int, lost: str, inside: bool) -> Damaged:
        """Describe a value that cannot be decoded, and what is ``lost`` with it."""
        if not isinstance(reason, Damaged):
            words = str(reason).split(": line ")[0]  # its own line number counts from the window
            kind = "cut short or damaged" if self._ended and lost == "all" else "not valid JSON"
            reason = Damaged(f"{kind} on line {line} ({words})")
        if lost == "line":
            return Damaged(f"{reason}. What follows it on its line is not read")
        if lost == "all" and inside:
            return Damaged(f"{reason}. What follows it in the list is not read")
        return reason

    def _fill(self, size: int) -> None:
        """Read ``size`` more bytes, or the rest, into the window; drop what was used."""
        parts = [self._text[self._at :]]
        while size > 0 and not self._ended:
            try:
                data = self._stream.read1(size)
            except open_files.COMPRESSION_ERRORS as error:
                # The data before the error is intact and is read first.
                data = b""
                self._error = error
            self._ended = not data
            parts.append(self._utf8.decode(data, final=self._ended))
            size -= len(data)
        self._text = "".join(parts)
        self._at = 0

    def _skip_separators(self) -> bool:
        """Move to the start of the next value; False if there is none."""
        while True:
            end = _after_separators(self._text, self._at)
            passed = self._text[self._at : end]
            if "\n" in passed:
                self._line += passed.count("\n")
                self._indent = passed[passed.rfind("\n") + 1 :]
            elif self._indent is not None:
                self._indent += passed
            self._at = end
            if self._at < len(self._text):
                return True
            if self._ended:
                return False
            self._fill(_READ)

    def _skip_damaged(self, inside: bool) -> tuple[str, bool]:
        """Move to the next line that begins with a value as this one did.

        Returns (what else is lost: "", "line" or "all"; whether that line begins its own list).
        """
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
