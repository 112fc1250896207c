"""The kinds of files that can be read, distinguished by their suffixes."""

import os

from mtnlg_jax.data.read.open_files import PACKED

TEXT = (".txt", ".text", ".md", ".markdown", ".rst", ".org", ".adoc", ".tex")
LINES = (".jsonl", ".ndjson", ".jsonlines")
JSON = (".json",)
TABLE = (".csv", ".tsv")
PARQUET = (".parquet",)
HTML = (".html", ".htm", ".xhtml")
WARC = (".warc", ".wet")
KINDS = TEXT + LINES + JSON + TABLE + PARQUET + HTML + WARC
_UNITS = {".json": "item", ".parquet": "row", ".warc": "record", ".wet": "record"}


def describe(kinds: tuple[str, ...]) -> str:
    """Return the list of suffixes for a message."""
    return " ".join(kinds) + " (each also with .gz, .zst, .bz2 or .xz behind it)"


READABLE = describe(KINDS)


def kind_of(name: str) -> str | None:
    """Return the suffix that decides how to read a file, or None; that of a compression is
    ignored."""
    suffix = suffix_of(name, packed=False)
    return suffix if suffix in KINDS else None


def unit_of(name: str) -> str:
    """Return what the documents of a file are numbered by, for messages: lines, items, ..."""
    return _UNITS.get(kind_of(name) or "", "line")


def suffix_of(name: str, packed: bool = True) -> str:
    """Return the suffix in lower case, or "(none)"; with ``packed`` including that of the
    compression."""
    stem, suffix = os.path.splitext(os.path.basename(name.lower()))
    if suffix in PACKED:
        inner = os.path.splitext(stem)[1]
        return inner + suffix if packed else inner
    return suffix or "(none)"
