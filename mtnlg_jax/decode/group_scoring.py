"""Log-probabilities of many continuations of many contexts.

Contexts and continuations become trees of shared beginnings (forest.py): a context is read once
for all of its continuations, and what several contexts or continuations begin with is read once as
well. Logits are computed where a continuation is predicted, and nowhere else.
"""

# Shapes: B rows, S indices in a row, I indices of all rows, D width, W places of the head,
# C places of a part, M labels of a place, V vocabulary; in attention Q queries, T keys, N heads

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtnlg_jax.decode.adapters import of_rows
from mtnlg_jax.decode.cache import Decoder
from mtnlg_jax.decode.forest import MOST, Block, blocks_of, trees_of
from mtnlg_jax.decode.forward import run_layers
from mtnlg_jax.model.attention import attention
from mtnlg_jax.parallel.auto import fetch, over_its_mesh, padded, padded_positions, whole

# Places of the head whose logits exist at once.
CHUNK = 128
# Queries of a branching row whose scores exist at once, and the number of such parts of a row at
# most, which are compiled one by one.
QUERIES = 256
PARTS = 16

# A context and its continuations, as token ids.
Group = tuple[Sequence[int], Sequence[Sequence[int]]]


class Scored(NamedTuple):
    """What a model says of a continuation.

    ``logprobs``: the log-probability of each token, float32. ``best``: whether each is the most
    likely token, bool.
    """

    logprobs: np.ndarray
    best: np.ndarray


@over_its_mesh
def score_groups(
    decoder: Decoder,
    groups: Sequence[Group],
    on_scored: Callable[[int], None] = lambda continuations: None,
) -> list[list[Scored]]:
    """Return what the model says of each continuation of each context.

    Args:
      groups: (context, continuations): ids of at least one token, and of any number of them. The
        last token of a continuation is not read, so context and continuation may have one token
        more than the model has positions.
      on_scored: called with the number of continuations that a call of the model has scored.

    Any number of groups is read in blocks of the decoder's ``block_tokens``. Few programs are
    compiled: at most two for each width of rows.

    Raises ValueError on an empty context, on one that leaves no room for a continuation, and on
    ids outside the vocabulary.
    """
    rows, starts, owners = _rows_of(decoder, groups)
    if of_rows(decoder, [0]) is not decoder:
        raise ValueError(
            "the rows of this decoder have adapters of their own, and groups share rows; score "
            "them with `adapters.for_rows(decoder, [name])`, one adapter at a time"
        )
    found: dict[int, Scored] = {}
    # The next block is packed while the device computes. Over several devices of a CPU, programs
    # in flight can wait for each other forever.
    waiting: collections.deque[tuple[Block, Any]] = collections.deque()
    ahead = 1 if decoder.mesh is None else 0

    def take() -> None:
        block, arrays = waiting.popleft()
        before = len(found)
        found.update(_read(block, *map(fetch, arrays)))
        on_scored(sum(len(owners[i]) for i in list(found)[before:]))

    trees = trees_of(rows, starts, min(MOST, decoder.block_tokens))
    padded_rows = functools.partial(padded, mesh=decoder.mesh)
    for block in blocks_of(trees, decoder.block_tokens, padded_rows, padded_positions):
        arrays = _score(
            decoder.params,
            *block[1:6],
            -(-block.places // CHUNK),
            config=decoder.config,
            branches=block.branches,
        )
        waiting.append((block, arrays))
        if len(waiting) > ahead:
            take()
    while waiting:
        take()
    empty = Scored(np.empty(0, np.float32), np.empty(0, bool))
    results = [[empty] * len(continuations) for _, continuations in groups]
    for i, places in enumerate(owners):
        for group, number in places:
            results[group][number] = found[i]
    return results


def _rows_of(
    decoder: Decoder, groups: Sequence[Group]
) -> tuple[list[list[int]], list[int], list[list[tuple[int, int]]]]:
    """Return different rows of tokens, the start of what is to be scored in each, and for each the
    (group, number of the continuation) that it is."""
    limit = decoder.context
    known: dict[tuple, int] = {}
    rows: list[list[int]] = []
    starts: list[int] = []
    owners: list[list[tuple[int, int]]] = []
    for group, (context, continuations) in enumerate(groups):
        if not len(context):
            raise ValueError(
                f"the context of group {group} is empty, so nothing predicts its continuations; "
                "begin it with the token <bos>"
            )
        for number, continuation in enumerate(continuations):
            if not len(continuation):
                continue
            row = [*map(int, context), *map(int, continuation)]
            if len(row) > limit + 1:
                raise ValueError(
                    f"the context of group {group} has {len(context)} tokens and its continuation "
                    f"{number} has {len(continuation)}, and the model reads {limit} and predicts "
                    "one more; cut the context from the left"
                )
            key = (len(context), *row)
            if key not in known:
                known[key] = len(rows)
                rows.append(row)
                starts.append(len(context))
                owners.append([])
            owners[known[key]].append((group, number))
    vocabulary = decoder.config.vocabulary
    for extreme in (choice(row) for choice in (min, max) for row in rows):
        if not 0 <= extreme < vocabulary:
            raise ValueError(
                f"token {extreme} is outside the model's vocabulary, 0 to {vocabulary - 1}"
            )
    return rows, starts, owners


def _read(block: Block, logprobs_WM: np.ndarray, best_WM: np.ndarray) -> dict[int, Scored]:
    """Return what the model says of each sequence of a block."""
    logprobs = logprobs_WM.reshape(-1)
    best = best_WM.reshape(-1)
    found = {}
    for tree, first in block.trees:
        begin = first * block.labels_WM.shape[1]
        for i, places in zip(tree.sequences, tree.places, strict=True):
            found[i] = Scored(logprobs[begin + places], best[begin + places])
    return found


@functools.partial(jax.jit, static_argnames=("config", "branches"))
def _score(params, tokens_BS, positions_BS, ends_BS, at_W, labels_WM, chunks, *, config, branches):
    """Return (log-probability, whether it is the most likely token) of every label, (W, M) each.

    Logits are computed for the first ``chunks`` x CHUNK places alone, so that one program serves
    any number of them.
    """

    def attend(layer, q, k, v, **options):
        positions_BS, ends_BS = layer.rows
        if branches:
            return _attend_tree(q, k, v, positions_BS, ends_BS, options)
        # Without branches all nodes of a tree end together.
        return attention(q, k, v, segment_ids=ends_BS, impl=config.attention_impl, **options)

    x_BSD, head = run_layers(
        config, params, tokens_BS, positions_BS, attend, rows=(positions_BS, ends_BS)
    )
    x_ID = x_BSD.reshape(-1, x_BSD.shape[-1])
    places = len(at_W)
    at_W = jnp.pad(at_W, (0, -places % CHUNK))
    labels_WM = jnp.pad(labels_WM, ((0, -places % CHUNK), (0, 0)))

    def chunk(number, carry):
        logprobs_WM, best_WM = carry
        start = number * CHUNK
        at_C = lax.dynamic_slice_in_dim(at_W, start, CHUNK)
        labels_CM = lax.dynamic_slice_in_dim(labels_WM, start, CHUNK)
        logits_CV = head.logits(x_ID[at_C])
        picked_CM = jnp.take_along_axis(logits_CV, labels_CM, 1)
        total_C1 = jax.nn.logsumexp(logits_CV, -1, keepdims=True)
        best_C1 = jnp.argmax(logits_CV, -1, keepdims=True)
        logprobs_WM = lax.dynamic_update_slice_in_dim(logprobs_WM, picked_CM - total_C1, start, 0)
        best_WM = lax.dynamic_update_slice_in_dim(best_WM, best_C1 == labels_CM, start, 0)
        return logprobs_WM, best_WM

    begin = jnp.zeros(labels_WM.shape, jnp.float32), jnp.zeros(labels_WM.shape, bool)
    logprobs_WM, best_WM = lax.fori_loop(0, chunks, chunk, begin)
    return whole((logprobs_WM[:places], best_WM[:places]))


def _attend_tree(q, k, v, positions_BS, ends_BS, options: dict[str, Any]):
    """Return the attention of rows of trees: each query sees its ancestors and itself.

    Distances, of windows and of ALiBi, are those of positions. Queries are taken a part at a time,
    with the keys up to the last of them.
    """
    options = dict(options)
    window = options.pop("window", None)
    slopes_N = options.pop("alibi_slopes", None)
    length = q.shape[1]
    parts = []
    size = max(QUERIES, -(-length // PARTS))
    for start in range(0, length, size):
        stop = min(start + size, length)
        query_1Q1 = jnp.arange(start, stop)[None, :, None]
        key_11T = jnp.arange(stop)[None, None, :]
        seen_BQT = (key_11T <= query_1Q1) & (query_1Q1 < ends_BS[:, None, :stop])
        behind_BQT = positions_BS[:, start:stop, None] - positions_BS[:, None, :stop]
        if window is not None:
            seen_BQT &= behind_BQT < window
        bias = jnp.where(seen_BQT, 0.0, -jnp.inf)[:, None]
        if slopes_N is not None:
            bias = bias - slopes_N[None, :, None, None] * behind_BQT[:, None].astype(jnp.float32)
        parts.append(
            attention(
                q[:, start:stop], k[:, :stop], v[:, :stop], causal=False, bias=bias, **options
            )
        )
    if not options.get("return_lse"):
        return jnp.concatenate(parts, 1)
    return tuple(jnp.concatenate(each, 1 + at) for at, each in enumerate(zip(*parts, strict=True)))
