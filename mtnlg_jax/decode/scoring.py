"""Log-probabilities of tokens that are given: behind one shared prefix, each in its own row, or
masked one at a time.

However many there are, they are scored in blocks of at most BLOCK_TOKENS tokens (one row at least),
so that memory is bounded. A block's rows and width are powers of two, so that compiles are few;
where blocks end changes nothing but the last bits of rounding.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.decode.cache import Decoder, Prefix, bucket, run_layers
from mtnlg_jax.model.attention import attention, merge
from mtnlg_jax.model.loss import token_log_probs

BLOCK_TOKENS = 4096
# Sequences whose starts lie as close together share a block: tokens before a start are read again,
# not scored.
NEAR = 16


def _blocks(lengths: Sequence[int], limit: int) -> Iterator[tuple[list[int], int, int]]:
    """(which sequences, rows, width) of each block; rows past the sequences are padding. Sequences
    of about the same length stand together, so that little of a block is padding."""
    if not len(lengths):
        return
    most = max(1, BLOCK_TOKENS // bucket(max(lengths), limit))
    most = 1 << (most.bit_length() - 1)
    order = np.argsort(lengths, kind="stable").tolist()
    for start in range(0, len(order), most):
        chosen = order[start : start + most]
        yield chosen, 1 << (len(chosen) - 1).bit_length(), bucket(lengths[chosen[-1]], limit)


def score(
    decoder: Decoder, prefix: Prefix, candidates: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """The log-probability of every token of every candidate behind ``prefix`` (one row)."""
    scored = [np.empty(0, np.float32)] * len(candidates)
    for chosen, rows, width in _blocks(list(map(len, candidates)), decoder.context):
        labels_NW = np.zeros((rows, width), np.int32)
        for row, i in zip(labels_NW, chosen, strict=False):
            row[: len(candidates[i])] = candidates[i]
        table_NW = np.asarray(_score(decoder.params, prefix, labels_NW, config=decoder.config))
        for row, i in zip(table_NW, chosen, strict=False):
            scored[i] = row[: len(candidates[i])]
    return scored


def score_from(
    decoder: Decoder, prefix: Prefix, rows: Sequence[Sequence[int]], starts: Sequence[int]
) -> list[np.ndarray]:
    """The log-probability of every token of each row from its start on, where each begins like
    ``prefix`` (one row), as far as its start (1 to the prefix's length); what ``score_rows`` gives,
    with the prefix read once."""
    scored = [np.empty(0, np.float32)] * len(rows)
    left = sorted(range(len(rows)), key=starts.__getitem__)
    while left:
        first = starts[left[0]]
        group = [i for i in left if starts[i] <= first + NEAR]
        left = left[len(group) :]
        # The keys of a prefix serve its beginnings, too.
        begun = prefix._replace(lengths_B=np.array([first], np.int32))
        for i, part in zip(
            group, score(decoder, begun, [rows[i][first:] for i in group]), strict=True
        ):
            scored[i] = part[starts[i] - first :]
    return scored


@functools.partial(jax.jit, static_argnames="config")
def _score(params, prefix: Prefix, labels_NW, *, config):
    """The block begins with the prefix's last token, whose output predicts each candidate's first:
    its queries see the cache up to before that token, and the block itself causally."""
    number, width = labels_NW.shape
    before = prefix.lengths_B[0] - 1
    first_N1 = jnp.broadcast_to(prefix.tokens_BS[0, before], (number, 1))
    tokens_NW = jnp.concatenate([first_N1, labels_NW[:, :-1]], 1)
    # Padding may reach past the last position; what stands there is never scored.
    positions_NW = jnp.minimum(before + jnp.arange(width), config.max_position_embeddings - 1)
    positions_NW = jnp.broadcast_to(positions_NW, (number, width))

    def attend(layer, q, k, v):
        shared_k, shared_v = (x.swapaxes(1, 2) for x in prefix.cache[layer])
        # All candidates are one long row of queries before the shared keys, which so are not copied
        # N times.
        flat = q.reshape(1, number * width, *q.shape[2:])
        o_shared, lse_shared = attention(
            flat, shared_k, shared_v, causal=False, kv_lengths=before[None], return_lse=True
        )
        o_own, lse_own = attention(q, k, v, return_lse=True)
        lse_shared = lse_shared.reshape(-1, number, width).transpose(1, 2, 0)
        return merge(o_shared.reshape(q.shape), lse_shared, o_own, lse_own.swapaxes(1, 2)).astype(
            q.dtype
        )

    x_NWD, head_VD = run_layers(config, params, tokens_NW, positions_NW, attend)
    return token_log_probs(
        x_NWD.reshape(-1, x_NWD.shape[-1]), head_VD, labels_NW.reshape(-1)
    ).reshape(number, width)


def score_rows(
    decoder: Decoder, rows: Sequence[Sequence[int]], starts: Sequence[int]
) -> list[np.ndarray]:
    """The log-probability of every token of each row from its start (1 or more) on, given those
    before it in the row: what ``score`` gives, where each has a context of its own."""
    scored = [np.empty(0, np.float32)] * len(rows)
    for chosen, number, width in _blocks(list(map(len, rows)), decoder.context):
        tokens_NW = np.zeros((number, width), np.int32)
        for row, i in zip(tokens_NW, chosen, strict=False):
            row[: len(rows[i])] = rows[i]
        table_NW = np.asarray(_score_rows(decoder.params, tokens_NW, config=decoder.config))
        for row, i in zip(table_NW, chosen, strict=False):
            scored[i] = row[starts[i] - 1 : len(rows[i]) - 1]
    return scored


@functools.partial(jax.jit, static_argnames="config")
def _score_rows(params, tokens_NW, *, config):
    """Place j holds the log-probability of token j + 1."""

    def attend(_, q, k, v):
        return attention(q, k, v, impl=config.attention_impl)

    positions_NW = jnp.broadcast_to(jnp.arange(tokens_NW.shape[1]), tokens_NW.shape)
    x_NWD, head_VD = run_layers(config, params, tokens_NW, positions_NW, attend)
    labels_NW = jnp.roll(tokens_NW, -1, 1)
    return token_log_probs(
        x_NWD.reshape(-1, x_NWD.shape[-1]), head_VD, labels_NW.reshape(-1)
    ).reshape(labels_NW.shape)


def score_masked(
    decoder: Decoder,
    mask_id: int,
    rows: Sequence[Sequence[int]],
    hidden: Sequence[Sequence[tuple[int, int]]],
) -> list[np.ndarray]:
    """Log-probabilities by the model read both ways, which sees all of a row but what is hidden.

    Args:
      hidden: for each row, (place, end) of every token to score: the one at ``place``, with <mask>
        from there up to before ``end``. Every one is a copy of its row: a row of n tokens takes n
        of them.
    """
    copies = [(i, place, end) for i, places in enumerate(hidden) for place, end in places]
    scored = np.empty(len(copies), np.float32)
    for chosen, number, width in _blocks([len(rows[i]) for i, _, _ in copies], decoder.context):
        tokens_NW = np.zeros((number, width), np.int32)
        lengths_N = np.ones(number, np.int32)
        places_N = np.zeros(number, np.int32)
        labels_N = np.zeros(number, np.int32)
        for at, copy in enumerate(chosen):
            i, place, end = copies[copy]
            tokens_NW[at, : len(rows[i])] = rows[i]
            tokens_NW[at, place:end] = mask_id
            lengths_N[at] = len(rows[i])
            places_N[at] = place
            labels_N[at] = rows[i][place]
        table_N = np.asarray(
            _score_masked(
                decoder.params, tokens_NW, lengths_N, places_N, labels_N, config=decoder.config
            )
        )
        scored[chosen] = table_N[: len(chosen)]
    return np.split(scored, np.cumsum([len(places) for places in hidden])[:-1])


@functools.partial(jax.jit, static_argnames="config")
def _score_masked(params, tokens_NW, lengths_N, places_N, labels_N, *, config):
    def attend(_, q, k, v):
        return attention(q, k, v, causal=False, kv_lengths=lengths_N, impl=config.attention_impl)

    positions_NW = jnp.broadcast_to(jnp.arange(tokens_NW.shape[1]), tokens_NW.shape)
    x_NWD, head_VD = run_layers(config, params, tokens_NW, positions_NW, attend)
    return token_log_probs(x_NWD[jnp.arange(len(places_N)), places_N], head_VD, labels_N)
