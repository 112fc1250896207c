"""A run on two sources, one of which has a bad document that a single step reads."""

import json

import numpy as np

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.train.inputs import load_data, resolve
from mtnlg_jax.train.metrics import read_metrics
from mtnlg_jax.train.step_batch import StepBatch

LENGTH = 24
BATCH = 8
STEPS = 60


def make_planted(folder):
    """Prepare the sources in ``folder``, and return it."""
    rng = np.random.default_rng(3)
    sentences = (
        "the whale swam north while the old captain slept on the ship.",
        "nobody on the ship dared to wake the old captain.",
        "the old captain slept.",
    )

    def good():
        return " ".join(rng.choice(sentences, 6))

    bad = "".join(rng.choice(list("0123456789"), 2 * LENGTH))
    texts = {name: [good() for _ in range(100)] for name in ("books", "web")}
    texts["web"].append(bad)
    tokenizer = None
    for name, lines in texts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
        options = {"tokenizer": tokenizer} if tokenizer else {"vocab_size": 320}
        heldout = 0.05 if name == "books" else 0.0
        prepare(path, folder / name, heldout=heldout, progress=False, **options)
        tokenizer = str(folder / "books/tokenizer")
    return folder


def planted_config(folder, mesh=None, **train):
    return Config(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        ),
        mesh=MeshConfig(data=8) if mesh is None else mesh,
        data=DataConfig(blend=((str(folder / "books"), 3.0), (str(folder / "web"), 1.0))),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.05),
        train=TrainConfig(
            **{
                "steps": STEPS,
                "global_batch_size": BATCH,
                "compute_dtype": "float32",
                "save_every": 20,
                "eval_every": 0,
                "eval_batches": 1,
                "keep_best": False,
            }
            | train
        ),
    )


def bad_batches(config):
    """Return {step from 1: document} of the batches with tokens of the bad document, in which
    alone are digits."""
    data = load_data(config)
    config = resolve(config, data.tokenizer)
    digits = [
        i for i in range(data.tokenizer.vocab_size) if data.tokenizer.token_bytes(i).isdigit()
    ]
    found = {}
    for step in range(config.train.steps):
        batch = StepBatch(config, None, data, step, step * BATCH)
        bad = np.isin(batch.rows["tokens"], digits)
        for document in batch.documents:
            if bad[batch.mask(document)].any():
                found[step + 1] = document
    return found


def records_of(workdir, *kinds):
    """Return the records of metrics.jsonl by (kind, step), without measured times.

    Without ``kinds`` those of times alone are left out.
    """
    measured = ("tokens_per_second", "mfu", "time")
    times = ("goodput", "processes")
    return {
        (record["kind"], record["step"]): {
            key: value for key, value in record.items() if key not in measured
        }
        for record in read_metrics(f"{workdir}/metrics.jsonl")
        if (record["kind"] in kinds if kinds else record["kind"] not in times)
    }
