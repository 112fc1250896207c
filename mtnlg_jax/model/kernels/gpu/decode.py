"""Attention of one new query per row to a cache, on Hopper GPUs: a Pallas kernel (Mosaic GPU) that
splits the keys.

Every thread block takes one row, one key/value head (with the up to 64 query heads that share it:
one product's rows) and one run of keys. It reads no further than the row's length. The runs are
merged by their log-sum-exps. Warpgroups, forms and limits are those of flash_gpu, but for one
computing warpgroup instead of two: the cache's bytes take longer than the arithmetic."""

from types import SimpleNamespace

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
    Weigh,
    accumulate,
    along,
    check_blocks,
    fill,
    interpret_params,
    load,
    multiprocessors,
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
KEYS_OF_SPLIT = 256  # fewer are not worth a thread block


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
    fast=None,
):
    """Attention of q (B, N, H) to the first ``lengths`` (B,) keys of k_cache and v_cache (B, K, S,
    H): out (B, N, H) and its log-sum-exp, float32 (B, N). The caches are of q's dtype, or int8 with
    float32 scales (B, K, S); they are copied unless S is a multiple of eight."""
    batch, heads, width = q.shape
    kv_heads, keys = k_cache.shape[1:3]
    dtype = q.dtype
    _check(q, k_cache, v_cache, k_scale, v_scale)
    check_blocks(width, "query heads", HEADS, "keys", block_kv)
    fast = interpret is None if fast is None else fast
    quantized = k_cache.dtype == jnp.int8
    weigh = Weigh(scale, softcap)
    group = heads // kv_heads
    blocks = -(-keys // block_kv)
    rows = -(-group // 8) * 8 if group <= HEADS else -(-group // HEADS) * HEADS
    tiles = -(-rows // HEADS)
    if num_splits is None:
        num_splits = min(
            -(-multiprocessors() // (batch * kv_heads * tiles)), -(-keys // KEYS_OF_SPLIT)
        )
    splits = max(1, min(num_splits, blocks))
    stages = stages or (4 if width <= 64 else 3 if width <= 128 else 2)
    # Partial results are float32 where shared memory has room for them.
    partial = dtype if splits == 1 or width > 192 else jnp.float32

    def body(r):
        row, tile, split = (lax.axis_index(name) for name in ("row", "tile", "split"))
        head = lax.div(tile, jnp.int32(tiles))
        first_head = lax.rem(tile, jnp.int32(tiles)) * HEADS
        length = jnp.minimum(scalar(r.lengths, row), keys)
        live = lax.div(jnp.maximum(length, 0) + (block_kv - 1), jnp.int32(block_kv))
        share = lax.div(
            live + (splits - 1), jnp.int32(splits)
        )  # of what the row has, not of what the cache holds
        first = jnp.minimum(split * share, live)
        end = jnp.minimum(first + share, live)

        def operand(block, full, empty, wide, scales, slot):
            """A slot's keys or values as an operand, and their scales: integers become numbers in
            shared memory."""
            plgpu.barrier_wait(full.at[slot])
            if not quantized:
                return block.at[slot], None
            values = plgpu.load(block.at[slot], layout=TILE).astype(dtype)
            factors = plgpu.load(scales.at[slot], layout=COLUMNS)
            release(empty.at[slot], True)
            return stored(values, wide), factors

        def block(j, carry):
            total, top, mass = carry
            slot = lax.rem(j - first, jnp.int32(stages))
            right, factors = operand(
                r.k_block, r.k_full, r.k_empty, r.k_wide, r.k_scale_block, slot
            )
            scores = product((HEADS, block_kv), r.q_block, right.transpose((1, 0)))
            if not quantized:
                plgpu.barrier_arrive(r.k_empty.at[slot])
            else:
                scores = scores * along(factors, scores.shape, 1)
            scores = weigh.cap(scores)
            place = j * block_kv + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=TILE)
            scores = jnp.where(place < length, scores, -jnp.inf)
            new_top = jnp.maximum(top, scores.max(axis=1) * weigh.factor)
            weights = jnp.exp2(scores * weigh.factor - along(new_top, scores.shape, 0))
            shrink = jnp.exp2(top - new_top)
            total = total * along(shrink, total.shape, 0)
            mass = mass * shrink + weights.sum(axis=1)
            right, factors = operand(
                r.v_block, r.v_full, r.v_empty, r.v_wide, r.v_scale_block, slot
            )
            if quantized:  # a key past the length may have any scale
                weights = jnp.where(place < length, weights * along(factors, scores.shape, 1), 0.0)
            weights = weights.astype(dtype)
            total = accumulate(total, weights if fast else stored(weights, r.weights), right, fast)
            if not quantized:
                plgpu.barrier_arrive(r.v_empty.at[slot])
            return total, new_top, mass

        @pl.when(lax.axis_index("wg") == 0)
        def _():
            load([(r.q.at[row, head, pl.ds(first_head, HEADS)], r.q_block)], r.loaded)
            start_top = plgpu.layout_cast(jnp.full((HEADS,), LOW, jnp.float32), ROWS)
            carry = (zeros((HEADS, width)), start_top, zeros((HEADS,)))
            total, top, mass = lax.fori_loop(first, end, block, carry)
            nothing = mass == 0.0
            mass = jnp.where(nothing, 1.0, mass)
            out_block = r.q_block if partial == dtype else r.out_block
            out_block[...] = (total * along(1.0 / mass, total.shape, 0)).astype(partial)
            r.lse_block[...] = jnp.where(nothing, -jnp.inf, top * (1 / LOG2E) + jnp.log(mass))
            plgpu.commit_smem()
            at = (row * kv_heads + head) * splits + split, pl.ds(first_head, HEADS)
            plgpu.copy_smem_to_gmem(out_block, r.out.at[at])
            plgpu.copy_smem_to_gmem(r.lse_block, r.lse.at[at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(lax.axis_index("wg") == 1)
        def _():
            def feed(j, _):
                at = pl.ds(j * block_kv, block_kv)
                step = j - first
                for cache, block, scales, scale_block, full, empty in (
                    (r.k, r.k_block, r.k_scale, r.k_scale_block, r.k_full, r.k_empty),
                    (r.v, r.v_block, r.v_scale, r.v_scale_block, r.v_full, r.v_empty),
                ):
                    copies = [(cache.at[row, head, at], block)]
                    if quantized:
                        copies.append((scales.at[row, head, at], scale_block))
                    fill(step, stages, full, empty, copies)

            def drain(i, _):
                for empty in (r.k_empty, r.v_empty):
                    plgpu.barrier_wait(empty.at[lax.rem(i, jnp.int32(stages))])

            lax.fori_loop(first, end, feed, None)
            lax.fori_loop(jnp.maximum(end - first - stages, 0), end - first, drain, None)

    q_groups = q.reshape(batch, kv_heads, group, width)
    q_groups = jnp.pad(q_groups, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    k_cache = _eights(k_cache)
    v_cache = _eights(v_cache)
    inputs = {"q": q_groups, "k": k_cache, "v": v_cache, "lengths": lengths.astype(jnp.int32)}
    scratch = {
        "q_block": tiled((HEADS, width), dtype),
        "lse_block": plgpu.SMEM((HEADS,), jnp.float32),
        "loaded": plgpu.Barrier(),
    }
    if partial != dtype:
        scratch["out_block"] = tiled((HEADS, width), partial)
    for name in ("k", "v"):
        shape = (stages, block_kv, width)
        scratch |= ring(name, stages, 1 + quantized, readers=1)
        scratch[f"{name}_block"] = plgpu.SMEM(shape, jnp.int8) if quantized else tiled(shape, dtype)
        if quantized:
            scratch[f"{name}_wide"] = tiled(shape[1:], dtype)
            scratch[f"{name}_scale_block"] = plgpu.SMEM(shape[:2], jnp.float32)
    if quantized:
        inputs |= {"k_scale": _eights(k_scale), "v_scale": _eights(v_scale)}
    if not fast:
        scratch["weights"] = tiled((HEADS, block_kv), dtype, width)
    absent = dict.fromkeys(
        ("k_scale", "v_scale", "k_wide", "v_wide", "k_scale_block", "v_scale_block")
    )
    outputs = {
        "out": result_like((batch * kv_heads * splits, rows, width), partial, *inputs.values()),
        "lse": result_like((batch * kv_heads * splits, rows), jnp.float32, *inputs.values()),
    }

    def kernel(*refs, **scratch_refs):
        body(
            SimpleNamespace(
                **absent | dict(zip((*inputs, *outputs), refs, strict=True)) | scratch_refs
            )
        )

    results = plgpu.kernel(
        kernel,
        out_type=list(outputs.values()),
        scratch_types=scratch,
        grid=(kv_heads * tiles, splits, batch),
        grid_names=("tile", "split", "row"),
        num_threads=2,
        thread_name="wg",
        kernel_name="flash_decode",
        interpret=interpret_params(interpret),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs.values())
    out, lse = varying_like(results, *inputs.values())
    out = out.reshape(batch, kv_heads, splits, rows, width)[..., :group, :].astype(jnp.float32)
    lse = lse.reshape(batch, kv_heads, splits, rows)[..., :group]
    if splits == 1:
        return out.astype(dtype).reshape(q.shape), lse.reshape(batch, heads)
    top = lse.max(2, keepdims=True)
    shares = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top))
    mass = shares.sum(2)
    out = (out * shares[..., None]).sum(2) / jnp.where(mass == 0, 1.0, mass)[..., None]
    lse = top[:, :, 0] + jnp.log(jnp.where(mass == 0, 1.0, mass))
    return out.astype(dtype).reshape(q.shape), lse.reshape(batch, heads)


def _check(q, k_cache, v_cache, k_scale, v_scale) -> None:
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"the GPU kernels take queries in bfloat16 or float16, not {q.dtype}")
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (q.dtype, jnp.int8):
        raise ValueError(
            f"caches are of the queries' dtype or int8, both alike: {k_cache.dtype}, {v_cache.dtype}"
        )
    if (k_cache.dtype == jnp.int8) != (k_scale is not None and v_scale is not None):
        raise ValueError("k_scale and v_scale are given with int8 caches, and only then")
    if q.shape[-1] % 32 or q.shape[-1] > 256:
        raise ValueError(
            f"the GPU kernels take head widths that are multiples of 32, at most 256, not {q.shape[-1]}"
        )


def _eights(cache):
    """(B, K, S, ...) with S padded to whole tiles of eight: a copy of the cache where S is no
    multiple of eight."""
    return jnp.pad(cache, ((0, 0), (0, 0), (0, -cache.shape[2] % 8), *[(0, 0)] * (cache.ndim - 3)))
