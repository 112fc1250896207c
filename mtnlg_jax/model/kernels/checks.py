"""What attention refuses, in one line that names the argument and what would work."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mtnlg_jax.model.kernels.select import FLOATS


def check(
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
):
    """Raises ValueError where the arguments do not fit; returns the ids of queries and keys."""
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
            f"attention wants q (B,T,N,H), k and v (B,S,K,H), none of them empty, not {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    rows, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    _check_heads_and_types(heads, kv_heads, q, k, v)
    _check_numbers(scale, softcap)
    if window is not None and not (isinstance(window, int) and window >= 1):
        raise ValueError(f"window={window!r} must be an int of at least 1, or None")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate={dropout_rate} lies outside [0, 1)")
    if dropout_rate > 0 and dropout_key is None:
        raise ValueError(f"dropout_rate={dropout_rate} needs a dropout_key")
    if block_sizes is not None and not (len(block_sizes) == 2 and min(block_sizes) >= 1):
        raise ValueError(
            f"block_sizes={block_sizes} must be two sizes of at least 1: (queries, keys)"
        )
    _check_places(
        "q_offset", q_offset, rows, 0, None, "the position of the first query on the key axis"
    )
    if kv_lengths is not None:
        _check_places("kv_lengths", kv_lengths, rows, 0, keys, "the number of keys")
    if segment_ids is None:
        return None, None
    if not isinstance(segment_ids, tuple) and queries != keys:
        raise ValueError(f"T={queries} and S={keys} differ: give segment_ids as (q_ids, kv_ids)")
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise ValueError(f"segment_ids has {len(pair)} parts; give (q_ids, kv_ids)")
    for name, ids, length in zip(("queries", "keys"), pair, (queries, keys), strict=True):
        if np.shape(ids) != (rows, length):
            raise ValueError(
                f"segment_ids of the {name} have shape {np.shape(ids)}; they must be ({rows}, {length})"
            )
        if not np.issubdtype(jnp.result_type(ids), np.integer):
            raise ValueError(f"segment_ids are {jnp.result_type(ids)}; they must be int32")
    return pair


def _check_heads_and_types(heads, kv_heads, q, k, v, cache: bool = False):
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads do not divide over {kv_heads} key/value heads; repeat or drop heads so "
            "that they do"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if str(x.dtype) not in FLOATS and not (cache and name != "q" and str(x.dtype) == "int8"):
            raise ValueError(f"{name} is {x.dtype}; attention takes {', '.join(FLOATS)}: cast it")
    if k.dtype != v.dtype or (q.dtype != k.dtype and str(k.dtype) != "int8"):
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; cast them to one type"
        )


def _check_numbers(scale, softcap):
    if scale is not None and not (np.ndim(scale) == 0 and math.isfinite(scale)):
        raise ValueError(f"scale={scale!r} must be a finite number, or None for 1 / sqrt(H)")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap={softcap!r} must be a number above 0, or None")


def _check_places(name: str, value, rows: int, low: int, high: int | None, what: str):
    """``value`` is an int or integers (rows,) within [low, high], as far as they are known while
    tracing."""
    shape = np.shape(value)
    if shape not in ((), (rows,)) or (name != "q_offset" and shape == ()):
        raise ValueError(
            f"{name} has shape {shape}; it must be ({rows},){' or an int' if name == 'q_offset' else ''}"
        )
    if not np.issubdtype(jnp.result_type(value), np.integer):
        raise ValueError(f"{name} is {jnp.result_type(value)}; it must be int32")
    if isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    least = int(np.min(value))
    most = int(np.max(value))
    if least < low:
        raise ValueError(f"{name}={least} is below {low}; it is {what}")
    if high is not None and most > high:
        raise ValueError(f"{name}={most} is above {high}, {what}")


def check_decode(q, k_cache, v_cache, lengths, k_scale, v_scale, num_splits, scale, softcap):
    if (
        len(q.shape) != 3
        or len(k_cache.shape) != 4
        or k_cache.shape != v_cache.shape
        or q.shape[0] != k_cache.shape[0]
        or q.shape[2] != k_cache.shape[3]
        or 0 in q.shape
        or 0 in k_cache.shape
    ):
        raise ValueError(
            "decode_attention wants q (B,N,H), k_cache and v_cache (B,K,S,H), none of them empty, not "
            f"{tuple(q.shape)}, {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    rows, kv_heads, keys, _ = k_cache.shape
    _check_heads_and_types(q.shape[1], kv_heads, q, k_cache, v_cache, cache=True)
    _check_numbers(scale, softcap)
    _check_places("lengths", lengths, rows, 0, keys, "the positions of the cache")
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (x is None) == (str(k_cache.dtype) == "int8"):
            raise ValueError(
                f"{name} is {'missing' if x is None else 'given'} with a cache of {k_cache.dtype}; scales "
                "belong to int8, and only to it"
            )
        if x is not None and np.shape(x) != (rows, kv_heads, keys):
            raise ValueError(
                f"{name} has shape {np.shape(x)}; it must be ({rows}, {kv_heads}, {keys})"
            )
    if num_splits is not None and not (isinstance(num_splits, int) and num_splits >= 1):
        raise ValueError(f"num_splits={num_splits!r} must be an int of at least 1, or None")
