"""Count the labels of many rows: shares, over time and by source, telling rows, agreement."""

import collections
import dataclasses
import heapq
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mtnlg_jax.tasks.many.dates import name_of, parse_date, periods_of, start_of
from mtnlg_jax.tasks.metrics import Score, mean

# Rows of each list of telling rows, and of the list of errors.
TELLING = 6
ERRORS = 50
# Sources that have a line of their own.
GROUPS = 20
# Rows that show what the columns hold, and the share of them that must hold it.
_SHOWN = 500
_MOST = 0.9
_TIMES = (
    *("date", "time", "datetime", "timestamp", "created_at", "created", "published", "day"),
    *("month", "year", "日期", "时间"),
)
_GROUPS = (
    *("source", "site", "channel", "platform", "store", "shop", "product", "category"),
    *("brand", "来源", "平台", "产品", "商品", "类别"),
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of a period or of a source."""

    name: str
    counts: tuple[int, ...]  # of each label

    @property
    def rows(self) -> int:
        return sum(self.counts)


@dataclasses.dataclass(frozen=True)
class Telling:
    """A row that is shown with its text."""

    row: int
    id: Any
    text: str  # of the input
    language: str
    label: str
    probability: float
    reference: str  # "" if the row has none


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The labels beside the references of those rows whose reference is a label."""

    rows: int
    others: int  # rows whose reference is none of the labels
    matrix: tuple[tuple[int, ...], ...]  # row: reference, column: label
    accuracy: Score
    kappa: float
    majority: float  # accuracy of the most frequent reference, in %


@dataclasses.dataclass(frozen=True)
class Summary:
    labels: tuple[str, ...]
    counts: tuple[int, ...]
    languages: dict[str, int]
    shortened: int
    errors: int
    first_errors: tuple[dict, ...]
    time_column: str
    period: str
    times: tuple[Group, ...]
    undated: int  # answered rows without a date, if there is a time column
    group_column: str
    groups: tuple[Group, ...]
    most_certain: tuple[tuple[Telling, ...], ...]  # of each label
    least_certain: tuple[Telling, ...]
    disagreeing: tuple[Telling, ...]  # the most certain ones
    agreement: Agreement | None

    @property
    def answered(self) -> int:
        return sum(self.counts)


def summarize(
    read: Callable[[], Iterable[dict]],
    labels: Sequence[str],
    time_column: str | None = None,
    group_column: str | None = None,
) -> Summary:
    """Summarize the lines of a file of answers (`record.Record`).

    Args:
      read: gives the lines from the beginning each time it is called.
      labels: in the order in which they are shown; others that occur follow.
      time_column, group_column: columns of the dates and of the sources; None: detect them; "none":
        there are none.

    Raises:
      ValueError: no value of a named ``time_column`` is a date.
    """
    answered = (line for line in read() if "error" not in line)
    shown = [line.get("columns", {}) for line in itertools.islice(answered, _SHOWN)]
    time_column = _column(read, time_column, "--time_column", shown, _TIMES, _are_dates)
    group_column = _column(read, group_column, "--group_column", shown, _GROUPS, _are_groups)
    counter = _Counter(labels, time_column, group_column)
    for line in read():
        counter.add(line)
    return counter.summary()


class _Counter:
    """Counts lines one by one; what it keeps grows with labels, dates and sources alone."""

    def __init__(self, labels: Sequence[str], time_column: str, group_column: str):
        self.labels = list(labels)
        self.columns = time_column, group_column
        self.counts: collections.Counter = collections.Counter()
        self.languages: collections.Counter = collections.Counter()
        self.times: collections.Counter = collections.Counter()
        self.groups: collections.Counter = collections.Counter()
        self.pairs: collections.Counter = collections.Counter()
        self.shortened = self.undated = self.errors = self.others = 0
        self.first_errors: list[dict] = []
        self.certain: dict[str, list] = collections.defaultdict(list)
        self.uncertain: list = []
        self.disagreeing: list = []

    def add(self, line: dict) -> None:
        if "error" in line:
            self.errors += 1
            if len(self.first_errors) < ERRORS:
                self.first_errors.append(line)
            return
        label = line["text"]
        self.counts[label] += 1
        self.languages[line["language"]] += 1
        self.shortened += line["shortened"]
        self._count_columns(line.get("columns", {}), label)
        references = line["references"]
        # The best of several references counts, as in the metrics.
        reference = label if label in references else next(iter(references), "")
        if reference:
            self.pairs[reference, label] += 1
        if not line["choices"]:
            return
        best, *rest = (choice["probability"] for choice in line["choices"])
        margin = best - max(rest, default=0.0)
        telling = Telling(
            line["row"], line.get("id"), line["input"], line["language"], label, best, reference
        )
        # The number of the row decides ties, so that a report can be made again.
        entry = (margin, -line["row"], telling)
        _keep(self.certain[label], entry)
        _keep(self.uncertain, (-margin, -line["row"], telling))
        if reference and reference != label:
            _keep(self.disagreeing, entry)

    def _count_columns(self, columns: dict, label: str) -> None:
        time_column, group_column = self.columns
        if time_column:
            moment = parse_date(columns.get(time_column))
            if moment is None:
                self.undated += 1
            else:
                self.times[start_of(moment, "hour"), label] += 1
        if group_column:
            value = columns.get(group_column)
            self.groups["" if value is None else str(value), label] += 1

    def summary(self) -> Summary:
        self.labels += sorted(set(self.counts) - set(self.labels))
        period, times = self._times()
        return Summary(
            tuple(self.labels),
            tuple(self.counts[label] for label in self.labels),
            dict(self.languages.most_common()),
            self.shortened,
            self.errors,
            tuple(self.first_errors),
            self.columns[0],
            period,
            times,
            self.undated,
            self.columns[1],
            self._groups(),
            tuple(_best(self.certain[label]) for label in self.labels),
            _best(self.uncertain),
            _best(self.disagreeing),
            self._agreement(),
        )

    def _times(self) -> tuple[str, tuple[Group, ...]]:
        if not self.times:
            return "", ()
        period, starts = periods_of(moment for moment, _ in self.times)
        found: collections.Counter = collections.Counter()
        for (moment, label), count in self.times.items():
            found[start_of(moment, period), label] += count
        return period, tuple(
            Group(name_of(start, period), tuple(found[start, label] for label in self.labels))
            for start in starts
        )

    def _groups(self) -> tuple[Group, ...]:
        sizes: collections.Counter = collections.Counter()
        for (name, _), count in self.groups.items():
            sizes[name] += count
        order = sorted(sizes, key=lambda name: (-sizes[name], name))
        groups = [
            Group(name or "(none)", tuple(self.groups[name, label] for label in self.labels))
            for name in order[:GROUPS]
        ]
        if others := order[GROUPS:]:
            counts = tuple(
                sum(self.groups[name, label] for name in others) for label in self.labels
            )
            groups.append(Group(f"{len(others):,} others", counts))
        return tuple(groups)

    def _agreement(self) -> Agreement | None:
        matrix = tuple(
            tuple(self.pairs[reference, label] for label in self.labels)
            for reference in self.labels
        )
        rows = sum(map(sum, matrix))
        if not rows:
            return None
        right = sum(matrix[i][i] for i in range(len(matrix)))
        values = np.repeat([1.0, 0.0], [right, rows - right])
        majority = max(map(sum, matrix)) / rows
        others = sum(self.pairs.values()) - rows
        return Agreement(rows, others, matrix, mean(values, 0), kappa(matrix), 100 * majority)


def kappa(matrix: Sequence[Sequence[int]]) -> float:
    """Return Cohen's kappa of a square table of counts: agreement beyond chance, at most 1.

    (p_o - p_e) / (1 - p_e), where p_e is the agreement of independent raters with the same shares
    (Cohen 1960). NaN where both only ever give one and the same label.
    """
    table = np.array(matrix, np.float64)
    table /= table.sum()
    chance = float(table.sum(0) @ table.sum(1))
    return float("nan") if chance >= 1 else (float(np.trace(table)) - chance) / (1 - chance)


def _keep(heap: list, entry: tuple) -> None:
    """Keep the TELLING greatest entries."""
    if len(heap) < TELLING:
        heapq.heappush(heap, entry)
    else:
        heapq.heappushpop(heap, entry)


def _best(heap: list) -> tuple[Telling, ...]:
    return tuple(telling for *_, telling in sorted(heap, key=lambda entry: entry[:2], reverse=True))


def _column(
    read: Callable[[], Iterable[dict]],
    name: str | None,
    flag: str,
    shown: Sequence[dict],
    names: Sequence[str],
    fits: Callable[[list], bool],
) -> str:
    """Return the named column, or the first of ``names`` whose values fit; "" for none."""
    if name == "none":
        return ""
    if name is None:
        keys = list(dict.fromkeys(key for columns in shown for key in columns))
        folded = {key.casefold(): key for key in reversed(keys)}
        found = [folded[each] for each in names if each in folded]
        return next((key for key in found if fits([row.get(key) for row in shown])), "")
    values = (line.get("columns", {}).get(name) for line in read())
    if fits is _are_dates and not any(parse_date(value) for value in values if value is not None):
        raise ValueError(
            f"{flag}={name}: no value is a date; write them as 2026-01-31, or leave {flag} out"
        )
    return name


def _are_dates(values: list) -> bool:
    return sum(parse_date(value) is not None for value in values if value is not None) >= max(
        2, _MOST * len(values)
    )


def _are_groups(values: list) -> bool:
    given = [str(value) for value in values if value not in (None, "")]
    return len(given) >= _MOST * len(values) and 1 < len(set(given)) <= max(2, len(given) // 2)
