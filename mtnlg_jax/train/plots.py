"""Smoothed lines of loss.png, and its panels below the losses: the held-out loss of each source
and the scores of tasks."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

_DECAY = 0.9  # the smoothed line weighs a neighbor by this to the power of its distance
_REACH = 60  # neighbors on either side
# Name of a curve -> its (step, value) pairs.
Curves = dict[str, list[tuple[int, float]]]
OBJECTIVES = ("causal", "masked")
_LINES = ("-", "--", ":")  # for more curves than colors
# Tall enough for a legend of this number of curves in its small letters.
_CURVES_A_PANEL = 16


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """Return a local linear fit at each loss, in which neighbors count less the farther away.

    Unlike a running mean it does not lag where the loss falls, nor at the beginning. A nan stays
    nan and has no weight.
    """
    values = np.array(losses, float)
    known = np.isfinite(values).astype(float)
    values = np.where(known > 0, values, 0.0)
    reach = min(len(values) - 1, _REACH)
    away = np.arange(-reach, reach + 1)

    def around(numbers: np.ndarray, power: int) -> np.ndarray:
        """Return the sum over the neighbors of weight x distance^power x number."""
        # Losses that are nan are 0 in all sums, and so have no weight.
        kernel = _DECAY ** np.abs(away) * away**power
        return np.convolve(numbers, kernel[::-1], "full")[reach : reach + len(values)]

    # Weighted least squares in closed form: moments of the distances (s) and of the losses (t).
    s0, s1, s2 = (around(known, power) for power in range(3))
    t0, t1 = (around(known * values, power) for power in range(2))
    # The determinant of the normal equations; it is 0 where all weight is on one point.
    spread = s0 * s2 - s1**2
    fits = spread > 1e-9  # a line needs two points
    line = np.where(
        fits, (s2 * t0 - s1 * t1) / np.where(fits, spread, 1), t0 / np.maximum(s0, 1e-9)
    )
    return np.where(known > 0, line, np.nan)


def losses_of_sources(record: dict, objective: str) -> dict[str, float]:
    """Return the held-out losses of each source in an evaluation's ``record``, by name; {} where
    there is one source, whose loss is the mean. One that was not finite is nan."""
    prefix = f"{objective}_loss/"
    found = {name[len(prefix) :]: x for name, x in record.items() if name.startswith(prefix)}
    # It is null in the file.
    return {name: math.nan if x is None else float(x) for name, x in found.items()}


def scores_of_tasks(record: dict) -> dict[str, float]:
    """Return the scores in a ``record`` of tasks by "TASK/METRIC", without errors and row counts.
    One that was not finite is nan."""
    return {
        name: math.nan if value is None else float(value)
        for name, value in record.items()
        if "/" in name and not name.endswith(("_stderr", "/rows"))
    }


class Panel(NamedTuple):
    """A part of loss.png with a legend beside it."""

    label: str  # of the y axis
    curves: Curves
    log: bool = False  # whether the y axis is logarithmic


def panels_of(records: list[dict]) -> list[Panel]:
    """Return the panels below the losses."""
    panels = []
    for objective in OBJECTIVES:
        found = _curves(records, functools.partial(losses_of_sources, objective=objective))
        if found:
            label = f"{objective} loss of held-out\ntext by source, nats a token"
            panels.append(Panel(label, found))
    tasks = [record for record in records if record["kind"] == "tasks"]
    by_metric: dict[str, Curves] = {}
    for name, points in _curves(tasks, scores_of_tasks).items():
        # Accuracies and the like share a panel. A perplexity falls by powers of ten.
        share = all(0 <= value <= 1 for _, value in points)
        metric = "scores of tasks" if share else name.rpartition("/")[2]
        by_metric.setdefault(metric, {})[name.replace("/", " ")] = points
    for metric, curves in by_metric.items():
        positive = all(value > 0 for points in curves.values() for _, value in points)
        panels.append(Panel(metric, curves, log=metric != "scores of tasks" and positive))
    return panels


def _curves(records: list[dict], values_of: Callable[[dict], dict[str, float]]) -> Curves:
    curves: Curves = {}
    for record in records:
        for name, value in values_of(record).items():
            if math.isfinite(value):
                curves.setdefault(name, []).append((record["step"], value))
    return curves


def height_of(curves: Curves) -> float:
    """Return the height of a panel in inches."""
    return max(3.0, 3.0 * len(curves) / _CURVES_A_PANEL)


def draw(axes: Any, panel: Panel) -> None:
    """Draw the curves of a panel, with a legend in the order of their last values."""
    from matplotlib import colormaps

    curves = panel.curves
    axes.set_ylabel(panel.label)
    axes.grid(alpha=0.3)
    if panel.log:
        axes.set_yscale("log")

    colors = [colormaps["tab20"](number) for number in range(20)]
    # The order of the ends of the lines, so that a reader finds a line by its height.
    order = sorted(curves, key=lambda name: -curves[name][-1][1])
    for number, name in enumerate(order):
        steps, values = zip(*curves[name], strict=True)
        axes.plot(
            steps,
            values,
            _LINES[number // len(colors) % len(_LINES)],
            marker=".",
            color=colors[number % len(colors)],
            linewidth=1.2,
            label=f"{values[-1]:.4g}  {shortened(name)}",
        )
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize=7, frameon=False
    )


def shortened(name: str, most: int = 28) -> str:
    """Return ``name`` in at most ``most`` characters: its end, which differs."""
    return name if len(name) <= most else "…" + name[1 - most :]
