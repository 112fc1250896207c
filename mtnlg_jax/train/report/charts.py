"""Curves as SVG: points by step become lines in the units of a picture."""

import bisect
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

# The picture and the space of its axes, in units of its viewBox.
WIDTH = 760
HEIGHT = 230
LEFT = 70
RIGHT = 26
TOP = 10
BOTTOM = 26
# Points of a line at most: one for each bucket of steps, with the range of what is in it.
BUCKETS = 300
# Colors of Okabe and Ito, which the color-blind tell apart, without the yellow.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")

Points = Sequence[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Values by step, in the order of steps. ``other`` marks those of the run compared with;
    ``dots`` shows each value, for few of them."""

    name: str
    points: Points
    other: bool = False
    dots: bool = False


class Line(NamedTuple):
    name: str
    color: str
    other: bool
    path: str  # of an SVG polyline
    band: str  # of an SVG polygon: the least and the largest value of each bucket; "" for none
    dots: tuple[tuple[float, float, str], ...]
    last: str


class Tick(NamedTuple):
    at: float
    text: str


class Chart(NamedTuple):
    title: str
    lines: tuple[Line, ...]
    steps: tuple[Tick, ...]
    values: tuple[Tick, ...]


def chart(
    title: str,
    curves: Iterable[Curve],
    log: bool = False,
    colors: Mapping[str, str] | None = None,
) -> Chart | None:
    """Return the chart of ``curves`` over steps; None if none of them has a point.

    With ``log`` the axis of values is logarithmic, and values of 0 or less are left out. ``colors``
    are those of curves by name; others follow `COLORS`.
    """
    kept = []
    for curve in curves:
        points = [(step, x) for step, x in curve.points if math.isfinite(x) and (x > 0 or not log)]
        if points:
            kept.append(dataclasses.replace(curve, points=points))
    if not kept:
        return None
    first = min(curve.points[0][0] for curve in kept)
    last = max(curve.points[-1][0] for curve in kept)
    low, high = _range([x for curve in kept for _, x in curve.points], log)
    scale = _Scale(first, last, low, high, log)
    # A curve of the other run has the color of its namesake.
    names = list(dict.fromkeys(curve.name for curve in kept))
    palette = {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}
    palette |= colors or {}
    lines = tuple(_line(curve, palette[curve.name], scale) for curve in kept)
    steps = tuple(Tick(scale.x(step), f"{step:,}") for step in _round_steps(first, last))
    values = tuple(Tick(scale.y(x), _number(x)) for x in _round_values(low, high, log))
    return Chart(title, lines, steps, values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


class _Scale(NamedTuple):
    first: float
    last: float
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        share = (step - self.first) / (self.last - self.first or 1)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low = self.low
        high = self.high
        if self.log:
            value = math.log10(value)
            low = math.log10(low)
            high = math.log10(high)
        share = (value - low) / (high - low)
        return round(TOP + (1 - min(max(share, 0), 1)) * (HEIGHT - TOP - BOTTOM), 1)


def _range(values: list[float], log: bool) -> tuple[float, float]:
    """Return the ends of the axis: all values but outliers, which are cut off at its end.

    A single spike of a loss must not press the whole curve flat.
    """
    values = sorted(values)
    low = values[0]
    high = values[-1]
    usual = values[int(0.98 * (len(values) - 1))]
    if not log and len(values) > 50 and high - low > 4 * (usual - low) > 0:
        high = low + 1.5 * (usual - low)
    if low == high:
        apart = abs(low) / 10 or 1.0
        low -= apart
        high += apart
    return low, high


def _line(curve: Curve, color: str, scale: _Scale) -> Line:
    shown = _bucketed(curve.points, scale.first, scale.last)
    path = " ".join(f"{scale.x(step)},{scale.y(mean)}" for step, mean, _, _ in shown)
    band = ""
    if len(curve.points) > len(shown):
        above = [f"{scale.x(step)},{scale.y(high)}" for step, _, _, high in shown]
        below = [f"{scale.x(step)},{scale.y(low)}" for step, _, low, _ in reversed(shown)]
        band = " ".join(above + below)
    # A line through one point would be invisible.
    dots: tuple = ()
    if curve.dots or len(shown) == 1:
        dots = tuple(
            (scale.x(step), scale.y(mean), f"step {step:,.0f}: {mean:.5g}")
            for step, mean, _, _ in shown
        )
    last = f"{curve.points[-1][1]:.5g}"
    return Line(curve.name, color, curve.other, path, band, dots, last)


def _bucketed(points: Points, first: float, last: float) -> list[tuple[float, float, float, float]]:
    """Return (step, mean, least, largest) of each bucket of steps that has a point."""
    if len(points) <= BUCKETS:
        return [(step, x, x, x) for step, x in points]
    ends = [first + (last - first) * (number + 1) / BUCKETS for number in range(BUCKETS - 1)]
    buckets: list[list[tuple[int, float]]] = [[] for _ in range(BUCKETS)]
    for step, x in points:
        buckets[bisect.bisect_left(ends, step)].append((step, x))
    found = []
    for bucket in filter(None, buckets):
        values = [x for _, x in bucket]
        middle = sum(step for step, _ in bucket) / len(bucket)
        found.append((middle, sum(values) / len(values), min(values), max(values)))
    return found


def _round_steps(first: int, last: int) -> list[int]:
    ticks = [int(x) for x in _round_values(first, last, False, wanted=6) if x == int(x)]
    return ticks or [first]


def _round_values(low: float, high: float, log: bool, wanted: int = 5) -> list[float]:
    """Return round numbers from ``low`` to ``high``: about ``wanted``, or powers of ten."""
    if log and high / low >= 100:
        exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        apart = max(1, len(exponents) // wanted)
        return [10.0**exponent for exponent in exponents][::apart]
    rough = (high - low) / wanted or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next((unit * each for each in (1, 2, 5) if unit * each >= rough), unit * 10)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
