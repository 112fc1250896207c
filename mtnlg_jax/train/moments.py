"""Moments of an optimizer in fewer bits (optimizer.moments_dtype), and in the memory of the host.

A transformation of Optax computes in float32. `stored` wraps it: between steps the moments of
matrices and tables are held in bfloat16 or int8; those of norms and biases stay float32, as in
Dettmers 2021 (arXiv 2110.02861), and with int8 those of tables too (their section 2.3).

Rounding is stochastic: of the two neighbors of a value that can be stored, the nearer one is the
more probable, so that the expected stored value is the value. To the nearest, b2 = 0.999 would
change a second moment in bfloat16 by less than half its spacing (2^-9 of it) unless the squared
gradient is about three times the moment: it would never fall. With stochastic rounding the expected
moment is that of float32, by induction over the steps: the update of a moment is linear in it. The
errors of single steps are uncorrelated and shrink by b2 a step, so they add up to a standard
deviation of at most 1 / (2 sqrt(1 - b2^2)) spacings: 1.6 at 0.95, 11 at 0.999, of at most 2^-7 of
the moment each. The random bits follow from train.seed, the optimizer's count of steps, the name of
the parameter and the position in the whole tensor, so every mesh and every resume rounds alike.

int8: a block of numbers has a scale, its largest magnitude; codes are positions in the dynamic map
of Dettmers 2021: seven decades, of which the k-th has 2^k codes (2^(k+1) without a sign). The map
of first moments has 1 as the largest magnitude of both signs, where the paper has it for one.
Second moments are stored by their square roots, so that the map spans fourteen decades of them, and
one above 0 never becomes 0: no first moment is divided by eps alone. Rounding is unbiased in the
second moment, not in its root. Neighboring codes of the roots differ by less than a factor of 2.75,
which bounds how much larger their rounding can make an update.

A block is a head (H), or along an MLP's width the largest power of two up to 128 that divides an
eighth of it: no mesh that divides these widths splits a block (`config.memory_rules`).
"""

# Shapes: in names of parameters L layers, D width, F MLP width, N query heads, K key/value heads,
# H head width, E experts, V vocabulary

import functools
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mtnlg_jax.config.memory_rules import width_block
from mtnlg_jax.model.params import name_of
from mtnlg_jax.parallel.mesh import dims_of, parameter_name
from mtnlg_jax.train.quantized_base import is_quantized

# Fields of Optax's states that hold moments, and whether these are squares, which have no sign.
# Everything else, such as the preconditioners of SOAP, stays float32.
SQUARES = {"mu": False, "nu": True}
DECADES = 7
CODES = "codes_"  # in names of int8 moments, before their dims
SCALES = "absmax_"


class Moment(NamedTuple):
    """A leaf of an optimizer's state that `stored` may hold in fewer bits."""

    field: str  # a key of SQUARES
    parameter: str  # dotted name, such as blocks.mlp.w_in_DF
    dims: str  # LDF

    @property
    def squares(self) -> bool:
        return SQUARES[self.field]


def moment_of(path: Any) -> Moment | None:
    """Return the moment to which the leaf at ``path`` of an optimizer's state belongs, as a whole
    or as its codes or scales; None for others, such as counts and moments of norms and biases."""
    fields = [at for at, key in enumerate(path) if getattr(key, "name", None) in SQUARES]
    if not fields:
        return None
    below = path[fields[0] + 1 :]
    while below and parameter_name(below).startswith((CODES, SCALES)):
        below = below[:-1]
    if not below or parameter_name(below).startswith(("scale_", "bias_", "b_")):
        return None
    return Moment(path[fields[0]].name, name_of(below), dims_of(below))


def stored(
    inner: optax.GradientTransformation, dtype: str, seed: int
) -> optax.GradientTransformation:
    """Return ``inner`` with its moments held in ``dtype``.

    ``inner`` must treat each parameter separately, count its steps in its state, and have its
    moments in fields that `SQUARES` names.
    """
    if dtype == "float32":
        return inner

    def init(params: Any) -> Any:
        return _new(inner.init(params), dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = inner.update(updates, decode(state), params)
        return updates, encode(new, dtype, seed)

    return optax.GradientTransformation(init, update)


# --- states


def _new(state: Any, dtype: str) -> Any:
    """Return the new ``state`` of an optimizer with its moments, which are 0, in ``dtype``."""
    # Not by `encode`: XLA would compute all of it while it compiles.
    shapes = jax.eval_shape(lambda state: encode(state, dtype, seed=0), state)
    named = jax.tree_util.tree_leaves_with_path(state)
    others = iter([leaf for path, leaf in named if moment_of(path) is None])
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if moment_of(path) else next(others), shapes
    )


def encode(state: Any, dtype: str, seed: int) -> Any:
    """Return an optimizer's ``state`` with its moments in ``dtype``, rounded by random bits from
    ``seed``."""
    if dtype == "float32":
        return state
    key = jax.random.fold_in(jax.random.key(seed), _hash("moments"))
    key = jax.random.fold_in(key, _count_of(state))

    def bits_of(moment: Moment, shape: tuple[int, ...]) -> jax.Array:
        own = jax.random.fold_in(key, _hash(f"{moment.field} {moment.parameter}"))
        return jax.random.bits(own, shape, jnp.uint16)

    def one(path: Any, leaf: Any) -> Any:
        moment = moment_of(path)
        if moment is None:
            return leaf
        if dtype == "bfloat16":
            return to_bfloat16(leaf, bits_of(moment, leaf.shape))
        blocks = blocks_of(moment, leaf.shape)
        if blocks is None:
            return leaf
        bits = bits_of(moment, leaf.shape)
        codes, scales = to_int8(leaf, bits, *blocks, moment.squares)
        return dict(zip(names_of(moment), (codes, scales), strict=True))

    return jax.tree_util.tree_map_with_path(one, state)


def decode(state: Any) -> Any:
    """Return ``state`` of `encode` with its moments in float32."""

    def one(path: Any, leaf: Any) -> Any:
        moment = moment_of(path)
        if moment is None:
            return leaf
        if not _is_pair(leaf):
            return leaf.astype(jnp.float32)
        codes, scales = (leaf[name] for name in names_of(moment))
        if isinstance(codes, optax.MaskedNode):  # `offload` takes one parameter at a time
            return codes
        return from_int8(codes, scales, _block_axis(moment.dims), moment.squares)

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=_is_pair)


def _is_pair(node: Any) -> bool:
    return isinstance(node, dict) and any(str(key).startswith(CODES) for key in node)


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


def _count_of(state: Any) -> Any:
    """Return the optimizer's count of its steps."""
    leaves = jax.tree.leaves(state)
    counts = [x for x in leaves if not x.ndim and jnp.issubdtype(x.dtype, jnp.integer)]
    assert counts, "an optimizer that counts no steps cannot draw random bits for each"
    return counts[0]


# --- bfloat16


def to_bfloat16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """Round float32 ``x`` stochastically by 16 random ``bits`` for each number."""
    # The lower half of a float32 is what bfloat16 drops. Adding random bits below 2^16 carries into
    # the upper half with the probability that the dropped part asks for, of either sign.
    whole = lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    upper = lax.bitcast_convert_type((whole >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


# --- int8


def blocks_of(moment: Moment, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Return (the dim that is split into blocks, the numbers of a block); None where the moment has
    none and stays float32: tables, routers, and matrices with neither heads nor an MLP's width."""
    if not is_quantized(moment.parameter.rsplit(".", 1)[-1]):
        return None
    # The gate of a shared expert, and the patch encoder and projector of a prefix.
    if not set("HF") & set(moment.dims):
        return None
    axis = _block_axis(moment.dims)
    block = shape[axis] if moment.dims[axis] == "H" else width_block(shape[axis])
    return (axis, block) if block else None


def _block_axis(dims: str) -> int:
    return dims.index("H" if "H" in dims else "F")


def names_of(moment: Moment) -> tuple[str, str]:
    """Return the names of a moment's codes and scales. Heads, which are blocks, are a dim less."""
    dims = moment.parameter.rsplit("_", 1)[1]
    return CODES + dims, SCALES + dims.replace("H", "")


def to_int8(
    x: jax.Array, bits: jax.Array, axis: int, block: int, squares: bool
) -> tuple[jax.Array, jax.Array]:
    """Return (codes, scales) of float32 ``x``, rounded stochastically by 16 random ``bits`` each.

    Codes have the shape of ``x``: int8, or uint8 of ``squares``. Scales, float32, have one number
    for each block of ``axis``, which is left out where it is one block.
    """
    parts = (*x.shape[:axis], -1, block, *x.shape[axis + 1 :])
    x = x.reshape(parts)
    magnitude = jnp.sqrt(x) if squares else jnp.abs(x)
    scale = magnitude.max(axis + 1, keepdims=True)
    share = magnitude / jnp.where(scale > 0, scale, 1)
    lower = _code_below(share, squares)
    low = _value_of(lower, squares)
    high = _value_of(lower + 1, squares)
    if squares:
        # Unbiased in the square, which is what the optimizer averages.
        upward = (jnp.square(share) - jnp.square(low)) / (jnp.square(high) - jnp.square(low))
    else:
        upward = (share - low) / (high - low)
    drawn = bits.reshape(parts).astype(jnp.float32) * 2.0**-16
    code = lower + (drawn < upward)
    if squares:
        code = jnp.where(x > 0, jnp.maximum(code, 1), code).astype(jnp.uint8)
    else:
        code = jnp.where(x < 0, -code, code).astype(jnp.int8)
    scales = scale.squeeze((axis, axis + 1) if scale.shape[axis] == 1 else axis + 1)
    return code.reshape(bits.shape), scales


def from_int8(codes: jax.Array, scales: jax.Array, axis: int, squares: bool) -> jax.Array:
    """Return the float32 numbers of `to_int8`."""
    blocks = scales.shape[axis] if scales.ndim == codes.ndim else 1
    shape = codes.shape
    whole = codes.reshape(*shape[:axis], blocks, -1, *shape[axis + 1 :]).astype(jnp.int32)
    scale = scales.reshape(*shape[:axis], blocks, 1, *shape[axis + 1 :])
    x = jnp.sign(whole) * _value_of(jnp.abs(whole), squares) * scale
    return (jnp.square(x) if squares else x).reshape(shape)


# In the k-th decade, from 0, the first code is 2^k, or with squares 2^(k+1) - 1, and its numbers
# lie in the middle of equal parts of [0.1, 1] x 10^(k - 6).


def _last_code(squares: bool) -> int:
    return 255 if squares else 127


def _value_of(code: jax.Array, squares: bool) -> jax.Array:
    """Return the values in [0, 1] of int32 codes, which are 0 or above."""
    number = code + squares
    decade = _number_of(number >= 1 << k for k in range(squares + 1, squares + DECADES))
    codes_of_decade = (1 << squares) << decade
    part = (number - codes_of_decade + 0.5) / codes_of_decade
    value = _power_of_ten(decade) * (0.1 + 0.9 * part)
    value = jnp.where(code == 0, 0.0, value)
    return jnp.where(code >= _last_code(squares), 1.0, value)


def _code_below(share: jax.Array, squares: bool) -> jax.Array:
    """Return the last code whose value is not above ``share``, of [0, 1], up to rounding; it is not
    the last of all."""
    firsts = [_first_value(k, squares) for k in range(DECADES)]
    decade = _number_of(share >= first for first in firsts[1:])
    codes_of_decade = (1 << squares) << decade
    part = (share / _power_of_ten(decade) - 0.1) / 0.9 * codes_of_decade - 0.5
    within = jnp.clip(part.astype(jnp.int32), 0, codes_of_decade - 1)
    code = jnp.where(share >= firsts[0], codes_of_decade - squares + within, 0)
    return jnp.minimum(code, _last_code(squares) - 1)


def _number_of(conditions: Iterable[jax.Array]) -> jax.Array:
    """Return how many of the ``conditions`` hold, at each position."""
    return functools.reduce(jnp.add, (each.astype(jnp.int32) for each in conditions))


def _first_value(decade: int, squares: bool) -> float:
    return 10.0 ** (decade - DECADES + 1) * (0.1 + 0.45 / ((1 << squares) << decade))


def _power_of_ten(decade: jax.Array) -> jax.Array:
    """Return 10^(decade - 6)."""
    # Comparisons rather than a table: TPUs look up tables number by number.
    power = jnp.full(decade.shape, 10.0 ** (1 - DECADES), jnp.float32)
    for k in range(1, DECADES):
        power = jnp.where(decade >= k, 10.0 ** (k - DECADES + 1), power)
    return power
