"""Hold the planner's arithmetic against the steps that the TPU compiler's schedule predicts.

    python benchmarks/planner.py                            ratios, from the kept predictions
    python benchmarks/planner.py --compile                  predict all rows again, minutes for each
    python benchmarks/planner.py --compile --rows=v5e-7.5b  those whose names begin so

Rows are layouts that launch/plan.py ranks first, and some others, on slices of each kind of chip.
Predictions are kept in benchmarks/results/planner.json, with the sums of the script's last run. The
table that it prints is that of docs/predicted_step.md.
"""

import argparse
import datetime
import json
from pathlib import Path

from predicted_step import compiled, figures

from mtnlg_jax.config import load_config
from mtnlg_jax.hardware import CHIPS
from mtnlg_jax.planning.cost import Job
from mtnlg_jax.planning.estimate import Estimate
from mtnlg_jax.planning.layout import layout_of
from mtnlg_jax.planning.topology import parse

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "planner.json"

_LADDER = "configs/ladder.py"
_ZERO3 = "mesh.pipe=1 mesh.zero=3"


def _data(count: int, micro: int, recompute: str, tensor: int = 1) -> str:
    """Return the settings of ZeRO-3 over ``count`` parts of the rows."""
    return (
        f"{_ZERO3} mesh.data={count} mesh.tensor={tensor} train.micro_batch_size={micro} "
        f"train.recompute={recompute}"
    )


# name -> (config, slice, settings)
ROWS = {
    "v5e-1.7b": (f"{_LADDER}:1.7b", "v5e:8x8", _data(64, 8, "mlp")),
    "v5e-7.5b": (f"{_LADDER}:7.5b", "v5e:16x16", _data(256, 2, "full")),
    "v5e-7.5b-bfloat16": (
        f"{_LADDER}:7.5b",
        "v5e:16x16",
        f"{_data(256, 2, 'mlp')} train.reduce_dtype=bfloat16",
    ),
    "v5e-18.4b": (f"{_LADDER}:18.4b", "v5e:16x16", _data(128, 8, "full", 2)),
    "v5e-39.1b": (f"{_LADDER}:39.1b", "v5e:16x16", _data(64, 2, "elementwise", 4)),
    "v5p-7.5b": (f"{_LADDER}:7.5b", "v5p:4x4x4", _data(64, 8, "elementwise")),
    "v5p-76.1b": (
        f"{_LADDER}:76.1b",
        "v5p:8x8x8",
        "mesh.pipe=1 mesh.data=64 mesh.tensor=8 mesh.zero=1",
    ),
    "v5p-145.6b": (f"{_LADDER}:145.6b", "v5p:8x8x16", _data(128, 9, "elementwise", 8)),
    "v5p-310.1b": (
        f"{_LADDER}:310.1b",
        "v5p:8x8x16",
        f"{_data(8, 90, 'elementwise', 16)} mesh.context=8",
    ),
    "v5p-310.1b-pipe": (
        f"{_LADDER}:310.1b",
        "v5p:8x8x16",
        "mesh.pipe=8 mesh.data=16 mesh.tensor=8 mesh.zero=1 mesh.virtual_pipe=12",
    ),
    "v5p-529.6b": (
        f"{_LADDER}:529.6b",
        "v5p:8x8x16",
        "mesh.pipe=1 mesh.data=8 mesh.context=2 mesh.tensor=64 mesh.zero=1",
    ),
    "v6e-3.6b": (f"{_LADDER}:3.6b", "v6e:8x8", _data(64, 4, "elementwise")),
    "v6e-7.5b": (f"{_LADDER}:7.5b", "v6e:16x16", _data(256, 2, "elementwise")),
    "v6e-18.4b": (f"{_LADDER}:18.4b", "v6e:16x16", _data(128, 4, "elementwise", 2)),
    "v6e-18.4b-pipe": (
        f"{_LADDER}:18.4b",
        "v6e:16x16",
        "mesh.pipe=8 mesh.data=32 mesh.tensor=1 mesh.zero=1 mesh.virtual_pipe=5",
    ),
    "v6e-39.1b": (f"{_LADDER}:39.1b", "v6e:16x16", _data(256, 6, "full")),
}
_HEADER = (
    "| step | slice | layout | predicted | by sums | ratio |",
    "| --- | --- | --- | --- | --- | --- |",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="predict the rows again")
    parser.add_argument("--rows", default="", help="beginnings of names, with commas")
    flags = parser.parse_args()
    kept = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    for name in ROWS:
        if flags.compile and name.startswith(tuple(flags.rows.split(","))):
            kept[name] = compiled(["launch/compile_ahead.py", *arguments_of(name)])
            kept[name]["date"] = datetime.date.today().isoformat()
        if "seconds" in kept.get(name, {}):
            kept[name]["sums"] = round(estimate_of(name).step_seconds, 4)
        RESULT.write_text(json.dumps({"rows": kept}, indent=1) + "\n")
    kept = {name: kept[name] for name in ROWS if name in kept}
    print(*_HEADER, *(line_of(name, row) for name, row in kept.items()), sep="\n")


def arguments_of(name: str) -> list[str]:
    """Return the arguments of launch/compile_ahead.py for a row."""
    model, slice_, settings = ROWS[name]
    sets = [f"--set={setting}" for setting in settings.split()]
    return [f"--config={model}", f"--topology={slice_}", *sets, "--time", "--prove=0"]


def estimate_of(name: str) -> Estimate:
    """Return the planner's estimate of a row."""
    model, slice_, settings = ROWS[name]
    topology = parse(slice_)
    config = load_config(str(ROOT / model), settings.split())
    return Job(config, CHIPS[topology.kind]).estimate(layout_of(config, topology.chips))


def line_of(name: str, row: dict) -> str:
    """Return the line of a row in the table of docs/predicted_step.md."""
    layout = estimate_of(name).layout
    sizes = zip(("pipe", "data", "context", "tensor"), layout.mesh, strict=True)
    parts = [" x ".join(f"{axis} {size}" for axis, size in sizes if size > 1)]
    if layout.virtual_pipe > 1:
        parts.append(f"{layout.virtual_pipe} chunks")
    parts += [f"ZeRO {layout.zero}", f"micro-batch {layout.micro_batch_size}", layout.recompute]
    cells = [name, ROWS[name][1], ", ".join(parts)]
    if "seconds" in row:
        seconds = row["seconds"]
        shown, _ = figures(row, parse(ROWS[name][1]).kind)
        cells += [shown, f"{row['sums']:.2f}", f"{row['sums'] / seconds:.2f}"]
    else:
        cells += [row["failure"][:60], "", ""]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
