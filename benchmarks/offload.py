"""Compile a train step that fits a slice of v5e only with train.offload or moments in fewer bits.

    python benchmarks/offload.py                    all rows
    python benchmarks/offload.py both int8          rows with one of these words

The results go to benchmarks/results/offload.json; rows that are not compiled keep their old
results. Each row is what `launch/compile_ahead.py --config=configs/ladder.py:7.5b
--topology=v5e:2x4` reports with the row's settings, beside the planner's figures. This needs the
extra `ahead` and some minutes a row.
"""

import argparse
import datetime
import json
import os
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
CONFIG = "configs/ladder.py:7.5b"
TOPOLOGY = "v5e:2x4"
LAYOUT = ["mesh.data=8", "mesh.tensor=1", "mesh.zero=3"]
ROWS = [
    ["train.offload=none"],
    ["train.offload=moments"],
    ["train.offload=both", "train.recompute=elementwise"],
    ["optimizer.moments_dtype=int8"],
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="words of the settings; default: all rows")
    parser.add_argument("--output", default=str(FOLDER / "results" / "offload.json"))
    args = parser.parse_args()
    from mtnlg_jax.config import load_config
    from mtnlg_jax.planning import aot
    from mtnlg_jax.planning import topology as described

    chosen = [row for row in ROWS if not args.words or any(w in " ".join(row) for w in args.words)]
    if not chosen:
        parser.error(f"no row contains {' or '.join(args.words)}; the rows are: {ROWS}")
    for settings in chosen:
        config = load_config(f"{FOLDER.parent}/{CONFIG}", [*LAYOUT, *settings])
        found = row_of(settings, config, aot.measure(config, described.parse(TOPOLOGY)))
        print(json.dumps(found), flush=True)
        save(Path(args.output), found)
    print(f"written to {args.output}")


def row_of(settings: list[str], config, measurement) -> dict:
    """Return the row of a config's ``measurement`` (planning.aot)."""
    from mtnlg_jax.hardware import CHIPS
    from mtnlg_jax.planning.cost import Job
    from mtnlg_jax.planning.layout import layout_of

    estimate = Job(config, CHIPS["v5e"]).estimate(layout_of(config, measurement.devices))
    return {
        "set": settings,
        "fits": measurement.fits,
        "needed_gib": gib(measurement.most),
        "limit_gib": gib(measurement.limit),
        "arguments_gib": gib(measurement.arguments),
        "host_gib_per_device": gib(measurement.host),
        "failure": measurement.failure,
        "planned_gib": gib(estimate.bytes),
        "planned_host_gib_per_device": gib(estimate.host),
        "planned_step_seconds": round(estimate.step_seconds, 2),
        "planned_seconds_of_host_link": round(estimate.seconds["host"], 2),
        "compile_seconds": round(measurement.compile_seconds, 1),
        "processor_seconds": round(measurement.processor_seconds, 1),
        "compiler": measurement.compiler,
        "date": datetime.date.today().isoformat(),
    }


def gib(size: float | None) -> float | None:
    return None if size is None else round(size / 2**30, 2)


def save(path: Path, row: dict) -> None:
    """Put ``row`` among those in the file at ``path``."""
    import importlib.metadata

    from mtnlg_jax import storage

    known = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {tuple(each["set"]): each for each in [*known, row]}
    result = {
        "device": f"CPU, {os.cpu_count()} cores; the chips are described, none was present",
        "versions": {"jax": importlib.metadata.version("jax"), "libtpu": row["compiler"]},
        "command": "python benchmarks/offload.py",
        "config": CONFIG,
        "topology": TOPOLOGY,
        "layout": LAYOUT,
        "rows": [rows[key] for key in map(tuple, ROWS) if key in rows],
    }
    storage.write_file(path.parent, path.name, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
