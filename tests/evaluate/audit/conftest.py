"""A run of seconds on text with canaries, which the tests of an audit share."""

import itertools
import json

import pytest

from mtnlg_jax.config import load_config
from mtnlg_jax.data.canaries import CanaryConfig
from mtnlg_jax.data.prepare import prepare
from mtnlg_jax.data.read.builtin_corpus import embedded_documents
from mtnlg_jax.train.loop import train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Write a file of some prose."""
    texts = [document.text[:3000] for document in itertools.islice(embedded_documents(), 160)]
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    """Prepare it with canaries: 8 that stand nowhere, 8 that stand 60 times."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    config = CanaryConfig(8, (0, 60))
    prepare(corpus, output, vocab_size=400, heldout=0.1, canaries=config, progress=False)
    return output


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory):
    """Train the smallest model on it, for a few seconds."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    changes = [
        f"data.path={prepared}",
        "train.steps=80",
        "train.eval_every=80",
        "train.save_every=80",
        "train.global_batch_size=16",
        "optimizer.name=muon",
        "optimizer.learning_rate=2e-2",
        "model.num_layers=1",
        "model.hidden_size=48",
    ]
    train(load_config("configs/tiny.py", changes), str(workdir))
    return workdir
