"""Rows of a task from the files in which people keep them: JSON lines, JSON, SQuAD's JSON, Parquet,
CSV, and columns between tabs."""

import ast
import csv
import io
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtnlg_jax.data.read import open_files
from mtnlg_jax.tasks.layouts import LAYOUTS, READINGS, keys_of, reading_of
from mtnlg_jax.tasks.prompts import Row

FIELDS = ("input", "reference", "context", "choices")
SUFFIXES = ".jsonl, .ndjson, .json, .csv, .tsv and .txt (each also with .gz, .zst, .bz2 or .xz), and .parquet"
_TABLES = (".csv", ".tsv", ".txt")
_JSON = (".jsonl", ".ndjson", ".json")
_SQUAD = {"input": "question", "reference": "answers", "context": "context"}
_LETTER = re.compile(r"\s*[(（]?([A-Za-z])[)）]?[.:、．：]?\s*")
_NUMBER = re.compile(r"\s*[(（]?(\d+)(?:\.0+)?[)）]?\s*")
_YES_NO = ({"yes", "true", "是", "对", "正确"}, {"no", "false", "否", "不是", "不对", "错误", "错"})
# A first line whose cells, in the columns asked for, are all of these is a head.
_HEADS = {
    key.casefold()
    for layout in LAYOUTS
    for column in layout.columns.values()
    for key in keys_of(column)
    if len(key) > 1
} | set(FIELDS)


@dataclass
class _Parsed:
    """A row before its references are known."""

    where: str
    texts: dict[str, str]
    choices: tuple[str, ...]
    names: tuple[str, ...] | None  # what the file itself calls the choices: A, B, ...
    right: tuple[int, ...] | None  # where the choices themselves say which are right
    values: list  # references as they stand


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
    """The rows of a file.

    .jsonl, .ndjson: an object a line; .json: such lines, a list of objects, a dict of columns, or
    the questions of a file in SQuAD's layout; .csv: records with a head, between commas, semicolons
    or tabs; .tsv, .txt: a row a line, its columns between tabs; .parquet. UTF-8, or UTF-16 with a
    byte order mark.

    Args:
      columns: where each of FIELDS stands: the key of an object (``a.b`` for b inside a), the
        number of a column from 0, or its name in the first line, which then is a head. Several keys
        are written ``sol1+sol2``: choices one a column, texts joined by spaces. None: the fields'
        own names, else the first of `layouts.LAYOUTS` whose keys are all there, else in .tsv and
        .txt input=0 and reference=1. A key that is named for one field is read for no other.
      labels: what references are renamed to, as {"0": "negative", "1": "positive"}.
      limit: as many rows, drawn by ``seed``, in the order of the file; all where it has no more.
      needs: fields without which a row is refused.
      choices: those of every row that holds none.
      notes: gets a line for everything that was decided or left out.
    A list of texts as input or context is joined by spaces; several references are a list. Choices
    are a list of texts or of {"label", "text"}, {"text": [...], "label": [...]}, {"A": text, ...},
    or {text: score}.

    With choices a reference is a choice's text, its name in the file, its letter, or its number
    from 0 or from 1. The names in the file come first; else the one way that fits every row of the
    file is taken. Where numbers from 0 and from 1 both fit, they count from 0, unless the choices
    stand in columns whose own numbers start at 1. What stays ambiguous is refused:
    ``reference=KEY@0``, ``@1``, ``@letter`` or ``@text`` says it. False and true are "no" and "yes"
    among the choices, else 0 and 1.
    Raises OSError, and ValueError naming the row.
    """
    path = Path(path)
    labels = dict(labels or {})
    notes = [] if notes is None else notes
    for field in columns or {}:
        if field not in FIELDS:
            raise ValueError(
                f"column {field!r} is not known; name those of {', '.join(FIELDS)}, as in input=0"
            )
    named = set(columns or {})
    kind = _kind(path)
    if kind in _TABLES:
        items, columns = _table(path, kind, columns, needs, notes)
    else:
        items, columns = _objects(path, kind, columns, needs, notes)
    blank = ""
    if columns is None:
        columns, choices, blank = _layout_of(items, choices, notes)
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
        _parse(f"{path}, row {number}", item, columns, tuple(choices), needs)
        for number, item in items
    ]
    if not parsed:
        raise ValueError(f"{path} holds no rows; give at least one")
    rows = _resolved(path, parsed, columns, labels, blank, notes)
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
    """Raises ValueError where a key that was named stands in no row."""
    objects = [item for _, item in items if isinstance(item, dict)]
    for field, column in columns.items():
        for key in [] if any(column in item for item in objects) else keys_of(column):
            if objects and all(key not in item and _get(item, key) is None for item in objects):
                raise ValueError(
                    f"{path}: no row has a {field} under {key!r}, the first one only "
                    f"{', '.join(map(str, objects[0]))[:80]}; name the right one, as "
                    "in "
                    f"--columns={field}=KEY"
                )


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in open_files.PACKED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in (*_TABLES, *_JSON, ".parquet"):
        raise ValueError(f"{path} has an unknown suffix; rows are read from {SUFFIXES}")
    return kind


def _text(path: Path) -> str:
    try:
        with open_files.open_file(str(path)) as stream:
            data = stream.read()
    except open_files.COMPRESSION_ERRORS as error:
        raise ValueError(f"{path}: the compressed file is cut short or damaged ({error})") from None
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not {'UTF-16' if wide else 'UTF-8'} at byte {error.start}; "
            "convert it, as with "
            "iconv"
        ) from None


def _layout_of(items, choices, notes):
    """(columns, choices, blank) where nobody named columns."""
    first = items[0][1] if items else {}
    if isinstance(first, dict) and "input" not in first:
        layout = next(
            (layout for layout in LAYOUTS if layout.fits(lambda key: _get(first, key) is not None)),
            None,
        )
        if layout:
            told = ",".join(f"{field}={column}" for field, column in layout.columns.items())
            notes.append(f"columns taken as those of {layout.name}: --columns={told}")
            return layout.columns, choices or layout.choices, layout.blank
    return {field: field for field in FIELDS}, choices, ""


# Objects


def _objects(path: Path, kind: str, columns, needs, notes):
    """((number, object) of each row, columns or None)."""
    if kind == ".parquet":
        return list(enumerate(_parquet(path), 1)), columns
    text = _text(path)
    # Not splitlines: a text may hold U+2028 and the like.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return [], columns
    if len(lines) > 1 or kind != ".json":
        try:
            alone = isinstance(json.loads(lines[0][1], strict=False), dict)
        except (ValueError, RecursionError):
            alone = False
        if alone:
            return [
                (number, _json(f"{path}, row {number}", line)) for number, line in lines
            ], columns
    try:
        whole = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        if kind == ".json":
            raise ValueError(
                f"{path}: not valid JSON ({error}), neither as a whole nor line by line"
            ) from None
        number, line = lines[0]
        return [(number, _json(f"{path}, row {number}", line))], columns
    return _whole(path, kind, whole, columns, needs, notes)


def _json(where: str, text: str):
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def _parquet(path: Path) -> list[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path} is not a readable Parquet file ({str(error).splitlines()[0]})"
        ) from None


def _whole(path: Path, kind: str, whole, columns, needs, notes):
    """The rows of one JSON value."""
    if isinstance(whole, dict) and isinstance(whole.get("data"), list) and not _flat(whole["data"]):
        return list(enumerate(_squad(path, whole["data"], needs, notes), 1)), _SQUAD | dict(
            columns or {}
        )
    if isinstance(whole, dict):
        whole = _of_dict(path, whole, columns)
    if not isinstance(whole, list):
        raise ValueError(
            f"{path} holds a {type(whole).__name__}; give a list of objects, or SQuAD's layout"
        )
    if whole and all(
        isinstance(each, list) and len(each) >= 2 and isinstance(each[1], list) for each in whole
    ):
        # C3 of CLUE: [sentences, [{question, choice, answer}, ...], id].
        whole = [
            {**asked, "dialogue": each[0]}
            for each in whole
            for asked in each[1]
            if isinstance(asked, dict)
        ]
    if whole and all(
        isinstance(each, dict) and isinstance(each.get("qas"), list) for each in whole
    ):
        whole = [
            {**asked, "context": each.get("context", each.get("context_text"))}
            for each in whole
            for asked in each["qas"]
            if isinstance(asked, dict)
        ]
    if whole and all(
        isinstance(each, dict) and isinstance(each.get("row"), dict) for each in whole
    ):
        whole = [each["row"] for each in whole]  # as the hub's server of rows wraps them
    if kind != ".json" and whole and not isinstance(whole[0], dict):
        return [(1, whole)], columns
    return list(enumerate(whole, 1)), columns


def _flat(data: list) -> bool:
    """Whether these are rows, and not SQuAD's articles."""
    return (
        bool(data)
        and all(isinstance(each, dict) for each in data)
        and any("paragraphs" not in each and each for each in data)
    )


def _squad(path: Path, articles: list, needs, notes) -> list[dict]:
    try:
        asked = [
            (question, paragraph["context"])
            for article in articles
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
        found = [
            {
                **question,
                "context": context,
                "answers": [each["text"] for each in question.get("answers", [])],
            }
            for question, context in asked
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} has 'data' as SQuAD's files do, but not their layout below it "
            f"({error!r}); make "
            "it a list of objects"
        ) from None
    answered = [each for each in found if each["answers"]]
    if "reference" in needs and len(answered) < len(found):
        notes.append(
            f"{len(found) - len(answered):,} of {len(found):,} questions have no answer "
            "in their passage and "
            "are left out"
        )
        return answered
    return found


def _of_dict(path: Path, whole: dict, columns):
    """A list of objects from an object that holds them; the object itself as the one row where it
    is a row."""
    own = columns or {"input": "input"}
    if all(_get(whole, key) is not None for key in keys_of(own.get("input", "input"))) and not all(
        isinstance(value, list | dict) for value in whole.values()
    ):
        return [whole]
    if any(
        layout.fits(lambda key: _get(whole, key) is not None)
        and isinstance(_get(whole, keys_of(layout.columns["input"])[0]), str)
        for layout in LAYOUTS
    ):
        return [whole]
    lists = [
        key
        for key, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    ]
    if len(lists) == 1:
        return whole[lists[0]]
    if lists:
        raise ValueError(
            f"{path} holds a dict of the lists {', '.join(map(repr, lists))}; write "
            "the one to read to a "
            "file of its own"
        )
    values = list(whole.values())
    if values and all(
        isinstance(value, list) and value and len(value) == len(values[0]) for value in values
    ):
        return [dict(zip(whole, cells, strict=True)) for cells in zip(*values, strict=True)]
    if values and all(
        isinstance(value, dict) and value and value.keys() == values[0].keys() for value in values
    ):
        return [{name: value[key] for name, value in whole.items()} for key in values[0]]
    if values and not any(isinstance(value, list) for value in values):
        return [whole]
    return whole


# Tables


def _table(path: Path, kind: str, columns, needs, notes):
    """((number, object) of each record, columns as keys of it or None where the head names
    them)."""
    text = _text(path).replace("\r\n", "\n").replace("\r", "\n")
    records = _csv(path, text) if kind == ".csv" else _tabbed(text)
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
                f"{path}: the first line names {', '.join(head)[:80]}, none of them "
                "as known sets do; say "
                "where things stand, as in --columns=input=NAME,reference=NAME, by "
                "numbers from 0 where "
                "there is no head"
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
            notes.append(f"the first line, {', '.join(head)[:80]}, is taken as a head")
        for field, column in columns.items():
            for key in keys_of(column):
                if key not in names and not (key.isdecimal() and int(key) < len(head)):
                    raise ValueError(
                        f"{path}: {field}={key}, but the first line names "
                        f"{', '.join(head)[:80]}; name "
                        "one of them, or give the column's number from 0"
                    )
    items = []
    for number, cells in records[1:]:
        if any(cell.strip() for cell in cells[len(head) :]):
            raise ValueError(
                f"{path}, row {number}: {len(cells)} columns where the first line "
                f"names {len(head)}; put "
                "quotes around texts that hold the separator"
            )
        cells = cells[: len(head)]
        item = dict(zip(names, cells, strict=False))
        items.append(
            (
                number,
                item
                | {str(place): cell for place, cell in enumerate(cells) if str(place) not in item},
            )
        )
    return items, columns


def _csv(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """Records of the separator that splits the most of the first ones alike: a comma where several
    do."""
    found = {}
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
    """Records between tabs. Quotes are part of the texts, as in GLUE's files, unless the file must
    have been written with quoting: every cell of its first line is quoted, every quoted cell holds
    a doubled quote, a tab or a line break, or only with quoting do all lines have as many
    columns."""
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


# Rows


def _get(item, key: str):
    """What an object holds under a key, or under a path of keys with points between; None where
    nothing is."""
    if not isinstance(item, dict):
        return None
    if key in item:
        return item[key]
    for part in key.split("."):
        if isinstance(item, dict) and part in item:
            item = item[part]
        elif isinstance(item, list) and part.isdecimal() and int(part) < len(item):
            item = item[int(part)]
        else:
            return None
    return item


def _parse(
    where: str, item, columns: Mapping[str, str], choices: tuple[str, ...], needs: Sequence[str]
) -> _Parsed:
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
        values = [_get(item, key) for key in keys]
        if field == "choices":
            while len(values) > 1 and values[-1] in (None, ""):
                values.pop()  # questions of fewer choices than there are columns
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
                f"{where}: a choice under {column!r} is empty and those behind it are "
                "not; leave the row "
                "out, or write the choice"
            )
    texts = {
        field: _joined(where, field, found[field])
        for field in ("input", "context")
        if field in found
    }
    values = _values(where, found["reference"]) if "reference" in found else []
    return _Parsed(where, texts, choices, names, right if not values else None, values)


def _joined(where: str, field: str, value) -> str:
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    if not isinstance(value, str):
        raise ValueError(
            f"{where}: {field} is a {type(value).__name__}; give a text, or a list of them"
        )
    return value


def _scored(value) -> bool:
    """Whether choices are {text: score}."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(each, int | float) and not isinstance(each, bool) for each in value.values()
        )
    )


def _choices(where: str, value):
    """(texts, names in the file or None, the right ones or None)."""
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
                "give a list of texts, "
                'or {"text": [...], "label": [...]}'
            )
        if labels is not None and len(texts) > 1 and _one_hot(labels, len(texts)):
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
            "the keys of several "
            "columns as in --columns=choices=sol1+sol2"
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
        # "['a' 'b']", as NumPy prints it, is one text to Python.
        if isinstance(found, list) and len(found) > 1:
            return found
    return value


def _one_hot(values, count: int) -> bool:
    return (
        len(values) == count
        and all(isinstance(each, int) and each in (0, 1) for each in values)
        and sum(values) == 1
    )


def _values(where: str, value) -> list:
    """The references of a row as they stand, none of them empty."""
    if isinstance(value, dict):
        texts = (
            [value.get("value"), *(value.get("aliases") or [])]
            if "value" in value
            else value.get("text")
        )
        if texts is None:
            raise ValueError(
                f"{where}: reference is a dict of {', '.join(map(str, value))[:60]}; "
                "name what to take, "
                "as in --columns=reference=answers.text"
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


# References


def _resolved(
    path: Path, parsed: Sequence[_Parsed], columns, labels: Mapping[str, str], blank: str, notes
):
    chosen = [row for row in parsed if row.choices and row.values and not labels]
    reading = _reading(path, chosen, columns, notes) if chosen else ""
    rows = []
    if twice := sum(len(set(row.choices)) < len(row.choices) for row in parsed):
        notes.append(f"{twice:,} of {len(parsed):,} rows hold equal choices, which count once")
    for row in parsed:
        if row.right is not None:
            references = tuple(row.choices[i] for i in row.right)
        elif labels:
            references = tuple(_renamed(row.where, value, labels) for value in row.values)
        elif row.choices and row.values:
            references = tuple(row.choices[i] for i in _indices(row, reading))
        else:
            references = tuple(map(str, row.values))
        distinct = tuple(dict.fromkeys(row.choices))
        rows.append(
            Row(
                references=references,
                choices=distinct,
                blank=blank if row.choices else "",
                **row.texts,
            )
        )
    return rows


def _renamed(where: str, value, labels: Mapping[str, str]) -> str:
    # True and true; 1.0 where a table of numbers has gaps.
    for name in (str(value), json.dumps(value), re.sub(r"(?<=\d)\.0+$", "", str(value))):
        if name in labels:
            return labels[name]
    raise ValueError(
        f"{where}: reference {str(value)[:40]!r} is none of the labels "
        f"{', '.join(labels)}; name it, too"
    )


def _reading(
    path: Path, rows: Sequence[_Parsed], columns: Mapping[str, str], notes: list[str]
) -> str:
    """How the references name choices: of READINGS, or "name"."""
    column = columns.get("reference", "reference")
    key = keys_of(column)[0]
    ways = f"--columns=reference={key}@0, @1 (numbers that count from there), @letter or @text"
    said = reading_of(column) or _known(columns)
    if said:
        missed = next((row for row in rows if _indices(row, said) is None), None)
        if missed:
            raise ValueError(
                f"{missed.where}: reference {_shown(missed)} names none of the "
                f"{len(missed.choices)} "
                f"choices when read as @{said}; say how it does: {ways}"
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
                f"{len(missed.choices)} "
                "choices, nor the letter or number of one; give it as it stands there"
            )
        seen = {
            reading: next(row for row in rows if _indices(row, reading) is None)
            for reading in READINGS
        }
        row = max(seen.values(), key=lambda row: int(row.where.rpartition(" ")[2]))
        raise ValueError(
            f"{row.where}: reference {_shown(row)} does not name its choice as those "
            "of the rows before "
            "it do; write all of them alike, as texts, letters or numbers"
        )
    if {"0", "1"} <= set(fitting):
        if _numbered_from_1(columns.get("choices", "")):
            raise ValueError(
                f"{path}: no reference is 0 and none is the number of the choices, so "
                "that they may count "
                f"from 0 or from 1; say which: {ways}"
            )
        fitting.remove("1")
        if any(_NUMBER.fullmatch(str(value)) for row in rows for value in row.values):
            notes.append("numbers of the reference count from 0; no row shows otherwise")
    elif fitting == ["1"]:
        notes.append(
            "numbers of the reference count from 1: none is 0, and some are the number of choices"
        )
    for row in rows:
        if len({tuple(_indices(row, reading)) for reading in fitting}) > 1:
            what = " or ".join(
                {"text": "a choice's text", "letter": "a choice's letter"}.get(
                    each, "a choice's number"
                )
                for each in fitting
            )
            raise ValueError(
                f"{row.where}: reference {_shown(row)} may be {what}, and they "
                f"differ; say which: {ways}"
            )
    return fitting[0]


def _known(columns: Mapping[str, str]) -> str:
    """The reading of the layout whose choices and reference stand in these columns."""
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


def _shown(row: _Parsed) -> str:
    return repr(row.values[0] if len(row.values) == 1 else row.values)[:60]


def _indices(row: _Parsed, reading: str) -> list[int] | None:
    """The choices that a row's references name when read so; None where one names none."""
    if len(row.values) > 1 and _one_hot(row.values, len(row.choices)):
        return [row.values.index(1)]
    found = [_index(row, value, reading) for value in row.values]
    return None if None in found else found


def _index(row: _Parsed, value, reading: str) -> int | None:
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
