"""Texts with one bad document, and the settings of a small run that reads it in one step."""

import json

import numpy as np

from mtnlg_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

GOOD = 520
STEPS = 32
LENGTH = 48


def write_texts(folder, seed=0):
    """Write good documents, sentences of few words, and one of random bytes; return its text."""
    rng = np.random.default_rng(seed)
    words = "the whale swam north while the old captain slept on the ship".split()
    texts = [" ".join(rng.choice(words, 40)) + "." for _ in range(GOOD)]
    bad = "".join(chr(c) for c in rng.integers(0x21, 0x7E, 40))
    texts.insert(37, bad)
    with open(folder / "texts.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return bad


def small_config(data, **train):
    return Config(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            init_method_std=0.1,
        ),
        data=DataConfig(path=str(data)),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_fraction=0.1),
        train=TrainConfig(
            **{
                "steps": STEPS,
                "global_batch_size": 8,
                "micro_batch_size": 4,
                "compute_dtype": "float32",
                "save_every": 10,
                "eval_every": 0,
                "keep_last": 4,
                "keep_best": False,
                "seed": 45,
            }
            | train
        ),
    )
