"""Provide two tiny random models with peaked distributions, and a tokenizer with byte pieces.

They are shared because compiling is slow.
"""

import copy
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtnlg_jax.config import LayerSpec, ModelConfig, MoEConfig
from mtnlg_jax.data.tokenizer import train_tokenizer
from mtnlg_jax.decode.cache import Decoder, unstack
from mtnlg_jax.model.transformer import abstract_model

# The folder of the tests is not in the import path, but peer.py and make_fixtures.py are there.
sys.path.append(str(Path(__file__).parent))

CONTEXT = 64
TEXTS = [
    "The cat sat on the mat and the dog sat on the log.\n",
    "In the town where I was born lived a man.\n",
    "The rain in Spain stays mainly in the plain.\n",
    "天地玄黄,宇宙洪荒。日月盈昃,辰宿列张。\n",
] * 8


@pytest.fixture(scope="session")
def tokenizer():
    """Return a tokenizer that knows the characters above; others, as in "你好", become bytes."""
    return train_tokenizer(TEXTS, 420)


@pytest.fixture(scope="session")
def letters(tokenizer):
    """Return the tokenizer with the bytes of other characters never written, so that text is
    readable."""
    other = copy.copy(tokenizer)
    pieces = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
    other.is_special = tokenizer.is_special | np.array(
        [len(piece) == 1 and piece > b"\x7f" for piece in pieces]
    )
    return other


class Tiny(NamedTuple):
    config: ModelConfig
    params: nnx.State
    decoder: Decoder

    def logits(self, tokens, **options) -> np.ndarray:
        """Return float32 logits (B, S, V) of the whole model without a cache, padded to one shape,
        so that it compiles once."""
        padded = np.zeros((len(tokens), CONTEXT), np.int32)
        padded[:, : np.shape(tokens)[1]] = tokens
        return np.asarray(_full(self.config, self.params, padded, **options))[
            :, : np.shape(tokens)[1]
        ]

    def with_bias(self, bias: list[float]) -> "Tiny":
        """Return the model with this bias of the experts in every layer."""

        def change(path, leaf):
            chooses = "b_balance_E" in jax.tree_util.keystr(path)
            return jnp.broadcast_to(jnp.asarray(bias, leaf.dtype), leaf.shape) if chooses else leaf

        params = jax.tree_util.tree_map_with_path(change, self.params)
        return Tiny(self.config, params, unstack(self.config, params))


@functools.partial(jax.jit, static_argnames=("config", "causal"))
def _full(config, params, tokens, causal=True, segment_ids_BS=None):
    return nnx.merge(abstract_model(config)[0], params)(
        tokens, causal=causal, segment_ids_BS=segment_ids_BS
    )


def _tiny(vocabulary, layers=2, **shape) -> Tiny:
    # 17 ids more than the tokenizer has are the padding of the vocabulary.
    config = ModelConfig(
        num_layers=layers,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=vocabulary + 17,
        max_position_embeddings=CONTEXT,
        **shape,
    )
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        # Large weights, and none of 0. Otherwise all tokens would be about equally likely, and
        # tests would prove little.
        name = jax.tree_util.keystr(path)
        std = 0.15 if "_VD" in name or "w_" in name else 0.05
        return jnp.asarray(rng.normal("scale" in name, std, leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, abstract_model(config)[1])
    return Tiny(config, params, unstack(config, params))


@pytest.fixture(scope="session")
def make_tiny():
    """Return a function of (vocabulary, layers, settings of ModelConfig) that returns a `Tiny`."""
    return _tiny


@pytest.fixture(scope="session")
def learned(tokenizer):
    return _tiny(tokenizer.vocab_size)


@pytest.fixture(scope="session")
def rotary(tokenizer):
    """Return a model with rotary positions, two query heads to a key head, RMSNorm, SwiGLU and a
    separate output embedding."""
    return _tiny(
        tokenizer.vocab_size,
        position_embedding_type="rotary",
        num_query_groups=2,
        activation="swiglu",
        normalization="rmsnorm",
        tie_embeddings=False,
        add_bias=False,
    )


@pytest.fixture(scope="session")
def deep(tokenizer):
    """Return a model of 4 layers with rotary positions and two query heads to a key head."""
    return _tiny(
        tokenizer.vocab_size, layers=4, position_embedding_type="rotary", num_query_groups=2
    )


@pytest.fixture(scope="session")
def windowed(tokenizer):
    """Return a model with sinks whose first layer sees 7 keys, its second all."""
    return _tiny(
        tokenizer.vocab_size,
        position_embedding_type="rotary",
        num_query_groups=2,
        attention_sink=True,
        layer_pattern=(LayerSpec(window=7), LayerSpec()),
    )


@pytest.fixture(scope="session")
def biased(tokenizer):
    """Return a model whose attention is biased by distance (ALiBi)."""
    return _tiny(tokenizer.vocab_size, position_embedding_type="alibi", num_query_groups=2)


@pytest.fixture(scope="session")
def striped(tokenizer):
    """Return a model of 4 layers with sinks of which every other one sees 7 keys."""
    return _tiny(
        tokenizer.vocab_size,
        layers=4,
        position_embedding_type="rotary",
        num_query_groups=2,
        attention_sink=True,
        layer_pattern=(LayerSpec(window=7), LayerSpec()),
    )


@pytest.fixture(scope="session")
def balanced(tokenizer):
    """Return a model whose experts are chosen by their scores and a bias."""
    model = _tiny(
        tokenizer.vocab_size,
        activation="swiglu",
        moe=MoEConfig(4, 2, "sigmoid", moe_router_enable_expert_bias=True),
    )
    return model.with_bias([0.0, 0.3, -0.3, 0.6])


@pytest.fixture(params=["learned", "rotary"])
def tiny(request):
    return request.getfixturevalue(request.param)
