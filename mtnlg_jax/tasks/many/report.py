"""The report of labels of many rows: one page, readable without a network and without scripts."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtnlg_jax import intervals, pages
from mtnlg_jax.tasks.many.summary import Group, Summary

# Colors of Okabe and Ito, which the color-blind tell apart; the first labels have the first ones.
COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#f0e442")
_LAUNCH = "launch/task.py --inputs"
# The mark of these pages: it stands near the beginning.
GENERATOR = pages.generator(_LAUNCH)
# Characters of an input that are shown.
SHOWN = 400
# Size of the chart over time, and the space of its axes, in units of its viewBox.
WIDTH = 480
HEIGHT = 200
LEFT = 42
TOP = 8
BOTTOM = 24
# Most names of periods below the chart, and about the width of a letter.
_TICKS = 5
_LETTER = 8.5


class Bar(NamedTuple):
    """A rectangle of the chart."""

    x: float
    y: float
    width: float
    height: float
    color: str
    title: str  # what a pointer on it is told


class Tick(NamedTuple):
    x: float
    y: float
    text: str


class Chart(NamedTuple):
    """Shares of the labels by period, and how many rows each period has."""

    bars: tuple[Bar, ...]
    counts: tuple[Bar, ...]
    names: tuple[Tick, ...]  # below
    shares: tuple[Tick, ...]  # at the left
    most: int  # rows of the largest period


def render(summary: Summary, title: str, facts: Sequence[tuple[str, Any]] = ()) -> str:
    """Return the page.

    Args:
      title: what was answered.
      facts: (name, value) of what the answers depend on, shown at the end.
    """
    return pages.render(
        Path(__file__).with_name("page") / "report.html",
        _LAUNCH,
        filters={"percent": _percent, "clipped": _clipped, "share": _share},
        color_of=color_of,
        interval=_interval,
        summary=summary,
        whole=Group("", summary.counts),
        title=title,
        facts=facts,
        chart=chart_of(summary) if summary.times else None,
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
    )


def color_of(index: int) -> str:
    """Return the color of a label by its index."""
    return COLORS[index % len(COLORS)]


def chart_of(summary: Summary) -> Chart:
    """Return the chart of the shares over time.

    The upper part stacks the shares of the labels, the last one at the bottom; the lower part has
    the rows of each period.
    """
    periods = summary.times
    plot = HEIGHT - TOP - BOTTOM
    upper = 0.72 * plot
    lower = 0.2 * plot
    step = (WIDTH - LEFT) / len(periods)
    gap = min(2.0, 0.2 * step)
    most = max(group.rows for group in periods)
    bars: list[Bar] = []
    counts = []
    for number, group in enumerate(periods):
        x = LEFT + number * step + gap / 2
        bottom = TOP + upper
        for index in reversed(range(len(summary.labels))):
            if not group.counts[index]:
                continue
            share = group.counts[index] / group.rows
            bottom -= upper * share
            title = (
                f"{group.name}: {_percent(share)} {summary.labels[index]} "
                f"({group.counts[index]:,} of {group.rows:,})"
            )
            bars.append(
                Bar(_r(x), _r(bottom), _r(step - gap), _r(upper * share), color_of(index), title)
            )
        tall = lower * group.rows / most
        counts.append(
            Bar(
                _r(x),
                _r(TOP + plot - tall),
                _r(step - gap),
                _r(tall),
                "",
                f"{group.name}: {group.rows:,} rows",
            )
        )
    every = math.ceil(len(periods) / _TICKS)
    names = tuple(
        Tick(
            _inside(LEFT + (number + 0.5) * step, periods[number].name),
            HEIGHT - 7,
            periods[number].name,
        )
        for number in range(every // 2, len(periods), every)
    )
    shares = tuple(
        Tick(LEFT - 5, _r(TOP + upper * (1 - share)), f"{share:.0%}") for share in (0, 0.5, 1)
    )
    return Chart(tuple(bars), tuple(counts), names, shares, most)


def _inside(x: float, name: str) -> float:
    """Return the middle of a name, moved so that it ends inside of the chart."""
    return _r(min(x, WIDTH - _LETTER * len(name) / 2))


def _r(value: float) -> float:
    return round(value, 2)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(group: Group, index: int) -> float:
    """Return the share of a label among the rows of a group, 0 without rows."""
    return group.counts[index] / group.rows if group.rows else 0.0


def _interval(count: int, rows: int) -> str:
    low, high = intervals.wilson(count, rows)
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _clipped(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else text[:SHOWN].rstrip() + " …"
