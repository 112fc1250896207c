"""Measure what statistics by layer cost a run: train.stats_every.

    python launch/prepare_data.py --input=NOVELS --output=OUT --vocab_size=8000
    python benchmarks/watch_cost.py --data=OUT

Blocks of steps with and without statistics alternate, and so does which of a pair comes first. A
block with them has one record, in its last step: the difference of a pair is the time of one
record, reading its rows and writing it included. The share of the run follows for --every steps
from one record to the next, which is the interval of docs/statistics.md. Blocks shorter than that
measure the same record in less time; --block=200 runs whole intervals.

Compilation is told apart: the programs of statistics are compiled at their first use, once.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import jax

from mtnlg_jax import __version__, compat
from mtnlg_jax.config import load_config
from mtnlg_jax.intervals import of_mean
from mtnlg_jax.parallel.mesh import make_mesh
from mtnlg_jax.storage import write_file
from mtnlg_jax.train.inputs import batch_at, load_data, resolve
from mtnlg_jax.train.metrics import MetricsLog, environment
from mtnlg_jax.train.schedule import samples_before
from mtnlg_jax.train.state import init_state
from mtnlg_jax.train.statistics import Statistics
from mtnlg_jax.train.step import CompiledStep, make_train_step
from mtnlg_jax.train.watchdog import Watchdog

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/watch_cost.json"
LIMIT = 0.01


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="prepared text")
    parser.add_argument("--config", default="configs/small.py", help="config of the run")
    parser.add_argument("--pairs", type=int, default=12, help="pairs of blocks")
    parser.add_argument("--block", type=int, default=20, help="steps of a block")
    parser.add_argument("--every", type=int, default=200, help="train.stats_every of the share")
    parser.add_argument("--output", default=str(RESULT), help="where the JSON result goes")
    args = parser.parse_args(argv)
    compat.quiet()
    with tempfile.TemporaryDirectory() as workdir:
        result = measure(args, workdir)
    path = Path(args.output)
    write_file(str(path.parent), path.name, json.dumps(result, indent=1).encode() + b"\n")
    print(json.dumps(result, indent=1))


class Run:
    """Steps of a run, without evaluation and checkpoints."""

    def __init__(self, args: argparse.Namespace, workdir: str, log: MetricsLog) -> None:
        config = load_config(
            str(ROOT / args.config),
            [f"data.path={args.data}", f"train.stats_every={args.block}"],
        )
        self.data = load_data(config)
        self.config = config = resolve(config, self.data.tokenizer)
        self.mesh = make_mesh(config.mesh)
        total = samples_before(config.train, config.train.steps)
        watchdog = Watchdog(0, 1.0, workdir)
        step = make_train_step(config, self.mesh, causal=True, total_samples=total)
        self.run_step = CompiledStep(step, watchdog)
        self.statistics = Statistics(
            config, self.mesh, self.data, {}, total, watchdog, log, lambda: None
        )
        self.state = init_state(config, self.mesh)
        self.done = 0
        self.samples = 0

    def block(self, steps: int, watched: bool) -> float:
        """Return the seconds of ``steps`` steps; where they are ``watched`` the last has a
        record."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(steps):
            batch, micro_batches, sequences = batch_at(
                self.config, self.mesh, self.data, self.done, self.samples
            )
            if watched:
                self.statistics.before_step(self.state, self.done, self.samples, -1, 1.0, ())
            self.state, metrics = self.run_step(self.state, batch, micro_batches, sequences, 1.0)
            jax.device_get(metrics)
            self.statistics.report(self.done)
            self.done += 1
            self.samples += self.config.train.global_batch_size
        jax.block_until_ready(self.state)
        return time.perf_counter() - start


def measure(args: argparse.Namespace, workdir: str) -> dict:
    """Run pairs of blocks and return the cost of a record."""
    with closing(MetricsLog(workdir, 0)) as log:
        run = Run(args, workdir, log)
        load = os.getloadavg()
        first = [run.block(args.block, watched) for watched in (False, True)]  # these compile
        pairs = []
        for number in range(args.pairs):
            order = (False, True) if number % 2 else (True, False)
            seconds = {watched: run.block(args.block, watched) for watched in order}
            pairs.append((seconds[False], seconds[True]))
        records = [record for record in log.records if record["kind"] == "stats"]
    plain = statistics.median(off for off, _ in pairs) / args.block
    # In steps, of the same pair: slow minutes of a machine slow both.
    in_steps = [(on - off) / (off / args.block) for off, on in pairs]
    low, high = of_mean(in_steps)
    record = statistics.mean(in_steps)
    return {
        "config": args.config,
        "pairs": args.pairs,
        "steps_of_a_block": args.block,
        "stats_every": args.every,
        "seconds": {
            "step": round(plain, 4),
            "blocks_without_and_with": [[round(x, 3) for x in pair] for pair in pairs],
            "first_blocks_which_compile": [round(x, 2) for x in first],
        },
        "steps_of_a_record": round(record, 3),
        "steps_of_a_record_95": [round(low, 3), round(high, 3)],
        "share": round(record / args.every, 5),
        "share_95": [round(low / args.every, 5), round(high / args.every, 5)],
        "limit": LIMIT,
        "bytes_of_a_record": round(statistics.mean(len(json.dumps(each)) for each in records)),
        "mtnlg_jax": __version__,
        "environment": environment(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load_before_and_after": [load, os.getloadavg()],
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "command": command_of(args),
    }


def command_of(args: argparse.Namespace) -> str:
    """Return the command, without the paths of this machine."""
    flags = [f"--{name}={getattr(args, name)}" for name in ("config", "pairs", "block", "every")]
    return " ".join(["python benchmarks/watch_cost.py --data=OUT", *flags])


if __name__ == "__main__":
    main()
