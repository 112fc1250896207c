"""Predict steps of this package and of MaxText under the same compiler, for the same shape.

    python benchmarks/predicted_step.py --maxtext=PYTHON                    every row
    python benchmarks/predicted_step.py --maxtext=PYTHON --rows=32b-v5p
    python benchmarks/predicted_step.py --rows=mtnlg,32b-v5p/ours/data64    ours alone

PYTHON is that of benchmarks/calibration.py. A row is written into
benchmarks/results/predicted_step.json as it comes, with its command. Both sides have the same
model, chips and global batch. A difference within the error of benchmarks/calibration.py is a tie.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from calibration import measure, topology_version
from predicted_shapes import FLAGS, SHAPES, rows

from mtnlg_jax.planning.prediction import is_beyond
from mtnlg_jax.planning.tpu_costs import RULES

RESULT = Path(__file__).parent / "results" / "predicted_step.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maxtext", help="Python of an environment with maxtext")
    parser.add_argument("--rows", default=",".join(SHAPES), help="names, with commas")
    parser.add_argument("--keep", help="folder for MaxText's programs; default: none is kept")
    parser.add_argument("--output", default=str(RESULT), help=f"default {RESULT}")
    flags = parser.parse_args()
    try:
        names = chosen(flags.rows.split(","))
    except ValueError as error:
        parser.error(str(error))
    if flags.maxtext is None and any("/maxtext/" in name for name in names):
        parser.error("rows of MaxText need --maxtext=PYTHON; --rows=SHAPE/ours leaves them out")
    output = Path(flags.output)
    result = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    for name in names:
        side = name.split("/")[1]
        row = ours(name) if side == "ours" else theirs(name, flags.maxtext, flags.keep)
        row["date"] = datetime.date.today().isoformat()
        print(name, json.dumps(row), flush=True)
        result["rows"][name] = row
        output.write_text(json.dumps(result, indent=1) + "\n")


def chosen(asked: list[str]) -> list[str]:
    """Return the rows whose names begin with one of ``asked``, up to a /."""
    found = [
        name for name in rows() if any(f"{name}/".startswith(f"{prefix}/") for prefix in asked)
    ]
    for prefix in asked:
        if not any(f"{name}/".startswith(f"{prefix}/") for name in found):
            raise ValueError(f"no row {prefix!r}; the shapes are {', '.join(SHAPES)}")
    return found


def ours(name: str) -> dict:
    """Compile a step of this package and keep what compile_ahead.py predicts."""
    shape_name, _, setting = name.split("/")
    shape = SHAPES[shape_name]
    plain, *added = setting.split("+")
    given = f"{shape.ours} --topology={shape.described} {shape.our_settings[plain]}"
    flags = " ".join(FLAGS[each] for each in added)
    return compiled(["launch/compile_ahead.py", *given.split(), "--time", "--prove=0"], flags)


def compiled(command: list[str], flags: str = "") -> dict:
    """Run ``command`` with the compiler ``flags`` and return what it predicts."""
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder, "said.json")
        subprocess.run(
            [sys.executable, *command, f"--json={beside}"],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        said = json.loads(beside.read_text())
    shown = " ".join(["python", *command])
    found = {
        "command": f'LIBTPU_INIT_ARGS="{flags}" {shown}' if flags else shown,
        "compiler": said["compiler"],
    }
    predicted = said["predicted"]
    if predicted is None:
        return found | {"failure": said["failure"][:300]}
    seconds = predicted["seconds"]
    return found | {
        "seconds": round(seconds, 4),
        "mfu": round(predicted["mfu"], 4),
        "hfu": round(predicted["hfu"], 4),
        "peak_bytes": said["peak"],
        "shares": {
            label: round(part / seconds, 3)
            for label, part in predicted["classes"].items()
            if part > 0.005 * seconds
        },
        "rules": predicted["rules"],
    }


def figures(row: dict, kind: str) -> tuple[str, str]:
    """Return seconds and MFU, in parentheses beyond the best published MFU of the chip."""
    seconds = f"{row['seconds']:.2f}"
    mfu = f"{100 * row['mfu']:.1f} %"
    return (f"({seconds})", f"({mfu})") if is_beyond(kind, row["mfu"]) else (seconds, mfu)


def theirs(name: str, python: str, keep: str | None) -> dict:
    shape_name, _, setting = name.split("/")
    found = measure(name.replace("/", "-"), SHAPES[shape_name].point(setting), python, keep)
    found |= {"compiler": f"libtpu {topology_version()}", "rules": RULES}
    kept = ("arguments", "flags", "peak_bytes", "shares", "failure", "compiler", "rules")
    return {key: found[key] for key in kept if key in found} | (
        {"seconds": found["predicted_seconds"], "mfu": found["predicted_mfu"]}
        if "predicted_seconds" in found
        else {}
    )


if __name__ == "__main__":
    main()
