"""A small language in which each sentence calls for the next, and a model trained on it.

Sentence k has four words that occur in no other sentence, and sentence k + 1 follows it (after the
last one the first). Nothing else can be predicted.
"""

import functools
import random
from types import SimpleNamespace

import jax
import numpy as np
import optax
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.cache import Decoder, unstack
from mtnlg_jax.model.loss import cross_entropy
from mtnlg_jax.model.transformer import abstract_model, init_parameters

SENTENCES = 72
CONTEXT = 64


def _encode(text: str) -> list[int]:
    return [2 + "abcd".index(word[0]) * SENTENCES + int(word[1:]) for word in _words(text)]


def _words(text: str) -> list[str]:
    return text.replace(".", "").split()


TOKENIZER = SimpleNamespace(
    bos_id=1, encode=_encode, encode_batch=lambda texts: list(map(_encode, texts))
)


def sentence(number: int) -> str:
    return " ".join(f"{letter}{number % SENTENCES}" for letter in "abcd") + "."


def text(start: int, count: int) -> str:
    """Return ``count`` sentences in order."""
    return " ".join(sentence(start + each) for each in range(count))


def shuffled(start: int, count: int, seed: int = 0) -> str:
    order = list(range(start, start + count))
    random.Random(seed).shuffle(order)
    return " ".join(map(sentence, order))


@functools.cache
def trained() -> Decoder:
    """Return a decoder after some seconds of training on `text`."""
    config = ModelConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        vocab_size=2 + 4 * SENTENCES,
        max_position_embeddings=CONTEXT,
    )
    graph = abstract_model(config)[0]
    adam = optax.adam(0.02)

    @jax.jit
    def step(params, state, rows):
        def loss(params):
            model = nnx.merge(graph, params)
            x = model.hidden(rows[:, :-1])
            flat = x.reshape(-1, x.shape[-1])
            labels = rows[:, 1:].reshape(-1)
            return cross_entropy(flat, model.head(), labels, np.ones(labels.shape, np.float32))

        gradients = jax.grad(loss)(params)
        updates, state = adam.update(gradients, state)
        return optax.apply_updates(params, updates), state

    params = init_parameters(config, 0)
    state = adam.init(params)
    draw = random.Random(0)
    for _ in range(80):
        starts = [draw.randrange(SENTENCES) for _ in range(16)]
        rows = [[1, *_encode(text(start, 8))] for start in starts]
        params, state = step(params, state, np.array(rows, np.int32))
    return unstack(config, params)
