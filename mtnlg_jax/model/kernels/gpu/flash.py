"""Flash attention on Hopper GPUs: the forward pass in Pallas (Mosaic GPU).

A thread block has three warpgroups. The last one feeds: it copies blocks of keys and values to
shared memory with the TMA, in a ring of ``stages`` slots. The others compute, each for ``blocks.q``
queries of its own, and take turns: while one does its softmax, the other has the tensor cores. The
grid has one thread block for every multiprocessor and each walks over many tiles; a tile is what
both computing warpgroups do for one row, one head and one run of queries (Shah et al. 2024,
FlashAttention-3, without its second overlap, of a warpgroup's softmax with its own product).

Every kernel has two forms of one body. The fast one keeps the weights in registers and adds to
accumulators in place. Pallas' interpreter can do neither, so in its form the weights go through
shared memory and every product has a fresh accumulator. ``fast`` picks the form; it is so wherever
nothing is interpreted.

Head widths are multiples of 32 up to 256, dtypes bfloat16 and float16."""

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
    OverKeys,
    Weigh,
    accumulate,
    along,
    check,
    check_blocks,
    launch,
    load,
    release,
    see,
    stored,
    tiled,
    zeros,
)
from mtnlg_jax.model.kernels.gpu.flash_backward import backward
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
    blocks: Blocks,
    interpret=None,
    fast=None,
):
    """Attention of q (B, T, N, H) to k and v (B, S, K, H): out (B, T, N, H) and its log-sum-exp,
    float32 (B, N, T).

    interpret: parameters of Pallas' GPU interpreter (or True), or None to compile. fast: the form,
        see above."""
    check(q, k, v)
    check_blocks(q.shape[3], "queries", blocks.q, "keys", blocks.kv)
    width = q.shape[3]
    dtype = q.dtype
    rows = blocks.q
    kv = blocks.kv
    fast = interpret is None if fast is None else fast
    visit = OverKeys.of(q.shape, k.shape, mask, blocks)
    weigh = Weigh(scale, softcap)
    plan = visit.plan
    slot_of = visit.slot
    ids = visit.ids

    def compute(r, wg, tile, step):
        row, head, base = visit.place(tile)
        start = base + wg * rows
        at = pl.ds(start, rows)
        copies = [(r.q.at[row, at, head], r.q_block.at[wg])]
        if ids:
            copies.append((r.q_ids.at[row, at], r.q_ids_block.at[wg]))
        load(copies, r.loaded.at[wg])
        q_ids = plgpu.load(r.q_ids_block.at[wg], layout=ROWS) if ids else None
        span = plan.span(r, row, base, start, rows)

        def turn():
            plgpu.barrier_arrive(r.turn)
            plgpu.barrier_wait(r.turn)

        def await_keys(j):
            slot = slot_of(step, j, span)
            pl.when(j < span.end)(lambda: plgpu.barrier_wait(r.k_full.at[slot]))

        def block(masked, j, carry):
            total, top, mass = carry
            slot = slot_of(step, j, span)

            def multiply(scores):
                plgpu.wgmma(scores, r.q_block.at[wg], r.k_block.at[slot].transpose((1, 0)))
                turn()  # the product is on its way: the other warpgroup may start its own
                return scores[...]

            scores = weigh.cap(pl.run_scoped(multiply, plgpu.ACC((rows, kv), jnp.float32)))
            kv_ids = plgpu.load(r.kv_ids_block.at[slot], layout=COLUMNS) if ids else None
            release(r.k_empty.at[slot], ids)
            if masked:
                seen = see(
                    mask, scores.shape, span.offset + start, j * kv, span.length, q_ids, kv_ids
                )
                scores = scores if seen is None else jnp.where(seen, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=1) * weigh.factor)
            weights = jnp.exp2(scores * weigh.factor - along(new_top, scores.shape, 0))
            shrink = jnp.exp2(top - new_top)
            total = total * along(shrink, total.shape, 0)
            mass = mass * shrink + weights.sum(axis=1)
            weights = weights.astype(dtype)
            # nothing of the softmax is to slip behind the barrier, into the other warpgroup's turn
            if fast:
                total, mass, new_top, weights = lax.optimization_barrier(
                    (total, mass, new_top, weights)
                )
            plgpu.barrier_arrive(r.turn)
            plgpu.barrier_wait(r.v_full.at[slot])
            plgpu.barrier_wait(r.turn)
            left = weights if fast else stored(weights, r.weights.at[wg])
            total = accumulate(
                total, left, r.v_block.at[slot], fast, meanwhile=lambda: await_keys(j + 1)
            )
            plgpu.barrier_arrive(r.v_empty.at[slot])
            return total, new_top, mass

        def flush(j, _):
            """Passes over a block that only the other warpgroup needs."""
            slot = slot_of(step, j, span)
            turn()
            plgpu.barrier_arrive(r.k_empty.at[slot])
            plgpu.barrier_wait(r.v_full.at[slot])
            turn()
            plgpu.barrier_arrive(r.v_empty.at[slot])
            await_keys(j + 1)

        await_keys(span.first)
        pl.when(wg == 1)(turn)
        start_top = plgpu.layout_cast(jnp.full((rows,), LOW, jnp.float32), ROWS)
        total, top, mass = span.walk(block, (zeros((rows, width)), start_top, zeros((rows,))))
        if plan.flushes(rows):
            lax.fori_loop(span.last, span.end, flush, None)
        pl.when(wg == 0)(turn)
        nothing = mass == 0.0
        mass = jnp.where(nothing, 1.0, mass)
        r.q_block[wg] = (total * along(1.0 / mass, total.shape, 0)).astype(dtype)
        r.lse_block[wg] = jnp.where(nothing, -jnp.inf, top * (1 / LOG2E) + jnp.log(mass))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r.q_block.at[wg], r.out.at[row, at, head])
        plgpu.copy_smem_to_gmem(r.lse_block.at[wg], r.lse.at[row, head, at])
        plgpu.wait_smem_to_gmem(0)  # the next tile's queries go where the output was
        return step + span.count

    inputs = visit.inputs(q, k, v)
    scratch = visit.scratch(width, dtype)
    scratch |= {
        "q_block": tiled((COMPUTE, rows, width), dtype),
        "lse_block": plgpu.SMEM((COMPUTE, rows), jnp.float32),
        "loaded": plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=1 + ids),
        "turn": plgpu.Barrier(num_arrivals=COMPUTE),
    }
    if not fast:
        scratch["weights"] = tiled((COMPUTE, rows, kv), dtype, width)
    outputs = {
        "out": (inputs["q"].shape, dtype),
        "lse": ((visit.batch, visit.heads, visit.padded), jnp.float32),
    }
    with scope(
        "attention_forward",
        visit.batch,
        visit.heads,
        plan.queries,
        plan.keys,
        width,
        2,
        mask.causal,
    ):
        out, lse = launch(
            "flash_forward",
            compute,
            visit.feed,
            visit.tiles,
            blocks.stages,
            ("k", "v"),
            inputs,
            outputs,
            scratch,
            interpret,
        )
    return out[:, : plan.queries], lse[..., : plan.queries]
