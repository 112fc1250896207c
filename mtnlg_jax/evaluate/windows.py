"""Windows of texts read by a model: its loss by position, and its hidden states as features."""

# Shapes: C rows of a block, S positions, D width, P windows

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.scoring import blocks, read_rows, score_rows
from mtnlg_jax.evaluate.figures import TooShort
from mtnlg_jax.parallel.auto import fetch, over_its_mesh, padded, whole

LEAST_POSITIONS = 32  # shorter windows show nothing of a context


class Bucket(NamedTuple):
    """Positions [first, last] of a window; the first token behind <bos> has position 1."""

    first: int
    last: int
    loss: float  # nats a token
    error: float | None  # standard error of the mean over windows


def cut_windows(tokens: Sequence[Sequence[int]], length: int, most: int) -> list[list[int]]:
    """Return whole windows of ``length`` tokens that do not overlap, at most ``most``.

    If there are more, those that are kept are spread evenly.
    """
    found = [
        list(text[start : start + length])
        for text in tokens
        for start in range(0, len(text) - length + 1, length)
    ]
    if len(found) <= most:
        return found
    return [found[index * len(found) // most] for index in range(most)]


def loss_by_position(
    decoder: Decoder,
    bos_id: int,
    tokens: Sequence[Sequence[int]],
    buckets: int = 16,
    most: int = 64,
) -> list[Bucket]:
    """Return the loss of each bucket of positions, up to the end of the model's context.

    Each window begins with <bos>. Where no text fills the context, windows are as long as the
    longest text, so that all buckets are of the same windows.

    Args:
      tokens: ids of each text without special tokens.
      buckets: number of buckets of equal size.
      most: number of windows to read.

    Raises TooShort if no text has 32 tokens.
    """
    longest = max(map(len, tokens), default=0)
    length = min(decoder.context - 1, longest)
    if length < LEAST_POSITIONS:
        raise TooShort(f"needs a text of {LEAST_POSITIONS} tokens, and the longest has {longest}")
    windows = cut_windows(tokens, length, most)
    rows = [[bos_id, *window] for window in windows]
    losses_PS = -np.stack(score_rows(decoder, rows, [1] * len(rows))).astype(np.float64)
    found = []
    edges = np.linspace(0, length, min(buckets, length) + 1).astype(int)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        means = losses_PS[:, start:stop].mean(1)
        error = None if len(means) == 1 else float(means.std(ddof=1) / len(means) ** 0.5)
        found.append(Bucket(int(start) + 1, int(stop), float(means.mean()), error))
    return found


@over_its_mesh
def window_features(
    decoder: Decoder,
    bos_id: int,
    tokens: Sequence[Sequence[int]],
    length: int = 64,
    most: int = 512,
) -> np.ndarray:
    """Return the mean hidden state behind the final norm of each window, float32 (P, D).

    Args:
      tokens: ids of each text without special tokens.
      length: tokens of a window, below the model's context. Each window begins with <bos>.
      most: number of windows to read.
    """
    windows = cut_windows(tokens, length, most)
    rows = [[bos_id, *window] for window in windows]
    features_PD = np.zeros((len(rows), decoder.config.hidden_size), np.float32)
    for chosen, number, width in blocks(list(map(len, rows)), decoder):
        tokens_CS = np.zeros((padded(number, decoder.mesh), width), np.int32)
        for row, i in zip(tokens_CS, chosen, strict=False):
            row[: length + 1] = rows[i]
        means_CD = fetch(_means(decoder.params, tokens_CS, length, config=decoder.config))
        features_PD[chosen] = means_CD[: len(chosen)]
    return features_PD


@functools.partial(jax.jit, static_argnames="config")
def _means(params, tokens_CS, length, *, config):
    """Return the mean hidden state (C, D) of positions 1 to ``length``."""
    x_CSD, _ = read_rows(config, params, tokens_CS)
    position_S = jnp.arange(tokens_CS.shape[1])
    inside_S = (1 <= position_S) & (position_S <= length)
    summed_CD = (x_CSD.astype(jnp.float32) * inside_S[None, :, None]).sum(1)
    return whole(summed_CD / length)
