"""Plots of a report on long texts, as PNG."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mtnlg_jax import storage
from mtnlg_jax.evaluate.longtext import LongTextReport
from mtnlg_jax.evaluate.needle import Needle

COLORS = ("tab:blue", "tab:gray")
MOST_LINES = 12  # texts drawn one by one


def write_plots(
    folder: str,
    texts: LongTextReport,
    real: LongTextReport | None = None,
    needles: Sequence[Needle] | None = None,
) -> list[str]:
    """Write the plots that have data to a folder or URL, and return the names of their files."""
    reports = {"texts": texts} if real is None else {"texts": texts, "references": real}
    names = []
    for name, figure in _figures(reports, needles):
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
        storage.write_file(folder, name, content.getvalue())
        names.append(name)
    return names


def _figures(
    reports: dict[str, LongTextReport], needles: Sequence[Needle] | None
) -> Iterator[tuple[str, Any]]:
    """Yield the file's name and the Figure of each plot."""
    yield "zipf.png", _drawn(lambda axes: _zipf(axes, reports))
    if any(along for report in reports.values() for along in report.along):
        yield "repetition.png", _drawn(lambda axes: _repetition(axes, reports))
    if any(report.positions for report in reports.values()):
        yield "loss_by_position.png", _drawn(lambda axes: _losses(axes, reports))
    if any(report.curve for report in reports.values()):
        yield "divergence.png", _drawn(lambda axes: _divergence(axes, reports))
    if needles:
        yield "needle.png", _needles(needles)


def _drawn(draw: Callable[[Any], None]) -> Any:
    # Not pyplot, which wants a display and keeps its figures.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


def _zipf(axes: Any, reports: dict[str, LongTextReport]) -> None:
    for (name, report), color in zip(reports.items(), COLORS, strict=False):
        ranks = range(1, len(report.frequencies) + 1)
        zipf = report.figures["zipf"].value
        label = name if zipf is None else f"{name}: coefficient {zipf:.3f}"
        axes.loglog(ranks, report.frequencies, color=color, label=label)
    axes.set_xlabel("rank of the word")
    axes.set_ylabel("times it occurs")


def _repetition(axes: Any, reports: dict[str, LongTextReport]) -> None:
    for (name, report), color in zip(reports.items(), COLORS, strict=False):
        for number, along in enumerate(report.along[:MOST_LINES]):
            shares = [100 * each for each in along]
            label = name if number == 0 else None
            # A text of one window is a point.
            axes.plot(shares, color=color, alpha=0.7, marker=".", markersize=4, label=label)
    axes.set_ylim(-2, 102)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("window of the text")
    axes.set_ylabel("4-grams that occurred before, %")


def _losses(axes: Any, reports: dict[str, LongTextReport]) -> None:
    for (name, report), color in zip(reports.items(), COLORS, strict=False):
        middles = [(each.first + each.last) / 2 for each in report.positions]
        losses = [each.loss for each in report.positions]
        errors = [each.error or 0.0 for each in report.positions]
        axes.errorbar(middles, losses, errors, color=color, marker=".", capsize=2, label=name)
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("loss, nats a token")


def _divergence(axes: Any, reports: dict[str, LongTextReport]) -> None:
    for (name, report), color in zip(reports.items(), COLORS, strict=False):
        if report.curve:
            xs, ys = zip(*report.curve, strict=True)
            label = f"{name}: area {report.figures['mauve'].value:.3f}"
            axes.plot(xs, ys, color=color, marker=".", label=label)
    axes.set_xlabel("exp(-5 KL(texts | mixture))")
    axes.set_ylabel("exp(-5 KL(real | mixture))")


def _needles(needles: Sequence[Needle]) -> Any:
    """Return heat maps of recall by length and depth, by ranking and by greedy decoding."""
    from matplotlib.figure import Figure

    lengths = sorted({each.length for each in needles})
    depths = sorted({each.depth for each in needles})
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("ranked", "exact"), strict=True):
        cells = {(each.depth, each.length): getattr(each, kind) for each in needles}
        table = [[cells[depth, length] for length in lengths] for depth in depths]
        image = axes.imshow(table, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), lengths)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("length, tokens")
        axes.set_title({"ranked": "the key ranks first", "exact": "the key is written"}[kind])
        for row, line in enumerate(table):
            for column, share in enumerate(line):
                axes.text(column, row, f"{share:.0%}", ha="center", va="center")
    panels[0].set_ylabel("depth of the key")
    figure.colorbar(image, ax=panels, label="share of the trials")
    return figure
