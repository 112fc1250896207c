"""Provide every kernel and the reference attention, on unaligned shapes, with the race detector
on."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax import compat
from mtnlg_jax.model.attention import attention, decode_attention


def _documents(rows, length, number, seed=0):
    """Return increasing ids, (rows, length)."""
    return np.sort(np.random.default_rng(seed).integers(0, number, (rows, length)), 1).tolist()


def _mixed(rows, length, number, seed=1):
    """Return ids in any order."""
    return np.random.default_rng(seed).integers(0, number, (rows, length)).tolist()


# (rows, queries, keys, heads, key/value heads, head width, static options, arrays): each argument
# of a mask at least once, then together; "all" has rows that see nothing. Blocks hold 128 queries
# and 64 or 128 keys.
CASES = {
    "causal": (1, 200, 200, 2, 1, 64, {}, {}),
    "both ways": (1, 150, 200, 2, 2, 64, {"causal": False}, {}),
    "interior blocks": (1, 384, 384, 1, 1, 64, {}, {}),
    "head width 96": (1, 130, 130, 4, 1, 96, {}, {}),
    "head width 160": (1, 130, 130, 2, 1, 160, {}, {}),
    "eight heads share": (1, 70, 130, 8, 1, 64, {"causal": False}, {}),
    "window": (1, 300, 300, 2, 2, 64, {"window": 100}, {}),
    "window both ways": (1, 200, 260, 1, 1, 64, {"window": 70, "causal": False}, {}),
    "offset": (1, 70, 260, 2, 1, 64, {"q_offset": 150}, {}),
    "one query": (2, 1, 200, 4, 1, 64, {}, {"q_offset": [3, 199]}),
    "before the keys": (2, 140, 130, 1, 1, 64, {}, {"q_offset": [-135, -200]}),
    "lengths": (3, 130, 200, 1, 1, 64, {"causal": False}, {"kv_lengths": [0, 70, 200]}),
    "documents": (1, 260, 260, 2, 1, 64, {}, {"segment_ids": _documents(1, 260, 4)}),
    "mixed documents": (
        1,
        130,
        200,
        2,
        2,
        64,
        {"causal": False},
        {"segment_ids": (_mixed(1, 130, 3), _mixed(1, 200, 3))},
    ),
    "softcap": (1, 130, 130, 2, 2, 64, {"softcap": 1.5, "scale": 0.3}, {}),
    "all": (
        3,
        140,
        200,
        2,
        1,
        96,
        {"window": 90, "softcap": 3.0},
        {
            "segment_ids": (_documents(3, 140, 2), _documents(3, 200, 2)),
            "kv_lengths": [200, 0, 130],
            "q_offset": [-60, 0, 100],
        },
    ),
    "all both ways": (
        2,
        140,
        200,
        2,
        1,
        64,
        {"window": 90, "softcap": 3.0, "causal": False},
        {
            "segment_ids": (_documents(2, 140, 2), _documents(2, 200, 2)),
            "kv_lengths": [200, 130],
            "q_offset": [-60, 100],
        },
    ),
}


@pytest.fixture(scope="session")
def kernels(longhand):
    """Return ``everything(impl, case, dtype)`` and ``decoded(impl, ...)``.

    The first gives (got, want) of out, lse, dq, dk, dv as float64, relative to the largest value of
    ``want`` if that is above 1; the second does the same for decode_attention.
    """

    def everything(impl, case, dtype="float32", block_sizes=(128, 128)):
        rows, queries, keys, heads, kv_heads, width, options, run = CASES[case]
        arrays = longhand.inputs(0, rows, queries, keys, heads, kv_heads, width)
        rounded = [jnp.asarray(x, dtype) for x in arrays[:4]]
        compute = jax.jit(
            functools.partial(longhand.everything, impl=impl, block_sizes=block_sizes, **options)
        )
        with compat.interpreted(detect_races=True):
            got = compute(*rounded, arrays[4], **longhand.as_arrays(run))
        want = longhand.reference(
            *(np.asarray(x, np.float64) for x in rounded), arrays[4], **options, **run
        )
        assert np.array_equal(np.isneginf(got[1]), np.isneginf(want[1]))
        scales = [max(1.0, np.abs(x[np.isfinite(x)]).max(initial=0)) for x in want]
        return (
            [np.asarray(x, np.float64) / s for x, s in zip(got, scales, strict=True)],
            [x / s for x, s in zip(want, scales, strict=True)],
        )

    def decoded(
        impl,
        dtype,
        *,
        rows=3,
        heads=4,
        kv_heads=2,
        keys=300,
        width=64,
        lengths=(300, 0, 130),
        softcap=None,
        int8=False,
        num_splits=None,
    ):
        """Return (out, lse) of the kernel and of attention() with impl="xla" over the same cache,
        in float32."""
        draws = np.random.default_rng(0)
        q = draws.standard_normal((rows, heads, width)).astype(np.float32)
        cache = [
            draws.standard_normal((rows, kv_heads, keys, width)).astype(np.float32)
            for _ in range(2)
        ]
        scales = {}
        if int8:
            steps = [np.abs(x).max(-1) / 127 for x in cache]
            cache = [
                np.round(x / step[..., None]).astype(np.int8)
                for x, step in zip(cache, steps, strict=True)
            ]
            scales = dict(zip(("k_scale", "v_scale"), steps, strict=True))
        else:
            cache = [jnp.asarray(x, dtype) for x in cache]
        q = jnp.asarray(q, dtype)
        run = functools.partial(decode_attention, softcap=softcap, return_lse=True)
        with compat.interpreted(detect_races=True):
            got = jax.jit(functools.partial(run, impl=impl, num_splits=num_splits))(
                q, *cache, jnp.int32(lengths), **scales
            )
        floats = [np.asarray(x, np.float32) for x in cache]
        if int8:
            floats = [x * step[..., None] for x, step in zip(floats, steps, strict=True)]
        k, v = (x.swapaxes(1, 2) for x in floats)
        want = attention(
            np.asarray(q, np.float32)[:, None],
            k,
            v,
            causal=False,
            kv_lengths=jnp.int32(lengths),
            softcap=softcap,
            impl="xla",
            return_lse=True,
        )
        return [np.asarray(x, np.float64) for x in got], [
            np.asarray(want[0][:, 0]),
            np.asarray(want[1][..., 0]),
        ]

    return SimpleNamespace(everything=everything, decoded=decoded)
