"""The implementations that have a backward pass of their own, behind one custom derivative."""

import functools
import math
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mtnlg_jax import compat
from mtnlg_jax.model.kernels import blocks as sizes
from mtnlg_jax.model.kernels import xla
from mtnlg_jax.model.kernels.blocks import Blocks
from mtnlg_jax.model.kernels.mask import Mask
from mtnlg_jax.model.kernels.select import device


class Plan(NamedTuple):
    """All that is known while tracing."""

    impl: str
    causal: bool
    window: int | None
    q_offset: int | None  # None: an array
    scale: float
    softcap: float | None
    blocks: tuple[Blocks, Blocks, Blocks]  # forward, dq, dkv
    interpret: object

    def mask(self, arrays) -> Mask:
        q_ids, kv_ids, lengths, offset = arrays
        offset = offset if self.q_offset is None else self.q_offset
        return Mask(self.causal, self.window, offset, q_ids, kv_ids, lengths)

    @property
    def given(self) -> dict:
        return {"scale": self.scale, "softcap": self.softcap}


def plan_for(
    impl: str,
    q,
    k,
    mask: Mask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    block_sizes=None,
) -> Plan:
    """``block_sizes``: (queries, keys), or Blocks, of every pass; None: the table's."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    offset = mask.q_offset if isinstance(mask.q_offset, int) else None
    if block_sizes is not None:
        blocks = (Blocks(*block_sizes),) * 3
    else:
        shape = (
            impl,
            device(),
            str(q.dtype),
            q.shape[3],
            math.sqrt(q.shape[1] * k.shape[1]),
            mask.causal,
        )
        kinds = ("both",) * 3 if impl == "xla_blockwise" else ("forward", "dq", "dkv")
        blocks = tuple(sizes.blocks_for(kind, *shape) for kind in kinds)
    return Plan(
        impl,
        mask.causal,
        mask.window,
        offset,
        scale,
        softcap,
        blocks,
        compat.interpret_params(impl),
    )


def arrays_of(mask: Mask):
    """What of a mask is an array, apart from what a Plan holds."""
    return (
        mask.q_ids,
        mask.kv_ids,
        mask.kv_lengths,
        None if isinstance(mask.q_offset, int) else mask.q_offset,
    )


def _kernel(impl: str):
    # Imported where they are used: neither should be needed on the other's machine, nor on a CPU.
    if impl == "pallas_tpu":
        from mtnlg_jax.model.kernels.tpu import flash as module
    else:
        from mtnlg_jax.model.kernels.gpu import flash as module
    return module


def forward(plan: Plan, q, k, v, mask: Mask):
    """(out (B, T, N, H), lse float32 (B, N, T))."""
    if plan.impl == "xla_blockwise":
        return xla.forward(q, k, v, mask, blocks=plan.blocks[0], **plan.given)
    return _kernel(plan.impl).forward(
        q, k, v, mask, blocks=plan.blocks[0], interpret=plan.interpret, **plan.given
    )


def backward(plan: Plan, q, k, v, mask: Mask, out, lse, d_out, d_lse):
    """(dq, dk, dv)."""
    given = (q, k, v, mask, out, lse, d_out, d_lse)
    if plan.impl == "xla_blockwise":
        return xla.backward(*given, blocks=plan.blocks[1], **plan.given)
    return _kernel(plan.impl).backward(
        *given,
        dq_blocks=plan.blocks[1],
        dkv_blocks=plan.blocks[2],
        interpret=plan.interpret,
        **plan.given,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(plan: Plan, q, k, v, arrays):
    """(out, lse), differentiable in q, k and v; ``arrays`` as arrays_of() gives them."""
    return _fused_forward(plan, q, k, v, arrays)[0]


def _fused_forward(plan: Plan, q, k, v, arrays):
    out, lse = forward(plan, q, k, v, plan.mask(arrays))
    # Named, so that a recompute policy can keep both and spare the backward pass this one.
    out = checkpoint_name(out, "attention")
    lse = checkpoint_name(lse, "attention")
    return (out, lse), (q, k, v, arrays, out, lse)


def _fused_backward(plan: Plan, residuals, cotangents):
    q, k, v, arrays, out, lse = residuals
    return *backward(plan, q, k, v, plan.mask(arrays), out, lse, *cotangents), None


fused.defvjp(_fused_forward, _fused_backward)


def decode(
    impl: str,
    q,
    k_cache,
    v_cache,
    lengths,
    scales=(None, None),
    *,
    scale: float,
    softcap: float | None,
    num_splits: int | None = None,
    block_kv: int | None = None,
):
    """(out (B, N, H), lse (B, N)) of one query a row; ``scales`` of an int8 cache, (B, K, S)
    each."""
    given = {"scale": scale, "softcap": softcap, "k_scale": scales[0], "v_scale": scales[1]}
    if impl == "xla":
        return xla.decode(q, k_cache, v_cache, lengths, **given)
    if impl == "pallas_tpu":
        from mtnlg_jax.model.kernels.tpu.decode import decode as run
    else:
        from mtnlg_jax.model.kernels.gpu.decode import decode as run
    if block_kv is None:
        block_kv = sizes.blocks_for(
            "decode", impl, device(), str(q.dtype), q.shape[2], k_cache.shape[2], False
        ).kv
    with sizes.scope(
        "attention_decode", q.shape[0], q.shape[1], 1, k_cache.shape[2], q.shape[2], 2
    ):
        return run(
            q,
            k_cache,
            v_cache,
            lengths,
            num_splits=num_splits,
            block_kv=block_kv,
            interpret=compat.interpret_params(impl),
            **given,
        )


# --- over a mesh that XLA partitions: kernels are opaque to it, so they are split here
# ------------------------------


def _axes(rows: int, heads: int) -> tuple[str | None, str | None]:
    """The axes to split ``rows`` and ``heads`` over, where XLA would partition and they divide."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    return tuple(
        axis
        if axis in automatic and mesh.shape[axis] > 1 and number % mesh.shape[axis] == 0
        else None
        for axis, number in (("data", rows), ("tensor", heads))
    )


def split_heads(run, q, k, v, arrays):
    """``run(q, k, v, arrays)`` -> (out, lse), rows over data and heads over tensor."""
    rows, heads = _axes(k.shape[0], k.shape[2])
    if rows is None and heads is None:
        return run(q, k, v, arrays)
    whole = P(rows, None, heads)
    by_row = P(rows)
    return jax.shard_map(
        run,
        in_specs=(whole, whole, whole, jax.tree.map(lambda _: by_row, arrays)),
        out_specs=(whole, P(rows, heads)),
    )(q, k, v, arrays)


def split_cache(run, q, k_cache, v_cache, lengths, scales):
    """``run(q, k_cache, v_cache, lengths, scales)`` -> (out, lse) likewise."""
    rows, heads = _axes(k_cache.shape[0], k_cache.shape[1])
    if rows is None and heads is None:
        return run(q, k_cache, v_cache, lengths, scales)
    by_head = P(rows, heads)
    return jax.shard_map(
        run,
        in_specs=(by_head, by_head, by_head, P(rows), jax.tree.map(lambda _: by_head, scales)),
        out_specs=(by_head, by_head),
    )(q, k_cache, v_cache, lengths, scales)
