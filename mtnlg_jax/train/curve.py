"""Plot the training loss as text, for terminals without pictures, above what became of the scores
of tasks and of the held-out loss of each source."""

import math

from mtnlg_jax.train.metrics import read_metrics, training_loss
from mtnlg_jax.train.plots import panels_of

_MARKS = {"masked": "o", "causal": "*"}


def text_curve(metrics_path: str, width: int = 72, height: int = 8) -> str:
    """Return the training loss as a text plot, masked and causal steps with their own marks."""
    records = read_metrics(metrics_path)
    steps = [r for r in records if r["kind"] == "train"]
    width = min(width, len(steps))
    # A column is the mean of its steps, so that no step is left out of the picture.
    columns = [steps[i * len(steps) // width : (i + 1) * len(steps) // width] for i in range(width)]
    # Masked and causal losses are not comparable, so each has its own mark in a column.
    means = {name: [_mean_loss(column, name) for column in columns] for name in _MARKS}
    seen = [mean for values in means.values() for mean in values if mean is not None]
    if not seen:
        return "no step had a finite loss"
    low = min(seen)
    high = max(seen)
    grid = [[" "] * width for _ in range(height)]
    for name, values in means.items():
        for x, value in enumerate(values):
            if value is not None:
                # Row 0 is the top.
                y = round((high - value) / max(high - low, 1e-9) * (height - 1))
                grid[y][x] = _MARKS[name]
    lines = [
        f"{high - i * (high - low) / (height - 1):6.2f} |{''.join(row)}"
        for i, row in enumerate(grid)
    ]
    axis = " " * 7 + "+" + "-" * width
    legend = f"        loss over {len(steps):,} steps (* causal, o masked)"
    return "\n".join([*lines, axis, legend, *_changes(records)])


def _changes(records: list[dict]) -> list[str]:
    """Return a line with the first and the last value of every curve below the losses."""
    curves = {name: points for panel in panels_of(records) for name, points in panel.curves.items()}
    width = max(map(len, curves), default=0)
    return [
        f"        {name:{width}} {points[0][1]:10.4g} -> {points[-1][1]:.4g}"
        for name, points in curves.items()
    ]


def _mean_loss(records: list[dict], objective: str) -> float | None:
    """Return the mean of the finite losses of ``objective``; None without any."""
    losses = [
        training_loss(record)[1] for record in records if record.get("objective") == objective
    ]
    finite = [loss for loss in losses if not math.isnan(loss)]
    return sum(finite) / len(finite) if finite else None
