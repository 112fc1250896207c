"""Attention in XLA: exact, which holds all scores, and blockwise, FlashAttention's algorithms 1 and
2 (Dao 2023) as loops, with memory linear in the lengths.

Inside, heads come before positions. Every product is then a plain batched matmul, and the scores,
by far the largest array, are never transposed.
"""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads, H head
# width, G query heads of a key/value head (N / K)

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mtnlg_jax.compat import varying_axes
from mtnlg_jax.model.kernels.blocks import Blocks
from mtnlg_jax.model.kernels.mask import Mask, block_ranges, visible

NEG_INF = -jnp.inf


@jax.custom_vjp
def softmax(scores):
    """Weights and log-sum-exp over the last dim; a row of -inf gives zeros and -inf. The backward
    pass keeps only the weights, where differentiating through the maximum would keep four arrays of
    S x T."""
    top = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == NEG_INF, 0.0, top))
    total = jnp.sum(weights, -1, keepdims=True)
    lse = jnp.where(total == 0, NEG_INF, top + jnp.log(jnp.where(total == 0, 1.0, total)))
    return weights / jnp.where(total == 0, 1.0, total), lse[..., 0]


def _softmax_forward(scores):
    weights, lse = softmax(scores)
    return (weights, lse), weights


def _softmax_backward(weights, cotangents):
    d_weights, d_lse = cotangents
    shift = jnp.sum(weights * d_weights, -1) - d_lse
    return (weights * (d_weights - shift[..., None]),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def _scores(q, k, scale, softcap):
    """q (B, K, G, S, H), k (B, K, T, H) -> float32 (B, K, G, S, T)."""
    scores = jnp.einsum("BKGSH,BKTH->BKGST", q, k, preferred_element_type=jnp.float32) * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _group(x, kv_heads):
    """(B, S, N, H) -> (B, K, G, S, H)."""
    batch, length, heads, width = x.shape
    return x.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _ungroup(x):
    """(B, K, G, S, H) -> (B, S, N, H)."""
    batch, kv_heads, group, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, width)


def _positions(mask: Mask, q_start, q_size):
    """Positions of a block of queries on the key axis: (1, q_size, 1), or (B, q_size, 1) if offsets
    differ by row."""
    return jnp.reshape(mask.q_offset, (-1, 1, 1)) + q_start + jnp.arange(q_size)[None, :, None]


def _visible(mask: Mask, q_ids, kv_ids, q_start, q_size, k_start, k_size):
    """Booleans that broadcast to (B, K, G, q_size, k_size), or None if nothing is masked. The ids
    are those of the block."""
    length = None if mask.kv_lengths is None else mask.kv_lengths[:, None, None]
    if q_ids is not None:
        q_ids = q_ids[:, :, None]
        kv_ids = kv_ids[:, None, :]
    seen = visible(
        _positions(mask, q_start, q_size),
        k_start + jnp.arange(k_size)[None, None, :],
        causal=mask.causal,
        window=mask.window,
        length=length,
        q_ids=q_ids,
        kv_ids=kv_ids,
    )
    return None if seen is None else seen[:, None, None]


def _with_distances(scores, alibi_slopes, mask: Mask, q_start, q_size, k_start, k_size):
    """The scores (B, K, G, q_size, k_size) of a block plus slope x (key position - query position).
    ``alibi_slopes`` are (N,) or None."""
    if alibi_slopes is None:
        return scores
    slopes = alibi_slopes.reshape(1, *scores.shape[1:3], 1, 1)
    keys = k_start + jnp.arange(k_size)[None, None, :]
    distance = keys - _positions(mask, q_start, q_size)
    return scores + slopes * distance[:, None, None].astype(jnp.float32)


def exact(
    q,
    k,
    v,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    bias=None,
    alibi_slopes=None,
    dropout_rate: float = 0.0,
    dropout_key=None,
):
    """(out (B, S, N, H), lse (B, N, S)); ``bias`` broadcasts to (B, N, S, T), ``alibi_slopes`` are
    (N,)."""
    rows, queries, heads, _ = q.shape
    keys = k.shape[1]
    seen = _visible(mask, mask.q_ids, mask.kv_ids, 0, queries, 0, keys)
    scores = _scores(_group(q, k.shape[2]), k.transpose(0, 2, 1, 3), scale, softcap)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (rows, heads, queries, keys))
        scores = scores + bias.reshape(scores.shape)
    scores = _with_distances(scores, alibi_slopes, mask, 0, queries, 0, keys)
    if seen is not None:
        scores = jnp.where(seen, scores, NEG_INF)
    weights, lse = softmax(scores)
    if dropout_rate > 0:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0.0)
    out = jnp.einsum("BKGST,BKTH->BKGSH", weights.astype(v.dtype), v.transpose(0, 2, 1, 3))
    out = checkpoint_name(out, "attention")
    return _ungroup(out).astype(q.dtype), lse.reshape(rows, heads, queries)


def decode(
    q,
    k_cache,
    v_cache,
    lengths,
    *,
    scale: float,
    softcap: float | None,
    k_scale=None,
    v_scale=None,
    positions=None,
    window: int | None = None,
    alibi_slopes=None,
):
    """One query a row: q (B, N, H), caches (B, K, T, H), or int8 with scales (B, K, T) -> out (B,
    N, H), lse (B, N). ``positions`` of the queries are (B,) or (B, N), by default lengths - 1."""
    batch, heads, width = q.shape
    kv_heads = k_cache.shape[1]
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, width)
    if k_scale is not None:
        k_cache = k_cache.astype(q.dtype)
        v_cache = v_cache.astype(q.dtype)
    scores = (
        jnp.einsum("BKGH,BKTH->BKGT", grouped, k_cache, preferred_element_type=jnp.float32) * scale
    )
    if k_scale is not None:
        scores = scores * k_scale[:, :, None]
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    keys_1T = jnp.arange(k_cache.shape[2])[None, :]
    seen_BT = visible(0, keys_1T, causal=False, length=lengths[:, None])
    seen = seen_BT[:, None, None]
    if window is not None or alibi_slopes is not None:
        positions = lengths - 1 if positions is None else positions
        positions = positions[:, None] if positions.ndim == 1 else positions
        positions = jnp.broadcast_to(positions, (batch, heads)).reshape(*grouped.shape[:3], 1)
        distance = keys_1T[:, None, None] - positions
        if alibi_slopes is not None:
            slopes = alibi_slopes.reshape(1, *grouped.shape[1:3], 1)
            scores = scores + slopes * distance.astype(jnp.float32)
        if window is not None:
            seen = seen & (distance > -window)
    weights, lse = softmax(jnp.where(seen, scores, NEG_INF))
    if v_scale is not None:
        weights = weights * v_scale[:, :, None]
    out = jnp.einsum(
        "BKGT,BKTH->BKGH",
        weights.astype(v_cache.dtype),
        v_cache,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(q.shape).astype(q.dtype), lse.reshape(batch, heads)


# --- blockwise


def _key_blocks(mask: Mask, rows, queries, keys, blocks: Blocks):
    """(first, end) of the blocks of keys that each block of queries visits: one range for all rows,
    since one loop serves them."""
    first, end = block_ranges(mask, rows, queries, keys, blocks.q, blocks.kv)
    some = end > first
    return jnp.where(some.any(0), jnp.where(some, first, keys).min(0), 0), end.max(0)


def mean_key_blocks(length: int, blocks: Blocks) -> float:
    """Mean number of key blocks that a block of queries visits, over a causal sequence."""
    blocks = _fit(blocks, length, length)
    first, end = block_ranges(Mask(True), 1, length, length, blocks.q, blocks.kv)
    return float((end - first).mean())


def _fit(blocks: Blocks, queries: int, keys: int) -> Blocks:
    """``blocks``, no larger than the sequences."""
    return Blocks(min(blocks.q, queries), min(blocks.kv, keys))


def _pad(x, block: int, axis: int = 1, value: float = 0):
    """``x`` padded with ``value`` to whole blocks."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, widths, constant_values=value)


class Loop:
    """The state that both passes share: operands padded to whole blocks with heads first, and the
    scores of any block."""

    def __init__(
        self,
        q,
        k,
        v,
        mask: Mask,
        scale: float,
        softcap: float | None,
        alibi_slopes: jax.Array | None,
        blocks: Blocks,
    ) -> None:
        queries = q.shape[1]
        keys = k.shape[1]
        self.blocks = blocks = _fit(blocks, queries, keys)
        self.ranges = _key_blocks(mask, q.shape[0], queries, keys, blocks)
        if keys % blocks.kv:  # the padding of the keys must stay invisible
            whole = jnp.full(q.shape[:1], keys)
            lengths = whole if mask.kv_lengths is None else jnp.minimum(mask.kv_lengths, keys)
            mask = mask._replace(kv_lengths=lengths)
        if mask.q_ids is not None:
            q_ids = _pad(mask.q_ids, blocks.q)
            mask = mask._replace(q_ids=q_ids, kv_ids=_pad(mask.kv_ids, blocks.kv))
        self.mask = mask
        self.scale = scale
        self.softcap = softcap
        self.alibi_slopes = alibi_slopes
        self.q = _group(_pad(q, blocks.q), k.shape[2])
        self.k, self.v = (_pad(x, blocks.kv).transpose(0, 2, 1, 3) for x in (k, v))
        self.starts = jnp.arange(0, self.q.shape[3], blocks.q)

    def of_queries(self, x, start, axis=3):
        return lax.dynamic_slice_in_dim(x, start, self.blocks.q, axis)

    def of_keys(self, x, start, axis=2):
        return lax.dynamic_slice_in_dim(x, start, self.blocks.kv, axis)

    def scores(self, q_block, k_block, q_start, k_start):
        """The masked scores of one block, and the softcap's derivative or None."""
        sizes = (q_start, self.blocks.q, k_start, self.blocks.kv)
        scores = _scores(q_block, k_block, self.scale, self.softcap)
        slope = None if self.softcap is None else 1 - (scores / self.softcap) ** 2
        scores = _with_distances(scores, self.alibi_slopes, self.mask, *sizes)
        q_ids = kv_ids = None
        if self.mask.q_ids is not None:
            q_ids = self.of_queries(self.mask.q_ids, q_start, 1)
            kv_ids = self.of_keys(self.mask.kv_ids, k_start, 1)
        seen = _visible(self.mask, q_ids, kv_ids, *sizes)
        return (scores if seen is None else jnp.where(seen, scores, NEG_INF)), slope


def _varying_like(inputs, *arrays):
    """Mark ``arrays`` as varying over the mesh axes that any of ``inputs`` varies over: a loop's
    carry must start with the type that it ends with."""
    axes = tuple(varying_axes(inputs))
    return tuple(lax.pcast(x, axes, to="varying") if axes else x for x in arrays)


def forward(
    q,
    k,
    v,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    alibi_slopes: jax.Array | None = None,
    blocks: Blocks,
):
    """(out (B, S, N, H), lse float32 (B, N, S))."""
    loop = Loop(q, k, v, mask, scale, softcap, alibi_slopes, blocks)
    rows, queries, heads, width = q.shape

    def one_query_block(_, of_block):
        q_start, first, end = of_block
        q_block = loop.of_queries(loop.q, q_start)

        def one_key_block(i, carry):
            # Online softmax: weights are relative to the largest score so far, and a new largest
            # score shrinks what was summed before.
            acc, top, total = carry
            k_block, v_block = (loop.of_keys(x, i * loop.blocks.kv) for x in (loop.k, loop.v))
            scores, _ = loop.scores(q_block, k_block, q_start, i * loop.blocks.kv)
            new_top = jnp.maximum(top, scores.max(-1))
            safe = jnp.where(new_top == NEG_INF, 0.0, new_top)
            weights = jnp.exp(scores - safe[..., None])
            shrink = jnp.exp(top - safe)
            acc = acc * shrink[..., None] + jnp.einsum(
                "BKGST,BKTH->BKGSH",
                weights.astype(v.dtype),
                v_block,
                preferred_element_type=jnp.float32,
            )
            return acc, new_top, total * shrink + weights.sum(-1)

        shape = q_block.shape[:-1]
        start = _varying_like(
            (q, k, v, mask, alibi_slopes),
            jnp.zeros((*shape, width)),
            jnp.full(shape, NEG_INF),
            jnp.zeros(shape),
        )
        acc, top, total = lax.fori_loop(first, end, one_key_block, start)
        safe = jnp.where(total == 0, 1.0, total)
        return None, (acc / safe[..., None], jnp.where(total == 0, NEG_INF, top + jnp.log(safe)))

    _, (out, lse) = lax.scan(one_query_block, None, (loop.starts, *loop.ranges))
    # (blocks, B, K, G, queries of a block, H) -> (B, K, G, S, H)
    out = jnp.moveaxis(out, 0, 3).reshape(loop.q.shape).astype(q.dtype)
    lse = jnp.moveaxis(lse, 0, 3).reshape(rows, heads, -1)
    return _ungroup(out)[:, :queries], lse[:, :, :queries]


def backward(
    q,
    k,
    v,
    mask: Mask,
    out,
    lse,
    d_out,
    d_lse,
    *,
    scale: float,
    softcap: float | None,
    alibi_slopes: jax.Array | None = None,
    blocks: Blocks,
):
    """Gradients (dq, dk, dv) for the cotangents ``d_out`` and ``d_lse`` of out and lse."""
    loop = Loop(q, k, v, mask, scale, softcap, alibi_slopes, blocks)
    queries = q.shape[1]
    keys, kv_heads = k.shape[1:3]
    # d score = weight * (d weight - delta); the log-sum-exp's own cotangent enters with the
    # opposite sign.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1).swapaxes(1, 2) - d_lse
    # A log-sum-exp of inf makes all weights 0, for queries that see nothing (with -inf they would
    # be NaN) and for padding, whose distance to later keys may be large.
    lse = jnp.where(lse == NEG_INF, jnp.inf, lse)
    shape = loop.q.shape[:-1]
    delta = _pad(delta, loop.blocks.q, 2).reshape(shape)
    lse = _pad(lse, loop.blocks.q, 2, jnp.inf).reshape(shape)
    d_out = _group(_pad(d_out, loop.blocks.q), kv_heads)
    inputs = (q, k, v, mask, alibi_slopes, d_out)

    def one_query_block(carry, of_block):
        q_start, first, end = of_block
        q_block, d_block, lse_block, delta_block = (
            loop.of_queries(x, q_start) for x in (loop.q, d_out, lse, delta)
        )

        def one_key_block(i, carry):
            dq, dk, dv = carry
            k_start = i * loop.blocks.kv
            k_block, v_block = (loop.of_keys(x, k_start) for x in (loop.k, loop.v))
            scores, slope = loop.scores(q_block, k_block, q_start, k_start)
            weights = jnp.exp(scores - lse_block[..., None])
            dv_part = jnp.einsum(
                "BKGST,BKGSH->BKTH",
                weights.astype(v.dtype),
                d_block,
                preferred_element_type=jnp.float32,
            )
            d_weights = jnp.einsum(
                "BKGSH,BKTH->BKGST", d_block, v_block, preferred_element_type=jnp.float32
            )
            d_scores = weights * (d_weights - delta_block[..., None]) * scale
            if slope is not None:
                d_scores = d_scores * slope
            d_scores = d_scores.astype(q.dtype)
            dq = dq + jnp.einsum(
                "BKGST,BKTH->BKGSH", d_scores, k_block, preferred_element_type=jnp.float32
            )
            dk_part = jnp.einsum(
                "BKGST,BKGSH->BKTH", d_scores, q_block, preferred_element_type=jnp.float32
            )

            def add(total, part):
                return lax.dynamic_update_slice_in_dim(
                    total, loop.of_keys(total, k_start) + part, k_start, 2
                )

            return dq, add(dk, dk_part), add(dv, dv_part)

        (dq,) = _varying_like(inputs, jnp.zeros(q_block.shape))
        dq, dk, dv = lax.fori_loop(first, end, one_key_block, (dq, *carry))
        return (dk, dv), dq

    start = _varying_like(inputs, jnp.zeros(loop.k.shape), jnp.zeros(loop.k.shape))
    (dk, dv), dq = lax.scan(one_query_block, start, (loop.starts, *loop.ranges))
    dq = _ungroup(jnp.moveaxis(dq, 0, 3).reshape(loop.q.shape))[:, :queries]
    dk, dv = (x.transpose(0, 2, 1, 3)[:, :keys] for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
