"""Compare the policies on spikes: what a planted source of bad rows costs a small run under each.

    python benchmarks/spikes.py [--steps=240] [--seeds=3] [--output=FILE]

Two sources of sentences; the second has documents of random digits, whose rows are read by a few
steps. Every run of a seed has the same batches. For each policy the result has the held-out loss
(of the first source) at the end and its mean since the first bad batch, the bad batches that the
rule found of those that came when it had a history, and the steps that it left out by mistake.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path

import numpy as np

from mtnlg_jax import compat, storage
from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.train import loop
from mtnlg_jax.train.inputs import load_data, resolve
from mtnlg_jax.train.metrics import read_metrics
from mtnlg_jax.train.step_batch import StepBatch

RESULT = Path(__file__).parent / "results" / "spikes.json"
LENGTH = 32
BATCH = 8
RULE = {"spike_window": 64, "spike_deviations": 6.0}
POLICIES = {
    "none": {},
    "skip": RULE | {"spike_policy": "skip"},
    "rewind": RULE | {"spike_policy": "rewind"},
    "rewind, leave_out 5": RULE | {"spike_policy": "rewind", "spike_leave_out": 5},
}
SENTENCES = (
    "the whale swam north while the old captain slept on the ship.",
    "nobody on the ship dared to wake the old captain.",
    "the old captain slept.",
    "a cold wind came from the north and the whale went under.",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=240, help="of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each policy")
    parser.add_argument("--output", default=os.fspath(RESULT), help="file for the result")
    flags = parser.parse_args()
    compat.quiet()
    compat.configure_cache()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder))
        for seed in range(flags.seeds):
            bad = bad_steps(config_of(folder, flags.steps, seed))
            for name, settings in POLICIES.items():
                config = config_of(folder, flags.steps, seed, **settings)
                workdir = f"{folder}/{seed} {name}"
                loop.train(config, workdir, show_progress=False)
                rows.append({"seed": seed, "policy": name} | figures(workdir, config, bad))
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "steps": flags.steps,
        "batch": [BATCH, LENGTH],
        "rule": RULE,
        "runs": rows,
        "means": {name: means([r for r in rows if r["policy"] == name]) for name in POLICIES},
        "date": datetime.date.today().isoformat(),
        "machine": platform.machine(),
    }
    output = Path(flags.output)
    storage.write_file(output.parent, output.name, (json.dumps(result, indent=1) + "\n").encode())


def write_sources(folder: Path) -> None:
    rng = np.random.default_rng(0)

    def document() -> str:
        return " ".join(rng.choice(SENTENCES, 8))

    bad = ["".join(rng.choice(list("0123456789"), 3 * LENGTH)) for _ in range(6)]
    tokenizer = ""
    for name, texts in {
        "books": [document() for _ in range(600)],
        "web": [document() for _ in range(300)] + bad,
    }.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = {"tokenizer": tokenizer} if tokenizer else {"vocab_size": 320}
        heldout = 0.1 if name == "books" else 0.0
        prepare(path, folder / name, heldout=heldout, progress=False, **options)
        tokenizer = str(folder / "books/tokenizer")


def config_of(folder: str, steps: int, seed: int, **train) -> Config:
    return Config(
        model=ModelConfig(
            num_layers=2, hidden_size=64, num_attention_heads=4, max_position_embeddings=LENGTH
        ),
        mesh=MeshConfig(),
        data=DataConfig(blend=((f"{folder}/books", 3.0), (f"{folder}/web", 1.0))),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_fraction=0.05),
        train=TrainConfig(
            **{
                "steps": steps,
                "seed": seed,
                "global_batch_size": BATCH,
                "compute_dtype": "float32",
                "save_every": 20,
                "eval_every": 10,
                "eval_batches": 2,
                "keep_best": False,
            }
            | train
        ),
    )


def bad_steps(config: Config) -> list[int]:
    """Return the steps, from 1, that read more than a few tokens of a document of digits."""
    data = load_data(config)
    config = resolve(config, data.tokenizer)
    size = data.tokenizer.vocab_size
    digits = [i for i in range(size) if data.tokenizer.token_bytes(i).isdigit()]
    found = []
    for step in range(config.train.steps):
        batch = StepBatch(config, None, data, step, step * BATCH)
        if np.isin(batch.rows["tokens"], digits).sum() >= LENGTH // 4:
            found.append(step + 1)
    return found


def figures(workdir: str, config: Config, bad: list[int]) -> dict:
    records = read_metrics(f"{workdir}/metrics.jsonl")
    held_out = {r["step"]: r["causal_loss"] for r in records if r["kind"] == "eval"}
    spikes = [r for r in records if r["kind"] == "spike"]
    left_out = {r["step"] for r in records if r["kind"] in ("spike", "left_out")}
    known = [step for step in bad if step > RULE["spike_window"] // 2]  # for all policies
    after = [loss for step, loss in held_out.items() if known and step >= known[0]]
    return {
        "bad_batches": bad,
        "bad_batches_judged": len(known),
        "found": sum(r["step"] in known for r in spikes),
        "false_alarms": [r["step"] for r in spikes if r["step"] not in bad],
        "left_out": len(left_out),
        "steps_done_again": sum(r["step"] - r["back_to"] for r in spikes if "back_to" in r),
        "held_out_at_the_end": held_out[config.train.steps],
        "held_out_since_the_first": statistics.fmean(after),
    }


def means(rows: list[dict]) -> dict:
    keys = ("held_out_at_the_end", "held_out_since_the_first", "bad_batches_judged", "found")
    keys += ("left_out", "steps_done_again")
    found = {key: statistics.fmean(row[key] for row in rows) for key in keys}
    return found | {"false_alarms": sum(len(row["false_alarms"]) for row in rows)}


if __name__ == "__main__":
    main()
