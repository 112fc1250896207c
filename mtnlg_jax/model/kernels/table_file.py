"""The file of the table of `blocks`, as launch/tune_attention.py reads and writes it."""

import json
import os
from pathlib import Path

# A measurement replaces the row with the same values of these.
_KEY = ("device", "impl", "dtype", "head_width", "length", "causal", "pass")


def read_rows(path: Path) -> list[dict]:
    """Return the rows of the table at ``path``; none if there is no file.

    Raises PermissionError if it cannot be written, ValueError if it is not a table.
    """
    if not path.exists():
        return []
    # Found out before hours of measuring, not after.
    if not os.access(path, os.W_OK):
        raise PermissionError(f"--table={path} cannot be written; name another with --table")
    try:
        return json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"--table={path} is not a table of block sizes: it must be JSON with 'rows'"
        ) from None


def with_row(rows: list[dict], row: dict) -> list[dict]:
    """Return ``rows`` with ``row`` in place of the one that has its key."""
    return [old for old in rows if any(old[name] != row[name] for name in _KEY)] + [row]


def render(rows: list[dict]) -> str:
    """Return the table as the text of its file: one row per line, sorted by its key."""
    # Padded with zeros, numbers sort as numbers. A fixed order keeps a diff to the rows that
    # changed.
    rows = sorted(rows, key=lambda row: [str(row[name]).zfill(8) for name in _KEY])
    return '{"rows": [\n ' + ",\n ".join(map(json.dumps, rows)) + "\n]}\n"
