"""FlashAttention for TPU, for any Mask: a streamed forward kernel, and one backward kernel or, for
long sequences, two.

Inside, heads come before positions: q (B, N, S, H), k and v (B, K, T, H), with S and T padded to
whole blocks. The last axis of every grid streams: a block of queries sees its blocks of keys one
after another (or a block of keys its queries), and the running sums stay in VMEM. If the mask is
known before the program runs, arithmetic on the grid position gives the blocks to stream; otherwise
they are read from a prefetched table. Blocks in which nothing is visible cost neither work nor DMA.
Scores are in base 2, so that exp2 needs no factor.
"""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads, H head width

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mtnlg_jax import compat
from mtnlg_jax.model.kernels import mask as masks
from mtnlg_jax.model.kernels.blocks import Blocks, scope
from mtnlg_jax.model.kernels.mask import Mask
from mtnlg_jax.model.kernels.tpu.common import (
    DQ_LIMIT,
    LANES,
    LOG2_E,
    VMEM_LIMIT,
    KernelPlan,
    dkv_kernel,
    dq_kernel,
    forward_kernel,
    known_range,
    streamed,
)

NAMES = {
    forward_kernel: ("attention_forward", 2),
    dq_kernel: ("attention_dq", 3),
    dkv_kernel: ("attention_dkv", 4),
}


def _fitted(size: int, block: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that covers ``size`` positions in as few blocks as
    ``block`` does."""
    return pl.cdiv(pl.cdiv(size, pl.cdiv(size, block)), unit) * unit


def _plan(q, k, mask: Mask, blocks: Blocks, scale: float, softcap: float | None, *, of_keys: bool):
    """(plan, [the prefetched vector] or [])."""
    rows, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    # As few blocks as the sizes asked for, but no more padding than needed.
    block_q = _fitted(queries, blocks.q, LANES)
    # A short sequence is one unit, so that its padding stays below LANES.
    unit = min(blocks.compute or LANES, pl.cdiv(keys, LANES) * LANES)
    block_kv = _fitted(keys, max(blocks.kv, unit), unit)
    plan = KernelPlan(
        mask.causal,
        mask.window,
        scale,
        softcap,
        mask.q_offset if isinstance(mask.q_offset, int) else None,
        keys if keys % block_kv else None,
        mask.q_ids is not None,
        queries,
        keys,
        block_q,
        block_kv,
        unit if blocks.compute else block_kv,
        heads // kv_heads,
        of_keys,
        False,
        0,
        (),
    )
    size, other, number, number_other = (
        (block_kv, block_q, plan.number_kv, plan.number_q)
        if of_keys
        else (block_q, block_kv, plan.number_q, plan.number_kv)
    )
    # The grid has a fixed number of steps: the most that any block needs.
    width = number_other
    if plan.q_offset is not None:
        width = int(np.max(np.broadcast_to(known_range(plan, np.arange(number), np)[1], number)))
    # An offset in the table leaves the position of the block open.
    elif mask.window is not None:  # most blocks that this many consecutive positions can touch
        seen = size + (mask.window - 1) * (1 if mask.causal else 2)
        width = min(width, (seen + other - 2) // other + 1)
    plan = plan._replace(width=max(width, 1))
    if mask.known:
        return plan, []
    first, end = masks.block_ranges(mask, rows, queries, keys, block_q, block_kv, of_keys=of_keys)
    # One vector for all parts: a kernel has one prefetched argument, whatever the mask holds.
    parts = {"first": first, "count": end - first}
    if plan.q_offset is None:
        parts["offset"] = jnp.broadcast_to(mask.q_offset, (rows,))[:, None]
    if mask.kv_lengths is not None:
        parts["length"] = jnp.minimum(mask.kv_lengths, keys)[:, None]
    if plan.has_ids:
        parts["low_q"], parts["high_q"] = masks.id_range(mask.q_ids, plan.number_q, block_q)
        parts["low_kv"], parts["high_kv"] = masks.id_range(mask.kv_ids, plan.number_kv, block_kv)
    starts = np.cumsum([0, *(part.size for part in parts.values())])
    places = tuple(
        (name, int(start), parts[name].shape[1]) for name, start in zip(parts, starts, strict=False)
    )
    return plan._replace(table=places), [
        jnp.concatenate([part.astype(jnp.int32).ravel() for part in parts.values()])
    ]


def _heads_first(x, block: int):
    """(B, S, N, H) -> (B, N, S padded to whole blocks, H)."""
    return jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))


def _id_rows(mask: Mask, plan: KernelPlan):
    """Segment ids as rows (B, 1, S) and (B, 1, T), padded, or []."""
    # The id of the padding does not matter: its keys are past the length, and its queries are cut
    # off.
    if mask.q_ids is None or mask.kv_ids is None:
        return []
    return [
        jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, -ids.shape[1] % block)))[:, None]
        for ids, block in ((mask.q_ids, plan.q), (mask.kv_ids, plan.kv))
    ]


def dq_bytes(plan: KernelPlan, width: int, dtype) -> int:
    """Bytes of VMEM for dq in the kernel for dk and dv: float32 sums and the result."""
    # Rows of the result are padded to whole lanes; the sums are transposed and are not.
    padded = pl.cdiv(width, LANES) * LANES
    return plan.group * plan.number_q * plan.q * (width * 4 + padded * jnp.dtype(dtype).itemsize)


def _call(
    kernel, plan: KernelPlan, table, inputs, outputs, scratch, rows: int, heads: int, interpret
):
    """Run a kernel over (B, its heads, its blocks, streamed blocks).

    ``inputs`` are (array, kind) pairs, ``outputs`` (shape, dtype, kind) triples. Kinds are "q" and
    "kv" for vectors by query or key position, "q_row" and "kv_row" for one number a position, and
    "q_id" and "kv_id" for the same without heads."""

    def blocks_of(row, head, block, turn, table):
        """(query head, key/value head, block of queries, block of keys)."""
        if plan.of_keys:
            # The block to copy and the block to compute come from the same function, so they agree.
            at, _ = streamed(plan, table, row, block, plan.step(turn))
            return plan.head(head, turn), head, at, block
        at, _ = streamed(plan, table, row, block, turn)
        return head, lax.div(head, plan.group), block, at

    def spec(kind, width):
        side = 0 if kind.startswith("q") else 1
        size = (plan.q, plan.kv)[side]

        if kind == "q_all":  # of all heads that share keys
            # One buffer: the block only changes with the row and the head, and a second one would
            # double it.
            length = plan.number_q * plan.q
            return pl.BlockSpec(
                (None, plan.group, length, width),
                lambda row, head, *_: (row, head, 0, 0),
                pipeline_mode=pl.Buffered(1),
            )

        def place(row, head, block, turn, *table):
            found = blocks_of(row, head, block, turn, table)
            head = found[side]
            block = found[2 + side]
            if kind.endswith("id"):
                return row, 0, block
            return (row, head, 0, block) if kind.endswith("row") else (row, head, block, 0)

        # Numbers of a position lie along lanes, so that a block of them is one row.
        shapes = {"id": (None, 1, size), "row": (None, None, 1, size)}
        return pl.BlockSpec(shapes.get(kind.partition("_")[2], (None, None, size, width)), place)

    arrays = [x for x, _ in inputs]
    limit = VMEM_LIMIT + (
        dq_bytes(plan, arrays[0].shape[-1], arrays[0].dtype) if plan.with_dq else 0
    )
    number, turns = (
        (plan.number_kv, plan.width * plan.group) if plan.of_keys else (plan.number_q, plan.width)
    )
    query_heads = heads * plan.group if plan.of_keys else heads
    name, products = NAMES[kernel] if not plan.with_dq else ("attention_backward", 5)
    run = pl.pallas_call(
        functools.partial(kernel, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(table),
            grid=(rows, heads, number, turns),
            in_specs=[spec(kind, x.shape[-1]) for x, kind in inputs],
            out_specs=[spec(kind, shape[-1]) for shape, _, kind in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=[
            compat.result_like(shape, dtype, *table, *arrays) for shape, dtype, _ in outputs
        ],
        # Two cores share rows and heads, not blocks: of a causal mask's blocks one core would get
        # the longer part.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=limit,
        ),
        interpret=interpret,
        name=name,
    )
    with scope(
        name, rows, query_heads, plan.queries, plan.keys, arrays[0].shape[-1], products, plan.causal
    ):
        return run(*table, *arrays)


def forward(
    q, k, v, mask: Mask, *, scale: float, softcap: float | None, blocks: Blocks, interpret=False
):
    """Attention of q (B, S, N, H) over k and v (B, T, K, H), N % K == 0: out (B, S, N, H) in q's
    dtype and the float32 natural log-sum-exp (B, N, S). A query that sees no key gives 0 and
    -inf."""
    plan, table = _plan(q, k, mask, blocks, scale, softcap, of_keys=False)
    rows, queries, heads, width = q.shape
    padded = (_heads_first(q, plan.q), _heads_first(k, plan.kv), _heads_first(v, plan.kv))
    inputs = [
        *zip(padded, ("q", "kv", "kv"), strict=True),
        *zip(_id_rows(mask, plan), ("q_id", "kv_id"), strict=False),
    ]
    column = pltpu.VMEM((plan.q, LANES), jnp.float32)
    scratch = [column, column, pltpu.VMEM((plan.q, width), jnp.float32)]
    length = padded[0].shape[2]
    out, lse = _call(
        forward_kernel,
        plan,
        table,
        inputs,
        [
            ((rows, heads, length, width), q.dtype, "q"),
            ((rows, heads, 1, length), jnp.float32, "q_row"),
        ],
        scratch + [pltpu.VMEM((plan.q, LANES), jnp.int32)],
        rows,
        heads,
        interpret,
    )
    return out[:, :, :queries].transpose(0, 2, 1, 3), lse[:, :, 0, :queries]


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
    interpret=False,
):
    """Gradients (dq, dk, dv) in the dtypes of q, k and v, from the arguments and results of
    forward() and the cotangents of the results."""
    rows, queries, heads, width = q.shape
    blind = lse == -jnp.inf
    # The log-sum-exp's own cotangent enters with the opposite sign.
    delta = (
        jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1).transpose(0, 2, 1) - d_lse
    )
    # A log-sum-exp of inf makes all weights 0, for queries that see nothing and for padding.
    lse = jnp.where(blind, jnp.inf, lse * LOG2_E)
    delta = jnp.where(blind, 0.0, delta)

    def run(kernel, plan, table, outputs, columns):
        pad = ((0, 0), (0, 0), (0, -queries % plan.q))
        inputs = [
            (_heads_first(q, plan.q), "q"),
            (_heads_first(k, plan.kv), "kv"),
            (_heads_first(v, plan.kv), "kv"),
            (_heads_first(d_out.astype(q.dtype), plan.q), "q"),
            (jnp.pad(lse, pad, constant_values=jnp.inf)[:, :, None], "q_row"),
            (jnp.pad(delta, pad)[:, :, None], "q_row"),
            *zip(_id_rows(mask, plan), ("q_id", "kv_id"), strict=False),
        ]
        # The side whose gradients are summed in VMEM while the other one streams past it.
        own, kind, size, number = (
            (k, "kv", plan.kv, plan.number_kv) if plan.of_keys else (q, "q", plan.q, plan.number_q)
        )
        results = [((rows, own.shape[2], number * size, width), x.dtype, kind) for x in outputs]
        sums = [pltpu.VMEM((size, width), jnp.float32)] * len(outputs)
        if plan.with_dq:
            outputs = (*outputs, q)
            results.append(((rows, heads, plan.number_q * plan.q, width), q.dtype, "q_all"))
            sums.append(pltpu.VMEM((plan.group * plan.number_q, width, plan.q), jnp.float32))
        scratch = sums + [
            pltpu.VMEM((size, LANES), dtype) for dtype in [jnp.float32] * columns + [jnp.int32]
        ]
        results = _call(
            kernel, plan, table, inputs, results, scratch, rows, own.shape[2], interpret
        )
        return [
            x[:, :, : like.shape[1]].transpose(0, 2, 1, 3)
            for x, like in zip(results, outputs, strict=True)
        ]

    plan, table = _plan(q, k, mask, dkv_blocks, scale, softcap, of_keys=True)
    # One kernel computes the scores once; two need less VMEM.
    plan = plan._replace(with_dq=dq_bytes(plan, width, q.dtype) <= DQ_LIMIT)
    dk, dv, *dq = run(dkv_kernel, plan, table, (k, v), 0)
    if not dq:
        plan, table = _plan(q, k, mask, dq_blocks, scale, softcap, of_keys=False)
        dq = run(dq_kernel, plan, table, (q,), 2)
    return dq[0], dk, dv
