"""Replace control characters, Unicode's line separators and byte order marks, or remove them.

Separators of words still separate them: vertical tab, form feed, U+001C to U+001E, NEL, U+2028 and
U+2029 become a line end, U+001F (between fields) a space. Terminal sequences and overstriking are
removed as a whole. C1 controls are read as UTF-8 or Windows-1252 that was decoded as Latin-1 if
they fit that, as in browsers, and are removed otherwise. Joiners that scripts and emoji need
(U+200C, U+200D) are not controls and stay.
"""

import re

CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
_TERMINAL = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b\n]*(?:\x07|\x1b\\\\)")
# Bold and underlined words in manual pages.
_OVERSTRUCK = re.compile("(?:(.)\x08)+\\1|_\x08(?=[^\x00-\x20])")
# The byte of each character of Windows-1252; bytes that it lacks are C1 controls.
_BYTES = {
    ord(bytes([byte]).decode("cp1252", "ignore") or chr(byte)): byte for byte in range(0x80, 0xA0)
}
_LATIN_1 = re.compile(f"[\x80-\xff{''.join(map(chr, _BYTES))}]+")
_C1 = re.compile("[\x80-\x9f]")
# Quotes, bullet and dashes of Windows-1252. With its quotes 0x85 is an ellipsis, without them NEL.
_WINDOWS = {code: bytes([code]).decode("cp1252") for code in range(0x91, 0x98)}
_QUOTES = re.compile("[\x91-\x94]")
_BREAKS = re.compile("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+")
_FIELDS = re.compile("\x1f+")


def repair_controls(text: str) -> tuple[str, int]:
    """Return (text without ``CONTROLS``, number of those removed); line ends must be LF already."""
    if not CONTROLS.search(text):
        return text, 0
    count = len(CONTROLS.findall(text))
    if "\x1b" in text:
        text = _TERMINAL.sub("", text)
    if "\x08" in text:
        text = _OVERSTRUCK.sub(r"\1", text)
    if _C1.search(text):
        text = _repair_c1(text)
    text = _BREAKS.sub(lambda match: _between(match, "\n", "\n"), text)
    text = _FIELDS.sub(lambda match: _between(match, " ", " \t\n"), text)
    return CONTROLS.sub("", text), count


def _between(match: re.Match, mark: str, same: str) -> str:
    """Return the mark, or "" if the match is beside a similar one or at an end of the text."""
    text = match.string
    before = text[match.start() - 1 : match.start()]
    after = text[match.end() : match.end() + 1]
    return mark if before and after and before not in same and after not in same else ""


def _repair_c1(text: str) -> str:
    table = _WINDOWS | ({0x85: "…"} if _QUOTES.search(text) else {})
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if _C1.search(line):
            runs = {run: _as_utf8(run) for run in _LATIN_1.findall(line)}
            if all(decoded for run, decoded in runs.items() if _C1.search(run)):
                line = _decode_runs(line, runs)
            lines[number] = line.translate(table)
    return "\n".join(lines)


def _decode_runs(line: str, runs: dict[str, str | None]) -> str:
    return _LATIN_1.sub(lambda match: runs[match[0]] or match[0], line)


def _as_utf8(run: str) -> str | None:
    try:
        return run.translate(_BYTES).encode("latin-1").decode()
    except UnicodeDecodeError:
        return None
