"""Dates of rows: read them, and divide them into periods."""

import datetime
from collections.abc import Iterable
from typing import Any

# Formats beside those of ISO 8601. None of them confuses days with months.
_FORMATS = (
    *("%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%Y年%m月%d日", "%Y-%m", "%Y/%m", "%Y年%m月", "%Y"),
    *("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M"),
    *("%Y年%m月%d日 %H:%M", "%d.%m.%Y", "%B %d, %Y", "%b %d, %Y", "%d %B %Y", "%d %b %Y"),
    *("%d-%b-%Y", "%a, %d %b %Y %H:%M:%S %z", "%a, %d %b %Y %H:%M:%S %Z"),
    "%a %b %d %H:%M:%S %z %Y",
)
# Seconds since 1970 of the years 1973 to 2096; other numbers are not taken for dates.
_SECONDS = range(10**8, 4 * 10**9)
# At most so many periods are shown.
MOST = 60
PERIODS = ("hour", "day", "week", "month", "quarter", "year")


def parse_date(value: Any) -> datetime.datetime | None:
    """Return a date or time without its zone, or None if ``value`` is none.

    Numbers are seconds or milliseconds since 1970, from 1973 on; years have four digits.
    """
    text = str(value).strip()
    if isinstance(value, bool) or not text:
        return None
    # Columns of whole numbers with gaps become floats, and clocks give parts of seconds.
    digits, _, fraction = text.partition(".")
    if digits.isdecimal() and (not fraction or fraction.isdecimal()):
        if len(digits) not in (4, 8):
            return _of_epoch(int(digits))
        text = text if fraction.strip("0") else digits
    if not (text.isdecimal() and len(text) == 4):
        try:
            return datetime.datetime.fromisoformat(text).replace(tzinfo=None)
        except ValueError:
            pass
    for form in _FORMATS:
        try:
            return datetime.datetime.strptime(text, form).replace(tzinfo=None)
        except ValueError:
            continue
    return None


def _of_epoch(number: int) -> datetime.datetime | None:
    for scale in (1, 1000):
        if number // scale in _SECONDS:
            moment = datetime.datetime.fromtimestamp(number / scale, datetime.UTC)
            return moment.replace(tzinfo=None)
    return None


def start_of(moment: datetime.datetime, period: str) -> datetime.datetime:
    """Return the beginning of the period of PERIODS that ``moment`` is in; weeks begin on
    Monday."""
    if period == "hour":
        return moment.replace(minute=0, second=0, microsecond=0)
    day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return day
    if period == "week":
        return day - datetime.timedelta(days=day.weekday())
    if period == "month":
        return day.replace(day=1)
    if period == "quarter":
        return day.replace(day=1, month=(day.month - 1) // 3 * 3 + 1)
    return day.replace(day=1, month=1)


def next_of(start: datetime.datetime, period: str) -> datetime.datetime:
    """Return the beginning of the period behind the one that begins at ``start``."""
    days = {"hour": 1 / 24, "day": 1, "week": 7, "month": 31, "quarter": 93, "year": 366}[period]
    return start_of(start + datetime.timedelta(days=days), period)


def periods_of(moments: Iterable[datetime.datetime]) -> tuple[str, list[datetime.datetime]]:
    """Return the shortest period that divides the moments into at most MOST, and their
    beginnings, without gaps.

    Years are taken however many there are. Moments without a time are divided by days at least.
    """
    moments = list(moments)
    first = min(moments)
    last = max(moments)
    timed = any(moment.hour or moment.minute for moment in moments)
    for period in PERIODS if timed else PERIODS[1:]:
        starts = [start_of(first, period)]
        while starts[-1] < start_of(last, period) and (len(starts) <= MOST or period == "year"):
            starts.append(next_of(starts[-1], period))
        if len(starts) <= MOST or period == "year":
            return period, starts
    raise AssertionError("years divide any time")


def name_of(start: datetime.datetime, period: str) -> str:
    """Return the name of the period that begins at ``start``."""
    if period == "hour":
        return f"{start:%Y-%m-%d %H:00}"
    if period in ("day", "week"):
        return f"{start:%Y-%m-%d}"
    if period == "month":
        return f"{start:%Y-%m}"
    return f"{start.year}" + (f" Q{(start.month + 2) // 3}" if period == "quarter" else "")
