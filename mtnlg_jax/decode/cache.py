"""The model for decoding: layers unstacked, keys and values cached by position.

Prompts are padded on the right. Key j is visible iff j <= the query's position, so padding is never
attended to and is overwritten as a row grows. A cache is a tuple over layers of (k, v), each
(B, K, T, H), updated in place; rolling.py has the layers that keep only a window.
"""

# Shapes: B rows, S query positions, T key positions, D width, N query heads, K key/value heads,
# H head width, V vocabulary, L layers

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mtnlg_jax.config import ModelConfig
from mtnlg_jax.decode.forward import graphs, logits_of, run
from mtnlg_jax.decode.positions import NOWHERE, lengthened, write
from mtnlg_jax.decode.quantized import by_rows, experts_of, rows_of
from mtnlg_jax.decode.rolling import Rolling, read_window, roll
from mtnlg_jax.decode.sharding import Placement
from mtnlg_jax.decode.stages import stacked
from mtnlg_jax.model.attention import attention, decode_attention, merge, merge_lse
from mtnlg_jax.model.quantize import quantize
from mtnlg_jax.model.transformer import abstract_model
from mtnlg_jax.parallel.auto import over_its_mesh, padded_positions, split
from mtnlg_jax.parallel.mesh import EXPERT_BIAS, parameter_name

ROUTER = "w_router_DE"
TABLES = ("tokens_VD", "head_VD")  # quantized to int8 together with the matrices of the blocks


class Decoder(NamedTuple):
    """A model ready to decode."""

    config: ModelConfig
    params: tuple[Any, ...]  # (all but the blocks, a tuple of blocks)
    int8_cache: bool = False  # whether keys and values of rows are held in int8
    mesh: Mesh | None = None  # over which ``params`` are split; None: on one device
    block_tokens: int = 4096  # of given texts that one call of the model scores
    adapters: tuple[str, ...] = ()  # names of those that rows may have; see adapters.py

    @property
    def context(self) -> int:
        return self.config.max_position_embeddings


class Prefix(NamedTuple):
    """Prompts that the model has read, from which decoding continues."""

    tokens_BS: jax.Array  # int32, right-padded to the capacity of the cache
    lengths_B: jax.Array | np.ndarray
    logits_BV: jax.Array  # float32, for the token after each prompt
    cache: tuple[Any, ...]  # for each layer (k, v), or Rolling


def unstack(
    config: ModelConfig,
    params,
    dtype="float32",
    *,
    weights: str | None = None,
    cache: str | None = None,
    mesh: Mesh | None = None,
) -> Decoder:
    """Return the decoder of trained parameters.

    Splits the scanned blocks once, since a cache carried through a scan over layers would be copied
    in every step.

    Args:
      params: as from ``init_parameters`` or a checkpoint, blocks with a leading L.
      dtype: "float32" or "bfloat16", of parameters, products and cache; softmax, norms and logits
        stay float32.
      weights: None, or "int8" for the weights of products, head included, with a scale for each
        output; see quantized.py.
      cache: None, or "int8" for the keys and values of rows (not beams), with a scale for each
        token and head.
      mesh: None, or devices to split the parameters over; see sharding.py.
    """
    dtype = check_held(dtype, weights, cache)
    placement = None if mesh is None else Placement(config, split_abstract(config), mesh)
    params = unstack_params(params, config=config, dtype=dtype, weights=weights, rows=by_rows())
    if placement is not None:
        outer, layers = params
        layers = stacked(layers, placement.stages)
        params = placement.move(outer), tuple(map(placement.move, layers))
    return Decoder(config, params, cache == "int8", mesh)


def check_held(dtype, weights: str | None, cache: str | None) -> str:
    """Return the name of ``dtype``. Raise ValueError if a decoder cannot have one of the three."""
    if str(jnp.dtype(dtype)) not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} cannot decode; choose float32 or bfloat16")
    for name, value in (("weights", weights), ("cache", cache)):
        if value not in (None, "int8"):
            raise ValueError(f"unknown {name}={value!r}; give int8, or leave it out to use dtype")
    return str(jnp.dtype(dtype))


def split_abstract(config: ModelConfig) -> tuple[nnx.State, nnx.State]:
    """Return a decoder's parameters before quantization: (all but the blocks, one block).

    The leaves are ShapeDtypeStructs.
    """
    model = nnx.merge(*abstract_model(config))
    block = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), nnx.split(model.blocks)[1]
    )
    model.blocks = None
    return nnx.split(model)[1], block


@functools.partial(jax.jit, static_argnames=("config", "dtype", "weights", "rows"))
def unstack_params(params, *, config, dtype, weights=None, rows=False):
    """Return a decoder's parameters.

    ``rows``: hold float weights as RowWeights as well.
    """
    int8 = weights == "int8"
    graph = abstract_model(config)[0]
    model = nnx.merge(graph, params)

    def in_dtype(path, leaf):
        return leaf if parameter_name(path) == EXPERT_BIAS else leaf.astype(dtype)

    rounded = nnx.merge(graph, jax.tree_util.tree_map_with_path(in_dtype, params))
    exact, stacked = (nnx.split(each.blocks)[1] for each in (model, rounded))
    rounded.blocks = None

    def layer(number):
        exact_layer, layer = (jax.tree.map(lambda x: x[number], each) for each in (exact, stacked))
        if not (int8 or rows):
            return layer
        source, target = (nnx.merge(graphs(config)[1], each) for each in (exact_layer, layer))
        pairs = [(source.attention, target.attention), (source.mlp, target.mlp)]
        if getattr(source.mlp, "shared", None) is not None:
            pairs.append((source.mlp.shared, target.mlp.shared))
        for part, held in pairs:
            for name, value in list(vars(part).items()):
                if not name.startswith("w_") or value is None:
                    continue
                if name.rpartition("_")[2].startswith("E"):
                    if int8:
                        setattr(held, name, nnx.Param(experts_of(value[...])))
                    continue
                inputs = 2 if name == "w_o_NHD" else 1
                # int8 is rounded from the float32 weight, not from its bfloat16.
                # The router stays exact: rounding would send tokens to other experts.
                weight = rows_of(value[...], inputs, int8 and name != ROUTER, dtype)
                setattr(held, name, nnx.Param(weight))
        return nnx.split(target)[1]

    layers = tuple(map(layer, range(config.num_layers)))
    for name in TABLES if int8 else ():
        if (table := getattr(model, name)) is not None:
            weight = rows_of(table[...], 1, True, dtype, outputs_first=True)
            setattr(rounded, name, nnx.Param(weight))
    return nnx.split(rounded)[1], layers


def bucket(length: int, limit: int) -> int:
    """Return the padded length of prompts and candidates: a power of two from 16, at most
    ``limit``."""
    return min(max(16, 1 << (length - 1).bit_length()), limit)


def capacity(length: int, limit: int, least: int = 128) -> int:
    """Return the positions of a cache for ``length`` tokens: 128, 192, 256, 384 ... ``limit``.

    Coarse, so that few programs are compiled; not always ``limit``, since every step reads the
    whole cache. ``least``: the first of these sizes, a power of two.
    """
    power = max(least, 1 << (length - 1).bit_length())
    between = power // 4 * 3
    return min(between if least < power and length <= between else power, limit)


@over_its_mesh
def prefill(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    size: int,
    *,
    rolling: bool = False,
    prefixes: np.ndarray | None = None,
) -> Prefix:
    """Read ``prompts`` (token ids, at least one each) into a cache of ``size`` positions.

    ``rolling``: keep only the windows of windowed layers. Rows need no more to continue the
    prompts; speculation, beams and scores need all positions. ``prefixes``: what stands where a
    prompt has tokens below 0, from `decode.prefixes.stacked`.

    Raises ValueError on an empty prompt, one longer than ``size``, and ids outside the vocabulary.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not len(lengths) or lengths.min() < 1 or lengths.max() > size:
        raise ValueError(
            f"prompts of {lengths.tolist()} tokens do not fit a cache of {size}: give 1 to {size}"
        )
    width = padded_positions(bucket(int(lengths.max()), size))
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    vocabulary = decoder.config.vocabulary
    if prefixes is None and padded.min() < 0 or padded.max() >= vocabulary:
        token = padded.min() if padded.min() < 0 else padded.max()
        raise ValueError(f"token {token} is outside the model's vocabulary, 0 to {vocabulary - 1}")
    return prefill_rows(
        decoder.params, padded, lengths, prefixes, config=decoder.config, size=size, rolling=rolling
    )


@functools.partial(jax.jit, static_argnames=("config", "size", "rolling"))
def prefill_rows(
    params, tokens_BS, lengths_B, prefixes=None, *, config, size, rolling=False
) -> Prefix:
    """Read padded prompts into a cache of ``size`` positions; the options are those of `prefill`.

    The cache has a few positions more where ``context`` does not divide ``size``.
    """
    positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1]), tokens_BS.shape)

    def pad(x):
        return lengthened(x, padded_positions(size))

    def attend(layer, q, k, v, **options):
        pair = k.swapaxes(1, 2), v.swapaxes(1, 2)
        held = roll(config, layer.number, pair, layer.rows, size) if rolling else pair
        held = held if isinstance(held, Rolling) else tuple(map(pad, held))
        return attention(q, k, v, impl=config.attention_impl, **options), held

    lengths_B = jnp.asarray(lengths_B)
    x_BSD, head, cache = run(
        config, params, tokens_BS, positions_BS, attend, rows=lengths_B, prefix=prefixes
    )
    if prefixes is not None:
        # Penalties and bans read the tokens of a prompt: its <bos> stands for the prefix there.
        first = config.prefix.positions
        tokens_BS = jnp.where(tokens_BS < 0, tokens_BS[:, first : first + 1], tokens_BS)
    last_BD = jnp.take_along_axis(x_BSD, (lengths_B - 1)[:, None, None], 1)[:, 0]
    more = max(0, size - tokens_BS.shape[1])
    tokens_BS = jnp.pad(tokens_BS[:, :size], ((0, 0), (0, more)))
    return split_prefix(Prefix(tokens_BS, lengths_B, logits_of(last_BD, head), cache))


def split_prefix(prefix: Prefix) -> Prefix:
    """Return ``prefix`` split over the mesh in context."""
    return Prefix(
        split(prefix.tokens_BS, "BS"),
        split(jnp.asarray(prefix.lengths_B), "B"),
        split(prefix.logits_BV, "BV"),
        split_cache(prefix.cache),
    )


def split_cache(cache, place: Callable = split):
    """Return a cache of rows split over the mesh in context; scales have no H."""
    return jax.tree.map(lambda x: place(x, "BLTH"[: x.ndim]), cache)


def step(config: ModelConfig, params, cache, tokens_B, positions_B, active_B=None):
    """Read one token of each row at its position.

    ``active_B``: the rows whose token is written to the cache; None writes all.

    Returns: float32 logits of the next token (B, V), and the cache with the token.
    """

    x_BSD, head, cache = run(
        config,
        params,
        tokens_B[:, None],
        positions_B[:, None],
        attend_newest,
        cache=cache,
        rows=positions_B if active_B is None else (positions_B, active_B),
    )
    return logits_of(x_BSD[:, 0], head), cache


def attend_newest(layer, q, k, v, return_lse=False, **options):
    """Attend from one token of each row to its cache, and return the cache with the token.

    ``layer.rows``: the positions, or (positions, which rows write their token).
    """
    held = layer.cache
    positions_B, active_B = layer.rows if isinstance(layer.rows, tuple) else (layer.rows, None)
    at_B = positions_B
    lengths_B = positions_B + 1
    rolling = isinstance(held, Rolling)
    if rolling:
        # The slot of the key that just left the window. All other slots in use are visible.
        window = options.pop("window")
        at_B = positions_B % window
        lengths_B = jnp.minimum(lengths_B, window)
    if active_B is not None:
        # Past the cache, where nothing is written.
        at_B = jnp.where(active_B, at_B, NOWHERE)
    arrays = write(held.arrays if rolling else held, k, v, at_B[:, None], layer.live)
    out, lse = _attend_cached(q[:, 0], arrays, lengths_B, return_lse=True, **options)
    found = (out[:, None], lse[..., None]) if return_lse else out[:, None]
    return found, Rolling(arrays) if rolling else arrays


def read(config: ModelConfig, params, cache, tokens_BS, starts_B, counts_B=None):
    """Read S tokens of each row, from position ``starts_B`` on.

    The caller may discard any of them: a row that does not advance over a token never attends to
    it, and overwrites it later. Positions past the cache are not written, and their logits have no
    meaning.

    ``counts_B``: how many of the S are tokens of each row. Needed where layers keep only windows.

    Returns: float32 logits after each token (B, S, V), and the cache with the tokens.
    """
    length = tokens_BS.shape[1]
    positions_BS = starts_B[:, None] + jnp.arange(length)[None, :]

    def attend(layer, q, k, v, return_lse=False, **options):
        # All S queries of a row see the whole old cache, so decode_attention takes them as more
        # query heads of one position. Among themselves they are causal.
        held = layer.cache
        positions_BS, starts_B, counts_B = layer.rows
        own = (k, v)
        if len(held.arrays if isinstance(held, Rolling) else held) == 4:
            own = as_cached(k), as_cached(v)
        if isinstance(held, Rolling):
            window = options.pop("window")
            found, at_BS = read_window(
                q, *own, held, window, starts_B, counts_B, return_lse=return_lse, **options
            )
            return found, Rolling(write(held.arrays, k, v, at_BS, layer.live))
        batch, _, heads, width = q.shape
        kv_heads = k.shape[2]
        grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
        grouped = grouped.transpose(0, 2, 1, 3, 4)
        queries = grouped.reshape(batch, -1, width)
        old_options = options_of_heads(options, grouped.shape[1:4], 1)
        if "window" in options or "alibi_slopes" in options:
            positions = jnp.broadcast_to(positions_BS[:, None, :, None], grouped.shape[:4])
            old_options["positions"] = positions.reshape(batch, -1)
        o_old, lse_old = _attend_cached(queries, held, starts_B, return_lse=True, **old_options)
        o_old = o_old.reshape(grouped.shape).transpose(0, 2, 1, 3, 4).reshape(q.shape)
        lse_old = lse_old.reshape(grouped.shape[:-1]).transpose(0, 2, 1, 3).reshape(q.shape[:-1])
        written = write(held, k, v, positions_BS, layer.live)
        o_own, lse_own = attention(q, *own, return_lse=True, **options)
        out = merge(o_old, lse_old, o_own, lse_own.swapaxes(1, 2)).astype(q.dtype)
        found = (out, merge_lse(lse_old.swapaxes(1, 2), lse_own)) if return_lse else out
        return found, written

    valid_BS = jnp.minimum(positions_BS, config.max_position_embeddings - 1)
    rows = positions_BS, starts_B, counts_B
    x_BSD, head, cache = run(config, params, tokens_BS, valid_BS, attend, cache=cache, rows=rows)
    return logits_of(x_BSD, head), cache


def to_int8(cache):
    """Return a float cache in int8, with a scale for each token and head.

    Its layers are (k, v, k_scale, v_scale).
    """

    def layer(k, v):
        k, k_scale = quantize(k, -1)
        v, v_scale = quantize(v, -1)
        return k, v, k_scale, v_scale

    return tuple(
        Rolling(layer(*held.arrays)) if isinstance(held, Rolling) else layer(*held)
        for held in cache
    )


def as_cached(x):
    """Return keys or values (..., H) rounded as an int8 cache does."""
    number, scale = quantize(x, -1)
    return (number * scale[..., None]).astype(x.dtype)


def options_of_heads(options: dict, shape: Sequence[int], inserted: int) -> dict:
    """Return attention options for queries that are passed as more heads.

    There is one slope for each of the N heads. The passed heads have ``shape``: (K, N / K) with one
    more dim at ``inserted``.
    """
    if "alibi_slopes" not in options:
        return dict(options)
    kept = [size for at, size in enumerate(shape) if at != inserted]
    slopes = jnp.expand_dims(options["alibi_slopes"].reshape(kept), inserted)
    return options | {"alibi_slopes": jnp.broadcast_to(slopes, shape).reshape(-1)}


def _attend_cached(q_BNH, layer, lengths_B, **options):
    """Attend to the first ``lengths_B`` positions of a layer's cache."""
    k, v, *scales = layer
    names = dict(zip(("k_scale", "v_scale"), scales, strict=False))
    return decode_attention(q_BNH, k, v, lengths_B, **names, **options)
