"""Measure block sizes and implementations on the device of this process, for the table of
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
from mtnlg_jax.model.kernels.blocks import PASSES, Blocks
from mtnlg_jax.model.kernels.call import AttentionCall
from mtnlg_jax.model.kernels.mask import Mask
from mtnlg_jax.model.kernels.select import SUPPORT, device, unsupported_reason

# The sizes to try. GPU kernels have 64 queries a warpgroup.
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
    """Block sizes to try for pass ``kind``. A single empty one if there is nothing to choose."""
    if kind == "decode":
        found = _DECODE.get(impl, [Blocks()])
    elif kind == "both":
        found = _BLOCKWISE if impl == "xla_blockwise" else [Blocks()]
    else:
        found = {"pallas_tpu": _TPU, "pallas_gpu": _GPU}[impl]
    # Blocks longer than the sequence all become the whole sequence, so shorter ones suffice.
    return [sizes for sizes in found if max(sizes.q, sizes.kv) <= max(length, 64)] or found[:1]


def milliseconds(run: Callable, arguments, seconds: float = 0.3, rounds: int = 3) -> float:
    """Median time of one ``run(*arguments)`` on the device: many runs in one program, one after the
    other, less the cost of starting a program."""

    # The number of runs is traced: one compilation serves all.
    @jax.jit
    def repeat(times, arguments):
        def again(_, arguments):
            first, *rest = arguments
            # One number of each result enters the next run's input, so that XLA can neither leave a
            # run out nor start it early.
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
    # A first guess of one run, to choose how many fill ``seconds``.
    once = max(min(wall(2) for _ in range(3)) / 2, 1e-7)
    times = max(2, round(seconds / once))
    # The difference removes the start of the program, which on a GPU takes longer than a small
    # kernel.
    return statistics.median((wall(times + 1) - wall(1)) / times for _ in range(rounds)) * 1e3


def passes(impl: str) -> tuple[str, ...]:
    """The passes of an implementation that can be timed."""
    return PASSES if impl.startswith("pallas") else ("both",)


def shape_of(length: int, head_width: int, heads: int, tokens: int, dtype: str):
    """Random q, k, v, each (rows, length, heads, head_width), with as many rows as ``tokens``
    fill."""
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
            out = attention(q, k, v, causal=causal, impl=impl, block_sizes=sized)
            return out.astype(jnp.float32).sum()

        return jax.grad(loss, (0, 1, 2)), (q, k, v)
    # One query a row: the first of each sequence, against all keys.
    if kind == "decode":
        run = functools.partial(
            dispatch.decode,
            impl,
            scale=q.shape[3] ** -0.5,
            softcap=None,
            block_kv=blocks.kv or None,
        )
        # A full cache, the longest case.
        lengths = jnp.full(q.shape[:1], q.shape[1], jnp.int32)
        return run, (q[:, 0], k.swapaxes(1, 2), v.swapaxes(1, 2), lengths)
    mask = Mask(causal)
    plan = dispatch.plan_for(impl, AttentionCall(q, k, v, causal=causal, block_sizes=blocks))

    def forward(q, k, v):
        return dispatch.forward(plan, q, k, v, mask)

    def gradients(q, k, v, out, lse):
        # XLA drops the kernel whose result is not returned.
        grads = dispatch.backward(plan, q, k, v, mask, out, lse, out, jnp.zeros_like(lse))
        return grads[0] if kind == "dq" else grads[1:]

    if kind == "forward":
        return forward, (q, k, v)
    return gradients, (q, k, v, *jax.jit(forward)(q, k, v))


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
    """Yield rows of the table: the best sizes of each shape and pass, with their time. Sizes that
    the compiler refuses are left out, and so are shapes that an implementation does not support."""
    for dtype, width, length, masked, impl in itertools.product(
        dtypes, widths, lengths, causal, impls
    ):
        q, k, v = shape_of(length, width, heads, tokens, dtype)
        if unsupported_reason(impl, AttentionCall(q, k, v, causal=masked)):
            continue
        for kind in passes(impl):
            # A single query has no causal form; it is timed once.
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
                best = min(timed, key=lambda blocks: timed[blocks])
                # The implementations without a choice of sizes record their time alone.
                sizes = {name: size for name, size in best._asdict().items() if best.kv and size}
                if impl != "pallas_gpu":
                    sizes.pop("stages", None)
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
    """The implementations that run on this device."""
    probe = jax.ShapeDtypeStruct((1, 128, 1, 128), dtype)
    call = AttentionCall(probe, probe, probe)
    return [name for name in SUPPORT if unsupported_reason(name, call) is None]
