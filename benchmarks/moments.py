"""Train the same run with moments in float32, bfloat16 and int8, and compare losses and bytes.

    python benchmarks/moments.py

Every run reads the prose of Python's own documentation with the same seed, so batches and first
parameters are the same: only optimizer.moments_dtype differs. A second seed in float32 shows how
far losses differ by chance. AdamW runs with two decays of the second moment: the longer one is the
harder one for few bits. The result goes to benchmarks/results/moments.json: mean training loss of
the last steps, held-out loss, and bytes of the optimizer's state. --small takes some steps of each
and writes nothing, unless --output names a file.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
STEPS = 300
LAST = 20  # steps over which the training loss is averaged
OPTIMIZERS = [
    {"name": "adamw", "b2": 0.95, "learning_rate": 2e-3},
    {"name": "adamw", "b2": 0.999, "learning_rate": 2e-3},
    {"name": "muon", "learning_rate": 5e-3},
]
# moments_dtype, seed
RUNS = [("float32", 0), ("float32", 1), ("bfloat16", 0), ("int8", 0)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="default: benchmarks/results/moments.json")
    parser.add_argument("--small", action="store_true", help="20 steps of each run")
    args = parser.parse_args()
    from mtnlg_jax import storage
    from mtnlg_jax.data.prepare import prepare

    steps = 20 if args.small else STEPS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(None, f"{folder}/data", vocab_size=2000, progress=False)
        for number, optimizer in enumerate(OPTIMIZERS):
            for dtype, seed in RUNS:
                run = f"{folder}/{number}-{dtype}-{seed}"
                rows.append(trained(f"{folder}/data", run, optimizer, dtype, seed, steps))
                print(json.dumps(rows[-1]), flush=True)
    path = Path(args.output or FOLDER / "results" / "moments.json")
    if args.small and not args.output:
        return
    result = {
        "device": f"CPU, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")},
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/moments.py" + " --small" * args.small,
        "steps": steps,
        "last_steps": LAST,
        "rows": rows,
    }
    storage.write_file(path.parent, path.name, (json.dumps(result, indent=1) + "\n").encode())
    print(f"written to {path}")


def trained(data: str, workdir: str, optimizer: dict, dtype: str, seed: int, steps: int) -> dict:
    """Train a run, and return its losses and the bytes of its optimizer's state."""
    from mtnlg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
    from mtnlg_jax.train.loop import train
    from mtnlg_jax.train.metrics import read_metrics

    config = Config(
        model=ModelConfig(
            num_layers=3,
            hidden_size=128,
            num_attention_heads=4,
            max_position_embeddings=128,
            position_embedding_type="rotary",
        ),
        data=DataConfig(path=data),
        optimizer=OptimizerConfig(warmup_fraction=0.05, moments_dtype=dtype, **optimizer),
        train=TrainConfig(
            steps=steps,
            global_batch_size=16,
            compute_dtype="float32",
            seed=seed,
            eval_every=0,
            save_every=0,
        ),
    )
    train(config, workdir, show_progress=False)
    records = read_metrics(f"{workdir}/metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    held_out = [record["causal_loss"] for record in records if record["kind"] == "eval"]
    return {
        **optimizer,
        "moments_dtype": dtype,
        "seed": seed,
        "loss": round(statistics.mean(losses[-LAST:]), 4),
        "held_out_loss": round(held_out[-1], 4),
        "bytes": state_bytes(config, data),
    }


def state_bytes(config, data: str) -> int:
    """Return the bytes of the optimizer's state of a run with the tokenizer of ``data``."""
    import jax

    from mtnlg_jax.data.tokenizer import load_tokenizer
    from mtnlg_jax.parallel.mesh import make_mesh
    from mtnlg_jax.train.inputs import resolve
    from mtnlg_jax.train.state import abstract_state

    config = resolve(config, load_tokenizer(f"{data}/tokenizer"))
    state = abstract_state(config, make_mesh(config.mesh)).opt_state
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
