"""A tiny model: run_tasks and the harness's own entry agree to every digit, as do two meshes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtnlg_jax.config import MeshConfig, ModelConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.decode.cache import unstack
from mtnlg_jax.evaluate.harness_tasks import loading, offline, run
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.mesh import make_mesh

WORDS = "the whale swam north again while nobody saw a cold boat".split()
NAMES = ["lambada_openai", "piqa", "winogrande"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(WORDS)] * 9, 300)


@pytest.fixture(scope="module")
def parts(tokenizer):
    """Return (config, parameters) of a random model."""
    config = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=64,
    )
    rng = np.random.default_rng(0)
    shapes = abstract_model(config)[1]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)
    return config, params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(1)

    def some(count):
        return " ".join(rng.choice(WORDS, count))

    files = {
        "lambada.jsonl": [{"text": some(12)} for _ in range(9)],
        "piqa.jsonl": [
            {"goal": some(5), "sol1": some(3), "sol2": some(4), "label": int(rng.integers(2))}
            for _ in range(9)
        ],
        "winogrande.jsonl": [
            {
                "sentence": f"{some(3)} _ {some(2)}",
                "option1": "whale",
                "option2": "boat",
                "answer": str(rng.integers(1, 3)),
            }
            for _ in range(9)
        ],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def model(parts, tokenizer):
    offline.enter()
    from mtnlg_jax.evaluate.harness import MtnlgLM

    return MtnlgLM.of(unstack(*parts), tokenizer)


def test_the_digits_of_the_harness(model, folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(loading.FOLDER), include_defaults=False, metadata={"task_data": folder}
    )
    theirs = lm_eval.simple_evaluate(
        model=model, tasks=NAMES, num_fewshot=2, task_manager=manager, bootstrap_iters=0
    )
    ours = run.run_tasks(model, NAMES, task_data=folder, num_fewshot=2, bootstraps=0)
    for name in NAMES:
        task = ours["tasks"][name]
        assert task["version"] == theirs["versions"][name]
        for metric, found in task["metrics"].items():
            assert found["value"] == theirs["results"][name][f"{metric},none"], (name, metric)
        hashes = [sample["doc_hash"][:12] for sample in theirs["samples"][name]]
        assert task["per_row"]["docs"] == hashes


def test_shortened_prompts_are_those_that_the_class_cuts(model, folder, caplog):
    rows = (Path(folder) / "lambada.jsonl").read_text().splitlines()
    lengths = sorted(len(model.tok_encode(json.loads(row)["text"])) for row in rows)
    # The model does not read the last token, so a text of the middle length just fits.
    short = type(model).of(model.decoder, model.tok, max_length=lengths[4] - 1)
    task = run.run_tasks(short, ["lambada_openai"], task_data=folder, bootstraps=0)["tasks"]
    cut = task["lambada_openai"]["cut_prompts"]
    assert cut == sum(length > lengths[4] for length in lengths) > 0
    assert f"{cut} of 9 contexts are longer" in caplog.text


def test_eight_devices_score_as_one(model, parts, tokenizer, folder):
    from mtnlg_jax.evaluate.harness import MtnlgLM

    mesh = make_mesh(MeshConfig(data=4, tensor=2), jax.devices())
    with jax.set_mesh(mesh):
        split = MtnlgLM.of(unstack(*parts, mesh=mesh), tokenizer)
        many = run.run_tasks(split, NAMES, task_data=folder, num_fewshot=1, bootstraps=0)
    one = run.run_tasks(model, NAMES, task_data=folder, num_fewshot=1, bootstraps=0)
    for name in NAMES:
        assert many["tasks"][name]["prompt_hash"] == one["tasks"][name]["prompt_hash"]
        assert many["tasks"][name]["per_row"]["acc"] == one["tasks"][name]["per_row"]["acc"]
    values = [found["tasks"]["lambada_openai"]["per_row"]["perplexity"] for found in (many, one)]
    np.testing.assert_allclose(*values, rtol=1e-5)
