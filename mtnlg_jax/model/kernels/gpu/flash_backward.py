"""Backward pass of flash attention on Hopper GPUs: a kernel for dq, whose tiles are of queries, and
one for dk and dv, whose tiles are of keys (Dao 2023, algorithm 2). Both add up in registers and in
a fixed order: no atomics, the same bits every time. Structure, forms and limits are those of
    flash_gpu."""

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mtnlg_jax.model.kernels.blocks import Blocks, scope
from mtnlg_jax.model.kernels.gpu.common import (
    COLUMNS,
    COMPUTE,
    L2_BYTES,
    LOG2E,
    ROWS,
    TILE,
    OverKeys,
    Plan,
    Weigh,
    accumulate,
    accumulate_and_multiply,
    along,
    check,
    check_blocks,
    eights,
    fill,
    launch,
    load,
    pad_to,
    product,
    release,
    ring,
    see,
    split_tile,
    stored,
    tiled,
    two_products,
    zeros,
)
from mtnlg_jax.model.kernels.mask import Mask

SHARED_WIDTH = 128  # the widest head for which a warpgroup has both dk and dv
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
    fast=None,
):
    """Cotangents (dq, dk, dv) of forward()'s arguments, from those of its results: d_out (B, T, N,
    H) and d_lse (B, N, T). The blocks: of queries and keys, in each of the two kernels."""
    check(q, k, v)
    fast = interpret is None if fast is None else fast
    # d score = weight * (d weight - delta); the log-sum-exp's own cotangent enters with the other
    # sign.
    delta = jnp.einsum("BTNH,BTNH->BNT", out, d_out, preferred_element_type=jnp.float32) - d_lse
    # In powers of two. A query that sees no key, or that is none, has infinitely small weights, not
    # NaN.
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2E)
    arguments = (q, k, v, d_out.astype(q.dtype), mask, lse, delta, Weigh(scale, softcap))
    return (
        _dq(*arguments, dq_blocks, interpret, fast),
        *_dkv(*arguments, dkv_blocks, interpret, fast),
    )


def pad_queries(array, size: int, value: float = 0.0):
    return jnp.pad(array, ((0, 0), (0, 0), (0, size - array.shape[2])), constant_values=value)


def _dq(q, k, v, d_out, mask, lse, delta, weigh, blocks, interpret, fast):
    width = q.shape[3]
    dtype = q.dtype
    rows = blocks.q
    kv = blocks.kv
    check_blocks(width, "queries", rows, "keys", kv)
    visit = OverKeys.of(q.shape, k.shape, mask, blocks)
    plan = visit.plan
    slot_of = visit.slot
    ids = visit.ids

    def compute(r, wg, tile, step):
        row, head, base = visit.place(tile)
        start = base + wg * rows
        at = pl.ds(start, rows)
        copies = [
            (r.q.at[row, at, head], r.q_block),
            (r.d_out.at[row, at, head], r.d_out_block),
            (r.lse.at[row, head, at], r.lse_block),
            (r.delta.at[row, head, at], r.delta_block),
        ]
        if ids:
            copies.append((r.q_ids.at[row, at], r.q_ids_block))
        load([(source, target.at[wg]) for source, target in copies], r.loaded.at[wg])
        lse, delta = (plgpu.load(ref.at[wg], layout=ROWS) for ref in (r.lse_block, r.delta_block))
        q_ids = plgpu.load(r.q_ids_block.at[wg], layout=ROWS) if ids else None
        plgpu.commit_smem()
        span = plan.span(r, row, base, start, rows)

        def block(masked, j, total):
            slot = slot_of(step, j, span)
            plgpu.barrier_wait(r.k_full.at[slot])
            plgpu.barrier_wait(r.v_full.at[slot])

            def use(scores, d_weights):
                scores = weigh.cap(scores)
                weights = jnp.exp2(scores * weigh.factor - along(lse, scores.shape, 0))
                weights = weigh.sloped(weights, scores)
                if masked:
                    kv_ids = plgpu.load(r.kv_ids_block.at[slot], layout=COLUMNS) if ids else None
                    seen = see(
                        mask, scores.shape, span.offset + start, j * kv, span.length, q_ids, kv_ids
                    )
                    weights = weights if seen is None else jnp.where(seen, weights, 0.0)
                return (weights * (d_weights() - along(delta, scores.shape, 0))).astype(dtype)

            gradient = two_products(
                (rows, kv),
                (r.q_block.at[wg], r.k_block.at[slot].transpose((1, 0))),
                (r.d_out_block.at[wg], r.v_block.at[slot].transpose((1, 0))),
                use,
            )
            plgpu.barrier_arrive(r.v_empty.at[slot])
            left = gradient if fast else stored(gradient, r.gradient.at[wg])
            total = accumulate(total, left, r.k_block.at[slot], fast)
            release(r.k_empty.at[slot], ids)
            return total

        def flush(j, _):
            """Passes over a block that only the other warpgroup needs."""
            slot = slot_of(step, j, span)
            for full, empty in ((r.k_full, r.k_empty), (r.v_full, r.v_empty)):
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(empty.at[slot])

        total = span.walk(block, zeros((rows, width)))
        if plan.flushes(rows):
            lax.fori_loop(span.last, span.end, flush, None)
        r.q_block[wg] = (total * weigh.scale).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(r.q_block.at[wg], r.dq.at[row, at, head])
        plgpu.wait_smem_to_gmem(0)
        return step + span.count

    inputs = visit.inputs(q, k, v)
    scratch = visit.scratch(width, dtype)
    inputs |= {
        "d_out": eights(d_out),
        "lse": pad_queries(lse, visit.padded, jnp.inf),
        "delta": pad_queries(delta, visit.padded),
    }
    for name in ("q", "d_out"):
        scratch[f"{name}_block"] = tiled((COMPUTE, rows, width), dtype)
    for name in ("lse", "delta"):
        scratch[f"{name}_block"] = plgpu.SMEM((COMPUTE, rows), jnp.float32)
    scratch["loaded"] = plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=4 + ids)
    if not fast:
        scratch["gradient"] = tiled((COMPUTE, rows, kv), dtype, width)
    with scope(
        "attention_dq", visit.batch, visit.heads, plan.queries, plan.keys, width, 3, mask.causal
    ):
        (dq,) = launch(
            "flash_dq",
            compute,
            visit.feed,
            visit.tiles,
            blocks.stages,
            ("k", "v"),
            inputs,
            {"dq": (inputs["q"].shape, dtype)},
            scratch,
            interpret,
        )
    return dq[:, : plan.queries]


def _dkv(q, k, v, d_out, mask, lse, delta, weigh, blocks, interpret, fast):
    """Rows of every product are keys: the scores are transposed. The query heads of a key/value
    head come one after the other and add to the same sums.

    Up to SHARED_WIDTH each computing warpgroup has its own keys, with sums for both dk and dv.
    Wider heads leave no
    registers for that: there both have the same keys, the first one has the weights and dv, and
    hands the weights over to the second one, which has dk. Either does two of the four products."""
    batch, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    dtype = q.dtype
    rows = blocks.kv
    size = blocks.q
    stages = blocks.stages
    check_blocks(width, "keys", rows, "queries", size)
    ids = mask.q_ids is not None
    apart = width > SHARED_WIDTH
    own = 1 if apart else COMPUTE  # runs of keys of a tile
    plan = Plan(mask, queries, keys, own * rows, size, of_keys=True)
    group = heads // kv_heads
    number = plan.number
    section = max(1, L2_BYTES // (4 * queries * width * group))

    def place(tile):
        """Row, key/value head and place of the first key of a tile. Most queries see the first
        keys."""
        pair, number_kv = split_tile(tile, batch * kv_heads, number, section)
        return (
            lax.div(pair, jnp.int32(kv_heads)),
            lax.rem(pair, jnp.int32(kv_heads)),
            number_kv * plan.outer,
        )

    def slot_of(step, i, span):
        return lax.rem(step + i - span.first, jnp.int32(stages))

    def visit(span, step, block, totals):
        """Calls block(step, masked, i, totals) for every query head and block of queries."""

        def one_head(g, totals):
            return span.walk(functools.partial(block, step + g * span.count), totals)

        return lax.fori_loop(0, group, one_head, totals)

    def weights_of(r, slot, scores, masked, position, key, span, kv_ids):
        """Weights of a block, and the same times the derivative of the softcap."""
        scores = weigh.cap(scores)
        lse = plgpu.load(r.lse_block.at[slot], layout=COLUMNS)
        weights = jnp.exp2(scores * weigh.factor - along(lse, scores.shape, 1))
        if masked:
            q_ids = plgpu.load(r.q_ids_block.at[slot], layout=COLUMNS) if ids else None
            seen = see(mask, scores.shape, position, key, span.length, q_ids, kv_ids, True)
            weights = weights if seen is None else jnp.where(seen, weights, 0.0)
        return weights, weigh.sloped(weights, scores)

    def begin(r, row, head, at, wg, *operands):
        """Loads a warpgroup's keys, values or both; returns the keys' segment ids."""
        copies = [(x.at[row, at, head], block) for x, block in operands]
        if ids:
            copies.append((r.kv_ids.at[row, at], r.kv_ids_block.at[wg]))
        load(copies, r.loaded.at[wg])
        kv_ids = plgpu.load(r.kv_ids_block.at[wg], layout=ROWS) if ids else None
        if ids:
            plgpu.commit_smem()
        return kv_ids

    def end(row, head, at, *results):
        for total, block, _ in results:
            block[...] = total.astype(dtype)
        plgpu.commit_smem()
        for _, block, x in results:
            plgpu.copy_smem_to_gmem(block, x.at[row, at, head])
        plgpu.wait_smem_to_gmem(0)

    def compute_both(r, wg, tile, step):
        row, head, base = place(tile)
        start = base + wg * rows
        at = pl.ds(start, rows)
        kv_ids = begin(r, row, head, at, wg, (r.k, r.k_block.at[wg]), (r.v, r.v_block.at[wg]))
        span = plan.span(r, row, base, start, rows)

        def block(step, masked, i, totals):
            dk, dv = totals
            slot = slot_of(step, i, span)
            plgpu.barrier_wait(r.q_full.at[slot])
            plgpu.barrier_wait(r.d_out_full.at[slot])
            scores = product((rows, size), r.k_block.at[wg], r.q_block.at[slot].transpose((1, 0)))
            weights, sloped = weights_of(
                r, slot, scores, masked, span.offset + i * size, start, span, kv_ids
            )
            low = weights.astype(dtype)
            left = low if fast else stored(low, r.weights.at[wg])
            right = r.d_out_block.at[slot]
            dv, d_weights = accumulate_and_multiply(
                dv, left, right, r.v_block.at[wg], right.transpose((1, 0)), fast
            )
            delta = plgpu.load(r.delta_block.at[slot], layout=COLUMNS)
            gradient = (sloped * (d_weights - along(delta, scores.shape, 1))).astype(dtype)
            release(r.d_out_empty.at[slot], True)
            left = gradient if fast else stored(gradient, r.gradient.at[wg])
            dk = accumulate(dk, left, r.q_block.at[slot], fast)
            release(r.q_empty.at[slot], True)
            return dk, dv

        dk, dv = visit(span, step, block, (zeros((rows, width)), zeros((rows, width))))
        end(row, head, at, (dk * weigh.scale, r.k_block.at[wg], r.dk), (dv, r.v_block.at[wg], r.dv))
        return step + group * span.count

    def compute_apart(r, wg, tile, step):
        row, head, start = place(tile)
        at = pl.ds(start, rows)
        span = plan.span(r, row, start, start, rows)

        def block_dv(kv_ids, step, masked, i, dv):
            slot = slot_of(step, i, span)
            count = step + i - span.first
            plgpu.barrier_wait(r.q_full.at[slot])
            scores = product((rows, size), r.k_block.at[0], r.q_block.at[slot].transpose((1, 0)))
            weights, sloped = weights_of(
                r, slot, scores, masked, span.offset + i * size, start, span, kv_ids
            )
            release(r.q_empty.at[slot], True)
            handed = lax.rem(count, jnp.int32(HANDED))

            @pl.when(count >= HANDED)
            def _():
                plgpu.barrier_wait(r.handed_empty.at[handed])

            r.handed[handed] = sloped.astype(dtype)
            plgpu.barrier_arrive(r.handed_full.at[handed])
            weights = weights.astype(dtype)
            plgpu.barrier_wait(r.d_out_full.at[slot])
            dv = accumulate(
                dv, weights if fast else stored(weights, r.weights), r.d_out_block.at[slot], fast
            )
            plgpu.barrier_arrive(r.d_out_empty.at[slot])
            return dv

        def block_dk(step, masked, i, dk):
            slot = slot_of(step, i, span)
            count = step + i - span.first
            plgpu.barrier_wait(r.d_out_full.at[slot])
            d_weights = product(
                (rows, size), r.v_block.at[0], r.d_out_block.at[slot].transpose((1, 0))
            )
            delta = plgpu.load(r.delta_block.at[slot], layout=COLUMNS)
            d_weights = d_weights - along(delta, d_weights.shape, 1)
            release(r.d_out_empty.at[slot], True)
            handed = lax.rem(count, jnp.int32(HANDED))
            plgpu.barrier_wait(r.handed_full.at[handed])
            gradient = (
                plgpu.load(r.handed.at[handed], layout=TILE).astype(jnp.float32) * d_weights
            ).astype(dtype)
            plgpu.barrier_arrive(r.handed_empty.at[handed])
            plgpu.barrier_wait(r.q_full.at[slot])
            dk = accumulate(
                dk, gradient if fast else stored(gradient, r.gradient), r.q_block.at[slot], fast
            )
            plgpu.barrier_arrive(r.q_empty.at[slot])
            return dk

        @pl.when(wg == 0)
        def _():
            kv_ids = begin(r, row, head, at, 0, (r.k, r.k_block.at[0]))
            dv = visit(span, step, functools.partial(block_dv, kv_ids), zeros((rows, width)))
            end(row, head, at, (dv, r.k_block.at[0], r.dv))

        @pl.when(wg == 1)
        def _():
            begin(r, row, head, at, 1, (r.v, r.v_block.at[0]))
            whole = span._replace(
                sections=(False, True, False), whole=span.first, whole_end=span.last
            )
            dk = visit(whole, step, block_dk, zeros((rows, width)))
            end(row, head, at, (dk * weigh.scale, r.v_block.at[0], r.dk))

        return step + group * span.count

    def feed(r, tile, step):
        row, kv_head, base = place(tile)
        span = plan.span(r, row, base, base, plan.outer)

        def block(g, step, i, _):
            head = kv_head * group + g
            at = pl.ds(i * size, size)
            i = step + i - span.first
            copies = [(r.q.at[row, at, head], r.q_block), (r.lse.at[row, head, at], r.lse_block)]
            if ids:
                copies.append((r.q_ids.at[row, at], r.q_ids_block))
            fill(i, stages, r.q_full, r.q_empty, copies)
            fill(
                i,
                stages,
                r.d_out_full,
                r.d_out_empty,
                [
                    (r.d_out.at[row, at, head], r.d_out_block),
                    (r.delta.at[row, head, at], r.delta_block),
                ],
            )

        def one_head(g, step):
            lax.fori_loop(span.first, span.end, functools.partial(block, g, step), None)
            return step + span.count

        return lax.fori_loop(0, group, one_head, step)

    inputs = {name: eights(x) for name, x in (("q", q), ("k", k), ("v", v), ("d_out", d_out))}
    inputs |= {
        "lse": pad_queries(lse, plan.padded, jnp.inf),
        "delta": pad_queries(delta, plan.padded),
    }
    scratch = {
        "k_block": tiled((own, rows, width), dtype),
        "v_block": tiled((own, rows, width), dtype),
        "q_block": tiled((stages, size, width), dtype),
        "d_out_block": tiled((stages, size, width), dtype),
        "lse_block": plgpu.SMEM((stages, size), jnp.float32),
        "delta_block": plgpu.SMEM((stages, size), jnp.float32),
        "loaded": plgpu.Barrier(num_barriers=COMPUTE, num_arrivals=(1 if apart else 2) + ids),
        **ring("q", stages, 2 + ids),
        **ring("d_out", stages, 2),
    }
    if not mask.known:
        inputs["spans"] = plan.spans(batch)
    if ids:
        inputs |= {
            "q_ids": pad_to(mask.q_ids, plan.padded),
            "kv_ids": pad_to(mask.kv_ids, number * plan.outer),
        }
        scratch |= {
            "kv_ids_block": plgpu.SMEM((COMPUTE, rows), jnp.int32),
            "q_ids_block": plgpu.SMEM((stages, size), jnp.int32),
        }
    if apart:
        scratch |= {
            "handed": tiled((HANDED, rows, size), dtype),
            **ring("handed", HANDED, 1, readers=1),
        }
    if not fast:
        shape = (rows, size) if apart else (COMPUTE, rows, size)
        scratch |= {name: tiled(shape, dtype, width) for name in ("weights", "gradient")}
    outputs = dict.fromkeys(("dk", "dv"), (inputs["k"].shape, dtype))
    with scope("attention_dkv", batch, heads, queries, keys, width, 4, mask.causal):
        results = launch(
            "flash_dkv",
            compute_apart if apart else compute_both,
            feed,
            batch * kv_heads * number,
            stages,
            ("q", "d_out"),
            inputs,
            outputs,
            scratch,
            interpret,
            walks=apart,
        )
    return tuple(x[:, :keys] for x in results)
