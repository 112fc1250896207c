"""attention(): one public function, fixed semantics, several implementations.

Shapes: q (B, T, N, H); k and v (B, S, K, H); N is a multiple of K. Softmax and sums are float32 always. A query
that sees no key gives 0 and a log-sum-exp of -inf. Causality is aligned by ``q_offset`` and never guessed:
query i stands at position ``q_offset + i`` of the key axis and sees keys j <= that position.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

NEG_INF = -jnp.inf

# What each implementation can do; drives the choice, the errors and explain_attention().
SUPPORT = {
    "xla": {"bias": True, "dropout": True, "note": "exact, holds T x S scores"},
    "xla_blockwise": {"bias": False, "dropout": False, "note": "online softmax, memory linear in T and S"},
}


def _tuning() -> tuple[int, tuple[int, int]]:
    """(T x S from which "auto" takes the blockwise path, its block sizes). On CPU a block of scores should stay
    in the cache, which pays from 256 x 256 on; elsewhere each turn of a loop should be worth its launch."""
    if jax.default_backend() == "cpu":
        return 1 << 16, (128, 128)
    return 1 << 20, (256, 512)


def attention(q, k, v, *, causal: bool = True, segment_ids=None, kv_lengths=None, q_offset=0, window=None,
              softcap=None, bias=None, scale=None, dropout_rate: float = 0.0, dropout_key=None,
              impl: str = "auto", block_sizes: tuple[int, int] | None = None, return_lse: bool = False):
    """Scaled dot-product attention.

    Args:
      q: (B, T, N, H). k, v: (B, S, K, H), N % K == 0 (grouped heads when K < N).
      causal: query i sees key j only if j <= q_offset + i. False: both ways.
      segment_ids: int32 (B, T), or a pair ((B, T), (B, S)); only equal ids see each other.
      kv_lengths: int32 (B,); keys at or past the length are invisible.
      q_offset: int or (B,), position of q[:, 0] on the key axis.
      window: int; key j is visible only if j > q_offset + i - window (and, not causal, j < q_offset + i + window).
      softcap: scores become softcap * tanh(scores / softcap).
      bias: added to the scaled scores, broadcastable to (B, N, T, S).
      scale: default 1 / sqrt(H).
      dropout_rate, dropout_key: dropout on the attention weights.
      impl: "auto" or a key of SUPPORT; one that cannot do what is asked raises.
      block_sizes: (queries, keys) of the blockwise path.
      return_lse: also return the float32 log-sum-exp of the scores, (B, N, T).
    Returns: (B, T, N, H) in q's dtype, or that and the log-sum-exp.
    """
    _check_shapes(q, k, v, segment_ids)
    chosen = None
    for name, verdict in explain_attention(q, k, v, bias=bias, dropout_rate=dropout_rate, impl=impl):
        if verdict == "chosen":
            chosen = name
        elif name == impl:
            raise ValueError(f"attention impl={impl!r} cannot serve this call: {verdict}; use impl='auto'")
    if chosen is None:
        raise ValueError(f"attention impl={impl!r} is not known; choose auto, {', '.join(SUPPORT)}")
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q_ids, kv_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    mask = _Mask(causal, window, q_ids, kv_ids, kv_lengths, q_offset)
    if chosen == "xla_blockwise":
        out, lse = _blockwise(q, k, v, mask, scale, softcap, block_sizes or _tuning()[1])
    else:
        out, lse = _exact(q, k, v, mask, scale, softcap, bias, dropout_rate, dropout_key)
    return (out, lse) if return_lse else out


def explain_attention(q, k, v, *, bias=None, dropout_rate: float = 0.0, impl: str = "auto", **_):
    """[(implementation, "chosen" or the reason it was not)] for a call of ``attention`` with these arguments."""
    verdicts = {}
    for name, can in SUPPORT.items():
        if bias is not None and not can["bias"]:
            verdicts[name] = "does not take a bias"
        elif dropout_rate > 0 and not can["dropout"]:
            verdicts[name] = "does not drop attention weights"
    if impl == "auto":
        area = q.shape[1] * k.shape[1]
        above, _ = _tuning()
        large = area >= above and "xla_blockwise" not in verdicts
        chosen = "xla_blockwise" if large else "xla"
        verdicts.setdefault("xla_blockwise", f"T x S = {area} is below {above}: exact is faster")
        verdicts.setdefault("xla", f"T x S = {area} reaches {above}: scores would not fit the cache")
        verdicts[chosen] = "chosen"
    elif impl in SUPPORT and impl not in verdicts:
        verdicts[impl] = "chosen"
    return [(name, verdicts.get(name, f"impl={impl!r} was asked for")) for name in SUPPORT]


def decode_attention(q, k_cache, v_cache, lengths, *, scale=None, softcap=None):
    """One query a row against a cache: q (B, N, H), caches (B, K, S, H), lengths (B,) -> (B, N, H)."""
    batch, heads, width = q.shape
    kv_heads = k_cache.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("BKGH,BKSH->BKGS", grouped, k_cache, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible = jnp.arange(k_cache.shape[2]) < lengths[:, None]
    scores = jnp.where(visible[:, None, None], scores, NEG_INF)
    weights, _ = _softmax(scores)
    out = jnp.einsum("BKGS,BKSH->BKGH", weights.astype(v_cache.dtype), v_cache,
                     preferred_element_type=jnp.float32)
    return out.reshape(batch, heads, width).astype(q.dtype)


def _check_shapes(q, k, v, segment_ids):
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention wants q (B,T,N,H), k and v (B,S,K,H), not {q.shape}, {k.shape}, {v.shape}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads do not divide over {k.shape[2]} key/value heads")
    if segment_ids is not None and not isinstance(segment_ids, tuple) and q.shape[1] != k.shape[1]:
        raise ValueError(f"T={q.shape[1]} and S={k.shape[1]} differ: give segment_ids as (q_ids, kv_ids)")


class _Mask:
    """Which keys a query sees, asked for any block of queries and keys."""

    def __init__(self, causal, window, q_ids, kv_ids, kv_lengths, q_offset):
        self.causal, self.window, self.q_ids, self.kv_ids = causal, window, q_ids, kv_ids
        self.kv_lengths, self.q_offset = kv_lengths, jnp.asarray(q_offset)

    def arrays(self):
        return self.q_ids, self.kv_ids, self.kv_lengths, self.q_offset

    def block(self, q_start, q_size, k_start, k_size):
        """Boolean, broadcastable to (B, q_size, k_size), or None when all is visible."""
        queries = (self.q_offset[..., None] + q_start + jnp.arange(q_size))[..., :, None]  # (q, 1) or (B, q, 1)
        keys = k_start + jnp.arange(k_size)
        parts = []
        if self.causal:
            parts.append(keys <= queries)
        if self.window is not None:
            parts.append(keys > queries - self.window)
            if not self.causal:
                parts.append(keys < queries + self.window)
        if self.kv_lengths is not None:
            parts.append(keys < self.kv_lengths[:, None, None])
        if self.q_ids is not None:
            q_ids = lax.dynamic_slice_in_dim(self.q_ids, q_start, q_size, 1)
            kv_ids = lax.dynamic_slice_in_dim(self.kv_ids, k_start, k_size, 1)
            parts.append(q_ids[:, :, None] == kv_ids[:, None, :])
        return functools.reduce(jnp.logical_and, parts) if parts else None


@jax.custom_vjp
def _softmax(scores):
    """Weights and log-sum-exp over the last dim; a row of -inf gives zeros and -inf. The backward pass keeps the
    weights only: differentiating through the maximum would keep four arrays of T x S."""
    top = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(top == NEG_INF, 0.0, top))
    total = jnp.sum(weights, -1, keepdims=True)
    lse = jnp.where(total == 0, NEG_INF, top + jnp.log(jnp.where(total == 0, 1.0, total)))
    return weights / jnp.where(total == 0, 1.0, total), lse[..., 0]


def _softmax_forward(scores):
    weights, lse = _softmax(scores)
    return (weights, lse), weights


def _softmax_backward(weights, cotangents):
    d_weights, d_lse = cotangents
    shift = jnp.sum(weights * d_weights, -1) - d_lse
    return (weights * (d_weights - shift[..., None]),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def _scores(q, k, scale, softcap):
    """q (B, K, G, T, H), k (B, K, S, H) -> float32 (B, K, G, T, S)."""
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


# Inside, heads stand before positions: every product is then a plain batched matmul, and the scores (T x S, by
# far the largest array) are never transposed.


def _heads_first(q, k, v):
    """(B, T, N, H), (B, S, K, H) twice -> (B, K, G, T, H), (B, K, S, H) twice."""
    return _group(q, k.shape[2]), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def _group(q, kv_heads):
    batch, length, heads, width = q.shape
    return q.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)


def _ungroup(x):
    """(B, K, G, T, H) -> (B, T, N, H)."""
    batch, kv_heads, group, length, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, width)


def _per_group(mask_block):
    """(B, T, S) or (T, S) -> broadcastable to (B, K, G, T, S)."""
    return mask_block if mask_block.ndim == 2 else mask_block[:, None, None]


def _exact(q, k, v, mask, scale, softcap, bias, dropout_rate, dropout_key):
    heads, dtype = q.shape[2], q.dtype
    visible = mask.block(0, q.shape[1], 0, k.shape[1])
    q, k, v = _heads_first(q, k, v)
    scores = _scores(q, k, scale, softcap)
    if bias is not None:
        shape = (scores.shape[0], heads, *scores.shape[3:])
        scores = scores + jnp.broadcast_to(bias, shape).reshape(scores.shape)
    if visible is not None:
        scores = jnp.where(_per_group(visible), scores, NEG_INF)
    weights, lse = _softmax(scores)
    if dropout_rate > 0:
        kept = jax.random.bernoulli(dropout_key, 1 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0.0)
    out = checkpoint_name(jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v), "attention")
    return _ungroup(out).astype(dtype), lse.reshape(lse.shape[0], heads, lse.shape[3])


# --- blockwise: FlashAttention's forward and backward (Dao 2023, algorithms 1 and 2) as XLA loops -----------


def _blockwise(q, k, v, mask, scale, softcap, blocks):
    """Pads T and S to whole blocks, runs the loops, slices the padding off."""
    length = q.shape[1]
    static, arrays, padded = _padded(q, k, v, mask, scale, softcap, blocks)
    out, lse = _flash(static, *padded, arrays)
    return _ungroup(out)[:, :length], lse[..., :length].reshape(q.shape[0], q.shape[2], length)


def attention_gradients(q, k, v, out, lse, d_out, *, causal: bool, segment_ids=None, scale=None, block_sizes=None):
    """Gradients (dq, dk, dv) of what these keys contribute to an attention over more of them.

    Args:
      q, k, v, causal, segment_ids, scale, block_sizes: as for attention().
      out, lse: the output (B, T, N, H) and log-sum-exp (B, N, T) over all keys. d_out: the output's cotangent.
    The ring's backward pass is a sum of these (Dao 2023, algorithm 2: a block needs no more than that)."""
    q_ids, kv_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    mask = _Mask(causal, None, q_ids, kv_ids, None, 0)
    static, arrays, padded = _padded(q, k, v, mask, scale, None, block_sizes or _tuning()[1])
    pad = padded[0].shape[3] - q.shape[1]
    out, d_out = (_group(jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))), k.shape[2]) for x in (out, d_out))
    # Padded queries have no cotangent; a finite log-sum-exp keeps their weights finite, too.
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, pad)), constant_values=jnp.inf).reshape(out.shape[:-1])
    dq, dk, dv, _ = _flash_backward(static, (*padded, arrays, out, lse), (d_out, jnp.zeros_like(lse)))
    return (_ungroup(dq)[:, : q.shape[1]], *(x.transpose(0, 2, 1, 3)[:, : k.shape[1]] for x in (dk, dv)))


def _padded(q, k, v, mask, scale, softcap, blocks):
    """What the loops take: their constants, the mask's arrays, and q, k, v with heads first, in whole blocks."""
    length, keys = q.shape[1], k.shape[1]
    block_q, block_k = min(blocks[0], length), min(blocks[1], keys)
    pad_q, pad_k = -length % block_q, -keys % block_k
    lengths = jnp.full(q.shape[:1], keys) if mask.kv_lengths is None else jnp.minimum(mask.kv_lengths, keys)
    q_ids, kv_ids = mask.q_ids, mask.kv_ids
    if q_ids is not None:
        q_ids, kv_ids = jnp.pad(q_ids, ((0, 0), (0, pad_q))), jnp.pad(kv_ids, ((0, 0), (0, pad_k)))
    q_pad = jnp.pad(q, ((0, 0), (0, pad_q), (0, 0), (0, 0)))
    k_pad, v_pad = (jnp.pad(x, ((0, 0), (0, pad_k), (0, 0), (0, 0))) for x in (k, v))
    return ((mask.causal, mask.window, scale, softcap, block_q, block_k),
            (q_ids, kv_ids, lengths if pad_k else mask.kv_lengths, mask.q_offset), _heads_first(q_pad, k_pad, v_pad))


def _key_range(static, q_offset, q_start, keys):
    """First and last + 1 key block that a block of queries can see."""
    causal, window, _, _, block_q, block_k = static
    count = keys // block_k
    first, last = 0, count
    if causal:
        last = jnp.clip((jnp.max(q_offset) + q_start + block_q + block_k - 1) // block_k, 0, count)
    elif window is not None:
        last = jnp.clip((jnp.max(q_offset) + q_start + block_q + window + block_k - 2) // block_k, 0, count)
    if window is not None:
        first = jnp.clip((jnp.min(q_offset) + q_start - window + 1) // block_k, 0, last)
    return first, last


def _block_scores(static, arrays, q_block, k, q_start, k_start):
    """Masked scores of one block, and the softcap's derivative (or None)."""
    causal, window, scale, softcap, block_q, block_k = static
    scores = _scores(q_block, k, scale, softcap)
    slope = None if softcap is None else 1 - (scores / softcap) ** 2
    visible = _Mask(causal, window, *arrays).block(q_start, block_q, k_start, block_k)
    if visible is not None:
        scores = jnp.where(_per_group(visible), scores, NEG_INF)
    return scores, slope


def _varying_like(inputs, *arrays):
    """``arrays`` marked as differing over the mesh axes that any of ``inputs`` differs over: a loop's carry
    must start with the type that it ends with."""
    axes = set().union(*(jax.typeof(x).manual_axis_type.varying for x in inputs))
    return tuple(lax.pcast(x, tuple(axes), to="varying") if axes else x for x in arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(static, q, k, v, arrays):
    return _flash_forward(static, q, k, v, arrays)[0]


def _flash_forward(static, q, k, v, arrays):
    block_q, block_k = static[4:]
    length, width = q.shape[3:]

    def one_query_block(_, q_start):
        q_block = lax.dynamic_slice_in_dim(q, q_start, block_q, 3)

        def one_key_block(i, carry):
            acc, top, total = carry
            k_start = i * block_k
            k_block, v_block = (lax.dynamic_slice_in_dim(x, k_start, block_k, 2) for x in (k, v))
            scores, _ = _block_scores(static, arrays, q_block, k_block, q_start, k_start)
            new_top = jnp.maximum(top, scores.max(-1))
            safe = jnp.where(new_top == NEG_INF, 0.0, new_top)
            weights = jnp.exp(scores - safe[..., None])
            shrink = jnp.exp(top - safe)
            acc = acc * shrink[..., None] + jnp.einsum(
                "BKGTS,BKSH->BKGTH", weights.astype(v.dtype), v_block, preferred_element_type=jnp.float32)
            return acc, new_top, total * shrink + weights.sum(-1)

        shape = q_block.shape[:-1]
        start = _varying_like((q, k, v), jnp.zeros((*shape, width)), jnp.full(shape, NEG_INF), jnp.zeros(shape))
        first, last = _key_range(static, arrays[3], q_start, k.shape[2])
        acc, top, total = lax.fori_loop(first, last, one_key_block, start)
        safe = jnp.where(total == 0, 1.0, total)
        return None, (acc / safe[..., None], jnp.where(total == 0, NEG_INF, top + jnp.log(safe)))

    _, (out, lse) = lax.scan(one_query_block, None, jnp.arange(0, length, block_q))
    out = jnp.moveaxis(out, 0, 3).reshape(q.shape).astype(q.dtype)  # (n, B, K, G, q, H) -> (B, K, G, T, H)
    lse = jnp.moveaxis(lse, 0, 3).reshape(q.shape[:-1])
    out, lse = checkpoint_name(out, "attention"), checkpoint_name(lse, "attention")
    return (out, lse), (q, k, v, arrays, out, lse)


def _flash_backward(static, residuals, cotangents):
    block_q, block_k = static[4:]
    scale = static[2]
    q, k, v, arrays, out, lse = residuals
    d_out, d_lse = cotangents
    length, keys = q.shape[3], k.shape[2]
    # d score = weight * (d weight - delta); the log-sum-exp's own cotangent enters with the other sign.
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1) - d_lse
    safe_lse = jnp.where(lse == NEG_INF, 0.0, lse)
    inputs = (q, k, v, d_out)

    def one_query_block(carry, q_start):
        q_block, d_block, lse_block, delta_block = (
            lax.dynamic_slice_in_dim(x, q_start, block_q, 3) for x in (q, d_out, safe_lse, delta))

        def one_key_block(i, carry):
            dq, dk, dv = carry
            k_start = i * block_k
            k_block, v_block = (lax.dynamic_slice_in_dim(x, k_start, block_k, 2) for x in (k, v))
            scores, slope = _block_scores(static, arrays, q_block, k_block, q_start, k_start)
            weights = jnp.exp(scores - lse_block[..., None])
            dv_part = jnp.einsum("BKGTS,BKGTH->BKSH", weights.astype(v.dtype), d_block,
                                 preferred_element_type=jnp.float32)
            d_weights = jnp.einsum("BKGTH,BKSH->BKGTS", d_block, v_block, preferred_element_type=jnp.float32)
            d_scores = weights * (d_weights - delta_block[..., None]) * scale
            if slope is not None:
                d_scores = d_scores * slope
            d_scores = d_scores.astype(q.dtype)
            dq = dq + jnp.einsum("BKGTS,BKSH->BKGTH", d_scores, k_block, preferred_element_type=jnp.float32)
            dk_part = jnp.einsum("BKGTS,BKGTH->BKSH", d_scores, q_block, preferred_element_type=jnp.float32)

            def add(total, part):
                old = lax.dynamic_slice_in_dim(total, k_start, block_k, 2)
                return lax.dynamic_update_slice_in_dim(total, old + part, k_start, 2)

            return dq, add(dk, dk_part), add(dv, dv_part)

        first, last = _key_range(static, arrays[3], q_start, keys)
        (dq,) = _varying_like(inputs, jnp.zeros(q_block.shape))
        dq, dk, dv = lax.fori_loop(first, last, one_key_block, (dq, *carry))
        return (dk, dv), dq

    start = _varying_like(inputs, jnp.zeros(k.shape), jnp.zeros(k.shape))
    (dk, dv), dq = lax.scan(one_query_block, start, jnp.arange(0, length, block_q))
    dq = jnp.moveaxis(dq, 0, 3).reshape(q.shape)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_flash.defvjp(_flash_forward, _flash_backward)
