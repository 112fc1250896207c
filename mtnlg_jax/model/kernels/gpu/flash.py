"""Flash attention on Hopper GPUs: the forward pass in Pallas (Mosaic GPU).

A thread block has three warpgroups. The last one feeds: it copies blocks of keys and values to
shared memory with the TMA, into a ring of ``stages`` slots. The other two compute, each for
``blocks.q`` queries of its own, and take turns: while one does its softmax, the other uses the
tensor cores. There is one thread block for every multiprocessor, and each walks over many tiles. A
tile is the work of both computing warpgroups for one row, one head and one run of queries (Shah et
al. 2024, FlashAttention-3, without its second overlap, of a warpgroup's softmax with its own
product).

Every kernel has two forms of one body. The fast form keeps the attention weights in registers and
adds to accumulators in place. Pallas' interpreter can do neither, so in the other form the weights
go through shared memory and every product has a new accumulator. ``fast`` chooses the form; by
default it is True unless the kernel is interpreted.

Head widths are multiples of 32 up to 256; dtypes are bfloat16 and float16.
"""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads, H head width

from collections.abc import Callable

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mtnlg_jax.model.kernels.blocks import Blocks, scope
from mtnlg_jax.model.kernels.gpu.common import (
    COLUMNS,
    COMPUTE,
    LOG2E,
    LOW,
    ROWS,
    ScoreScale,
    accumulate,
    broadcast_along,
    check_arrays,
    check_blocks,
    launch,
    load,
    release,
    slope_of,
    stored,
    tiled,
    visible_mask,
    with_distances,
    zeros,
)
from mtnlg_jax.model.kernels.gpu.flash_backward import backward
from mtnlg_jax.model.kernels.gpu.tiles import QueryTiles
from mtnlg_jax.model.kernels.mask import Mask

__all__ = ["backward", "forward"]


def forward(
    q,
    k,
    v,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    alibi_slopes=None,
    blocks: Blocks,
    interpret=None,
    fast: bool | None = None,
):
    """Return the attention of q (B, S, N, H) to k and v (B, T, K, H), (B, S, N, H), and its
    log-sum-exp, float32 (B, N, S).

    Args:
      alibi_slopes: float32 (N,) or None.
      interpret: parameters of Pallas' GPU interpreter (or True), or None to compile.
      fast: the form of the kernel, as the docstring of this file explains. None: fast unless
        interpreted.
    """
    check_arrays(q, k, v)
    check_blocks(q.shape[3], "queries", blocks.q, "keys", blocks.kv)
    fast = interpret is None if fast is None else fast
    width = q.shape[3]
    tiles = QueryTiles.of(q.shape, k.shape, mask, blocks)
    plan = tiles.plan
    score_scale = ScoreScale(scale, softcap)
    inputs = tiles.inputs(q, k, v)
    if alibi_slopes is not None:
        inputs["slopes"] = score_scale.slopes(alibi_slopes)
    scratch = tiles.scratch(width, q.dtype) | {
        "q_block": tiled((COMPUTE, blocks.q, width), q.dtype),
        "lse_block": plgpu.SMEM((COMPUTE, blocks.q), jnp.float32),
        "loaded": plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=1 + tiles.has_ids),
        # One barrier for both computing warpgroups: it opens when each has arrived.
        "turn": plgpu.Barrier(num_arrivals=COMPUTE),
    }
    if not fast:
        scratch["weights"] = tiled((COMPUTE, blocks.q, blocks.kv), q.dtype, width)
    outputs = {
        "out": (inputs["q"].shape, q.dtype),
        "lse": ((tiles.batch, tiles.heads, tiles.padded), jnp.float32),
    }
    shape = (tiles.batch, tiles.heads, plan.queries, plan.keys, width)
    with scope("attention_forward", *shape, products=2, causal=mask.causal):
        out, lse = launch(
            "flash_forward",
            _forward_body(tiles, score_scale, width, q.dtype, fast),
            tiles.feed,
            tiles.tiles,
            blocks.stages,
            ("k", "v"),
            inputs,
            outputs,
            scratch,
            interpret,
        )
    return out[:, : plan.queries], lse[..., : plan.queries]


def _forward_body(
    tiles: QueryTiles, score_scale: ScoreScale, width: int, dtype, fast: bool
) -> Callable:
    """Return the work of a computing warpgroup on a tile, in the form that launch() expects."""
    rows = tiles.blocks.q
    kv = tiles.blocks.kv
    plan = tiles.plan
    has_ids = tiles.has_ids

    def compute(r, wg, tile, step):
        row, head, base = tiles.locate(tile)
        start = base + wg * rows
        at = pl.ds(start, rows)
        copies = [(r.q.at[row, at, head], r.q_block.at[wg])]
        if has_ids:
            copies.append((r.q_ids.at[row, at], r.q_ids_block.at[wg]))
        load(copies, r.loaded.at[wg])
        q_ids = plgpu.load(r.q_ids_block.at[wg], layout=ROWS) if has_ids else None
        span = plan.span(r, row, base, start, rows)
        slope = slope_of(r, head)

        def turn():
            """Hand the tensor cores to the other warpgroup and wait for them to come back."""
            plgpu.barrier_arrive(r.turn)
            plgpu.barrier_wait(r.turn)

        def await_keys(j):
            slot = tiles.slot(step, j, span)
            pl.when(j < span.end)(lambda: plgpu.barrier_wait(r.k_full.at[slot]))

        def block(masked, j, carry):
            total, top, mass = carry
            slot = tiles.slot(step, j, span)

            def multiply(scores):
                plgpu.wgmma(scores, r.q_block.at[wg], r.k_block.at[slot].transpose((1, 0)))
                turn()  # the other warpgroup may start its product while this one is computed
                return scores[...]

            scores = score_scale.cap(pl.run_scoped(multiply, plgpu.ACC((rows, kv), jnp.float32)))
            kv_ids = plgpu.load(r.kv_ids_block.at[slot], layout=COLUMNS) if has_ids else None
            # Released here, so that the next keys are copied during the softmax.
            release(r.k_empty.at[slot], has_ids)
            where = (span.offset + start, j * kv)
            scores = with_distances(scores, slope, *where)
            if masked:
                seen = visible_mask(plan.mask, scores.shape, *where, span.length, q_ids, kv_ids)
                scores = scores if seen is None else jnp.where(seen, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=1) * score_scale.factor)
            exponents = scores * score_scale.factor - broadcast_along(new_top, scores.shape, 0)
            weights = jnp.exp2(exponents)
            shrink = jnp.exp2(top - new_top)
            total = total * broadcast_along(shrink, total.shape, 0)
            mass = mass * shrink + weights.sum(axis=1)
            weights = weights.astype(dtype)
            if fast:
                # No part of the softmax may move past the barrier, into the other's turn.
                held = lax.optimization_barrier((total, mass, new_top, weights))
                total, mass, new_top, weights = held
            plgpu.barrier_arrive(r.turn)
            plgpu.barrier_wait(r.v_full.at[slot])
            plgpu.barrier_wait(r.turn)
            left = weights if fast else stored(weights, r.weights.at[wg])
            right = r.v_block.at[slot]
            total = accumulate(total, left, right, fast, meanwhile=lambda: await_keys(j + 1))
            plgpu.barrier_arrive(r.v_empty.at[slot])
            return total, new_top, mass

        def flush(j, _):
            """Skip a block that only the other warpgroup needs, and keep the turns in step."""
            slot = tiles.slot(step, j, span)
            turn()
            plgpu.barrier_arrive(r.k_empty.at[slot])
            plgpu.barrier_wait(r.v_full.at[slot])
            turn()
            plgpu.barrier_arrive(r.v_empty.at[slot])
            await_keys(j + 1)

        await_keys(span.first)
        # The second warpgroup starts one turn later; the first one makes up for it at the end.
        pl.when(wg == 1)(turn)
        start_top = plgpu.layout_cast(jnp.full((rows,), LOW, jnp.float32), ROWS)
        carry = (zeros((rows, width)), start_top, zeros((rows,)))
        total, top, mass = span.walk(block, carry)
        if plan.flushes(rows):
            lax.fori_loop(span.last, span.end, flush, None)
        pl.when(wg == 0)(turn)
        # A query that sees nothing: 0 and -inf.
        blind = mass == 0.0
        mass = jnp.where(blind, 1.0, mass)
        # The queries are no longer needed, so the output takes their place.
        r.q_block[wg] = (total * broadcast_along(1.0 / mass, total.shape, 0)).astype(dtype)
        r.lse_block[wg] = jnp.where(blind, -jnp.inf, top * (1 / LOG2E) + jnp.log(mass))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r.q_block.at[wg], r.out.at[row, at, head])
        plgpu.copy_smem_to_gmem(r.lse_block.at[wg], r.lse.at[row, head, at])
        plgpu.wait_smem_to_gmem(0)  # the next tile's queries go where the output was
        return step + span.count

    return compute
