"""stats.png: the statistics of a run by layer, one panel for each, and its noise scale."""

import os
from typing import Any

import numpy as np

# Name in a record without "_by_layer" -> (label, whether the axis is logarithmic).
PANELS = {
    "grad_norm": ("norm of the gradient", True),
    "update_ratio": ("norm of the update / of weights", True),
    "residual_rms": ("RMS of the residual stream", True),
    "attention_rms": ("RMS of attention's output", True),
    "mlp_rms": ("RMS of the MLP's output", True),
    "attention_entropy": ("attention entropy, nats", False),
    "dead_units": ("share of dead MLP units", False),
}


def plot_statistics(records: list[dict], path: str) -> None:
    """Draw the ``records`` of statistics, of which there is one or more, into the file ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import colormaps, colors, pyplot, ticker

    steps = [record["step"] for record in records]
    figure, grid = pyplot.subplots(4, 2, figsize=(12, 13), sharex=True, layout="constrained")
    for axes, (name, (label, log)) in zip(grid.flat, PANELS.items(), strict=False):
        # A record of another number of layers cannot be in one run. None is not finite.
        lines = np.array([record[f"{name}_by_layer"] for record in records], float).T
        depth = colors.Normalize(0, max(1, len(lines) - 1))
        for layer, values in enumerate(lines):
            color = colormaps["viridis"](depth(layer))
            axes.plot(steps, values, color=color, linewidth=1, marker=".", markersize=3)
        axes.set_ylabel(label)
        if log and np.any(lines > 0):
            axes.set_yscale("log")
    _plot_noise(grid.flat[len(PANELS)], steps, records)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    for axes in grid[-1]:
        axes.set_xlabel("step")
    scale = pyplot.cm.ScalarMappable(depth, "viridis")
    figure.colorbar(scale, ax=grid, label="layer", shrink=0.4, aspect=40)
    # A viewer that refreshes never sees half a picture.
    beside = path + ".partial.png"
    figure.savefig(beside, dpi=110)
    pyplot.close(figure)
    os.replace(beside, path)


def _plot_noise(axes: Any, steps: list[int], records: list[dict]) -> None:
    """Draw the noise scale and the batch, both in sequences."""
    scales = np.array([record["noise_scale"] for record in records], float)
    axes.plot(steps, scales, color="tab:red", marker=".", label="gradient noise scale")
    batches = [record["sequences"] for record in records]
    axes.plot(steps, batches, "--", color="tab:gray", label="batch")
    axes.set_ylabel("sequences")
    axes.set_yscale("log")
    axes.legend()
