"""Log-probabilities of given tokens: after one shared prefix, in rows of their own, or masked.

Any number of sequences is scored in blocks of at most the decoder's ``block_tokens`` (at least one
row), so that memory is bounded. Rows of a block are a power of two and its width is 16, 24, 32, 48,
64 ..., so that few programs are compiled; where blocks end changes only the last bits of rounding.
"""

# Shapes: B prompts, C candidates (rows of a block), S positions, D width, V vocabulary

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.adapters import of_rows
from mtnlg_jax.decode.cache import Decoder, Prefix, capacity, options_of_heads
from mtnlg_jax.decode.forward import run_layers
from mtnlg_jax.decode.rolling import check_whole
from mtnlg_jax.model.attention import attention, attention_to_cache, merge, merge_lse
from mtnlg_jax.model.loss import token_log_probs
from mtnlg_jax.parallel.auto import fetch, over_its_mesh, padded, padded_positions

# Sequences whose starts are within this distance share a block: tokens before a start are read
# again, not scored.
NEAR = 16
# The smallest width of a block.
LEAST = 16
# Tokens whose logits are held at once.
CHUNK = 256


def blocks(
    lengths: Sequence[int], decoder: Decoder, limit: int | None = None
) -> Iterator[tuple[list[int], int, int]]:
    """Yield (indices of sequences, rows, width) of each block, the longest sequences first.

    Further rows are padding. Sequences of similar length share a block, so that little of it is
    padding. ``limit``: the maximum number of sequences; None: as many as the tokens allow.
    """
    order = np.argsort(lengths, kind="stable").tolist()
    while order:
        width = padded_positions(capacity(lengths[order[-1]], decoder.context, LEAST))
        most = max(1, min(decoder.block_tokens // width, limit or decoder.block_tokens))
        most = 1 << (most.bit_length() - 1)
        chosen = order[-most:]
        del order[-most:]
        yield chosen, 1 << (len(chosen) - 1).bit_length(), width


def narrow(length: int, context: int) -> int:
    """Return the width of a block of candidates of ``length`` tokens: 1, 2, 4, 8, 16, 24, 32 ..."""
    width = 1 << (length - 1).bit_length()
    return width if width < LEAST else capacity(length, context, LEAST)


def score(
    decoder: Decoder, prefix: Prefix, candidates: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """Return the log-probability of every token of every candidate after ``prefix`` (one row).

    Raises ValueError on a prefix that keeps only windows.
    """
    check_whole(prefix.cache, "scoring")
    scored = [np.empty(0, np.float32)] * len(candidates)
    for chosen, rows, width in blocks(list(map(len, candidates)), decoder):
        found = score_block(decoder, prefix, [candidates[i] for i in chosen], rows, width)
        for i, each in zip(chosen, found, strict=True):
            scored[i] = each
    return scored


@over_its_mesh
def score_block(
    decoder: Decoder, prefix: Prefix, candidates: Sequence[Sequence[int]], rows: int, width: int
) -> list[np.ndarray]:
    """Return the log-probability of every token of each candidate, all in one call of the model.

    Args:
      prefix: B prompts. The first len(candidates) / B candidates follow the first of them, and so
        on. With one prompt, ``rows`` may be more than there are candidates.
      width: at least the length of the longest candidate. A candidate may be empty.
    """
    labels_CS = np.zeros((padded(rows, decoder.mesh), width), np.int32)
    lengths_C = np.zeros(len(labels_CS), np.int32)
    for at, tokens in enumerate(candidates):
        labels_CS[at, : len(tokens)] = tokens
        lengths_C[at] = len(tokens)
    table_CS = fetch(_score(decoder.params, prefix, labels_CS, lengths_C, config=decoder.config))
    return [row[: len(tokens)] for row, tokens in zip(table_CS, candidates, strict=False)]


def score_from(
    decoder: Decoder, prefix: Prefix, rows: Sequence[Sequence[int]], starts: Sequence[int]
) -> list[np.ndarray]:
    """Return the log-probability of every token of each row from its start on.

    Does the same as ``score_rows``, but reads the prefix once: up to its start (1 to the prefix's
    length) each row must equal ``prefix`` (one row).
    """
    scored = [np.empty(0, np.float32)] * len(rows)
    left = sorted(range(len(rows)), key=starts.__getitem__)
    while left:
        first = starts[left[0]]
        group = [i for i in left if starts[i] <= first + NEAR]
        left = left[len(group) :]
        # The keys of a prefix are those of its beginnings as well.
        begun = prefix._replace(lengths_B=np.array([first], np.int32))
        for i, part in zip(
            group, score(decoder, begun, [rows[i][first:] for i in group]), strict=True
        ):
            scored[i] = part[starts[i] - first :]
    return scored


@functools.partial(jax.jit, static_argnames="config")
def _score(params, prefix: Prefix, labels_CS, lengths_C, *, config):
    """Score a block of candidates of ``lengths_C`` tokens, C / B of them behind each of B prompts.

    The block begins with the last token of each prompt, whose output predicts each candidate's
    first. Its queries see the cache before that token, and the block itself causally.
    """
    number, width = labels_CS.shape
    prompts = prefix.tokens_BS.shape[0]
    before_B = jnp.asarray(prefix.lengths_B) - 1
    before_C1 = jnp.repeat(before_B, number // prompts)[:, None]
    first_B1 = jnp.take_along_axis(prefix.tokens_BS, before_B[:, None], 1)
    first_C1 = jnp.repeat(first_B1, number // prompts, 0)
    tokens_CS = jnp.concatenate([first_C1, labels_CS[:, :-1]], 1)
    # Padding may reach past the last position; it is never scored.
    positions_CS = jnp.minimum(
        before_C1 + jnp.arange(width)[None], config.max_position_embeddings - 1
    )

    def attend(layer, q, k, v, return_lse=False, **options):
        shared_k, shared_v = (x.swapaxes(1, 2) for x in layer.shared)
        o_shared, lse_shared = _attend_shared(q, shared_k, shared_v, layer.rows, options)
        o_own, lse_own = attention(q, k, v, return_lse=True, **options)
        out = merge(o_shared, lse_shared, o_own, lse_own.swapaxes(1, 2)).astype(q.dtype)
        return (out, merge_lse(lse_shared.swapaxes(1, 2), lse_own)) if return_lse else out

    x_CSD, head = run_layers(
        config,
        params,
        tokens_CS,
        positions_CS,
        attend,
        shared=prefix.cache,
        rows=before_B,
        # The candidates of one prompt stay together; one prompt is for all of them.
        units=prompts if prompts > 1 else number,
    )
    return _log_probs(x_CSD, head, labels_CS, jnp.arange(width)[None] < lengths_C[:, None])


def _log_probs(x_CSD, head, labels_CS, wanted_CS):
    """Return the log-probabilities of ``labels_CS`` where wanted."""
    flat = (x_CSD.reshape(-1, x_CSD.shape[-1]), head, labels_CS.reshape(-1))
    found = token_log_probs(*flat, CHUNK, wanted_CS.reshape(-1))
    return found.reshape(labels_CS.shape)


def _attend_shared(q, k, v, before_B, options: dict):
    """Return (out (C, S, N, H), lse (C, S, N)) of all candidates over the first ``before_B`` keys
    of their prompts, C / B candidates a prompt. The keys are not copied for each candidate."""
    number, width, heads, head_width = q.shape
    prompts = k.shape[0]
    each = number // prompts
    if "window" not in options and "alibi_slopes" not in options:
        # One long row of queries a prompt: positions do not matter.
        flat = q.reshape(prompts, each * width, heads, head_width)
        out, lse = attention_to_cache(flat, k, v, causal=False, kv_lengths=before_B, **options)
        lse = lse.reshape(prompts, heads, each, width).transpose(0, 2, 3, 1)
        return out.reshape(q.shape), lse.reshape(number, width, heads)
    # A row a prompt, in which the candidates are more query heads, so that query i is at
    # before + i.
    kv_heads = k.shape[2]
    shape = (kv_heads, each, heads // kv_heads)
    grouped = q.reshape(prompts, each, width, kv_heads, -1, head_width).transpose(0, 2, 3, 1, 4, 5)
    out, lse = attention_to_cache(
        grouped.reshape(prompts, width, -1, head_width),
        k,
        v,
        q_offset=before_B,
        kv_lengths=before_B,
        **options_of_heads(options, shape, 1),
    )
    out = out.reshape(grouped.shape).transpose(0, 3, 1, 2, 4, 5).reshape(q.shape)
    lse = lse.reshape(prompts, *shape, width).transpose(0, 2, 4, 1, 3)
    return out, lse.reshape(number, width, heads)


@over_its_mesh
def score_rows(
    decoder: Decoder, rows: Sequence[Sequence[int]], starts: Sequence[int]
) -> list[np.ndarray]:
    """Return the log-probability of every token of each row from its start (1 or more) on.

    Does the same as ``score``, but each row has a context of its own.
    """
    scored = [np.empty(0, np.float32)] * len(rows)
    for chosen, number, width in blocks(list(map(len, rows)), decoder):
        tokens_CS = np.zeros((padded(number, decoder.mesh), width), np.int32)
        for row, i in zip(tokens_CS, chosen, strict=False):
            row[: len(rows[i])] = rows[i]
        # Padding begins and ends at 1: nothing of it is wanted.
        spans_2C = np.ones((2, len(tokens_CS)), np.int32)
        spans_2C[:, : len(chosen)] = [
            [starts[i] for i in chosen],
            [len(rows[i]) for i in chosen],
        ]
        params = of_rows(decoder, chosen, len(tokens_CS)).params
        table_CS = fetch(_score_rows(params, tokens_CS, spans_2C, config=decoder.config))
        for row, i in zip(table_CS, chosen, strict=False):
            scored[i] = row[starts[i] - 1 : len(rows[i]) - 1]
    return scored


def read_rows(config: ModelConfig, params, tokens_CS):
    """Return the last hidden states (C, S, D) of rows that begin at position 0, and the head."""

    def attend(_, q, k, v, **options):
        return attention(q, k, v, impl=config.attention_impl, **options)

    positions_CS = jnp.broadcast_to(jnp.arange(tokens_CS.shape[1]), tokens_CS.shape)
    return run_layers(config, params, tokens_CS, positions_CS, attend)


@functools.partial(jax.jit, static_argnames="config")
def _score_rows(params, tokens_CS, spans_2C, *, config):
    """Return a table whose entry j is the log-probability of token j + 1, for the tokens from the
    start of each row's span to its end."""

    x_CSD, head = read_rows(config, params, tokens_CS)
    number = 1 + jnp.arange(tokens_CS.shape[1])[None]
    wanted_CS = (spans_2C[0, :, None] <= number) & (number < spans_2C[1, :, None])
    return _log_probs(x_CSD, head, jnp.roll(tokens_CS, -1, 1), wanted_CS)


@over_its_mesh
def score_masked(
    decoder: Decoder,
    mask_id: int,
    rows: Sequence[Sequence[int]],
    hidden: Sequence[Sequence[tuple[int, int]]],
) -> list[np.ndarray]:
    """Return log-probabilities by the bidirectional model, which sees a row except its masks.

    Args:
      hidden: for each row, (position, end) of every token to score: the token at ``position``, with
        <mask> from there up to but not including ``end``. Each is a copy of its row, so a row of n
        tokens is read n times.
    """
    copies = [(i, position, end) for i, spans in enumerate(hidden) for position, end in spans]
    scored = np.empty(len(copies), np.float32)
    for chosen, number, width in blocks([len(rows[i]) for i, _, _ in copies], decoder):
        number = padded(number, decoder.mesh)
        tokens_CS = np.zeros((number, width), np.int32)
        lengths_C = np.ones(number, np.int32)
        positions_C = np.zeros(number, np.int32)
        labels_C = np.zeros(number, np.int32)
        for at, copy in enumerate(chosen):
            i, position, end = copies[copy]
            tokens_CS[at, : len(rows[i])] = rows[i]
            tokens_CS[at, position:end] = mask_id
            lengths_C[at] = len(rows[i])
            positions_C[at] = position
            labels_C[at] = rows[i][position]
        params = of_rows(decoder, [copies[copy][0] for copy in chosen], number).params
        arrays = (tokens_CS, lengths_C, positions_C, labels_C)
        table_C = fetch(_score_masked(params, *arrays, config=decoder.config))
        scored[chosen] = table_C[: len(chosen)]
    return np.split(scored, np.cumsum([len(spans) for spans in hidden])[:-1])


@functools.partial(jax.jit, static_argnames="config")
def _score_masked(params, tokens_CS, lengths_C, positions_C, labels_C, *, config):
    """Return the log-probability of each label at its position, (C,)."""

    def attend(layer, q, k, v, **options):
        return attention(
            q,
            k,
            v,
            causal=False,
            kv_lengths=layer.rows,
            impl=config.attention_impl,
            **options,
        )

    positions_CS = jnp.broadcast_to(jnp.arange(tokens_CS.shape[1]), tokens_CS.shape)
    lengths_C = jnp.asarray(lengths_C)
    x_CSD, head = run_layers(config, params, tokens_CS, positions_CS, attend, rows=lengths_C)
    return token_log_probs(x_CSD[jnp.arange(len(positions_C)), positions_C], head, labels_C)
