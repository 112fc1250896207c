"""Read the rows of a task from CSV files and from text files with tab-separated columns."""

import csv
import io
from pathlib import Path
from typing import Any

from mtnlg_jax.tasks.layouts import FIELDS, LAYOUTS, keys_of

# A first line is a header if its cells, in the requested columns, are all among these.
_HEADS = {
    key.casefold()
    for layout in LAYOUTS
    for column in layout.columns.values()
    for key in keys_of(column)
    if len(key) > 1
} | set(FIELDS)


def read_table(path: Path, kind: str, text: str, columns, notes, lenient: bool = False):
    """Return ((number, object) of each record, columns), None if the header names the columns.

    ``lenient``: a record with too many columns is its ValueError in place of the object.
    """
    records = read_records(path, kind, text)
    if not records:
        return [], columns or {}
    head = records[0][1]
    names = {head_name.strip(): head_name for head_name in head}
    if columns is None:
        known = any(layout.fits(lambda key: key in names) for layout in LAYOUTS) or {
            "input",
            "reference",
        } <= set(names)
        if known:
            columns = None
        elif kind == ".csv":
            raise ValueError(
                f"{path}: the first line names {', '.join(head)[:80]}, which match "
                "no known data set; name the columns, as in "
                "--columns=input=NAME,reference=NAME, or give their numbers from 0 if there is no "
                "header"
            )
        else:
            columns = {"input": "0", "reference": "1"}
    if columns is not None:
        keys = [key for column in columns.values() for key in keys_of(column)]
        if all(key.isdecimal() for key in keys):
            asked = [head[int(key)].strip().casefold() for key in keys if int(key) < len(head)]
            if not asked or not set(asked) <= _HEADS:
                return [
                    (number, dict(zip(map(str, range(len(cells))), cells, strict=True)))
                    for number, cells in records
                ], columns
            notes.append(f"the first line, {', '.join(head)[:80]}, is taken as a header")
        for field, column in columns.items():
            for key in keys_of(column):
                if key not in names and not (key.isdecimal() and int(key) < len(head)):
                    raise ValueError(
                        f"{path}: {field}={key}, but the first line names "
                        f"{', '.join(head)[:80]}; "
                        "name one of them, or give the column's number from 0"
                    )
    items: list[tuple[int, Any]] = []
    for number, cells in records[1:]:
        if any(cell.strip() for cell in cells[len(head) :]):
            damage = ValueError(
                f"{path}, row {number}: {len(cells)} columns where the first line "
                f"names {len(head)}; "
                "put quotes around texts that hold the separator"
            )
            if not lenient:
                raise damage
            items.append((number, damage))
            continue
        cells = cells[: len(head)]
        item: dict[str, str] = {}
        for name, cell in zip(head, cells, strict=False):
            # The first of several columns with one name counts.
            item.setdefault(name.strip(), cell)
        items.append(
            (
                number,
                item
                | {str(index): cell for index, cell in enumerate(cells) if str(index) not in item},
            )
        )
    return items, columns


def read_records(path: Path, kind: str, text: str) -> list[tuple[int, list[str]]]:
    """Return (number of its first line, cells) of each record, the header among them."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _csv(path, text) if kind == ".csv" else _tabbed(text)


def _csv(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Split records at the separator that gives most of the first ones the same width.

    Ties go to the comma.
    """
    found: dict[str, tuple[int, int, list[tuple[int, list[str]]] | str]] = {}
    for separator in ",;\t|":
        try:
            records = _quoted(text, separator)
        except csv.Error as error:
            found[separator] = (0, 0, str(error))
            continue
        widths = [len(cells) for _, cells in records[:100]]
        alike = sum(width == widths[0] for width in widths) if widths and widths[0] > 1 else 0
        found[separator] = (alike, -len(found), records)
    best = max(found.values(), key=lambda each: each[:2])
    if isinstance(best[2], str):
        raise ValueError(
            f"{path}: not valid CSV ({best[2]}); close every quote, and double those inside texts"
        )
    return best[2]


def _quoted(text: str, separator: str) -> list[tuple[int, list[str]]]:
    csv.field_size_limit(1 << 30)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=False
    )
    records = []
    line = 1
    for cells in reader:
        if any(cell.strip() for cell in cells):
            records.append((line, cells))
        line = reader.line_num + 1
    return records


def _tabbed(text: str) -> list[tuple[int, list[str]]]:
    """Split records at tabs.

    Quotes are part of the texts, as in GLUE's files, unless the file was clearly written with
    quoting: every cell of its first line is quoted, every quoted cell holds a doubled quote, a tab
    or a line break, or only with quoting do all lines have the same number of columns.
    """
    plain = [
        (number, line.split("\t"))
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]
    if not any(cell.startswith('"') for _, cells in plain for cell in cells):
        return plain
    try:
        quoted = _quoted(text, "\t")
    except csv.Error:
        return plain
    if (
        quoted
        and plain
        and all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in plain[0][1])
    ):
        return quoted
    wrapped = [cell for _, cells in plain for cell in cells if cell.startswith('"')]
    even = len({len(cells) for _, cells in quoted}) == 1
    if even and len({len(cells) for _, cells in plain}) > 1:
        return quoted
    needed = all(len(cell) > 2 and cell.endswith('"') and '""' in cell[1:-1] for cell in wrapped)
    return quoted if even and needed else plain
