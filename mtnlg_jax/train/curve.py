"""The loss as text, for terminals without pictures."""

import math

from mtnlg_jax.train.metrics import read_metrics, training_loss


def text_curve(metrics_path: str, width: int = 72, height: int = 8) -> str:
    """The training loss as text, masked and causal steps apart, for terminals without pictures."""
    steps = [r for r in read_metrics(metrics_path) if r["kind"] == "train"]
    width = min(width, len(steps))
    columns = [steps[i * len(steps) // width : (i + 1) * len(steps) // width] for i in range(width)]
    marks = {"masked": "o", "causal": "*"}
    means = {
        name: [
            _mean(
                [
                    loss
                    for record in column
                    if record.get("objective") == name
                    and not math.isnan(loss := training_loss(record)[1])
                ]
            )
            for column in columns
        ]
        for name in marks
    }
    seen = [m for values in means.values() for m in values if m is not None]
    if not seen:
        return "no step had a finite loss"
    low = min(seen)
    high = max(seen)
    grid = [[" "] * width for _ in range(height)]
    for name, values in means.items():
        for x, value in enumerate(values):
            if value is not None:
                grid[round((high - value) / max(high - low, 1e-9) * (height - 1))][x] = marks[name]
    lines = [
        f"{high - i * (high - low) / (height - 1):6.2f} |{''.join(row)}"
        for i, row in enumerate(grid)
    ]
    return "\n".join(
        [
            *lines,
            " " * 7 + "+" + "-" * width,
            f"        loss over {len(steps):,} steps (* causal, o masked)",
        ]
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
