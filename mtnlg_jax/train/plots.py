"""Smoothed lines of loss.png, and its panels below the losses: the held-out loss of each source."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_DECAY = 0.9  # the smoothed line weighs a neighbor by this to the power of its distance
_REACH = 60  # neighbors on either side
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


def panels_of(records: list[dict]) -> list[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """Return (label of the y axis, {name of a curve: its (step, value) pairs}) of every panel."""
    panels = []
    for objective in OBJECTIVES:
        found = _curves(records, functools.partial(losses_of_sources, objective=objective))
        if found:
            panels.append((f"{objective} loss of held-out\ntext by source, nats a token", found))
    return panels


def _curves(
    records: list[dict], values_of: Callable[[dict], dict[str, float]]
) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in values_of(record).items():
            if math.isfinite(value):
                curves.setdefault(name, []).append((record["step"], value))
    return curves


def height_of(curves: dict[str, list[tuple[int, float]]]) -> float:
    """Return the height of a panel in inches."""
    return max(3.0, 3.0 * len(curves) / _CURVES_A_PANEL)


def draw(axes: Any, curves: dict[str, list[tuple[int, float]]]) -> None:
    """Draw ``curves`` with a legend beside them, in the order of their last values."""
    from matplotlib import colormaps

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
            label=f"{values[-1]:.3f}  {shortened(name)}",
        )
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize=7, frameon=False
    )


def shortened(name: str, most: int = 28) -> str:
    """Return ``name`` in at most ``most`` characters: its end, which differs."""
    return name if len(name) <= most else "…" + name[1 - most :]
