"""The rows of --inputs: read as they are needed, each with its id and its other columns."""

import dataclasses
import datetime
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mtnlg_jax.tasks.example_fields import ParsedRow, parse_row
from mtnlg_jax.tasks.example_references import find_reading, resolve_row
from mtnlg_jax.tasks.examples import layout_of
from mtnlg_jax.tasks.layouts import FIELDS, LAYOUTS, keys_of, value_at
from mtnlg_jax.tasks.many.records import Source, columns_of
from mtnlg_jax.tasks.rendering import Row

# The first rows, which show where a file keeps its fields.
_SHOWN = 100


@dataclasses.dataclass(frozen=True)
class Item:
    """A row of the inputs. Either ``row`` is there to be answered, or ``error`` says why not."""

    number: int  # from 1
    id: Any  # the row's own id, or None
    columns: dict[str, Any]  # its other columns
    row: Row | None
    error: str = ""


class Inputs:
    """The rows of a file or of a folder of texts.

    Attributes:
      count: number of rows, those with errors included.
      digest: SHA-256 of what was read.
      names: the keys of all rows.
      notes: a line for each guess.
    """

    def __init__(
        self,
        path: str,
        columns: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
        *,
        choices: Sequence[str] = (),
        blank: str = "",
        limit: int | None = None,
        seed: int = 0,
    ):
        """Read all rows once, to count them and to find out where they keep their fields.

        Args:
          path: a file as of `examples.read_rows`, or a folder whose texts are one row each.
          columns, labels, choices: as of `examples.read_rows`; a row needs an input alone.
            Without ``columns``, the input may also be under one of `records.TEXT_KEYS`. References
            that ``labels`` lacks stay as they are.
          blank: the mark in the input that choices replace.
          limit: the maximum number of rows, drawn by ``seed``.

        Raises:
          OSError: the file cannot be read.
          ValueError: no row has the input column, or the file cannot be read as rows.
        """
        for field in columns or {}:
            if field not in FIELDS:
                raise ValueError(
                    f"unknown column {field!r}; name some of {', '.join(FIELDS)}, as in input=0"
                )
        self.notes: list[str] = []
        self._source = Source(path)
        self.digest = self._source.digest
        self._asked = dict(columns) if columns else self._source.columns(self.notes)
        self._labels = dict(labels or {})
        self._columns, self._choices, self._blank = self._layout(choices)
        self._blank = blank or self._blank
        self._reading = ""
        self.count = 0
        self.names: dict[str, None] = {}
        self._check_all(named=set(columns or {}))
        self._kept: set[int] | None = None
        if limit is not None and limit < self.count:
            drawn = random.Random(seed).sample(range(1, self.count + 1), limit)
            self._kept = set(drawn)
            self.notes.append(f"{limit:,} of {self.count:,} rows, drawn by seed {seed}")
        if left := self._source.left_out:
            self.notes.append(f"{len(left):,} other files are left out: {', '.join(left[:3])}")

    @property
    def asked(self) -> int:
        """The number of rows that `items` gives."""
        return self.count if self._kept is None else len(self._kept)

    def items(self) -> Iterator[Item]:
        """Yield the rows in their order."""
        for number, record in enumerate(self._records([]), 1):
            if self._kept is None or number in self._kept:
                yield self._item(number, record)

    def _records(self, notes: list[str]) -> Iterator:
        return self._source.records(self._asked, notes)

    def _layout(self, choices: Sequence[str]):
        """Return (columns, choices, blank) by the flags, or else by the keys of the first rows."""
        if self._asked is not None:
            taken = {key for column in self._asked.values() for key in keys_of(column)}
            own = {field: field for field in FIELDS if field not in taken}
            return own | self._asked, tuple(choices), ""
        shown = [
            record for record, _ in zip(self._records(self.notes), range(_SHOWN), strict=False)
        ]
        objects = [record for record in shown if isinstance(record, dict)]
        plain = {field: field for field in FIELDS}
        for record in objects:
            if "input" in record or any(_fits(layout, record) for layout in LAYOUTS):
                return layout_of([(1, record)], tuple(choices), self.notes)
        if objects and all(key.isdecimal() for key in objects[0]):
            return plain | {"input": "0", "reference": "1"}, tuple(choices), ""
        found = columns_of(list(dict.fromkeys(key for each in objects for key in each)), self.notes)
        return plain | (found or {}), tuple(choices), ""

    def _check_all(self, named: set[str]) -> None:
        """Count the rows, and check that the named columns exist and references can be read."""
        chosen: list[ParsedRow] = []
        missing = {field: keys_of(self._columns[field]) for field in {"input", *named}}
        first: dict | None = None
        error = ""
        for number, record in enumerate(self._records([]), 1):
            self.count = number
            if not isinstance(record, dict):
                error = error or self._item(number, record).error
                continue
            first = first or record
            self.names |= dict.fromkeys(record)
            for field, keys in list(missing.items()):
                if self._columns[field] in record or any(
                    value_at(record, key) is not None for key in keys
                ):
                    del missing[field]
            try:
                parsed = self._parse(number, record)
            except ValueError:
                continue
            if parsed.choices and parsed.values and not self._labels:
                chosen.append(dataclasses.replace(parsed, texts={}))
        if not self.count:
            raise ValueError(f"{self._source.path} holds no rows; give at least one")
        if first is None:
            raise ValueError(
                f"{self._source.path}: none of {self.count:,} rows is an object; the first: {error}"
            )
        for field in missing:
            raise ValueError(
                f"{self._source.path}: no row has {'an' if field == 'input' else 'a'} {field} "
                f"under {self._columns[field]!r}, the first one only "
                f"{', '.join(map(str, first))[:80]}; name the right one, as in "
                f"--columns={field}=KEY"
            )
        self._reading = find_reading(
            self._source.path, chosen, self._columns, self._labels, self.notes
        )

    def _parse(self, number: int, record: dict) -> ParsedRow:
        column = self._columns["input"]
        keys = [column] if column in record else keys_of(column)
        values = [value_at(record, key) for key in keys]
        given = [str(value) for value in values if value is not None]
        named = column in record or len(given) == len(keys)
        if named and not any(value.strip() for value in given):
            raise ValueError(f"row {number}: the input under {column!r} is empty")
        parsed = parse_row(f"row {number}", record, self._columns, self._choices, ("input",))
        if not parsed.texts["input"].strip():
            raise ValueError(f"row {number}: the input under {column!r} is empty")
        return parsed

    def _item(self, number: int, record) -> Item:
        if isinstance(record, ValueError):
            return Item(number, None, {}, None, str(record))
        if not isinstance(record, dict):
            kind = type(record).__name__
            return Item(number, None, {}, None, f"row {number} is a {kind}, not an object")
        name = next((key for key in record if key.casefold() == "id"), None)
        used = {name} | {
            key
            for field in ("input", "context", "choices")
            if (column := self._columns.get(field)) is not None
            for key in (column, *keys_of(column))
        }
        if not all(key.isdecimal() for key in record):
            # The numbers of columns that have names.
            used |= {key for key in record if key.isdecimal()}
        columns = {key: plain(value) for key, value in record.items() if key not in used}
        own = plain(record[name]) if name else None
        try:
            row = self._resolved(self._parse(number, record))
        except ValueError as error:
            return Item(number, own, columns, None, str(error))
        return Item(number, own, columns, row)

    def _resolved(self, parsed: ParsedRow) -> Row:
        labels = self._labels
        if labels and parsed.right is None:
            # A reference without a name of its own stays as it is; it agrees with no answer.
            labels = {str(value): str(value) for value in parsed.values} | labels
        row = resolve_row(parsed, self._reading, labels, self._blank)
        return dataclasses.replace(row, blank=self._blank) if self._blank else row


def _fits(layout, record: dict) -> bool:
    return layout.fits(lambda key: value_at(record, key) is not None)


def plain(value: Any) -> Any:
    """Return a value of a column as JSON can hold it: dates in ISO format, others as their text."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    try:
        json.dumps(value)
    except TypeError:
        return str(value)
    return value
