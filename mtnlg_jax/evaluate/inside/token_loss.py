"""The loss of each token of a text, its rank, and what the model expected in its place."""

# Shapes: B rows, S positions, D width, V vocabulary, K guesses

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from mtnlg_jax.evaluate.perplexity import Window, spans
from mtnlg_jax.model.transformer import Transformer

_CHUNK = 64  # positions of which logits exist at the same time, in each row


class TokenLosses(NamedTuple):
    """Figures of the scored tokens of one text, in order; T tokens."""

    tokens: np.ndarray  # int32 [T], without the first, which nothing predicts
    losses: np.ndarray  # float32 [T], nats
    ranks: np.ndarray  # int32 [T], from 0: how many tokens were more probable
    guesses: np.ndarray  # int32 [T, K], the most probable tokens, the best first
    probabilities: np.ndarray  # float32 [T, K], of these


@functools.partial(jax.jit, static_argnums=(0, 4))
def _figures(graph, params, inputs_BS, labels_BS, guesses):
    model = nnx.merge(graph, params)
    x_BSD = model.hidden(inputs_BS)
    head = model.head()

    def chunk(part):
        x, labels = part
        log_probs = jax.nn.log_softmax(head.logits(x))
        true = jnp.take_along_axis(log_probs, labels[..., None], -1)
        best, which = lax.top_k(log_probs, guesses)
        return -true[..., 0], (log_probs > true).sum(-1), which, jnp.exp(best)

    rows, length = inputs_BS.shape
    pad = -length % _CHUNK if length > _CHUNK else 0
    size = min(_CHUNK, length)

    def cut(array):
        array = jnp.pad(array, ((0, 0), (0, pad), *((0, 0),) * (array.ndim - 2)))
        return array.reshape(rows, -1, size, *array.shape[2:]).swapaxes(0, 1)

    found = lax.map(chunk, (cut(x_BSD), cut(labels_BS)))
    return jax.tree.map(
        lambda a: a.swapaxes(0, 1).reshape(rows, -1, *a.shape[3:])[:, :length], found
    )


def token_losses(
    model: Transformer,
    tokens,
    stride: int | None = None,
    guesses: int = 5,
    batch: int = 8,
) -> TokenLosses:
    """Score each token of a text after the first, in windows of the model's context.

    Args:
      tokens: ids, of which the first is only read; at least 2.
      stride: tokens that each window scores, 1 to the context; default: half the context.
      guesses: most probable tokens to keep, at least 1.
      batch: windows in one pass.

    The windows are those of `evaluate_texts`, so the mean loss is its loss. Raises ValueError on a
    stride outside the context, on less than 2 tokens, and where a loss is not finite.
    """
    tokens = np.asarray(tokens, np.int32)
    length = model.config.max_position_embeddings
    stride = max(1, length // 2) if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride={stride} is outside [1, {length}], the model's context")
    if len(tokens) < 2:
        raise ValueError("the text is empty; there is nothing to score")
    windows = spans(len(tokens), length, stride)
    width = min(length, -(-max(window.end - window.begin for window in windows) // 16) * 16)
    batch = min(batch, len(windows))
    graph, params = nnx.split(model)
    parts: list[list[np.ndarray]] = [[], [], [], []]
    for start in range(0, len(windows), batch):
        chosen = windows[start : start + batch]
        inputs, labels = _rows(tokens, chosen, batch, width)
        found = jax.device_get(_figures(graph, params, inputs, labels, guesses))
        for row, window in enumerate(chosen):
            scored = slice(window.first - window.begin, window.end - window.begin)
            for part, figure in zip(parts, found, strict=True):
                part.append(figure[row, scored])
    result = TokenLosses(tokens[1:], *(np.concatenate(part) for part in parts))
    if not np.isfinite(result.losses).all():
        at = int(np.flatnonzero(~np.isfinite(result.losses))[0])
        raise ValueError(
            f"the loss of token {at + 1} is {result.losses[at]}; look for numbers that are not "
            "finite in the model's parameters"
        )
    return result


def _rows(
    tokens: np.ndarray, windows: list[Window], rows: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and labels, each (rows, width), 0 where there is no token."""
    inputs = np.zeros((rows, width), np.int32)
    labels = np.zeros((rows, width), np.int32)
    for row, window in enumerate(windows):
        size = window.end - window.begin
        inputs[row, :size] = tokens[window.begin : window.end]
        labels[row, :size] = tokens[window.begin + 1 : window.end + 1]
    return inputs, labels
