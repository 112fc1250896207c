"""Text files too long to hold: read twice, in pieces.

The first pass decides whether the file is text at all, as `readers` does for a whole file. The
second yields it piece by piece.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mtnlg_jax.data.read import charsets, open_files
from mtnlg_jax.data.read.kinds import TEXT
from mtnlg_jax.data.read.open_files import Damaged
from mtnlg_jax.data.read.readers import Reader
from mtnlg_jax.data.read.repair import (
    BINARY,
    drop,
    is_suspicious,
    note_lost,
    repair,
    utf8_size,
    wrong_encoding,
)
from mtnlg_jax.data.read.results import Document, ReadReport

PIECE = 8 << 20  # bytes read at once

# How these are read depends on the rest of the text (`controls`).
_C1 = re.compile("[\x80-\x9f]")


@dataclass
class Survey:
    """The first pass over a text: its counts, what is ``wrong`` with its bytes, and the ``damage``
    that makes it no text."""

    size: int = 0
    controls: int = 0
    characters: int = 0
    lost: int = 0
    lines: int = 0
    has_text: bool = False
    wrong: str | None = None
    damage: Damaged | None = None


def is_long(reader: Reader) -> bool:
    """Whether the file is text that is worth reading in pieces."""
    if reader.kind not in TEXT or reader.make_text:
        return False
    if not reader.file.name.lower().endswith(open_files.PACKED):
        return reader.file.size > PIECE
    try:
        with open_files.open_file(reader.file.path) as stream:
            return isinstance(open_files.read_all(stream, PIECE), Damaged)
    except (*open_files.COMPRESSION_ERRORS, FileNotFoundError):
        return False


def survey(reader: Reader) -> Survey | None:
    """Return the first pass, or None if the text must be read as a whole."""
    found = Survey()
    try:
        for data in _cut(reader):
            if not _add(found, data, reader):
                return None
            if found.size > reader.limit:
                found.damage = open_files.too_long(reader.limit)
                break
    except open_files.COMPRESSION_ERRORS as error:
        found.damage = Damaged(f"the compressed file is cut short or damaged ({error})")
    if found.damage is None and found.controls > max(8, 0.01 * found.size):
        found.damage = BINARY
    return found


def _add(found: Survey, data: bytes, reader: Reader) -> bool:
    """Count a piece; False if it has C1 controls."""
    found.size += len(data)
    found.controls += open_files.controls(data)
    try:
        piece = data.decode()
    except UnicodeDecodeError as error:
        lines = found.lines + data.count(10, 0, error.start)
        found.wrong = found.wrong or reader.wrong_at(data, error.start, lines)
        piece = data.decode("utf-8", "surrogateescape")
    found.lines += data.count(10)
    if _C1.search(piece):
        return False
    piece, lost = repair(piece, ReadReport())
    found.lost += lost
    found.characters += len(piece)
    found.has_text = found.has_text or bool(piece.strip())
    return True


def read_pieces(
    reader: Reader, found: Survey, on_error: str, report: ReadReport
) -> Iterator[Document]:
    """Yield the text in pieces, all but the last ``continued``."""
    path = reader.file.path
    if found.damage is None and found.wrong and on_error == "raise":
        raise ValueError(f"{path}: {found.wrong}; {charsets.way_out(reader.encoding)}")
    if found.damage is None and is_suspicious(found.lost, found.characters):
        found.damage = wrong_encoding(reader.encoding)
    if found.damage is not None:
        drop(found.damage, path, reader.source, on_error, report)
        return
    if not found.has_text:
        report.empty += 1
        return
    report.documents += 1
    if found.lost:
        note_lost(report, reader.encoding, reader.source)
    repaired = report.repaired
    held = ""
    for data in _cut(reader):
        piece, _ = repair(data.decode("utf-8", "surrogateescape"), report)
        report.bytes += utf8_size(piece)
        if not piece:  # everything in it was removed
            continue
        if held:
            yield Document(held, reader.source, continued=True)
        held = piece
    report.repaired = repaired + bool(found.lost)
    yield Document(held, reader.source)


def _cut(reader: Reader) -> Iterator[bytes]:
    """Yield the text as UTF-8 in pieces that end with a line if there are lines.

    What is on one side of a line end does not affect how the other side is read.
    """
    with open_files.open_file(reader.file.path) as raw:
        stream = reader.as_utf8(raw)
        rest = b""
        while data := stream.read(PIECE):
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
