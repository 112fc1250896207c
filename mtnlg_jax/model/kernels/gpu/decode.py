"""Attention of one new query per row to a cache, on Hopper GPUs: a Pallas kernel (Mosaic GPU) that
splits the keys.

Every thread block takes one row, one key/value head (with up to 64 query heads that share it: the
rows of one product) and one run of keys, no further than the row's length. XLA then merges the runs
by their log-sum-exps. Warpgroups, forms and limits are those of flash.py, except that one warpgroup
computes instead of two: reading the cache takes longer than the arithmetic.
"""

# Shapes: B rows, T key positions, N query heads, K key/value heads, H head width

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mtnlg_jax.compat import result_like
from mtnlg_jax.model.kernels.gpu.common import (
    COLUMNS,
    LOG2E,
    LOW,
    ROWS,
    TILE,
    ScoreScale,
    accumulate,
    broadcast_along,
    check_blocks,
    check_width,
    fill,
    interpret_params,
    load,
    multiprocessors,
    pad_to_8,
    product,
    release,
    ring,
    scalar,
    stored,
    tiled,
    varying_like,
    zeros,
)

HEADS = 64  # query heads of a tile
KEYS_OF_SPLIT = 256  # fewer keys are not worth a thread block


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
    block_kv: int = 64,
    stages: int | None = None,
    interpret=None,
    fast: bool | None = None,
):
    """Attention of q (B, N, H) to the first ``lengths`` (B,) keys of k_cache and v_cache (B, K, T,
    H): out (B, N, H) and its log-sum-exp, float32 (B, N). The caches have q's dtype, or are int8
    with float32 scales (B, K, T). They are copied unless T is a multiple of eight."""
    batch, heads, width = q.shape
    kv_heads, keys = k_cache.shape[1:3]
    _check_arrays(q, k_cache, v_cache, k_scale, v_scale)
    check_blocks(width, "query heads", HEADS, "keys", block_kv)
    group = heads // kv_heads
    blocks = -(-keys // block_kv)
    # Eight is the smallest tile of the TMA. Beyond HEADS there are several tiles, all of them
    # whole.
    rows = -(-group // 8) * 8 if group <= HEADS else -(-group // HEADS) * HEADS
    tiles = -(-rows // HEADS)
    if num_splits is None:
        # Enough thread blocks that every multiprocessor has one.
        free = -(-multiprocessors() // (batch * kv_heads * tiles))
        num_splits = min(free, -(-keys // KEYS_OF_SPLIT))
    # At least a block of keys for each split.
    splits = max(1, min(num_splits, blocks))
    plan = GpuDecodePlan(
        kv_heads=kv_heads,
        keys=keys,
        width=width,
        dtype=q.dtype,
        # Partial results are float32 if shared memory has room for them.
        partial=q.dtype if splits == 1 or width > 192 else jnp.float32,
        quantized=k_cache.dtype == jnp.int8,
        tiles=tiles,
        splits=splits,
        block_kv=block_kv,
        # Fewer slots for wider heads, whose slots are larger.
        stages=stages or (4 if width <= 64 else 3 if width <= 128 else 2),
        score_scale=ScoreScale(scale, softcap),
        fast=interpret is None if fast is None else fast,
    )
    q_groups = q.reshape(batch, kv_heads, group, width)
    q_groups = jnp.pad(q_groups, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    k_cache = pad_to_8(k_cache, axis=2)
    v_cache = pad_to_8(v_cache, axis=2)
    inputs = {"q": q_groups, "k": k_cache, "v": v_cache, "lengths": lengths.astype(jnp.int32)}
    if plan.quantized:
        inputs |= {"k_scale": pad_to_8(k_scale, axis=2), "v_scale": pad_to_8(v_scale, axis=2)}
    out, lse = _run(plan, inputs, batch, rows, interpret)
    out = out.reshape(batch, kv_heads, splits, rows, width)[..., :group, :].astype(jnp.float32)
    lse = lse.reshape(batch, kv_heads, splits, rows)[..., :group]
    out, lse = (out[:, :, 0], lse[:, :, 0]) if splits == 1 else _merged(out, lse)
    return out.astype(q.dtype).reshape(q.shape), lse.reshape(batch, heads)


def _check_arrays(q, k_cache, v_cache, k_scale, v_scale) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"the GPU kernels take queries in bfloat16 or float16, not {q.dtype}")
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (q.dtype, jnp.int8):
        raise ValueError(
            "both caches must have the queries' dtype or be int8, not "
            f"{k_cache.dtype}, {v_cache.dtype}"
        )
    if (k_cache.dtype == jnp.int8) != (k_scale is not None and v_scale is not None):
        raise ValueError("int8 caches need k_scale and v_scale, and no other cache takes them")
    check_width(q.shape[-1])


def _merged(out, lse):
    """Merge the splits' outputs (B, K, splits, G, H) by their log-sum-exps (B, K, splits, G)."""
    top = lse.max(2, keepdims=True)
    # A row of length 0 has -inf in all splits, and -inf minus -inf would be NaN.
    shares = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top))
    mass = shares.sum(2)
    mass = jnp.where(mass == 0, 1.0, mass)
    out = (out * shares[..., None]).sum(2) / mass[..., None]
    return out, top[:, :, 0] + jnp.log(mass)


class Part(NamedTuple):
    """The part of the work that one thread block does: blocks first <= j < end of the keys."""

    row: Any
    head: Any  # key/value head
    first_head: Any  # of the query heads that share it
    split: Any
    length: Any
    first: Any
    end: Any


class GpuDecodePlan(NamedTuple):
    """The static part of the kernel."""

    kv_heads: int
    keys: int
    width: int
    dtype: Any
    partial: Any  # dtype of a split's result
    quantized: bool
    tiles: int  # of the query heads of a key/value head
    splits: int
    block_kv: int
    stages: int
    score_scale: ScoreScale
    fast: bool

    def part(self, r) -> Part:
        row, tile, split = (lax.axis_index(name) for name in ("row", "tile", "split"))
        head = lax.div(tile, jnp.int32(self.tiles))
        first_head = lax.rem(tile, jnp.int32(self.tiles)) * HEADS
        length = jnp.minimum(scalar(r.lengths, row), self.keys)
        # Blocks that hold a key of this row.
        live = lax.div(jnp.maximum(length, 0) + (self.block_kv - 1), jnp.int32(self.block_kv))
        # An equal share of the blocks that the row has, not of those that the cache holds.
        share = lax.div(live + (self.splits - 1), jnp.int32(self.splits))
        first = jnp.minimum(split * share, live)
        end = jnp.minimum(first + share, live)
        return Part(row, head, first_head, split, length, first, end)

    def scratch(self) -> dict:
        found = {
            "q_block": tiled((HEADS, self.width), self.dtype),
            "lse_block": plgpu.SMEM((HEADS,), jnp.float32),
            "loaded": plgpu.Barrier(),
        }
        if self.partial != self.dtype:
            found["out_block"] = tiled((HEADS, self.width), self.partial)
        for name in ("k", "v"):
            shape = (self.stages, self.block_kv, self.width)
            # Only the one computing warpgroup reads a slot. Scales are copied with their integers.
            found |= ring(name, self.stages, 1 + self.quantized, readers=1)
            if self.quantized:
                found[f"{name}_block"] = plgpu.SMEM(shape, jnp.int8)
                found[f"{name}_wide"] = tiled(shape[1:], self.dtype)
                found[f"{name}_scale_block"] = plgpu.SMEM(shape[:2], jnp.float32)
            else:
                found[f"{name}_block"] = tiled(shape, self.dtype)
        if not self.fast:
            found["weights"] = tiled((HEADS, self.block_kv), self.dtype, self.width)
        return found


def _run(plan: GpuDecodePlan, inputs: dict, batch: int, rows: int, interpret):
    """(out, lse) of every row, key/value head and split, merged into one axis."""
    # A float cache has no scales: the body then finds None under their names.
    names = ("k_scale", "v_scale", "k_wide", "v_wide", "k_scale_block", "v_scale_block")
    absent = dict.fromkeys(names)
    arrays = inputs.values()
    shape = (batch * plan.kv_heads * plan.splits, rows)
    outputs = {
        "out": result_like((*shape, plan.width), plan.partial, *arrays),
        "lse": result_like(shape, jnp.float32, *arrays),
    }

    def kernel(*refs, **scratch_refs):
        named = dict(zip((*inputs, *outputs), refs, strict=True))
        r = SimpleNamespace(**absent | named | scratch_refs)
        part = plan.part(r)
        pl.when(lax.axis_index("wg") == 0)(lambda: _compute(plan, r, part))
        pl.when(lax.axis_index("wg") == 1)(lambda: _feed(plan, r, part))

    results = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=plan.scratch(),
        grid=(plan.kv_heads * plan.tiles, plan.splits, batch),
        grid_names=("tile", "split", "row"),
        num_threads=2,
        thread_name="wg",
        kernel_name="flash_decode",
        interpret=interpret_params(interpret),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*arrays)
    return varying_like(results, *arrays)


def _feed(plan: GpuDecodePlan, r, part: Part) -> None:
    """The feeding warpgroup: copy the blocks of keys and values, in order, and wait until all are
    read."""

    def feed(j, _):
        at = pl.ds(j * plan.block_kv, plan.block_kv)
        step = j - part.first
        for cache, block, scales, scale_block, full, empty in (
            (r.k, r.k_block, r.k_scale, r.k_scale_block, r.k_full, r.k_empty),
            (r.v, r.v_block, r.v_scale, r.v_scale_block, r.v_full, r.v_empty),
        ):
            copies = [(cache.at[part.row, part.head, at], block)]
            if plan.quantized:
                copies.append((scales.at[part.row, part.head, at], scale_block))
            fill(step, plan.stages, full, empty, copies)

    def drain(i, _):
        for empty in (r.k_empty, r.v_empty):
            plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(plan.stages))])

    lax.fori_loop(part.first, part.end, feed, None)
    steps = part.end - part.first
    lax.fori_loop(jnp.maximum(steps - plan.stages, 0), steps, drain, None)


def _compute(plan: GpuDecodePlan, r, part: Part) -> None:
    """The computing warpgroup: attention of the tile's query heads to the part's keys."""
    score_scale = plan.score_scale
    shape = (HEADS, plan.block_kv)

    def operand(block, full, empty, wide, scales, slot):
        """A slot's keys or values as an operand, and their scales. Integers become floats in shared
        memory."""
        plgpu.barrier_wait(full.at[slot])
        if not plan.quantized:
            return block.at[slot], None
        # The product is of floats, and wgmma takes its right operand from shared memory alone.
        values = plgpu.load(block.at[slot], layout=TILE).astype(plan.dtype)
        factors = plgpu.load(scales.at[slot], layout=COLUMNS)
        release(empty.at[slot], True)
        return stored(values, wide), factors

    def block(j, carry):
        total, top, mass = carry
        slot = lax.rem(j - part.first, jnp.int32(plan.stages))
        right, factors = operand(r.k_block, r.k_full, r.k_empty, r.k_wide, r.k_scale_block, slot)
        scores = product(shape, r.q_block, right.transpose((1, 0)))
        if plan.quantized:
            # The scale of a key is common to its row of integers, so it multiplies the product.
            scores = scores * broadcast_along(factors, scores.shape, 1)
        else:
            plgpu.barrier_arrive(r.k_empty.at[slot])
        scores = score_scale.cap(scores)
        keys = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=TILE)
        position = j * plan.block_kv + keys
        scores = jnp.where(position < part.length, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1) * score_scale.factor)
        exponents = scores * score_scale.factor - broadcast_along(new_top, scores.shape, 0)
        weights = jnp.exp2(exponents)
        shrink = jnp.exp2(top - new_top)
        total = total * broadcast_along(shrink, total.shape, 0)
        mass = mass * shrink + weights.sum(axis=1)
        right, factors = operand(r.v_block, r.v_full, r.v_empty, r.v_wide, r.v_scale_block, slot)
        if plan.quantized:  # a key past the length may have any scale, even NaN
            # The scale of a value joins its key's weight instead of the integers.
            weights = weights * broadcast_along(factors, scores.shape, 1)
            weights = jnp.where(position < part.length, weights, 0.0)
        weights = weights.astype(plan.dtype)
        left = weights if plan.fast else stored(weights, r.weights)
        total = accumulate(total, left, right, plan.fast)
        if not plan.quantized:
            plgpu.barrier_arrive(r.v_empty.at[slot])
        return total, new_top, mass

    heads = pl.ds(part.first_head, HEADS)
    load([(r.q.at[part.row, part.head, heads], r.q_block)], r.loaded)
    start_top = plgpu.layout_cast(jnp.full((HEADS,), LOW, jnp.float32), ROWS)
    carry = (zeros((HEADS, plan.width)), start_top, zeros((HEADS,)))
    total, top, mass = lax.fori_loop(part.first, part.end, block, carry)
    blind = mass == 0.0
    mass = jnp.where(blind, 1.0, mass)
    # The queries are not needed any more, so their memory is used where the type agrees.
    out_block = r.q_block if plan.partial == plan.dtype else r.out_block
    out_block[...] = (total * broadcast_along(1.0 / mass, total.shape, 0)).astype(plan.partial)
    r.lse_block[...] = jnp.where(blind, -jnp.inf, top * (1 / LOG2E) + jnp.log(mass))
    plgpu.commit_smem()
    index = (part.row * plan.kv_heads + part.head) * plan.splits + part.split
    plgpu.copy_smem_to_gmem(out_block, r.out.at[index, heads])
    plgpu.copy_smem_to_gmem(r.lse_block, r.lse.at[index, heads])
    plgpu.wait_smem_to_gmem(0)
