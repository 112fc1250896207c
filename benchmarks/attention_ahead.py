"""Estimate our attention kernels beside JAX's splash and flash attention with the TPU compiler.

    python benchmarks/attention_ahead.py

The result goes to benchmarks/results/attention_ahead.json. No TPU is needed: these are estimates,
not times, and nothing here has run on a TPU.

For each described chip the same shapes are compiled for all three: bfloat16, causal, head width
128, one head a core. The compiler's static profile gives `estimated_cycles` of every kernel
(libtpu, --xla_jf_dump_static_llo_profile_to). It follows the scalar program, takes each branch as
it would be taken, and adds up bundles and transfers.

The profile treats a branch on a value read from memory as not taken. Splash reads from such a table
which blocks are visible, so here it gets the same answer as arithmetic on the grid position; the
rest of it is unchanged. Each implementation has its best of several block sizes, splash also of its
two backward passes. "Backward" is the sum of the kernels of a backward pass. The profile aborts on
some transfers of v5e, which is left out. It holds a kernel's VMEM twice, which leaves no room for
our backward pass on v5p from 16384 on; on v6e the one of 32768 needs more than 24 GB on the
compiling machine. Failures are printed and left out. On v5p flash attention lets the two cores
share the blocks of one head; the other two share only rows and heads.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

CHIPS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
WIDTH = 128
SPLASH = [
    (1024, 1024, 512),
    (1024, 1024, 1024),
]  # queries, keys, keys of an inner step; smaller ones are slower
FLASH = [512, 1024]
PASSES = {"forward": ["forward"], "backward": ["dq", "dkv"]}
GRADIENTS = {"dq": (0,), "dkv": (1, 2)}
# from here on, where a profile takes minutes and 10 GB or more, each has its best sizes of 8192
# only
LONG = 16384


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384, 32768])
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=list(PASSES))
    parser.add_argument(
        "--output", default=str(Path(__file__).parent / "results" / "attention_ahead.json")
    )
    parser.add_argument(
        "--one", nargs=4, help=argparse.SUPPRESS
    )  # chip, length, contender, pass: makes this the child
    args = parser.parse_args()
    if args.one:
        child(args.one[0], int(args.one[1]), *args.one[2:])
        return
    from mtnlg_jax import storage

    path = Path(args.output)
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {(row["chip"], row["length"]): row for row in known}
    for chip in args.chips:
        for length in args.lengths:
            row = rows.setdefault((chip, length), {"chip": chip, "length": length})
            row["date"] = datetime.date.today().isoformat()
            for name in CONTENDERS:
                row[name] = row.get(name, {}) | ask(chip, length, name, args.passes)
            result = {
                "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
                "command": "python benchmarks/attention_ahead.py",
                "unit": "estimated cycles of one head, bfloat16, causal, head width 128",
                "rows": list(rows.values()),
            }
            storage.write_file(
                path.parent, path.name, (json.dumps(result, indent=1) + "\n").encode()
            )
            print(show(row), flush=True)
    print(f"written to {path}")


def show(row: dict) -> str:
    said = [f"{row['chip']} {row['length']}:"]
    for kind in ("forward", "backward"):
        cycles = {name: row[name][kind]["cycles"] for name in CONTENDERS if kind in row[name]}
        said += [f"{kind} {name} {number:,}" for name, number in cycles.items()]
        ours = cycles.pop("ours", None)
        said += [f"(ours {ours / number:.2f} of {name})" for name, number in cycles.items() if ours]
    return "  ".join(said)


def ask(chip: str, length: int, contender: str, passes: list[str]) -> dict:
    """Return {"forward": {"cycles", "blocks"}, "backward": ...} of the best block sizes that memory
    allows."""
    best = {}
    for kind in passes:
        parts = [profiled(chip, length, contender, part) for part in PASSES[kind]]
        for blocks in [blocks for blocks in parts[0] if all(blocks in part for part in parts)]:
            # A kernel that computes all gradients at once is in both parts.
            kernels = {name: cycles for part in parts for name, cycles in part[blocks].items()}
            found = {"cycles": sum(kernels.values()), "blocks": json.loads(blocks)}
            best[kind] = min(best.get(kind, found), found, key=lambda each: each["cycles"])
    return best


def profiled(chip: str, length: int, contender: str, part: str) -> dict:
    """Return {blocks as JSON: {name of a kernel: its cycles}} of the blocks that compile."""
    from mtnlg_jax.planning import topology

    with tempfile.TemporaryDirectory() as folder:
        environment = topology.environment(topology.parse(CHIPS[chip]))
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder}"
        done = subprocess.run(
            [sys.executable, __file__, "--one", chip, str(length), contender, part],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            preexec_fn=leave_some_memory,
        )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not found:
        print(
            f"{contender}, {part}, at {length} on {chip} ended with {done.returncode}: "
            f"{done.stderr[-300:]}",
            file=sys.stderr,
        )
    return {json.dumps(each["blocks"]): each["kernels"] for each in found}


def leave_some_memory() -> None:
    """Limit the memory of this process: a profile may need more than there is, which would stop the
    machine."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - 3 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def child(chip: str, length: int, contender: str, part: str) -> None:
    """Print {"blocks", "kernels": {name: cycles}} for each choice of blocks that compiles."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from mtnlg_jax import compat
    from mtnlg_jax.planning import topology
    from mtnlg_jax.planning.kernel_profile import kernels_of

    described = topology.parse(CHIPS[chip])
    device = topology.devices(described)[0]
    compat.compile_for("tpu", device.device_kind)

    def placed(shapes):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)),
            shapes,
        )

    x = placed(jax.ShapeDtypeStruct((1, 1, length, WIDTH), jnp.bfloat16))
    for blocks, attend in CONTENDERS[contender](length):
        # The backward pass from the residuals of the forward pass, with only what these gradients
        # need, to have less to profile.
        try:
            with topology.abstract(device):
                if part == "forward":
                    function = attend
                    arguments = (x, x, x)
                else:

                    def function(backward, g):
                        return [backward(g)[at] for at in GRADIENTS[part]]

                    arguments = (
                        placed(jax.eval_shape(functools.partial(jax.vjp, attend), x, x, x)[1]),
                        x,
                    )
                text = jax.jit(function).lower(*arguments).compile().as_text()
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            print(f"{blocks}: {str(error)[:200]}", file=sys.stderr)
            continue
        found = dict(kernels_of(text))
        unknown = [name for name, number in found.items() if not number]
        if unknown:  # a sum without them would be too small
            print(f"{blocks}: no estimate of {', '.join(unknown)}", file=sys.stderr)
            continue
        print(json.dumps({"blocks": blocks, "kernels": found}), flush=True)


def ours(length: int):
    from mtnlg_jax.model.attention import attention

    def attend(q, k, v):
        # One head a row, so that heads-first and heads-last are the same bytes and nothing is
        # moved.
        return attention(
            *(x.reshape(-1, length, 1, WIDTH) for x in (q, k, v)), impl="pallas_tpu"
        ).reshape(q.shape)

    yield "as the table says", attend


def splash(length: int):
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    for q, kv, compute in SPLASH if length < LONG else SPLASH[-1:]:

        def visible(head, i, j, data_next, block_mask, mask_next, next_i=False, q=q, kv=kv):
            return (i if next_i else j), None, j * kv < (i + 1) * q, True

        kernel._next_nonzero = visible
        for fused in (False, True) if length < LONG else (True,):
            dq = {} if fused else {"block_q_dq": q, "block_kv_dq": kv}
            sizes = kernel.BlockSizes(
                block_q=q,
                block_kv=kv,
                block_kv_compute=compute,
                block_q_dkv=q,
                block_kv_dkv=kv,
                block_kv_dkv_compute=compute,
                use_fused_bwd_kernel=fused,
                **dq,
            )

            def attend(q, k, v, sizes=sizes):
                mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * q.shape[1])
                return jax.vmap(
                    kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
                )(q, k, v)

            yield [q, kv, compute, "fused" if fused else "apart"], attend


def flash(length: int):
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    for size in FLASH if length < LONG else FLASH[-1:]:
        if size <= length:
            names = (
                "block_q",
                "block_k_major",
                "block_k",
                "block_q_major_dkv",
                "block_k_major_dkv",
                "block_k_dkv",
                "block_q_dkv",
                "block_k_major_dq",
                "block_k_dq",
                "block_q_dq",
            )
            sizes = kernel.BlockSizes(block_b=1, **dict.fromkeys(names, size))
            yield (
                [size, size],
                functools.partial(
                    kernel.flash_attention, causal=True, sm_scale=WIDTH**-0.5, block_sizes=sizes
                ),
            )


CONTENDERS = {"ours": ours, "splash": splash, "flash": flash}

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
