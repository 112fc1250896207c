"""Provide a small model that has learned to write sentences in English and Chinese."""

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
from mtnlg_jax.data.tokenizer.base import Tokenizer
from mtnlg_jax.decode.cache import Decoder, unstack
from mtnlg_jax.model.transformer import abstract_model, init_parameters
from mtnlg_jax.tasks.writing.kinds import FRAMES, KINDS

CONTEXT = 192
_WHO = ["the whale", "the captain", "a cook", "the parrot", "Anna", "an old sailor"]
_DOES = ["swam north", "saw the ship", "slept well", "lost 3 coins", "sang to Anna", "ate bread"]
_ZH_WHO = ["鲸鱼", "船长", "厨师", "王小明", "老水手", "鹦鹉"]
_ZH_DOES = ["向北游去", "看见了船", "睡得很好", "丢了3个硬币", "唱了歌", "吃了面包"]


class Model(NamedTuple):
    decoder: Decoder
    tokenizer: Tokenizer


def stories(number: int, seed: int = 0) -> list[str]:
    """Return texts of short sentences, half of them Chinese."""
    draws = np.random.default_rng(seed)
    found = []
    for i in range(number):
        sentences = []
        for _ in range(24):
            who, does = draws.integers(0, 6, 2)
            if i % 2:
                sentences.append(f"{_ZH_WHO[who]}{_ZH_DOES[does]}。")
            else:
                text = f"{_WHO[who]} {_DOES[does]}."
                sentences.append(text[0].upper() + text[1:])
        found.append(("" if i % 2 else " ").join(sentences))
    return found


@functools.partial(
    jax.jit, static_argnames=("config", "optimizer"), donate_argnames=("params", "state")
)
def _learn(config, optimizer, params, state, tokens_BS):
    def loss(params):
        logits_BSV = nnx.merge(abstract_model(config)[0], params)(tokens_BS[:, :-1])
        each = optax.softmax_cross_entropy_with_integer_labels(logits_BSV, tokens_BS[:, 1:])
        return each.mean()

    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, value


@pytest.fixture(scope="session")
def tokenizer():
    words = [text for frame in FRAMES.values() for text in vars(frame).values()] + [
        text for kind in KINDS.values() for text in kind.instructions.values()
    ]
    return train_tokenizer([*stories(20), "\n".join(words)] * 2, 600)


@pytest.fixture(scope="session")
def model(tokenizer) -> Model:
    rows = [tokenizer.encode(text) for text in stories(64)]
    size = min(96, *map(len, rows))
    tokens = np.array([row[:size] for row in rows], np.int32)
    config = ModelConfig(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=2,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=CONTEXT,
        position_embedding_type="rotary",
    )
    params = init_parameters(config, 0)
    optimizer = optax.adam(optax.cosine_decay_schedule(1.5e-2, 160))
    state = optimizer.init(params)
    for step in range(160):
        batch = jnp.asarray(tokens[np.arange(8) * 8 + step % 8])
        params, state, value = _learn(config, optimizer, params, state, batch)
    assert value < 2, f"the model has not learned its sentences: loss {value}"
    return Model(unstack(config, params), tokenizer)
