"""The model as decoding holds it: layers unstacked, keys and values cached by position.

Prompts are padded on the right. Key j is visible iff j <= the query's position, so padding is never
seen and is overwritten as a row grows. A cache is a tuple over layers of (k, v), each (B, K, S, H),
changed in place.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.quantized import RowWeight, on_cpu, quantise, rows_of
from mtnlg_jax.model.attention import attention, decode_attention, merge
from mtnlg_jax.model.transformer import abstract_model

TABLES = ("tokens_VD", "head_VD")  # what int8 quantises beside the products of the blocks


class Decoder(NamedTuple):
    """A model ready to decode: its shape, and as parameters (all but the blocks, a tuple of
    blocks)."""

    config: ModelConfig
    params: tuple[Any, ...]
    int8_cache: bool = False  # of what rows are written behind

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


def unstack(
    config: ModelConfig,
    params,
    dtype="float32",
    *,
    weights: str | None = None,
    cache: str | None = None,
) -> Decoder:
    """The decoder of trained parameters: the scanned blocks come apart once, since a cache that
    runs through a scan over layers is copied in every step.

    Args:
      params: as ``init_parameters`` or a checkpoint gives them, blocks with a leading L.
      dtype: "float32" or "bfloat16", of parameters, products and cache; float32 stay softmax,
          norms, logits.
      weights: None, or "int8": of products, head included, with a scale for each output; see
          quantized.py.
      cache: None, or "int8": of what rows (not beams) are written behind, with a scale for each
          token and head.
    """
    dtype = check_held(dtype, weights, cache)
    params = unstack_params(params, config=config, dtype=dtype, weights=weights, rows=by_rows())
    return Decoder(config, params, cache == "int8")


def check_held(dtype, weights: str | None, cache: str | None) -> str:
    """The name of ``dtype``. Raises ValueError where a decoder is not held so."""
    if str(jnp.dtype(dtype)) not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} cannot decode; choose float32 or bfloat16")
    for name, value in (("weights", weights), ("cache", cache)):
        if value not in (None, "int8"):
            raise ValueError(
                f"{name}={value!r} is not known; give int8, or leave it out for what dtype says"
            )
    return str(jnp.dtype(dtype))


def split_abstract(config: ModelConfig) -> tuple[nnx.State, nnx.State]:
    """What a decoder's parameters are before any is quantised, as ShapeDtypeStructs: all but the
    blocks, one block."""
    model = nnx.merge(*abstract_model(config))
    block = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), nnx.split(model.blocks)[1]
    )
    model.blocks = None
    return nnx.split(model)[1], block


@functools.partial(jax.jit, static_argnames=("config", "dtype", "weights", "rows"))
def unstack_params(params, *, config, dtype, weights=None, rows=False):
    """``rows``: floats, too, as RowWeights; a mesh splits arrays alone, by their names."""
    int8 = weights == "int8"
    graph = abstract_model(config)[0]
    model = nnx.merge(graph, params)
    rounded = nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), params))
    exact, stacked = (nnx.split(each.blocks)[1] for each in (model, rounded))
    rounded.blocks = None

    def layer(number):
        exact_layer, layer = (jax.tree.map(lambda x: x[number], each) for each in (exact, stacked))
        if not (int8 or rows):
            return layer
        blocks = [nnx.merge(_graphs(config)[1], each) for each in (exact_layer, layer)]
        for part, ours in zip(*((block.attention, block.mlp) for block in blocks), strict=True):
            for name in [
                name
                for name, value in vars(part).items()
                if name.startswith("w_") and value is not None
            ]:
                inputs = 2 if name == "w_o_NHD" else 1
                setattr(
                    ours, name, nnx.Param(rows_of(getattr(part, name)[...], inputs, int8, dtype))
                )
        return nnx.split(blocks[1])[1]

    layers = tuple(map(layer, range(config.num_layers)))
    for name in TABLES if int8 else ():
        if (table := getattr(model, name)) is not None:
            setattr(
                rounded, name, nnx.Param(rows_of(table[...], 1, int8, dtype, outputs_first=True))
            )
    return nnx.split(rounded)[1], layers


def by_rows() -> bool:
    """Whether float weights, too, are best held as RowWeights."""
    return on_cpu()


def run_layers(config: ModelConfig, params, tokens_BS, positions_BS, attend: Callable):
    """(hidden states after the final norm (B, S, D), head (V, D)); ``attend(layer, q, k, v)`` is
    layer ``layer``'s attention over whatever keys there are."""
    x_BSD, head = run(config, params, tokens_BS, positions_BS, attend)
    return x_BSD, head.array(x_BSD.dtype) if isinstance(head, RowWeight) else head


def run(config: ModelConfig, params, tokens_BS, positions_BS, attend: Callable):
    """``run_layers``, with the head as it is held."""
    outer_graph, block_graph = _graphs(config)
    outer, layers = params
    model = nnx.merge(outer_graph, outer)
    x_BSD = _embed(model, tokens_BS, positions_BS)
    for number, layer in enumerate(layers):
        x_BSD = nnx.merge(block_graph, layer)(
            x_BSD, positions_BS, functools.partial(attend, number)
        )
    return model.final_norm(x_BSD), model.head()


def _embed(model, tokens_BS, positions_BS):
    """``model.embed``, also from a quantised table."""
    table = model.tokens_VD[...]
    if not isinstance(table, RowWeight):
        return model.embed(tokens_BS, positions_BS)
    x_BSD = table.rows(tokens_BS, model.final_norm.scale_D[...].dtype)
    return x_BSD if model.positions_PD is None else x_BSD + model.positions_PD[...][positions_BS]


def bucket(length: int, limit: int) -> int:
    """The length to which prompts and candidates are padded: a power of two from 16, at most
    ``limit``."""
    return min(max(16, 1 << (length - 1).bit_length()), limit)


def capacity(length: int, limit: int) -> int:
    """Positions of a cache for ``length`` tokens: 128, 192, 256, 384, 512 ..., at most ``limit``.
    Coarse, so that compiles are few; not always ``limit``, since every step reads all of the
    cache."""
    power = max(128, 1 << (length - 1).bit_length())
    return min(power // 4 * 3 if 128 < power and length <= power // 4 * 3 else power, limit)


def prefill(decoder: Decoder, prompts: Sequence[Sequence[int]], size: int) -> Prefix:
    """Reads ``prompts`` (token ids, at least one each) into a cache of ``size`` positions.

    Raises ValueError on an empty prompt, one longer than ``size``, and ids outside the vocabulary.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1 or lengths.max() > size:
        raise ValueError(
            f"prompts of {lengths.tolist()} tokens do not fit a cache of {size}: give 1 to {size}"
        )
    padded = np.zeros((len(prompts), bucket(int(lengths.max()), size)), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    vocabulary = decoder.config.vocabulary
    if padded.min() < 0 or padded.max() >= vocabulary:
        bad = padded.min() if padded.min() < 0 else padded.max()
        raise ValueError(f"token {bad} lies outside the model's vocabulary, 0 to {vocabulary - 1}")
    return prefill_rows(decoder.params, padded, lengths, config=decoder.config, size=size)


@functools.partial(jax.jit, static_argnames=("config", "size"))
def prefill_rows(params, tokens_BS, lengths_B, *, config, size):
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)
    more = size - tokens_BS.shape[1]
    cache = []

    def attend(_, q, k, v):
        cache.append(
            tuple(jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, more), (0, 0))) for x in (k, v))
        )
        return attention(q, k, v, impl=config.attention_impl)

    x_BSD, head = run(config, params, tokens_BS, positions_BS, attend)
    last_BD = jnp.take_along_axis(x_BSD, (lengths_B - 1)[:, None, None], 1)[:, 0]
    return Prefix(
        jnp.pad(tokens_BS, ((0, 0), (0, more))), lengths_B, logits_of(last_BD, head), tuple(cache)
    )


def step(config: ModelConfig, params, cache, tokens_B, positions_B):
    """Reads one token a row, at its position: (float32 logits of the next (B, V), the cache with
    it)."""
    written = []

    def attend(layer, q, k, v):
        written.append(_write(cache[layer], k, v, positions_B[:, None]))
        return _look(q[:, 0], written[-1], positions_B + 1)[:, None]

    x_BSD, head = run(config, params, tokens_B[:, None], positions_B[:, None], attend)
    return logits_of(x_BSD[:, 0], head), tuple(written)


def read(config: ModelConfig, params, cache, tokens_BT, starts_B):
    """Reads T tokens a row, from position ``starts_B`` on, of which none needs to be kept: what is
    not advanced over is never seen and is overwritten. What lies past the cache is not written, and
    its logits mean nothing.

    Returns: float32 logits behind each of them (B, T, V), the cache with them."""
    length = tokens_BT.shape[1]
    positions_BT = starts_B[:, None] + jnp.arange(length)
    written = []

    def attend(layer, q, k, v):
        # Before the cache, the T queries of a row are so many more query heads; among themselves
        # they are causal.
        batch, _, heads, width = q.shape
        kv_heads = k.shape[2]
        grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width).transpose(
            0, 2, 1, 3, 4
        )
        o_old, lse_old = _look(
            grouped.reshape(batch, -1, width), cache[layer], starts_B, return_lse=True
        )
        o_old = o_old.reshape(grouped.shape).transpose(0, 2, 1, 3, 4).reshape(q.shape)
        lse_old = lse_old.reshape(grouped.shape[:-1]).transpose(0, 2, 1, 3).reshape(q.shape[:-1])
        written.append(_write(cache[layer], k, v, positions_BT))
        own = (as_cached(k), as_cached(v)) if len(cache[layer]) == 4 else (k, v)
        o_own, lse_own = attention(q, *own, return_lse=True)
        return merge(o_old, lse_old, o_own, lse_own.swapaxes(1, 2)).astype(q.dtype)

    places_BT = jnp.minimum(positions_BT, config.max_position_embeddings - 1)
    x_BTD, head = run(config, params, tokens_BT, places_BT, attend)
    return logits_of(x_BTD, head), tuple(written)


def to_int8(cache):
    """A float cache as int8 with one scale for each token and head: layers (k, v, k_scale,
    v_scale)."""

    def layer(k, v):
        k, k_scale = quantise(k, -1)
        v, v_scale = quantise(v, -1)
        return k, v, k_scale, v_scale

    return tuple(layer(*pair) for pair in cache)


def as_cached(x):
    """Keys or values (..., H) as they are once read from an int8 cache."""
    number, scale = quantise(x, -1)
    return (number * scale[..., None]).astype(x.dtype)


def _look(q_BNH, layer, lengths_B, **options):
    k, v, *scales = layer
    names = dict(zip(("k_scale", "v_scale"), scales, strict=False))
    return decode_attention(q_BNH, k, v, lengths_B, **names, **options)


def _write(layer, k_BTKH, v_BTKH, positions_BT):
    """The cache of a layer with new keys and values; positions past it are not written."""
    new = k_BTKH, v_BTKH
    if len(layer) == 4:
        (k, k_scale), (v, v_scale) = (quantise(x, -1) for x in new)
        new = k, v, k_scale, v_scale
    rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
    # Unhindered, XLA:CPU writes a second time inside the attention's fusion, and so copies the
    # whole cache.
    return tuple(
        jax.lax.optimization_barrier(
            old.at[rows_B1, :, positions_BT].set(x.astype(old.dtype), mode="drop")
        )
        for old, x in zip(layer, new, strict=True)
    )


def logits_of(x, head):
    """float32 logits (..., V) of hidden states (..., D)."""
    if not isinstance(head, RowWeight):
        if not by_rows():
            return jnp.einsum("...D,VD->...V", x, head, preferred_element_type=jnp.float32)
        head = rows_of(head, 1, False, head.dtype, outputs_first=True)
    return head.float32(x)
