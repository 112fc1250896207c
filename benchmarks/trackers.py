"""Measure what trackers, goodput and the comparison of processes cost a step.

    python launch/prepare_data.py --input=NOVELS --output=OUT --vocab_size=8000
    python benchmarks/trackers.py --data=OUT --trackers=tensorboard

One run of configs/small.py, in which blocks of steps alternate: in every other block the trackers
get nothing. Each block is compared with the mean of its two neighbors, so that what slows the
machine for a while slows both sides. What else watches each step, the clock of goodput and the
marks of the profiler, is always on; its time is measured alone, in a loop, and so is the probe of
the comparison of processes. "share" is all of it together, over the median step.
"""

import argparse
import datetime
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from mtnlg_jax import __version__
from mtnlg_jax.config import TrainConfig, load_config
from mtnlg_jax.storage import write_file
from mtnlg_jax.train import goodput, profiler, stragglers
from mtnlg_jax.train.lifetime import Requests
from mtnlg_jax.train.loop import train
from mtnlg_jax.train.metrics import environment
from mtnlg_jax.train.trackers.following import Trackers
from mtnlg_jax.train.watchdog import Watchdog

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/trackers.json"
LIMIT = 0.01
LOOPS = 2000


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="prepared text")
    parser.add_argument("--config", default="configs/small.py", help="a file of configs/")
    parser.add_argument("--trackers", default="tensorboard", help="names, with commas")
    parser.add_argument("--blocks", type=int, default=40, help="blocks of steps, on and off")
    parser.add_argument("--block", type=int, default=5, help="steps of a block")
    parser.add_argument("--output", default=str(RESULT), help="where the JSON result goes")
    args = parser.parse_args(argv)
    result = measure(args)
    path = Path(args.output)
    write_file(str(path.parent), path.name, json.dumps(result, indent=1).encode() + b"\n")
    print(json.dumps(result, indent=1))


def measure(args: argparse.Namespace) -> dict:
    """Train once, and return what watching costs."""
    trackers = tuple(args.trackers.split(","))
    steps = (args.blocks + 1) * args.block
    settings = [
        f"data.path={args.data}",
        f"train.steps={steps}",
        f"train.trackers={trackers}",
        "train.eval_every=0",
        "train.save_every=0",
        "train.keep_best=False",
    ]
    config = load_config(str(ROOT / args.config), settings)
    seconds = _alternating(config, args.block)
    step = statistics.median(seconds["off"] + seconds["on"])
    paired = _paired(seconds["order"])
    low, high = _interval(paired)
    hooks = _hooks()
    probe = _probe()
    compare_every = TrainConfig().compare_every
    cost = statistics.fmean(paired)
    return {
        "config": args.config,
        "trackers": list(trackers),
        "blocks": args.blocks,
        "steps_of_a_block": args.block,
        "seconds": {
            "step": step,
            "trackers_a_step": cost,
            "trackers_a_step_95": [low, high],
            "clock_and_marks_a_step": hooks,
            "probe": probe,
            "probe_a_step": probe / compare_every,
        },
        "share": (cost + hooks + probe / compare_every) / step,
        "share_of_trackers_95": [low / step, high / step],
        "limit": LIMIT,
        "mtnlg_jax": __version__,
        "environment": environment(),
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "load_at_the_end": os.getloadavg(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "command": command_of(args),
    }


def command_of(args: argparse.Namespace) -> str:
    """Return the command, without the paths of this machine."""
    names = ("config", "trackers", "blocks", "block")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    return " ".join(["python benchmarks/trackers.py --data=OUT", *flags])


def _alternating(config, block: int) -> dict:
    """Return the seconds of steps with and without trackers, and of blocks in their order."""
    times = []
    real = Trackers.log

    def log(self, record):
        if record["kind"] != "train":
            return
        times.append(time.perf_counter())
        if len(times) // block % 2:
            real(self, record)

    Trackers.log = log  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as workdir:
            train(config, workdir, show_progress=False)
    finally:
        Trackers.log = real  # type: ignore[method-assign]
    taken = [after - before for before, after in zip(times, times[1:], strict=False)]
    # The record of a step is written while the next one runs, so its cost is in that one.
    blocks = [taken[start : start + block] for start in range(block, len(taken), block)]
    whole = [each for each in blocks if len(each) == block]
    # The first block has the compilation before it.
    order = [statistics.median(each) for each in whole]
    on = [number % 2 == 0 for number in range(len(order))]
    return {
        "on": [x for x, used in zip(order, on, strict=True) if used],
        "off": [x for x, used in zip(order, on, strict=True) if not used],
        "order": list(zip(order, on, strict=True)),
    }


def _paired(order: list[tuple[float, bool]]) -> list[float]:
    """Return for each block with trackers its time less the mean of its two neighbors."""
    return [
        middle - (before + after) / 2
        for (before, _), (middle, on), (after, _) in zip(order, order[1:], order[2:], strict=False)
        if on
    ]


def _interval(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """Return the 95 % interval of the mean, by the bootstrap."""
    chance = random.Random(0)
    means = sorted(statistics.fmean(chance.choices(values, k=len(values))) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def _hooks() -> float:
    """Return the seconds that the clock and the profiler's marks take in a step."""
    with tempfile.TemporaryDirectory() as workdir:
        watchdog = Watchdog(0, 100, workdir)
        marks = profiler.Profiler(TrainConfig(), workdir, Requests().profile, watchdog)
        pending = (0, {"loss": jax.numpy.zeros(())}, 8)
        began = time.perf_counter()
        for number in range(1, LOOPS + 1):
            with watchdog.clock.batch(pending):
                pass
            with marks.step(number, ()):
                pass
        return (time.perf_counter() - began) / LOOPS


def _probe() -> float:
    """Return the seconds of a comparison of processes, without the gathering."""
    probe = stragglers.Probe()
    taken = []
    clock = goodput.Clock()
    for _ in range(10):
        with clock.during("other"):
            began = time.perf_counter()
            np.argmax(probe())
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


if __name__ == "__main__":
    main()
