"""attention() and its variants: fixed semantics, several implementations.

Softmax and sums are always float32. A query that sees no key gives 0, and a log-sum-exp of -inf.
Causality is aligned by ``q_offset`` and never guessed: query i is at position ``q_offset + i`` of
the key axis and sees keys up to that position.
"""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads (N is a
# multiple of K), H head width

import functools
from typing import cast

import jax
import jax.numpy as jnp

from mtnlg_jax.model.kernels import blocks as sizes
from mtnlg_jax.model.kernels import xla
from mtnlg_jax.model.kernels.call import AttentionCall, DecodeCall
from mtnlg_jax.model.kernels.checks import check_attention, check_decode
from mtnlg_jax.model.kernels.dispatch import (
    backward,
    decode,
    fused,
    mask_arrays,
    plan_for,
)
from mtnlg_jax.model.kernels.gpu import cudnn
from mtnlg_jax.model.kernels.over_mesh import by_keys, ring, split_cache, split_heads
from mtnlg_jax.model.kernels.select import SUPPORT, choose, device, explain
from mtnlg_jax.parallel.auto import axes_of

__all__ = [
    "SUPPORT",
    "attention",
    "attention_gradients",
    "attention_to_cache",
    "decode_attention",
    "explain_attention",
    "mean_key_blocks",
    "merge",
    "merge_lse",
]


def attention(
    q,
    k,
    v,
    *,
    causal: bool = True,
    segment_ids=None,
    kv_lengths=None,
    q_offset=0,
    window: int | None = None,
    softcap: float | None = None,
    bias=None,
    alibi_slopes=None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key=None,
    impl: str = "auto",
    block_sizes: tuple[int, int] | None = None,
    return_lse: bool = False,
):
    """Scaled dot-product attention.

    Args:
      q: (B, S, N, H). k, v: (B, T, K, H), N % K == 0 (grouped heads if K < N). float32, bfloat16 or
          float16.
      causal: query i sees key j only if j <= q_offset + i. False: queries see both ways.
      segment_ids: int32 (B, S), or a pair ((B, S), (B, T)). A query sees only keys with its own id.
      kv_lengths: int32 (B,), 0 to T. Keys at or past the length are invisible.
      q_offset: int or (B,), at least 0: position of q[:, 0] on the key axis.
      window: int. Key j is visible only if j > q_offset + i - window and, unless causal,
          j < q_offset + i + window.
      softcap: scores become softcap * tanh(scores / softcap).
      bias: added to the scaled scores, broadcastable to (B, N, S, T).
      alibi_slopes: float32 (N,). slope x (j - position of the query) is added to the scores (Press
          2021). They get no gradient.
      scale: default 1 / sqrt(H).
      dropout_rate, dropout_key: dropout on the attention weights.
      impl: "auto" or a key of SUPPORT.
      block_sizes: (queries, keys) of a block, for all passes, instead of the table's.
      return_lse: also return the float32 log-sum-exp of the scores, (B, N, S).

    Returns: (B, S, N, H) in q's dtype, or that and the log-sum-exp.

    Raises ValueError if the arguments do not fit together or ``impl`` cannot serve them. The error
    names the argument and what would work. Lengths and offsets are checked only if their values are
    known while tracing. Otherwise a length above T counts as T, and queries before the first key
    see none.

    Under an automatic mesh rows are split over ``data`` and ``expert``, heads over ``tensor``, and
    the positions of a text that attends to itself over ``context``.
    """
    call = AttentionCall(
        q,
        k,
        v,
        causal=causal,
        segment_ids=segment_ids,
        kv_lengths=kv_lengths,
        q_offset=q_offset,
        window=window,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        scale=scale,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        impl=impl,
        block_sizes=block_sizes,
        return_lse=return_lse,
    )
    check_attention(call)
    out, lse = _ring(call) if _is_split(call) else _run(call, choose(call))
    return (out, lse) if return_lse else out


def attention_to_cache(q, k, v, *, q_offset=0, kv_lengths, **options):
    """attention() with ``return_lse`` of queries that all follow the keys below ``kv_lengths``, or
    that see them all: ``k`` and ``v`` may be a cache that ``context`` splits.
    """
    if not axes_of("T", k.shape[1]):
        options |= {"q_offset": q_offset, "kv_lengths": kv_lengths, "return_lse": True}
        return attention(q, k, v, **options)
    q_offset = jnp.broadcast_to(jnp.asarray(q_offset), kv_lengths.shape)
    return by_keys(attention, q, k, v, q_offset, kv_lengths, options)


def _is_split(call: AttentionCall) -> bool:
    """Whether ``context`` splits the positions of a text that attends to itself."""
    starts = isinstance(call.q_offset, int) and call.q_offset == 0
    itself = starts and call.queries == call.keys and not isinstance(call.segment_ids, tuple)
    plain = call.bias is None and call.dropout_rate == 0
    return itself and plain and bool(axes_of("Q", call.queries))


def _ring(call: AttentionCall):
    support = SUPPORT.get(call.impl)
    attend = functools.partial(
        attention,
        window=call.window,
        softcap=call.softcap,
        alibi_slopes=call.slopes,
        scale=call.scale,
        # Parts need lengths and a log-sum-exp, which cuDNN does not have.
        impl=call.impl if support is None or "kv_lengths" in support.options else "auto",
        block_sizes=cast(tuple[int, int] | None, call.block_sizes),
    )

    def add(out, lse, other, other_lse):
        return merge(out, lse, other, other_lse), merge_lse(lse, other_lse)

    arrays = (call.q, call.k, call.v, call.segment_ids, call.kv_lengths)
    return ring(attend, add, *arrays, bool(call.causal))


def _run(call: AttentionCall, chosen: str):
    """(out, lse) of a checked call on the implementation ``chosen``; cuDNN gives no lse."""
    qkv = (call.q, call.k, call.v)
    mask = call.mask()
    if chosen == "xla":
        return xla.exact(
            *qkv,
            mask,
            scale=call.score_scale,
            softcap=call.softcap,
            bias=call.bias,
            alibi_slopes=call.slopes,
            dropout_rate=call.dropout_rate,
            dropout_key=call.dropout_key,
        )
    if chosen == "cudnn":
        return cudnn.attend(*qkv, mask, scale=call.score_scale), None
    run = functools.partial(fused, plan_for(chosen, call))
    if chosen == "xla_blockwise":  # XLA partitions its own loops over a mesh
        return run(*qkv, mask_arrays(mask), call.slopes)
    return split_heads(run, *qkv, mask_arrays(mask), call.slopes)


def explain_attention(
    q,
    k,
    v,
    *,
    causal: bool = True,
    segment_ids=None,
    kv_lengths=None,
    q_offset=0,
    window: int | None = None,
    softcap: float | None = None,
    bias=None,
    alibi_slopes=None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key=None,
    impl: str = "auto",
    block_sizes: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> list[tuple[str, str]]:
    """Explain which implementation attention() would choose for these arguments on the devices that
    this process compiles for.

    q, k and v may be ShapeDtypeStructs. Returns [(implementation, "chosen: why" or the reason why
    it was not chosen)] and raises ValueError as attention() does for arguments that do not fit
    together."""
    call = AttentionCall(
        q,
        k,
        v,
        causal=causal,
        segment_ids=segment_ids,
        kv_lengths=kv_lengths,
        q_offset=q_offset,
        window=window,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        scale=scale,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        impl=impl,
        block_sizes=block_sizes,
        return_lse=return_lse,
    )
    check_attention(call)
    return explain(call)


def decode_attention(
    q,
    k_cache,
    v_cache,
    lengths,
    *,
    positions=None,
    window: int | None = None,
    alibi_slopes=None,
    scale: float | None = None,
    softcap: float | None = None,
    k_scale=None,
    v_scale=None,
    impl: str = "auto",
    num_splits: int | None = None,
    return_lse: bool = False,
):
    """Attention of one query a row to a cache.

    Args:
      q: (B, N, H). k_cache, v_cache: (B, K, T, H), N % K == 0; float, or int8 with ``k_scale`` and
          ``v_scale``.
      lengths: int32 (B,), 0 to T. Keys at or past the length are invisible.
      positions: int32 (B,) or (B, N), position of the query on the key axis; default lengths - 1.
          Used by window and alibi_slopes, for which the kernels take (B,) only.
      window: int. Key j is visible only if j > position - window.
      alibi_slopes: float32 (N,), as for attention().
      k_scale, v_scale: float32 (B, K, T). A key is its int8 numbers times its scale.
      impl: "auto", "pallas_tpu", "pallas_gpu" or "xla".
      num_splits: number of parts of the cache that the kernels process in parallel. None: derived
          from the shape.
      return_lse: also return the float32 log-sum-exp of the scores, (B, N).

    Returns: (B, N, H) in q's dtype, or that and the log-sum-exp. A row of length 0 gives 0 and
    -inf.

    Raises ValueError if the arguments do not fit together or ``impl`` cannot serve them."""
    call = DecodeCall(
        q,
        k_cache,
        v_cache,
        lengths,
        positions=positions,
        window=window,
        alibi_slopes=alibi_slopes,
        scale=scale,
        softcap=softcap,
        k_scale=k_scale,
        v_scale=v_scale,
        impl=impl,
        num_splits=num_splits,
    )
    check_decode(call)
    chosen = choose(call)
    run = functools.partial(
        decode,
        chosen,
        scale=call.score_scale,
        softcap=softcap,
        window=window,
        num_splits=num_splits,
    )
    lengths = jnp.asarray(lengths, jnp.int32)
    arrays = (q, k_cache, v_cache, lengths, (k_scale, v_scale), call.query_positions, call.slopes)
    out, lse = split_cache(run, *arrays, opaque=chosen != "xla")
    return (out, lse) if return_lse else out


def merge(out, lse, other, other_lse):
    """Merge attention over two parts of the keys into attention over both (Milakov 2018): outputs
    (..., H) are weighted by their parts' shares of the softmax's sum, which the log-sum-exps (...)
    give."""
    neither = jnp.isneginf(lse) & jnp.isneginf(other_lse)
    share = jax.nn.sigmoid(jnp.where(neither, 0.0, lse - other_lse))[..., None]
    return share * out + (1 - share) * other


def merge_lse(lse, other_lse):
    """Return the log-sum-exp over both parts of the keys; -inf where neither has a visible key."""
    both = jnp.logaddexp(lse, other_lse)
    return jnp.where(jnp.isneginf(lse) & jnp.isneginf(other_lse), -jnp.inf, both)


def attention_gradients(
    q,
    k,
    v,
    out,
    lse,
    d_out,
    *,
    causal: bool,
    segment_ids=None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: str = "auto",
    block_sizes: tuple[int, int] | None = None,
):
    """Gradients (dq, dk, dv) of what these keys contribute to an attention over more keys.

    Args:
      q, k, v, causal, segment_ids, scale, softcap, impl, block_sizes: as for attention().
      out, lse: the output (B, S, N, H) and log-sum-exp (B, N, S) over all keys.
      d_out: the output's cotangent.

    The backward pass of ring attention is a sum of these: a block's gradients depend on the other
    keys only through ``out`` and ``lse`` (Dao 2023, algorithm 2)."""
    call = AttentionCall(
        q,
        k,
        v,
        causal=causal,
        segment_ids=segment_ids,
        scale=scale,
        softcap=softcap,
        impl=impl,
        block_sizes=block_sizes,
        return_lse=True,
    )
    check_attention(call)
    chosen = choose(call)
    plan = plan_for("xla_blockwise" if chosen == "xla" else chosen, call)
    return backward(plan, q, k, v, call.mask(), out, lse, d_out, jnp.zeros_like(lse))


def mean_key_blocks(length: int, head_width: int, dtype: str) -> float:
    """Mean number of key blocks that a block of queries visits on the blockwise path, over a causal
    sequence of ``length``."""
    blocks = sizes.blocks_for("both", "xla_blockwise", device(), dtype, head_width, length, True)
    return xla.mean_key_blocks(length, blocks)
