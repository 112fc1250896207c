"""Measure what the near tier costs: the time of a step with and without it, in paired runs.

    python benchmarks/near_tier.py [--rounds=5] [--steps=80] [--near_every=10] [--processes=2]

Each round trains twice, with near copies and without, in turns, and the order is reversed every
round. A run's time of a step is that between the records of its first measured step and of its
last, so it holds everything between steps. The cost is the median over the rounds of the ratio of a
pair. The losses of both runs of a pair must be equal.

--store measures uploads instead: checkpoints go to a store on localhost whose every request takes
--seconds (tests/train/slow_store.py), so that an upload takes many steps. Steps during uploads are
compared with those of a run that saves to the disk at the same steps.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 5  # first steps, which compile
SMALL = {"rounds": 1, "steps": 20, "near_every": 5, "width": 32, "layers": 1, "length": 32}


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--near_every", type=int, default=10, help="steps")
    parser.add_argument("--processes", type=int, default=2, help="with 8 devices in all")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--folder", default="/dev/shm/mtnlg_jax", help="of near copies")
    parser.add_argument("--store", action="store_true", help="measure uploads")
    parser.add_argument("--seconds", type=float, default=0.05, help="of a request to the store")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script out")
    parser.add_argument("--output", help="default: near_tier.json or upload.json of results")
    args = parser.parse_args(argv)
    if args.small:
        vars(args).update(SMALL)
    name = "upload.json" if args.store else "near_tier.json"
    args.output = args.output or str(ROOT / "benchmarks/results" / name)
    return args


def prepare_data(folder: Path) -> None:
    from mtnlg_jax.data.prepare import prepare

    words = random.Random(0)
    texts = [
        " ".join(words.choices("sun moon tree river stone bird wind road".split(), k=60))
        for _ in range(400)
    ]
    (folder / "text.txt").write_text("\n\n".join(texts))
    prepare(folder / "text.txt", folder / "data", vocab_size=280, heldout=0.1, progress=False)


def settings_of(args, folder: Path, **more) -> list[str]:
    settings = {
        "data.path": folder / "data",
        "model.num_layers": args.layers,
        "model.hidden_size": args.width,
        "model.max_position_embeddings": args.length,
        "train.steps": args.steps,
        "train.eval_every": 0,
        "train.save_every": 0,
        "train.keep_best": False,
        **more,
    }
    return [f"--set={key}={value}" for key, value in settings.items()]


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run(args, folder: Path, name: str, near_every: int) -> tuple[float, list[float]]:
    """Return (seconds of a step, losses) of a run with copies every ``near_every`` steps."""
    more = {"train.near_every": near_every, "train.near_folder": args.folder}
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "launch/cluster/launch.py"),
            "--cluster=local",
            f"--nodes={args.processes}",
            f"--local_devices={8 // args.processes}",
            "--restarts=0",
            f"--config={ROOT / 'configs/tiny.py'}",
            f"--workdir={folder / name}",
            *settings_of(args, folder, **more),
        ],
        env=environment(folder),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    records = train_records(folder / name)
    first = records[SKIPPED]
    last = records[-2]  # the last step also saves
    seconds = (last["time"] - first["time"]) / (last["step"] - first["step"])
    return seconds, [record["loss"] for record in records]


def train_records(workdir: Path) -> list[dict]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def near_tier(args, folder: Path) -> dict:
    rounds = []
    for number in range(args.rounds):
        sides = [args.near_every, 0]
        found = {
            every: run(args, folder, f"{number}-{every}", every)
            for every in (sides if number % 2 else reversed(sides))
        }
        with_it, losses = found[args.near_every]
        without, others = found[0]
        rounds.append({"with": with_it, "without": without, "equal": losses == others})
        print(json.dumps(rounds[-1]), flush=True)
    ratios = [each["with"] / each["without"] - 1 for each in rounds]
    return {
        "near_every": args.near_every,
        "folder": args.folder,
        "processes": args.processes,
        "cost": round(statistics.median(ratios), 4),
        "costs": [round(ratio, 4) for ratio in ratios],
        "losses_equal": all(each["equal"] for each in rounds),
        "rounds": rounds,
    }


# A process of its own: the store is in it, and TensorStore reads its address once.
UPLOADING = """
import sys
sys.path.insert(0, sys.argv[1] + "/tests/train")
import json, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
import slow_store
from mtnlg_jax.config import load_config
from mtnlg_jax.train import loop
from mtnlg_jax.train.checkpoint import Checkpoints
_, root, seconds, workdir, checkpoints, *settings = sys.argv
busy = []
real = loop.batch_at
with slow_store.serve(float(seconds)) as store:
    opened = loop.open_checkpoints
    def open_there(config, workdir, mesh):
        made = Checkpoints(checkpoints, config.train.keep_last, config.train.keep_best)
        def batch_at(config, mesh, data, step, samples):
            busy.append([step + 1, not made.is_settled()])
            return real(config, mesh, data, step, samples)
        loop.batch_at = batch_at
        return made
    loop.open_checkpoints = open_there
    config = load_config(root + "/configs/tiny.py", [s.removeprefix("--set=") for s in settings])
    loop.train(config, workdir, show_progress=False)
    print("busy", json.dumps([busy, len(store.requests)]))
"""


def upload(args, folder: Path) -> dict:
    """Compare steps during uploads with the same steps of a run that saves to the disk."""
    rounds = []
    for number in range(args.rounds):
        found = {}
        sides = ["gs://bucket", str(folder / "disk")]
        for side in sides if number % 2 else reversed(sides):
            name = f"{number}-{'store' if '://' in side else 'disk'}"
            done = subprocess.run(
                [
                    *(sys.executable, "-c", UPLOADING, str(ROOT), str(args.seconds)),
                    *(str(folder / name), f"{side}/{name}"),
                    *settings_of(args, folder, **{"train.save_every": args.near_every}),
                ],
                env=environment(folder),
                check=True,
                text=True,
                stdout=subprocess.PIPE,
            )
            line = next(line for line in done.stdout.splitlines() if line.startswith("busy "))
            busy, requests = json.loads(line.removeprefix("busy "))
            found[side] = (dict(map(tuple, busy)), requests, train_records(folder / name))
        busy, requests, there = found[sides[0]]
        _, _, here = found[sides[1]]
        # The record of a step is written one step later.
        during = [n for n in range(SKIPPED, args.steps - 2) if busy.get(n) and busy.get(n + 1)]
        row = {
            "steps_during_uploads": len(during),
            "store": statistics.median(step_times(there, during)),
            "disk": statistics.median(step_times(here, during)),
            "slowest_at_store": max(step_times(there, during)),
            "requests": requests,
            "equal": [each["loss"] for each in there] == [each["loss"] for each in here],
        }
        rounds.append(row)
        print(json.dumps(row), flush=True)
    ratios = [row["store"] / row["disk"] - 1 for row in rounds]
    return {
        "seconds_of_a_request": args.seconds,
        "cost": round(statistics.median(ratios), 4),
        "costs": [round(ratio, 4) for ratio in ratios],
        "losses_equal": all(row["equal"] for row in rounds),
        "rounds": rounds,
    }


def step_times(records: list[dict], steps: list[int]) -> list[float]:
    times = {record["step"]: record["time"] for record in records}
    return [times[step] - times[step - 1] for step in steps if step - 1 in times]


def shown(given: list[str]) -> list[str]:
    """Return the flags without those that name places of this machine."""
    return [flag for flag in given if not flag.startswith(("--output", "--keep", "--folder"))]


def main(argv=None) -> dict:
    args = parse(argv)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        prepare_data(folder)
        found = upload(args, folder) if args.store else near_tier(args, folder)
    result = {
        "command": " ".join(["python", "benchmarks/near_tier.py", *shown(sys.argv[1:])]),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "devices": 8,
        "model": {"width": args.width, "layers": args.layers, "length": args.length},
        "steps": args.steps,
        **found,
    }
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=1))
    return result


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(0 if main()["losses_equal"] else 1)
