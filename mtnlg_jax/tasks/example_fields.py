"""Parse one row of a task: its texts, its choices and its unresolved references."""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtnlg_jax.tasks.layouts import keys_of, value_at


@dataclass
class ParsedRow:
    """A row whose references are not yet resolved to choices."""

    where: str
    texts: dict[str, str]
    choices: tuple[str, ...]
    names: tuple[str, ...] | None  # names of the choices in the file: A, B, ...
    right: tuple[int, ...] | None  # right choices, if the choices themselves mark them
    values: list  # references as written in the file


def parse_row(
    where: str, item, columns: Mapping[str, str], choices: tuple[str, ...], needs: Sequence[str]
) -> ParsedRow:
    if not isinstance(item, dict):
        raise ValueError(
            f"{where}: a {type(item).__name__}, not an object with {' and '.join(needs)}"
        )
    found = {}
    names = right = None
    for field in ("choices", "input", "context", "reference"):
        column = columns.get(field)
        if column is None:
            keys = []
        else:
            keys = [column] if column in item else keys_of(column)
        values = [value_at(item, key) for key in keys]
        if field == "choices":
            while len(values) > 1 and values[-1] in (None, ""):
                values.pop()  # rows may have fewer choices than columns
        if values and not any(value is None or value == "" or value == [] for value in values):
            found[field] = values if len(keys) > 1 else values[0]
            if field == "choices":
                choices, names, right = _choices(where, found[field])
        elif field in needs and not (field == "reference" and right is not None):
            raise ValueError(
                f"{where}: no {field} under {column or field!r}, only "
                f"{', '.join(map(str, item))[:80]}; name the right one, as in "
                f"--columns={field}=KEY"
            )
        elif (
            field == "choices"
            and len(keys) > 1
            and any(value not in (None, "") for value in values)
        ):
            raise ValueError(
                f"{where}: a choice under {column!r} is empty and a later one is not; "
                "leave the row out, or write the choice"
            )
    texts: dict[str, str] = {
        field: _joined(where, field, found[field])
        for field in ("input", "context")
        if field in found
    }
    values = _values(where, found["reference"]) if "reference" in found else []
    return ParsedRow(where, texts, choices, names, right if not values else None, values)


def _joined(where: str, field: str, value) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {field} is a {type(value).__name__}; give a text, or a list of them"
        )
    return value


def _scored(value) -> bool:
    """Return whether choices are {text: score}."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(each, int | float) and not isinstance(each, bool) for each in value.values()
        )
    )


def _choices(where: str, value):
    """Return (texts, names in the file or None, indices of right choices or None)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _literal(value)  # a list in one cell of a table
    if _scored(value):
        best = max(value.values())
        return (
            tuple(value),
            None,
            tuple(i for i, score in enumerate(value.values()) if score == best),
        )
    if isinstance(value, dict):
        lists = {name: each for name, each in value.items() if isinstance(each, list)}
        texts = next(
            (lists[name] for name in ("text", "texts", "choices", "options") if name in lists), None
        )
        labels = next((lists[name] for name in ("label", "labels", "key") if name in lists), None)
        if (
            texts is None
            and not lists
            and value
            and all(isinstance(each, str) for each in value.values())
        ):
            return tuple(value.values()), tuple(value), None  # {"A": text, "B": text}
        if texts is None or (labels is not None and len(labels) != len(texts)):
            raise ValueError(
                f"{where}: choices are a dict of {', '.join(map(str, value))[:60]}; "
                'give a list of texts, or {"text": [...], "label": [...]}'
            )
        if labels is not None and len(texts) > 1 and is_one_hot(labels, len(texts)):
            return _texts(where, texts), None, (labels.index(1),)
        return _texts(where, texts), None if labels is None else tuple(map(str, labels)), None
    if (
        isinstance(value, list)
        and value
        and all(isinstance(each, dict) and "text" in each for each in value)
    ):
        key = next(
            (key for key in ("label", "key", "id") if all(key in each for each in value)), None
        )
        names = None if key is None else tuple(str(each[key]) for each in value)
        return _texts(where, [each["text"] for each in value]), names, None
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: choices are a {type(value).__name__}; give a list of texts, or "
            "the keys of several columns as in --columns=choices=sol1+sol2"
        )
    return _texts(where, value), None, None


def _texts(where: str, values: list) -> tuple[str, ...]:
    for number, value in enumerate(values, 1):
        if not isinstance(value, str | int | float):
            raise ValueError(
                f"{where}: choice {number} of {len(values)} is a "
                f"{type(value).__name__}; give a text"
            )
    return tuple(map(str, values))


def _literal(value: str):
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError):
            continue
        # NumPy prints "['a' 'b']", which Python reads as one concatenated text.
        if isinstance(found, list) and len(found) > 1:
            return found
    return value


def is_one_hot(values, count: int) -> bool:
    return (
        len(values) == count
        and all(isinstance(each, int) and each in (0, 1) for each in values)
        and sum(values) == 1
    )


def _values(where: str, value) -> list:
    """Return the references of a row as written in the file, none of them empty."""
    if isinstance(value, dict):
        texts = (
            [value.get("value"), *(value.get("aliases") or [])]
            if "value" in value
            else value.get("text")
        )
        if texts is None:
            raise ValueError(
                f"{where}: reference is a dict of {', '.join(map(str, value))[:60]}; "
                "name the key to use, as in --columns=reference=answers.text"
            )
        value = texts
    values = value if isinstance(value, list) else [value]
    values = [
        each["text"] if isinstance(each, dict) and "text" in each else each for each in values
    ]
    for each in values:
        if not isinstance(each, str | int | float):
            raise ValueError(
                f"{where}: reference is a {type(each).__name__}; give a text, a "
                "number, or a list of them"
            )
    return values
