"""Dispatch to the implementations that have a backward pass of their own, behind one custom
derivative, and to those that decode."""

# Shapes: B rows, S query positions, T key positions, N query heads, K key/value heads, H head width

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from mtnlg_jax import compat
from mtnlg_jax.model.kernels import blocks as sizes
from mtnlg_jax.model.kernels import xla
from mtnlg_jax.model.kernels.blocks import Blocks
from mtnlg_jax.model.kernels.call import AttentionCall
from mtnlg_jax.model.kernels.mask import Mask
from mtnlg_jax.model.kernels.select import device


class DispatchPlan(NamedTuple):
    """The static part of a call: hashable, and known while tracing."""

    impl: str
    causal: bool
    window: int | None
    q_offset: int | None  # None: an array
    scale: float
    softcap: float | None
    blocks: tuple[Blocks, Blocks, Blocks]  # forward, dq, dkv
    interpret: Any  # as compat.interpret_params() gives it

    def mask(self, arrays) -> Mask:
        """The whole mask, from this plan and what mask_arrays() took out of it."""
        q_ids, kv_ids, lengths, offset = arrays
        offset = offset if self.q_offset is None else self.q_offset
        return Mask(self.causal, self.window, offset, q_ids, kv_ids, lengths)

    @property
    def scaling(self) -> dict:
        return {"scale": self.scale, "softcap": self.softcap}


def plan_for(impl: str, call: AttentionCall) -> DispatchPlan:
    """The plan of ``call`` on ``impl``. Block sizes come from the call, which may hold a Blocks, or
    else from the table."""
    offset = call.q_offset if isinstance(call.q_offset, int) else None
    if call.block_sizes is not None:
        blocks = (Blocks(*call.block_sizes),) * 3
    else:
        shape = (impl, device(), call.dtype, call.head_width, call.length, bool(call.causal))
        kinds = ("both",) * 3 if impl == "xla_blockwise" else ("forward", "dq", "dkv")
        forward, dq, dkv = (sizes.blocks_for(kind, *shape) for kind in kinds)
        blocks = (forward, dq, dkv)
    return DispatchPlan(
        impl,
        bool(call.causal),
        call.window,
        offset,
        call.score_scale,
        call.softcap,
        blocks,
        compat.interpret_params(impl),
    )


def mask_arrays(mask: Mask) -> tuple:
    """The arrays of a mask, which a DispatchPlan does not hold."""
    offset = None if isinstance(mask.q_offset, int) else mask.q_offset
    return (mask.q_ids, mask.kv_ids, mask.kv_lengths, offset)


def _kernel(impl: str) -> ModuleType:
    # Imported late: neither module is needed on the other's hardware, or on a CPU.
    if impl == "pallas_tpu":
        from mtnlg_jax.model.kernels.tpu import flash as tpu_flash

        return tpu_flash
    from mtnlg_jax.model.kernels.gpu import flash as gpu_flash

    return gpu_flash


def forward(plan: DispatchPlan, q, k, v, mask: Mask, alibi_slopes=None):
    """(out (B, S, N, H), lse float32 (B, N, S)). ``alibi_slopes`` are (N,)."""
    options = plan.scaling | {"alibi_slopes": alibi_slopes, "blocks": plan.blocks[0]}
    if plan.impl == "xla_blockwise":
        return xla.forward(q, k, v, mask, **options)
    return _kernel(plan.impl).forward(q, k, v, mask, interpret=plan.interpret, **options)


def backward(plan: DispatchPlan, q, k, v, mask: Mask, out, lse, d_out, d_lse, alibi_slopes=None):
    """(dq, dk, dv)."""
    options = plan.scaling | {"alibi_slopes": alibi_slopes}
    arrays = (q, k, v, mask, out, lse, d_out, d_lse)
    _, dq_blocks, dkv_blocks = plan.blocks
    if plan.impl == "xla_blockwise":
        return xla.backward(*arrays, blocks=dq_blocks, **options)
    return _kernel(plan.impl).backward(
        *arrays,
        dq_blocks=dq_blocks,
        dkv_blocks=dkv_blocks,
        interpret=plan.interpret,
        **options,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(plan: DispatchPlan, q, k, v, arrays, alibi_slopes=None):
    """(out, lse), differentiable in q, k and v; ``arrays`` as mask_arrays() gives them."""
    return _fused_forward(plan, q, k, v, arrays, alibi_slopes)[0]


def _fused_forward(plan: DispatchPlan, q, k, v, arrays, alibi_slopes):
    out, lse = forward(plan, q, k, v, plan.mask(arrays), alibi_slopes)
    # The name lets a recompute policy keep both, so that the backward pass need not attend again.
    out = checkpoint_name(out, "attention")
    lse = checkpoint_name(lse, "attention")
    return (out, lse), (q, k, v, arrays, alibi_slopes, out, lse)


def _fused_backward(plan: DispatchPlan, residuals, cotangents):
    q, k, v, arrays, alibi_slopes, out, lse = residuals
    d_out, d_lse = cotangents
    mask = plan.mask(arrays)
    return *backward(plan, q, k, v, mask, out, lse, d_out, d_lse, alibi_slopes), None, None


fused.defvjp(_fused_forward, _fused_backward)


def decode(
    impl: str,
    q,
    k_cache,
    v_cache,
    lengths,
    scales=(None, None),
    positions=None,
    alibi_slopes=None,
    *,
    scale: float,
    softcap: float | None,
    window: int | None = None,
    num_splits: int | None = None,
    block_kv: int | None = None,
):
    """(out (B, N, H), lse (B, N)) of one query a row. ``scales`` of an int8 cache: (B, K, T) each.
    ``positions`` are (B,), or for XLA also (B, N), by default lengths - 1; ``alibi_slopes`` are
    (N,)."""
    options = {
        "scale": scale,
        "softcap": softcap,
        "k_scale": scales[0],
        "v_scale": scales[1],
        "positions": positions,
        "window": window,
        "alibi_slopes": alibi_slopes,
    }
    if impl == "xla":
        return xla.decode(q, k_cache, v_cache, lengths, **options)
    run: Callable
    if impl == "pallas_tpu":
        from mtnlg_jax.model.kernels.tpu.decode import decode as run
    else:
        from mtnlg_jax.model.kernels.gpu.decode import decode as run
    rows, heads, width = q.shape
    keys = k_cache.shape[2]
    if block_kv is None:
        block_kv = sizes.blocks_for("decode", impl, device(), str(q.dtype), width, keys, False).kv
    with sizes.scope("attention_decode", rows, heads, 1, keys, width, products=2):
        return run(
            q,
            k_cache,
            v_cache,
            lengths,
            num_splits=num_splits,
            block_kv=block_kv,
            interpret=compat.interpret_params(impl),
            **options,
        )
