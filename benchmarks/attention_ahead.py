"""What the TPU compiler expects of our attention kernels, beside JAX's splash and flash attention, without a TPU.

    python benchmarks/attention_ahead.py                  writes benchmarks/results/attention_ahead.json

For one described chip after the other, the same shapes are compiled for each of the three: bfloat16, causal, head width
128, one head a core. The compiler's static profile gives every kernel `estimated_cycles` (libtpu, told by
--xla_jf_dump_static_llo_profile_to): it goes through the scalar program, takes each branch as it would be taken, and
adds up bundles and transfers. These are estimates, not times: nothing here has run on a TPU.

The profile takes a branch on a number that is read from memory as not taken. Splash reads from such a table which
blocks are visible, so here, and only here, it is handed the same answer as arithmetic on the place in the grid; all
else of it is as installed. Each contender has its best of several block sizes, splash also of its two backward passes.
"Backward" is the sum of the kernels of a backward pass; the profile aborts on some transfers of v5e, which is left out.
On v5p flash attention lets the two cores share the blocks of one head; the other two share rows and heads only.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CHIPS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
WIDTH = 128
SPLASH = [(1024, 1024, 512), (1024, 1024, 1024)]  # queries, keys, keys of an inner step; smaller ones are slower
FLASH = [512, 1024]
LONG = 16384  # from here on, where a profile takes minutes and 10 GB, each has its best sizes of 8192 only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "attention_ahead.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # chip, length, contender: makes this the child
    args = parser.parse_args()
    if args.one:
        child(args.one[0], int(args.one[1]), args.one[2])
        return
    path = Path(args.output)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for chip in args.chips:
        for length in args.lengths:
            row = {"chip": chip, "length": length, "date": datetime.date.today().isoformat()}
            row |= {name: ask(chip, length, name) for name in CONTENDERS}
            rows = [old for old in rows if (old["chip"], old["length"]) != (chip, length)] + [row]
            result = {"versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
                      "command": "python benchmarks/attention_ahead.py",
                      "unit": "estimated cycles of one head, bfloat16, causal, head width 128", "rows": rows}
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(show(row), flush=True)
    print(f"written to {path}")


def show(row: dict) -> str:
    said = [f"{row['chip']} {row['length']}:"]
    for kind in ("forward", "backward"):
        if kind not in row["ours"]:
            said.append(f"{kind} ours not told")
            continue
        ours = row["ours"][kind]["cycles"]
        said.append(f"{kind} ours {ours:,}" + "".join(
            f", {name} {row[name][kind]['cycles']:,} (ours {ours / row[name][kind]['cycles']:.2f} of it)"
            for name in ("splash", "flash") if row[name].get(kind)))
    return "  ".join(said)


def ask(chip: str, length: int, contender: str) -> dict:
    """{"forward": {"cycles", "blocks"}, "backward": ...} of the best block sizes."""
    from mtnlg_jax.ahead import topology

    with tempfile.TemporaryDirectory() as folder:
        environment = topology.environment(topology.parse(CHIPS[chip]))
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_static_llo_profile_to={folder}"
        done = subprocess.run([sys.executable, __file__, "--one", chip, str(length), contender], env=environment,
                              capture_output=True, text=True, errors="replace")
    best = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            for kind in ("forward", "backward"):
                if kind in found and found[kind] < best.get(kind, {"cycles": float("inf")})["cycles"]:
                    best[kind] = {"cycles": found[kind], "blocks": found["blocks"]}
    if not best:
        print(f"{contender} at {length} on {chip} gave nothing: {done.stderr[-300:]}", file=sys.stderr)
    return best


def child(chip: str, length: int, contender: str) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from mtnlg_jax import compat
    from mtnlg_jax.ahead import topology
    from mtnlg_jax.ahead.kernels import kernels_of

    described = topology.parse(CHIPS[chip])
    device = topology.devices(described)[0]
    compat.compile_for("tpu", device.device_kind)
    shape = (1, 1, length, WIDTH)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))
    for blocks, attend in CONTENDERS[contender](length):

        def both(q, k, v, attend=attend):
            return jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

        # The profile holds a kernel's VMEM twice, so that some backward passes fit v5p only without it.
        for function in (both, attend):
            try:
                with topology.abstract(device):
                    kernels = kernels_of(jax.jit(function).lower(x, x, x).compile().as_text())
            except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError):
                continue
            cycles = [(name, number) for name, number in kernels if number]
            backward = [number for name, number in cycles if re.search("dq|dkv|backward|bwd", name)]
            forward = [number for name, number in cycles if not re.search("dq|dkv|backward|bwd", name)]
            found = {"blocks": blocks, "forward": sum(forward)} | ({"backward": sum(backward)} if backward else {})
            print(json.dumps(found), flush=True)
            break


def ours(length: int):
    from mtnlg_jax.model.attention import attention

    def attend(q, k, v):
        # One head a row, so that heads-first and heads-last are the same bytes and nothing is moved.
        return attention(*(x.reshape(-1, length, 1, WIDTH) for x in (q, k, v)), impl="pallas_tpu").reshape(q.shape)

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
            sizes = kernel.BlockSizes(block_q=q, block_kv=kv, block_kv_compute=compute, block_q_dkv=q, block_kv_dkv=kv,
                                      block_kv_dkv_compute=compute, use_fused_bwd_kernel=fused, **dq)

            def attend(q, k, v, sizes=sizes):
                mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * q.shape[1])
                return jax.vmap(kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes))(q, k, v)

            yield [q, kv, compute, "fused" if fused else "apart"], attend


def flash(length: int):
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    for size in FLASH if length < LONG else FLASH[-1:]:
        if size <= length:
            names = ("block_q", "block_k_major", "block_k", "block_q_major_dkv", "block_k_major_dkv", "block_k_dkv",
                     "block_q_dkv", "block_k_major_dq", "block_k_dq", "block_q_dq")
            sizes = kernel.BlockSizes(block_b=1, **dict.fromkeys(names, size))
            yield [size, size], functools.partial(kernel.flash_attention, causal=True, sm_scale=WIDTH**-0.5,
                                                  block_sizes=sizes)


CONTENDERS = {"ours": ours, "splash": splash, "flash": flash}

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
