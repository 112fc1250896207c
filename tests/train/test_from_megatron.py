"""Train a run on files written by megatron-core's own writer (tests/data/megatron_peer.py)."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from mtnlg_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.train import loop
from mtnlg_jax.train.checkpoint import load_run
from mtnlg_jax.train.metrics import read_metrics

PREFIX = str(Path(__file__).parents[1] / "data" / "fixtures" / "sentences")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a tokenizer of 256 bytes and an end, as the fixture requires."""
    from mtnlg_jax.data.tokenizer.byte_level import byte_alphabet

    folder = tmp_path_factory.mktemp("gpt2")
    pieces = [*byte_alphabet(), "th", "the", "\u0120the", "<|endoftext|>"]
    (folder / "vocab.json").write_text(
        json.dumps({piece: number for number, piece in enumerate(pieces)})
    )
    (folder / "merges.txt").write_text("t h\nth e\n\u0120 the\n", encoding="utf-8")
    return str(folder)


def _config(data, steps):
    return Config(
        model=ModelConfig(
            num_layers=1, hidden_size=32, num_attention_heads=8, max_position_embeddings=32
        ),
        mesh=MeshConfig(data=8),
        data=data,
        # A run of this curve may become longer.
        optimizer=OptimizerConfig(learning_rate=3e-3, lr_decay_style="constant"),
        train=TrainConfig(
            steps=steps, global_batch_size=8, eval_every=0, save_every=0, compute_dtype="float32"
        ),
    )


@pytest.mark.slow  # tests/data/store/test_megatron.py and test_sources.py read the files
def test_a_run_trains_resumes_and_is_evaluated(tokenizer, tmp_path):
    data = DataConfig(path=PREFIX, tokenizer=tokenizer, heldout=0.1)
    run = str(tmp_path / "run")
    loop.train(_config(data, 2), run, show_progress=False)
    whole = loop.train(_config(data, 4), run, show_progress=False)
    records = read_metrics(os.path.join(run, "metrics.jsonl"))
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]
    # Letters, one token each: bytes and tokens are alike but for the ends.
    assert np.isclose(
        whole.final["bits_per_byte"], whole.final["causal_loss"] / np.log(2), rtol=0.1
    )

    found = load_run(run, "last")
    assert encode_prompt(found.tokenizer, "the") == found.tokenizer.encode(
        "the"
    )  # no bos, which it never read
    with pytest.raises(ValueError, match="data"):  # other documents held out: another corpus
        loop.train(_config(dataclasses.replace(data, heldout=0.3), 9), run, show_progress=False)
