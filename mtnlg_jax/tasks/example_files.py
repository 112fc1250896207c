"""Read the rows of a task as dicts from JSON, JSON lines, SQuAD JSON, Parquet and tables."""

import json
from pathlib import Path

from mtnlg_jax.data.read import open_files
from mtnlg_jax.tasks.example_tables import read_table
from mtnlg_jax.tasks.layouts import LAYOUTS, keys_of, value_at

SUFFIXES = (
    ".jsonl, .ndjson, .json, .csv, .tsv and .txt (each also with .gz, .zst, .bz2 or .xz), and "
    ".parquet"
)
TABLES = (".csv", ".tsv", ".txt")
JSON = (".jsonl", ".ndjson", ".json")
_SQUAD = {"input": "question", "reference": "answers", "context": "context"}


def read_items(path: Path, columns, needs, notes, lenient: bool = False):
    """Return ((number, object) of each row, columns or None where the file does not name them).

    ``lenient``: a damaged row is its ValueError in place of the object, where others can be read.
    """
    kind = kind_of(path)
    if kind in TABLES:
        return read_table(path, kind, read_text(path), columns, notes, lenient)
    return _objects(path, kind, columns, needs, notes, lenient)


def kind_of(path: Path) -> str:
    """Return the suffix that says how rows are read, without that of a compression.

    Raises ValueError on an unknown one.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in open_files.PACKED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in (*TABLES, *JSON, ".parquet"):
        raise ValueError(f"{path} has an unknown suffix; rows are read from {SUFFIXES}")
    return kind


def read_text(path: Path) -> str:
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
            "convert it, for example with iconv"
        ) from None


def _objects(path: Path, kind: str, columns, needs, notes, lenient):
    """Return ((number, object) of each row, columns or None)."""
    if kind == ".parquet":
        return list(enumerate(_parquet(path), 1)), columns
    text = read_text(path)
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
                (number, _json(f"{path}, row {number}", line, lenient)) for number, line in lines
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


def _json(where: str, text: str, lenient: bool = False):
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        damage = ValueError(f"{where}: not valid JSON ({error})")
        if lenient:
            return damage
        raise damage from None


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
    """Return the rows of one JSON value and their columns."""
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
        whole = [each["row"] for each in whole]  # the format of the Hugging Face dataset viewer
    if kind != ".json" and whole and not isinstance(whole[0], dict):
        return [(1, whole)], columns
    return list(enumerate(whole, 1)), columns


def _flat(data: list) -> bool:
    """Return whether these are rows rather than SQuAD articles."""
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
            f"({error!r}); "
            "make it a list of objects"
        ) from None
    answered = [each for each in found if each["answers"]]
    if "reference" in needs and len(answered) < len(found):
        notes.append(
            f"{len(found) - len(answered):,} of {len(found):,} questions have no answer in their "
            "passage and are left out"
        )
        return answered
    return found


def _of_dict(path: Path, whole: dict, columns):
    """Return the list of objects that an object holds, or [object] if it is a single row."""
    own = columns or {"input": "input"}
    if all(
        value_at(whole, key) is not None for key in keys_of(own.get("input", "input"))
    ) and not all(isinstance(value, list | dict) for value in whole.values()):
        return [whole]
    if any(
        layout.fits(lambda key: value_at(whole, key) is not None)
        and isinstance(value_at(whole, keys_of(layout.columns["input"])[0]), str)
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
            "the one to read to its own file"
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
