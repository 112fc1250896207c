"""Pictures of what was found inside a model, as PNG."""

# Shapes: N heads, S query positions, T key positions, L layers, P points, M heads of all layers

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtnlg_jax.evaluate.inside.files import png_of

_MOST_LABELS = 64  # tokens that an axis names


def _figure(width: float, height: float) -> Any:
    # Not pyplot, which wants a display and keeps its figures.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _name(axis: Any, tokens: Sequence[str], **options: Any) -> None:
    if len(tokens) <= _MOST_LABELS:
        # A dollar sign would begin a formula.
        names = [repr(token)[1:-1].replace("$", r"\$") for token in tokens]
        axis.set_ticks(range(len(tokens)), names, fontsize=7, **options)


def lens(probabilities_LS: np.ndarray, guesses: list[list[str]], tokens: Sequence[str]) -> bytes:
    """Draw the best guess of each layer and position, colored by its probability."""
    layers, length = probabilities_LS.shape
    figure = _figure(max(4, 0.55 * length + 1), max(2.5, 0.3 * layers + 1.2))
    axes = figure.subplots()
    drawn = axes.imshow(probabilities_LS, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    if length * layers <= 1200:
        for layer, row in enumerate(guesses):
            for at, text in enumerate(row):
                color = "white" if probabilities_LS[layer, at] > 0.6 else "black"
                shown = repr(text)[1:-1].replace("$", r"\$")[:9]
                axes.text(at, layer, shown, ha="center", va="center", fontsize=6, color=color)
    _name(axes.xaxis, tokens, rotation=90)
    axes.set_yticks(range(layers), ["embedding", *(f"layer {n}" for n in range(layers - 1))])
    axes.set_title("what each layer would predict next")
    figure.colorbar(drawn, ax=axes, label="probability of the best guess")
    return png_of(figure)


def attention(attention_LNST: np.ndarray, tokens: Sequence[str]) -> bytes:
    """Draw the weights of every head of every layer."""
    layers, heads, length, _ = attention_LNST.shape
    size = 2.4 if layers * heads <= 16 else 1.2
    figure = _figure(size * heads + 0.6, size * layers + 0.6)
    panels = figure.subplots(layers, heads, squeeze=False, sharex=True, sharey=True)
    for layer in range(layers):
        for head in range(heads):
            axes = panels[layer, head]
            axes.imshow(attention_LNST[layer, head], vmin=0, vmax=1, cmap="Blues")
            axes.set_title(f"layer {layer}, head {head}", fontsize=6)
            axes.tick_params(labelsize=5)
            if size > 2 and length <= 24:
                _name(axes.xaxis, tokens, rotation=90)
                _name(axes.yaxis, tokens)
            else:
                axes.set_xticks([])
                axes.set_yticks([])
    return png_of(figure)


def losses(series: Sequence[np.ndarray], names: Sequence[str]) -> bytes:
    """Draw the loss along each text: tokens, and a running mean."""
    figure = _figure(8, 2.4 * len(series) + 0.6)
    panels = figure.subplots(len(series), 1, squeeze=False)[:, 0]
    for axes, values, name in zip(panels, series, names, strict=True):
        axes.plot(values, color="tab:gray", linewidth=0.5, alpha=0.7)
        width = max(1, min(50, len(values) // 10))
        mean = np.convolve(values, np.ones(width) / width, "valid")
        axes.plot(np.arange(len(mean)) + width // 2, mean, color="tab:red")
        axes.set_title(f"{name}: mean of {width} tokens in red", fontsize=8)
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
    axes.set_yticks(range(len(scores)), [name.replace("$", r"\$") for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    return png_of(figure)
