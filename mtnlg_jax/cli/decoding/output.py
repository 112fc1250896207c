"""Print JSON lines and tables."""

import json
import unicodedata


def dump(content: dict) -> str:
    """Return ``content`` as one line of JSON; raise ValueError on NaN and infinity."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False)


def print_table(rows: list[list[str]], left: set[str]) -> None:
    """Print rows as columns, with the widths that a terminal gives their characters.

    Columns whose head is in ``left`` are aligned to the left, the others to the right.
    """

    def width(text: str) -> int:
        # A Chinese character is two columns wide, a combining mark none.
        return sum(
            0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
            for c in text
        )

    widths = [max(map(width, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for head, cell, wide in zip(rows[0], row, widths, strict=True):
            space = " " * (wide - width(cell))
            cells.append(cell + space if head in left else space + cell)
        print("  ".join(cells).rstrip())
