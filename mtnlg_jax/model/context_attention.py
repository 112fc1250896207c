"""Attention over a sequence that the mesh axis ``context`` splits, in three modes behind one call.

Of the sequence's 2 c chunks, device i of c holds chunks i and 2 c - 1 - i (zigzag), so that causal
attention is the same work for all devices. Inputs and outputs are in this order. The modes differ
in what they communicate:

- ulysses: queries, keys, values and outputs. Each device attends to all positions with some of the
  heads, so heads % c == 0.
- gather: keys and values, to every device, which must have room for all of them.
- ring: keys and values, to the next device, c - 1 times; the backward pass sends them around again.

Sources: Jacobs 2023 (DeepSpeed Ulysses), Llama Team 2024 (Llama 3, section 3.3.2), Liu 2023 (Ring
Attention).
"""

# Shapes: B rows, S positions of the sequence, N query heads, K key/value heads, H head width

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mtnlg_jax.model.attention import attention, attention_gradients
from mtnlg_jax.model.kernels.entropy import attention_entropy
from mtnlg_jax.parallel.collectives import (
    axis_index,
    axis_size,
    gather,
    own_part,
    to_next,
    vary,
    zigzag,
)

MODES = ("auto", "ulysses", "gather", "ring")
RING_OPTIONS = frozenset({"softcap", "scale"})  # of attention()


def context_attention(
    q,
    k,
    v,
    *,
    causal: bool = True,
    segment_ids=None,
    mode: str = "auto",
    impl: str = "auto",
    **options,
):
    """attention() over the whole sequence. q (B, S/c, N, H), k and v (B, S/c, K, H), segment_ids
    (B, S/c), each the device's own positions in zigzag order -> (B, S/c, N, H). On a context axis
    of size 1 it is attention(). ``options`` are further arguments of attention(): window, softcap,
    scale, alibi_slopes and return_lse. The ring takes softcap and scale.

    Mode "auto" is ulysses if the heads of this device are divisible by c, and gather otherwise.
    Raises ValueError if ulysses is requested and they are not."""
    parts = axis_size("context")
    if parts == 1:
        return attention(q, k, v, causal=causal, segment_ids=segment_ids, impl=impl, **options)
    divides = k.shape[2] % parts == 0
    if mode == "auto":
        mode = "ulysses" if divides else "gather"
    if mode == "ulysses":
        if not divides:
            raise ValueError(
                f"mesh.context_mode=ulysses: {k.shape[2]} key/value heads per device are not "
                f"divisible by mesh.context={parts}; use mesh.context_mode=gather or ring"
            )
        return _ulysses(q, k, v, causal, segment_ids, impl, options)
    if mode == "gather":
        return _gathered(q, k, v, causal, segment_ids, impl, options)
    if mode == "ring":
        unable = sorted(options.keys() - RING_OPTIONS)
        if unable:
            raise ValueError(
                f"mesh.context_mode=ring does not take {', '.join(unable)} of attention; "
                "use mesh.context_mode=gather or ulysses"
            )
        return _ring(_Ring(causal, impl, **options), q, k, v, segment_ids)
    raise ValueError(f"unknown context mode {mode!r}; choose one of {', '.join(MODES)}")


def _natural(x):
    """(B, S, ...), in the order of the devices -> in the order of the sequence."""
    parts = axis_size("context")
    chunks = x.reshape(x.shape[0], parts, 2, -1, *x.shape[2:])
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], 1).reshape(x.shape)


def _whole(x):
    return None if x is None else _natural(gather(x, "context", 1))


def _ulysses(q, k, v, causal, segment_ids, impl, options):
    if "alibi_slopes" in options:
        options = options | {"alibi_slopes": own_part(options["alibi_slopes"], "context", 0)}
    q, k, v = (_natural(lax.all_to_all(x, "context", 2, 1, tiled=True)) for x in (q, k, v))
    ids = _whole(segment_ids)
    result = attention(q, k, v, causal=causal, segment_ids=ids, impl=impl, **options)
    order = zigzag(q.shape[1], axis_size("context"))

    def back(x):
        return lax.all_to_all(x[:, order], "context", 1, 2, tiled=True)

    if not options.get("return_lse"):
        return back(result)
    out, lse_BNS = result
    return back(out), back(lse_BNS.swapaxes(1, 2)).swapaxes(1, 2)


def _own_chunks():
    """Indices of this device's two chunks."""
    here = axis_index("context")
    return here, 2 * axis_size("context") - 1 - here


def _gathered(q, k, v, causal, segment_ids, impl, options):
    k = _whole(k)
    v = _whole(v)
    halves = [
        attention(part, k, v, causal=causal, impl=impl, **where, **options)
        for part, where in _halves_of(q, segment_ids)
    ]
    if not options.get("return_lse"):
        return jnp.concatenate(halves, 1)
    outs, lses = zip(*halves, strict=True)
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 2)


def _halves_of(q, segment_ids):
    """[(queries, segment_ids and q_offset of attention())] of this device's two chunks."""
    ids = _whole(segment_ids)
    half = q.shape[1] // 2
    halves = []
    for number, part in zip(_own_chunks(), (slice(0, half), slice(half, None)), strict=True):
        pair = None if ids is None else (segment_ids[:, part], ids)
        halves.append((q[:, part], {"segment_ids": pair, "q_offset": number * half}))
    return halves


def context_attention_entropy(q, k, *, causal: bool = True, segment_ids=None, **options):
    """attention_entropy() over the whole sequence, for q, k and segment_ids as in
    `context_attention` -> float32 (B, N, S/c) of the device's own positions. Whatever the mode of
    attention, every device gathers the keys and takes its own queries a block at a time."""
    if axis_size("context") == 1:
        return attention_entropy(q, k, causal=causal, segment_ids=segment_ids, **options)
    k = _whole(k)
    halves = [
        attention_entropy(part, k, causal=causal, **where, **options)
        for part, where in _halves_of(q, segment_ids)
    ]
    return jnp.concatenate(halves, 2)


# --- ring: each hop attends only to pairs of chunks in which something is visible


def _visible_pairs(hop: int, causal: bool, source):
    """[(query half, key half, causal)] of a hop. A half may be a traced number.

    Among its own keys a device sees (first, first) and (second, second) up to the diagonal and all
    of (second, first). Among the keys of device ``source`` its second half sees their first half.
    The other visible pair is (first, first) if ``source`` comes before this device, and (second,
    second) if it comes after."""
    if not causal:
        return [(i, j, False) for i in (0, 1) for j in (0, 1)]
    if hop == 0:
        return [(0, 0, True), (1, 0, False), (1, 1, True)]
    behind = (source > axis_index("context")).astype(jnp.int32)
    return [(1, 0, False), (behind, behind, False)]


def _half(x, which):
    if x is None:
        return None
    half = x.shape[1] // 2
    return lax.dynamic_slice_in_dim(x, which * half, half, 1)


def _hops(causal, kv):
    """Yield each hop's (keys, values, ids) and visible pairs, and pass the former on in between."""
    parts = axis_size("context")
    here = axis_index("context")
    right = to_next(parts)
    for hop in range(parts):
        yield kv, _visible_pairs(hop, causal, (here - hop) % parts)
        if hop < parts - 1:
            kv = jax.tree.map(lambda x: lax.ppermute(x, "context", right), kv)


def _pair_ids(ids, kv_ids, i, j):
    return None if ids is None else (_half(ids, i), _half(kv_ids, j))


class _Ring(NamedTuple):
    """The static part of ring attention."""

    causal: bool
    impl: str
    softcap: float | None = None
    scale: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Of the attention of one pair of chunks."""
        return {"impl": self.impl, "softcap": self.softcap, "scale": self.scale}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static: _Ring, q, k, v, ids):
    return _ring_forward(static, q, k, v, ids)[0]


def _ring_forward(static: _Ring, q, k, v, ids):
    batch, length, heads, width = q.shape
    # Softmax over the union of blocks: outputs are weighted by their share of the sum (Milakov
    # 2018), each half on its own.
    out = vary(jnp.zeros((batch, length, heads, width), jnp.float32))
    lse = vary(jnp.full((batch, length, heads), -jnp.inf))
    for (k_now, v_now, kv_ids), pairs in _hops(static.causal, (k, v, ids)):
        for i, j, diagonal in pairs:
            new, new_lse = attention(
                _half(q, i),
                _half(k_now, j),
                _half(v_now, j),
                causal=diagonal,
                segment_ids=_pair_ids(ids, kv_ids, i, j),
                return_lse=True,
                **static.options,
            )
            new_lse = new_lse.transpose(0, 2, 1)
            old = _half(out, i)
            old_lse = _half(lse, i)
            total = jnp.logaddexp(old_lse, new_lse)
            safe = jnp.where(total == -jnp.inf, 0.0, total)
            merged = (
                old * jnp.exp(old_lse - safe)[..., None]
                + new.astype(jnp.float32) * jnp.exp(new_lse - safe)[..., None]
            )
            half = length // 2
            out = lax.dynamic_update_slice_in_dim(out, merged, i * half, 1)
            lse = lax.dynamic_update_slice_in_dim(lse, total, i * half, 1)
    out = checkpoint_name(out.astype(q.dtype), "attention")
    lse = checkpoint_name(lse, "attention")
    return out, (q, k, v, ids, out, lse)


def _ring_backward(static: _Ring, residuals, d_out):
    q, k, v, ids, out, lse = residuals
    half = q.shape[1] // 2
    dq, dk, dv = (vary(jnp.zeros(x.shape, jnp.float32)) for x in (q, k, v))
    parts = axis_size("context")
    right = to_next(parts)

    def add(total, part, which):
        return lax.dynamic_update_slice_in_dim(
            total, _half(total, which) + part.astype(jnp.float32), which * half, 1
        )

    # The gradients of keys and values travel with them, and after the last hop once more: home.
    for (k_now, v_now, kv_ids), pairs in _hops(static.causal, (k, v, ids)):
        for i, j, diagonal in pairs:
            grads = attention_gradients(
                _half(q, i),
                _half(k_now, j),
                _half(v_now, j),
                _half(out, i),
                _half(lse, i).transpose(0, 2, 1),
                _half(d_out, i),
                causal=diagonal,
                segment_ids=_pair_ids(ids, kv_ids, i, j),
                **static.options,
            )
            dq = add(dq, grads[0], i)
            dk = add(dk, grads[1], j)
            dv = add(dv, grads[2], j)
        dk, dv = (lax.ppermute(x, "context", right) for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)
