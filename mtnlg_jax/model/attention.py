"""attention(): one public function, fixed semantics, several implementations.

Shapes: q (B, T, N, H); k and v (B, S, K, H); N is a multiple of K. Softmax and sums are float32
always. A query that sees no key gives 0 and a log-sum-exp of -inf. Causality is aligned by
``q_offset`` and never guessed: query i stands at position ``q_offset + i`` of the key axis and sees
keys j <= that position.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mtnlg_jax.model.kernels import blocks as sizes
from mtnlg_jax.model.kernels import xla
from mtnlg_jax.model.kernels.checks import check, check_decode
from mtnlg_jax.model.kernels.dispatch import (
    arrays_of,
    backward,
    decode,
    fused,
    plan_for,
    split_cache,
    split_heads,
)
from mtnlg_jax.model.kernels.gpu import cudnn
from mtnlg_jax.model.kernels.mask import Mask
from mtnlg_jax.model.kernels.select import (
    SUPPORT,
    Call,
    call_of,
    choose,
    device,
    explain,
    options_of,
)

__all__ = [
    "SUPPORT",
    "attention",
    "attention_gradients",
    "decode_attention",
    "explain_attention",
    "mean_key_blocks",
    "merge",
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
    window=None,
    softcap=None,
    bias=None,
    scale=None,
    dropout_rate: float = 0.0,
    dropout_key=None,
    impl: str = "auto",
    block_sizes: tuple[int, int] | None = None,
    return_lse: bool = False,
):
    """Scaled dot-product attention.

    Args:
      q: (B, T, N, H). k, v: (B, S, K, H), N % K == 0 (grouped heads when K < N). float32, bfloat16
          or float16.
      causal: query i sees key j only if j <= q_offset + i. False: both ways.
      segment_ids: int32 (B, T), or a pair ((B, T), (B, S)); only equal ids see each other.
      kv_lengths: int32 (B,), 0 to S; keys at or past the length are invisible.
      q_offset: int or (B,), at least 0: position of q[:, 0] on the key axis.
      window: int; key j is visible only if j > q_offset + i - window (and, not causal, j < q_offset
          + i + window).
      softcap: scores become softcap * tanh(scores / softcap).
      bias: added to the scaled scores, broadcastable to (B, N, T, S).
      scale: default 1 / sqrt(H).
      dropout_rate, dropout_key: dropout on the attention weights.
      impl: "auto" or a key of SUPPORT; one that cannot do what is asked raises.
      block_sizes: (queries, keys) of a block, for all passes, instead of the table's.
      return_lse: also return the float32 log-sum-exp of the scores, (B, N, T).
    Returns: (B, T, N, H) in q's dtype, or that and the log-sum-exp.
    Raises ValueError, which names the argument and what would work. Values of lengths and offsets
    are looked at only where they are known while tracing; elsewhere lengths above S count as S, and
    queries before the keys see none.

    Under an automatic mesh with axes ``data`` and ``tensor``, rows split over the one and heads
    over the other.
    """
    q_ids, kv_ids = check(
        q,
        k,
        v,
        segment_ids,
        kv_lengths,
        q_offset,
        window,
        softcap,
        scale,
        dropout_rate,
        dropout_key,
        block_sizes,
    )
    options = options_of(
        segment_ids, kv_lengths, q_offset, window, softcap, bias, dropout_rate, return_lse
    )
    chosen = choose(call_of(q, k, causal, options), impl)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    mask = _mask(causal, window, q_offset, q_ids, kv_ids, kv_lengths)
    if chosen == "xla":
        out, lse = xla.exact(
            q,
            k,
            v,
            mask,
            scale=scale,
            softcap=softcap,
            bias=bias,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )
    elif chosen == "cudnn":
        out = cudnn.attend(q, k, v, mask, scale=scale)
        lse = None
    else:
        run = functools.partial(
            fused,
            plan_for(chosen, q, k, mask, scale=scale, softcap=softcap, block_sizes=block_sizes),
        )
        given = (q, k, v, arrays_of(mask))
        out, lse = run(*given) if chosen == "xla_blockwise" else split_heads(run, *given)
    return (out, lse) if return_lse else out


def explain_attention(
    q,
    k,
    v,
    *,
    causal: bool = True,
    segment_ids=None,
    kv_lengths=None,
    q_offset=0,
    window=None,
    softcap=None,
    bias=None,
    scale=None,
    dropout_rate: float = 0.0,
    dropout_key=None,
    impl: str = "auto",
    block_sizes=None,
    return_lse: bool = False,
) -> list[tuple[str, str]]:
    """[(implementation, "chosen: why" or the reason it was not)] for a call of attention() with
    these arguments, on the devices that this process makes programs for. q, k, v may be
    ShapeDtypeStructs."""
    check(
        q,
        k,
        v,
        segment_ids,
        kv_lengths,
        q_offset,
        window,
        softcap,
        scale,
        dropout_rate,
        dropout_key,
        block_sizes,
    )
    options = options_of(
        segment_ids, kv_lengths, q_offset, window, softcap, bias, dropout_rate, return_lse
    )
    return explain(call_of(q, k, causal, options), impl)


def decode_attention(
    q,
    k_cache,
    v_cache,
    lengths,
    *,
    scale=None,
    softcap=None,
    k_scale=None,
    v_scale=None,
    impl: str = "auto",
    num_splits: int | None = None,
    return_lse: bool = False,
):
    """One query a row against a cache.

    Args:
      q: (B, N, H). k_cache, v_cache: (B, K, S, H), N % K == 0; float, or int8 with ``k_scale`` and
          ``v_scale``.
      lengths: int32 (B,), 0 to S; keys at or past the length are invisible.
      k_scale, v_scale: float32 (B, K, S); a key is its int8 numbers times its scale.
      impl: "auto", "pallas_tpu", "pallas_gpu" or "xla".
      num_splits: parts of the cache that the kernels work on at the same time; None: from the
          shape.
      return_lse: also return the float32 log-sum-exp of the scores, (B, N).
    Returns: (B, N, H) in q's dtype, or that and the log-sum-exp. A row of length 0 gives 0 and
    -inf. Raises ValueError, which names the argument and what would work."""
    check_decode(q, k_cache, v_cache, lengths, k_scale, v_scale, num_splits, scale, softcap)
    width = q.shape[2]
    keys = k_cache.shape[2]
    options = frozenset(
        {"kv_lengths", "return_lse"} | ({"softcap"} if softcap is not None else set())
    )
    chosen = choose(Call(1, keys, width, str(q.dtype), False, options), impl, decode=True)
    run = functools.partial(
        decode,
        chosen,
        scale=1 / math.sqrt(width) if scale is None else float(scale),
        softcap=softcap,
        num_splits=num_splits,
    )
    given = (q, k_cache, v_cache, jnp.asarray(lengths, jnp.int32), (k_scale, v_scale))
    out, lse = run(*given) if chosen == "xla" else split_cache(run, *given)
    return (out, lse) if return_lse else out


def merge(out, lse, other, other_lse):
    """Attention over two parts of the keys as over both (Milakov 2018): outputs (..., H) weighted
    by their shares of the softmax's sum, which log-sum-exps (...) tell."""
    share = jax.nn.sigmoid(lse - other_lse)[..., None]
    return share * out + (1 - share) * other


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
    scale=None,
    impl: str = "auto",
    block_sizes=None,
):
    """Gradients (dq, dk, dv) of what these keys contribute to an attention over more of them.

    Args:
      q, k, v, causal, segment_ids, scale, impl, block_sizes: as for attention().
      out, lse: the output (B, T, N, H) and log-sum-exp (B, N, T) over all keys. d_out: the output's
          cotangent.
    The ring's backward pass is a sum of these (Dao 2023, algorithm 2: a block needs no more than
    that)."""
    q_ids, kv_ids = check(q, k, v, segment_ids, None, 0, None, None, scale, 0.0, None, block_sizes)
    options = options_of(segment_ids, None, 0, None, None, None, 0.0, return_lse=True)
    chosen = choose(call_of(q, k, causal, options), impl)
    mask = _mask(causal, None, 0, q_ids, kv_ids, None)
    plan = plan_for(
        "xla_blockwise" if chosen == "xla" else chosen,
        q,
        k,
        mask,
        scale=scale,
        block_sizes=block_sizes,
    )
    return backward(plan, q, k, v, mask, out, lse, d_out, jnp.zeros_like(lse))


def _mask(causal, window, q_offset, q_ids, kv_ids, kv_lengths) -> Mask:
    arrays = (None if x is None else jnp.asarray(x, jnp.int32) for x in (q_ids, kv_ids, kv_lengths))
    return Mask(
        bool(causal),
        window,
        q_offset if isinstance(q_offset, int) else jnp.asarray(q_offset, jnp.int32),
        *arrays,
    )


def mean_key_blocks(length: int, head_width: int, dtype: str) -> float:
    """Blocks of keys that a block of queries visits on the blockwise path, the mean over a causal
    sequence."""
    return xla.mean_key_blocks(
        length, sizes.blocks_for("both", "xla_blockwise", device(), dtype, head_width, length, True)
    )
