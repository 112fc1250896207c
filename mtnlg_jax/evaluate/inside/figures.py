"""Pictures of what was found inside a model, as PNG."""

# Shapes: N heads, S query positions, T key positions, L layers, P points, M heads of all layers

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtnlg_jax.evaluate.inside.files import png_of

_MOST_LABELS = 64  # tokens that an axis names
_MOST_INCHES = 40  # of a side; viewers refuse much larger pictures
_MOST_PANELS = 16  # with axes of their own, which take long to lay out


def _figure(width: float, height: float) -> Any:
    # Not pyplot, which wants a display and keeps its figures.
    from matplotlib.figure import Figure

    size = min(width, _MOST_INCHES), min(height, _MOST_INCHES)
    return Figure(figsize=size, layout="constrained")


def _name(axis: Any, tokens: Sequence[str], **options: Any) -> None:
    if len(tokens) <= _MOST_LABELS:
        names = [_plain(repr(token)[1:-1]) for token in tokens]
        axis.set_ticks(range(len(tokens)), names, fontsize=7, **options)


def _plain(text: str) -> str:
    """Return a text for matplotlib, in which a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def lens(probabilities_LS: np.ndarray, guesses: list[list[str]], tokens: Sequence[str]) -> bytes:
    """Draw the best guess of each layer and position, colored by its probability."""
    layers, length = probabilities_LS.shape
    figure = _figure(max(4, 0.55 * length + 1), max(2.5, 0.3 * layers + 1.2))
    axes = figure.subplots()
    drawn = axes.imshow(probabilities_LS, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    if length <= _MOST_LABELS and length * layers <= 1200:
        for layer, row in enumerate(guesses):
            for at, text in enumerate(row):
                color = "white" if probabilities_LS[layer, at] > 0.6 else "black"
                shown = _plain(repr(text)[1:-1][:9])
                axes.text(at, layer, shown, ha="center", va="center", fontsize=6, color=color)
    _name(axes.xaxis, tokens, rotation=90)
    axes.set_yticks(range(layers), ["embedding", *(f"layer {n}" for n in range(layers - 1))])
    axes.set_title("predictions of each layer")
    figure.colorbar(drawn, ax=axes, label="probability of the best guess")
    return png_of(figure)


def attention(attention_LNST: np.ndarray, tokens: Sequence[str]) -> bytes:
    """Draw the weights of every head of every layer."""
    layers, heads, length, _ = attention_LNST.shape
    if layers * heads > _MOST_PANELS:
        return _mosaic(attention_LNST)
    figure = _figure(2.4 * heads + 0.6, 2.4 * layers + 0.6)
    panels = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    for layer in range(layers):
        for head in range(heads):
            axes = panels[layer, head]
            axes.imshow(attention_LNST[layer, head], vmin=0, vmax=1, cmap="Blues")
            axes.set_title(f"layer {layer}, head {head}", fontsize=6)
            axes.tick_params(labelsize=5)
            if length <= 24:
                _name(axes.xaxis, tokens, rotation=90)
                _name(axes.yaxis, tokens)
            else:
                axes.set_xticks([])
                axes.set_yticks([])
    return png_of(figure)


def _mosaic(attention_LNST: np.ndarray) -> bytes:
    """Draw many heads as tiles of one picture: a row for each layer, a column for each head."""
    layers, heads, length, _ = attention_LNST.shape
    # A gap between tiles, which nan leaves in the color of the ground.
    gap = max(1, length // 16)
    side = length + gap
    tiles_LNST = np.pad(
        attention_LNST, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=np.nan
    )
    drawn = tiles_LNST.transpose(0, 2, 1, 3).reshape(layers * side, heads * side)
    figure = _figure(1.2 * heads + 0.6, 1.2 * layers + 0.6)
    axes = figure.subplots()
    axes.set_facecolor("0.85")
    axes.imshow(drawn, vmin=0, vmax=1, cmap="Blues")
    axes.set_xticks(np.arange(heads) * side + length / 2, range(heads))
    axes.set_yticks(np.arange(layers) * side + length / 2, range(layers))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    return png_of(figure)


def losses(series: Sequence[np.ndarray], names: Sequence[str]) -> bytes:
    """Draw the loss along the first texts: tokens, and a running mean."""
    series = series[:_MOST_PANELS]
    names = names[:_MOST_PANELS]
    figure = _figure(8, 2.4 * len(series) + 0.6)
    panels = figure.subplots(len(series), 1, squeeze=False)[:, 0]
    for axes, values, name in zip(panels, series, names, strict=True):
        axes.plot(values, color="tab:gray", linewidth=0.5, alpha=0.7)
        width = max(1, min(50, len(values) // 10))
        mean = np.convolve(values, np.ones(width) / width, "valid")
        axes.plot(np.arange(len(mean)) + width // 2, mean, color="tab:red")
        axes.set_title(f"{_plain(name)}: mean of {width} tokens in red", fontsize=8)
        axes.set_ylabel("loss, nats")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("token")
    return png_of(figure)


def patches(recovered_PLS: np.ndarray, points: Sequence[str], tokens: Sequence[str]) -> bytes:
    """Draw how much of the clean answer each patch recovers, a panel for each point."""
    count, layers, length = recovered_PLS.shape
    figure = _figure(max(6, 0.35 * length * count + 1), max(2.6, 0.3 * layers + 1.6))
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for axes, values, point in zip(panels, recovered_PLS, points, strict=True):
        drawn = axes.imshow(values, vmin=-1, vmax=1, cmap="PuOr_r", aspect="auto")
        axes.set_title(point)
        _name(axes.xaxis, tokens, rotation=90)
        axes.yaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("layer")
    figure.colorbar(drawn, ax=list(panels), label="share recovered")
    return png_of(figure)


def ranking(scores: Sequence[float], names: Sequence[str], label: str) -> bytes:
    """Draw scores as bars, the first on top."""
    figure = _figure(8, 0.28 * len(scores) + 1)
    axes = figure.subplots()
    colors = ["tab:orange" if score > 0 else "tab:blue" for score in scores]
    axes.barh(range(len(scores)), scores, color=colors)
    axes.set_yticks(range(len(scores)), [_plain(name) for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    return png_of(figure)
