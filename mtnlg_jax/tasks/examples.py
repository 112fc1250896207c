"""Read the rows of a task from JSON lines, JSON, SQuAD JSON, Parquet, CSV and TSV files."""

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtnlg_jax.tasks.example_fields import parse_row
from mtnlg_jax.tasks.example_files import read_items
from mtnlg_jax.tasks.example_references import resolve_references
from mtnlg_jax.tasks.layouts import FIELDS, LAYOUTS, keys_of, value_at
from mtnlg_jax.tasks.rendering import Row


def read_rows(
    path: str | os.PathLike,
    columns: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    limit: int | None = None,
    needs: Sequence[str] = ("input",),
    *,
    seed: int = 0,
    choices: Sequence[str] = (),
    notes: list[str] | None = None,
) -> list[Row]:
    """Read the rows of a file.

    .jsonl and .ndjson hold one object per line. .json holds such lines, a list of objects, a dict
    of columns, or the questions of a file in SQuAD's layout. .csv holds records with a header line,
    separated by commas, semicolons or tabs. .tsv and .txt hold one row per line with columns
    separated by tabs. .parquet is read with PyArrow. Text is UTF-8, or UTF-16 with a byte order
    mark.

    Args:
      columns: the location of each of FIELDS: the key of an object (``a.b`` for b inside a), the
        number of a column from 0, or its name in the first line, which then is a header. Several
        keys are written ``sol1+sol2``: choices take one column each, texts are joined by spaces.
        None: the fields' own names; else the first of `layouts.LAYOUTS` whose keys are all present;
        else, in .tsv and .txt, input=0 and reference=1. A key named for one field is read for no
        other field.
      labels: new names of references, such as {"0": "negative", "1": "positive"}.
      limit: maximum number of rows, drawn by ``seed`` and kept in the order of the file.
      needs: required fields; a row without them is an error.
      choices: choices of every row that has none of its own.
      notes: a list that receives one line for each guess and for rows left out.

    A list of texts as input or context is joined by spaces; several references are a list. Choices
    are a list of texts or of {"label", "text"}, {"text": [...], "label": [...]}, {"A": text, ...},
    or {text: score}.

    With choices, a reference is a choice's text, its name in the file, its letter, or its number
    from 0 or from 1. Names in the file are tried first, then the one reading that fits every row of
    the file. If numbers from 0 and from 1 both fit, they count from 0, unless the choices come from
    columns numbered from 1. Ambiguous references are an error; ``reference=KEY@0``, ``@1``,
    ``@letter`` or ``@text`` resolves them. False and true are "no" and "yes" among the choices,
    else 0 and 1.

    Raises:
      OSError: the file cannot be read.
      ValueError: a row is invalid; the message names it.
    """
    path = Path(path)
    labels = dict(labels or {})
    notes = [] if notes is None else notes
    for field in columns or {}:
        if field not in FIELDS:
            raise ValueError(
                f"unknown column {field!r}; name some of {', '.join(FIELDS)}, as in input=0"
            )
    named = set(columns or {})
    items, columns = read_items(path, columns, needs, notes)
    blank = ""
    if columns is None:
        columns, choices, blank = layout_of(items, choices, notes)
    else:
        taken = {key for column in columns.values() for key in keys_of(column)}
        _check_named(
            path,
            items,
            {
                field: column
                for field, column in columns.items()
                if field in named and field not in needs
            },
        )
        columns = {field: field for field in FIELDS if field not in taken} | dict(columns)
    parsed = [
        parse_row(f"{path}, row {number}", item, columns, tuple(choices), needs)
        for number, item in items
    ]
    if not parsed:
        raise ValueError(f"{path} holds no rows; give at least one")
    rows = resolve_references(path, parsed, columns, labels, blank, notes)
    answered = [row for row in rows if row.references]
    if "reference" in needs and answered and len(answered) < len(rows):
        notes.append(
            f"{len(rows) - len(answered):,} of {len(rows):,} rows have no answer and are left out"
        )
        rows = answered
    if limit is not None and limit < len(rows):
        kept = sorted(random.Random(seed).sample(range(len(rows)), limit))
        notes.append(f"{limit:,} of {len(rows):,} rows, drawn by seed {seed}")
        rows = [rows[i] for i in kept]
    return rows


def _check_named(path: Path, items, columns: Mapping[str, str]) -> None:
    """Check that each named key is in at least one row, or raise ValueError."""
    objects = [item for _, item in items if isinstance(item, dict)]
    for field, column in columns.items():
        for key in [] if any(column in item for item in objects) else keys_of(column):
            if objects and all(key not in item and value_at(item, key) is None for item in objects):
                raise ValueError(
                    f"{path}: no row has a {field} under {key!r}, the first one only "
                    f"{', '.join(map(str, objects[0]))[:80]}; name the right one, as in "
                    f"--columns={field}=KEY"
                )


def layout_of(items, choices, notes):
    """Return (columns, choices, blank) of the first layout that fits the rows."""
    first = items[0][1] if items else {}
    if isinstance(first, dict) and "input" not in first:
        layout = next(
            (
                layout
                for layout in LAYOUTS
                if layout.fits(lambda key: value_at(first, key) is not None)
            ),
            None,
        )
        if layout:
            flags = ",".join(f"{field}={column}" for field, column in layout.columns.items())
            notes.append(f"columns taken as those of {layout.name}: --columns={flags}")
            return layout.columns, choices or layout.choices, layout.blank
    return {field: field for field in FIELDS}, choices, ""
