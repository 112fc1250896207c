"""Counts, agreement and telling rows, against scikit-learn, SciPy and sorting."""

import collections
import datetime
import random

import pytest
from lines import LABELS, line
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from mtnlg_jax.intervals import wilson
from mtnlg_jax.tasks.many.dates import MOST, name_of, next_of, parse_date, periods_of, start_of
from mtnlg_jax.tasks.many.summary import GROUPS, TELLING, kappa, summarize


@pytest.fixture(scope="module")
def lines():
    draws = random.Random(0)
    made = []
    for row in range(1, 401):
        label = draws.choice(LABELS)
        reference = label if draws.random() < 0.8 else draws.choice(LABELS)
        day = datetime.date(2026, 1, 1) + datetime.timedelta(days=draws.randrange(300))
        made.append(
            line(
                row,
                label,
                0.5 + draws.random() / 2,
                reference,
                date=day.isoformat(),
                source=draws.choice("abc"),
                other=row,
            )
        )
    draws.shuffle(made)
    return made


def test_shares_over_time_and_by_source_count_each_row_once(lines):
    summary = summarize(lambda: iter(lines), LABELS)
    assert summary.counts == tuple(sum(each["text"] == label for each in lines) for label in LABELS)
    assert (summary.time_column, summary.period, summary.group_column) == ("date", "week", "source")
    assert sum(group.rows for group in summary.times) == 400
    assert sum(group.rows for group in summary.groups) == 400
    for group in summary.groups:
        own = [each["text"] for each in lines if each["columns"]["source"] == group.name]
        assert group.counts == tuple(map(own.count, LABELS))
    for group in summary.times:
        first = datetime.date.fromisoformat(group.name)
        days = [str(first + datetime.timedelta(days=n)) for n in range(7)]
        own = [each["text"] for each in lines if each["columns"]["date"] in days]
        assert first.weekday() == 0 and group.counts == tuple(map(own.count, LABELS))


def test_agreement_is_that_of_scikit_learn(lines):
    agreement = summarize(lambda: iter(lines), LABELS).agreement
    given = [each["references"][0] for each in lines]
    found = [each["text"] for each in lines]
    assert agreement.matrix == tuple(
        map(tuple, confusion_matrix(given, found, labels=LABELS).tolist())
    )
    assert agreement.kappa == pytest.approx(cohen_kappa_score(given, found))
    right = sum(one == other for one, other in zip(given, found, strict=True))
    assert agreement.accuracy.value == pytest.approx(100 * right / 400)
    assert agreement.accuracy.low < agreement.accuracy.value < agreement.accuracy.high
    assert agreement.majority == pytest.approx(100 * max(collections.Counter(given).values()) / 400)
    assert str(kappa([[3, 0], [0, 0]])) == "nan" and kappa([[3, 0], [0, 2]]) == 1


def test_references_that_are_no_labels_are_counted_apart():
    lines = [line(1, reference="2"), line(2, reference="positive"), line(3)]
    agreement = summarize(lambda: iter(lines), LABELS).agreement
    assert (agreement.rows, agreement.others) == (1, 1)
    assert summarize(lambda: iter(lines[:1]), LABELS).agreement is None
    several = line(1) | {"references": ["negative", "positive"]}
    assert summarize(lambda: iter([several]), LABELS).agreement.accuracy.value == 100


def test_telling_rows_are_those_of_a_sort(lines):
    summary = summarize(lambda: iter(lines), LABELS)
    order = sorted(lines, key=lambda each: -each["choices"][0]["probability"])

    def numbers(rows):
        return [each["row"] for each in rows][:TELLING]

    for label, found in zip(LABELS, summary.most_certain, strict=True):
        assert [each.row for each in found] == numbers(
            each for each in order if each["text"] == label
        )
    assert [each.row for each in summary.least_certain] == numbers(reversed(order))
    assert [each.row for each in summary.disagreeing] == numbers(
        each for each in order if each["references"][0] != each["text"]
    )


@pytest.mark.parametrize(("count", "rows"), [(0, 1), (1, 1), (3, 10), (0, 50), (499, 500)])
def test_intervals_are_those_of_scipy(count, rows):
    expected = binomtest(count, rows).proportion_ci(method="wilson")
    assert wilson(count, rows) == pytest.approx(expected, abs=1e-12)


def test_columns_are_detected_named_or_left_out(lines):
    def summary(rows, *columns):
        return summarize(lambda: iter(rows), LABELS, *columns)

    none = summary(lines, "none", "none")
    assert (none.times, none.groups) == ((), ())
    by_row = summary(lines, None, "other")
    assert len(by_row.groups) == GROUPS + 1 and by_row.groups[-1].name == "380 others"
    chinese = [line(n, 日期=f"2026年{n}月1日", 来源="京东") for n in range(1, 5)]
    found = summary(chinese)
    assert (found.time_column, found.group_column) == ("日期", ""), "one source divides nothing"
    assert summary(chinese, None, "来源").groups[0].name == "京东"
    with pytest.raises(ValueError, match="--time_column=source: no value is a date"):
        summary(lines, "source")
    # Rows with errors have no part in it.
    errors = [{"row": n, "error": "damaged"} for n in range(9, 12)]
    assert summary([*errors, *chinese]).time_column == "日期"
    undated = summary([line(1, date="2026-01-01"), line(2, date="soon")], "date")
    assert (undated.undated, sum(group.rows for group in undated.times)) == (1, 1)


def test_errors_are_counted_and_the_first_are_kept():
    lines = [{"row": n, "error": "damaged"} for n in range(60)]
    summary = summarize(lambda: iter([*lines, line(61)]), LABELS)
    assert (summary.errors, len(summary.first_errors), summary.answered) == (60, 50, 1)
    assert summarize(lambda: iter(lines), LABELS).counts == (0, 0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *[(form, "2026-03-04 00:00:00") for form in ("2026-03-04", "20260304", "2026/03/04")],
        *[(form, "2026-03-04 00:00:00") for form in ("2026.03.04", "4 Mar 2026", "04.03.2026")],
        *[(form, "2026-03-04 00:00:00") for form in ("March 4, 2026", "2026年3月4日")],
        ("2026-03-04T05:06:07Z", "2026-03-04 05:06:07"),
        ("2026-03-04 05:06:07+08:00", "2026-03-04 05:06:07"),
        (1772600767, "2026-03-04 05:06:07"),
        ("1772600767000", "2026-03-04 05:06:07"),
        ("2026-03", "2026-03-01 00:00:00"),
        (2026, "2026-01-01 00:00:00"),
        (2026.0, "2026-01-01 00:00:00"),
        (1772600767.25, "2026-03-04 05:06:07"),
        ("2026-3-4", "2026-03-04 00:00:00"),
        ("2026-3-4 5:06", "2026-03-04 05:06:00"),
        ("Wed, 04 Mar 2026 05:06:07 GMT", "2026-03-04 05:06:07"),
        ("Wed Mar 04 05:06:07 +0000 2026", "2026-03-04 05:06:07"),
        *[
            (none, "None")
            for none in (None, "", "soon", 5, 3.5, True, "03/04/2026", "12345", "nan", "1e9")
        ],
    ],
)
def test_dates_are_read(value, expected):
    assert str(parse_date(value)) == expected


@pytest.mark.parametrize(
    ("days", "period"),
    [(0, "day"), (59, "day"), (90, "week"), (900, "month"), (4000, "quarter"), (30000, "year")],
)
def test_periods_divide_the_time_without_gaps(days, period):
    first = datetime.datetime(2020, 5, 6)
    last = first + datetime.timedelta(days=days)
    found, starts = periods_of([last, first])
    assert found == period and (len(starts) <= MOST or period == "year")
    assert starts[0] <= first < next_of(starts[0], period)
    assert starts[-1] <= last < next_of(starts[-1], period)
    for one, other in zip(starts, starts[1:], strict=False):
        assert next_of(one, period) == other == start_of(other, period)
    assert len({name_of(start, period) for start in starts}) == len(starts)
    assert periods_of([first, first.replace(hour=3)])[0] == "hour"
