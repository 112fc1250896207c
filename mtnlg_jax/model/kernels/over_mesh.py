"""Attention over a mesh that XLA partitions.

Kernels are opaque to XLA, so they are split here by rows and heads. Where ``context`` splits
positions, each device attends to the keys that it holds, and the parts are merged by their
log-sum-exps: neither a cache nor the keys of a text are gathered.
"""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads, H head width

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mtnlg_jax.parallel.auto import auto_axes, axes_of
from mtnlg_jax.parallel.collectives import axis_index, axis_size, to_next, vary

CONTEXT = "context"


def split_heads(run: Callable, q, k, v, arrays, alibi_slopes=None):
    """``run(q, k, v, arrays, alibi_slopes)`` -> (out, lse), with rows split over data and expert
    and heads, and their slopes, over tensor."""
    rows = axes_of("B", k.shape[0]) or None
    heads = axes_of("K", k.shape[2]) or None
    if rows is None and heads is None:
        return run(q, k, v, arrays, alibi_slopes)
    whole = P(rows, None, heads)
    by_row = P(rows)
    return jax.shard_map(
        run,
        in_specs=(
            whole,
            whole,
            whole,
            jax.tree.map(lambda _: by_row, arrays),
            None if alibi_slopes is None else P(heads),
        ),
        out_specs=(whole, P(rows, heads)),
        axis_names=auto_axes(),
    )(q, k, v, arrays, alibi_slopes)


def split_cache(
    run: Callable,
    q,
    k_cache,
    v_cache,
    lengths,
    scales,
    positions=None,
    alibi_slopes=None,
    *,
    opaque: bool = True,
):
    """``run`` of the other arguments -> (out, lse), split as in split_heads(), and with the keys of
    the cache over context. XLA splits the rows and heads of a ``run`` that is not ``opaque``."""
    rows = (axes_of("B", k_cache.shape[0]) or None) if opaque else None
    heads = (axes_of("K", k_cache.shape[1]) or None) if opaque else None
    keys = axes_of("T", k_cache.shape[2]) or None
    if rows is None and heads is None and keys is None:
        return run(q, k_cache, v_cache, lengths, scales, positions, alibi_slopes)

    def part(q, k, v, lengths, scales, positions, alibi_slopes):
        if keys is None:
            return run(q, k, v, lengths, scales, positions, alibi_slopes)
        own = k.shape[2]
        first = axis_index(CONTEXT) * own
        here = (lengths - 1 if positions is None else positions) - first
        own_lengths = jnp.clip(lengths - first, 0, own)
        return _merged(*run(q, k, v, own_lengths, scales, here, alibi_slopes))

    by_head = P(rows, heads)
    of_cache = P(rows, heads, keys)
    return jax.shard_map(
        part,
        in_specs=(
            by_head,
            of_cache,
            of_cache,
            P(rows),
            jax.tree.map(lambda _: of_cache, scales),
            None if positions is None else P(rows),
            None if alibi_slopes is None else P(heads),
        ),
        out_specs=(by_head, by_head),
        axis_names=auto_axes() if opaque else {CONTEXT},
    )(q, k_cache, v_cache, lengths, scales, positions, alibi_slopes)


def _merged(out, lse):
    """Attention over the keys of all devices along context: (out (..., H), lse (...)), given that
    over the keys of each (Milakov 2018)."""
    top = lax.pmax(lse, CONTEXT)
    top = jnp.where(jnp.isneginf(top), 0.0, top)
    share = jnp.exp(lse - top)
    weighted = out.astype(jnp.float32) * share[..., None]
    weighted, total = lax.psum((weighted, share), CONTEXT)
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return (weighted / jnp.where(total > 0, total, 1.0)[..., None]).astype(out.dtype), lse


def by_keys(attend: Callable, q, k, v, q_offset, kv_lengths, options: dict[str, Any]):
    """``attend(q, k, v, q_offset=, kv_lengths=, return_lse=True, **options)`` -> (out (B, S, N, H),
    lse (B, N, S)), with the keys split over context and the queries whole.

    ``q_offset`` and ``kv_lengths`` are (B,). No query may see a key at or past its row's length.
    """
    by_key = P(None, axes_of("T", k.shape[1]))

    def part(q, k, v, q_offset, kv_lengths):
        first = axis_index(CONTEXT) * k.shape[1]
        out, lse = attend(
            q,
            k,
            v,
            # Where the offset is below 0, the length is 0 and nothing is seen.
            q_offset=jnp.maximum(q_offset - first, 0),
            kv_lengths=jnp.clip(kv_lengths - first, 0, k.shape[1]),
            return_lse=True,
            **options,
        )
        out, lse = _merged(out, lse.swapaxes(1, 2))
        return out, lse.swapaxes(1, 2)

    return jax.shard_map(
        part,
        in_specs=(P(), by_key, by_key, P(), P()),
        out_specs=(P(), P()),
        axis_names={CONTEXT},
    )(q, k, v, q_offset, kv_lengths)


def ring(attend: Callable, merge: Callable, q, k, v, ids, kv_lengths, causal: bool):
    """Attention of a text to itself, with queries and keys split over context in order -> (out
    (B, S, N, H), lse (B, N, S)).

    Keys and values go around the devices (Liu 2023, Ring Attention). ``attend(q, k, v, causal=,
    q_offset=, segment_ids=, kv_lengths=, return_lse=True)`` attends to those of one device, and
    ``merge(out, lse, other, other_lse)`` adds a part to (out, lse), whose lse is (B, S, N).
    ``ids`` are (B, S) or None, ``kv_lengths`` (B,) or None.
    """
    axes = axes_of("Q", q.shape[1])
    by_position = P(None, axes)

    def whole(q, k, v, ids, kv_lengths):
        rows, size = q.shape[:2]
        parts = axis_size(CONTEXT)
        here = axis_index(CONTEXT)

        def part(hop, k, v, kv_ids):
            """Attend to the keys that began ``hop`` devices before this one."""
            source = (here - hop) % parts
            lengths = None
            if kv_lengths is not None:
                lengths = jnp.clip(kv_lengths - source * size, 0, size)
            offset = jnp.broadcast_to((here - source) * size, (rows,))
            if causal:
                # Keys behind all queries: a length of 0 lets kernels skip them.
                lengths = jnp.full((rows,), size) if lengths is None else lengths
                lengths = jnp.where(offset < 0, 0, lengths)
                offset = jnp.maximum(offset, 0)
            pair = None if ids is None else (ids, kv_ids)
            out, lse = attend(
                q,
                k,
                v,
                causal=causal,
                q_offset=offset,
                segment_ids=pair,
                kv_lengths=lengths,
                return_lse=True,
            )
            return out.astype(jnp.float32), lse.swapaxes(1, 2)

        def one(hop, carry):
            held, out, lse = carry
            held = jax.tree.map(lambda x: lax.ppermute(x, CONTEXT, to_next(parts)), held)
            return vary((held, *merge(out, lse, *part(hop, *held))))

        held = k, v, ids
        _, out, lse = lax.fori_loop(1, parts, one, vary((held, *part(0, *held))))
        return out.astype(q.dtype), lse.swapaxes(1, 2)

    return jax.shard_map(
        whole,
        in_specs=(
            by_position,
            by_position,
            by_position,
            None if ids is None else by_position,
            None if kv_lengths is None else P(),
        ),
        out_specs=(by_position, P(None, None, axes)),
        axis_names={CONTEXT},
    )(q, k, v, ids, kv_lengths)
