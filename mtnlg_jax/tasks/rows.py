"""Rows of a task from the files in which people keep them: JSON lines, JSON, SQuAD's JSON, and columns between tabs."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtnlg_jax.tasks.prompts import Row

FIELDS = ("input", "reference", "context", "choices")
_SQUAD = {"input": "question", "reference": "answers", "context": "context"}


def read_rows(path: str | os.PathLike, columns: Mapping[str, str] | None = None,
              labels: Mapping[str, str] | None = None, limit: int | None = None, needs: Sequence[str] = ("input",),
              ) -> list[Row]:
    """The rows of a file.

    .jsonl, .ndjson: an object a line; .json: a list of objects, or the questions of a file in SQuAD's layout; .tsv,
    .txt: a row a line, its columns between tabs.

    Args:
      columns: where each of FIELDS stands: the key of an object, the number of a column from 0, or its name in the
        first line, which then is a head. What is not named has its own name as key, and in columns input=0 and
        reference=1. A list of texts as input or context is joined by spaces; several references are a list; a
        reference that is a number where there are choices counts them from 0.
      labels: what references are renamed to, as {"0": "negative", "1": "positive"}.
      needs: fields without which a row is refused.
    Raises OSError, and ValueError naming the row.
    """
    path, columns, labels = Path(path), dict(columns or {}), dict(labels or {})
    for field in columns:
        if field not in FIELDS:
            raise ValueError(f"column {field!r} is not known; name those of {', '.join(FIELDS)}, as in input=0")
    kind = path.suffix.lower()
    if kind in (".tsv", ".txt"):
        items, columns = _columns(path, columns or {"input": "0", "reference": "1"}, needs)
    elif kind in (".jsonl", ".ndjson", ".json"):
        items, squad = _objects(path, kind)
        columns = {field: field for field in FIELDS} | (_SQUAD if squad else {}) | columns
    else:
        raise ValueError(f"{path} has an unknown suffix; rows are read from .jsonl, .ndjson, .json, .tsv and .txt")
    rows = []
    for number, item in items:
        if limit is not None and len(rows) == limit:
            break
        rows.append(_row(f"{path}, row {number}", item, columns, labels, needs))
    if not rows:
        raise ValueError(f"{path} holds no rows; give at least one")
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; convert it, as with iconv") from None


def _objects(path: Path, kind: str):
    """(number, object) of each row, and whether they are SQuAD's."""
    text = _text(path)
    if kind != ".json":
        # Not splitlines: a text may hold U+2028 and the like.
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(number, _json(f"{path}, row {number}", line)) for number, line in lines], False
    whole = _json(str(path), text)
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        try:
            found = [{**asked, "context": paragraph["context"], "answers": [each["text"] for each in asked["answers"]]}
                     for article in whole["data"] for paragraph in article["paragraphs"] for asked in paragraph["qas"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has 'data' as SQuAD's files do, but not their layout below it ({error!r}); make "
                             "it a list of objects") from None
        return list(enumerate(found, 1)), True
    if not isinstance(whole, list):
        raise ValueError(f"{path} holds a {type(whole).__name__}; give a list of objects, or SQuAD's layout")
    return list(enumerate(whole, 1)), False


def _json(where: str, text: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def _columns(path: Path, columns: dict[str, str], needs: Sequence[str]):
    """(number, object) of each line, and the columns as keys of it."""
    lines = [(number, line.split("\t")) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()]
    if not all(value.isdecimal() for value in columns.values()) and lines:
        head = lines.pop(0)[1]
        for field, value in columns.items():
            if not value.isdecimal() and value not in head:
                raise ValueError(f"{path}: {field}={value}, but the first line names {', '.join(head)[:80]}; name one "
                                 "of them, or give the column's number from 0")
        columns = {field: value if value.isdecimal() else str(head.index(value)) for field, value in columns.items()}
    items = [(number, dict(zip(map(str, range(len(cells))), cells, strict=True))) for number, cells in lines]
    return items, columns


def _row(where: str, item, columns: Mapping[str, str], labels: Mapping[str, str], needs: Sequence[str]) -> Row:
    if not isinstance(item, dict):
        raise ValueError(f"{where}: a {type(item).__name__}, not an object with {' and '.join(needs)}")
    found = {}
    for field in FIELDS:
        key = columns.get(field)
        if key is not None and item.get(key) not in (None, "", []):
            found[field] = item[key]
        elif field in needs:
            keys = ", ".join(map(str, item))[:80]
            raise ValueError(f"{where}: no {field} under {key or field!r}, only {keys}; name the right one, as in "
                             f"--columns={field}=KEY")
    texts = {field: _joined(where, field, found[field]) for field in ("input", "context") if field in found}
    choices = found.get("choices", [])
    if not isinstance(choices, list):
        raise ValueError(f"{where}: choices are a {type(choices).__name__}; give a list of texts")
    choices = tuple(map(str, choices))
    references = found.get("reference", [])
    references = references if isinstance(references, list) else [references]
    return Row(references=tuple(_reference(where, each, choices, labels) for each in references), choices=choices,
               **texts)


def _joined(where: str, field: str, value) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field} is a {type(value).__name__}; give a text, or a list of them")
    return value


def _reference(where: str, value, choices: tuple[str, ...], labels: Mapping[str, str]) -> str:
    if choices and isinstance(value, int):  # bool, too: false counts as 0
        if not 0 <= value < len(choices):
            raise ValueError(f"{where}: reference {value}, but the {len(choices)} choices are counted from 0")
        return choices[value]
    if labels:
        if str(value) not in labels:
            raise ValueError(f"{where}: reference {str(value)[:40]!r} is none of the labels {', '.join(labels)}; name "
                             "it, too")
        return labels[str(value)]
    return str(value)
