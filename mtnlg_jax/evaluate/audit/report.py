"""The report of an audit: a page that is readable without a network and without scripts, and lines
for a terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mtnlg_jax import pages
from mtnlg_jax.evaluate.audit.membership import NAMES

# Size of a chart and the space of its axes, in units of its viewBox.
_WIDTH = 480
_HEIGHT = 220
_LEFT = 48
_TOP = 14
_BOTTOM = 40
# Colors of Okabe and Ito, which the color-blind tell apart.
_COLORS = ("#0072b2", "#d55e00", "#009e73")


class Point(NamedTuple):
    """A value with its interval, in units of the chart; a line joins those of a series."""

    x: float
    y: float
    low: float
    high: float
    title: str


class Series(NamedTuple):
    name: str
    color: str
    points: tuple[Point, ...]

    @property
    def path(self) -> str:
        """The points of an SVG polyline."""
        return " ".join(f"{each.x},{each.y}" for each in self.points)


class Mark(NamedTuple):
    """A text at an axis, or at a line across the chart."""

    x: float
    y: float
    text: str


class Chart(NamedTuple):
    label: str
    series: tuple[Series, ...]
    names: tuple[Mark, ...]  # below
    values: tuple[Mark, ...]  # at the left
    lines: tuple[Mark, ...]  # across, such as chance


# A value with the low and the high end of its interval, and a name.
Value = tuple[str, float, float, float]


def render(report: dict[str, Any]) -> str:
    """Return the page of a report of `run.audit`."""
    return pages.render(
        Path(__file__).with_name("page") / "report.html",
        "launch/audit.py",
        filters={"share": _share, "number": _number, "between": _between, "percent": _percent},
        report=report,
        facts=_facts(report),
        scores=NAMES,
        exposure=_exposure_chart(report["canaries"]) if report["canaries"] else None,
        extraction=_extraction_chart(report["extraction"]) if report["extraction"] else None,
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
    )


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    settings = report["settings"]
    nested = settings["extraction"]
    plain = {key: value for key, value in settings.items() if key != "extraction"} | nested
    return [
        ("model", f"{report['workdir']}, checkpoint of step {report['step']:,}"),
        ("data", f"{', '.join(report['data'])}: {report['tokens']:,} tokens"),
        ("created", report["created"]),
        ("commit", report["commit"] or "unknown"),
        ("versions", ", ".join(f"{name} {each}" for name, each in report["versions"].items())),
        ("settings", ", ".join(f"{key}={value}" for key, value in plain.items())),
        ("seconds", ", ".join(f"{part} {each}" for part, each in report["seconds"].items())),
    ]


def _exposure_chart(canaries: dict[str, Any]) -> Chart:
    values = []
    for row in canaries["by_copies"]:
        found = row["exposure"]
        middle = found["mean"]
        low = middle if found["low"] is None else found["low"]
        high = middle if found["high"] is None else found["high"]
        values.append((str(row["copies"]), middle, low, high))
    across = [("chance", canaries["chance"]), ("log2 of the space", canaries["most"])]
    return _chart("mean exposure by copies, in bits", {"": values}, across, canaries["most"] * 1.08)


def _extraction_chart(extraction: dict[str, Any]) -> Chart | None:
    series = {}
    for name, title in (("training", "training text"), ("heldout", "held-out text")):
        shares = [(str(row["prefix"]), row["greedy"]) for row in extraction[name]]
        found = [
            (prefix, 100 * each["share"], 100 * each["low"], 100 * each["high"])
            for prefix, each in shares
            if each["share"] is not None
        ]
        if found:
            series[title] = found
    if not series:
        return None
    most = max(high for values in series.values() for *_, high in values)
    label = "percent reproduced, by tokens of the prefix"
    return _chart(label, series, [], min(100.0, most * 1.1))


def _chart(
    label: str,
    series: Mapping[str, Sequence[Value]],
    across: Iterable[tuple[str, float]],
    top: float,
) -> Chart:
    """Return a chart of values from 0 to ``top``, at equal distances in their order."""
    plot = _HEIGHT - _TOP - _BOTTOM
    top = top or 1.0

    def at(value: float) -> float:
        return round(_TOP + plot * (1 - min(value, top) / top), 2)

    names = list(dict.fromkeys(name for values in series.values() for name, *_ in values))
    step = (_WIDTH - _LEFT) / max(1, len(names))
    found = []
    for number, (title, values) in enumerate(series.items()):
        # Series stand beside each other, so that their intervals can be told apart.
        beside = (number - (len(series) - 1) / 2) * 8
        points = tuple(
            Point(
                round(_LEFT + step * (names.index(name) + 0.5) + beside, 2),
                at(value),
                at(low),
                at(high),
                f"{name}: {value:.4g} ({low:.4g} to {high:.4g})",
            )
            for name, value, low, high in values
        )
        found.append(Series(title, _COLORS[number % len(_COLORS)], points))
    below = tuple(
        Mark(round(_LEFT + step * (index + 0.5), 2), _HEIGHT - _BOTTOM + 16, name)
        for index, name in enumerate(names)
    )
    ticks = tuple(Mark(_LEFT - 6, at(top * part / 4), f"{top * part / 4:.2g}") for part in range(5))
    marks = tuple(Mark(_WIDTH - 4, at(value), f"{name} {value:.2f}") for name, value in across)
    return Chart(label, tuple(found), below, ticks, marks)


def _share(found: dict[str, Any] | None) -> str:
    if found is None or found["share"] is None:
        return "–"
    return f"{100 * found['share']:.1f} %"


def _between(found: dict[str, Any] | None, percent: bool = True) -> str:
    if found is None or found["low"] is None:
        return ""
    if percent:
        return f"{100 * found['low']:.1f} to {100 * found['high']:.1f} %"
    return f"{found['low']:.3f} to {found['high']:.3f}"


def _number(value: float | None, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    small = 0 < abs(value) < 10**-digits
    return f"{value:.1e}" if small else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{_number(100 * value, 1)} %"


def describe(report: dict[str, Any]) -> str:
    """Return the report in some lines for a terminal."""
    return "\n".join(lines(report))


def lines(report: dict[str, Any]) -> list[str]:
    """Return a line for each figure that matters most, under the names of the parts."""
    found = [f"{report['workdir']}, step {report['step']:,}, {report['tokens']:,} training tokens"]
    found += [f"note: {note}" for note in report["notes"]]
    found += [f"left out: {part}: {why}" for part, why in report["skipped"].items()]
    if (extraction := report["extraction"]) is not None:
        found.append(f"extraction: {extraction['continuation']} tokens, greedy, 95 % intervals")
        for row, other in zip(extraction["training"], extraction["heldout"], strict=True):
            found.append(
                f"  prefix {row['prefix']:>4}: training {_share(row['greedy'])} "
                f"({_between(row['greedy'])}), held out {_share(other['greedy'])}"
            )
        for name, rows in extraction["by_copies"].items():
            last = rows[-1]
            found.append(
                f"  copies {name}, prefix {last['prefix']}: {_share(last['greedy'])} of "
                f"{last['greedy']['trials']}"
            )
    if (canaries := report["canaries"]) is not None:
        found.append(
            f"canaries: exposure in bits; chance {canaries['chance']:.2f}, most "
            f"{canaries['most']:.2f}"
        )
        for row in canaries["by_copies"]:
            each = row["exposure"]
            interval = "" if each["low"] is None else f" ({each['low']:.2f} to {each['high']:.2f})"
            found.append(
                f"  {row['copies']:>4} copies: {each['mean']:.2f}{interval}, ranked "
                f"first of {row['ranked']:,}: {row['first']} of {each['count']}"
            )
    if (membership := report["membership"]) is not None:
        found.append(
            f"membership: {membership['members']} passages of {membership['tokens']} tokens in "
            f"training, {membership['others']} held out; AUC"
        )
        for name, each in membership["scores"].items():
            found.append(f"  {name:<10} {each['auc']:.3f} ({_between(each, percent=False)})")
        if membership["baseline"] is not None:
            each = membership["baseline"]
            found.append(f"  without the model {each['auc']:.3f} ({_between(each, percent=False)})")
    if (personal := report["personal_data"]) is not None:
        found.append(
            f"personal data: {personal['finds']} finds in {personal['texts']} texts; "
            f"{personal['in_training']} of {personal['different']} different ones are in the "
            "training text"
        )
        for kind, each in personal["kinds"].items():
            found.append(f"  {kind}: {each['finds']}, in training {each['in_training']}")
    return found
