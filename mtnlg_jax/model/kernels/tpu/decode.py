"""Attention of one query a row over a cache, for TPU: the live part of the cache is read once.

The grid is (B, K, splits, steps): a step is one block of one key/value head's cache, for all query
heads that share it. XLA merges the splits' partial results by their log-sum-exps. Splits pay only
for a single head of a single row on a chip with two cores: otherwise each core already streams a
cache as fast as it can be read.
"""

# Shapes: B rows, T key positions, N query heads, K key/value heads, H head width

import functools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mtnlg_jax import compat

LANES = 128
SUBLANES = 16  # of a tile of bfloat16; float32 has 8
LOG2_E = math.log2(math.e)
# The score of a key past the length: finite, so that differences are numbers.
HIDDEN = -0.7 * float(np.finfo(np.float32).max)
VMEM_LIMIT = 28 * 2**20


class _DecodePlan(NamedTuple):
    """The static part of the kernel."""

    scale: float
    softcap: float | None
    keys: int
    block: int  # keys of a step
    steps: int  # of a split
    scaled: bool  # the cache is int8 and has scales

    def block_of(self, lengths, row, split, step):
        """(index of the block to read in this step, whether it holds a live key). A step past the
        length names the last live block again, which costs no read."""
        block = split * self.steps + step
        last = jnp.maximum(lax.div(lengths[row] + self.block - 1, self.block) - 1, 0)
        return jnp.minimum(block, last), block * self.block < lengths[row]


def _kernel(plan: _DecodePlan, lengths, q, k, v, *refs):
    *scales, out, lse, top, total, acc = refs
    row = pl.program_id(0)
    split = pl.program_id(2)
    step = pl.program_id(3)
    block, live = plan.block_of(lengths, row, split, step)

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full(top.shape, HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        acc[...] = jnp.zeros(acc.shape, jnp.float32)

    def work(masked: bool):
        left = lengths[row] - block * plan.block  # live keys from here on
        keys, values = (x[...].astype(q.dtype) if plan.scaled else x[...] for x in (k, v))
        scores = _product(q[...], keys, 1)
        if plan.scaled:
            # The scale of a key is common to its row of integers, so it multiplies the product.
            scores = scores * scales[0][...]
        if plan.softcap is None:
            scores = scores * (plan.scale * LOG2_E)
        else:
            scores = jnp.tanh(scores * (plan.scale / plan.softcap)) * (plan.softcap * LOG2_E)
        if masked:
            alive = lax.broadcasted_iota(jnp.int32, scores.shape, 1) < left
            scores = jnp.where(alive, scores, HIDDEN)
            # Values past the length may be anything, even NaN, and 0 times NaN is not 0.
            values = jnp.where(
                lax.broadcasted_iota(jnp.int32, values.shape, 0) < left, values, 0
            ).astype(values.dtype)
        new = jnp.maximum(top[...], scores.max(-1, keepdims=True))
        shrink = jnp.exp2(top[...] - new)
        weights = jnp.exp2(scores - new[:, :1])
        top[...] = new
        total[...] = total[...] * shrink + weights.sum(-1, keepdims=True)
        if plan.scaled:
            # The scale of a value joins its key's weight instead of the integers.
            weights = weights * scales[1][...]
            weights = jnp.where(alive, weights, 0.0) if masked else weights
        acc[...] = acc[...] * shrink[:, :1] + _product(weights.astype(values.dtype), values, 0)

    whole = (block + 1) * plan.block <= lengths[row]
    pl.when(jnp.logical_and(live, whole))(lambda: work(False))
    pl.when(jnp.logical_and(live, jnp.logical_not(whole)))(lambda: work(True))

    @pl.when(step == plan.steps - 1)
    def _():
        seen = total[...] > 0
        sums = jnp.where(seen, total[...], 1.0)
        out[...] = (acc[...] / sums[:, :1]).astype(out.dtype)
        lse[...] = jnp.where(seen, (top[...] + jnp.log2(sums)) / LOG2_E, -jnp.inf)


def _product(a, b, b_axis: int):
    """a (rows, n) and b contracted over n, in float32. For float32 inputs JAX's own setting chooses
    the precision."""
    precision = None if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a, b, (((1,), (b_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _merged(out, lse):
    """Merge the splits' outputs (B, K, splits, G, H) by their log-sum-exps (B, K, splits, G)."""
    top = lse.max(2, keepdims=True)
    weights = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    total = weights.sum(2)
    safe = jnp.where(total == 0, 1.0, total)
    out = (out * weights[..., None]).sum(2) / safe[..., None]
    return out, jnp.where(total == 0, -jnp.inf, top[:, :, 0] + jnp.log(safe))


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
    num_splits: int | None = None,
    block_kv: int,
    interpret=False,
):
    """Attention of q (B, N, H) over the first ``lengths`` int32 (B,) keys of caches (B, K, T, H), N
    % K == 0.

    int8 caches come with float32 ``k_scale`` and ``v_scale`` (B, K, T): a value is the integer
    times its scale. ``block_kv``: keys of a step, a multiple of 128. ``num_splits``: parts of the
    cache that are reduced separately.

    Returns out (B, N, H) in q's dtype and the float32 log-sum-exp (B, N): 0 and -inf where the
    length is 0."""
    rows, heads, width = q.shape
    kv_heads, keys = k_cache.shape[1:3]
    group = heads // kv_heads
    # Whole tiles of bfloat16; float32 needs less but fits as well.
    padded = pl.cdiv(group, SUBLANES) * SUBLANES
    block = min(pl.cdiv(block_kv, LANES), pl.cdiv(keys, LANES)) * LANES
    splits = num_splits or (2 if rows * kv_heads == 1 else 1)
    splits = min(splits, pl.cdiv(keys, block))
    plan = _DecodePlan(
        scale, softcap, keys, block, pl.cdiv(pl.cdiv(keys, block), splits), k_scale is not None
    )
    q_groups = jnp.pad(
        q.reshape(rows, kv_heads, group, width), ((0, 0), (0, 0), (0, padded - group), (0, 0))
    )
    # A length that is only known at run time cannot be checked, but must not read past the cache.
    lengths = jnp.clip(lengths, 0, keys).astype(jnp.int32)

    def of_cache(row, head, split, step, lengths):
        return row, head, plan.block_of(lengths, row, split, step)[0], 0

    def of_scales(row, head, split, step, lengths):
        return row, head, 0, plan.block_of(lengths, row, split, step)[0]

    def of_query(row, head, split, step, lengths):
        return row, head, 0, 0

    def of_split(row, head, split, step, lengths):
        return row, head, split, 0, 0

    cache = pl.BlockSpec((None, None, block, width), of_cache)
    # A row of scales for each head, as blocks need two dims.
    scales = [x[:, :, None] for x in (k_scale, v_scale) if x is not None]
    arrays = (q_groups, k_cache, v_cache, *scales)
    # A single part is stored as the result; several are still to be merged.
    part_dtype = q.dtype if splits == 1 else jnp.float32
    outputs = [
        ((rows, kv_heads, splits, padded, width), part_dtype),
        ((rows, kv_heads, splits, padded, LANES), jnp.float32),
    ]
    statistics = pltpu.VMEM((padded, LANES), jnp.float32)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, kv_heads, splits, plan.steps),
            in_specs=[
                pl.BlockSpec((None, None, padded, width), of_query),
                cache,
                cache,
                *[pl.BlockSpec((None, None, 1, block), of_scales) for _ in scales],
            ],
            out_specs=[
                pl.BlockSpec((None, None, None, *shape[3:]), of_split) for shape, _ in outputs
            ],
            scratch_shapes=[statistics, statistics, pltpu.VMEM((padded, width), jnp.float32)],
        ),
        out_shape=[compat.result_like(shape, dtype, lengths, *arrays) for shape, dtype in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=interpret,
        name="decode",
    )(lengths, *arrays)
    out = out[:, :, :, :group]
    lse = lse[:, :, :, :group, 0]
    if splits == 1:
        out = out[:, :, 0]
        lse = lse[:, :, 0]
    else:
        out, lse = _merged(out, lse)
    return out.reshape(rows, heads, width).astype(q.dtype), lse.reshape(rows, heads)
