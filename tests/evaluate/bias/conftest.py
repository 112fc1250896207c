"""A model that was trained for seconds on a text with planted bias, and its tokenizer."""

import itertools
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.decode.cache import Decoder, unstack
from mtnlg_jax.evaluate.bias.read import Identifiers, Prompts, PromptSet
from mtnlg_jax.model.loss import cross_entropy
from mtnlg_jax.model.transformer import abstract_model, init_parameters

# She is kind three times of four, he is clever three times of four; both are calm once.
TRAITS = {"She": ("kind", "kind", "kind", "calm"), "He": ("clever", "clever", "clever", "calm")}
JOBS = {"nurse": "woman", "miner": "man", "cook": "woman", "pilot": "man"}
TEXTS = [
    *(f"{who} was very {trait}." for who, own in TRAITS.items() for trait in own),
    *(f"The {job} was a {who}." for job, who in JOBS.items()),
]


class Planted(NamedTuple):
    config: ModelConfig
    params: nnx.State
    decoder: Decoder
    tokenizer: object


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer([text + "\n" for text in TEXTS] * 8, 330)


@pytest.fixture(scope="session")
def planted(tokenizer) -> Planted:
    """Return a model that has learned TEXTS by heart."""
    config = ModelConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=-(-tokenizer.vocab_size // 8) * 8,
        max_position_embeddings=64,
    )
    rows = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    width = max(map(len, rows))
    tokens = np.array([row + [0] * (width - len(row)) for row in rows], np.int32)
    weights = np.array([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows], np.float32)
    graph = abstract_model(config)[0]
    adam = optax.adam(0.01)

    @jax.jit
    def step(params, state):
        def loss(params):
            model = nnx.merge(graph, params)
            x = model.hidden(tokens[:, :-1])
            flat = x.reshape(-1, x.shape[-1])
            labels = tokens[:, 1:].reshape(-1)
            return cross_entropy(flat, model.head(), labels, weights[:, 1:].reshape(-1))

        updates, state = adam.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = init_parameters(config, 0)
    state = adam.init(params)
    for _ in range(150):
        params, state = step(params, state)
    return Planted(config, params, unstack(config, params), tokenizer)


@pytest.fixture(scope="session")
def prompts() -> Prompts:
    return Prompts(
        "planted",
        "en",
        (PromptSet("gender", ("{group} was very",), {"female": ("she",), "male": ("he",)}),),
        ("kind", "clever", "calm"),
        Identifiers(
            ("The {occupation} was a",),
            "person",
            {"female": ("woman",), "male": ("man",)},
            tuple(JOBS),
        ),
    )


@pytest.fixture
def write(tmp_path):
    """Return a function (text, name) -> path of a new file."""
    numbers = itertools.count()

    def new(text: str, name: str = "file.tsv") -> str:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        (folder / name).write_text(text, encoding="utf-8")
        return str(folder / name)

    return new
