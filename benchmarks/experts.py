"""Time the grouped product of experts beside one dense product of the same FLOPs, on this machine.

    python benchmarks/experts.py

Each token visits 2 of 8 experts, chosen at random, so a grouped product of all visits has the FLOPs
of one dense product of as many rows. Forward passes, and forward and backward passes together, run
in turns in one process; the result is the ratio of the medians, of wall time and of processor time.
`jax.lax.ragged_dot` runs in the first two turns. The result goes to
benchmarks/results/experts.json. --small tries the script in seconds with tiny sizes and writes
nothing.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
EXPERTS = 8
VISITS = 2
# Tokens, width, width of an expert: that of Mixtral is 3.5 times the model's.
SHAPES = [(2048, 512, 1792), (2048, 1024, 3584)]
SMALL = [(64, 32, 48)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=str(FOLDER / "results" / "experts.json"))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="tiny sizes, nothing written")
    args = parser.parse_args()

    import jax

    from mtnlg_jax import storage

    rows = []
    for shape in SMALL if args.small else SHAPES:
        for backward in (False, True):
            rows.append(measured(*shape, backward, 2 if args.small else args.turns))
            print(json.dumps(rows[-1]), flush=True)
    if args.small:
        return
    result = {
        "device": f"{jax.default_backend()}, {os.cpu_count()} cores",
        "load": [round(x, 1) for x in os.getloadavg()],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/experts.py",
        "experts": EXPERTS,
        "visits_of_a_token": VISITS,
        "dtype": "float32",
        "rows": rows,
    }
    path = Path(args.output)
    storage.write_file(path.parent, path.name, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written to {path}")


def measured(tokens: int, width: int, inner: int, backward: bool, turns: int) -> dict:
    """Return the median seconds of each form, and their ratios to the dense product."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mtnlg_jax.model.grouped import grouped_product

    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((tokens, EXPERTS)), -1)[:, :VISITS]
    sizes = jnp.asarray(np.bincount(chosen.reshape(-1), minlength=EXPERTS), jnp.int32)
    x = jnp.asarray(rng.normal(size=(tokens * VISITS, width)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(EXPERTS, width, inner)), jnp.float32)
    d = jnp.asarray(rng.normal(size=(tokens * VISITS, inner)), jnp.float32)
    forms = {
        "dense": (lambda x, w: x @ w, w[0]),
        "grouped": (lambda x, w: grouped_product(x, w, sizes), w),
        "ragged_dot": (lambda x, w: jax.lax.ragged_dot(x, w, sizes), w),
    }

    def both(product):
        def run(x, w):
            y, back = jax.vjp(product, x, w)
            return y, back(d)

        return run

    functions = {
        name: jax.jit(both(product) if backward else product)
        for name, (product, _) in forms.items()
    }
    wall: dict[str, list[float]] = {name: [] for name in forms}
    processor: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(turns + 1):  # the first one compiles
        for name, (_, weight) in forms.items():
            if name == "ragged_dot" and turn > 2:
                continue  # it takes several times as long
            starts = time.perf_counter(), time.process_time()
            jax.block_until_ready(functions[name](x, weight))
            if turn:
                wall[name].append(time.perf_counter() - starts[0])
                processor[name].append(time.process_time() - starts[1])
    found: dict = {
        "tokens": tokens,
        "width": width,
        "expert_width": inner,
        "backward": backward,
        "largest_group": int(sizes.max()),
    }
    for kind, seconds in (("wall", wall), ("processor", processor)):
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        found[f"{kind}_seconds"] = {name: round(median, 4) for name, median in medians.items()}
        found[f"{kind}_ratio"] = {
            name: round(median / medians["dense"], 3) for name, median in medians.items()
        }
    return found


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
