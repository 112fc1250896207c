"""Provide a tokenizer and a tiny model that has memorized a few rows of each task."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.decode.cache import Decoder, unstack
from mtnlg_jax.decode.results import encode_prompt
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.tasks.prompts import Row, pairs
from mtnlg_jax.tasks.templates import TASKS

CONTEXT = 160
ROWS = {
    "continue": [Row("Once upon a time", (" there lived a whale.",))],
    "summarise": [
        Row("The whale swam north. It was cold there. It came back.", ("A whale came back.",)),
        Row("鲸鱼向北游去。那里很冷。", ("鲸鱼很冷。",)),
    ],
    "translate": [Row("Hello, captain.", ("你好，船长。",)), Row("再见。", ("Goodbye.",))],
    "sentiment": [
        Row("a fine film", ("positive",)),
        Row("a dull film", ("negative",)),
        Row("很好看", ("positive",)),
        Row("很无聊", ("negative",)),
    ],
    "answer": [
        Row("Where is the whale?", ("in the north",), context="The whale lives in the north."),
        Row("鲸鱼在哪里？", ("北方",)),
        Row("Who sleeps?", ("the captain",)),
    ],
}


class Memory(NamedTuple):
    decoder: Decoder
    tokenizer: object


@pytest.fixture(scope="session")
def tokenizer():
    texts = [
        pair["prompt"] + pair["answer"] + "\n"
        for name, rows in ROWS.items()
        for pair in pairs(TASKS[name], rows)
    ]
    return train_tokenizer(texts * 4, 480)


@functools.partial(
    jax.jit, static_argnames=("config", "optimizer"), donate_argnames=("params", "state")
)
def _learn(config, optimizer, params, state, tokens_BS, weights_BS):
    def loss(params):
        logits_BSV = nnx.merge(abstract_model(config)[0], params)(tokens_BS[:, :-1])
        each = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, tokens_BS[:, 1:])
        return (each * weights_BS[:, 1:]).sum() / weights_BS[:, 1:].sum()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, value


@pytest.fixture(scope="session")
def memory(tokenizer) -> Memory:
    made = [
        (
            encode_prompt(tokenizer, pair["prompt"]),
            [*tokenizer.encode(pair["answer"]), tokenizer.eos_id],
        )
        for name, rows in ROWS.items()
        for pair in pairs(TASKS[name], rows)
    ]
    tokens = np.zeros((len(made), max(len(prompt + answer) for prompt, answer in made)), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for row, (prompt, answer) in enumerate(made):
        tokens[row, : len(prompt + answer)] = prompt + answer
        # On the answer alone, as in fine-tuning.
        weights[row, len(prompt) : len(prompt + answer)] = 1
    config = ModelConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=CONTEXT,
    )
    params = init_parameters(config, 0)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 100))
    state = optimizer.init(params)
    for _ in range(100):
        params, state, value = _learn(
            config, optimizer, params, state, jnp.asarray(tokens), jnp.asarray(weights)
        )
    assert value < 0.02, f"the model has not learned its rows: loss {value}"
    return Memory(unstack(config, params), tokenizer)


@pytest.fixture(scope="session")
def known() -> dict[str, list[Row]]:
    """Return the rows that the model has memorized, by task."""
    return ROWS
