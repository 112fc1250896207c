"""Hurt a run of 2 processes with 4 simulated devices each, at random, until it is done; then
compare it with one that was left alone.

    python benchmarks/kills.py [--faults=100] [--seed=0] [--output=benchmarks/results/kills.json]

launch/cluster/launch.py runs it and starts it again. Starts keep their compiled steps in a folder
(--executable_folder) and load them from there. Each fault is one of

    SIGKILL      of a process, also while it starts
    SIGSTOP      of a process: the others must notice its silence, and the launcher ends it
    SIGTERM      to a process: all save and end together
    full disk    of the near tier for some steps, which the run must outlive
    truncated    a file of the newest near copy loses its end, and then a process is killed
    lost host    a process is killed, and its near folder is gone: its peer has the shards

The result holds for each fault the steps that were done again and the seconds from the fault to the
first new step. The records of both runs, times aside, must be equal bit by bit. A full disk needs
the right to mount a small tmpfs; without it that fault is left out, and the result says so.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

from near_tier import prepare_data, shown

ROOT = Path(__file__).resolve().parent.parent
MEASURED = {"tokens_per_second", "mfu", "time"}  # of the clock, not of the run
TIMES = ("goodput", "processes")  # records of nothing but the clock
KINDS = ("SIGKILL", "SIGSTOP", "SIGTERM", "full disk", "truncated", "lost host")
WEIGHTS = (35, 10, 20, 10, 15, 10)
STEPS_A_FAULT = 10  # of the run: about 6 between two faults, 20 for a full disk
SPARE = 60  # further steps
DISK = 64 << 20  # bytes of the near tier's disk; two copies of two hosts take 12 MB
PATIENCE = 240  # seconds for a start on a busy machine


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--near_every", type=int, default=5, help="steps")
    parser.add_argument("--save_every", type=int, default=40, help="steps")
    parser.add_argument("--heartbeat", type=int, default=6, help="seconds")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--keep", help="folder for the runs; default: a temporary one")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/kills.json"))
    return parser.parse_args(argv)


@contextlib.contextmanager
def small_disk(folder: Path):
    """Mount a small tmpfs on ``folder``; yield whether that is allowed."""
    folder.mkdir(parents=True)
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "near", str(folder)], capture_output=True
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False)


def command_of(args, folder: Path, name: str, steps: int) -> list[str]:
    settings = {
        "data.path": folder / "data",
        "model.num_layers": 1,
        "model.hidden_size": 32,
        "model.max_position_embeddings": 32,
        "data.sequence_length": 32,
        "train.steps": steps,
        "train.eval_every": 0,
        "train.save_every": args.save_every,
        "train.near_every": args.near_every,
        "train.near_folder": folder / "near",
        "train.heartbeat_seconds": args.heartbeat,
    }
    return [
        sys.executable,
        str(ROOT / "launch/cluster/launch.py"),
        "--cluster=local",
        "--nodes=2",
        "--local_devices=4",
        f"--restarts={2 * args.faults + 10}",
        "--grace=2",
        f"--argument=--executable_folder={folder / 'kept'}",
        f"--config={ROOT / 'configs/tiny.py'}",
        f"--workdir={folder / name}",
        *(f"--set={key}={value}" for key, value in settings.items()),
    ]


class Run:
    """A run of the launcher, whose output is kept."""

    def __init__(self, args, folder: Path, name: str, steps: int) -> None:
        self.workdir = folder / name
        self.near = folder / "near"
        self.process = subprocess.Popen(
            command_of(args, folder, name, steps),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": str(ROOT),
                "XLA_FLAGS": "--xla_backend_optimization_level=0",
                "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "MTNLG_WAIT": "0",
            },
        )
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        self.lines.extend(self.process.stdout or ())

    def records(self) -> list[dict]:
        """Return the whole records of metrics.jsonl."""
        return read_lines(self.workdir / "metrics.jsonl")

    def starts(self) -> list[dict]:
        return read_lines(self.workdir / "starts.jsonl")

    def restarts(self) -> int:
        return sum("starting again in" in line for line in self.lines)

    def wait_for(self, what, seconds: float = PATIENCE) -> None:
        """Return once ``what()`` is true."""
        deadline = time.monotonic() + seconds
        while not what():
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended with {self.process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing happened for {seconds} s:\n{self.tail()}")
            time.sleep(0.005)

    def warnings(self) -> int:
        told = ("could not be written", "has no second copy")
        return sum(any(text in line for text in told) for line in self.lines)

    def tail(self) -> str:
        return "".join(self.lines[-60:])

    def process_of(self, number: int) -> int:
        return int((self.workdir / f".lock-{number}").read_text().split()[0])

    def children(self) -> list[int]:
        """Return the processes that the launcher has started, in their order."""
        pid = self.process.pid
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def newest_copy(self) -> list[Path]:
        """Return the data of the newest near copy on all hosts."""
        found = [path for path in self.near.rglob("*.data") if path.with_suffix(".json").exists()]
        steps = {path: int(path.parent.name.partition("-")[0]) for path in found}
        return sorted(path for path, step in steps.items() if step == max(steps.values()))


def read_lines(path: Path) -> list[dict]:
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):  # just being rewritten
            found.append(json.loads(line))
    return found


def hurt(run: Run, kind: str, draw: random.Random, every: int) -> dict:
    """Do one fault, wait until the run goes on, and return what it cost."""
    run.wait_for(run.starts)
    restarts = run.restarts()
    first = run.starts()[-1]["step"]
    wanted = first + draw.randrange(1, 2 * every)
    run.wait_for(lambda: any(record["step"] >= wanted for record in run.records()))
    time.sleep(draw.uniform(0, 0.1))
    victim = draw.randrange(2)
    told: dict = {"kind": kind, "process": victim}
    if kind == "full disk":
        return told | fill(run, every)
    if kind == "truncated" and (files := run.newest_copy()):
        path = draw.choice(files)
        told["file"] = path.name
        with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
            file.truncate(draw.randrange(max(1, path.stat().st_size)))
    begun = len(run.starts())
    at = time.time()
    name = kind if kind.startswith("SIG") else "SIGKILL"
    with contextlib.suppress(ProcessLookupError):
        os.kill(run.process_of(victim), getattr(signal, name))
    if kind == "lost host":
        hosts = sorted(run.near.glob(f"*#{victim}"))
        told["removed"] = [path.name for path in hosts]
        run.wait_for(lambda: dead(run, victim))
        for path in hosts:
            shutil.rmtree(path, ignore_errors=True)
    run.wait_for(lambda: run.restarts() > restarts)
    if kind == "SIGKILL" and draw.random() < 0.15:
        # Again while it starts: before, during or after the restore.
        time.sleep(draw.uniform(0, 8))
        started = run.children()
        if len(started) == 2:
            told["again"] = draw.randrange(2)
            os.kill(started[told["again"]], signal.SIGKILL)
            run.wait_for(lambda: run.restarts() > restarts + 1)
    ended = time.time()
    run.wait_for(lambda: any(record["time"] > ended for record in run.records()))
    new = min(record["time"] for record in run.records() if record["time"] > ended)
    # A fault while it starts may be seen by two starts.
    pairs = [
        (each.get("reached", {}).get("step", 0), each["step"]) for each in run.starts()[begun:]
    ]
    reached, again = max(pairs, key=lambda pair: pair[0] - pair[1])
    return told | {
        "reached": reached,
        "resumed": again,
        "lost_steps": max(0, reached - again),
        "seconds_to_restart": round(ended - at, 2),
        "seconds_to_first_step": round(new - ended, 2),
    }


def dead(run: Run, number: int) -> bool:
    try:
        os.kill(run.process_of(number), 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{run.process_of(number)}/stat")
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def fill(run: Run, every: int) -> dict:
    """Fill the disk of the near tier for two copies' time."""
    ballast = run.near / "ballast"
    warned = run.warnings()
    reached = max((record["step"] for record in run.records()), default=0)
    # A tier with two copies writes the next one where the oldest was, so that one has to go first.
    # Two starts may have a copy of one step; the later one counts.
    kept = max((path.parent for path in run.newest_copy()), key=modified).name
    for folder in {path.parent for path in run.near.rglob("*.own.json")}:
        if folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)
    size = DISK
    with open(ballast, "wb") as file:
        # Down to the last page.
        while size >= 4096:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
            except OSError:
                size //= 2
    try:
        run.wait_for(lambda: run.warnings() > warned)
    finally:
        ballast.unlink()
    now = max(record["step"] for record in run.records())
    run.wait_for(lambda: any(record["step"] > now + 2 * every for record in run.records()))
    return {"reached": reached, "lost_steps": 0, "restarted": False}


def modified(path: Path) -> float:
    """Return when a file or folder was last changed; it may just be removed."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime
    return 0.0


def numbers(workdir: Path) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key not in MEASURED}
        for record in read_lines(workdir / "metrics.jsonl")
        if record["kind"] not in TIMES
    ]


def main(argv=None) -> dict:
    args = parse(argv)
    with contextlib.ExitStack() as stack:
        folder = Path(args.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        prepare_data(folder)
        mounted = stack.enter_context(small_disk(folder / "near"))
        kinds = [kind for kind in KINDS if kind in args.kinds and (mounted or kind != "full disk")]
        weights = [WEIGHTS[KINDS.index(kind)] for kind in kinds]
        steps = STEPS_A_FAULT * args.faults + SPARE
        draw = random.Random(args.seed)
        began = time.time()
        run = Run(args, folder, "hurt", steps)
        faults = []
        try:
            for number, kind in enumerate(draw.choices(kinds, weights, k=args.faults), 1):
                faults.append(hurt(run, kind, draw, args.near_every))
                print(f"{number} of {args.faults}: {json.dumps(faults[-1])}", flush=True)
            code = run.process.wait(3600)
        finally:
            run.process.kill()
        seconds = time.time() - began
        alone = Run(args, folder, "alone", steps)
        try:
            alone.process.wait(3600)
        finally:
            alone.process.kill()
        equal = numbers(run.workdir) == numbers(alone.workdir)
        if code or not equal:
            print(run.tail(), file=sys.stderr)
        result = describe(args, faults, code, equal, seconds, kinds, steps)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "faults"}, indent=1))
    return result


def describe(args, faults, code, equal, seconds, kinds, steps) -> dict:
    restarted = [fault for fault in faults if "seconds_to_first_step" in fault]
    lost = [fault["lost_steps"] for fault in faults]
    return {
        "command": " ".join(["python", "benchmarks/kills.py", *shown(sys.argv[1:])]),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "processes": 2,
        "devices": 8,
        "steps": steps,
        "near_every": args.near_every,
        "save_every": args.save_every,
        "left_out": [kind for kind in args.kinds if kind not in kinds],
        "number": {kind: sum(fault["kind"] == kind for fault in faults) for kind in kinds},
        "exit_code": code,
        "records_equal": equal,
        "most_lost_steps": max(lost, default=0),
        "mean_lost_steps": round(statistics.mean(lost), 2) if lost else 0,
        "within_interval": max(lost, default=0) <= args.near_every,
        "median_seconds_to_restart": median(restarted, "seconds_to_restart"),
        "median_seconds_to_first_step": median(restarted, "seconds_to_first_step"),
        "seconds": round(seconds),
        "faults": faults,
    }


def median(faults: list[dict], key: str) -> float | None:
    return round(statistics.median(fault[key] for fault in faults), 2) if faults else None


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    found = main()
    sys.exit(0 if found["records_equal"] and not found["exit_code"] else 1)
