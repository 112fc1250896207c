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


def next_logits(config: ModelConfig, params, prefix: Prefix, cache, sources_GPK, tokens_GPKW, written):
    """What follows the ``written`` new tokens of each beam: behind none, what follows the prompt; else by
    ``step_beams``, with the last of them. Within one program, since what chooses among logits takes long to compile."""
    shape = sources_GPK.shape

    def first(cache):
        logits_PV = prefix.logits_BV
        return jnp.broadcast_to(logits_PV[None, :, None], (*shape, logits_PV.shape[-1])), cache

    def later(cache):
        last_GPK1 = jnp.broadcast_to((prefix.lengths_B + written - 1)[None, :, None], shape)[..., None]
        tokens_GPK = jnp.take_along_axis(tokens_GPKW, last_GPK1, -1)[..., 0]
        return step_beams(config, params, prefix.cache, prefix.lengths_B, cache, sources_GPK, tokens_GPK, written - 1)

    return jax.lax.cond(written == 0, first, later, cache)


def step_beams(config: ModelConfig, params, prompt_cache, prompts_P, cache, sources_GPK, tokens_GPK, read):
    """Reads one token a beam behind prompts that all their beams share.

    Args:
      prompt_cache, prompts_P: the cache of P prompts and their lengths; neither copied nor reordered.
      cache: of the new tokens alone, (G*P*K, heads, T, H), one row a beam: G groups of K for every prompt.
      sources_GPK: the beam, 0 to K - 1, that each beam goes on from; its new tokens are taken over.
      read: new tokens read so far, the same for all beams.
    Returns: float32 logits of the next (G, P, K, V), the cache with the tokens.
    """
    groups, prompts, beams = tokens_GPK.shape
    rows = groups * prompts * beams
    first_GP1 = jnp.arange(groups * prompts).reshape(groups, prompts, 1) * beams
    from_R = (first_GP1 + sources_GPK).reshape(rows)
    positions_R = jnp.broadcast_to((prompts_P + read)[:, None], tokens_GPK.shape).reshape(rows)
    written = []

    def attend(layer, q, k, v):
        own = tuple(jax.lax.dynamic_update_slice(x[from_R], new.swapaxes(1, 2).astype(x.dtype), (0, 0, read, 0))
                    for x, new in zip(cache[layer], (k, v), strict=True))
        written.append(own)
        o_own, lse_own = decode_attention(q[:, 0], *own, jnp.full(rows, read + 1), return_lse=True)
        # Before the shared keys, the beams of a prompt are so many more query heads of one row.
        shared_k, shared_v = prompt_cache[layer]
        heads = shared_k.shape[1]
        shape = groups, prompts, beams, heads, q.shape[2] // heads
        together = q.reshape(*shape, q.shape[-1]).transpose(1, 3, 0, 2, 4, 5)
        o_shared, lse_shared = decode_attention(together.reshape(prompts, -1, q.shape[-1]), shared_k, shared_v,
                                                prompts_P, return_lse=True)
        o_shared = o_shared.reshape(together.shape).transpose(2, 0, 3, 1, 4, 5).reshape(o_own.shape)
        lse_shared = lse_shared.reshape(together.shape[:-1]).transpose(2, 0, 3, 1, 4).reshape(lse_own.shape)
        share = jax.nn.sigmoid(lse_shared - lse_own)[..., None]  # of the softmax's sum
        return (share * o_shared + (1 - share) * o_own).astype(q.dtype)[:, None]

    x_RSD, head_VD = run_layers(config, params, tokens_GPK.reshape(rows, 1), positions_R[:, None], attend)
    return _logits(x_RSD[:, 0], head_VD).reshape(groups, prompts, beams, -1), tuple(written)


def empty_beams(prompt_cache, rows: int, size: int):
    """A cache of ``rows`` beams for ``size`` new tokens each."""
    def empty(x):
        return jnp.zeros((rows, x.shape[1], size, x.shape[3]), x.dtype)

    return jax.tree.map(empty, prompt_cache)


def _write(cache_BKSH, new_BSKH, positions_B):
    rows_B = jnp.arange(cache_BKSH.shape[0])
    written = cache_BKSH.at[rows_B, :, positions_B].set(new_BSKH[:, 0].astype(cache_BKSH.dtype))
    # Unhindered, XLA:CPU writes a second time inside the attention's fusion, and so copies the whole cache.
    return jax.lax.optimization_barrier(written)


def _logits(x_BD, head_VD):
    return jnp.einsum("BD,VD->BV", x_BD, head_VD, preferred_element_type=jnp.float32)
