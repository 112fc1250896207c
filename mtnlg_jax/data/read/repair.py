"""Repair of a document's text, and the handling of damage that cannot be repaired."""

import re

from mtnlg_jax.data.read.controls import repair_controls
from mtnlg_jax.data.read.open_files import Damaged
from mtnlg_jax.data.read.results import ReadReport

# Bytes that are not UTF-8 arrive as U+DC80..U+DCFF ("surrogateescape"); other surrogates come from
# JSON escapes.
_OTHER_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
# Damaged text never reaches this share of repaired characters; text in another encoding does.
_SUSPICIOUS_SHARE = 0.05

BINARY = Damaged(
    "binary data and not text (text in UTF-16 without a byte order mark needs its encoding named, "
    "as in encoding=utf-16-le)"
)


def repair(text: str, report: ReadReport) -> tuple[str, int]:
    """Return (valid text without control characters, characters replaced by U+FFFD).

    Counts both in ``report``.
    """
    lost = 0
    if not _is_valid(text):
        before = text.count("\ufffd")
        data = _OTHER_SURROGATES.sub("\ufffd", text).encode("utf-8", "surrogateescape")
        text = data.decode("utf-8", "replace")
        lost = text.count("\ufffd") - before
        report.repaired += 1
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text, count = repair_controls(text)
    report.control_characters += count
    return text, lost


def repair_pair(
    text: str, prompt: str | None, wrong: str | None, source: str, report: ReadReport, encoding: str
) -> tuple[str | None, str | Damaged]:
    """Return the repaired (prompt, text); counts what was not in ``encoding`` ("" for UTF-8).

    ``wrong`` is set if the bytes were not in their encoding. If much of the text is lost then,
    `Damaged` takes its place.
    """
    repaired = report.repaired
    text, lost = repair(text, report)
    if prompt is not None:
        prompt, more = repair(prompt, report)
        lost += more
    if wrong and is_suspicious(lost, len(text) + len(prompt or "")):
        report.repaired = repaired
        return prompt, wrong_encoding(encoding)
    report.repaired = repaired + bool(lost)
    if lost:
        note_lost(report, encoding, source)
    return prompt, text


def is_suspicious(lost: int, characters: int) -> bool:
    """Return whether enough characters are lost that the encoding must be wrong."""
    return lost > _SUSPICIOUS_SHARE * characters


def note_lost(report: ReadReport, encoding: str, source: str) -> None:
    """Note a document in which U+FFFD replaces what was not in its encoding."""
    report.note(f"documents with U+FFFD for what is not {encoding or 'UTF-8'}", source)


def wrong_encoding(encoding: str) -> Damaged:
    """Return the damage of a text that is largely in another encoding."""
    return Damaged(
        f"much of it is not {encoding or 'UTF-8'}; name the right encoding, as in encoding=cp1252"
    )


def drop(damage: Damaged, path: str, source: str, on_error: str, report: ReadReport) -> None:
    """Count a damaged document, or raise ValueError with its ``path`` for on_error="raise"."""
    if on_error == "raise":
        raise ValueError(
            f"{path}: {damage}; repair it, or drop damaged documents with on_error=skip"
        )
    report.damaged += 1
    report.note(_reason(damage), source)


def _reason(damage: Damaged) -> str:
    """Return the reason for a report: the damage without the numbers and names that vary."""
    kind = re.sub(" on line [0-9,]+", "", damage.split(" (")[0].split(" among ")[0])
    return "damaged and dropped, " + re.sub(r"(?<![-\w])\d[\d,]*", "N", kind)[:150]


def _is_valid(text: str) -> bool:
    """Whether a text has no surrogates; faster than a search for them."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def utf8_size(text: str) -> int:
    """Return the number of bytes in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
