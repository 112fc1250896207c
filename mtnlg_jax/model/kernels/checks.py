"""Checks of the arguments of attention() and decode_attention(). Every error names the argument,
its value and what would work."""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads, H head width

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.model.kernels.call import AttentionCall, DecodeCall
from mtnlg_jax.model.kernels.select import FLOATS


def check_attention(call: AttentionCall) -> None:
    """Raise ValueError if the arguments do not fit together."""
    q = call.q
    k = call.k
    v = call.v
    if (
        len(q.shape) != 4
        or len(k.shape) != 4
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or 0 in q.shape
        or 0 in k.shape
    ):
        raise ValueError(
            "attention takes q (B, S, N, H), k and v (B, T, K, H), none of them empty, not "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    _check_heads(q.shape[2], k.shape[2])
    _check_dtypes(q, k, v)
    _check_scale_and_softcap(call.scale, call.softcap)
    _check_window(call.window)
    _check_slopes(call.alibi_slopes, q.shape[2])
    if not 0 <= call.dropout_rate < 1:
        raise ValueError(f"dropout_rate={call.dropout_rate} is outside [0, 1)")
    if call.dropout_rate > 0 and call.dropout_key is None:
        raise ValueError(f"dropout_rate={call.dropout_rate} needs a dropout_key")
    sizes = call.block_sizes
    if sizes is not None and not (len(sizes) == 2 and min(sizes) >= 1):
        raise ValueError(f"block_sizes={sizes} must be two sizes of at least 1: (queries, keys)")
    rows = q.shape[0]
    _check_integers(
        "q_offset", call.q_offset, rows, meaning="the position of the first query on the key axis"
    )
    if call.kv_lengths is not None:
        _check_integers(
            "kv_lengths", call.kv_lengths, rows, high=call.keys, meaning="the number of keys"
        )
    if call.segment_ids is not None:
        _check_segment_ids(call, rows)


def _check_segment_ids(call: AttentionCall, rows: int) -> None:
    if not isinstance(call.segment_ids, tuple) and call.queries != call.keys:
        raise ValueError(
            f"S={call.queries} queries and T={call.keys} keys differ: give segment_ids as "
            "(q_ids, kv_ids)"
        )
    pair = call.segment_pair
    if len(pair) != 2:
        raise ValueError(f"segment_ids has {len(pair)} parts; give (q_ids, kv_ids)")
    lengths = (call.queries, call.keys)
    for name, ids, length in zip(("queries", "keys"), pair, lengths, strict=True):
        if np.shape(ids) != (rows, length):
            raise ValueError(
                f"segment_ids of the {name} have shape {np.shape(ids)}; "
                f"they must be ({rows}, {length})"
            )
        if not np.issubdtype(jnp.result_type(ids), np.integer):
            raise ValueError(f"segment_ids are {jnp.result_type(ids)}; they must be int32")


def _check_heads(heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads are not divisible by {kv_heads} key/value heads; repeat or drop "
            "heads so that they are"
        )


def _check_dtypes(q, k, v, *, cache: bool = False) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        int8_cache = cache and name != "q" and str(x.dtype) == "int8"
        if str(x.dtype) not in FLOATS and not int8_cache:
            raise ValueError(f"{name} is {x.dtype}; attention takes {', '.join(FLOATS)}: cast it")
    if k.dtype != v.dtype or (q.dtype != k.dtype and str(k.dtype) != "int8"):
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast them to one type"
        )


def _check_scale_and_softcap(scale, softcap) -> None:
    if scale is not None and not (np.ndim(scale) == 0 and math.isfinite(scale)):
        raise ValueError(f"scale={scale!r} must be a finite number, or None for 1 / sqrt(H)")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap={softcap!r} must be a number above 0, or None")


def _check_window(window) -> None:
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise ValueError(f"window={window!r} must be an int of at least 1, or None")


def _check_slopes(slopes, heads: int) -> None:
    if slopes is None:
        return
    if np.shape(slopes) != (heads,):
        raise ValueError(
            f"alibi_slopes have shape {np.shape(slopes)}; they must be ({heads},), one slope a "
            "query head"
        )
    if not jnp.issubdtype(jnp.result_type(slopes), jnp.floating):
        raise ValueError(f"alibi_slopes are {jnp.result_type(slopes)}; cast them to float32")


def _check_positions(positions, rows: int, heads: int) -> None:
    if positions is None:
        return
    if np.shape(positions) not in ((rows,), (rows, heads)):
        raise ValueError(
            f"positions have shape {np.shape(positions)}; they must be ({rows},), one a row, or "
            f"({rows}, {heads}), one a query head, or None for lengths - 1"
        )
    if not np.issubdtype(jnp.result_type(positions), np.integer):
        raise ValueError(f"positions are {jnp.result_type(positions)}; cast them to int32")


def _check_integers(name: str, value, rows: int, *, high: int | None = None, meaning: str) -> None:
    """Check that ``value`` holds integers (rows,) from 0 to ``high``, or an int where it is the
    offset. Values that are not known while tracing are not looked at."""
    shape = np.shape(value)
    scalar = name == "q_offset"
    if shape != (rows,) and not (scalar and shape == ()):
        raise ValueError(
            f"{name} has shape {shape}; it must be ({rows},){' or an int' if scalar else ''}"
        )
    if not np.issubdtype(jnp.result_type(value), np.integer):
        raise ValueError(f"{name} is {jnp.result_type(value)}; it must be int32")
    if isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    least = int(np.min(value))
    most = int(np.max(value))
    if least < 0:
        raise ValueError(f"{name}={least} is below 0; it is {meaning}")
    if high is not None and most > high:
        raise ValueError(f"{name}={most} is above {high}, {meaning}")


def check_decode(call: DecodeCall) -> None:
    """Raise ValueError if the arguments do not fit together."""
    q = call.q
    k = call.k_cache
    v = call.v_cache
    if (
        len(q.shape) != 3
        or len(k.shape) != 4
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[2] != k.shape[3]
        or 0 in q.shape
        or 0 in k.shape
    ):
        raise ValueError(
            "decode_attention takes q (B, N, H), k_cache and v_cache (B, K, T, H), none of them "
            f"empty, not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    rows, kv_heads, keys, _ = k.shape
    _check_heads(q.shape[1], kv_heads)
    _check_dtypes(q, k, v, cache=True)
    _check_scale_and_softcap(call.scale, call.softcap)
    _check_integers(
        "lengths", call.lengths, rows, high=keys, meaning="the number of positions of the cache"
    )
    _check_window(call.window)
    _check_slopes(call.alibi_slopes, q.shape[1])
    _check_positions(call.positions, rows, q.shape[1])
    for name, x in (("k_scale", call.k_scale), ("v_scale", call.v_scale)):
        if (x is None) == (str(k.dtype) == "int8"):
            raise ValueError(
                f"{name} is {'missing' if x is None else 'given'} with a cache of {k.dtype}; "
                "an int8 cache needs scales, and no other cache takes them"
            )
        if x is not None and np.shape(x) != (rows, kv_heads, keys):
            raise ValueError(
                f"{name} has shape {np.shape(x)}; it must be ({rows}, {kv_heads}, {keys})"
            )
    splits = call.num_splits
    if splits is not None and not (isinstance(splits, int) and splits >= 1):
        raise ValueError(f"num_splits={splits!r} must be an int of at least 1, or None")
