"""Time a restart after a failure: from the start of the process until its first step is done.

    python launch/prepare_data.py --input=NOVELS --output=OUT --vocab_size=8000
    python benchmarks/restart.py --data=OUT
    python benchmarks/restart.py --small    # configs/tiny.py on random words, to try the script out

One run is killed (SIGKILL) after a checkpoint. Copies of it are started again in three ways, in
turn: compiling all, with JAX's cache of compiled programs, and with the step of
--executable_folder beside it. Each is killed again as soon as the first step after the checkpoint
is in metrics.jsonl. A record is written while the next step runs, so that two steps count. All
ways must give the same loss.

"seconds" count from the start of the process, "beyond_imports" from the moment at which a process
that does nothing else has imported what pretraining imports and knows its devices. "ready" is when
the state was restored and the first step begins.
"""

import argparse
import datetime
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from mtnlg_jax import __version__
from mtnlg_jax.storage import write_file
from mtnlg_jax.train.metrics import environment, read_metrics, training_loss

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/restart.json"
GOAL = 5.0  # seconds with the executable, beyond the imports
SAVED = 2  # step of the checkpoint
WAYS = ("compiling", "cache", "executable")
IMPORTS = (
    "import time, jax, mtnlg_jax.cli.pretrain, mtnlg_jax.train.loop, mtnlg_jax.interop.registry; "
    "jax.devices(); print(time.time())"
)
WORDS = "the whale swam north while the old captain slept and nobody on the ship dared".split()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="default: configs/small.py")
    parser.add_argument("--data", help="prepared text")
    parser.add_argument("--set", action="append", default=[], help="a value of the config")
    parser.add_argument("--devices", type=int, default=1, help="simulated devices")
    parser.add_argument("--rounds", type=int, default=3, help="starts in each way")
    parser.add_argument("--small", action="store_true", help="configs/tiny.py, one round")
    parser.add_argument("--output", help="default: results/restart.json; not written if small")
    args = parser.parse_args(argv)
    if not (args.data or args.small):
        parser.error("--data is missing")
    result = measure(args)
    output = Path(args.output) if args.output else None if args.small else RESULT
    if output is not None:
        write_file(output.parent, output.name, json.dumps(result, indent=1).encode() + b"\n")
    print(json.dumps(result, indent=1))


def measure(args: argparse.Namespace) -> dict:
    load = os.getloadavg()
    config = args.config or ("configs/tiny.py" if args.small else "configs/small.py")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = args.data or prepared(root)
        command = [
            *(sys.executable, str(ROOT / "launch/pretrain.py"), f"--config={ROOT / config}"),
            *(f"--set=data.path={data}", f"--set=train.save_every={SAVED}"),
            *("--set=train.log_every=1", "--set=train.eval_every=0", "--noprogress"),
            *(f"--local_devices={args.devices}", *(f"--set={value}" for value in args.set)),
        ]
        # The first start leaves the checkpoint and the executable, the second fills JAX's cache.
        start(command, root, root / "run", "executable", SAVED)
        warm = copied(root, "warm")
        start(command, root, warm, "cache", SAVED)
        rounds: dict[str, list[dict]] = {way: [] for way in WAYS}
        imports = []
        for number in range(1 if args.small else args.rounds):
            imports.append(imported(root))
            for way in WAYS:
                run = copied(root, f"{way}-{number}")
                rounds[way].append(start(command, root, run, way, SAVED))
                shutil.rmtree(run)
    assert all(each["loaded"] for each in rounds["executable"]), "the step was compiled again"
    losses = {each["loss"] for starts in rounds.values() for each in starts}
    assert len(losses) == 1, f"the ways differ: {losses}"
    base = statistics.median(imports)
    found = {
        way: {
            "seconds": statistics.median(each["seconds"] for each in starts),
            "beyond_imports": statistics.median(
                round(each["seconds"] - base, 2) for each in starts
            ),
            "ready": statistics.median(each["ready"] for each in starts),
            "all": [each["seconds"] for each in starts],
        }
        for way, starts in rounds.items()
    }
    return {
        "config": config,
        "set": args.set,
        "devices": args.devices,
        "imports": base,
        "restart": found,
        "goal": GOAL,
        "reached": found["executable"]["beyond_imports"] < GOAL,
        "loss_of_the_first_step": losses.pop(),
        "load_before": [round(x, 2) for x in load],
        "date": datetime.date.today().isoformat(),
        "version": __version__,
        "command": command_of(args),
        "environment": environment(),
    }


def command_of(args: argparse.Namespace) -> str:
    """Return the command, without the paths of this machine."""
    rounds = None if args.small else args.rounds
    given = {"config": args.config, "devices": args.devices, "rounds": rounds}
    parts = ["python benchmarks/restart.py", "--small" if args.small else "--data=OUT"]
    parts += [f"--{name}={value}" for name, value in given.items() if value is not None]
    return " ".join([*parts, *(f"--set={value}" for value in args.set)])


def prepared(root: Path) -> str:
    """Return a folder of prepared random words."""
    from mtnlg_jax.data.prepare import prepare

    draw = random.Random(0)
    text = "\n".join(" ".join(draw.choices(WORDS, k=12)) + "." for _ in range(400))
    (root / "book.txt").write_text(text)
    prepare(root / "book.txt", root / "data", vocab_size=300, heldout=0.1, progress=False)
    return str(root / "data")


def copied(root: Path, name: str) -> Path:
    """Return a copy of the run that was killed."""
    return Path(shutil.copytree(root / "run", root / name))


def start(command: list[str], root: Path, run: Path, way: str, after: int) -> dict:
    """Start ``run`` in a ``way``, kill it once the step that follows ``after`` is recorded.

    Return the seconds until then, those until the state was ready, and the loss of that step.
    """
    extra = [f"--executable_folder={root / 'kept'}"] if way == "executable" else []
    cache = "" if way == "compiling" else str(root / "xla")
    # All small programs as well, as after a long run.
    more = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    begin = time.time()
    process = subprocess.Popen(
        [*command, f"--workdir={run}", *extra],
        env=os.environ | more | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[tuple[float, str]] = []

    def listen() -> None:
        for line in process.stdout or ():
            said.append((time.time(), line))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    metrics = run / "metrics.jsonl"
    found: list[dict] = []
    while not found:
        if process.poll() is not None:
            raise RuntimeError("".join(line for _, line in said))
        records = read_metrics(str(metrics)) if metrics.exists() else []
        found = [
            record
            for record in records
            if record["kind"] == "train" and record["step"] == after + 1
            if record["time"] > begin
        ]
        time.sleep(0.01)
    # The first start: its checkpoint is whole by now, or the copies would begin anew.
    while not (run / "checkpoints" / str(after) / "record.json").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    listener.join()
    ready = [moment for moment, line in said if line.startswith("preparing the first step")]
    return {
        "seconds": round(found[0]["time"] - begin, 2),
        "ready": round(ready[0] - begin, 2),
        "loss": training_loss(found[0])[1],
        "loaded": any("step: loaded from" in line for _, line in said),
    }


def imported(root: Path) -> float:
    """Return the seconds after which a process has imported what pretraining imports."""
    begin = time.time()
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    return round(float(done.stdout.split()[-1]) - begin, 2)


if __name__ == "__main__":
    main()
