"""Measure what scores of tasks cost a run: configs/small.py with train.eval_tasks.

    python launch/prepare_data.py --input=NOVELS --output=OUT --vocab_size=8000
    python benchmarks/eval_tasks.py --data=OUT --task_data=FOLDER

The whole run takes as long as the config says, 23 minutes on 2 cores. Then its own share counts:
`share`. --steps=60 --every=20 takes two minutes, and `share_at_defaults` is what the parts of that
run come to at the config's steps and the default interval: seconds of the first evaluation, which
compiles, and of the later ones, beside seconds of steps and of all else (held-out losses,
checkpoints, compilation of the steps), of which only the part for each step grows.
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
from pathlib import Path

import jax

from mtnlg_jax import __version__
from mtnlg_jax.config import TrainConfig, load_config
from mtnlg_jax.evaluate.in_training import RunTasks
from mtnlg_jax.storage import write_file
from mtnlg_jax.train.loop import train
from mtnlg_jax.train.metrics import environment, read_metrics

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/eval_tasks.json"
TASKS = "lambada_openai,boolq,piqa,winogrande,arc_easy,copa,openbookqa"
LIMIT = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="prepared text")
    parser.add_argument("--task_data", required=True, help="folder of the rows of the tasks")
    parser.add_argument("--tasks", default=TASKS, help="names, with commas")
    parser.add_argument("--steps", type=int, help="steps of the run; default: the config's")
    parser.add_argument("--every", type=int, help="train.eval_tasks_every; default: its own")
    parser.add_argument("--output", default=str(RESULT), help="where the JSON result goes")
    args = parser.parse_args(argv)
    result = measure(args)
    path = Path(args.output)
    write_file(str(path.parent), path.name, json.dumps(result, indent=1).encode() + b"\n")
    print(json.dumps(result, indent=1))


def measure(args: argparse.Namespace) -> dict:
    """Train once and return what the evaluations of tasks cost."""
    whole = load_config(str(ROOT / "configs/small.py"), [f"data.path={args.data}"])
    default = TrainConfig()
    every = args.every or default.eval_tasks_every
    steps = args.steps or whole.train.steps
    config = load_config(
        str(ROOT / "configs/small.py"),
        [
            f"data.path={args.data}",
            f"train.steps={steps}",
            f"train.eval_tasks={tuple(args.tasks.split(','))}",
            f"train.eval_tasks_every={every}",
            f"train.eval_tasks_data={args.task_data}",
        ],
    )
    began = time.perf_counter()
    tasks = RunTasks(config)
    reading = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as workdir:
        summary = train(config, workdir, show_progress=False, tasks=tasks)
        records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    seconds = [record["seconds"] for record in records if record["kind"] == "tasks"]
    spent, share = summary.tasks_cost
    total = spent / share
    step = summary.seconds / max(1, steps - 1)
    later = statistics.median(seconds[1:] or seconds)
    # What a whole run would take.
    evaluations = len(
        {*range(default.eval_tasks_every, whole.train.steps, default.eval_tasks_every)}
    )
    scoring = seconds[0] + evaluations * later
    rest = total - spent - summary.seconds + (whole.train.steps - 1) * step
    return {
        "config": "configs/small.py",
        "tasks": args.tasks.split(","),
        "rows_of_each": default.eval_tasks_rows,
        "steps": steps,
        "every": every,
        "seconds": {
            "run": round(total, 1),
            "reading_rows_before_the_run": round(reading, 2),
            "step": round(step, 4),
            "evaluations_of_tasks": seconds,
        },
        "share": round(share, 4),
        "share_at_defaults": round(scoring / (scoring + rest), 4),
        "evaluations_at_defaults": evaluations + 1,
        "limit": LIMIT,
        "final": {name: value for name, value in summary.tasks.items() if "/acc" in name},
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
    given = {"steps": args.steps, "every": args.every}
    flags = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return " ".join(["python benchmarks/eval_tasks.py --data=OUT --task_data=FOLDER", *flags])


if __name__ == "__main__":
    main()
