"""Provide the reference attention in float64 that every implementation is compared with."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.model.attention import attention


@pytest.fixture(scope="session")
def longhand():
    """Return visible(...), reference(...), inputs(...), everything(...) and compare(...); see
    below."""
    return SimpleNamespace(
        visible=_visible,
        reference=_reference,
        inputs=_inputs,
        everything=_everything,
        compare=_compare,
        as_arrays=_as_arrays,
    )


def _visible(
    rows, queries, keys, *, causal=True, segment_ids=None, kv_lengths=None, q_offset=0, window=None
):
    """Return booleans (rows, queries, keys), computed pair by pair as attention()'s docstring
    defines them."""
    seen = np.zeros((rows, queries, keys), bool)
    for b, i, j in np.ndindex(seen.shape):
        position = (q_offset if np.ndim(q_offset) == 0 else q_offset[b]) + i
        see = not (causal and j > position)
        if segment_ids is not None:
            q_ids, kv_ids = (
                segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
            )
            see = see and q_ids[b][i] == kv_ids[b][j]
        if kv_lengths is not None:
            see = see and j < kv_lengths[b]
        if window is not None:
            see = see and j > position - window and (causal or j < position + window)
        seen[b, i, j] = see
    return seen


def _reference(q, k, v, d_out, d_lse, *, softcap=None, scale=None, bias=None, **mask):
    """Return out, lse, dq, dk, dv in float64, for the loss sum(out * d_out) + sum(finite lse *
    d_lse)."""
    q, k, v, d_out, d_lse = (np.asarray(x, np.float64) for x in (q, k, v, d_out, d_lse))
    rows, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    scale = width**-0.5 if scale is None else scale
    seen = _visible(rows, queries, keys, **mask)
    out = np.zeros_like(q)
    lse = np.full((rows, heads, queries), -np.inf)
    dq = np.zeros_like(q)
    dk = np.zeros_like(k)
    dv = np.zeros_like(v)
    for b, n, i in np.ndindex(rows, heads, queries):
        g = n * kv_heads // heads  # the key/value head of query head n
        at = np.flatnonzero(seen[b, i])
        if not len(at):
            continue
        scores = k[b, at, g] @ q[b, i, n] * scale
        slope = 1.0
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
            slope = 1 - (scores / softcap) ** 2
        if bias is not None:
            scores = scores + np.broadcast_to(bias, (rows, heads, queries, keys))[b, n, i, at]
        total = np.exp(scores).sum()
        weights = np.exp(scores) / total
        out[b, i, n] = weights @ v[b, at, g]
        lse[b, n, i] = np.log(total)
        d_weights = v[b, at, g] @ d_out[b, i, n]
        d_scores = (
            (weights * (d_weights - weights @ d_weights) + weights * d_lse[b, n, i]) * slope * scale
        )
        dq[b, i, n] = d_scores @ k[b, at, g]
        dk[b, at, g] += np.outer(d_scores, q[b, i, n])
        dv[b, at, g] += np.outer(weights, d_out[b, i, n])
    return out, lse, dq, dk, dv


def _inputs(seed, rows, queries, keys, heads, kv_heads, width=4):
    """Return q, k, v and the cotangents of the output and of the log-sum-exp."""
    random = np.random.default_rng(seed)
    shapes = [
        (rows, queries, heads, width),
        *[(rows, keys, kv_heads, width)] * 2,
        (rows, queries, heads, width),
        (rows, heads, queries),
    ]
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def _everything(q, k, v, d_out, d_lse, **options):
    """Return out, lse, dq, dk, dv of attention(), in one compilation."""

    def loss(q, k, v):
        out, lse = attention(q, k, v, return_lse=True, **options)
        finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
        return jnp.sum(out.astype(jnp.float32) * d_out) + jnp.sum(finite * d_lse), (out, lse)

    grads, (out, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, lse, *grads


def _compare(got, want, tolerance):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        a = np.asarray(a, np.float64)
        assert a.shape == b.shape, name
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)


def _as_arrays(run):
    return {
        key: tuple(map(jnp.int32, value)) if isinstance(value, tuple) else jnp.int32(value)
        for key, value in run.items()
    }
