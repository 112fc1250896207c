"""Measures block sizes and implementations on the device of this process, for the table of
``blocks``."""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mtnlg_jax import compat
from mtnlg_jax.model.attention import attention
from mtnlg_jax.model.kernels import dispatch
from mtnlg_jax.model.kernels.blocks import Blocks
from mtnlg_jax.model.kernels.mask import Mask
from mtnlg_jax.model.kernels.select import SUPPORT, call_of, device, refusal

# What is tried: keys of a block, queries of a block; GPU kernels have 64 queries a warpgroup.
_TPU = [
    Blocks(q, kv, compute)
    for q, kv, compute in itertools.product(
        (256, 512, 1024, 2048), (512, 1024, 2048), (256, 512, 1024)
    )
    if compute <= kv
]
_GPU = [
    Blocks(64, kv, 0, stages) for kv, stages in itertools.product((64, 96, 128, 256), (2, 3, 4))
]
_BLOCKWISE = [Blocks(q, kv) for q, kv in itertools.product((128, 256, 512), (128, 256, 512))]
_DECODE = {
    "pallas_tpu": [Blocks(0, kv) for kv in (128, 256, 512, 1024, 2048)],
    "pallas_gpu": [Blocks(0, kv) for kv in (64, 128, 256)],
}


def candidates(impl: str, kind: str, length: int) -> list[Blocks]:
    """Sizes to try for pass ``kind``; an empty one where there is nothing to choose."""
    if kind == "decode":
        found = _DECODE.get(impl, [Blocks()])
    elif kind == "both":
        found = _BLOCKWISE if impl == "xla_blockwise" else [Blocks()]
    else:
        found = {"pallas_tpu": _TPU, "pallas_gpu": _GPU}[impl]
    # Above the length a block is the whole of it, so one of these is enough.
    return [sizes for sizes in found if max(sizes.q, sizes.kv) <= max(length, 64)] or found[:1]


def milliseconds(run: Callable, arguments, seconds: float = 0.3, rounds: int = 3) -> float:
    """Median time of one ``run(*arguments)`` on the device: many in one program, each after the
    other, and the cost of starting a program taken off."""

    @jax.jit
    def repeat(times, arguments):
        def again(_, arguments):
            first, *rest = arguments
            # A number of each result goes into the next run's input: none can be left out, nor
            # begin early.
            token = sum(
                x[(0,) * x.ndim].astype(jnp.float32) for x in jax.tree.leaves(run(first, *rest))
            )
            start = (0,) * first.ndim
            return first.at[start].add((1e-30 * token).astype(first.dtype)), *rest

        return lax.fori_loop(0, times, again, arguments)

    def wall(times: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(repeat(jnp.int32(times), arguments))
        return time.perf_counter() - start

    wall(1)
    once = max(min(wall(2) for _ in range(3)) / 2, 1e-7)
    times = max(2, round(seconds / once))
    return statistics.median((wall(times + 1) - wall(1)) / times for _ in range(rounds)) * 1e3


def passes(impl: str) -> tuple[str, ...]:
    """What there is to time of an implementation."""
    return ("forward", "dq", "dkv", "both", "decode") if impl.startswith("pallas") else ("both",)


def shape_of(length: int, head_width: int, heads: int, tokens: int, dtype: str):
    """Random q, k, v, (rows, length, heads, head_width) each; rows so that there are ``tokens`` of
    them."""
    shape = (max(1, tokens // length), length, heads, head_width)
    return tuple(
        jax.random.normal(key, shape, jnp.dtype(dtype))
        for key in jax.random.split(jax.random.key(0), 3)
    )


def _run_of(impl: str, kind: str, causal: bool, blocks: Blocks, q, k, v) -> tuple[Callable, tuple]:
    """(function, its arguments) of one pass."""
    sized = (blocks.q, blocks.kv) if blocks.kv else None
    if kind == "both":

        def loss(q, k, v):
            return (
                attention(q, k, v, causal=causal, impl=impl, block_sizes=sized)
                .astype(jnp.float32)
                .sum()
            )

        return jax.grad(loss, (0, 1, 2)), (q, k, v)
    if kind == "decode":
        run = functools.partial(
            dispatch.decode,
            impl,
            scale=q.shape[3] ** -0.5,
            softcap=None,
            block_kv=blocks.kv or None,
        )
        return run, (
            q[:, 0],
            *(x.swapaxes(1, 2) for x in (k, v)),
            jnp.full(q.shape[:1], q.shape[1], jnp.int32),
        )
    mask = Mask(causal)
    plan = dispatch.plan_for(impl, q, k, mask, block_sizes=blocks)

    def forward(q, k, v):
        return dispatch.forward(plan, q, k, v, mask)

    def gradients(q, k, v, out, lse):
        # What is not returned is not computed, so one of the two kernels runs.
        grads = dispatch.backward(plan, q, k, v, mask, out, lse, out, jnp.zeros_like(lse))
        return grads[0] if kind == "dq" else grads[1:]

    return (
        (forward, (q, k, v))
        if kind == "forward"
        else (gradients, (q, k, v, *jax.jit(forward)(q, k, v)))
    )


def sweep(
    impls: Sequence[str],
    lengths: Sequence[int],
    widths: Sequence[int],
    dtypes: Sequence[str],
    *,
    heads: int,
    tokens: int,
    causal: Sequence[bool] = (True, False),
) -> Iterator[dict]:
    """Yields rows of the table, the best sizes of each shape and pass with their time, and as it
    goes those that the compiler refuses are left out. What an implementation cannot do is
    skipped."""
    for dtype, width, length, masked, impl in itertools.product(
        dtypes, widths, lengths, causal, impls
    ):
        q, k, v = shape_of(length, width, heads, tokens, dtype)
        if refusal(impl, call_of(q, k, masked, frozenset())):
            continue
        for kind in passes(impl):
            if kind == "decode" and masked:
                continue
            timed = {}
            for blocks in candidates(impl, kind, length):
                run, arguments = _run_of(impl, kind, masked, blocks, q, k, v)
                try:
                    timed[blocks] = milliseconds(run, arguments)
                except (jax.errors.JaxRuntimeError, ValueError):  # does not fit the device
                    continue
            if timed:
                best = min(timed, key=timed.get)
                kept = (
                    ("q", "kv", "compute", "stages")
                    if impl == "pallas_gpu"
                    else ("q", "kv", "compute")
                )
                sizes = {
                    name: getattr(best, name) for name in kept if best.kv and getattr(best, name)
                }
                yield {
                    "device": device(),
                    "impl": impl,
                    "dtype": dtype,
                    "head_width": width,
                    "length": length,
                    "causal": masked,
                    "pass": kind,
                    **sizes,
                    "ms": round(timed[best], 4),
                    "rows": q.shape[0],
                    "heads": heads,
                    "source": f"timed, {len(timed)} sizes tried, jax {jax.__version__}, "
                    f"{time.strftime('%Y-%m-%d')}, {compat.device_kind()}",
                }


def impls_here(dtype: str) -> list[str]:
    """Those that run on this device."""
    probe = jax.ShapeDtypeStruct((1, 128, 1, 128), dtype)
    return [
        name for name in SUPPORT if refusal(name, call_of(probe, probe, True, frozenset())) is None
    ]
