"""Check and time our attention kernels on a GPU beside cuDNN's and PyTorch's, in one run.

    pip install -c launch/constraints.txt -e '.[gpu]'     and, for the last column, torch
    python benchmarks/attention.py

The result goes to benchmarks/results/attention_CARD.json. First the fast forms of our kernels are
compared with exact attention, then all are timed.

Only device time counts: many runs in one program minus the cost of starting it (JAX), or CUDA
events around many calls (PyTorch). Data is random, because multiplying zeros draws less power and
runs faster. TFLOP/s count the two products of a forward pass and five of a backward pass, half of
them where causal. For comparison, a product of two 8192 x 8192 matrices shows what the card can do,
and a copy of 1 GiB does so for decoding, which is bound by memory. Where something failed, a row
names the error instead of a number. A failed comparison ends the run with exit code 1.

A card other than Hopper has no kernels of ours, so they are left out. --small tries the script
anywhere in seconds, with interpreted kernels if there is no card.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import sys
import time
from pathlib import Path

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
WIDTHS = (64, 128, 160)
HEADS = 16
TOKENS = 16384
# (rows, queries, keys, heads, key/value heads, width, causal, masks): the fast forms differ from
# the interpreted ones.
PARITY = [
    (2, 1000, 1000, 4, 4, 64, True, ()),
    (1, 1024, 1024, 8, 2, 128, True, ()),
    (2, 700, 1111, 4, 1, 128, False, ()),
    (1, 2048, 2048, 4, 4, 160, True, ()),
    (2, 999, 999, 4, 2, 160, True, ("segment_ids",)),
    (3, 300, 800, 4, 2, 96, True, ("kv_lengths", "q_offset")),
    (1, 1500, 1500, 2, 2, 192, True, ()),
    (1, 1200, 1200, 2, 2, 256, True, ()),
    (1, 1300, 1300, 2, 2, 128, True, ("window",)),
    (2, 640, 640, 4, 4, 128, True, ("softcap",)),
    (1, 1, 900, 8, 8, 128, False, ("kv_lengths",)),
]
TOLERANCE = {
    "float16": 4e-3,
    "bfloat16": 3e-2,
}  # relative to the largest value: one rounding of the weights and one at the end


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="default: benchmarks/results/attention_CARD.json")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument(
        "--small", action="store_true", help="tiny shapes, nothing written: tries the script"
    )
    args = parser.parse_args()

    import jax

    from mtnlg_jax import compat, storage
    from mtnlg_jax.model.kernels import select

    card = jax.default_backend() == "gpu"
    if not card and not args.small:
        print(
            "error: there is no GPU here (JAX sees "
            f"{jax.default_backend()}); --small tries the script without one",
            file=sys.stderr,
        )
        return 2
    ours = select.device() in ("H100", "H200")
    interpreted = contextlib.nullcontext() if card else compat.interpreted()
    with interpreted:
        parity = (
            [
                check(case, dtype)
                for case in (PARITY[1:2] if args.small else PARITY)
                for dtype in (("float16",) if args.small else ("float16", "bfloat16"))
            ]
            if ours or args.small
            else []
        )
    for row in parity:
        print(
            f"parity {row['case']} {row['dtype']}: "
            + (
                row["failure"]
                or ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
            ),
            flush=True,
        )
    result = {
        "device": compat.device_kind(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": versions(),
        "parity": parity,
        "matmul_8192_tflops": None,
        "copy_gb_s": None,
        "attention": [],
        "decode": [],
    }
    if args.small:
        args.lengths = [256]
        args.widths = [64]
        size = 256
    else:
        size = 8192
    result["matmul_8192_tflops"] = matmul(size)
    result["copy_gb_s"] = copy(1 << (20 if args.small else 30))
    print(
        f"calibration: {result['matmul_8192_tflops']:.1f} TFLOP/s, "
        f"copy {result['copy_gb_s']:.0f} GB/s",
        flush=True,
    )
    for width in args.widths:
        for length in args.lengths:
            for causal in (True, False):
                row = speed(length, width, causal, ours, args.small)
                result["attention"].append(row)
                print(show(row), flush=True)
    if ours:
        result["decode"] = [
            decoding(width, keys, rows, int8, result["copy_gb_s"])
            for width in args.widths
            for keys in (2048, 16384)
            for rows in (8, 32)
            for int8 in (False, True)
        ]
        for row in result["decode"]:
            print(
                f"decode H={row['width']} S={row['keys']} B={row['rows']} {row['cache']}: "
                f"{row['gb_s']} GB/s, {row['of_copy']} of a copy",
                flush=True,
            )
    if not args.small:
        path = Path(
            args.output or Path(__file__).parent / "results" / f"attention_{select.device()}.json"
        )
        storage.write_file(path.parent, path.name, (json.dumps(result, indent=1) + "\n").encode())
        print(f"written to {path}")
    return 1 if any(row["failure"] for row in parity) else 0


def versions() -> dict:
    found = {}
    for name in (
        "jax",
        "jaxlib",
        "jax-cuda12-plugin",
        "jax-cuda13-plugin",
        "nvidia-cudnn-cu12",
        "nvidia-cudnn-cu13",
        "torch",
    ):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check(case, dtype: str) -> dict:
    """Compare output, log-sum-exp and gradients of the kernels with exact attention in float32 for
    one shape."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mtnlg_jax.model.attention import attention

    rows, queries, keys, heads, kv_heads, width, causal, masks = case
    draws = np.random.default_rng(0)
    q, d_out = (
        jnp.asarray(draws.standard_normal((rows, queries, heads, width)), dtype) for _ in range(2)
    )
    k, v = (
        jnp.asarray(draws.standard_normal((rows, keys, kv_heads, width)), dtype) for _ in range(2)
    )
    options = {"causal": causal}
    if "segment_ids" in masks:
        options["segment_ids"] = jnp.asarray(
            np.sort(draws.integers(0, 4, (rows, queries)), 1), jnp.int32
        )
    if "kv_lengths" in masks:
        options["kv_lengths"] = jnp.asarray(draws.integers(0, keys + 1, rows), jnp.int32)
    if "q_offset" in masks:
        options["q_offset"] = jnp.asarray(draws.integers(0, keys, rows), jnp.int32)
    options |= {"window": 300} if "window" in masks else {}
    options |= {"softcap": 5.0} if "softcap" in masks else {}

    def everything(impl, q, k, v):
        def loss(q, k, v):
            out, lse = attention(q, k, v, impl=impl, return_lse=True, **options)
            seen = jnp.where(jnp.isfinite(lse), lse, 0.0)
            return jnp.sum(out.astype(jnp.float32) * d_out) + seen.sum(), (out, seen)

        grads, outs = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return dict(zip(("out", "lse", "dq", "dk", "dv"), (*outs, *grads), strict=True))

    row = {"case": list(case), "dtype": dtype, "errors": {}, "failure": ""}
    try:
        got = jax.jit(functools.partial(everything, "pallas_gpu"))(q, k, v)
        want = jax.jit(functools.partial(everything, "xla"))(
            *(x.astype(jnp.float32) for x in (q, k, v))
        )
        for name in got:
            a, b = (np.asarray(x[name], np.float64) for x in (got, want))
            row["errors"][name] = float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
        worst = max(row["errors"], key=row["errors"].get)
        if not row["errors"][worst] < TOLERANCE[dtype]:
            row["failure"] = (
                f"{worst} is off by {row['errors'][worst]:.2e}, above {TOLERANCE[dtype]}"
            )
    except Exception as error:  # any error of the compiler or driver belongs in the result
        row["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


def matmul(size: int) -> float:
    """Return TFLOP/s of a bfloat16 product of two square matrices."""
    import jax
    import jax.numpy as jnp

    from mtnlg_jax.model.kernels.tune import milliseconds

    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return 2 * size**3 / milliseconds(lambda a, b: a @ b, (a, b)) / 1e9


def copy(size: int) -> float:
    """Return GB/s, read and written, of copying ``size`` bytes."""
    import jax.numpy as jnp

    from mtnlg_jax.model.kernels.tune import milliseconds

    x = jnp.ones(size // 4, jnp.float32)
    return 2 * size / milliseconds(lambda x, y: x + y, (x, jnp.float32(1))) / 1e6


def speed(length: int, width: int, causal: bool, ours: bool, small: bool) -> dict:
    """Return TFLOP/s of each implementation for the forward pass, and for all gradients without
    it."""
    import jax
    import jax.numpy as jnp

    from mtnlg_jax.model.attention import attention
    from mtnlg_jax.model.kernels.tune import milliseconds, shape_of

    tokens, heads = (length, 2) if small else (TOKENS, HEADS)
    q, k, v = shape_of(length, width, heads, tokens, "bfloat16")
    flops = 4 * q.shape[0] * heads * length**2 * width / (2 if causal else 1)
    row = {"length": length, "width": width, "causal": causal, "rows": q.shape[0], "heads": heads}
    for impl in (["pallas_gpu"] if ours else []) + (["xla_blockwise"] if small else ["cudnn"]):

        def forward(q, k, v, impl=impl):
            return attention(q, k, v, causal=causal, impl=impl)

        def both(q, k, v, forward=forward):
            out, back = jax.vjp(forward, q, k, v)
            return out, *back(v if out.shape == v.shape else jnp.ones_like(out))

        try:
            first = milliseconds(forward, (q, k, v))
            all_of_it = milliseconds(both, (q, k, v))
            row[impl] = {
                "forward_ms": first,
                "both_ms": all_of_it,
                "forward": flops / first / 1e9,
                "backward": 2.5 * flops / max(all_of_it - first, 1e-9) / 1e9,
            }
        except Exception as error:
            row[impl] = {"failure": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    with contextlib.suppress(ImportError):
        row["torch"] = torch_speed(q.shape, causal, flops)
    return row


def torch_speed(shape, causal: bool, flops: float) -> dict:
    """Return the same for PyTorch's scaled_dot_product_attention with its default backend."""
    import torch

    if not torch.cuda.is_available():
        return {"failure": "PyTorch sees no GPU"}
    rows, length, heads, width = shape
    q, k, v = (
        torch.randn(
            rows, heads, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        for _ in range(3)
    )
    d_out = torch.randn_like(q)

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def both():
        torch.autograd.grad(forward(), (q, k, v), d_out)

    def timed(run) -> float:
        for _ in range(3):
            run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times = max(5, round(0.3 / (time.perf_counter() - begin)))
        start.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / times

    first = timed(forward)
    all_of_it = timed(both)
    return {
        "forward_ms": first,
        "both_ms": all_of_it,
        "forward": flops / first / 1e9,
        "backward": 2.5 * flops / max(all_of_it - first, 1e-9) / 1e9,
    }


def decoding(width: int, keys: int, rows: int, int8: bool, copy_gb_s: float) -> dict:
    """Return GB/s of cache read by the decode kernel, and the ratio to the bandwidth of a copy."""
    import jax
    import jax.numpy as jnp

    from mtnlg_jax.model.attention import decode_attention
    from mtnlg_jax.model.kernels.tune import milliseconds

    heads = 16
    shape = (rows, heads, keys, width)
    q = jax.random.normal(jax.random.key(0), (rows, heads, width), jnp.bfloat16)
    draws = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in (1, 2)]
    lengths = jnp.full(rows, keys, jnp.int32)
    scales = ()
    if int8:
        draws = [jnp.round(x * 40).astype(jnp.int8) for x in draws]
        scales = tuple(jnp.full(shape[:3], 1 / 40, jnp.float32) for _ in draws)

    def run(q, k, v, *scales):
        named = dict(zip(("k_scale", "v_scale"), scales, strict=False))
        return decode_attention(q, k, v, lengths, impl="pallas_gpu", **named)

    row = {
        "width": width,
        "keys": keys,
        "rows": rows,
        "heads": heads,
        "cache": "int8" if int8 else "bfloat16",
        "gb_s": None,
        "of_copy": None,
    }
    try:
        size = sum(x.nbytes for x in (*draws, *scales))
        row["gb_s"] = round(size / milliseconds(run, (q, *draws, *scales)) / 1e6, 1)
        row["of_copy"] = round(row["gb_s"] / copy_gb_s, 3)
    except Exception as error:
        row["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


def show(row: dict) -> str:
    parts = [f"H={row['width']} T={row['length']} {'causal' if row['causal'] else 'both ways'}:"]
    for name in ("pallas_gpu", "cudnn", "xla_blockwise", "torch"):
        if name in row:
            said = row[name]
            parts.append(
                f"{name} "
                + (
                    said["failure"]
                    if "failure" in said
                    else f"{said['forward']:.0f} / {said['backward']:.0f} TFLOP/s"
                )
            )
    return " ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
