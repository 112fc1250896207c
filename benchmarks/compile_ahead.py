"""Compile the steps of the table in docs/compile_ahead.md for chips that are not present.

    python benchmarks/compile_ahead.py                    all rows
    python benchmarks/compile_ahead.py mtnlg_530b v6e     rows with one of these words

The results go to benchmarks/results/compile_ahead.json; rows that are not compiled keep their old
results. Each row is the report of launch/compile_ahead.py with the compiler flags of a run. This
needs the extra `ahead` and about half an hour.
"""

import argparse
import collections
import datetime
import importlib.metadata
import json
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
LADDER = {
    "1.7b": "4x8",
    "3.6b": "8x8",
    "7.5b": "16x8",
    "18.4b": "32x8",
    "39.1b": "64x8",
    "76.1b": "128x8",
    "145.6b": "192x8",
    "310.1b": "240x8",
    "529.6b": "315x8",
    "1008b": "384x8",
}
FULL = ["train.rampup_batch_size=none"]
ZERO3 = ["mesh.pipe=1", "mesh.data=128", "mesh.zero=3", *FULL]
CIRCULAR = [
    "mesh.pipe=15",
    "mesh.zero=1",
    "mesh.schedule=circular",
    "mesh.virtual_pipe=7",
    "mesh.flush=120",
    *FULL,
]
DECODE = ["mesh.pipe=1", "mesh.data=1", "mesh.tensor=128"]
# A host's cards share a layer, as messages between hosts are slow.
STAGES = ["mesh.pipe=15", "mesh.data=1", "mesh.tensor=8"]

# config, topology, step, --set values
ROWS = [
    ("mtnlg_530b.py", "v5p:8x8x16", "train", ZERO3),
    ("mtnlg_530b.py", "v5p:8x8x16", "train", [*ZERO3, "train.micro_batch_size=5"]),
    ("mtnlg_530b.py", "v5p:8x8x8*2", "train", ZERO3),
    ("mtnlg_530b.py", "v6e:16x16*4", "train", ZERO3),
    ("mtnlg_530b.py", "v5e:16x16*8", "train", [*ZERO3, "mesh.tensor=16"]),
    ("mtnlg_530b.py", "v5p:8x14x20", "train", FULL),
    ("mtnlg_530b.py", "H100:280x8", "train", FULL),
    ("mtnlg_530b.py", "H100:120x8", "train", CIRCULAR),
    *(
        ("mtnlg_530b.py", topology, step, held + rows)
        for topology, held in [("v5p:4x4x8", DECODE), ("v6e:8x16", DECODE), ("H100:15x8", STAGES)]
        for step, rows in [("prefill", []), ("decode", ["train.micro_batch_size=32"])]
    ),
    ("mixtral_8x7b.py", "v5p:4x4x8", "train", []),
    *((f"ladder.py:{name}", f"H100:{cards}", "train", []) for name, cards in LADDER.items()),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words",
        nargs="*",
        help="words of the config, the topology, the step or its settings; default: all rows",
    )
    parser.add_argument(
        "--output", default=str(FOLDER / "benchmarks" / "results" / "compile_ahead.json")
    )
    args = parser.parse_args()
    path = Path(args.output)
    chosen = [
        row for row in ROWS if not args.words or any(word in label(*row) for word in args.words)
    ]
    if not chosen:
        parser.error(
            f"no row contains {' or '.join(args.words)}; the rows are:\n"
            + "\n".join(label(*row) for row in ROWS)
        )
    known = json.loads(path.read_text()) if path.exists() else {"rows": [], "versions": {}}
    rows = {
        label(row["config"], row["topology"], row["step"], row["set"]): row for row in known["rows"]
    }
    for row in chosen:
        rows[label(*row)] = measured(*row)
        kept = [rows[name] for name in (label(*each) for each in ROWS) if name in rows]
        # Rows that are not compiled again keep the version of their compiler.
        save(path, kept, known["versions"] | versions())
        print(json.dumps(rows[label(*row)]), flush=True)
    print(f"written to {path}")


def label(config: str, topology: str, step: str, settings: list[str]) -> str:
    return " ".join([config, topology, step, *settings])


def measured(config: str, topology: str, step: str, settings: list[str]) -> dict:
    from mtnlg_jax.config import load_config
    from mtnlg_jax.planning import aot
    from mtnlg_jax.planning import topology as described
    from mtnlg_jax.planning.decode_bound import bound_of

    loaded = load_config(f"{FOLDER}/configs/{config}", settings)
    kernels: collections.Counter[str] = collections.Counter()  # over all depths of loops
    m = aot.measure(loaded, described.parse(topology), step)
    bound = bound_of(loaded, m)
    for kernel in m.kernels:
        kernels[kernel.name] += kernel.count
    return {
        "config": config,
        "topology": topology,
        "step": step,
        "set": settings,
        "devices": m.devices,
        "mesh": m.mesh,
        "fits": m.fits,
        "peak_gib": gib(m.peak),
        "limit_gib": gib(m.limit),
        "arguments_gib": gib(m.arguments),
        "flops_per_device": m.flops,
        "bound_tokens_per_second_per_device": bound and round(bound.tokens_per_second, 1),
        "kernels": kernels,
        "failure": m.failure,
        "flags": m.flags,
        "flags_left_out": m.flags_left_out,
        "compile_seconds": round(m.compile_seconds, 1),
        "processor_seconds": round(m.processor_seconds, 1),
        "resident_gib": gib(m.resident),
        "compiler": m.compiler,
        "date": datetime.date.today().isoformat(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the compilers here; libtpu may lie in a folder of its own."""
    from mtnlg_jax.planning.topology import APART

    found: dict[str, str] = {}
    for name in ("jax", "libtpu", "jax-cuda12-pjrt"):
        for path in (sys.path, [str(APART)]):
            for each in importlib.metadata.distributions(name=name, path=path):
                found.setdefault(name, each.version)
    return found


def gib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**30, 2)


def save(path: Path, rows: list[dict], versions: dict[str, str]) -> None:
    from mtnlg_jax import storage

    result = {
        "device": f"CPU, {os.cpu_count()} cores; the chips are described, none was present",
        "versions": versions,
        "command": "python benchmarks/compile_ahead.py",
        "rows": rows,
    }
    storage.write_file(path.parent, path.name, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
