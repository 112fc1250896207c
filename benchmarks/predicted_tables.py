"""Write docs/predicted_rows.md, the tables of benchmarks/results/predicted_step.json.

python benchmarks/predicted_tables.py
"""

import argparse
import json
from pathlib import Path

from predicted_shapes import GOALS, SHAPES
from predicted_step import RESULT, figures

from mtnlg_jax.planning import topology

PAGE = RESULT.parents[2] / "docs" / "predicted_rows.md"
GIB = 2**30
SHOWN = 3  # classes of a row, after the products
TITLE = """# Predicted rows

Every step that [predicted step](predicted_step.md) compares, by
`benchmarks/predicted_tables.py`. **Nothing here was measured on a TPU.** `data64` has
mesh.data=64 and the rest over tensor or context; a word behind it is train.recompute
(`elementwise` where there is none), the type of the sums of gradients, the stage of ZeRO (3
where there is none), or `overlap` for mesh.tp_comm_overlap. `fsdp64` is MaxText's axis, and a
word behind it its remat_policy (`minimal` where there is none).
`benchmarks/predicted_shapes.py` has the flags of each.

"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default=str(PAGE), help=f"default {PAGE}")
    flags = parser.parse_args()
    kept = json.loads(RESULT.read_text())["rows"]
    Path(flags.output).write_text(page(kept))


def page(kept: dict) -> str:
    """Return the page of the rows that are ``kept``."""
    lines = [TITLE + summary(kept)]
    for name, shape in SHAPES.items():
        lines.append(f"\n### {name}\n\n{shape.about} on {shape.described}.")
        for side, title in (("ours", "this package"), ("maxtext", "MaxText 0.2.5")):
            rows = of(kept, name, side)
            if rows:
                lines.append(f"\n| {title} | seconds | MFU | peak, GiB | most after the products |")
                lines.append("| --- | --- | --- | --- | --- |")
                for setting, row in sorted(rows.items(), key=lambda each: seconds_of(each[1])):
                    lines.append(f"| {setting} | {cells(row, name)} |")
    return "\n".join(lines) + "\n"


def of(kept: dict, shape: str, side: str) -> dict[str, dict]:
    start = f"{shape}/{side}/"
    return {name.removeprefix(start): row for name, row in kept.items() if name.startswith(start)}


def seconds_of(row: dict) -> float:
    return row.get("seconds", float("inf"))


def kind_of(shape: str) -> str:
    return topology.parse(SHAPES[shape].described).kind


def cells(row: dict, shape: str) -> str:
    if "seconds" not in row:
        why = row["failure"]
        return "does not fit | | | " if "memory" in why else f"fails | | | {why[:80]}"
    others = {
        label: share
        for label, share in row["shares"].items()
        if label not in ("products", "outside loops") and share >= 0.01
    }
    most = sorted(others.items(), key=lambda each: -each[1])[:SHOWN]
    text = ", ".join(f"{label} {100 * share:.1f} %" for label, share in most)
    return " | ".join([*figures(row, kind_of(shape)), f"{row['peak_bytes'] / GIB:.1f}", text])


def summary(kept: dict) -> str:
    """Return the table of the best settings of each side beside the goals."""
    lines = [
        "| step | this package's best | MaxText's best | ratio of seconds | MFU, goal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, goal in GOALS.items():
        best = {}
        for side in ("ours", "maxtext"):
            rows = of(kept, name, side)
            fitting = [setting for setting in rows if "seconds" in rows[setting]]
            if fitting:
                setting = min(fitting, key=lambda each: rows[each]["seconds"])
                best[side] = setting, rows[setting]
        if "ours" not in best:
            continue
        setting, mine = best["ours"]
        theirs = best.get("maxtext")
        seconds, mfu = figures(mine, kind_of(name))
        lines.append(
            f"| {name}, {SHAPES[name].described} | {setting}: {seconds} s | "
            + (f"{theirs[0]}: {figures(theirs[1], kind_of(name))[0]} s | " if theirs else "- | ")
            + (f"{mine['seconds'] / theirs[1]['seconds']:.2f} | " if theirs else "- | ")
            + f"{mfu}, {100 * goal:.0f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
