"""Log-probabilities of given tokens with the most probable tokens beside them.

Both come from the same logits, so that "the token is the best one" can be read off the numbers bit
for bit. An API's echo and lm-evaluation-harness's is_greedy need that; `scoring` has the
log-probabilities alone.
"""

# Shapes: C rows of a block, S positions, D width, U tokens of a piece, V vocabulary, K best tokens

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.decode.adapters import of_rows
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.scoring import blocks, read_rows
from mtnlg_jax.parallel.auto import fetch, over_its_mesh, padded

# Places that have logits at the same time: (prompt x V) logits would fill the memory.
PIECE = 128


class Best(NamedTuple):
    """The numbers of a row of S tokens, from its second token on."""

    logprobs: np.ndarray  # (S - 1,) of the tokens
    best: np.ndarray  # (S - 1, K) ids, best first
    best_logprobs: np.ndarray  # (S - 1, K)


def score_best(
    decoder: Decoder, rows: Sequence[Sequence[int]], top: int
) -> Iterator[list[Best | None]]:
    """Yield the results so far after each block; the last ones are complete, in the order of rows.

    Args:
      rows: each within the context, and at least one token.
      top: how many of the best tokens to tell of each place, 1 or more.
    """
    found: list[Best | None] = [None] * len(rows)
    if not rows:
        yield found
        return
    for chosen, number, width in blocks(list(map(len, rows)), decoder):
        tokens_CS = np.zeros((padded(number, decoder.mesh), width), np.int32)
        for row, index in zip(tokens_CS, chosen, strict=False):
            row[: len(rows[index])] = rows[index]
        tables = _tables(of_rows(decoder, chosen, len(tokens_CS)), tokens_CS, top)
        for at, index in enumerate(chosen):
            length = len(rows[index]) - 1
            found[index] = Best(*(table[at, :length] for table in tables))
        yield found


@over_its_mesh
def _tables(decoder: Decoder, tokens_CS: np.ndarray, top: int) -> list[np.ndarray]:
    return [
        fetch(each) for each in _best(decoder.params, tokens_CS, config=decoder.config, top=top)
    ]


@functools.partial(jax.jit, static_argnames=("config", "top"))
def _best(params, tokens_CS, *, config, top):
    """Return log p of token j + 1 at entry j, (C, S), the best ids and their log p, (C, S, K)."""

    x_CSD, head = read_rows(config, params, tokens_CS)
    labels = jnp.roll(tokens_CS, -1, 1).reshape(-1)
    flat = x_CSD.reshape(-1, x_CSD.shape[-1])
    size = min(PIECE, len(labels))
    pad = -len(labels) % size

    def piece(part):
        x, label_U = part
        logits_UV = head.logits(x)
        lse_U1 = jax.nn.logsumexp(logits_UV, -1, keepdims=True)
        # One array for the token and for the best ones: equal entries are equal numbers.
        logprobs_UV = logits_UV - lse_U1
        best_logprobs_UK, best_UK = lax.top_k(logprobs_UV, top)
        own_U1 = jnp.take_along_axis(logprobs_UV, label_U[:, None], 1)
        return own_U1[:, 0], best_UK, best_logprobs_UK

    pieces = (
        jnp.pad(flat, ((0, pad), (0, 0))).reshape(-1, size, flat.shape[1]),
        jnp.pad(labels, (0, pad)).reshape(-1, size),
    )
    out = lax.map(piece, pieces)

    def whole(x):
        return x.reshape(-1, *x.shape[2:])[: len(labels)].reshape(*tokens_CS.shape, *x.shape[2:])

    return tuple(map(whole, out))
