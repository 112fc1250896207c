"""Backward pass of flash attention on Hopper GPUs: a kernel for dq, whose tiles are of queries, and
one for dk and dv, whose tiles are of keys (Dao 2023, algorithm 2).

Both accumulate in registers and in a fixed order, without atomics: the same bits every time. The
structure, the two forms and the limits are those of flash.py.
"""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads, H head width

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mtnlg_jax.model.kernels.blocks import Blocks, scope
from mtnlg_jax.model.kernels.gpu.common import (
    COLUMNS,
    COMPUTE,
    LOG2E,
    ROWS,
    TILE,
    ScoreScale,
    accumulate,
    accumulate_and_multiply,
    broadcast_along,
    check_arrays,
    check_blocks,
    launch,
    load,
    pad_to_8,
    product,
    release,
    ring,
    stored,
    tiled,
    two_products,
    visible_mask,
    zeros,
)
from mtnlg_jax.model.kernels.gpu.tiles import KeyTiles, QueryTiles
from mtnlg_jax.model.kernels.mask import Mask

SHARED_WIDTH = 128  # the widest head of which one warpgroup can hold both dk and dv
HANDED = 2  # blocks of weights on their way from one warpgroup to the other


def backward(
    q,
    k,
    v,
    mask: Mask,
    out,
    lse,
    d_out,
    d_lse,
    *,
    scale: float,
    softcap: float | None,
    dq_blocks: Blocks,
    dkv_blocks: Blocks,
    interpret=None,
    fast: bool | None = None,
):
    """Cotangents (dq, dk, dv) of forward()'s arguments from those of its results, d_out (B, S, N,
    H) and d_lse (B, N, S). dq_blocks and dkv_blocks: sizes in each of the two kernels."""
    check_arrays(q, k, v)
    fast = interpret is None if fast is None else fast
    # d score = weight * (d weight - delta); the log-sum-exp's own cotangent enters with the
    # opposite sign.
    delta = jnp.einsum("BSNH,BSNH->BNS", out, d_out, preferred_element_type=jnp.float32) - d_lse
    # In powers of two. A query that sees no key, or that is padding, has weights of 0, not NaN.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    operands = (q, k, v, d_out.astype(q.dtype), mask, lse, delta, ScoreScale(scale, softcap))
    return (
        _dq(*operands, dq_blocks, interpret, fast),
        *_dkv(*operands, dkv_blocks, interpret, fast),
    )


def _pad_queries(array, size: int, value: float = 0.0):
    return jnp.pad(array, ((0, 0), (0, 0), (0, size - array.shape[2])), constant_values=value)


# --- dq


def _dq(q, k, v, d_out, mask, lse, delta, score_scale, blocks, interpret, fast):
    width = q.shape[3]
    dtype = q.dtype
    check_blocks(width, "queries", blocks.q, "keys", blocks.kv)
    tiles = QueryTiles.of(q.shape, k.shape, mask, blocks)
    plan = tiles.plan
    inputs = tiles.inputs(q, k, v) | {
        "d_out": pad_to_8(d_out),
        "lse": _pad_queries(lse, tiles.padded, jnp.inf),
        "delta": _pad_queries(delta, tiles.padded),
    }
    scratch = tiles.scratch(width, dtype)
    for name in ("q", "d_out"):
        scratch[f"{name}_block"] = tiled((COMPUTE, blocks.q, width), dtype)
    for name in ("lse", "delta"):
        scratch[f"{name}_block"] = plgpu.SMEM((COMPUTE, blocks.q), jnp.float32)
    # Queries, cotangents, lse and delta.
    scratch["loaded"] = plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=4 + tiles.has_ids)
    if not fast:
        scratch["gradient"] = tiled((COMPUTE, blocks.q, blocks.kv), dtype, width)
    shape = (tiles.batch, tiles.heads, plan.queries, plan.keys, width)
    with scope("attention_dq", *shape, products=3, causal=mask.causal):
        (dq,) = launch(
            "flash_dq",
            _dq_body(tiles, score_scale, width, dtype, fast),
            tiles.feed,
            tiles.tiles,
            blocks.stages,
            ("k", "v"),
            inputs,
            {"dq": (inputs["q"].shape, dtype)},
            scratch,
            interpret,
        )
    return dq[:, : plan.queries]


def _dq_body(tiles: QueryTiles, score_scale: ScoreScale, width: int, dtype, fast: bool) -> Callable:
    """Return the work of a computing warpgroup on a tile of queries, as launch() expects it."""
    rows = tiles.blocks.q
    kv = tiles.blocks.kv
    plan = tiles.plan
    has_ids = tiles.has_ids

    def compute(r, wg, tile, step):
        row, head, base = tiles.locate(tile)
        start = base + wg * rows
        at = pl.ds(start, rows)
        copies = [
            (r.q.at[row, at, head], r.q_block),
            (r.d_out.at[row, at, head], r.d_out_block),
            (r.lse.at[row, head, at], r.lse_block),
            (r.delta.at[row, head, at], r.delta_block),
        ]
        if has_ids:
            copies.append((r.q_ids.at[row, at], r.q_ids_block))
        load([(source, target.at[wg]) for source, target in copies], r.loaded.at[wg])
        lse, delta = (plgpu.load(ref.at[wg], layout=ROWS) for ref in (r.lse_block, r.delta_block))
        q_ids = plgpu.load(r.q_ids_block.at[wg], layout=ROWS) if has_ids else None
        plgpu.commit_smem()
        span = plan.span(r, row, base, start, rows)

        def block(masked, j, total):
            slot = tiles.slot(step, j, span)
            plgpu.barrier_wait(r.k_full.at[slot])
            plgpu.barrier_wait(r.v_full.at[slot])

            def score_gradient(scores, d_weights):
                scores = score_scale.cap(scores)
                exponents = scores * score_scale.factor - broadcast_along(lse, scores.shape, 0)
                weights = score_scale.times_slope(jnp.exp2(exponents), scores)
                if masked:
                    kv_ids = None
                    if has_ids:
                        kv_ids = plgpu.load(r.kv_ids_block.at[slot], layout=COLUMNS)
                    position = span.offset + start
                    seen = visible_mask(
                        plan.mask, scores.shape, position, j * kv, span.length, q_ids, kv_ids
                    )
                    weights = weights if seen is None else jnp.where(seen, weights, 0.0)
                # Called as late as possible: the second product is computed during the
                # exponentials.
                centered = d_weights() - broadcast_along(delta, scores.shape, 0)
                return (weights * centered).astype(dtype)

            gradient = two_products(
                (rows, kv),
                (r.q_block.at[wg], r.k_block.at[slot].transpose((1, 0))),
                (r.d_out_block.at[wg], r.v_block.at[slot].transpose((1, 0))),
                score_gradient,
            )
            plgpu.barrier_arrive(r.v_empty.at[slot])
            left = gradient if fast else stored(gradient, r.gradient.at[wg])
            total = accumulate(total, left, r.k_block.at[slot], fast)
            release(r.k_empty.at[slot], has_ids)
            return total

        def flush(j, _):
            """Pass over a block that only the other warpgroup needs."""
            slot = tiles.slot(step, j, span)
            for full, empty in ((r.k_full, r.k_empty), (r.v_full, r.v_empty)):
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(empty.at[slot])

        total = span.walk(block, zeros((rows, width)))
        if plan.flushes(rows):
            lax.fori_loop(span.last, span.end, flush, None)
        # The scale of the scores is applied once to the sum and not to every block.
        r.q_block[wg] = (total * score_scale.scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r.q_block.at[wg], r.dq.at[row, at, head])
        plgpu.wait_smem_to_gmem(0)
        return step + span.count

    return compute


# --- dk and dv


def _dkv(q, k, v, d_out, mask, lse, delta, score_scale, blocks, interpret, fast):
    """The rows of every product are keys, so scores are transposed: (keys, queries).

    Up to SHARED_WIDTH each computing warpgroup has its own keys and sums both dk and dv
    (_dkv_shared). Wider heads leave no registers for that, so both have the same keys, and each
    does two of the four products (_dkv_apart)."""
    width = q.shape[3]
    dtype = q.dtype
    keys = k.shape[1]
    check_blocks(width, "keys", blocks.kv, "queries", blocks.q)
    apart = width > SHARED_WIDTH
    tiles = KeyTiles.of(q.shape, k.shape, mask, blocks, runs=1 if apart else COMPUTE)
    parts = _DkvParts(tiles, score_scale, width, dtype, fast)
    inputs = tiles.inputs(q, k, v, d_out) | {
        "lse": _pad_queries(lse, tiles.plan.padded, jnp.inf),
        "delta": _pad_queries(delta, tiles.plan.padded),
    }
    scratch = tiles.scratch(width, dtype)
    # Keys and values, or one of the two.
    operands = 1 if apart else 2
    scratch["loaded"] = plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=operands + tiles.has_ids)
    shape = (blocks.kv, blocks.q)
    if apart:
        scratch["handed"] = tiled((HANDED, *shape), dtype)
        scratch |= ring("handed", HANDED, 1, readers=1)
    if not fast:
        stored_shape = shape if apart else (COMPUTE, *shape)
        scratch |= {name: tiled(stored_shape, dtype, width) for name in ("weights", "gradient")}
    batch, queries, heads, _ = q.shape
    with scope("attention_dkv", batch, heads, queries, keys, width, products=4, causal=mask.causal):
        results = launch(
            "flash_dkv",
            _dkv_apart(parts) if apart else _dkv_shared(parts),
            tiles.feed,
            tiles.tiles,
            blocks.stages,
            ("q", "d_out"),
            inputs,
            dict.fromkeys(("dk", "dv"), (inputs["k"].shape, dtype)),
            scratch,
            interpret,
            # The shared form holds both sums in registers, and has none left for the walk.
            walks=apart,
        )
    return tuple(x[:, :keys] for x in results)


class _DkvParts(NamedTuple):
    """The parts of the kernel for dk and dv that do not depend on how its products are shared."""

    tiles: KeyTiles
    score_scale: ScoreScale
    width: int
    dtype: Any
    fast: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of a block of scores: (keys, queries)."""
        return self.tiles.blocks.kv, self.tiles.blocks.q

    def zeros(self):
        return zeros((self.tiles.blocks.kv, self.width))

    def begin(self, r, row, head, at, wg, *operands):
        """Load a warpgroup's keys, values or both; return the keys' segment ids or None."""
        copies = [(x.at[row, at, head], block) for x, block in operands]
        if self.tiles.has_ids:
            copies.append((r.kv_ids.at[row, at], r.kv_ids_block.at[wg]))
        load(copies, r.loaded.at[wg])
        if not self.tiles.has_ids:
            return None
        kv_ids = plgpu.load(r.kv_ids_block.at[wg], layout=ROWS)
        plgpu.commit_smem()
        return kv_ids

    def end(self, row, head, at, *results):
        """Store (sum, block in shared memory, output) triples."""
        # The blocks held keys and values, which are not needed any more.
        for total, block, _ in results:
            block[...] = total.astype(self.dtype)
        plgpu.commit_smem()
        for _, block, x in results:
            plgpu.copy_smem_to_gmem(block, x.at[row, at, head])
        plgpu.wait_smem_to_gmem(0)

    def weights(self, r, slot, scores, masked, i, start, span, kv_ids):
        """The weights of block i of queries, and the same times the derivative of the softcap."""
        scores = self.score_scale.cap(scores)
        # An lse of inf, of padding and of queries that see nothing, gives weights of 0.
        lse = plgpu.load(r.lse_block.at[slot], layout=COLUMNS)
        exponents = scores * self.score_scale.factor - broadcast_along(lse, scores.shape, 1)
        weights = jnp.exp2(exponents)
        if masked:
            q_ids = None
            if self.tiles.has_ids:
                q_ids = plgpu.load(r.q_ids_block.at[slot], layout=COLUMNS)
            position = span.offset + i * self.tiles.blocks.q
            mask = self.tiles.plan.mask
            seen = visible_mask(
                mask, scores.shape, position, start, span.length, q_ids, kv_ids, of_keys=True
            )
            weights = weights if seen is None else jnp.where(seen, weights, 0.0)
        return weights, self.score_scale.times_slope(weights, scores)


def _dkv_shared(parts: _DkvParts) -> Callable:
    """Return the work of a computing warpgroup on its half of a tile of keys: both dk and dv."""
    tiles, score_scale, _, dtype, fast = parts
    rows = tiles.blocks.kv

    def compute(r, wg, tile, step):
        row, head, base = tiles.locate(tile)
        start = base + wg * rows
        at = pl.ds(start, rows)
        k_block = r.k_block.at[wg]
        v_block = r.v_block.at[wg]
        kv_ids = parts.begin(r, row, head, at, wg, (r.k, k_block), (r.v, v_block))
        span = tiles.plan.span(r, row, base, start, rows)

        def block(step, masked, i, totals):
            dk, dv = totals
            slot = tiles.slot(step, i, span)
            plgpu.barrier_wait(r.q_full.at[slot])
            plgpu.barrier_wait(r.d_out_full.at[slot])
            scores = product(parts.shape, k_block, r.q_block.at[slot].transpose((1, 0)))
            weights, sloped = parts.weights(r, slot, scores, masked, i, start, span, kv_ids)
            weights = weights.astype(dtype)
            left = weights if fast else stored(weights, r.weights.at[wg])
            right = r.d_out_block.at[slot]
            dv, d_weights = accumulate_and_multiply(
                dv, left, right, v_block, right.transpose((1, 0)), fast
            )
            delta = plgpu.load(r.delta_block.at[slot], layout=COLUMNS)
            centered = d_weights - broadcast_along(delta, scores.shape, 1)
            gradient = (sloped * centered).astype(dtype)
            # delta was read by ordinary loads, hence the fence.
            release(r.d_out_empty.at[slot], True)
            left = gradient if fast else stored(gradient, r.gradient.at[wg])
            dk = accumulate(dk, left, r.q_block.at[slot], fast)
            # lse and ids were read by ordinary loads.
            release(r.q_empty.at[slot], True)
            return dk, dv

        dk, dv = tiles.visit(span, step, block, (parts.zeros(), parts.zeros()))
        parts.end(row, head, at, (dk * score_scale.scale, k_block, r.dk), (dv, v_block, r.dv))
        return step + tiles.group * span.count

    return compute


def _dkv_apart(parts: _DkvParts) -> Callable:
    """Return the work of two computing warpgroups on a shared tile of keys.

    The first one computes the weights and dv, and passes the weights to the second one, which
    computes dk.
    """
    tiles, score_scale, _, dtype, fast = parts
    rows = tiles.blocks.kv

    def compute(r, wg, tile, step):
        row, head, start = tiles.locate(tile)
        at = pl.ds(start, rows)
        span = tiles.plan.span(r, row, start, start, rows)

        def block_dv(kv_ids, step, masked, i, dv):
            slot = tiles.slot(step, i, span)
            count = step + i - span.first
            plgpu.barrier_wait(r.q_full.at[slot])
            scores = product(parts.shape, r.k_block.at[0], r.q_block.at[slot].transpose((1, 0)))
            weights, sloped = parts.weights(r, slot, scores, masked, i, start, span, kv_ids)
            release(r.q_empty.at[slot], True)
            handed = lax.rem(count, jnp.int32(HANDED))

            @pl.when(count >= HANDED)
            def _():
                # The second warpgroup may be up to HANDED blocks behind.
                plgpu.barrier_wait(r.handed_empty.at[handed])

            # Handed over before this warpgroup's own product, so that the other one can start.
            r.handed[handed] = sloped.astype(dtype)
            plgpu.barrier_arrive(r.handed_full.at[handed])
            weights = weights.astype(dtype)
            plgpu.barrier_wait(r.d_out_full.at[slot])
            left = weights if fast else stored(weights, r.weights)
            dv = accumulate(dv, left, r.d_out_block.at[slot], fast)
            plgpu.barrier_arrive(r.d_out_empty.at[slot])
            return dv

        def block_dk(step, masked, i, dk):
            slot = tiles.slot(step, i, span)
            count = step + i - span.first
            plgpu.barrier_wait(r.d_out_full.at[slot])
            right = r.d_out_block.at[slot].transpose((1, 0))
            d_weights = product(parts.shape, r.v_block.at[0], right)
            delta = plgpu.load(r.delta_block.at[slot], layout=COLUMNS)
            centered = d_weights - broadcast_along(delta, d_weights.shape, 1)
            release(r.d_out_empty.at[slot], True)
            handed = lax.rem(count, jnp.int32(HANDED))
            # As late as possible: its own product is done while the weights are on their way.
            plgpu.barrier_wait(r.handed_full.at[handed])
            sloped = plgpu.load(r.handed.at[handed], layout=TILE).astype(jnp.float32)
            gradient = (sloped * centered).astype(dtype)
            plgpu.barrier_arrive(r.handed_empty.at[handed])
            plgpu.barrier_wait(r.q_full.at[slot])
            left = gradient if fast else stored(gradient, r.gradient)
            dk = accumulate(dk, left, r.q_block.at[slot], fast)
            plgpu.barrier_arrive(r.q_empty.at[slot])
            return dk

        @pl.when(wg == 0)
        def _():
            kv_ids = parts.begin(r, row, head, at, 0, (r.k, r.k_block.at[0]))
            block = functools.partial(block_dv, kv_ids)
            dv = tiles.visit(span, step, block, parts.zeros())
            parts.end(row, head, at, (dv, r.k_block.at[0], r.dv))

        @pl.when(wg == 1)
        def _():
            # The gradient of one operand leaves through the memory of the other: each warpgroup may
            # only overwrite what it alone reads.
            parts.begin(r, row, head, at, 1, (r.v, r.v_block.at[0]))
            # The weights come masked from the other warpgroup: one section without a mask.
            whole = span._replace(
                sections=(False, True, False), whole=span.first, whole_end=span.last
            )
            dk = tiles.visit(whole, step, block_dk, parts.zeros())
            parts.end(row, head, at, (dk * score_scale.scale, r.v_block.at[0], r.dk))

        return step + tiles.group * span.count

    return compute
