"""The model as decoding holds it: layers unstacked, keys and values cached by position.

Prompts are padded on the right. Key j is visible iff j <= the query's position, so padding is never seen and
is overwritten as a row grows. A cache is a tuple over layers of (k, v), each (B, K, S, H), changed in place.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.model.attention import attention, decode_attention
from mtnlg_jax.model.transformer import abstract_model


class Decoder(NamedTuple):
    """A model ready to decode: its shape, and as parameters (all but the blocks, a tuple of blocks)."""

    config: ModelConfig
    params: tuple[Any, tuple[Any, ...]]

    @property
    def context(self) -> int:
        return self.config.max_position_embeddings


class Prefix(NamedTuple):
    """Prompts that the model has read: what decoding goes on from."""

    tokens_BS: jax.Array  # int32, right-padded to the capacity of the cache
    lengths_B: jax.Array
    logits_BV: jax.Array  # float32, of the token after each prompt
    cache: tuple[tuple[jax.Array, jax.Array], ...]


@functools.cache
def _graphs(config: ModelConfig):
    """Graphdefs of the model without its blocks, and of one block."""
    model = nnx.merge(*abstract_model(config))
    block_graph, _ = nnx.split(model.blocks)
    model.blocks = None
    return nnx.split(model)[0], block_graph


def unstack(config: ModelConfig, params, dtype="float32") -> Decoder:
    """The decoder of trained parameters: the scanned blocks come apart once, since a cache that runs through
    a scan over layers is copied in every step.

    Args:
      params: as ``init_parameters`` or a checkpoint gives them, blocks with a leading L.
      dtype: "float32" or "bfloat16", of parameters, products and cache; float32 stay softmax, norms, logits.
    """
    if str(jnp.dtype(dtype)) not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} cannot decode; choose float32 or bfloat16")
    return Decoder(config, _unstack(params, config=config, dtype=str(jnp.dtype(dtype))))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _unstack(params, *, config, dtype):
    model = nnx.merge(abstract_model(config)[0], jax.tree.map(lambda x: x.astype(dtype), params))
    stacked, model.blocks = nnx.split(model.blocks)[1], None

    def layer(number):
        return jax.tree.map(lambda x: x[number], stacked)

    return nnx.split(model)[1], tuple(map(layer, range(config.num_layers)))


def run_layers(config: ModelConfig, params, tokens_BS, positions_BS, attend: Callable):
    """(hidden states after the final norm (B, S, D), head (V, D)); ``attend(layer, q, k, v)`` is layer
    ``layer``'s attention over whatever keys there are."""
    outer_graph, block_graph = _graphs(config)
    outer, layers = params
    model = nnx.merge(outer_graph, outer)
    x_BSD = model.embed(tokens_BS, positions_BS)
    for number, layer in enumerate(layers):
        x_BSD = nnx.merge(block_graph, layer)(x_BSD, positions_BS, functools.partial(attend, number))
    return model.final_norm(x_BSD), model.head()


def bucket(length: int, limit: int) -> int:
    """The length to which prompts and candidates are padded: a power of two from 16, at most ``limit``."""
    return min(max(16, 1 << (length - 1).bit_length()), limit)


def capacity(length: int, limit: int) -> int:
    """Positions of a cache for ``length`` tokens: 128, 192, 256, 384, 512 ..., at most ``limit``. Coarse, so
    that compiles are few; not always ``limit``, since every step reads all of the cache."""
    power = max(128, 1 << (length - 1).bit_length())
    return min(power // 4 * 3 if 128 < power and length <= power // 4 * 3 else power, limit)


def prefill(decoder: Decoder, prompts: Sequence[Sequence[int]], size: int) -> Prefix:
    """Reads ``prompts`` (token ids, at least one each) into a cache of ``size`` positions.

    Raises ValueError on an empty prompt, one longer than ``size``, and ids outside the vocabulary.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1 or lengths.max() > size:
        raise ValueError(f"prompts of {lengths.tolist()} tokens do not fit a cache of {size}: give 1 to {size}")
    padded = np.zeros((len(prompts), bucket(int(lengths.max()), size)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    vocabulary = decoder.config.vocab_size
    if padded.min() < 0 or padded.max() >= vocabulary:
        bad = padded.min() if padded.min() < 0 else padded.max()
        raise ValueError(f"token {bad} lies outside the model's vocabulary, 0 to {vocabulary - 1}")
    return _prefill(decoder.params, padded, lengths, config=decoder.config, size=size)


@functools.partial(jax.jit, static_argnames=("config", "size"))
def _prefill(params, tokens_BS, lengths_B, *, config, size):
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    more = size - tokens_BS.shape[1]
    cache = []

    def attend(_, q, k, v):
        cache.append(tuple(jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, more), (0, 0))) for x in (k, v)))
        return attention(q, k, v, impl=config.attention_impl)

    x_BSD, head_VD = run_layers(config, params, tokens_BS, positions_BS, attend)
    last_BD = jnp.take_along_axis(x_BSD, (lengths_B - 1)[:, None, None], 1)[:, 0]
    return Prefix(jnp.pad(tokens_BS, ((0, 0), (0, more))), lengths_B, _logits(last_BD, head_VD), tuple(cache))


def step(config: ModelConfig, params, cache, tokens_B, positions_B):
    """Reads one token a row, at its position: (float32 logits of the next (B, V), the cache with it)."""
    written = []

    def attend(layer, q, k, v):
        k_cache, v_cache = (_write(cache[layer][0], k, positions_B), _write(cache[layer][1], v, positions_B))
        written.append((k_cache, v_cache))
        return decode_attention(q[:, 0], k_cache, v_cache, positions_B + 1)[:, None]

    x_BSD, head_VD = run_layers(config, params, tokens_B[:, None], positions_B[:, None], attend)
    return _logits(x_BSD[:, 0], head_VD), tuple(written)


def _write(cache_BKSH, new_BSKH, positions_B):
    rows_B = jnp.arange(cache_BKSH.shape[0])
    written = cache_BKSH.at[rows_B, :, positions_B].set(new_BSKH[:, 0].astype(cache_BKSH.dtype))
    # Unhindered, XLA:CPU writes a second time inside the attention's fusion, and so copies the whole cache.
    return jax.lax.optimization_barrier(written)


def _logits(x_BD, head_VD):
    return jnp.einsum("BD,VD->BV", x_BD, head_VD, preferred_element_type=jnp.float32)
