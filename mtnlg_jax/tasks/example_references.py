"""Resolve references to choices by text, name, letter or number."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtnlg_jax.tasks.example_fields import ParsedRow, is_one_hot
from mtnlg_jax.tasks.layouts import LAYOUTS, READINGS, keys_of, reading_of
from mtnlg_jax.tasks.rendering import Row

_LETTER = re.compile(r"\s*[(（]?([A-Za-z])[)）]?[.:、．：]?\s*")
_NUMBER = re.compile(r"\s*[(（]?(\d+)(?:\.0+)?[)）]?\s*")
_YES_NO = (
    {"yes", "true", "是", "对", "正确"},
    {"no", "false", "否", "不是", "不对", "错误", "错"},
)


def resolve_references(
    path: Path, parsed: Sequence[ParsedRow], columns, labels: Mapping[str, str], blank: str, notes
):
    reading = find_reading(path, parsed, columns, labels, notes)
    if twice := sum(len(set(row.choices)) < len(row.choices) for row in parsed):
        notes.append(f"{twice:,} of {len(parsed):,} rows have duplicate choices, which count once")
    return [resolve_row(row, reading, labels, blank) for row in parsed]


def find_reading(
    path: Path, parsed: Sequence[ParsedRow], columns, labels: Mapping[str, str], notes: list[str]
) -> str:
    """Return how the references of all rows name choices: one of READINGS, "name", or "" if no row
    has both."""
    chosen = [row for row in parsed if row.choices and row.values and not labels]
    return _reading(path, chosen, columns, notes) if chosen else ""


def resolve_row(row: ParsedRow, reading: str, labels: Mapping[str, str], blank: str) -> Row:
    """Return the row with its references; ``reading`` comes from `find_reading`."""
    if row.right is not None:
        references = tuple(row.choices[i] for i in row.right)
    elif labels:
        references = tuple(_renamed(row.where, value, labels) for value in row.values)
    elif row.choices and row.values:
        references = tuple(row.choices[i] for i in _known_indices(row, reading))
    else:
        references = tuple(map(str, row.values))
    return Row(
        references=references,
        choices=tuple(dict.fromkeys(row.choices)),
        blank=blank if row.choices else "",
        **row.texts,
    )


def _renamed(where: str, value, labels: Mapping[str, str]) -> str:
    # Also match True as true, and 1.0 as 1: number columns with gaps become floats.
    for name in (str(value), json.dumps(value), re.sub(r"(?<=\d)\.0+$", "", str(value))):
        if name in labels:
            return labels[name]
    raise ValueError(
        f"{where}: reference {str(value)[:40]!r} is none of the labels {', '.join(labels)}; add it"
    )


def _reading(
    path: Path, rows: Sequence[ParsedRow], columns: Mapping[str, str], notes: list[str]
) -> str:
    """Return how the references name choices: one of READINGS, or "name"."""
    column = columns.get("reference", "reference")
    key = keys_of(column)[0]
    ways = f"--columns=reference={key}@0, @1 (numbers that count from there), @letter or @text"
    said = reading_of(column) or _known(columns)
    if said:
        missed = next((row for row in rows if _indices(row, said) is None), None)
        if missed:
            raise ValueError(
                f"{missed.where}: reference {_shown(missed)} names none of the "
                f"{len(missed.choices)} choices when read as @{said}; "
                f"state how it names them: {ways}"
            )
        return said
    if any(row.names for row in rows) and all(_indices(row, "name") is not None for row in rows):
        return "name"
    fitting = [
        reading
        for reading in ("text", "letter", "0", "1")
        if all(_indices(row, reading) is not None for row in rows)
    ]
    if not fitting:
        missed = next(
            (row for row in rows if all(_indices(row, reading) is None for reading in READINGS)),
            None,
        )
        if missed:
            raise ValueError(
                f"{missed.where}: reference {_shown(missed)} is none of the "
                f"{len(missed.choices)} choices, nor the letter or number of one; copy it exactly"
            )
        seen = {
            reading: next(row for row in rows if _indices(row, reading) is None)
            for reading in READINGS
        }
        row = max(seen.values(), key=lambda row: int(row.where.rpartition(" ")[2]))
        raise ValueError(
            f"{row.where}: reference {_shown(row)} does not name its choice the way "
            "earlier rows do; write all references as texts, as letters or as numbers"
        )
    if {"0", "1"} <= set(fitting):
        if _numbered_from_1(columns.get("choices", "")):
            raise ValueError(
                f"{path}: no reference is 0 and none is the number of the choices, so "
                f"they may count from 0 or from 1; state which: {ways}"
            )
        fitting.remove("1")
        if any(_NUMBER.fullmatch(str(value)) for row in rows for value in row.values):
            notes.append("numbers of the reference count from 0; no row shows otherwise")
    elif fitting == ["1"]:
        notes.append(
            "numbers of the reference count from 1: none is 0, and some are the number of choices"
        )
    for row in rows:
        if len({tuple(_known_indices(row, reading)) for reading in fitting}) > 1:
            what = " or ".join(
                {"text": "a choice's text", "letter": "a choice's letter"}.get(
                    each, "a choice's number"
                )
                for each in fitting
            )
            raise ValueError(
                f"{row.where}: reference {_shown(row)} may be {what}, and they "
                f"differ; state which: {ways}"
            )
    return fitting[0]


def _known(columns: Mapping[str, str]) -> str:
    """Return the reading of the layout that has these columns of choices and reference, or ""."""
    return next(
        (
            reading_of(layout.columns["reference"])
            for layout in LAYOUTS
            if "+" in columns.get("choices", "")
            and layout.columns.get("choices") == columns["choices"]
            and keys_of(layout.columns["reference"]) == [columns.get("reference")]
        ),
        "",
    )


def _numbered_from_1(column: str) -> bool:
    keys = keys_of(column)
    return len(keys) > 1 and all(
        re.search(rf"(?<!\d){number}$", key) for number, key in enumerate(keys, 1)
    )


def _shown(row: ParsedRow) -> str:
    return repr(row.values[0] if len(row.values) == 1 else row.values)[:60]


def _indices(row: ParsedRow, reading: str) -> list[int] | None:
    """Return the indices of the choices that the references name; None if one names none."""
    if len(row.values) > 1 and is_one_hot(row.values, len(row.choices)):
        return [row.values.index(1)]
    found = []
    for value in row.values:
        index = _index(row, value, reading)
        if index is None:
            return None
        found.append(index)
    return found


def _known_indices(row: ParsedRow, reading: str) -> list[int]:
    """Return `_indices` for a reading that is known to fit the row."""
    found = _indices(row, reading)
    assert found is not None, f"reading {reading!r} does not fit {row.where}"
    return found


def _index(row: ParsedRow, value, reading: str) -> int | None:
    if isinstance(value, bool) or (
        isinstance(value, str)
        and value.strip().casefold() in ("true", "false")
        and value.strip() not in row.choices
    ):
        value = str(value).strip().casefold() == "true"
        words = [choice.strip().casefold() for choice in row.choices]
        meant = [i for i, word in enumerate(words) if word in _YES_NO[0 if value else 1]]
        if len(meant) == 1:
            return meant[0]
        return (
            int(value)
            if len(words) == 2 and not any(word in _YES_NO[0] | _YES_NO[1] for word in words)
            else None
        )
    text = str(value)
    if reading == "name":
        return row.names.index(text) if row.names and text in row.names else None
    if reading == "text":
        texts = [choice.strip() for choice in row.choices]
        return texts.index(text.strip()) if text.strip() in texts else None
    match = (_LETTER if reading == "letter" else _NUMBER).fullmatch(text)
    if not match:
        return None
    index = (
        ord(match[1].upper()) - ord("A") if reading == "letter" else int(match[1]) - int(reading)
    )
    return index if 0 <= index < len(row.choices) else None
